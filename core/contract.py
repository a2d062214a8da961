"""The contract between callers and backends: Spec, Capability, Backend and shared validation.

docs/contract.md states what every backend promises; this module holds the types it is said in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flash2.core.problem import PRECISIONS, Problem, Window, check_window, visible_band

TORCH_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# What a problem can ask beyond dense attention with equal lengths and heads. `cross` is
# seq_q != seq_kv, `empty-rows` a query that sees no key, `lse` the second output, `hidden-nan`
# that a NaN or Inf in a key reaches no row it is hidden from (0 * nan inside a tile is nan).
FEATURES = ("causal", "gqa", "cross", "window", "softcap", "alibi", "scale", "empty-rows", "lse", "hidden-nan")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spec:
    """What to compute on q, k, v. One object, so that a new option breaks no backend.

    scale: the factor on q.k, always a number here. window: (left, right) keys visible beside
    the bottom-right diagonal, None for open. softcap: s -> softcap*tanh(s/softcap), 0 for none.
    alibi_slopes: float32 (heads_q,) or (batch, heads_q), the bias being -slope*|i + seq_kv - seq_q - j|.
    precision: the class of maths (problem.PRECISIONS). lse: the caller takes the second output too; a backend that
    always has it need not look.
    """

    scale: float
    precision: str
    causal: bool = False
    window: Window | None = None
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    lse: bool = False

    @property
    def band(self) -> Window:
        """(left, right) of the visible band: query i sees key j iff
        -left <= j - (i + seq_kv - seq_q) <= right; None is open. Causal is (left, 0)."""
        return visible_band(self.causal, self.window)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """What a backend declares it can do; everything else is refused in words.

    precisions maps each dtype to the classes it computes in, its default first. kernels is a
    regular expression that the names of its own device kernels match: a row in which a matmul or
    attention kernel ran that does not match is a fallback to somebody else's, and rejected
    (None: not declared, not checked). min_arch is a CUDA compute capability such as (8, 0).
    """

    devices: tuple[str, ...]
    precisions: dict[str, tuple[str, ...]]
    features: frozenset[str] = frozenset()
    min_arch: tuple[int, int] | None = None
    max_arch: tuple[int, int] | None = None
    head_dims: range | tuple[int, ...] = range(1, 257)
    backward: bool = True
    deterministic: bool = True
    kernels: str | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.features) - set(FEATURES)):
            raise ValueError(f"unknown feature {unknown[0]!r}; known: {', '.join(FEATURES)}")
        for dtype, classes in self.precisions.items():
            if dtype not in PRECISIONS or not classes or set(classes) - set(PRECISIONS[dtype]):
                raise ValueError(f"precisions[{dtype!r}] = {classes!r} is not drawn from {PRECISIONS}")


class Backend:
    """One way to compute attention. Subclass it, set `name` and `capability`, write `forward`.

    Tensors are (batch, heads, seq, head_dim), already validated: same dtype and device, nothing
    empty, any strides. Outputs are new tensors; inputs are never written; work is queued on
    torch's current stream (the caller has made q's device current) and never waits for the host.
    """

    name: str = "?"
    capability: Capability
    # True: forward builds torch's own autograd graph and backward() is never called.
    autograd: bool = False
    # True: the first call of every new shape compiles for seconds.
    compiles_per_shape: bool = False
    # True: unavailable(), classes() and why_not() answer the same as long as the process lives, whatever torch's
    # switches or the environment say, so that attention() asks once for each kind of call.
    settled: bool = False
    # True: its launches are Python that torch.compile cannot trace. In a compiled graph it is an operator of torch.
    opaque: bool = False

    def capability_on(self, device: torch.device) -> Capability:
        """What holds on `device`; override it where a library's kernels differ from one to the other
        (`capability` is then the union, for listings)."""
        return self.capability

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine at all (and what to do), or None."""
        return None

    def version(self) -> str:
        """The version of the library the kernels come from, for `list` and the results file."""
        return f"torch {torch.__version__}"

    def classes(self, dtype: str, device: torch.device) -> tuple[str, ...]:
        """The classes of maths `dtype` is computed in on `device`, the default first; empty if it is not taken."""
        return self.capability_on(device).precisions.get(dtype, ())

    def scratch_bytes(self, problem: Problem) -> int:
        """Device memory a call takes beyond inputs and outputs, so that a sweep can say `oom` without trying."""
        return 0

    def why_not(self, problem: Problem, device: torch.device) -> list[str]:
        """Every reason, in words, why `problem` cannot run on `device`; empty if it can."""
        return capability_gaps(self.capability_on(device), problem, device)

    def details(self, problem: Problem, device: torch.device) -> list[str]:
        """How it would run `problem`, one line each (which kernel, which tiles, and why), for `explain`."""
        return []

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(o, lse): o like q; lse (batch, heads_q, seq_q), natural log, None without the feature.
        lse is float32, and float64 for fp64 tensors."""
        raise NotImplementedError

    def backward(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        lse: torch.Tensor,
        spec: Spec,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv), shaped and typed like q, k, v. `do` may have any strides, also 0."""
        raise NotImplementedError


def tf32_mismatch(precision: str) -> list[str]:
    """Why torch's float32 matmuls on CUDA are not in class `precision` ("ieee" or "tf32") as torch is set now."""
    # Also true after allow_tf32 = True or set_float32_matmul_precision("high"); asking allow_tf32 itself
    # raises once a program has mixed torch's older and newer settings.
    setting = torch.backends.cuda.matmul.fp32_precision
    if (setting == "tf32") == (precision == "tf32"):
        return []
    return [f"precision {precision}, but torch.backends.cuda.matmul.fp32_precision is {setting!r}"]


def capability_gaps(capability: Capability, problem: Problem, device: torch.device) -> list[str]:
    """Every way in which `problem` on `device` exceeds `capability`, in words."""
    reasons = []
    if device.type not in capability.devices:
        reasons.append(f"device {device.type} (runs on {', '.join(capability.devices)})")
    elif device.type == "cuda":
        arch = torch.cuda.get_device_capability(device)
        if capability.min_arch is not None and arch < capability.min_arch:
            reasons.append(f"needs sm_{_sm(capability.min_arch)} or newer, this device is sm_{_sm(arch)}")
        if capability.max_arch is not None and arch > capability.max_arch:
            reasons.append(f"needs sm_{_sm(capability.max_arch)} or older, this device is sm_{_sm(arch)}")
    classes = capability.precisions.get(problem.dtype, ())
    if not classes:
        reasons.append(f"dtype {problem.dtype} (has {', '.join(capability.precisions)})")
    elif problem.precision not in classes:
        reasons.append(f"precision {problem.precision} for {problem.dtype} (has {', '.join(classes)})")
    if problem.head_dim not in capability.head_dims:
        reasons.append(f"head_dim {problem.head_dim} (has {_say_dims(capability.head_dims)})")
    reasons += [f"no {name}" for name in needed_features(problem) if name not in capability.features]
    if problem.pass_ != "fwd" and not capability.backward:
        reasons.append("no backward")
    return reasons


def needed_features(problem: Problem) -> list[str]:
    """The FEATURES that `problem` asks for (lse is asked for by the caller, not the problem)."""
    left, right = problem.band
    # Row 0 sees the fewest keys on the right, the last row the fewest on the left.
    empty_rows = right is not None and problem.seq_kv - problem.seq_q + right < 0
    empty_rows |= left is not None and problem.seq_kv == 0
    asked = {
        "causal": problem.causal,
        "gqa": problem.heads_q != problem.heads_kv,
        "cross": problem.seq_q != problem.seq_kv,
        "window": problem.window is not None,
        "softcap": problem.softcap != 0,
        "alibi": problem.alibi,
        "scale": problem.scale is not None,
        "empty-rows": empty_rows,
    }
    return [name for name, needed in asked.items() if needed]


def check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    precision: str | None = None,
) -> tuple[Problem, Spec]:
    """The Problem and Spec that a call asks for.

    Raises ValueError that says which argument is wrong and what is allowed.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, seq, head_dim), not of shape {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, q is {q.dtype} on {q.device}; make them equal"
            )
    if q.dtype not in DTYPE_NAMES:
        raise ValueError(f"dtype {q.dtype} is not supported; use one of {', '.join(map(str, DTYPE_NAMES))}")
    if k.shape != v.shape:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must have one shape")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch and head_dim")
    if alibi_slopes is not None:
        allowed = ((q.shape[1],), (q.shape[0], q.shape[1]))
        if tuple(alibi_slopes.shape) not in allowed or alibi_slopes.dtype != torch.float32:
            raise ValueError(
                f"alibi_slopes must be float32 of shape (heads_q,) or (batch, heads_q) = {allowed[0]} or {allowed[1]}, "
                f"not {alibi_slopes.dtype} {tuple(alibi_slopes.shape)}"
            )
        if alibi_slopes.device != q.device:
            raise ValueError(f"alibi_slopes is on {alibi_slopes.device}, q on {q.device}; move it there")
        if alibi_slopes.requires_grad:
            raise ValueError("alibi_slopes has no gradient here; pass alibi_slopes.detach()")
    if window is not None:
        window = check_window(window)
    problem = Problem(
        batch=q.shape[0],
        heads_q=q.shape[1],
        heads_kv=k.shape[1],
        seq_q=q.shape[2],
        seq_kv=k.shape[2],
        head_dim=q.shape[3],
        dtype=DTYPE_NAMES[q.dtype],
        precision=precision,  # pyright: ignore[reportArgumentType]  None is the default
        causal=bool(causal),
        window=window,
        softcap=float(softcap),
        alibi=alibi_slopes is not None,
        scale=None if scale is None else float(scale),
    )
    return problem, spec_of(problem, alibi_slopes)


def spec_of(problem: Problem, alibi_slopes: torch.Tensor | None = None) -> Spec:
    """The Spec that asks a backend for `problem`."""
    return Spec(
        scale=problem.head_dim**-0.5 if problem.scale is None else problem.scale,
        precision=problem.precision,
        causal=problem.causal,
        window=problem.window,
        softcap=problem.softcap,
        alibi_slopes=alibi_slopes,
    )


def nearest_supported(backend: Backend, problem: Problem, device: torch.device) -> Problem | None:
    """The problem `backend` does support that changes fewest fields of `problem`, or None."""
    capability = backend.capability_on(device)
    repairs: list[tuple[str, Sequence[object]]] = [
        ("alibi", [False]),
        ("softcap", [0.0]),
        ("window", [None]),
        ("scale", [None]),
        ("heads_kv", [problem.heads_q]),
        ("causal", [False]),
        ("seq_kv", [problem.seq_q]),
        ("head_dim", sorted(capability.head_dims, key=lambda d: (abs(d - problem.head_dim), -d))[:1]),
        ("pass_", ["fwd"]),
    ]
    best = problem
    for dtype in sorted(capability.precisions, key=lambda name: name != problem.dtype)[:1]:
        if problem.precision not in capability.precisions[dtype]:
            best = best.replace(dtype=dtype, precision=capability.precisions[dtype][0])
    gaps = len(backend.why_not(best, device))
    for field, values in repairs:
        for value in values:
            if gaps == 0:
                return best
            candidate = best.replace(**{field: value})
            left = len(backend.why_not(candidate, device))
            if left < gaps:
                best, gaps = candidate, left
    return best if gaps == 0 else None


def _sm(arch: tuple[int, int]) -> str:
    return f"{arch[0]}{arch[1]}"


def _say_dims(dims: range | tuple[int, ...]) -> str:
    if isinstance(dims, range):
        step = f" in steps of {dims.step}" if dims.step != 1 else ""
        return f"{dims.start} to {dims[-1]}{step}"
    return ", ".join(map(str, dims))
