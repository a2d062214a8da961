"""Small problems on one backend, for a memory checker:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python tests/sanitize.py triton

Without the switch torch hands out pieces of large blocks, and an access past the end of one is not seen. Run it once
without the checker: kernels are compiled then. Exit status 0, 1 for a wrong result, the checker's own for a wrong access.
"""

from __future__ import annotations

import argparse
import sys

import torch

from flash2 import attention, get_backend
from flash2.core.contract import TORCH_DTYPES
from flash2.core.problem import Problem

# Lengths, head_dims and layouts that end inside a tile, where a wrong access would be.
PROBLEMS = [
    {"seq_q": 128, "head_dim": 64},
    {"seq_q": 129, "seq_kv": 191, "head_dim": 64, "causal": True, "heads_kv": 1},
    {"seq_q": 63, "seq_kv": 65, "head_dim": 128, "batch": 2},
    {"seq_q": 200, "head_dim": 128, "causal": True},
    {"seq_q": 77, "head_dim": 256},
    {"seq_q": 100, "seq_kv": 30, "head_dim": 64, "causal": True},  # rows that see no key
    {"seq_q": 1, "seq_kv": 333, "head_dim": 64},
    {"seq_q": 150, "head_dim": 40, "window": (50, 0), "causal": True},
    {"seq_q": 131, "head_dim": 61, "softcap": 20.0},
    {"seq_q": 97, "head_dim": 80, "alibi": True, "causal": True},
    {"seq_q": 131, "head_dim": 64, "heads_q": 140, "causal": True},  # more heads than multiprocessors
    {"seq_q": 150, "head_dim": 128, "heads_q": 280, "heads_kv": 140},
]


def main(arguments: list[str] | None = None) -> int:
    """Run them, forward and backward, and compare with float64."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--precision", help="the class of maths (default: the backend's own)")
    parser.add_argument("--first", type=int, default=len(PROBLEMS), help="run only so many")
    options = parser.parse_args(arguments)
    backend, device = get_backend(options.backend), torch.device("cuda")
    precision = options.precision or (backend.classes(options.dtype, device) or [None])[0]
    wrong = 0
    for fields in PROBLEMS[: options.first]:
        problem = Problem(**{"heads_q": 2, "pass_": "fwd+bwd", **fields}, dtype=options.dtype, precision=precision)
        if reasons := backend.why_not(problem, device):
            print(f"{problem.key()}: refused: {'; '.join(reasons)}")
            continue
        error = worst_error(backend, problem, device)
        torch.cuda.synchronize()
        bound = 1e-2 if options.dtype == "fp32" else 5e-2
        wrong += not error < bound
        print(f"{problem.key()}: relative error {error:.1e}", flush=True)
    return int(wrong > 0)


def worst_error(backend, problem: Problem, device: torch.device) -> float:
    """The largest relative rms error of o and the gradients."""
    random = torch.Generator(device=device).manual_seed(0)
    shapes = [
        (problem.heads_q, problem.seq_q),
        *[(problem.heads_kv, problem.seq_kv)] * 2,
        (problem.heads_q, problem.seq_q),
    ]
    q, k, v, do = (
        torch.randn(problem.batch, *shape, problem.head_dim, generator=random, device=device).to(
            TORCH_DTYPES[problem.dtype]
        )
        for shape in shapes
    )
    slopes = torch.rand(problem.heads_q, generator=random, device=device) if problem.alibi else None
    options = {"causal": problem.causal, "window": problem.window, "softcap": problem.softcap}
    got = both(
        lambda *x: attention(*x, **options, alibi_slopes=slopes, precision=problem.precision, backend=backend),
        q,
        k,
        v,
        do,
    )
    exact = (x.double() for x in (q, k, v, do))
    want = both(lambda *x: attention(*x, **options, alibi_slopes=slopes, backend="naive"), *exact)
    errors = [((x.double() - y).norm() / y.norm().clamp_min(1e-30)).item() for x, y in zip(got, want, strict=True)]
    return float("nan") if any(e != e for e in errors) else max(errors)


def both(call, q, k, v, do) -> list[torch.Tensor]:
    """o, dq, dk, dv."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = call(q, k, v)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]


if __name__ == "__main__":
    sys.exit(main())
