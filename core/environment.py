"""What a result was measured on: versions, device, its measured ceilings, its clock and power."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flash2.core.contract import TORCH_DTYPES
from flash2.core.timing import timer_for

HELD_SECONDS = 0.4  # after as long the power cap holds a large GPU's clock down

LIBRARIES = ("triton", "cupy-cuda13x", "numba", "numba-cuda", "numpy", "flash-attn-4")


def environment(device: torch.device, seed: int, *, ceilings: bool = True) -> dict[str, Any]:
    """A JSON-able fingerprint; everything but results.VOLATILE must agree for two runs to be one.

    ceilings: also measure what the device reaches in a matmul, which takes seconds on a CPU."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "seed": seed,
        **{name: version for name in LIBRARIES if (version := _version(name))},
        **_revision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "arch": f"sm_{properties.major}{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver_version(),
        }
    if ceilings:
        found["ceilings"] = measured_ceilings(device)
    found["time"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return found


def diagnosis() -> list[tuple[str, str, str]]:
    """(what, what was found, what to do about it or "") for everything a backend may need."""
    rows = [("python", f"{platform.python_version()} at {sys.executable}", "")]
    rows.append(
        ("torch", torch.__version__, "" if _at_least(torch.__version__, (2, 11)) else 'pip install "torch>=2.11"')
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found = (
                f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
            )
            old = "" if properties.major >= 8 else "needs sm_80 (A100) or newer for the tensor-core kernels"
            rows.append((f"gpu {index}", found, old))
        rows.append(("driver", driver_version() or "NVML does not answer", ""))
        rows.append(("cuda", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}", ""))
    elif torch.version.cuda:
        rows.append(("gpu", "none found by torch", "check the driver with nvidia-smi"))
    else:
        rows.append(("gpu", "none: this torch is a CPU build", "install a CUDA build of torch if there is a GPU"))
    extras = {
        "triton": "triton",
        "cupy-cuda13x": "cupy",
        "numba": "numba",
        "numba-cuda": "numba-cuda",
        "matplotlib": "plots",
        "nvidia-ml-py": "plots",
    }
    for distribution, extra in extras.items():
        version = _version(distribution)
        remedy = "" if version else f'pip install "flash2-triton[{extra}]"'
        rows.append((distribution, version or "not installed", remedy))
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    rows.append(
        ("c++ compiler", compiler or "not found", "" if compiler else "flex on the CPU needs one: install g++ or clang")
    )
    return rows


def _at_least(version: str, least: tuple[int, ...]) -> bool:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2]) >= least


def device_name(device: torch.device) -> str:
    """The name peaks.DATASHEET knows a GPU by, or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measured_ceilings(device: torch.device) -> dict[str, float]:
    """TFLOP/s of a square matmul by class, the best of a few calls; on a CPU by torch's BLAS or numpy's, whichever wins.

    On CUDA "bf16 held", too: the mean of calls that follow one another for HELD_SECONDS.
    """
    classes = (
        {"ieee": "fp32"} if device.type == "cpu" else {"bf16": "bf16", "fp16": "fp16", "tf32": "fp32", "ieee": "fp32"}
    )
    size = 2048 if device.type == "cpu" else 8192
    timer, ceilings = timer_for(device), {}
    allowed = torch.backends.cuda.matmul.allow_tf32
    for precision, dtype in classes.items():
        a, b = (torch.randn(size, size, device=device).to(TORCH_DTYPES[dtype]) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        for x, y in [(a, b), (a.numpy(), b.numpy())] if device.type == "cpu" else [(a, b)]:
            timer.burst(lambda x=x, y=y: x @ y, 2)
            reached = 2 * size**3 / min(timer.burst(lambda x=x, y=y: x @ y, 8)) / 1e9
            ceilings[precision] = max(reached, ceilings.get(precision, 0.0))
        if precision == "bf16":
            rate = calls_a_second(lambda a=a, b=b: a @ b, lambda: torch.cuda.synchronize(device), HELD_SECONDS)
            ceilings["bf16 held"] = 2 * size**3 * rate / 1e12
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return ceilings


def calls_a_second(call: Callable[[], object], synchronize: Callable[[], object], seconds: float) -> float:
    """How many calls a second the device ends, of calls that it gets without a pause for `seconds`."""
    synchronize()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        for _ in range(8):
            call()
        count += 8
        synchronize()
    return count / (time.perf_counter() - begin)


def device_state(device: torch.device) -> dict[str, Any] | None:
    """SM clock (MHz), power (W) and temperature (C) now, where NVML answers."""
    if device.type != "cuda":
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"

    def read(nvml: Any) -> dict[str, Any]:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        return {
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "watt": nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "celsius": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        }

    return _nvml(read)


def driver_version() -> str | None:
    """The NVIDIA driver's version, where NVML answers."""
    return _nvml(lambda nvml: nvml.nvmlSystemGetDriverVersion())


def _nvml(read: Callable[[Any], Any]) -> Any:
    # The package is optional, and a driver or a container may hide what it reads: then None.
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        return read(pynvml)
    except pynvml.NVMLError:
        return None


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device, or None where nobody says."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own free list
        return torch.cuda.mem_get_info(device)[0] + kept
    if sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


class PeakMemory:
    """Bytes a call took beyond what was allocated before it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: int | None = None
        if device.type == "cuda":
            torch.cuda.init()  # a process that has not used the device has no statistics to reset, and raises
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
            except OSError:
                return
            self._before = _status_kb("VmRSS")

    def bytes(self) -> int | None:
        """The growth at its highest, None where the system does not tell."""
        if self._before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        high = _status_kb("VmHWM")
        return None if high is None else max(high - self._before, 0) * 1024


def _status_kb(name: str) -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision() -> dict[str, Any]:
    # Of the checkout this package runs from; FLASH2_REVISION says it where the history is not there.
    if stated := os.environ.get("FLASH2_REVISION"):
        return {"git": stated, "dirty": stated.endswith("-dirty")}
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return {}

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", os.fspath(root), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    sha = git("rev-parse", "--short=12", "HEAD")
    return {"git": sha, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))} if sha else {}
