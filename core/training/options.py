"""What a training run is asked for: options, sizes, the learning rate of a step. Standard library only."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from flash2.core.plan import size
from flash2.core.problem import PRECISIONS

SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "muon")
CLASSES = ("bf16", *PRECISIONS["fp32"])
# Named sizes: what --size sets, and any option given beside it overrides.
SIZES: dict[str, dict[str, Any]] = {
    # A CPU of two cores trains it in a minute.
    "tiny": {"layers": 4, "width": 128, "heads": 4, "context": 256, "batch": 8, "steps": 200, "lr": 4e-3,
             "precision": "ieee", "validation_tokens": 1 << 15},
    "small": {"layers": 6, "width": 384, "heads": 6, "context": 1024, "batch": 16, "steps": 1000, "lr": 4e-3,
              "optimizer": "muon", "precision": "bf16", "validation_tokens": 1 << 17},
    # 99 million parameters; 64 k tokens a step.
    "100m": {"layers": 14, "width": 768, "heads": 12, "context": 4096, "batch": 16, "steps": 300, "lr": 2e-3,
             "warmup": 60, "optimizer": "muon", "precision": "bf16", "validation_tokens": 1 << 20, "compile": True},
}  # fmt: skip
DEVICE_SIZES = {"cpu": "tiny", "cuda": "100m"}


def _option(default: Any, help: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One training run but for its backend. Raises ValueError, in words, for what cannot be."""

    layers: int = _option(4, "transformer blocks", "N")
    width: int = _option(128, "channels of the residual stream", "N")
    heads: int = _option(4, "query heads", "N")
    kv_heads: int | None = _option(None, "key/value heads (default: as many as heads)", "N")
    window: int | None = _option(None, "sliding window: keys to the left that a query sees", "N")
    softcap: float = _option(0.0, "s -> X*tanh(s/X); 0 for none", "X")
    context: int = _option(256, "bytes that a prediction may look back on", "N")
    batch: int = _option(8, "sequences a step", "N")
    steps: int = _option(200, "optimiser steps", "N")
    optimizer: str = _option("adamw", "adamw, or muon for the matrices of the blocks and adamw for the rest", "NAME")
    lr: float = _option(4e-3, "highest learning rate, in AdamW's units", "X")
    schedule: str = _option("linear", f"after the warm-up: {', '.join(SCHEDULES)}; the first two end at 0", "NAME")
    warmup: int = _option(20, "steps over which the learning rate rises", "N")
    weight_decay: float = _option(0.1, "of the matrices of the blocks", "X")
    clip: float = _option(1.0, "largest norm of the gradient", "X")
    dropout: float = _option(0.0, "on the output of each block's two halves", "X")
    precision: str = _option("ieee", f"bf16 (autocast), or a class of float32: {', '.join(CLASSES[1:])}", "C")
    compile: bool = _option(False, "torch.compile the blocks but for their attention")
    seed: int = _option(0, "of the weights and of the batches", "N")
    validate_every: int = _option(50, "steps between validations; there is one at the end in any case", "N")
    validation_tokens: int = _option(1 << 15, "bytes that a validation looks at, the same every time", "N")
    sample: int = _option(256, "bytes to generate after training, with the key/value cache", "N")

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "context", "batch", "steps", "validate_every", "validation_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup", "seed", "sample", "softcap", "weight_decay", "dropout"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.dropout >= 1:
            raise ValueError(f"dropout must be below 1, not {self.dropout}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width // self.heads % 2:
            raise ValueError(
                f"width {self.width} / heads {self.heads} is odd: rotary embeddings turn pairs of channels"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.window is not None and self.window < 0:
            raise ValueError(f"window must be 0 or more, not {self.window}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; known: {', '.join(SCHEDULES)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}; known: {', '.join(OPTIMIZERS)}")
        if self.precision not in CLASSES:
            raise ValueError(f"unknown precision {self.precision!r}; known: {', '.join(CLASSES)}")

    @property
    def tokens(self) -> int:
        """Bytes that one step predicts."""
        return self.batch * self.context

    def learning_rate(self, step: int) -> float:
        """Of step 0 .. steps - 1: a rise over `warmup` steps, then the schedule."""
        warmup = min(self.warmup, self.steps - 1)
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        left = 1 - (step - warmup) / (self.steps - warmup)
        return self.lr * {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[self.schedule]

    def model(self) -> dict[str, Any]:
        """What the shapes in a checkpoint depend on."""
        return {name: getattr(self, name) for name in ("layers", "width", "heads", "kv_heads", "optimizer")}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One argument for each option, absent unless given, and --size."""
    group = parser.add_argument_group("model and training")
    group.add_argument("--size", choices=SIZES, help="named sizes (default: 100m on a GPU, tiny on a CPU)")
    for option in dataclasses.fields(Options):
        flags = (f"--{option.name.replace('_', '-')}",)
        about = f"{option.metadata['help']}"
        if option.default is False:
            yes_or_no = argparse.BooleanOptionalAction
            group.add_argument(*flags, action=yes_or_no, default=argparse.SUPPRESS, help=about)
            continue
        kind = float if isinstance(option.default, float) else str if isinstance(option.default, str) else _whole
        sized = [name for name in SIZES if option.name in SIZES[name]]
        if not sized and option.default is not None:
            about += f" (default: {option.default})"
        group.add_argument(
            *flags, type=kind, metavar=option.metadata["metavar"], default=argparse.SUPPRESS, help=about
        )  # fmt: skip


def _whole(text: str) -> int:
    try:
        return 0 if text.strip() == "0" else size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None  # argparse hides the text of a ValueError


def chosen(given: dict[str, Any], size_name: str | None, device_type: str) -> Options:
    """The options in force: given > the named size > the defaults. Raises ValueError as Options does."""
    return Options(**(SIZES[size_name or DEVICE_SIZES[device_type]] | given))
