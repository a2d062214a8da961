"""A small byte-level GPT on MultiHeadAttention: pre-norm blocks, rotary embeddings, QK-norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from flash2.core.contract import Backend
from flash2.core.mha import KVCache, MultiHeadAttention, RMSNorm
from flash2.core.training.options import Options

VOCABULARY = 256
ROTARY_BASE = 10000.0
HIDDEN = 4  # channels of a block's second half, in widths


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, options: Options, backend: str | Backend) -> None:
        super().__init__()
        width = options.width
        self.attention_norm = RMSNorm(width, eps=1e-6)
        self.attention = MultiHeadAttention(
            width, options.heads, kv_heads=options.kv_heads, bias=False, causal=True,
            window=None if options.window is None else (options.window, 0), softcap=options.softcap,
            rotary=ROTARY_BASE, qk_norm=True, dropout=options.dropout, backend=backend,
            precision=None if options.precision == "bf16" else options.precision,
        )  # fmt: skip
        self.mlp_norm = RMSNorm(width, eps=1e-6)
        self.up = nn.Linear(width, HIDDEN * width, bias=False)
        self.down = nn.Linear(HIDDEN * width, width, bias=False)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """x (batch, seq, width) -> the same shape."""
        q, k, v = self.before(x, self.attention.turns(x, cache))
        return self.after(x, self.attention.attend(q, k, v, cache))

    def before(
        self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(q, k, v) of x, as MultiHeadAttention.project()."""
        return self.attention.project(self.attention_norm(x), turns)

    def after(self, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        """The block's output for its input x and attention's o."""
        x = x + self.attention.finish(o)
        return x + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))))


class GPT(nn.Module):
    """bytes (batch, seq) int64 -> logits (batch, seq, 256) of the next byte."""

    def __init__(self, options: Options, backend: str | Backend) -> None:
        super().__init__()
        self.options = options
        self.embedding = nn.Embedding(VOCABULARY, options.width)
        self.blocks = nn.ModuleList(Block(options, backend) for _ in range(options.layers))
        self.norm = RMSNorm(options.width, eps=1e-6)
        self.head = nn.Linear(options.width, VOCABULARY, bias=False)
        self.reset(options.seed)

    def reset(self, seed: int) -> None:
        """Weights that depend on the seed alone. Each block begins as the identity: its outputs start at 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith(("out.weight", "down.weight", "head.weight")):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:
                deviation = 1.0 if name == "embedding.weight" else weight.shape[1] ** -0.5
                nn.init.normal_(weight, std=deviation, generator=generator)

    def forward(self, tokens: torch.Tensor, caches: list[KVCache] | None = None) -> torch.Tensor:
        """Logits of the byte after each of `tokens`; with caches the tokens continue what the caches hold."""
        x = self.embedding(tokens)
        for number, block in enumerate(self.blocks):
            x = block(x, caches[number] if caches else None)
        return self.head(self.norm(x))

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats per byte of windows (batch, seq + 1): each byte is told from those before it."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    def compile_around_attention(self, **options) -> None:
        """torch.compile(**options) for all of a block but attention, which every backend gets called for as it is."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.before = torch.compile(block.before, **options)
            block.after = torch.compile(block.after, **options)

    def attentions(self) -> list[MultiHeadAttention]:
        """The attention of each block, first to last."""
        return [block.attention for block in self.blocks]  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]

    @torch.no_grad()
    def generate(self, prompt: bytes, count: int, *, temperature: float = 0.8, seed: int = 0) -> Iterator[int]:
        """`count` bytes after `prompt`, one at a time, from keys and values computed once (temperature 0: the likeliest).

        Prompt and sample together may not be longer than the model's context. The model should be in eval mode.
        """
        if not prompt or len(prompt) + count > self.options.context:
            raise ValueError(
                f"prompt of {len(prompt)} and sample of {count} bytes must fit context {self.options.context}"
            )
        device = self.head.weight.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        caches = [attention.new_cache(1, len(prompt) + count, dtype) for attention in self.attentions()]
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.tensor([list(prompt)], device=device)
        for _ in range(count):
            logits = self(tokens, caches)[0, -1].float().cpu()
            if temperature == 0:
                byte = int(logits.argmax())
            else:
                byte = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
            yield byte
            tokens = torch.tensor([[byte]], device=device)
