"""What only the numba backend can get wrong: tile edges, vector maths, threads. The contract suite has the rest."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from judged import Case

numba = pytest.importorskip("numba")

from flash2.backends import numba_kernels as kernels  # noqa: E402 (after the skip)
from flash2.backends.naive import visible  # noqa: E402
from flash2.backends.numba_cpu import NumbaCPU, key_splits  # noqa: E402
from flash2.core.contract import check_inputs  # noqa: E402

backend = NumbaCPU()


def problem(seq_q, seq_kv, head_dim, *, batch=1, heads_q=2, heads_kv=1, **options):
    """(q, k, v, do, spec), seeded."""
    generator = torch.Generator().manual_seed(seq_q * 1009 + seq_kv * 31 + head_dim)
    q, do = (torch.randn(batch, heads_q, seq_q, head_dim, generator=generator) for _ in range(2))
    k, v = (torch.randn(batch, heads_kv, seq_kv, head_dim, generator=generator) for _ in range(2))
    return q, k, v, do, check_inputs(q, k, v, **options)[1]


def run(q, k, v, do, spec, who=backend):
    """(o, lse, dq, dk, dv)."""
    o, lse = who.forward(q, k, v, spec)
    return o, lse, *who.backward(do, q, k, v, o, lse, spec)


def judge(seq_q, seq_kv, head_dim, **options):
    """All outputs of a problem within the judge's budget."""
    options = {"heads_q": 2, "heads_kv": 1, **options}
    case = Case(backend, "ieee", torch.device("cpu"))
    case.judge(case.problem(seq_q=seq_q, seq_kv=seq_kv, head_dim=head_dim, **options))


def edges(tile):
    return (tile - 1, tile, tile + 1)


# ---- tile edges


@pytest.mark.parametrize("seq_kv", [1, kernels.MR - 1, *edges(kernels.NR), *edges(kernels.BLOCK_N)])
@pytest.mark.parametrize("seq_q", [1, *edges(kernels.NR), *edges(kernels.BLOCK_M), 2 * kernels.BLOCK_M + 5])
def test_lengths_around_tiles(seq_q, seq_kv):
    for options in ({}, {"causal": True}, {"window": (kernels.NR, kernels.MR + 1)}):
        judge(seq_q, seq_kv, 24, **options)


@pytest.mark.parametrize(
    "head_dim", [1, 2, *edges(kernels.MR), *edges(kernels.LANES), *edges(kernels.NR), 80, 255, 256]
)
def test_head_dims_around_registers(head_dim):
    judge(70, 90, head_dim, causal=True, softcap=3.0)


@pytest.mark.parametrize("left", [None, 0, 1, kernels.NR - 1, kernels.NR, kernels.BLOCK_N + 3])
@pytest.mark.parametrize("right", [None, 0, kernels.MR, kernels.BLOCK_N])
def test_windows_around_tiles(left, right):
    judge(200, 300, 16, window=(left, right), alibi=True)


def test_split_keys_add_up():
    assert key_splits(1, 1200) > 1  # several copies of dq, and rows of dq longer than head_dim
    judge(300, 1200, 40, causal=True)


def test_negative_and_zero_scale():
    for scale in (-0.3, 0.0):
        judge(65, 130, 32, scale=scale)


# ---- what is read and written


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: torch.cat([torch.zeros(1), x.reshape(-1)])[1:].view(x.shape),
    ],
    ids=["heads-inside", "cut", "every-second", "unaligned"],
)
def test_strides_change_no_bit(view):
    q, k, v, do, spec = problem(100, 130, 40, causal=True)
    for mine, dense in zip(run(*map(view, (q, k, v, do)), spec), run(q, k, v, do, spec), strict=True):
        assert torch.equal(mine, dense)


def test_stride_zero():
    q, k, v, _, spec = problem(50, 60, 16, batch=2)
    k, v, do = k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1), torch.ones(()).expand_as(q)
    for mine, dense in zip(
        run(q, k, v, do, spec), run(q, k.contiguous(), v.contiguous(), do.contiguous(), spec), strict=True
    ):
        assert torch.equal(mine, dense)


def test_default_dtype_does_not_matter():
    given = problem(40, 70, 24)
    expected = run(*given)
    torch.set_default_dtype(torch.float64)
    try:
        outputs = run(*given)
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, before in zip(outputs, expected, strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "do"])
def test_bad_numbers_stay_with_their_pairs(where, value):
    given = dict(zip(("q", "k", "v", "do", "spec"), problem(150, 170, 40, window=(40, 7)), strict=True))
    clean = run(**given)
    at = 75
    given[where] = given[where].clone()
    given[where][:, :, at, 3] = value
    sees = visible(given["q"], given["k"], given["spec"])
    rows = sees[:, at] if where in ("k", "v") else torch.arange(150) == at
    keys = sees[rows].any(0)
    o, lse, dq, dk, dv = run(**given)
    for name, mine, before, reached in zip(
        ("o", "lse", "dq", "dk", "dv"), (o, lse, dq, dk, dv), clean, (rows, rows, rows, keys, keys), strict=True
    ):
        assert torch.equal(mine[:, :, ~reached], before[:, :, ~reached]), f"{name} beyond its pairs"
    if where == "v":
        assert not o[:, :, rows].isfinite().all(-1).any()
    elif value is torch.nan and where != "do":
        assert o[:, :, rows].isnan().all()
    assert not dq[:, :, rows].isfinite().all() and not dk[:, :, keys].isfinite().all()
    assert where == "v" or not dv[:, :, keys].isfinite().all()


# ---- vector maths


def apply(function, x):
    """A vector function of the kernels over a float32 array."""

    @numba.njit
    def loop(x, y):
        for at in range(0, x.size, kernels.LANES):
            kernels.store(y, at, function(kernels.load(x, at)))

    x = np.asarray(x, np.float32)
    padded = np.concatenate([x, np.zeros(-x.size % kernels.LANES, np.float32)])
    y = np.empty_like(padded)
    loop(padded, y)
    return y[: x.size]


def test_exp_is_float32_exact():
    x = np.concatenate([np.linspace(-87.3, 88.3, 2_000_001), np.linspace(-1, 1, 200_001)]).astype(np.float32)
    true = np.exp(x.astype(np.float64))
    ulps = np.abs(apply(kernels.vexp, x) - true) / np.spacing(true.astype(np.float32))
    assert ulps.max() < 1.5
    assert np.sqrt(np.mean(ulps**2)) < 0.4  # 0.29 is rounding alone


def test_exp_at_the_ends():
    x = [-np.inf, -1e30, -200, -89, -88.1, 0, -0.0, 88.8, 100, 1e30, np.inf, np.nan]
    np.testing.assert_array_equal(apply(kernels.vexp, x), [0, 0, 0, 0, 0, 1, 1, *[np.inf] * 4, np.nan])
    low = apply(kernels.vexp, np.linspace(-110, -87, 100_001))
    assert ((low >= 0) & (low < 2e-38)).all() and (np.diff(low) >= 0).all()


def test_tanh_is_float32_exact():
    x = np.concatenate([np.linspace(-30, 30, 1_000_001), np.geomspace(1e-30, 1, 200_001)]).astype(np.float32)
    true = np.tanh(x.astype(np.float64))
    ulps = np.abs(apply(kernels.vtanh, x) - true) / np.spacing(np.abs(true).astype(np.float32))
    assert ulps[x != 0].max() < 4
    ends = apply(kernels.vtanh, [-np.inf, -100, -0.0, 0.0, 100, np.inf, np.nan])
    np.testing.assert_array_equal(ends, [-1, -1, 0, 0, 1, 1, np.nan])
    assert np.signbit(ends[2]) and not np.signbit(ends[3])


# ---- threads


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_bits_depend_on_no_thread_count(torch_threads):
    given = problem(500, 1100, 64, heads_q=6, heads_kv=3, causal=True)
    torch_threads(1)
    alone = run(*given)
    for threads in (2, 2, 2, 7):
        torch_threads(threads)
        for mine, first in zip(run(*given), alone, strict=True):
            assert torch.equal(mine, first)


def test_python_threads_at_once():
    problems = [problem(130 + n, 200, 32, heads_q=4, causal=True) for n in range(4)]
    alone = [run(*given) for given in problems]
    wrong: list[str] = []

    def work(n):
        for _ in range(10):
            for mine, first in zip(run(*problems[n]), alone[n], strict=True):
                if not torch.equal(mine, first):
                    wrong.append(f"thread {n}")

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_numba_thread_count_is_put_back():
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        run(*problem(40, 40, 8))
        assert numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(before)


# ---- the machine


def test_runs_from_a_read_only_checkout_and_without_numba(tmp_path):
    # numba keeps compiled code beside the source, or in a directory of its own where it may not write there.
    script = (
        "import torch, flash2; from flash2.backends import get_backend\n"
        "q = torch.randn(1, 1, 40, 8); o = flash2.attention(q, q, q, backend='numba')\n"
        "assert (o - flash2.attention(q, q, q, backend='naive')).abs().max() < 1e-5\n"
    )
    cached = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=cached)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nbc")}
    assert kept
    subprocess.run([sys.executable, "-c", script], check=True, env=cached)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nbc")} == kept, "the second process compiled"
    hidden = (
        "import sys; sys.modules['numba'] = None\n"
        "from flash2.backends import get_backend\n"
        "print(get_backend('numba').unavailable())\n"
    )
    said = subprocess.run([sys.executable, "-c", hidden], check=True, capture_output=True, text=True).stdout
    assert 'pip install "flash2-triton[numba]"' in said
