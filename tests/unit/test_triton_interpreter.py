"""The Triton kernels on the CPU: one process with Triton's interpreter runs their own tests and the contract."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flash2

pytest.importorskip("triton")
ROOT = Path(flash2.__file__).parent
# Of the contract what small problems show: test_numbers takes minutes, and tests/interpret has what it needs of it.
TESTS = ["interpret", "contract/test_semantics.py", "contract/test_memory.py", "contract/test_running.py"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets, and collects them")
def test_the_kernels_by_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--backends", "triton", "-p", "no:cacheprovider"]
        + [f"tests/{name}" for name in TESTS],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 200, f"only {passed} tests ran:\n{done.stdout[-4000:]}"
