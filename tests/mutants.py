"""Planted bugs: one correct tiled FlashAttention in eager torch, and the mistakes that real kernels made, one each.

`Tiled` is written as a set of small steps; a mutant replaces one or two of them. Each names its class of bug and
carries the problem, the inputs and the dtypes in which it must be seen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flash2.core.contract import TORCH_DTYPES
from flash2.core.inputs import Inputs, make_inputs
from flash2.core.problem import Problem
from flash2.core.reference import cut_bf16, cut_tf32

LN2 = math.log(2)


class Tiled:
    """FlashAttention-2 over tiles of 32 queries and 48 keys, all heads at once, float32 inside.

    Steps may be replaced by keyword; a replacement gets this object first, as a method does.
    """

    block_m, block_n = 32, 48

    def __init__(self, problem: Problem, inputs: Inputs, **steps: Callable):
        self.p, self.inputs = problem, inputs
        self.dtype = TORCH_DTYPES[problem.dtype]
        for name, step in steps.items():
            assert hasattr(Tiled, name), name  # a misspelt mutation would mutate nothing
            setattr(self, name, step.__get__(self))

    # ---- steps of both passes

    def scale(self):
        return self.p.head_dim**-0.5 if self.p.scale is None else self.p.scale

    def kv_head(self, head):
        return head // (self.p.heads_q // self.p.heads_kv)

    def slopes(self):
        return self.inputs.alibi_slopes

    def offset(self):
        return self.p.seq_kv - self.p.seq_q

    def band(self):
        return self.p.band

    def key_tiles(self):
        return [(n, min(n + self.block_n, self.p.seq_kv)) for n in range(0, self.p.seq_kv, self.block_n)]

    def query_tiles(self):
        return [(m, min(m + self.block_m, self.p.seq_q)) for m in range(0, self.p.seq_q, self.block_m)]

    def qk(self, q, k):
        return q @ k.mT

    def cap(self, s):
        return self.p.softcap * torch.tanh(s / self.p.softcap) if self.p.softcap else s

    def keep(self, i, j):
        away = j - (i + self.offset())
        left, right = self.band()
        keep = torch.ones_like(away, dtype=torch.bool)
        if left is not None:
            keep &= away >= -left
        if right is not None:
            keep &= away <= right
        return keep

    def bias(self, i, j):
        if self.slopes() is None:
            return 0.0
        return -self.slopes()[:, None, None] * (j - (i + self.offset())).abs()

    def scores(self, q, k, m, n):
        """(capped logits, logits with bias and mask) of one tile, (batch, heads, rows, keys)."""
        i, j = torch.arange(*m)[:, None], torch.arange(*n)[None, :]
        capped = self.cap(self.qk(q, k) * self.scale())
        return capped, (capped + self.bias(i, j)).masked_fill(~self.keep(i, j), -torch.inf)

    def operand(self, x):
        return x.to(self.dtype).float()

    def read(self, name):
        """An input in float32; k and v with each head repeated for its queries."""
        x = getattr(self.inputs, name).float()
        return x[:, [self.kv_head(head) for head in range(self.p.heads_q)]] if name in "kv" else x

    # ---- forward

    def p_operand(self, p):
        return self.operand(p)

    def first_max(self):
        return -torch.inf

    def new_max(self, m, s, tile):
        return torch.maximum(m, s.amax(-1, keepdim=True))

    def safe(self, m):
        return m.masked_fill(m == -torch.inf, 0)

    def rescale(self, x, alpha, tile):
        return x * alpha

    def rescale_sum(self, x, alpha, tile):
        return x * alpha

    def row_sum(self, p, n):
        return p.sum(-1, keepdim=True)

    def values(self, v, n):
        return v[:, :, slice(*n)]

    def accumulator(self, acc):
        return acc

    def normalise(self, acc, total):
        return acc / total.masked_fill(total == 0, 1)

    def log_sum(self, m, total):
        return m + total.log()

    def forward(self):
        q, k, v = (self.read(name) for name in "qkv")
        o, lse = torch.empty(q.shape, dtype=self.dtype), torch.empty(q.shape[:3])
        for rows in self.query_tiles():
            qt = q[:, :, slice(*rows)]
            m = torch.full((*qt.shape[:3], 1), self.first_max())
            total, acc = torch.zeros_like(m), torch.zeros_like(qt)
            for tile, n in enumerate(self.key_tiles()):
                _, s = self.scores(qt, k[:, :, slice(*n)], rows, n)
                m_new = self.new_max(m, s, tile)
                p = torch.exp(s - self.safe(m_new))
                alpha = torch.exp(m - self.safe(m_new))
                total = self.rescale_sum(total, alpha, tile) + self.row_sum(p, n)
                acc = self.rescale(acc, alpha, tile) + self.p_operand(p) @ self.values(v, n)
                acc, m = self.accumulator(acc), m_new
            o[:, :, slice(*rows)] = self.normalise(acc, total)
            lse[:, :, slice(*rows)] = self.log_sum(m, total)[..., 0]
        return o, lse

    # ---- backward

    def read_do(self):
        return self.inputs.do.float()

    def delta(self, do, o):
        return (do * o.float()).sum(-1, keepdim=True)

    def saved_lse(self, lse):
        return lse

    def probabilities(self, s, lse):
        return torch.exp(s - lse.masked_fill(lse == -torch.inf, 0))

    def dv_operand(self, p):
        return self.operand(p)

    def cap_slope(self, capped):
        return 1 - (capped / self.p.softcap) ** 2 if self.p.softcap else 1.0

    def grad_scores(self, p, dp, delta):
        return p * (dp - delta)

    def ds_operand(self, ds):
        return self.operand(ds)

    def dq_scale(self):
        return self.scale()

    def dk_scale(self):
        return self.scale()

    def add_dq(self, dq, part, tile):
        return dq + part

    def dk_part(self, ds, q):
        return ds.mT @ q

    def fold(self, x):
        """The sum over the query heads of each key/value head."""
        return x.unflatten(1, (self.p.heads_kv, -1)).sum(2)

    def backward(self, o, lse):
        q, k, v = (self.read(name) for name in "qkv")
        do = self.read_do()
        delta, lse = self.delta(do, o), self.saved_lse(lse)[..., None]
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for tile, n in enumerate(self.key_tiles()):
            keys = slice(*n)
            for m in self.query_tiles():
                rows = slice(*m)
                capped, s = self.scores(q[:, :, rows], k[:, :, keys], m, n)
                p = self.probabilities(s, lse[:, :, rows])
                dv[:, :, keys] += self.dv_operand(p).mT @ do[:, :, rows]
                dp = do[:, :, rows] @ v[:, :, keys].mT
                ds = self.grad_scores(p, dp, delta[:, :, rows]) * self.cap_slope(capped)
                ds = self.ds_operand(ds)
                dk[:, :, keys] += self.dk_part(ds, q[:, :, rows])
                dq[:, :, rows] = self.add_dq(dq[:, :, rows], ds @ k[:, :, keys], tile)
        grads = dq * self.dq_scale(), self.fold(dk) * self.dk_scale(), self.fold(dv)
        return tuple(x.to(self.dtype) for x in grads)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One mistake in one pass, the steps of Tiled that make it, and where it shows."""

    bug: str
    pass_: str
    steps: dict[str, Callable]
    problem: dict[str, Any]
    dtypes: tuple[str, ...] = ("fp16", "bf16", "fp32")
    distribution: str = "randn"
    upstream: str = "like"

    def cases(self):
        """The Problem in each dtype it must be seen in."""
        shape = {"heads_q": 2, "seq_q": 100, "head_dim": 32} | self.problem
        return [Problem(**shape, dtype=dtype, pass_=self.pass_) for dtype in self.dtypes]

    def inputs(self, problem: Problem, seed: int = 0) -> Inputs:
        """The inputs that show it."""
        return make_inputs(problem, distribution=self.distribution, upstream=self.upstream, seed=seed)

    def outputs(self, problem: Problem, inputs: Inputs, *, mutated: bool = True) -> dict[str, torch.Tensor]:
        """What the mutant returns; a backward mutant's forward is correct, as the saved o and lse of a kernel are."""
        steps = self.steps if mutated else {}
        if self.pass_ == "fwd":
            return dict(zip(("o", "lse"), Tiled(problem, inputs, **steps).forward(), strict=True))
        o, lse = Tiled(problem, inputs).forward()
        return dict(zip(("dq", "dk", "dv"), Tiled(problem, inputs, **steps).backward(o, lse), strict=True))


def _plant(pass_: str, bug: str, *, where=None, dtypes=None, distribution="randn", upstream="like", **steps) -> Mutant:
    return Mutant(
        bug=bug, pass_=pass_, steps=steps, problem=where or {}, dtypes=dtypes or Mutant.dtypes,
        distribution=distribution, upstream=upstream,
    )  # fmt: skip


_fwd, _bwd = functools.partial(_plant, "fwd"), functools.partial(_plant, "bwd")


def _fp8(self, x):
    return x.to(torch.float8_e4m3fn).float()


def _bf16(self, x):
    return cut_bf16(x)


def _two_bf16(x):
    high = cut_bf16(x)
    return high, cut_bf16(x - high)


def _bf16x3(self, q, k):
    (q1, q2), (k1, k2) = _two_bf16(q), _two_bf16(k)
    return q1 @ k1.mT + q1 @ k2.mT + q2 @ k1.mT


def _shift(x, by):
    return torch.cat([x[:, :, by:], x[:, :, :by]], dim=2)


def _padded_keys(self, p, n):
    # The tile is padded with zero keys, whose logit 0 is not masked: seen here relative to a row maximum of 0.
    return p.sum(-1, keepdim=True) + (self.block_n - (n[1] - n[0]))


def _dense(self):
    do = self.inputs.do
    return do.as_strided(do.shape, torch.empty(do.shape).stride()).float()


def _top_left(self):
    return 0


def _wider_left(self):
    left, right = self.p.band
    return left + 1, right


def _strict(self):
    left, _ = self.p.band
    return left, -1


def _all_but_last_tile(self):
    return Tiled.key_tiles(self)[:-1]


CROSS = {"seq_q": 70, "seq_kv": 130, "causal": True}
GQA = {"heads_q": 6, "heads_kv": 2}
FORWARD = [
    _fwd("causal mask aligned top-left when lengths differ", where=CROSS, offset=_top_left),
    _fwd("causal mask hides the diagonal", where={"causal": True, "seq_kv": 140}, band=_strict),
    _fwd("causal ignored", where={"causal": True}, band=lambda self: (None, None)),
    _fwd("scale applied twice", scale=lambda self: 1 / self.p.head_dim),
    _fwd("custom scale ignored", where={"scale": 0.25}, scale=lambda self: self.p.head_dim**-0.5),
    _fwd("lse in log2", log_sum=lambda self, m, total: (m + total.log()) / LN2),
    _fwd("lse without the row maximum", log_sum=lambda self, m, total: total.log()),
    _fwd("lse is the sum without its last tile", row_sum=lambda self, p, n: p.sum(-1, keepdim=True) * (n[0] < 96),
         normalise=lambda self, acc, total: acc / (total + 1e-9)),
    _fwd("P rounded to fp8", p_operand=_fp8),
    _fwd("P rounded to bf16 in an fp16 kernel", dtypes=("fp16",), p_operand=_bf16),
    _fwd("S rounded to bf16 before softmax", dtypes=("fp16", "fp32"), qk=lambda self, q, k: cut_bf16(q @ k.mT)),
    _fwd("o accumulated in the dtype", where={"seq_kv": 1024}, dtypes=("fp16", "bf16"),
         accumulator=lambda self, acc: acc.to(self.dtype).float()),
    _fwd("TF32 where ieee is declared", dtypes=("fp32",), qk=lambda self, q, k: cut_tf32(q) @ cut_tf32(k).mT),
    _fwd("bf16x3 where ieee is declared", dtypes=("fp32",), qk=_bf16x3),
    _fwd("P rounded to TF32 where ieee is declared", dtypes=("fp32",), p_operand=lambda self, p: cut_tf32(p)),
    _fwd("online softmax: accumulator not rescaled for one tile",
         rescale=lambda self, x, alpha, tile: x if tile == 1 else x * alpha),
    _fwd("online softmax: row sum not rescaled", rescale_sum=lambda self, x, alpha, tile: x),
    _fwd("online softmax: maximum of the first tile kept", distribution="x10",
         new_max=lambda self, m, s, tile: Tiled.new_max(self, m, s, tile) if tile == 0 else m),
    _fwd("last partial key tile dropped", key_tiles=_all_but_last_tile),
    _fwd("last query tile's rows missing their last key tile", where={"seq_q": 33},
         values=lambda self, v, n: v[:, :, slice(*n)] * (n[1] < 33)),
    _fwd("padded keys of the last tile counted in the row sum", row_sum=_padded_keys),
    _fwd("GQA heads mapped by modulo", where=GQA, kv_head=lambda self, head: head % self.p.heads_kv),
    _fwd("window one key too wide", where={"window": (9, 0), "seq_q": 150}, band=_wider_left),
    _fwd("window's right end ignored", where={"window": (20, 5)}, band=lambda self: (20, None)),
    _fwd("softcap forgotten", where={"softcap": 5.0}, distribution="x3", cap=lambda self, s: s),
    _fwd("softcap without its factor", where={"softcap": 5.0}, cap=lambda self, s: torch.tanh(s / 5.0)),
    _fwd("ALiBi slopes of the neighbouring head", where={"alibi": True, "heads_q": 4},
         slopes=lambda self: self.inputs.alibi_slopes.roll(1)),
    _fwd("ALiBi distance not measured from the diagonal", where={"alibi": True, "seq_q": 50, "seq_kv": 130},
         bias=lambda self, i, j: -self.slopes()[:, None, None] * (j - i).abs()),
    _fwd("empty rows become NaN", where={"causal": True, "seq_q": 90, "seq_kv": 60}, safe=lambda self, m: m),
    _fwd("empty rows average the values", where={"causal": True, "seq_q": 90, "seq_kv": 60},
         scores=lambda self, *a: (None, Tiled.scores(self, *a)[1].clamp(min=-1e6))),
    _fwd("finite stand-in for -inf as the first maximum", distribution="extreme", first_max=lambda self: -5e4),
    _fwd("value read one key further", distribution="needle",
         values=lambda self, v, n: _shift(v, 1)[:, :, slice(*n)]),
    _fwd("only the first 32 columns of a head_dim of 40", where={"head_dim": 40},
         qk=lambda self, q, k: q[..., :32] @ k[..., :32].mT),
    _fwd("every batch reads the first one's keys", where={"batch": 2},
         read=lambda self, name: Tiled.read(self, name)[:1].expand(2, -1, -1, -1) if name == "k" else Tiled.read(self, name)),
    _fwd("log2(e) to three digits", where={"seq_q": 300}, scale=lambda self: self.p.head_dim**-0.5 * 1.43 * LN2),
]  # fmt: skip


BACKWARD = [
    _bwd("softcap derivative missing", where={"softcap": 4.0}, distribution="x3", cap_slope=lambda self, capped: 1.0),
    _bwd("delta left out", grad_scores=lambda self, p, dp, delta: p * dp),
    _bwd("delta of the neighbouring head", delta=lambda self, do, o: Tiled.delta(self, do, o).roll(1, dims=1)),
    _bwd("delta of the first 32 columns of a head_dim of 40", where={"head_dim": 40},
         delta=lambda self, do, o: Tiled.delta(self, do[..., :32], o[..., :32])),
    _bwd("dq without scale", dq_scale=lambda self: 1.0),
    _bwd("dk scaled twice", dk_scale=lambda self: self.scale() ** 2),
    _bwd("lse read as log2", saved_lse=lambda self, lse: lse * LN2),
    _bwd("lse rounded to bf16", saved_lse=lambda self, lse: cut_bf16(lse)),
    _bwd("P without its row sum", probabilities=lambda self, s, lse: torch.exp(s - s.amax(-1, keepdim=True))),
    _bwd("GQA: dk and dv of the last query head alone", where=GQA,
         fold=lambda self, x: x.unflatten(1, (self.p.heads_kv, -1))[:, :, -1]),
    _bwd("GQA: mean instead of sum", where=GQA, fold=lambda self, x: x.unflatten(1, (self.p.heads_kv, -1)).mean(2)),
    _bwd("GQA heads mapped by modulo", where=GQA, kv_head=lambda self, head: head % self.p.heads_kv),
    _bwd("causal mask aligned top-left when lengths differ", where=CROSS, offset=_top_left),
    _bwd("causal ignored in the backward", where={"causal": True}, band=lambda self: (None, None)),
    _bwd("window one key too wide in the backward", where={"window": (9, 0), "seq_q": 150}, band=_wider_left),
    _bwd("ALiBi left out of the backward", where={"alibi": True}, slopes=lambda self: None),
    _bwd("last partial query tile dropped", query_tiles=lambda self: Tiled.query_tiles(self)[:-1]),
    _bwd("last partial key tile dropped", key_tiles=_all_but_last_tile),
    _bwd("dq overwritten by each key tile", add_dq=lambda self, dq, part, tile: part),
    _bwd("dq of the first key tile lost", add_dq=lambda self, dq, part, tile: dq if tile == 0 else dq + part),
    _bwd("dq of one key tile counted twice", add_dq=lambda self, dq, part, tile: dq + part * (1 + (tile == 1))),
    _bwd("dS rounded to fp8", ds_operand=_fp8),
    _bwd("P rounded to fp8 for dv", dv_operand=_fp8),
    _bwd("dS rounded to bf16 in an fp16 kernel", dtypes=("fp16",), ds_operand=_bf16),
    _bwd("dS rounded to TF32 where ieee is declared", dtypes=("fp32",), ds_operand=lambda self, ds: cut_tf32(ds)),
    _bwd("bf16x3 where ieee is declared", dtypes=("fp32",), qk=_bf16x3),
    _bwd("padded keys overflow when lse is far below 0", distribution="shifted",
         probabilities=lambda self, s, lse: Tiled.probabilities(self, s, lse) + 0 * torch.exp(0 - lse)),
    _bwd("empty rows give NaN", where={"causal": True, "seq_q": 90, "seq_kv": 60},
         probabilities=lambda self, s, lse: torch.exp(s - lse)),
    _bwd("do of a transpose read as if it were dense", upstream="transpose", read_do=_dense),
    _bwd("do of a concatenation read as if it were dense", upstream="cat", read_do=_dense),
    _bwd("gradient of the neighbouring value: v read one key further", distribution="needle",
         read=lambda self, name: _shift(Tiled.read(self, name), 1) if name == "v" else Tiled.read(self, name)),
]  # fmt: skip
