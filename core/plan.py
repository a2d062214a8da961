"""From options to the problems of a sweep. Standard library only.

An option is given on the command line, in a TOML file, by a preset or by the machine's default
preset, in that order of precedence; all four spell it alike.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from flash2.core.problem import DTYPES, PASSES, PRECISIONS, Problem, Window

CLASSES = tuple(dict.fromkeys(itertools.chain(*PRECISIONS.values())))


def words(text: str) -> list[str]:
    """`a,b` -> ["a", "b"]; an empty list or item is an error."""
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise ValueError(f"{text!r} has an empty item; write a,b,c")
    return items


def size(text: str | int) -> int:
    """`512`, `2k`, `1m` (binary multiples) -> an integer >= 1."""
    digits, unit = str(text).strip().lower(), 1
    if digits[-1:] in ("k", "m"):
        digits, unit = digits[:-1], {"k": 1 << 10, "m": 1 << 20}[digits[-1]]
    if not digits.isdigit() or not 1 <= int(digits) * unit < 1 << 31:
        raise ValueError(f"{text!r} is no size; write an integer from 1 up, such as 512, 2k or 1m")
    return int(digits) * unit


def sizes(text: str) -> list[int]:
    """`512,1k` -> [512, 1024]."""
    return [size(item) for item in words(text)]


def one_of(*choices: str) -> Callable[[str], str]:
    """A parser of one word out of `choices`."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def some_of(*choices: str) -> Callable[[str], list[str]]:
    """A parser of words out of `choices`."""
    return lambda text: [one_of(*choices)(item) for item in words(text)]


def window(text: str) -> Window | None:
    """`1024:0`, `1024:` or `1024` (left only), `:64`, `none` -> (left, right), None for an open end."""
    if text == "none":
        return None
    left, _, right = text.partition(":")
    for end in (left, right):
        if end and not end.isdigit():
            raise ValueError(f"{text!r} is no window; write LEFT:RIGHT in keys, either end empty for open, or none")
    return (int(left) if left else None, int(right) if right else None)


def number(low: float, high: float) -> Callable[[str], float]:
    """A parser of a number in [low, high]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise ValueError(f"{text!r} is not a number from {low:g} to {high:g}")
        return value

    return parse


def integer(text: str) -> int:
    """An integer from 0 to 2**31 - 1."""
    if not text.isdigit() or int(text) >= 1 << 31:
        raise ValueError(f"{text!r} is not an integer from 0 to {(1 << 31) - 1}")
    return int(text)


def yes(text: str) -> bool:
    """`yes` or `no`."""
    return one_of("yes", "no")(text) == "yes"


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a sweep: how it is read, and what --help says of it."""

    parse: Callable[[str], Any]
    metavar: str
    help: str
    default: str | None = None
    flag: bool = False


# fmt: off  a preset reads as one paragraph, not as a column of words
PRESETS: dict[str, dict[str, str]] = {
    # The table this project grew out of.
    "seed": {"heads": "32", "head-dim": "64", "tokens": "16384", "seqlen": "512,1k,2k,4k,8k", "dtype": "fp32"},
    # The grid of the FlashAttention papers: 16k tokens, hidden size 2048.
    "fa": {
        "hidden": "2048",
        "head-dim": "64,128,256",
        "tokens": "16384",
        "seqlen": "512,1k,2k,4k,8k,16k",
        "dtype": "bf16",
        "causal": "both",
    },
    "cpu": {"batch": "1", "heads": "8", "head-dim": "64", "seqlen": "512,1k,2k", "dtype": "fp32", "causal": "both"},
    "gpt2": {"batch": "8", "heads": "12", "head-dim": "64", "seqlen": "1k", "dtype": "bf16", "causal": "yes"},
    "llama3-8b": {
        "heads": "32",
        "kv-heads": "8",
        "head-dim": "128",
        "tokens": "16384",
        "seqlen": "2k,4k,8k",
        "dtype": "bf16",
        "causal": "yes",
    },
    "llama3-70b": {
        "heads": "64",
        "kv-heads": "8",
        "head-dim": "128",
        "tokens": "16384",
        "seqlen": "2k,4k,8k",
        "dtype": "bf16",
        "causal": "yes",
    },
    "qwen3-32b": {
        "heads": "64",
        "kv-heads": "8",
        "head-dim": "128",
        "tokens": "16384",
        "seqlen": "4k,8k,16k",
        "dtype": "bf16",
        "causal": "yes",
    },
    "mistral-7b": {
        "heads": "32",
        "kv-heads": "8",
        "head-dim": "128",
        "tokens": "16384",
        "seqlen": "8k,16k",
        "window": "4095:0",
        "dtype": "bf16",
        "causal": "yes",
    },
    "gemma2-9b": {
        "heads": "16",
        "kv-heads": "8",
        "head-dim": "256",
        "tokens": "16384",
        "seqlen": "4k,8k",
        "softcap": "50",
        "dtype": "bf16",
        "causal": "yes",
    },
    "mpt-7b": {
        "heads": "32",
        "head-dim": "128",
        "tokens": "16384",
        "seqlen": "2k,4k",
        "alibi": "yes",
        "dtype": "bf16",
        "causal": "yes",
    },
}
# fmt: on
MACHINE_PRESET = {"cuda": "seed", "cpu": "cpu"}
MACHINE_BACKENDS = {"cuda": "naive,sdpa,flex,triton", "cpu": "naive,sdpa,numba"}

OPTIONS: dict[str, Option] = {
    "backends": Option(words, "A,B", "backends to compare, by name or ./file.py:Class (default: the machine's)"),
    "preset": Option(one_of(*PRESETS), "NAME", f"a known set of problems: {', '.join(PRESETS)}"),
    "batch": Option(sizes, "N,..", "batch sizes (default: tokens / seqlen)"),
    "heads": Option(sizes, "N,..", "query heads"),
    "kv-heads": Option(sizes, "N,..", "key/value heads (default: as many as query heads)"),
    "hidden": Option(size, "N", "heads * head_dim, instead of heads"),
    "head-dim": Option(sizes, "N,..", "head dimensions"),
    "seqlen": Option(sizes, "N,..", "query lengths, such as 512,1k,2k"),
    "seqlen-kv": Option(sizes, "N,..", "key lengths (default: as long as the queries)"),
    "tokens": Option(size, "N", "batch * seqlen, instead of batch"),
    "dtype": Option(some_of(*DTYPES), "T,..", f"of {', '.join(DTYPES)}"),
    "precision": Option(
        some_of("default", "all", *CLASSES), "C,..",
        f"class of maths: default (each backend's own), all (each it has), or of {', '.join(CLASSES)}", "default",
    ),
    "causal": Option(one_of("yes", "no", "both"), "yes|no|both", "causal mask, bottom-right aligned", "no"),
    "window": Option(window, "LEFT:RIGHT", "sliding window in keys, either end empty for open; none for none", "none"),
    "softcap": Option(number(0, 1e6), "X", "s -> X*tanh(s/X); 0 for none", "0"),
    "alibi": Option(yes, "yes|no", "ALiBi biases", "no", flag=True),
    "pass": Option(some_of(*PASSES), "P,..", f"of {', '.join(PASSES)}", "fwd"),
    "baseline": Option(str, "NAME", "what speed-ups are against (default: sdpa if it runs, else the first backend)"),
    "device": Option(one_of("auto", "cpu", "cuda"), "D", "auto (the GPU where there is one), cpu or cuda", "auto"),
    "timeout": Option(number(1, 86400), "S", "seconds a worker may be silent before its cell is a timeout", "300"),
    "seconds": Option(number(0.01, 3600), "S", "most time to spend timing one cell", "1"),
    "cold": Option(
        yes, "yes|no", "compile everything anew, into caches that begin empty: what first calls take", "no", flag=True
    ),
    "graph": Option(yes, "yes|no", "also time forwards as CUDA-graph replays", "no", flag=True),
    "seed": Option(integer, "N", "seed of the inputs", "0"),
}  # fmt: skip


def parse_option(name: str, text: str) -> Any:
    """The value of one option, or a ValueError that names it and what it takes."""
    if name not in OPTIONS:
        raise ValueError(f"unknown option {name!r}; known: {', '.join(OPTIONS)}")
    try:
        return OPTIONS[name].parse(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def read_config(path: str) -> dict[str, str]:
    """Options from a TOML file: the long names as keys; lists, numbers and booleans as TOML has them."""
    with open(path, "rb") as file:
        try:
            table = tomllib.load(file)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not TOML: {error}") from None
    texts = {name: _toml_text(value) for name, value in table.items()}
    for name, text in texts.items():
        try:
            parse_option(name, text)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return texts


def _toml_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def to_toml(texts: dict[str, str]) -> str:
    """A config file that gives these options."""
    return "".join(f'{name} = "{text}"\n' for name, text in texts.items())


def with_defaults(texts: dict[str, str]) -> dict[str, str]:
    """`texts`, and the default of every option that has one of its own."""
    return {name: option.default for name, option in OPTIONS.items() if option.default is not None} | texts


def effective(given: dict[str, str], config: dict[str, str], device_type: str) -> dict[str, str]:
    """Every option in force, as text: given > config > preset > the machine's default > the option's."""
    chosen = {**config, **given}
    preset = PRESETS[chosen.get("preset", MACHINE_PRESET[device_type])]
    merged = with_defaults({"backends": MACHINE_BACKENDS[device_type], **preset, **chosen})
    for own, others in (("batch", "tokens"), ("tokens", "batch"), ("heads", "hidden"), ("hidden", "heads")):
        if own in chosen and others not in chosen:  # the preset's other way to say the same gives way
            merged.pop(others, None)
    if "heads" in chosen and "kv-heads" not in chosen:
        merged.pop("kv-heads", None)
    return {name: merged[name] for name in OPTIONS if name in merged}


def problems(texts: dict[str, str]) -> list[Problem]:
    """The problems of a sweep, in the order they run; fp32's class is left at its first.

    Raises ValueError, in words, for options that contradict each other or the rules of a Problem."""
    get = {name: parse_option(name, text) for name, text in texts.items()}
    if "batch" in get and "tokens" in get:
        raise ValueError("batch and tokens say the same thing; give one")
    if "heads" in get and "hidden" in get:
        raise ValueError("heads and hidden say the same thing; give one")
    found = []
    for dtype, pass_, head_dim, causal in itertools.product(
        get["dtype"], get["pass"], get["head-dim"], {"yes": [True], "no": [False], "both": [False, True]}[get["causal"]]
    ):
        for heads in get.get("heads") or [_share("hidden", get["hidden"], "head-dim", head_dim)]:
            for kv_heads, seq_q in itertools.product(get.get("kv-heads", [None]), get["seqlen"]):
                for seq_kv in get.get("seqlen-kv", [None]):
                    for batch in get.get("batch") or [_share("tokens", get["tokens"], "seqlen", seq_q)]:
                        found.append(
                            Problem(
                                batch=batch, heads_q=heads, heads_kv=kv_heads, seq_q=seq_q, seq_kv=seq_kv,
                                head_dim=head_dim, dtype=dtype, causal=causal, window=get["window"],
                                softcap=get["softcap"], alibi=get["alibi"], pass_=pass_,
                            )
                        )  # fmt: skip
    return list(dict.fromkeys(found))


def _share(whole: str, total: int, part: str, each: int) -> int:
    if total % each:
        raise ValueError(f"{whole} {total} is not a multiple of {part} {each}")
    return total // each


def cells(problem: Problem, wanted: Iterable[str], classes: dict[str, dict[str, list[str]]]) -> list[tuple[str, str]]:
    """(backend, precision) to measure on `problem`. wanted: values of --precision; classes: backend ->
    dtype -> classes it has. A backend without the dtype keeps one cell, which will say why not."""
    found: dict[tuple[str, str], None] = {}
    for backend, by_dtype in classes.items():
        own = by_dtype.get(problem.dtype, [])
        for want in wanted:
            if want == "all":
                picks = own or [problem.precision]
            elif want == "default":
                picks = own[:1] or [problem.precision]
            else:
                picks = [want] if want in PRECISIONS[problem.dtype] else []
            found |= dict.fromkeys((backend, pick) for pick in picks)
    return list(found)
