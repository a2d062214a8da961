"""Eager PyTorch in O(seq_q * seq_kv) memory: the readable spec that every feature exists in first."""

from __future__ import annotations

import dataclasses

import torch

from flash2.core.contract import FEATURES, Backend, Capability, Spec, tf32_mismatch


class Naive(Backend):
    """softmax(q k^T * scale) v as written on paper, forward and backward, on any device."""

    name = "naive"
    capability = Capability(
        devices=("cpu", "cuda"),
        precisions={"fp64": ("fp64",), "fp32": ("ieee", "tf32"), "fp16": ("fp16",), "bf16": ("bf16",)},
        features=frozenset(FEATURES),
        head_dims=range(1, 1 << 16),
    )

    def capability_on(self, device):
        """TF32 is of CUDA alone."""
        if device.type == "cuda":
            return self.capability
        precisions = {**self.capability.precisions, "fp32": ("ieee",)}
        return dataclasses.replace(self.capability, precisions=precisions)

    def why_not(self, problem, device):
        """The declared gaps, and fp32 maths that torch is not set to do."""
        reasons = super().why_not(problem, device)
        if device.type == "cuda" and problem.precision in ("ieee", "tf32"):
            reasons += tf32_mismatch(problem.precision)
        return reasons

    def scratch_bytes(self, problem):
        """s and p, and backward dp and ds, each with a copy in the making."""
        element = 8 if problem.dtype == "fp64" else 4
        matrices = 3 if problem.pass_ == "fwd" else 6
        return matrices * element * problem.batch * problem.heads_q * problem.seq_q * problem.seq_kv

    def forward(self, q, k, v, spec):
        """(o, lse); s and p are (batch, heads_q, seq_q, seq_kv) in at least float32."""
        s = scores(q, k, spec)
        lse = s.logsumexp(-1)
        p = probabilities(s, lse)
        bad = ~v.isfinite().all(-1)  # 0 * nan of a hidden key must not reach a row, so nan goes by hand
        o = p.to(v.dtype) @ repeat_heads(v.masked_fill(bad[..., None], 0), q)
        return o.masked_fill(sees_any(bad, q, k, spec)[..., None], torch.nan), lse

    def backward(self, do, q, k, v, o, lse, spec):
        """(dq, dk, dv) by the equations of FlashAttention-2, section 3.2, on whole matrices."""
        s = scores(q, k, spec)
        p = probabilities(s, lse.to(s.dtype))
        delta = (o.to(s.dtype) * do.to(s.dtype)).sum(-1, keepdim=True)
        dp = do.to(s.dtype) @ repeat_heads(v, q).to(s.dtype).mT
        ds = p * (dp - delta)
        if spec.softcap:  # d/dx c*tanh(x/c) = 1 - tanh(x/c)^2
            ds = ds * (1 - (capped_scores(q, k, spec) / spec.softcap) ** 2)
        ds = (ds * spec.scale).to(q.dtype)
        dq = ds @ repeat_heads(k, q)
        dk = fold_groups(ds, k).mT @ fold_groups(q, k)  # the sum over a group happens inside the product
        dv = fold_groups(p.to(v.dtype), k).mT @ fold_groups(do, k)
        return dq, dk, dv


def scores(q, k, spec: Spec):
    """softcap(q k^T * scale) + alibi, -inf where hidden; (batch, heads_q, seq_q, seq_kv)."""
    s = capped_scores(q, k, spec)
    if spec.alibi_slopes is not None:
        slopes = spec.alibi_slopes.to(s.dtype)[..., None, None]  # (heads_q, 1, 1) or (batch, heads_q, 1, 1)
        s = s - slopes * distance(q, k).abs()
    return s.masked_fill(~visible(q, k, spec), -torch.inf)


def capped_scores(q, k, spec: Spec):
    """softcap(q k^T * scale). fp16 and bf16 operands are widened first: their products are exact in float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    s = q.to(wide) @ repeat_heads(k, q).to(wide).mT * spec.scale
    return spec.softcap * torch.tanh(s / spec.softcap) if spec.softcap else s


def distance(q, k):
    """j - (i + seq_kv - seq_q): how far key j lies right of query i's bottom-right diagonal."""
    i = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    return torch.arange(k.shape[2], device=q.device)[None, :] - i


def visible(q, k, spec: Spec):
    """(seq_q, seq_kv), True where query i sees key j."""
    left, right = spec.band
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if left is not None:
        keep &= distance(q, k) >= -left
    if right is not None:
        keep &= distance(q, k) <= right
    return keep


def sees_any(flags, q, k, spec: Spec):
    """(batch, heads_q, seq_q): does a query see a key that is flagged in (batch, heads_kv, seq_kv)?"""
    left, right = spec.band
    seq_kv = k.shape[2]
    i = torch.arange(q.shape[2], device=q.device) + seq_kv - q.shape[2]
    first = (torch.zeros_like(i) if left is None else i - left).clamp(0, seq_kv)
    last = (torch.full_like(i, seq_kv) if right is None else i + right + 1).clamp(0, seq_kv)
    upto = torch.nn.functional.pad(repeat_heads(flags, q).cumsum(-1), (1, 0))
    return upto[..., last] > upto[..., first]


def probabilities(s, lse):
    """exp(s - lse), and 0 where s is -inf (a row that sees no key has lse = -inf too)."""
    return torch.exp(s - lse[..., None]).masked_fill(s == -torch.inf, 0)


def repeat_heads(x, q):
    """k or v (or one flag per key) with each head repeated for its group of query heads."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def fold_groups(x, k):
    """(batch, heads_q, seq_q, n) as (batch, heads_kv, group * seq_q, n)."""
    return x.reshape(x.shape[0], k.shape[1], -1, x.shape[-1])
