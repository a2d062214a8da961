"""Who may import whom, read from the source; and what a start of the program imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flash2

ROOT = Path(flash2.__file__).parent
# Optional package -> the modules of backends/ that may import it.
OPTIONAL = {
    "triton": ("triton_fa2", "gluon_hopper"),
    "cupy": ("cupy_cuda",),
    "numba": ("numba_cpu", "numba_kernels", "numba_cuda", "numba_cuda_kernels"),
    "llvmlite": ("numba_kernels",),
    "numba_cuda": (),  # takes the place of numba.cuda
    "flash_attn": ("peers",),
    "flash_attn_interface": ("peers",),
    "matplotlib": (),
    "pynvml": (),
    "transformers": (),
}
SAME = (  # one backend in several files beside each other
    ("numba_cpu", "numba_kernels"),
    ("numba_cuda", "numba_cuda_kernels"),
)
TORCH_FREE = ("problem", "results", "report", "ways")  # of core: read by programs that never load torch


def violations(path: str, source: str) -> list[str]:
    """What `source`, as the file `path` relative to the checkout, imports against the rules of the house."""
    module = path.removesuffix(".py").removesuffix("/__init__").split("/")
    package = ["flash2", *(module if path.endswith("/__init__.py") else module[:-1])]
    tree = ast.parse(source)
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(function)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else []
            stem = [*stem, *(node.module or "").split(".")] if node.module else stem
            names = [".".join([*stem, alias.name]) for alias in node.names]
        found += [
            f"{path}:{node.lineno} imports {name}"
            for name in names
            if not allowed(module, name.split("."), lazy=id(node) in lazy)
        ]
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def allowed(module: list[str], name: list[str], *, lazy: bool) -> bool:
    """May `module`, e.g. ["core", "judge"], import `name`, e.g. ["flash2", "core", "problem", "Problem"]?

    `lazy`: only when a function runs, or only for a type checker.
    """
    in_backend = module[0] == "backends" and len(module) > 1
    if module[0] == "integrations":  # a user of the package, and of the library it is named after
        return name[0] == module[-1] or name[0] not in OPTIONAL
    if name[0] in OPTIONAL:
        return module[1] in OPTIONAL[name[0]] if in_backend else lazy
    if name[0] == "torch":
        return not (module[0] == "core" and module[-1] in TORCH_FREE) and (lazy or module[0] != "__init__")
    if name[0] != "flash2":
        return True
    what = name[1:]
    if in_backend:
        siblings = next((files for files in SAME if module[1] in files), (module[1],))
        core = (["core", name] for name in ("contract", "problem", "quick"))
        return what[:2] in (*core, *(["backends", file] for file in siblings))
    if module[0] == "core":
        return what[:1] == ["core"]
    if module[0] == "backends":  # the shelf itself
        return lazy and what[:2] == ["core", "contract"]
    return what[:1] in (["backends"], ["core"])


def test_the_house_keeps_its_rules():
    files = [
        ROOT / "bench.py",
        ROOT / "__init__.py",
        *(ROOT / "core").rglob("*.py"),
        *(ROOT / "backends").rglob("*.py"),
        *(ROOT / "integrations").rglob("*.py"),
    ]
    found = [v for file in files for v in violations(str(file.relative_to(ROOT)), file.read_text())]
    assert not found, "\n".join(found)
    assert len(files) > 20


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("backends/naive.py", "from flash2.backends.sdpa import plan"),
        ("backends/naive.py", "from flash2.backends import sdpa"),
        ("backends/naive.py", "from . import sdpa"),
        ("backends/naive.py", "from .sdpa import plan"),
        ("backends/naive.py", "def f():\n    from flash2.core.judge import Judge"),
        ("backends/naive.py", "import flash2"),
        ("backends/naive.py", "import triton.language as tl"),
        ("backends/naive.py", "def f():\n    import numba"),
        ("backends/numba_cpu.py", "from flash2.backends.naive import scores"),
        ("backends/numba_cuda.py", "from flash2.backends import numba_kernels"),
        ("backends/triton_fa2/launch.py", "from ..naive import scores"),
        ("backends/triton_fa2/launch.py", "import cupy"),
        ("backends/triton_fa2/__init__.py", "from ..numba_cpu import launch"),
        ("backends/__init__.py", "from flash2.core.contract import Backend"),
        ("core/judge.py", "from flash2.backends import get_backend"),
        ("core/judge.py", "from ..backends import get_backend"),
        ("core/judge.py", "def f():\n    import flash2.backends.naive"),
        ("core/judge.py", "import flash2"),
        ("core/timing.py", "import pynvml"),
        ("core/problem.py", "def f():\n    import torch"),
        ("core/results.py", "from torch.utils import data"),
        ("core/report.py", "import torch.cuda"),
        ("__init__.py", "import torch"),
        ("bench.py", "import matplotlib.pyplot as plt"),
        ("core/training/runs.py", "from flash2.backends import list_backends"),
        ("core/training/runs.py", "import matplotlib"),
        ("core/mha.py", "import transformers"),
        ("integrations/transformers.py", "import cupy"),
        ("bench.py", "from flash2 import attention"),
    ],
)
def test_a_planted_violation_is_found(path, source):
    assert violations(path, f"import os\n{source}")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("backends/naive.py", "from flash2.core.contract import Backend\nimport torch"),
        (
            "backends/triton_fa2/launch.py",
            "import triton\nfrom flash2.backends.triton_fa2 import tiles\nfrom . import tiles",
        ),
        ("backends/numba_cpu.py", "from flash2.backends import numba_kernels"),
        ("backends/__init__.py", "if TYPE_CHECKING:\n    from flash2.core.contract import Backend"),
        ("core/judge.py", "from flash2.core.problem import Problem\nfrom . import inputs"),
        ("core/environment.py", "def f():\n    import pynvml"),
        ("bench.py", "from flash2.backends import get_backend\nfrom flash2.core import plan"),
        ("integrations/transformers.py", "import transformers\nfrom flash2 import attention"),
    ],
)
def test_what_is_allowed_is_not_reported(path, source):
    assert violations(path, source) == []


def run(*arguments: str) -> str:
    """Standard output of a fresh interpreter in the checkout, with every import written to standard error."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout


LOADED = "; print(*sorted({name.partition('.')[0] for name in sys.modules}))"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import sys, flash2; flash2.list_backends()", {"torch", "numpy", "tabulate", *OPTIONAL}),
        ("import sys, flash2.core.report, flash2.core.results, flash2.core.problem", {"torch", *OPTIONAL}),
        (
            "import sys, flash2; flash2.get_backend('naive')",
            set(OPTIONAL) - {"triton", "pynvml"},
        ),  # torch looks for these itself
    ],
)
def test_an_import_loads_nothing_it_does_not_need(code, absent):
    assert not absent & set(run("-c", code + LOADED).split())


@pytest.mark.parametrize("arguments", [["--help"], ["list"]], ids=" ".join)
def test_the_command_line_imports_no_optional_package(arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "bench.py", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "argparse" in loaded, "the list of imports is not what was expected"
    assert not loaded & {"matplotlib", "cupy"}
    if arguments == ["--help"]:
        assert not loaded & {"torch", *OPTIONAL}
    assert "naive" in done.stdout or arguments == ["--help"]


def test_without_the_optional_packages_every_backend_says_what_it_lacks():
    """A machine with torch alone: every built-in still loads, and the one that needs numba says how to get it."""
    code = f"""
import sys
for name in {sorted(OPTIONAL)}:
    sys.modules[name] = None  # import raises ModuleNotFoundError
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in {sorted(OPTIONAL)} else found(name, *a)
import flash2
for name in flash2.list_backends():
    print(name, "|", flash2.get_backend(name).unavailable())
"""
    lines = dict(line.split(" | ") for line in run("-c", code).splitlines())
    assert lines["naive"] == "None"
    for name in ("numba", "numba-cuda"):
        assert f"{name} is not installed" in lines[name]
        assert "pip install" in lines[name] and f"[{name}]" in lines[name]
