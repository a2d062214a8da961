"""How the kernels are cut for the H200, by head_dim, kind of mask and length. docs/gluon-pipeline.md says what each choice does."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardConfig:
    """How the forward kernel is cut, and how its partitions take turns.

    groups: consumer partitions of 64 query rows, 2 or 3. block_n: keys a step. kv_slots, q_slots: buffers of the rings
    of K and V and of Q; q_slots 0 is one that o leaves through too. turns: the groups alternate at the tensor cores.
    late_sum: a row's sum is gathered from its four threads once, at the end. ordered: the wait for P V stands behind
    the exponentials, where ptxas cannot move it. q_columns: so many columns of Q (0, half or all of those computed) are
    a register operand of Q K^T. overlap: a group's softmax runs beside its own P V, not beside the other groups'
    products alone. lazy: sums are rescaled when a row's maximum has grown by 2^8, not whenever it grows. planned: the
    order of the row tiles comes from schedule.py. persistent: one block per multiprocessor, not one per row tile.
    """

    groups: int = 2
    block_n: int = 128
    kv_slots: int = 2
    q_slots: int = 2
    turns: bool = True
    late_sum: bool = True
    ordered: bool = True
    q_columns: int = 0
    overlap: bool = True
    lazy: bool = False
    planned: bool = False
    persistent: bool = True

    @property
    def block_m(self) -> int:
        """Query rows of a row tile."""
        return 64 * self.groups

    @property
    def registers(self) -> int:
        """Registers a thread of a consumer gets; the producer keeps 24 (32 beside three consumers)."""
        return {2: 240, 3: 160}[self.groups]

    def __str__(self) -> str:
        flags = ("turns", "late_sum", "ordered", "overlap", "lazy", "planned", "persistent")
        named = "".join(f" {flag}" for flag in flags if getattr(self, flag))
        registers = f" q_columns {self.q_columns}" if self.q_columns else ""
        return f"{self.block_m}x{self.block_n} k{self.kv_slots} q{self.q_slots}{registers}{named}"

    def replace(self, **changes: object) -> ForwardConfig:
        """The same configuration with some fields changed."""
        return dataclasses.replace(self, **changes)


def block_d(head_dim: int) -> int:
    """head_dim as the kernels compute it: 64, 128 or 256, the rest being zeros that TMA fills in."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def forward(head_dim: int, *, band: bool, dressed: bool, seq: int) -> ForwardConfig:
    """The configuration for keys of length `seq`. band: a causal mask or a window, so that row tiles differ in length.
    dressed: softcap or the left edge of a window, which want registers in the main loop."""
    width = block_d(head_dim)
    if width == 256:
        config = ForwardConfig(block_n=64, q_slots=0, planned=band)
        if band and seq >= 8192:
            config = config.replace(planned=False, persistent=False, ordered=False, late_sum=False)
        return config
    if width == 128:
        return ForwardConfig(q_slots=1, q_columns=128, planned=True) if band else ForwardConfig()
    if seq >= (2048 if band else 1024) and not dressed:
        config = ForwardConfig(groups=3, turns=False, ordered=False, late_sum=band, planned=band)
        return config.replace(persistent=False) if band and seq >= 16384 else config
    return ForwardConfig(planned=band)
