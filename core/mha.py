"""MultiHeadAttention over any backend, and the key/value cache it generates with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from flash2 import core
from flash2.core.contract import Backend
from flash2.core.functional import attention, constant
from flash2.core.problem import Window, check_window


class KVCache:
    """The keys and values of one layer for up to `capacity` positions, allocated once.

    keys, values: (batch, kv_heads, capacity, head_dim); positions 0 .. length - 1 are filled.
    """

    def __init__(
        self, batch: int, kv_heads: int, capacity: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = torch.zeros(batch, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k and v (batch, kv_heads, seq, head_dim) behind what is there; views of everything so far."""
        end = self.length + k.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} positions, {end} are needed")
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class RMSNorm(nn.RMSNorm):
    """torch's, with the weight in the dtype of x: under autocast its fused kernel would not run otherwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x / rms(x) * weight over the last axis."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class MultiHeadAttention(nn.Module):
    """Self-attention with packed projections: (batch, seq, d_model) -> (batch, seq, d_model).

    kv_heads: grouped-query attention (None: as many as heads). head_dim: None is d_model / heads. window and
    softcap as in flash2.attention. rotary: the base of rotary position embeddings (RoFormer, section 3.2.2; halves
    as in GPT-NeoX), None for none. qk_norm: RMSNorm with a weight on each head of q and k, before rotary (Qwen3).
    dropout: on the output projection, in training. precision: the class of maths of float32. backend: a name, a
    Backend, or None for the default of the device that x is on.

    Raises ValueError for sizes that do not fit each other and for an unknown backend.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        causal: bool = False,
        window: Window | None = None,
        softcap: float = 0.0,
        rotary: float | None = None,
        qk_norm: bool = False,
        dropout: float = 0.0,
        precision: str | None = None,
        backend: str | Backend | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"heads {heads} is not a multiple of kv_heads {kv_heads}")
        if head_dim is None and d_model % heads:
            raise ValueError(f"d_model {d_model} is not a multiple of heads {heads}; give head_dim, or another width")
        self.d_model, self.heads, self.kv_heads = d_model, heads, kv_heads
        self.head_dim = d_model // heads if head_dim is None else head_dim
        if rotary is not None and self.head_dim % 2:
            raise ValueError(f"rotary turns pairs of channels: head_dim {self.head_dim} is odd")
        if isinstance(backend, str):
            core.find_backend(backend, "cpu")  # a name that nobody has is refused here, not at the first step
        self.causal, self.window, self.softcap = causal, None if window is None else check_window(window), softcap
        self.precision, self.rotary, self.backend = precision, rotary, backend
        self.qkv = nn.Linear(d_model, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(heads * self.head_dim, d_model, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """x (batch, seq, d_model) -> the same shape. With a cache x continues it: its queries see, bottom-right
        aligned where causal, every position that the cache holds, and the cache grows by seq."""
        q, k, v = self.project(x, self.turns(x, cache))
        return self.finish(self.attend(q, k, v, cache))

    def turns(self, x: torch.Tensor, cache: KVCache | None = None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The rotations of the positions of x, behind those in the cache; None without rotary."""
        if self.rotary is None:
            return None
        return rotations(self.rotary, cache.length if cache else 0, x.shape[1], self.head_dim, x.device)

    def project(
        self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What comes before attention: (q, k, v) of x, each (batch, heads or kv_heads, seq, head_dim)."""
        packed = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = packed.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if turns is not None:
            cos, sin = (turn.to(v.dtype) for turn in turns)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q.to(v.dtype), k.to(v.dtype), v  # a norm may have widened q and k

    def finish(self, o: torch.Tensor) -> torch.Tensor:
        """What comes behind attention: o (batch, heads, seq, head_dim) -> (batch, seq, d_model)."""
        return self.dropout(self.out(o.transpose(1, 2).flatten(2)))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """The attention alone, of q to k and v, or to the cache with k and v behind it; o (batch, heads, seq, head_dim)."""
        dtype = q.dtype
        if cache is not None:
            k, v = cache.append(k, v)
            q = q.to(v.dtype)
        backend = self.backend
        if not isinstance(backend, Backend):
            backend = constant(core.find_backend, backend, q.device.type)
        o = attention(
            q, k, v, causal=self.causal, window=self.window, softcap=self.softcap, precision=self.precision,
            backend=backend,
        )  # fmt: skip
        assert isinstance(o, torch.Tensor)  # return_lse is not asked for
        return o.to(dtype)

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for this layer, of the weights' dtype unless another is given."""
        weight = self.qkv.weight
        return KVCache(batch, self.kv_heads, capacity, self.head_dim, dtype=dtype or weight.dtype, device=weight.device)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **options) -> MultiHeadAttention:
        """A copy of torch's module, weight for weight; `options` (causal, backend, ...) as in the constructor.

        Raises ValueError for what has no counterpart here: keys and values of another width, bias_kv, zero_attn.
        """
        if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
            raise ValueError("nn.MultiheadAttention with kdim or vdim, add_bias_kv or add_zero_attn has no counterpart")
        ours = cls(module.embed_dim, module.num_heads, bias=module.in_proj_bias is not None, **options)
        ours.to(module.in_proj_weight.device, module.in_proj_weight.dtype)
        ours.load_state_dict({OURS.get(name, name): tensor for name, tensor in module.state_dict().items()})
        return ours

    def to_torch(self) -> nn.MultiheadAttention:
        """The same weights as torch's module, batch first; its masks are arguments of its call.

        Raises ValueError for what torch's module has not: grouped heads, another head_dim, rotary, QK-norm.
        """
        plain = self.kv_heads == self.heads and self.heads * self.head_dim == self.d_model
        if not plain or self.rotary or self.softcap or isinstance(self.q_norm, RMSNorm):
            raise ValueError("nn.MultiheadAttention has no grouped heads, own head_dim, rotary, softcap or QK-norm")
        theirs = nn.MultiheadAttention(
            self.d_model, self.heads, bias=self.qkv.bias is not None, batch_first=True,
            device=self.qkv.weight.device, dtype=self.qkv.weight.dtype,
        )  # fmt: skip
        names = {ours: theirs for theirs, ours in OURS.items()}
        theirs.load_state_dict({names.get(name, name): tensor for name, tensor in self.state_dict().items()})
        return theirs


# nn.MultiheadAttention's name of a weight -> ours.
OURS = {
    "in_proj_weight": "qkv.weight",
    "in_proj_bias": "qkv.bias",
    "out_proj.weight": "out.weight",
    "out_proj.bias": "out.bias",
}


def rotations(
    base: float, start: int, seq: int, head_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of positions start .. start + seq - 1, each (seq, head_dim) float32, sin with the sign of rotate()."""
    half = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = torch.arange(start, start + seq, device=device, dtype=torch.float32)[:, None] * base**-half
    sin = angles.sin()
    return torch.cat([angles.cos()] * 2, -1), torch.cat([-sin, sin], -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Channels c and c + head_dim/2 of x (batch, heads, seq, head_dim) turned by the angle of their position."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
