"""The kernels of numba-cuda compiled to PTX for sm_90, no GPU needed: sums stay in registers, tiles in shared memory."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

pytest.importorskip("numba_cuda")
if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

from numba import cuda, float32, int64, types

from flash2.backends import numba_cuda_kernels

ARRAY, STRIDES, SLOPE_STRIDES = types.Array(float32, 1, "C"), types.UniTuple(int64, 4), types.UniTuple(int64, 2)
SIZES, SCALARS = types.UniTuple(int64, 6), (types.UniTuple(int64, 2), float32, float32)
SIGNATURES = {
    "forward": (*[ARRAY] * 6, *[STRIDES] * 3, SLOPE_STRIDES, SIZES, *SCALARS),
    "statistics": (*[ARRAY] * 3, *[STRIDES] * 2, SIZES),
    "gradients_kv": (*[ARRAY] * 9, *[STRIDES] * 4, SLOPE_STRIDES, SIZES, *SCALARS),
    "gradients_q": (*[ARRAY] * 8, *[STRIDES] * 4, SLOPE_STRIDES, SIZES, *SCALARS),
}
SHARED_LIMIT = 48 * 1024  # of a block that asks for no more than every device has


def complaints(module, name: str, columns: int) -> list[str]:
    """What is wrong with one kernel of `module` for head_dim 16 * columns, in words."""
    hopper = SimpleNamespace(compute_capability=(9, 0))
    try:
        with mock.patch("numba.cuda.dispatcher.get_current_device", return_value=hopper):
            kernel = getattr(module.kernels(columns), name).py_func
            text, _ = cuda.compile_ptx(kernel, SIGNATURES[name], cc=(9, 0))
    except (OSError, RuntimeError, cuda.cudadrv.error.CudaSupportError) as error:
        pytest.skip(f"no NVVM to compile with: {error}")
    found = [f"{word} in float32 arithmetic" for word in ("fma.rn.f64", "mul.f64", "ex2.f64") if word in text]
    if ".local" in text:
        found.append("an array of a thread is in local memory, not in registers")
    shared = sum(map(int, re.findall(r"\.shared[^;\[]*\[(\d+)\];", text)))
    if shared > SHARED_LIMIT or (name != "statistics") != (shared > 0):
        found.append(f"{shared} bytes of shared memory")
    if "fma.rn.f32" not in text:
        found.append("no fma")
    return found


@pytest.mark.parametrize("columns", [1, 4, 8, 16])
@pytest.mark.parametrize("name", SIGNATURES)
def test_kernels(name, columns):
    assert complaints(numba_cuda_kernels, name, columns) == []


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("for c in range(columns):\n                            acc", "for c in range(head_dim // SIDE):\n                            acc", "local memory"),
        ("EACH, CHUNK = (4, 2, 4) if SIMULATED else (16, 4, 16)", "EACH, CHUNK = 16, 4, 32", "bytes of shared memory"),
        ("ZERO, ONE = float32(math.inf), float32(0.0), float32(1.0)", "ZERO, ONE = math.inf, 0.0, 1.0", "f64"),
    ],
)  # fmt: skip
def test_a_planted_waste_is_seen(tmp_path, old, new, says):
    text = Path(numba_cuda_kernels.__file__).read_text()
    assert text.count(old) == 1
    path = tmp_path / "kernels.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("wasteful", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert any(says in complaint for complaint in complaints(module, "forward", 16))
