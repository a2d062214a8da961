"""The numba-cuda kernels on the CPU: one process with numba's CUDA simulator runs their own tests and the contract's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flash2

pytest.importorskip("numba")
ROOT = Path(flash2.__file__).parent
# Of the contract what tiny problems show; the simulator runs a thread of Python for every thread of a block.
ELSEWHERE = (
    "not grouped_heads and not score_options and not hidden_values_reach_nothing"  # of tests/simulate's problems
)
TESTS = ["tests/simulate", "tests/contract/test_semantics.py", "-k", ELSEWHERE]


def test_the_kernels_by_the_simulator():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--backends", "numba-cuda", "-p", "no:cacheprovider", *TESTS],
        cwd=ROOT,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 90, f"only {passed} tests ran:\n{done.stdout[-4000:]}"
