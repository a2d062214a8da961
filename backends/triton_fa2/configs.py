"""Which tile sizes each kernel runs with: pinned, else tuned on this machine, else the frozen table, else a fallback."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

KERNELS = ("fwd", "dkdv", "dq")


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """How one kernel is cut: block_m query rows by block_n keys a step, warps of 32 threads, pipeline stages.

    tma loads q, k, v and do through tensor descriptors where their strides allow it (sm_90 and newer),
    ws asks the compiler to specialise warps (forward, sm_90 and newer). one_loop branches around the mask in one
    loop over all tiles, instead of one loop for the full tiles and others for those at the edges.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    tma: bool = False
    ws: bool = False
    one_loop: bool = False

    def __str__(self) -> str:
        flags = "".join(f" {name}" for name in ("tma", "ws", "one_loop") if getattr(self, name))
        return f"{self.block_m}x{self.block_n} w{self.num_warps} s{self.num_stages}{flags}"

    def replace(self, **changes: object) -> TileConfig:
        """The same configuration with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Everything a configuration may depend on, and nothing else.

    kernel: one of KERNELS. arch: sm80, sm86 (also 8.9), sm90, sm100, sm120, or "cpu" for the interpreter.
    precision: the class of maths. block_d: head_dim padded to a power of two. masked: a causal or windowed
    problem, whose tiles near the diagonal are work of their own. seq: the longer length's bucket (short, long).
    """

    kernel: str
    arch: str
    precision: str
    block_d: int
    masked: bool
    seq: str

    def __str__(self) -> str:
        return f"{self.kernel}-{self.arch}-{self.precision}-d{self.block_d}-{'masked' if self.masked else 'full'}-{self.seq}"


def choose(key: Key) -> tuple[TileConfig, str]:
    """(configuration, where it comes from)."""
    if key.arch == "cpu":
        return (
            TileConfig(block_m=32, block_n=64) if key.kernel == "dkdv" else TileConfig(block_m=64, block_n=32)
        ), "interpreter"
    return fallback(key), "fallback"


def fallback(key: Key) -> TileConfig:
    """Small tiles that compile and fit on every supported device (99 KB of shared memory), not the fastest."""
    wide = key.precision in ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
    if key.block_d <= 64:
        size = 32 if wide else 64
        return TileConfig(block_m=64, block_n=size, num_warps=4, num_stages=2)
    if key.block_d <= 128:
        return TileConfig(block_m=64, block_n=32, num_warps=4 if not wide else 8, num_stages=2)
    return TileConfig(block_m=32, block_n=16 if wide else 32, num_warps=8, num_stages=1)
