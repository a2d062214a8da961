"""Every backend as an attention of Hugging Face transformers 5: attn_implementation="flash2-triton".

    from flash2.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flash2-triton")

transformers calls the attention with keys in their own heads (grouped heads stay grouped), a sliding window as a
number, and whatever the mask function of the same name made of its masks: here None for plain causal or full
attention, or the padding, (batch, keys) bool. Nothing of size queries x keys is ever built.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, modeling_utils
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function

from flash2 import attention
from flash2.backends import list_backends
from flash2.core.problem import Window

PREFIX = "flash2-"
# What transformers passes along that changes nothing here; anything else that is given must be understood.
IGNORED = {
    "position_ids",
    "use_cache",
    "num_items_in_batch",
    "output_hidden_states",
    "cache_position",
    "logits_to_keep",
}


def register() -> list[str]:
    """Enter every backend as `flash2-<name>`, for this process; the names. Calling it again is harmless."""
    names = {f"{PREFIX}{name}": name for name in list_backends()}
    for ours, name in names.items():
        AttentionInterface.register(ours, functools.partial(flash2_attention, name))
        AttentionMaskInterface.register(ours, flash2_mask)
    # transformers takes every name with "flash" in it for a build of flash-attn, and imports that before use.
    load = getattr(modeling_utils, "lazy_import_flash_attention", None)
    if load is not None and not getattr(load, "knows_flash2", False):
        modeling_utils.lazy_import_flash_attention = _all_but_ours(load)
    return list(names)


def _all_but_ours(load: Callable) -> Callable:
    @functools.wraps(load)
    def loaded(implementation: str | None, *arguments: Any, **options: Any) -> Any:
        if implementation is not None and implementation.startswith(PREFIX):
            return None
        return load(implementation, *arguments, **options)

    loaded.knows_flash2 = True  # pyright: ignore[reportFunctionMemberAccess]  so that a second register() adds no layer
    return loaded


def flash2_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor | None:
    """None where causal, sliding or full attention says it all, else the padding: (batch, kv_length) bool, True for text.

    Raises NotImplementedError for masks that the kernels cannot be told: packed sequences, prefixes, static caches.
    """
    if mask_function is not bidirectional_mask_function:
        if not options.get("allow_is_causal_skip", True):
            raise NotImplementedError(
                "flash2 knows causal, sliding-window and full attention with padding; packed sequences (position_ids "
                "that begin anew), prefix or block masks and compiled static caches need sdpa or eager"
            )
        if isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_offset + kv_length:
            raise NotImplementedError(
                f"flash2 aligns the last query with the last key, but {kv_length} keys are given for queries that end "
                f"at {int(q_offset) + q_length}: a static cache? use the dynamic one"
            )
        local = options.get("local_size")
        if local is not None and local != getattr(options.get("config"), "sliding_window", None):
            raise NotImplementedError("flash2 has no chunked attention; use sdpa or eager")
    if attention_mask is None:
        return None
    padding = attention_mask[:, -kv_length:].bool()
    return None if bool(padding.all()) else padding


def flash2_attention(
    backend: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """(o, None): o (batch, seq_q, heads, head_dim) of query (batch, heads, seq_q, head_dim), key and value
    (batch, kv_heads, seq_kv, head_dim). Raises NotImplementedError for what the backend or the interface cannot."""
    if dropout:
        raise NotImplementedError(
            f"flash2 has no dropout inside attention, {dropout} is asked for; set attention_dropout=0"
        )
    if options.pop("output_attentions", False):
        raise NotImplementedError(
            "flash2 never forms the attention weights; use attn_implementation='eager' to see them"
        )
    if unknown := sorted(name for name, value in options.items() if value is not None and name not in IGNORED):
        raise NotImplementedError(f"flash2 does not know the attention argument {unknown[0]!r}; use sdpa or eager")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    # transformers counts the query's own key into its window
    window: Window | None = (sliding_window - 1, None if causal else sliding_window - 1) if sliding_window else None
    call = functools.partial(
        attention, causal=causal, scale=scaling, window=window, softcap=softcap or 0.0, backend=backend
    )
    if attention_mask is None:
        o = call(query, key, value)
    elif attention_mask.dim() != 2:
        raise NotImplementedError("flash2 takes a padding mask (batch, keys), not a mask of each query and key")
    else:
        o = _without_padding(call, query, key, value, attention_mask)
    return o.transpose(1, 2).contiguous(), None


def _without_padding(
    call: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor
) -> torch.Tensor:
    # Each sequence by itself, between its padding on the left and on the right; rows of padding are 0, as in a
    # row that sees no key. The queries are the last of the keys.
    o = torch.zeros_like(q)
    rows, hidden = [], k.shape[2] - q.shape[2]
    for number, keep in enumerate(padding.cpu()):
        places = keep.nonzero().flatten().tolist()
        if not places:
            rows.append(o[number : number + 1])
            continue
        first, last = places[0], places[-1] + 1
        if last - first != len(places):
            raise NotImplementedError("flash2 takes padding before and after a sequence, not within it")
        begin, end = max(first - hidden, 0), max(last - hidden, 0)
        one = slice(number, number + 1)
        if begin == end:
            rows.append(o[one])
            continue
        part = call(q[one, :, begin:end], k[one, :, first:last], v[one, :, first:last])
        rows.append(torch.nn.functional.pad(part, (0, 0, begin, q.shape[2] - end)))
    return torch.cat(rows)
