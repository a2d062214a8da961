"""What attention is, in float64, and how far honest arithmetic of a precision class strays from it.

Two things share one loop and nothing with any backend: the float64 oracle (`attention_reference`,
`attention_gradients`) and the rounding emulation (`emulate`), which is the same equations in float32 with the
roundings that no kernel of the class can avoid. Equations: FlashAttention-2 (arXiv:2307.08691), section 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

# Bound on the score-sized temporaries of one block; on the CPU they had better stay in its caches.
SCRATCH_BYTES = {"cuda": 512 << 20, "cpu": 32 << 20}
_LIVE = 8  # score-sized float64 temporaries alive at once, counted generously
Tensors = dict[str, torch.Tensor]


def attention_reference(q, k, v, *, causal=False, window=None, softcap=0.0, alibi_slopes=None, scale=None):
    """(o, lse) in float64: o (batch, heads_q, seq_q, head_dim), lse (batch, heads_q, seq_q) in natural log.

    q (batch, heads_q, seq_q, head_dim); k, v (batch, heads_kv, seq_kv, head_dim); any dtype and strides. Query i
    sees key j iff -left <= j - (i + seq_kv - seq_q) <= right for window (left, right), None being open, and also
    j <= i + seq_kv - seq_q if causal. A row that sees no key has o = 0 and lse = -inf; a hidden NaN reaches nothing.
    """
    out = _attend(_ORACLE, q, k, v, None, causal, window, softcap, alibi_slopes, scale)
    return out["o"], out["lse"]


def attention_gradients(do, q, k, v, *, causal=False, window=None, softcap=0.0, alibi_slopes=None, scale=None):
    """(dq, dk, dv) in float64 for the upstream gradient `do` of o; arguments as in attention_reference."""
    out = _attend(_ORACLE, q, k, v, do, causal, window, softcap, alibi_slopes, scale)
    return out["dq"], out["dk"], out["dv"]


def oracle(q, k, v, do=None, *, causal=False, window=None, softcap=0.0, alibi_slopes=None, scale=None) -> Tensors:
    """Everything the judge needs of the oracle in one pass, float64: o, lse and, given `do`, dq, dk, dv; and for
    each its row sizes, `size_o` and so on, (batch, heads, seq).

    The size of a row is what its entries would be if the terms of their sums had random signs:
    size_o[i]  = sqrt(sum_j p_ij^2 mean_d v_jd^2), or the row's own rms where that is larger, and likewise for
    the gradients with |dS_ij|^2 counted as p_ij^2 (dp_ij^2 + delta_i^2 + |do_i|^2 |v_j|^2 / head_dim), the terms
    that cancel in dS = p (dp - delta). Rounding noise scales with this, not with what is left after cancelling.
    size_lse[i] = 1 + sum_j p_ij |s_ij|: a float32 logit s carries an error of eps |s|.
    """
    return _attend(_ORACLE, q, k, v, do, causal, window, softcap, alibi_slopes, scale, sizes=True)


def emulate(
    q, k, v, do=None, *, precision: str, causal=False, window=None, softcap=0.0, alibi_slopes=None, scale=None
) -> Tensors:
    """o, lse and, given `do`, dq, dk, dv as tight arithmetic of class `precision` gives them, dtypes included.

    fp16, bf16: float32 throughout, but P = exp(s - lse), dS and the outputs are rounded to the dtype (they are
    operands of a tensor-core product), and delta = rowsum(do * o) reads the rounded o that autograd keeps.
    ieee: float32. tf32: the operands of every product cut to 10 mantissa bits, as the tensor core cuts them;
    rounding instead is at least as exact. tf32x3, bf16x3, bf16x6: operands split in 2, 2, 3 parts and the 3, 3, 6
    largest products summed. fp64: float32 arithmetic on float32 inputs; multiply its error by FP64_PER_FP32.
    """
    if precision in ("fp16", "bf16"):
        maths = _Maths(torch.float32, q.dtype, operand=q.dtype)
    else:
        maths = _Maths(torch.float32, torch.float32, _PRODUCTS[precision])
    with ieee_matmul():
        return _attend(maths, q, k, v, do, causal, window, softcap, alibi_slopes, scale)


# An emulation in float64 would be the oracle itself; its errors are those of float32 shrunk by eps64 / eps32.
FP64_PER_FP32 = 2.0**-29


@contextlib.contextmanager
def ieee_matmul() -> Iterator[None]:
    """Float32 matmuls are IEEE float32 inside, whatever torch is set to; the setting is restored after."""
    # Not allow_tf32: reading it raises when the caller has used the newer setting for the same thing.
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


@dataclass(frozen=True, slots=True)
class _Maths:
    """The arithmetic a pass is done in."""

    work: torch.dtype  # of every intermediate
    out: torch.dtype  # of o, dq, dk, dv
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.matmul
    operand: torch.dtype | None = None  # P and dS are rounded to it before a product


_ORACLE = _Maths(torch.float64, torch.float64)


def _split_product(cut: Callable[[torch.Tensor], torch.Tensor], parts: int):
    """a @ b with each operand as a sum of `parts` short ones, keeping the products x_i y_j with i + j < parts."""

    def product(a, b):
        a_parts, b_parts = _split(a, cut, parts), _split(b, cut, parts)
        pairs = [(i, j) for i in range(parts) for j in range(parts) if i + j < parts]
        pairs.sort(key=lambda ij: -sum(ij))  # smallest first, so that they are not lost in the sum
        return sum(a_parts[i] @ b_parts[j] for i, j in pairs)

    return product


def _split(x: torch.Tensor, cut: Callable[[torch.Tensor], torch.Tensor], parts: int) -> list[torch.Tensor]:
    short = []
    for _ in range(parts):
        short.append(cut(x))
        x = x - short[-1]
    return short


def cut_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 with the last 13 of its 23 mantissa bits cleared, which is what a TF32 tensor core reads."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def cut_bf16(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to bfloat16."""
    return x.bfloat16().float()


# The products of the fp32 classes; fp64 stands in for its own emulation with float32's.
_PRODUCTS = {
    "ieee": torch.matmul,
    "fp64": torch.matmul,
    "tf32": _split_product(cut_tf32, 1),
    "tf32x3": _split_product(cut_tf32, 2),
    "bf16x3": _split_product(cut_bf16, 2),
    "bf16x6": _split_product(cut_bf16, 3),
}


def _attend(maths, q, k, v, do, causal, window, softcap, alibi_slopes, scale, sizes=False) -> Tensors:
    # Works on (groups, group, seq_q, head_dim) queries and (groups, seq_kv, head_dim) keys, a group being the query
    # heads of one (batch, key/value head); loops over blocks of groups and of rows, so that scores fit SCRATCH_BYTES.
    (batch, heads_q, seq_q, dim), (heads_kv, seq_kv) = q.shape, k.shape[1:3]
    groups, group, work, dev = batch * heads_kv, heads_q // heads_kv, maths.work, q.device
    scale = dim**-0.5 if scale is None else scale
    q = q.reshape(groups, group, seq_q, dim)
    k, v = (x.reshape(groups, seq_kv, dim) for x in (k, v))
    do = None if do is None else do.reshape(groups, group, seq_q, dim)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(work).expand(batch, heads_q).reshape(groups, group, 1, 1)

    lse_dtype = torch.promote_types(maths.out, torch.float32)
    out = {
        "o": q.new_zeros(q.shape, dtype=maths.out),
        "lse": torch.full(q.shape[:3], -torch.inf, dtype=lse_dtype, device=dev),
    }
    if do is not None:
        out["dq"] = q.new_zeros(q.shape, dtype=maths.out)
        out |= {name: k.new_zeros(groups, 1, seq_kv, dim, dtype=maths.out) for name in ("dk", "dv")}
    if sizes:
        out |= {f"size_{name}": x.new_zeros(x.shape if name == "lse" else x.shape[:-1]) for name, x in out.items()}

    def scores(qb, kb, g, rows, keep):
        """Logits of a block, -inf where hidden, (groups, group, rows, seq_kv), and tanh(logit / softcap)."""
        s = maths.product(qb.flatten(1, 2), kb.mT).unflatten(1, (group, -1)) * scale
        tanh = torch.tanh(s / softcap) if softcap else None
        s = s if tanh is None else softcap * tanh
        if alibi_slopes is not None:
            s = s - alibi_slopes[g] * _distance(rows, seq_q, seq_kv, dev).abs().to(work)
        return s.masked_fill(~keep, -torch.inf), tanh

    for g, row_blocks in _blocks(groups, group, seq_q, seq_kv, SCRATCH_BYTES[dev.type]):
        kb, vb = k[g].to(work), v[g].to(work)
        dk, dv, dk_sq, dv_sq = (
            torch.zeros_like(kb),
            torch.zeros_like(vb),
            torch.zeros_like(_msq(kb)),
            torch.zeros_like(_msq(vb)),
        )
        for rows in row_blocks:
            qb = q[g, :, rows].to(work)
            keep = _visible(rows, seq_q, seq_kv, causal, window, dev)
            s, tanh = scores(qb, kb, g, rows, keep)
            lse = s.logsumexp(-1, keepdim=True)  # -inf for a row that sees no key
            p = _weights(s, lse, keep)
            o = _visible_product(maths, _operand(p, maths), keep, vb).to(maths.out)
            out["o"][g, :, rows], out["lse"][g, :, rows] = o, lse[..., 0]
            if sizes:
                out["size_o"][g, :, rows] = _size(p.square() @ _msq(vb)[:, None], o)
                out["size_lse"][g, :, rows] = 1 + (p * s.abs().masked_fill(~keep, 0)).sum(-1)
            if do is None:
                continue

            if maths is not _ORACLE:
                # Recomputed in another order of summing, as a backward kernel may: with the forward's own rounding
                # errors many of them would cancel, here in exp(s - lse) and in dp - delta.
                s, tanh = scores(qb.flip(-1), kb.flip(-1), g, rows, keep)
                p = _weights(s, lse, keep)
            dob = do[g, :, rows].to(work)
            dp = maths.product(dob.flatten(1, 2), vb.mT).unflatten(1, (group, -1))
            delta = (dob * o.to(work)).sum(-1, keepdim=True)
            slope = 1 if tanh is None else 1 - tanh**2  # d/dx c*tanh(x/c) = 1 - tanh(x/c)^2
            ds = _operand((p * (dp - delta) * slope).masked_fill(~keep, 0), maths)
            dq = _visible_product(maths, ds, keep, kb) * scale
            out["dq"][g, :, rows] = dq
            # The sum over a group's heads happens inside the product.
            keep_t = keep.repeat(group, 1).mT
            dk += _visible_product(maths, ds.flatten(1, 2).mT, keep_t, qb.flatten(1, 2)) * scale
            dv += _visible_product(maths, _operand(p, maths).flatten(1, 2).mT, keep_t, dob.flatten(1, 2))
            if sizes:
                p_sq = p.square()
                ds_sq = p_sq * (scale * slope) ** 2 * (dp**2 + delta**2 + dim * _msq(dob) * _msq(vb)[:, None].mT)
                ds_sq = ds_sq.masked_fill(~keep, 0)
                out["size_dq"][g, :, rows] = _size(ds_sq @ _msq(kb)[:, None], dq)
                dk_sq += ds_sq.flatten(1, 2).mT @ _msq(qb).flatten(1, 2)
                dv_sq += p_sq.flatten(1, 2).mT @ _msq(dob).flatten(1, 2)
        if do is not None:
            out["dk"][g, 0], out["dv"][g, 0] = dk, dv
            if sizes:
                out["size_dk"][g, 0], out["size_dv"][g, 0] = _size(dk_sq, dk), _size(dv_sq, dv)

    return {name: x.unflatten(0, (batch, heads_kv)).flatten(1, 2) for name, x in out.items()}


def _blocks(groups: int, group: int, seq_q: int, seq_kv: int, scratch: int) -> Iterator[tuple[slice, list[slice]]]:
    """(groups, blocks of rows): many whole groups when they are small, a few rows of one group when it is large."""
    if seq_kv == 0:
        return
    budget = scratch // (8 * _LIVE)
    many = max(1, budget // max(1, group * seq_q * seq_kv))
    rows = max(1, seq_q if many > 1 else budget // (group * seq_kv))
    row_blocks = [slice(row, min(row + rows, seq_q)) for row in range(0, seq_q, rows)]
    for first in range(0, groups, many):
        yield slice(first, min(first + many, groups)), row_blocks


def _distance(rows: slice, seq_q: int, seq_kv: int, device) -> torch.Tensor:
    """(rows, seq_kv): how far key j lies right of query i's place among the keys, i + seq_kv - seq_q."""
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(seq_kv, device=device)[None, :]
    return j - (i + seq_kv - seq_q)


def _visible(rows: slice, seq_q: int, seq_kv: int, causal: bool, window, device) -> torch.Tensor:
    """(rows, seq_kv), True where the query sees the key."""
    away = _distance(rows, seq_q, seq_kv, device)
    keep = torch.ones_like(away, dtype=torch.bool)
    if causal:
        keep &= away <= 0
    left, right = window or (None, None)
    if left is not None:
        keep &= away >= -left
    if right is not None:
        keep &= away <= right
    return keep


def _weights(s: torch.Tensor, lse: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """P = exp(s - lse), 0 where hidden also if the row's lse is nan or, for want of any key, -inf."""
    return torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)).masked_fill(~keep, 0)


def _visible_product(maths: _Maths, w: torch.Tensor, keep: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """sum_j w[..., i, j] x[j] over the visible pairs alone: a hidden pair is no part of the sum, not 0 * nan."""
    bad = ~x.isfinite()
    grouped = w.dim() == 4  # (groups, group, rows, seq_kv) against (groups, seq_kv, head_dim)
    y = maths.product(w.flatten(1, 2) if grouped else w, x.masked_fill(bad, 0))
    if bad.any():
        met = keep.to(x.dtype).repeat(w.shape[1], 1) if grouped else keep.to(x.dtype)
        y = y.masked_fill(met @ bad.to(x.dtype) > 0, torch.nan)
    return y.unflatten(1, w.shape[1:3]) if grouped else y


def _operand(x: torch.Tensor, maths: _Maths) -> torch.Tensor:
    return x if maths.operand is None else x.to(maths.operand).to(maths.work)


def _msq(x: torch.Tensor) -> torch.Tensor:
    """Mean square of each row, (..., seq, 1)."""
    return x.square().mean(-1, keepdim=True)


def _size(squares: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Row sizes: sqrt of the summed squares (..., seq, 1), or the rms of x's row where that is larger."""
    return torch.maximum(squares, _msq(x)).sqrt()[..., 0]
