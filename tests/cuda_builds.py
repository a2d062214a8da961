"""The CUDA kernels as shipped, compiled by nvcc for GPUs that need not be there, and what is wrong with the outcome."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from flash2.backends.cupy_cuda import compile, hopper, launch, tiles

NVCC = shutil.which("nvcc")
NAMES = {80: "sm_80", 90: "sm_90a", 100: "sm_100", 120: "sm_120"}
# Every one of them has Ampere's mma.sync, in SASS HMMA. Hopper's forward has wgmma, HGMMA.
TENSOR_CORE = re.compile(r"^(HG?MMA)")


@dataclass(frozen=True, slots=True)
class Build:
    """32-bit registers a thread, bytes of registers that spill and of other local memory, the assembler's notes on wgmma,
    how many exponentials run beside a product, and how often each SASS instruction stands in the kernel."""

    registers: int
    spills: int
    stack: int
    notes: str
    overlapped: int
    instructions: Counter[str] = field(repr=False)


def build(kernel: launch.Kernel, arch: int) -> Build | str:
    """The kernel compiled for compute capability `arch` (90 for 9.0), or the compiler's complaint."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [NVCC, "-cubin", "-Xptxas", "-v", *compile.options(kernel.defines, NAMES[arch])]
        done = subprocess.run(
            [*command, str(compile.SOURCES / kernel.source), "-o", str(cubin)], capture_output=True, text=True
        )
        if done.returncode:
            return f"does not compile: {done.stderr.strip()[:500]}"
        registers, stack, stores, loads = (
            int(re.search(pattern, done.stderr)[1])
            for pattern in (
                r"Used (\d+) registers",
                r"(\d+) bytes stack frame",
                r"(\d+) bytes spill stores",
                r"(\d+) bytes spill loads",
            )
        )
        notes = "\n".join(line for line in done.stderr.splitlines() if "(C75" in line)
        found = instructions(cubin)
        names = Counter(re.match(r"[A-Z0-9]+", text)[0] for text in found)
        return Build(registers, stores + loads, stack, notes, overlapped(found), names)


def overlapped(found: list[str]) -> int:
    """How many exponentials stand between the wait that leaves one group of products in flight and the one for all."""
    waits = [n for n, text in enumerate(found) if text.startswith("WARPGROUP.DEPBAR")]
    between = [(n, after) for n, after in pairwise(waits) if found[n].endswith("0x1")]
    return sum(text.startswith("MUFU.EX2") for n, after in between for text in found[n:after])


def instructions(cubin: Path) -> list[str]:
    """The instructions of a cubin as they stand there, each with its operands."""
    tool = shutil.which("cuobjdump")
    if tool is None:  # Triton brings its own
        tool = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    listing = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*[^;]*?)\s*;"
    return re.findall(pattern, listing, re.MULTILINE)


def complaints(built: Build | str, kernel: launch.Kernel, precision: str, arch: int) -> list[str]:
    """What is wrong with a kernel of class `precision` for `arch`, in words."""
    if isinstance(built, str):
        return [built]
    found = []
    if built.spills or built.stack:
        found.append(f"{built.spills} bytes spilled, {built.stack} of stack ({built.registers} registers)")
    if built.notes:
        found.append(built.notes)
    if kernel.shared > tiles.shared_limit(arch):
        found.append(f"{kernel.shared} bytes of shared memory, sm_{arch} has {tiles.shared_limit(arch)} a block")
    used = sorted({match[1] for name in built.instructions if (match := TENSOR_CORE.match(name))})
    on_hopper = isinstance(kernel.tile, hopper.HopperTile)
    wanted = [] if precision == "ieee" or kernel.name == "statistics" else ["HGMMA" if on_hopper else "HMMA"]
    if on_hopper and kernel.tile.ordered and built.overlapped < kernel.tile.block_n // 2:  # of a thread, for two rows
        found.append(f"{built.overlapped} exponentials beside the product of P and V")
    if used != wanted:
        found.append(f"matrix instructions {used or 'none'} where {wanted or 'none'} are meant")
    return found
