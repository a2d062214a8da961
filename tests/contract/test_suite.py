"""The suite itself: each of its lines rejects a backend that breaks it, and it runs on a backend in a file."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import broken_backends
import pytest
from broken_backends import CAUGHT_BY

import flash2

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, set[str]]:
    """Backend class -> names of the tests that failed on it, from one run of the suite on all of them."""
    report = tmp_path_factory.mktemp("suite") / "report.xml"
    names = [f"{broken_backends.__file__}:{bug.__name__}" for bug in CAUGHT_BY]
    tests = " or ".join(f"({test} and {bug.__name__})" for bug, test in CAUGHT_BY.items())
    files = [str(HERE / f"test_{name}.py") for name in ("semantics", "numbers", "memory", "running")]
    options = ["--backends", ",".join(names), "-k", tests, "-q", "--tb=no", "-r", "N", "-p", "no:cacheprovider"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of ours
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *options, f"--junitxml={report}"],
        cwd=Path(flash2.__file__).parent,
        env=own,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    failed: dict[str, set[str]] = {}
    for test in ET.parse(report).iter("testcase"):
        if test.find("failure") is not None:
            name, _, cell = test.attrib["name"].partition("[")
            for bug in CAUGHT_BY:
                if f":{bug.__name__}-" in f"{cell[:-1]}-":
                    failed.setdefault(bug.__name__, set()).add(name)
    return failed


@pytest.mark.parametrize("bug", CAUGHT_BY, ids=lambda bug: bug.name)
def test_a_broken_backend_fails(failures, bug):
    assert CAUGHT_BY[bug] in failures.get(bug.__name__, set()), bug.__doc__
