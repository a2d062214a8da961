"""What is asked: one attention problem, counted exactly. Standard library only."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

DTYPES = ("fp64", "fp32", "fp16", "bf16")
DTYPE_BYTES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}
# The classes of maths a dtype may be computed in. fp32 is several different
# maths, and a row must say which; the other dtypes have one class each.
PRECISIONS = {
    "fp64": ("fp64",),
    "fp32": ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6"),
    "fp16": ("fp16",),
    "bf16": ("bf16",),
}
PASSES = ("fwd", "bwd", "fwd+bwd")
MATMULS = {"fwd": 2, "bwd": 5, "fwd+bwd": 7}  # FlashAttention-2, section 4.1
Window = tuple[int | None, int | None]
SIZE_LIMIT = 1 << 31  # an absurd size is a typo, not a problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One attention problem, independent of any backend, device or library.

    Sizes count elements; tensors are (batch, heads, seq, head_dim). `precision` is the
    class of maths (see PRECISIONS), `window` counts the keys visible to the (left, right)
    of the bottom-right diagonal with None for an open end, `softcap` 0 means none, and
    `scale` None means 1/sqrt(head_dim). Raises ValueError, in words, for what cannot be.
    """

    batch: int = 1
    heads_q: int = 1
    heads_kv: int = None  # pyright: ignore[reportAssignmentType]  None: as many as heads_q
    seq_q: int
    seq_kv: int = None  # pyright: ignore[reportAssignmentType]  None: as long as seq_q
    head_dim: int
    dtype: str = "fp32"
    precision: str = None  # pyright: ignore[reportAssignmentType]  None: the dtype's first class
    causal: bool = False
    window: Window | None = None
    softcap: float = 0.0
    alibi: bool = False
    scale: float | None = None
    pass_: str = "fwd"

    def __post_init__(self) -> None:
        fill = object.__setattr__  # the one way to give a frozen dataclass derived defaults
        if self.heads_kv is None:
            fill(self, "heads_kv", self.heads_q)
        if self.seq_kv is None:
            fill(self, "seq_kv", self.seq_q)
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if self.precision is None:
            fill(self, "precision", PRECISIONS[self.dtype][0])
        if self.precision not in PRECISIONS[self.dtype]:
            allowed = ", ".join(PRECISIONS[self.dtype])
            raise ValueError(f"precision {self.precision!r} is no class of {self.dtype}; it has: {allowed}")
        for name in ("batch", "heads_q", "heads_kv", "seq_q", "seq_kv", "head_dim"):
            value, least = getattr(self, name), 0 if name in ("batch", "seq_q", "seq_kv") else 1
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < SIZE_LIMIT:
                raise ValueError(f"{name} must be an integer from {least} to {SIZE_LIMIT - 1}, not {value!r}")
        if self.heads_q % self.heads_kv:
            raise ValueError(
                f"heads_q {self.heads_q} is not a multiple of heads_kv {self.heads_kv}; "
                "each key/value head serves an equal group of query heads"
            )
        if self.pass_ not in PASSES:
            raise ValueError(f"unknown pass {self.pass_!r}; known: {', '.join(PASSES)}")
        if self.window is not None:
            fill(self, "window", check_window(self.window))
        if not math.isfinite(self.softcap) or self.softcap < 0:
            raise ValueError(f"softcap must be finite and >= 0 (0 means none), not {self.softcap!r}")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite or None (1/sqrt(head_dim)), not {self.scale!r}")

    @property
    def band(self) -> Window:
        """(left, right) of the visible band around the bottom-right diagonal; None is open."""
        return visible_band(self.causal, self.window)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head, counted exactly."""
        left, right = self.band
        offset = self.seq_kv - self.seq_q
        if left is not None and right is not None and right < -left:
            return 0
        below = 0 if left is None else _sum_clamped(offset - left, self.seq_q, self.seq_kv)
        upto = self.seq_q * self.seq_kv if right is None else _sum_clamped(offset + right + 1, self.seq_q, self.seq_kv)
        return upto - below

    @property
    def flops(self) -> int:
        """Floating-point operations of the pass: 2 per multiply-add, 2 matmuls forward and 5
        backward over the visible pairs (FlashAttention-2, section 4.1); recomputation is not counted."""
        return 2 * MATMULS[self.pass_] * self.batch * self.heads_q * self.pairs * self.head_dim

    @property
    def bytes(self) -> int:
        """Fewest bytes through device memory: each input read once, each output written once."""
        size = DTYPE_BYTES[self.dtype]
        q = self.batch * self.heads_q * self.seq_q * self.head_dim * size
        kv = 2 * self.batch * self.heads_kv * self.seq_kv * self.head_dim * size
        lse = self.batch * self.heads_q * self.seq_q * 4
        forward = 2 * q + kv + lse  # q k v in; o lse out
        backward = 4 * q + 2 * kv + lse  # q k v o do lse in; dq dk dv out
        return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[self.pass_]

    def replace(self, **changes: Any) -> Problem:
        """The same problem with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `pass_` is spelled `pass`."""
        fields = dataclasses.asdict(self)
        fields["window"] = None if self.window is None else list(self.window)
        fields["pass"] = fields.pop("pass_")
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Problem:
        """Inverse of to_dict; raises ValueError for an unknown or missing field."""
        fields = dict(fields)
        if "pass" in fields:
            fields["pass_"] = fields.pop("pass")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown problem field {unknown[0]!r}; known: {', '.join(sorted(known))}")
        if missing := sorted({"seq_q", "head_dim"} - set(fields)):
            raise ValueError(f"problem lacks {missing[0]!r}")
        if isinstance(fields.get("window"), list):
            fields["window"] = tuple(fields["window"])
        return cls(**fields)

    def shape_key(self) -> str:
        """Short name of everything but dtype, precision and pass: what a table's row shows."""
        heads = f"{self.heads_q}" if self.heads_q == self.heads_kv else f"{self.heads_q}/{self.heads_kv}"
        seq = f"{self.seq_q}" if self.seq_q == self.seq_kv else f"{self.seq_q}x{self.seq_kv}"
        parts = [f"b{self.batch}", f"h{heads}", f"n{seq}", f"d{self.head_dim}"]
        if self.causal:
            parts.append("causal")
        if self.window is not None:
            parts.append("w" + ":".join("" if end is None else str(end) for end in self.window))
        if self.softcap:
            parts.append(f"cap{self.softcap:g}")
        if self.alibi:
            parts.append("alibi")
        if self.scale is not None:
            parts.append(f"scale{self.scale:.17g}")
        return "-".join(parts)

    def key(self) -> str:
        """Short unique name, e.g. `b2-h32/8-n512x1024-d64-causal-bf16-bf16-fwd`."""
        return f"{self.shape_key()}-{self.dtype}-{self.precision}-{self.pass_}"


def check_window(window: Window) -> Window:
    """`window` as a (left, right) tuple of None or integers >= 0; ValueError says what is wrong."""
    ok = isinstance(window, (tuple, list)) and len(window) == 2
    if not ok or any(
        not (end is None or (isinstance(end, int) and not isinstance(end, bool) and end >= 0)) for end in window
    ):
        raise ValueError(f"window must be (left, right), each an integer >= 0 or None for open, not {window!r}")
    return (window[0], window[1])


def visible_band(causal: bool, window: Window | None) -> Window:
    """Query i sees key j iff -left <= j - (i + seq_kv - seq_q) <= right; causal closes the right at 0."""
    left, right = window or (None, None)
    return (left, 0) if causal else (left, right)


def _sum_clamped(first: int, rows: int, high: int) -> int:
    """sum(min(max(first + i, 0), high) for i in range(rows)), without the loop."""

    def upto(n: int) -> int:  # sum of min(x, high) for x = 0 .. n - 1
        if n <= 0:
            return 0
        ramp = min(n, high)
        return ramp * (ramp - 1) // 2 + (n - ramp) * high

    return upto(first + rows) - upto(first)
