"""How the kernels are cut for the H200, by head_dim, kind of mask and length. docs/gluon-pipeline.md says what each choice does."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardConfig:
    """How the forward kernel is cut, and how its partitions take turns.

    groups: consumer partitions of 64 query rows, 2 or 3. block_n: keys a step. kv_slots, q_slots: buffers of the rings
    of K and V and of Q; q_slots 0 is one that o leaves through too. q_columns: so many columns of Q (0, half or all of
    those computed) are a register operand of Q K^T. overlap: a group's softmax runs beside its own P V, not beside the
    other groups' products alone. ordered: the wait for P V stands behind the exponentials, where ptxas cannot move it.
    turns: the groups alternate at the tensor cores. blocks: so many on a multiprocessor.
    """

    groups: int = 2
    block_n: int = 128
    kv_slots: int = 2
    q_slots: int = 2
    q_columns: int = 0
    overlap: bool = True
    ordered: bool = True
    turns: bool = True
    blocks: int = 1

    @property
    def block_m(self) -> int:
        """Query rows of a row tile."""
        return 64 * self.groups

    @property
    def registers(self) -> int:
        """Registers a thread of a consumer gets; the producer keeps what is left, 24 or 32."""
        return {(2, 1): 240, (3, 1): 160, (2, 2): 104}[self.groups, self.blocks]

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told beyond the kernel's constants: 384 threads at 80 registers fit in twice."""
        return {"num_warps": 4} if self.blocks == 1 else {"num_warps": 4, "maxnreg": 80}

    def __str__(self) -> str:
        named = "".join(f" {flag}" for flag in ("overlap", "ordered", "turns") if getattr(self, flag))
        registers = f" q_columns {self.q_columns}" if self.q_columns else ""
        twice = f" {self.blocks} blocks" if self.blocks > 1 else ""
        return f"{self.block_m}x{self.block_n} k{self.kv_slots} q{self.q_slots}{registers}{named}{twice}"

    def replace(self, **changes: object) -> ForwardConfig:
        """The same configuration with some fields changed."""
        return dataclasses.replace(self, **changes)


def block_d(head_dim: int) -> int:
    """head_dim as the kernels compute it: 64, 128 or 256, the rest being zeros that TMA fills in."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def forward(head_dim: int, *, causal: bool, ragged: bool, seq: int, roomy: bool = True) -> ForwardConfig:
    """The configuration for keys of length `seq`. causal: there is an edge on the right. ragged: there is another one, a
    window's on the left, or without a causal one the end of the keys, and masks for it want registers. roomy: there are
    registers for Q beside an O of more than 64 columns (compat.ROOMY)."""
    width = block_d(head_dim)
    if width == 256:
        return ForwardConfig(block_n=64, q_slots=0, q_columns=128 if roomy else 0, overlap=False)
    if seq < 1024:
        if causal and width == 64 and not ragged:
            return ForwardConfig(block_n=64, overlap=False, blocks=2)
        if causal:
            narrow = ForwardConfig(block_n=64, kv_slots=3)
            return narrow if width == 64 else narrow.replace(q_slots=1, q_columns=128)
        return ForwardConfig(overlap=False) if width == 128 else ForwardConfig(overlap=False, q_slots=1, q_columns=64)
    if width == 128:
        config = ForwardConfig(ordered=False)
        return config.replace(q_slots=1, q_columns=128) if roomy else config
    return ForwardConfig(overlap=False, q_slots=1, q_columns=64) if ragged else ForwardConfig(groups=3, ordered=False)
