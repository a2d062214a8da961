"""Which tile sizes each kernel runs with: pinned, else tuned on this machine, else the frozen table, else a fallback.

Sources, in this order: the backend's pins (TritonFA2.pin, or FLASH2_TRITON_PIN="fwd=64x128 w4 s2 tma; dq=..."), the
cache of this machine's own tuning (cache_file()), TABLES, and, on a device TABLES does not know, autotuning, which
fills the cache, unless FLASH2_TRITON_TUNE=0 asks for the fallback.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

KERNELS = ("fwd", "dkdv", "dk", "dv", "dq")
FLAGS = ("tma", "ws", "one_loop", "late", "prepared", "resident", "mixed", "split")
# full: every key is visible. masked: a causal mask. dressed: a window's left edge, softcap or ALiBi, which want registers,
# or, in ieee, a head_dim that is no power of two, whose masks do.
WORK = ("full", "masked", "dressed")
SHORT = 1024
EXAMPLE = "64x128 w4 s2 tma"


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """How one kernel is cut: block_m query rows by block_n keys a step, warps of 32 threads, pipeline stages.

    tma loads q, k, v and do through tensor descriptors where their strides allow it (sm_90 and newer),
    ws asks the compiler to specialise warps (forward, sm_90 and newer). one_loop branches around the mask in one
    loop over all tiles, instead of one loop for the full tiles and others for those at the edges. late (forward)
    multiplies p by v one tile late, beside the next softmax. prepared (with tma, float32) has a kernel before it split
    what many programs read into bfloat16 parts (bf16x3, bf16x6), or transpose what is summed over rows (tf32, without
    late). resident (with prepared, bf16x3 and bf16x6) has it split what a program keeps for its whole loop, too, whose
    parts then lie in shared memory instead of registers; mixed does so, too, but for the first part. split (dkdv) launches one kernel for dk and one for dv, by their own configurations. max_regs > 0 holds a
    thread to so many registers, so that one more program fits on a multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    max_regs: int = 0
    tma: bool = False
    ws: bool = False
    one_loop: bool = False
    late: bool = False
    prepared: bool = False
    resident: bool = False
    mixed: bool = False
    split: bool = False

    def __str__(self) -> str:
        flags = "".join(f" {name}" for name in FLAGS if getattr(self, name))
        regs = f" r{self.max_regs}" if self.max_regs else ""
        return f"{self.block_m}x{self.block_n} w{self.num_warps} s{self.num_stages}{regs}{flags}"

    def replace(self, **changes: object) -> TileConfig:
        """The same configuration with some fields changed."""
        return dataclasses.replace(self, **changes)


def parse(text: str) -> TileConfig:
    """The inverse of str(config). Raises ValueError in words for anything else."""
    found = re.fullmatch(r"(\d+)x(\d+) w(\d+) s(\d+)(?: r(\d+))?((?: [a-z_]+)*)", " ".join(text.split()))
    flags = found[6].split() if found else []
    if not found or (unknown := [word for word in flags if word not in FLAGS]):
        what = f"unknown flag {unknown[0]!r}" if found else "want ROWSxKEYS wWARPS sSTAGES, or ... sSTAGES rREGISTERS"
        raise ValueError(f"configuration {text!r}: {what}; flags: {', '.join(FLAGS)}; for example {EXAMPLE!r}")
    m, n, warps, stages, regs = (int(number or 0) for number in found.groups()[:5])
    sizes_fit = all(size >= 16 and size & (size - 1) == 0 for size in (m, n))
    if not sizes_fit or warps not in (1, 2, 4, 8, 16) or not 1 <= stages <= 8 or not (regs == 0 or 24 <= regs <= 255):
        raise ValueError(
            f"configuration {text!r}: sizes are powers of two from 16 on, warps 1 to 16 in powers of two, stages 1 to 8, "
            "registers 24 to 255"
        )
    return TileConfig(
        block_m=m, block_n=n, num_warps=warps, num_stages=stages, max_regs=regs,
        **dict.fromkeys(flags, True),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Everything a configuration may depend on, and nothing else.

    kernel: one of KERNELS. arch: sm80, sm86 (also 8.9), sm90, sm100, sm120, or "cpu" for the interpreter.
    precision: the class of maths. block_d: head_dim padded to a power of two. work: what a tile has beside its
    products: one of WORK. seq: the longer length's bucket: short (up to SHORT) or long.
    """

    kernel: str
    arch: str
    precision: str
    block_d: int
    work: str
    seq: str

    def __str__(self) -> str:
        return f"{self.kernel}-{self.arch}-{self.precision}-d{self.block_d}-{self.work}-{self.seq}"


# Found by tune.py, or, where a dressed row differs from the masked one, by compiling smaller tiles until none of what
# tests/compile has spills (Triton 3.6). ptxas aims at 128 or 168 registers where a few more would hold everything, and
# spills: r255 or so in a row of ieee is there to let it take them. Rows hold for head_dims down to the next smaller one. A row of full/short or
# masked/short goes before the other for problems that short. A problem's odd lengths make tiles at its edges: that is
# one_loop in a row of full ones.
TABLES = {
    "sm90": """
        fwd   bf16,fp16   64 full         64x128 w4 s2 tma one_loop
        fwd   bf16,fp16   64 masked       64x128 w4 s2 tma one_loop
        fwd   bf16,fp16   64 masked/short 64x64 w4 s2 r96 tma one_loop
        fwd   bf16,fp16  128 full         128x64 w4 s2 tma one_loop
        fwd   bf16,fp16  128 masked       64x64 w4 s3 tma one_loop
        fwd   bf16,fp16  256 full         128x64 w8 s2 tma one_loop late
        fwd   bf16,fp16  256 masked       128x64 w8 s2 tma one_loop late
        dkdv  bf16,fp16   64 full         64x64 w4 s3 tma
        dkdv  bf16,fp16   64 masked       64x64 w4 s3 tma
        dkdv  bf16,fp16   64 masked/short 64x64 w4 s2 tma one_loop
        dkdv  bf16,fp16   64 dressed      64x64 w4 s3 tma one_loop
        dkdv  bf16,fp16  128 full         64x64 w4 s2 tma
        dkdv  bf16,fp16  128 masked       64x64 w4 s2 tma
        dkdv  bf16,fp16  128 dressed      32x128 w8 s2 tma one_loop
        dkdv  bf16,fp16  256 full         32x64 w8 s3 tma split
        dkdv  bf16,fp16  256 masked       32x64 w8 s2 tma split
        dk    bf16,fp16  256 full         64x64 w4 s2 tma
        dk    bf16,fp16  256 full/short   32x128 w8 s3 tma
        dk    bf16,fp16  256 masked       64x64 w4 s2 tma one_loop
        dk    bf16,fp16  256 dressed      32x128 w8 s3 tma one_loop
        dv    bf16,fp16  256 full         64x128 w8 s2 tma
        dv    bf16,fp16  256 masked       64x128 w8 s2 tma
        dv    bf16,fp16  256 dressed      64x128 w8 s2 tma one_loop
        dq    bf16,fp16   64 full         64x128 w4 s3 tma
        dq    bf16,fp16   64 full/short   64x64 w4 s3 tma
        dq    bf16,fp16   64 masked       64x64 w4 s3 tma
        dq    bf16,fp16   64 masked/short 64x64 w4 s2 tma
        dq    bf16,fp16  128 full         128x64 w8 s3 tma
        dq    bf16,fp16  128 masked       128x64 w8 s3 tma
        dq    bf16,fp16  128 masked/short 64x64 w4 s2 tma one_loop
        dq    bf16,fp16  256 full         128x32 w8 s3 tma
        dq    bf16,fp16  256 masked       128x32 w8 s3 tma one_loop
        fwd   tf32        64 full         128x64 w8 s2 tma one_loop prepared
        fwd   tf32        64 masked       128x64 w8 s2 tma prepared
        fwd   tf32        64 dressed      128x64 w8 s2 tma one_loop prepared
        fwd   tf32       128 full         128x64 w8 s2 tma one_loop prepared
        fwd   tf32       128 masked       128x64 w8 s2 tma one_loop prepared
        dkdv  tf32        64 full         64x128 w8 s2 tma prepared
        dkdv  tf32        64 masked       64x128 w8 s2 tma one_loop prepared
        dkdv  tf32       128 full         32x64 w4 s2 tma prepared
        dkdv  tf32       128 masked       32x64 w4 s2 tma one_loop prepared
        dq    tf32        64 full         128x64 w8 s3 tma prepared
        dq    tf32        64 full/short   128x32 w8 s3 tma
        dq    tf32        64 masked       128x64 w8 s3 tma prepared
        dq    tf32        64 masked/short 128x32 w8 s3 tma one_loop
        dq    tf32       128 full         128x32 w8 s2 tma prepared
        dq    tf32       128 masked       128x32 w8 s2 tma one_loop prepared
        fwd   bf16x6      64 full         64x32 w4 s2 tma prepared
        fwd   bf16x6      64 masked       64x32 w4 s3 tma one_loop prepared
        fwd   bf16x6     128 full         64x64 w4 s1 tma one_loop prepared resident
        fwd   bf16x6     128 full/short   128x32 w8 s2 tma prepared mixed
        fwd   bf16x6     128 masked       64x64 w4 s1 tma one_loop prepared resident
        dkdv  bf16x6      64 full         32x64 w4 s2 tma prepared split
        dkdv  bf16x6      64 masked       32x64 w4 s2 tma prepared split
        dkdv  bf16x6     128 full         16x64 w8 s2 tma prepared resident split
        dkdv  bf16x6     128 masked       16x64 w8 s2 tma prepared resident split
        dk    bf16x6      64 full         64x64 w4 s2 tma prepared
        dk    bf16x6      64 masked       64x64 w4 s2 tma one_loop prepared
        dk    bf16x6      64 dressed      32x64 w4 s2 tma one_loop prepared
        dk    bf16x6     128 full         16x64 w4 s2 tma prepared mixed
        dk    bf16x6     128 masked       32x128 w8 s2 tma one_loop prepared mixed
        dk    bf16x6     128 dressed      16x64 w4 s2 tma one_loop prepared mixed
        dv    bf16x6      64 full         32x64 w4 s2 tma prepared
        dv    bf16x6      64 masked       64x64 w4 s2 tma one_loop prepared
        dv    bf16x6     128 full         32x128 w8 s2 tma prepared mixed
        dv    bf16x6     128 masked       64x64 w4 s1 tma one_loop prepared resident
        dv    bf16x6     128 dressed      32x128 w8 s2 tma one_loop prepared mixed
        dq    bf16x6      64 full         64x64 w4 s2 tma prepared
        dq    bf16x6      64 masked       64x64 w4 s2 tma prepared
        dq    bf16x6      64 dressed      64x64 w4 s2 tma one_loop prepared
        dq    bf16x6     128 full         128x32 w8 s2 tma one_loop prepared mixed
        dq    bf16x6     128 masked       128x32 w8 s2 tma one_loop prepared mixed
        dq    bf16x6     128 dressed      64x16 w4 s2 tma one_loop prepared mixed
        fwd   bf16x3      64 full         64x64 w4 s2 tma prepared
        fwd   bf16x3      64 masked       64x64 w4 s2 tma prepared
        fwd   bf16x3      64 dressed      64x64 w4 s2 tma one_loop prepared
        dkdv  bf16x3      64 full         32x64 w4 s3 tma prepared
        dkdv  bf16x3      64 masked       32x64 w4 s3 tma one_loop prepared
        dq    bf16x3      64 full         64x32 w4 s3 tma prepared
        dq    bf16x3      64 masked       64x64 w4 s3 tma prepared
        dq    bf16x3      64 masked/short 64x32 w4 s3 tma one_loop prepared
        dq    bf16x3      64 dressed      64x32 w4 s3 tma prepared
        fwd   tf32x3      64 full         128x64 w8 s3 tma
        fwd   tf32x3      64 masked       128x64 w8 s3 tma
        dkdv  tf32x3      64 full         32x128 w8 s3
        dkdv  tf32x3      64 masked       32x128 w8 s2 one_loop
        dkdv  tf32x3      64 dressed      16x128 w8 s2 one_loop
        dq    tf32x3      64 full         128x32 w8 s3 tma one_loop
        dq    tf32x3      64 masked       128x64 w8 s3 one_loop
        fwd   ieee        32 full         64x64 w4 s2 one_loop
        fwd   ieee        32 masked       64x64 w4 s2 one_loop
        fwd   ieee        32 dressed      64x64 w8 s2 one_loop
        fwd   ieee        64 full         64x64 w4 s2 one_loop
        fwd   ieee        64 masked       64x64 w4 s2 one_loop
        fwd   ieee        64 dressed      64x64 w4 s2 r240 one_loop
        dkdv  ieee        64 full         32x64 w4 s2 split
        dkdv  ieee        64 masked       32x64 w4 s2 split
        dk    ieee        32 full         64x64 w4 s2
        dk    ieee        32 masked       64x64 w4 s2 one_loop
        dk    ieee        32 dressed      32x32 w4 s2 r255 one_loop
        dk    ieee        64 full         64x64 w4 s2
        dk    ieee        64 masked       64x64 w4 s2 one_loop
        dk    ieee        64 dressed      32x64 w4 s2 r255 one_loop
        dv    ieee        32 full         64x64 w4 s2
        dv    ieee        32 masked       64x64 w4 s2 one_loop
        dv    ieee        32 dressed      32x64 w4 s1 r224 one_loop
        dv    ieee        64 full         64x64 w4 s2
        dv    ieee        64 masked       64x64 w4 s2 one_loop
        dv    ieee        64 dressed      32x64 w4 s2 r255 one_loop
        dq    ieee        64 full         64x64 w4 s2 one_loop
        dq    ieee        64 masked       64x64 w4 s2 one_loop
        dq    ieee        64 dressed      64x32 w4 s2 one_loop
    """,
}


# Where nothing was raced, and where strides forbid descriptors: by pointers alone, within 99 KB of shared memory. Found by
# compiling for sm_80, sm_90, sm_100 and sm_120 by Triton 3.6, largest tiles first, what tests/compile asks of a kernel at
# the head_dims it has; other problems and Tritons may spill. Of those, only what fallback() has no row for still
# spills.
FALLBACKS = {
    "any": """
        fwd   bf16,fp16   64 any 128x64 w8 s2 one_loop
        dkdv  bf16,fp16   64 any 64x32 w8 s2 one_loop
        dq    bf16,fp16   64 any 128x64 w8 s2 one_loop
        fwd   bf16,fp16  128 any 128x64 w8 s2 one_loop
        dkdv  bf16,fp16  128 any 64x32 w8 s2 one_loop
        dq    bf16,fp16  128 any 32x64 w8 s2 one_loop
        fwd   bf16,fp16  256 any 32x64 w8 s1 one_loop
        dkdv  bf16,fp16  256 any 32x16 w4 s2 one_loop
        dq    bf16,fp16  256 any 32x64 w8 s1 one_loop
        fwd   tf32        64 any 128x64 w8 s2 one_loop
        dkdv  tf32        64 any 64x32 w8 s2 one_loop
        dq    tf32        64 any 64x64 w8 s2 one_loop
        fwd   tf32       128 any 64x64 w8 s1 one_loop
        dkdv  tf32       128 any 32x16 w4 s2 one_loop
        dq    tf32       128 any 32x64 w8 s1 one_loop
        fwd   tf32       256 any 16x32 w4 s1 one_loop
        dkdv  tf32       256 any 16x16 w4 s1 one_loop
        dq    tf32       256 any 16x16 w4 s2 one_loop
        fwd   bf16x6      64 any 32x64 w8 s2 one_loop
        dkdv  bf16x6      64 any 32x16 w4 s2 one_loop
        dq    bf16x6      64 any 32x64 w8 s2 one_loop
        fwd   bf16x6     128 any 16x32 w8 s1 one_loop
        dkdv  bf16x6     128 any 32x16 w8 s1 one_loop
        dq    bf16x6     128 any 16x32 w4 s2 one_loop
        fwd   bf16x3      64 any 128x32 w8 s2 one_loop
        dkdv  bf16x3      64 any 64x32 w8 s2 one_loop
        dq    bf16x3      64 any 32x64 w8 s2 one_loop
        fwd   bf16x3     128 any 32x64 w8 s1 one_loop
        dkdv  bf16x3     128 any 16x32 w8 s1 one_loop
        dq    bf16x3     128 any 32x64 w8 s1 one_loop
        fwd   tf32x3      64 any 32x64 w8 s2 one_loop
        dkdv  tf32x3      64 any 32x16 w4 s2 one_loop
        dq    tf32x3      64 any 32x64 w8 s2 one_loop
        fwd   tf32x3     128 any 32x64 w8 s1 one_loop
        dkdv  tf32x3     128 any 16x16 w4 s2 one_loop
        dq    tf32x3     128 any 16x32 w4 s2 one_loop
        fwd   ieee        64 any 64x64 w8 s2 one_loop
        dkdv  ieee        32 any 16x32 w4 s1 r255 one_loop
        dkdv  ieee        64 any 16x32 w4 s2 r255 one_loop
        dq    ieee        32 any 64x64 w8 s2 one_loop
        dq    ieee        64 any 64x64 w8 s2 r255 one_loop
        fwd   ieee       128 any 32x32 w4 s2 r168 one_loop
        dkdv  ieee       128 any 32x32 w4 s1 r255 one_loop
        dq    ieee       128 any 64x64 w8 s1 r255 one_loop
        fwd   ieee       256 any 16x16 w4 s2 one_loop
        dkdv  ieee       256 any 16x32 w8 s1 r255 one_loop
        dq    ieee       256 any 32x32 w4 s1 r255 one_loop
    """,
    "sm90": """
        fwd   bf16x6      64 any 64x32 w8 s2 one_loop
        dkdv  bf16x6     128 any 16x16 w8 s1 one_loop
        dkdv  bf16x3      64 any 32x16 w4 s2 one_loop
    """,
    "sm100": """
        fwd   bf16x6      64 any 64x32 w4 s2 one_loop
        dkdv  bf16,fp16   64 any 64x32 w4 s2 one_loop
        fwd   tf32        64 any 64x32 w4 s2 one_loop
        dkdv  bf16x6     128 any 16x16 w8 s1 one_loop
        dkdv  bf16x3      64 any 32x16 w4 s2 one_loop
    """,
    "sm120": """
        dq    ieee        32 any 64x64 w8 s1 one_loop
    """,
}


@functools.cache
def table(arch: str) -> dict[tuple[str, str, int, str], TileConfig]:
    """TABLES[arch] by (kernel, class, block_d, work); empty for an arch that nobody measured."""
    return parse_rows(TABLES.get(arch, ""))


def parse_rows(text: str) -> dict[tuple[str, str, int, str], TileConfig]:
    """A table's rows by (kernel, class, block_d, work)."""
    rows = {}
    for line in text.strip().splitlines():
        kernel, classes, block_d, work, config = line.split(maxsplit=4)
        for precision in classes.split(","):
            rows[kernel, precision, int(block_d), work] = parse(config)
    return rows


def known(key: Key) -> TileConfig | None:
    """The table's row for `key`: its own head_dim's, else that of the next larger one; the masked one where no
    dressed one is needed."""
    rows = table(key.arch)
    kinds = ("dressed", "masked") if key.work == "dressed" else (key.work,)
    if key.seq == "short":
        kinds = tuple(f"{kind}{end}" for kind in kinds for end in ("/short", ""))
    for block_d in (16, 32, 64, 128, 256):
        for work in kinds:
            row = rows.get((key.kernel, key.precision, block_d, work))
            if row is not None and block_d >= key.block_d:
                return row
    return None


def choose(key: Key, device_name: str = "") -> tuple[TileConfig, str] | None:
    """(configuration, where it comes from), or None on a device that no table knows and nobody tuned yet."""
    if key.arch == "cpu":
        small = (
            TileConfig(block_m=32, block_n=64)
            if key.kernel in ("dkdv", "dk", "dv")
            else TileConfig(block_m=64, block_n=32)
        )
        return small, "interpreter"
    if (pin := pins_of_environment().get(key.kernel)) is not None:
        return pin, "FLASH2_TRITON_PIN"
    if (mine := cached(device_name).get(str(key))) is not None:
        return mine, "tuned on this machine"
    if (row := known(key)) is not None:
        return row, "table"
    return (fallback(key), "fallback") if key.arch in TABLES else None


def fallback(key: Key) -> TileConfig:
    """FALLBACKS' row for `key`, of its own head_dim or the next larger one: it fits everywhere and is not the fastest."""
    kernel = "dkdv" if key.kernel in ("dk", "dv") else key.kernel
    for block_d in (32, 64, 128, 256):
        for rows in (_fallbacks(key.arch), _fallbacks("any")) if block_d >= key.block_d else ():
            if (row := rows.get((kernel, key.precision, block_d, "any"))) is not None:
                return row
    # The classes of several products at head_dims above 128: the parts of one operand fill the registers, and spill.
    return TileConfig(block_m=16, block_n=32, num_warps=8, num_stages=1, one_loop=True)


@functools.cache
def _fallbacks(arch: str) -> dict[tuple[str, str, int, str], TileConfig]:
    return parse_rows(FALLBACKS.get(arch, ""))


@functools.cache
def pins_of_environment() -> dict[str, TileConfig]:
    """FLASH2_TRITON_PIN by kernel. Raises ValueError in words where it makes no sense."""
    return parse_pins(os.environ.get("FLASH2_TRITON_PIN", ""))


def parse_pins(text: str) -> dict[str, TileConfig]:
    """ "fwd=64x128 w4 s2 tma; dq=..." by kernel. Raises ValueError in words."""
    pins = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        kernel, _, config = (word.strip() for word in part.partition("="))
        if kernel not in KERNELS:
            raise ValueError(f"pin {part!r}: want KERNEL=CONFIGURATION; kernels: {', '.join(KERNELS)}")
        pins[kernel] = parse(config)
    return pins


def cache_file() -> Path:
    """Where this machine's own tuning is kept: $XDG_CACHE_HOME/flash2/triton.json. Delete it to forget."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "flash2", "triton.json")


@functools.cache
def _cache() -> dict[str, dict[str, str]]:
    try:
        kept = json.loads(cache_file().read_text())
        return {str(where): dict(rows) for where, rows in kept.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{cache_file()} is not readable and is not used: {error}; delete it", stacklevel=2)
        return {}


@functools.cache
def cached(device_name: str) -> dict[str, TileConfig]:
    """Tuned configurations of this device and Triton by str(key); rows of an older format are passed over."""
    rows = {}
    for key, text in _cache().get(_where(device_name), {}).items():
        try:
            rows[key] = parse(text)
        except ValueError:
            continue
    return rows


def keep(device_name: str, key: Key, config: TileConfig) -> None:
    """Remember `config` for `key`, here and, where the disk lets us, in cache_file()."""
    cached(device_name)[str(key)] = config
    file = cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _cache.cache_clear()  # another process may have written since
        rows = _cache()
        rows.setdefault(_where(device_name), {})[str(key)] = str(config)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as whole:
            json.dump(rows, whole, indent=1)
        os.replace(whole.name, file)
    except OSError as error:
        warnings.warn(f"the tuned configuration of {key} is not kept: {error}", stacklevel=2)


def _where(device_name: str) -> str:
    import triton

    return f"{device_name}, triton {triton.__version__}"
