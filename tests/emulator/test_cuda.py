"""The CUDA sources of the cupy backend run on a CPU: right in every class of maths, and every planted fault is seen.

A choice of sizes and faults by default, a minute of one core; `pytest tests/emulator --every-kernel` has all.
"""

from __future__ import annotations

import shutil
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from cuda_on_cpu import COMPILER, CudaOnCPU
from judged import Case

from flash2.backends.cupy_cuda import compile, fp32, hopper, launch
from flash2.core.contract import spec_of
from flash2.core.problem import Problem

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no g++"),
    pytest.mark.usefixtures("one_thread"),
]

GROUPED = {"heads_q": 2, "heads_kv": 1}
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": ({**GROUPED, "seq_q": 70, "seq_kv": 130, "causal": True}, {"layout": "bshd"}),
    "full": ({"seq_q": 37, "seq_kv": 65}, {"upstream": "transpose"}),
    "growing": ({"seq_q": 40, "seq_kv": 130}, {"distribution": "x3"}),  # maxima that later keys raise
    "empty-rows": ({**GROUPED, "seq_q": 150, "seq_kv": 40, "causal": True}, {}),
    "everything": (
        {**GROUPED, "seq_q": 66, "seq_kv": 140, "causal": True, "window": (50, 0), "softcap": 5.0, "alibi": True},
        {"layout": "sliced", "upstream": "sum"},
    ),
}  # fmt: skip
# (class of maths, head_dim): one for every padded head_dim. A head_dim that is not one itself leaves columns over,
# and an odd one rows that are no multiples of 16 bytes.
SIZES = [
    *product(("bf16", "fp16"), (32, 64, 75, 128, 192, 250)),
    *product(("ieee", "tf32"), (61, 128, 250)),
    ("tf32", 32),
]
CHOICE = [
    ("bf16", 64, "causal"), ("bf16", 64, "empty-rows"), ("fp16", 75, "everything"), ("bf16", 192, "full"),
    ("ieee", 61, "everything"), ("tf32", 61, "causal"), ("tf32", 61, "growing"),
]  # fmt: skip


def pytest_generate_tests(metafunc):
    every = metafunc.config.getoption("every_kernel")
    for fixture, (whole, choice) in PARAMETERS.items():
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, list(whole) if every else choice)
    if "cell" in metafunc.fixturenames:
        whole = [(*size, feature) for size in SIZES for feature in FEATURES]
        cells = whole if every else CHOICE
        metafunc.parametrize("cell", cells, ids=lambda cell: "-".join(map(str, cell)))


def judge(backend: CudaOnCPU, precision: str, head_dim: int, feature: str, pass_: str = "fwd+bwd") -> None:
    """Judged; AssertionError, or RuntimeError for what the emulator itself forbids."""
    case = Case(backend, precision, torch.device("cpu"))
    fields, how = FEATURES[feature]
    case.judge(case.problem(batch=1, head_dim=head_dim, pass_=pass_, **{"heads_q": 1, **fields}), **how)


def test_right(cell):
    for eager in (False, True):
        judge(CudaOnCPU(eager), *cell)


# name -> (tile, class of maths, head_dim, fields, how) of Hopper's forward. Blocks are fewer than row tiles, so each
# computes some.
HOPPER: dict[str, tuple[str | None, str, int, dict[str, Any], dict[str, Any]]] = {
    "shipped-causal": (None, "bf16", 128, {**GROUPED, "batch": 2, "seq_q": 300, "causal": True}, {"layout": "bshd"}),
    "shipped-full": (None, "fp16", 120, {"seq_q": 200, "seq_kv": 411}, {"layout": "packed"}),
    "shipped-narrow": (None, "bf16", 48, {"heads_q": 3, "seq_q": 300, "seq_kv": 200, "causal": True}, {}),
    "three-groups": ("wgmma 192x128 s2 q2", "fp16", 64, {**GROUPED, "seq_q": 450, "causal": True}, {}),
    "window": (
        "wgmma 128x64 s3 q1 turns ordered", "bf16", 128,
        {**GROUPED, "seq_q": 300, "seq_kv": 411, "causal": True, "window": (150, 0)}, {"layout": "sliced"},
    ),
    "one-key": ("wgmma 128x64 s2 q2", "bf16", 64, {"heads_q": 5, "seq_q": 140, "seq_kv": 1, "causal": True}, {}),
}  # fmt: skip


def test_hopper_is_right(hopper_cell):
    for eager in (False, True):
        judge_hopper(eager, *HOPPER[hopper_cell])


def judge_hopper(eager: bool, tile: str | None, precision: str, head_dim: int, fields: dict, how: dict) -> None:
    """As judge() does, the forward for compute capability 9.0."""
    backend = CudaOnCPU(eager, arch=90)
    case = Case(backend.pin(**{"forward": tile} if tile else {}), precision, torch.device("cpu"))
    problem = case.problem(head_dim=head_dim, pass_="fwd", **{"batch": 1, "heads_q": 1, **fields})
    (kernel,) = launch.kernels_of(problem, 90, backend.pins)
    assert kernel.source == hopper.SOURCE
    case.judge(problem, **how)


# name -> (pins, head_dim, feature, most parts that the keys are divided into) of the IEEE backward: two warps have one team
# for dQ, four have two, eight four. A block with more than one tile of keys walks over them.
IEEE: dict[str, tuple[dict[str, str], int, str, int]] = {
    "two-kernels": ({"gradients_kv": "64x64 w2 s2"}, 61, "causal", 0),
    "one-team": ({"gradients": "64x64 w2 s2"}, 64, "long", 2),
    "two-teams": ({"gradients": "64x128 w4 s2"}, 61, "everything", 1),
    "four-teams": ({"gradients": "64x256 w8 s2"}, 64, "causal", 1),
    "wide": ({"gradients": "128x128 w8 s2"}, 75, "everything", 1),
    "chosen": ({}, 40, "long", 9),
}  # fmt: skip
FEATURES["long"] = ({**GROUPED, "seq_q": 150, "seq_kv": 300, "causal": True, "window": (170, 0)}, {})


def judge_ieee(eager: bool, most: int, pins: dict[str, str], head_dim: int, feature: str) -> None:
    """As judge() does, both passes in IEEE arithmetic, with at most so many parts of the keys."""
    backend = CudaOnCPU(eager, arch=90)
    problem = Case(backend, "ieee", torch.device("cpu")).problem(**FEATURES[feature][0], head_dim=head_dim)
    one = 4 * problem.batch * problem.heads_q * -(-problem.seq_q // 128) * 128 * (64 if head_dim <= 64 else 128)
    with mock.patch.object(fp32, "SHARES_LIMIT", most * one):
        judge(backend.pin(**pins) if pins else backend, "ieee", head_dim, feature)


def test_ieee_gradients_are_right(ieee_cell):
    pins, head_dim, feature, most = IEEE[ieee_cell]
    for eager in (False, True):
        judge_ieee(eager, most, pins, head_dim, feature)


def test_keys_past_the_end_bring_nothing_to_dq():
    """Where every logit is far below 0, exp2(0 - lse2) of a key that is not there is infinite."""
    for pins in ({"gradients": "64x128 w4 s2"}, {"gradients_kv": "64x64 w2 s2"}):
        backend = CudaOnCPU().pin(**pins)
        q, k, v, do = (torch.full((1, 1, n, 64), x) for n, x in ((200, 5.0), (70, -5.0), (70, 1.0), (200, 1.0)))
        spec = spec_of(Problem(seq_q=200, seq_kv=70, head_dim=64, dtype="fp32", precision="ieee"))
        o, lse = backend.forward(q, k, v, spec)
        assert lse.max() < -150
        assert all(gradient.isfinite().all() for gradient in backend.backward(do, q, k, v, o, lse, spec))


def test_the_choice_has_every_source_and_class():
    sources = {name for family in launch.FAMILIES.values() for name in family.sources.values()} | {hopper.SOURCE}
    assert sources == {path.name for path in compile.SOURCES.glob("*.cu")}
    assert {precision for precision, *_ in CHOICE} == set(launch.FAMILIES)


# bug -> (file, what stands there, what is planted, class of maths, features); seen by the forward alone unless the file
# is the backward's
PLANTED = {
    "no wait for a copy": (
        "half_forward.cu", "copy_wait<STAGES - 2>();", "", "bf16", "causal"),
    "a copy that outlives the block": (
        "half_forward.cu", "copy_wait<0>();\n", "\n", "bf16", "empty-rows"),
    "no barrier before a tile is overwritten": (
        "half_forward.cu", "__syncthreads();  // the tile of this round", "//", "bf16", "causal"),
    "a barrier that some threads leave out": (
        "half_forward.cu", "__syncthreads();  // the tile of this round", "if (lane) __syncthreads();  //", "bf16", "causal"),
    "one hidden key too many": (
        "half_forward.cu", "int high = min(i + p.right,", "int high = min(i + p.right - 1,", "bf16", "causal"),
    "a tile on the diagonal taken as full": (
        "problem.cuh", "max(first + p.right + 1, 0)) / BLOCK * BLOCK", "max(first + p.right + 1, 0) + BLOCK) / BLOCK * BLOCK",
        "bf16", "causal"),
    "the diagonal from the top left": (
        "problem.cuh", "int offset = p.seq_kv - p.seq_q;  // bottom-right", "int offset = 0;  //", "bf16", "causal"),
    "o not rescaled": (
        "half_forward.cu", "acc[m][d][e] *= alpha[m][e / 2];", ";", "bf16", "causal"),
    "the neighbour's rows of K": (
        "half.cuh", "at((lane & 7) | ((lane >> 4) << 3)", "at((lane & 7) | ((lane >> 4) << 2)", "bf16", "causal"),
    "a chunk stored in another's place": (
        "half.cuh", "copy_async(to + at(row, chunk), head +", "copy_async(to + at(row + 1, chunk), head +", "bf16", "causal"),
    "the wrong head of K and V": (
        "half_forward.cu", "head_kv = head / p.group;", "head_kv = min(head, p.heads / p.group);", "bf16", "causal"),
    "the next round's Q before all have read this one": (
        "half_gradients_kv.cu", "__syncthreads();  // the tile of this round", "//", "bf16", "causal"),
    "a hidden pair counted in dK and dV": (
        "half_gradients_kv.cu", "j > i + p.right) s", "j > i + p.right + 1) s", "bf16", "causal"),
    "keys from the first query that sees one, off by a tile": (
        "problem.cuh", "r.lo = max(start - offset - p.right, 0) / BLOCK * BLOCK;",
        "r.lo = cdiv(max(start - offset - p.right, 0), BLOCK) * BLOCK;", "bf16", "causal"),
    "dK without the scale": (
        "half_gradients_kv.cu", "dk[m][d][e] *= p.dscale;", ";", "bf16", "causal"),
    "V overwritten while another warp reads it": (
        "half_gradients_kv.cu", "u32 of_a = lane_a(), of_b = lane_b(), of_k = of_a + own_row * PITCH;",
        "u32 of_a = lane_a(), of_b = lane_b(), of_k = of_a;", "bf16", "causal"),
    "delta with the wrong sign": (
        "half_gradients_q.cu", "float base = -load_one(delta", "float base = load_one(delta", "bf16", "causal"),
    "a row that saw no key, not told apart": (
        "half_statistics.cu", "lse == -INF ? INF : lse * LOG2E", "lse * LOG2E", "bf16", "empty-rows"),
    "a float32 ring that waits for one copy too few": (
        "fp32.cuh", "STAGE;\n        copy_wait<STAGES - 2>();", "STAGE;\n        copy_wait<STAGES - 1>();", "ieee", "causal"),
    "a float32 ring without its barrier": (
        "fp32.cuh", "STAGE;\n        __syncthreads();", "STAGE;", "tf32", "causal"),
    "one that waits for one copy too few before a thread's part": (
        "fp32.cuh", "copy_wait<STAGES - 2>();\n        load.arrived(stages", "copy_wait<STAGES - 1>();\n        load.arrived(stages", "tf32", "causal"),
    "the columns of P in another order than V's rows": (
        "fp32_tf32.cuh", "b += 4 * (2 * lane.t * PITCH", "b += 4 * (lane.t * PITCH", "tf32", "causal"),
    "V's rows in twos that other threads copied": (
        "fp32_tf32_forward.cu", "PITCH, 0, 0, V>(stage", "PITCH>(stage", "tf32", "causal"),
    "V's rows not in twos": (
        "fp32_tf32_forward.cu", "round_in_place<BLOCK_N, true>", "round_in_place<BLOCK_N, false>", "tf32", "causal"),
    "what a thread does to V, left out": (
        "fp32_tf32_forward.cu", "if (STAGES > 2) ring.prepare(OfV{});", "", "tf32", "causal"),
    "o not rescaled where a maximum grew late": (
        "fp32_tf32_forward.cu", "acc[m][d][2 * h] *= alpha, acc", "acc", "tf32", "growing"),
    "the sum of weights not rescaled there": (
        "fp32_tf32_forward.cu", "l_i[m][h] *= alpha;", "", "tf32", "growing"),
    "a maximum of a thread's own columns": (
        "fp32_tf32_forward.cu", "most = fmaxf(most, __shfl_xor_sync(~0u, most, far));", "", "tf32", "growing"),
    "no log of 0 told apart": (
        "fp32_tf32_forward.cu", "none ? -INF : ", "", "tf32", "empty-rows"),
}  # fmt: skip
BACKWARD = {
    "half_gradients_kv.cu", "half_gradients_q.cu", "half_statistics.cu",
    "keys from the first query that sees one, off by a tile",
}  # fmt: skip
SMALL = {"forward": "32x32 w2 s2", "gradients_kv": "32x32 w2 s2", "gradients_q": "32x32 w2 s2"}
NEXT = "mbarrier_wait(base + K_FULL + 8 * slot, count / STAGES & 1);\n                if"  # of the main loop
FREE = "bar_arrive(V_FREE + before, RING_THREADS);"
DONE = "products_wait<0>();\n                pin_down(o), pin_down(w);\n                "
# The same, in Hopper's forward.
PLANTED_HOPPER = {
    "K read before it is there": (NEXT, "if"),
    "K's barrier always in its first phase": (NEXT, NEXT.replace("count / STAGES & 1", "0")),
    "S read before it is made": ("products_wait<1>();", ""),
    "V given back while it is read": (DONE + FREE, FREE + DONE),
    "P written while it is read": (DONE + FREE + "\n                pack_all(w, s);", "pack_all(w, s);" + DONE + FREE),
    "nobody begins": ("if (TURNS && group == GROUPS - 1)", "if (TURNS && group == GROUPS)"),
    "a slot that is never given back": (FREE, ""),
    "the second half of V in the wrong place": ("descriptor(v + n * 2048, COLUMN_KV)", "descriptor(v + n * 2048, 1024)"),
    "Q read without its swizzle": ("((chunk ^ (r & 7)) << 4)", "(chunk << 4)"),
    "half the bytes of a tile": ("HALVES * column);", "column);"),
    "every group the first one's rows": ("q_slot * TILE_Q + group * 8192", "q_slot * TILE_Q"),
    "the edge of the mask off by one": ("min(i + 8 * r + p.right,", "min(i + 8 * r + p.right + 1,"),
}  # fmt: skip
PLANTED_IN = (
    "wgmma 128x64 s2 q1 turns ordered qreg", "bf16", 128,
    {"heads_q": 3, "seq_q": 200, "seq_kv": 264, "causal": True}, {},
)  # fmt: skip

# bug -> (file, what stands there, what is planted, an IEEE cell)
KV = "fp32_simt_gradients_kv.cu"
PLANTED_IEEE = {
    "hidden pairs counted in dQ": (KV, "add_share(masked,", "add_share(false,", "two-teams"),
    "sums written where weights are still read": (KV, "__syncthreads();  // the weights are read", "//", "two-teams"),
    "sums read before they are there": (
        KV, "        __syncthreads();\n    }\n    to +=", "    }\n    to +=", "four-teams"),
    "another team's sums": (KV, "(own * TEAMS + other)", "(other * TEAMS + own)", "four-teams"),
    "every team the first one's keys": (KV, "*b = k + team * BLOCK_D * PITCH", "*b = k", "two-teams"),
    "a tile of keys passed over": (KV, "(start_n / ROWS / p.parts + 1)", "(start_n / ROWS / p.parts + 2)", "one-team"),
    "keys overwritten while they are read": (KV, "__syncthreads();  // the tile of keys is read", "//", "one-team"),
    "one part's shares for all, in whatever order": (KV, "anew(blockIdx.x) % p.parts)", "0)", "one-team"),
    "every head the first one's shares": (KV, "(batch * p.heads + loader.head) * p.parts", "batch * p.parts", "one-team"),
    "dQ without the scale": ("fp32_simt_gradients_sum.cu", "sum.x * p.dscale", "sum.x", "one-team"),
    "the last part left out": ("fp32_simt_gradients_sum.cu", "n < p.parts", "n < p.parts - 1", "one-team"),
}  # fmt: skip

# fixture -> (all, what is run by default): each kind of fault, where it costs least
PARAMETERS = {
    "hopper_cell": (HOPPER, ["shipped-causal", "three-groups", "window"]),
    "bug": (
        PLANTED,
        [
            "no wait for a copy", "no barrier before a tile is overwritten", "a barrier that some threads leave out",
            "one hidden key too many", "the diagonal from the top left", "the wrong head of K and V",
            "a hidden pair counted in dK and dV", "delta with the wrong sign", "a row that saw no key, not told apart",
            "a float32 ring without its barrier", "V's rows in twos that other threads copied",
            "o not rescaled where a maximum grew late", "the sum of weights not rescaled there",
        ],
    ),
    "ieee_cell": (IEEE, ["two-kernels", "one-team", "two-teams", "chosen"]),
    "ieee_bug": (
        PLANTED_IEEE,
        [
            "hidden pairs counted in dQ", "sums written where weights are still read", "a tile of keys passed over",
            "keys overwritten while they are read", "the last part left out",
        ],
    ),
    "hopper_bug": (
        PLANTED_HOPPER,
        [
            "K read before it is there", "V given back while it is read", "P written while it is read",
            "nobody begins", "half the bytes of a tile", "the edge of the mask off by one",
        ],
    ),
}  # fmt: skip


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """plant(file, before, after): compile the sources with that change."""
    for path in compile.SOURCES.glob("*.cu*"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(compile, "SOURCES", tmp_path)

    def change(name: str, before: str, after: str) -> None:
        text = (tmp_path / name).read_text()
        assert text.count(before) == 1, f"{before!r} stands {text.count(before)} times in {name}"
        (tmp_path / name).write_text(text.replace(before, after))

    return change


def test_a_planted_fault_is_seen(bug, plant):
    name, before, after, precision, feature = PLANTED[bug]
    plant(name, before, after)
    pins = SMALL if precision == "bf16" else {}
    head_dim, pass_ = 32 if precision == "bf16" else 61, "fwd+bwd" if name in BACKWARD or bug in BACKWARD else "fwd"
    both = [CudaOnCPU(eager).pin(**pins) for eager in (False, True)]
    with pytest.raises((AssertionError, RuntimeError)):
        [judge(backend, precision, head_dim, feature, pass_) for backend in both]


def test_a_planted_fault_in_ieee_gradients_is_seen(ieee_bug, plant):
    *change, cell = PLANTED_IEEE[ieee_bug]
    plant(*change)
    pins, head_dim, feature, most = IEEE[cell]
    with pytest.raises((AssertionError, RuntimeError)):
        [judge_ieee(eager, most, pins, head_dim, feature) for eager in (False, True)]


def test_a_planted_fault_in_hoppers_forward_is_seen(hopper_bug, plant):
    plant(hopper.SOURCE, *PLANTED_HOPPER[hopper_bug])
    with pytest.raises((AssertionError, RuntimeError)):
        [judge_hopper(eager, *PLANTED_IN) for eager in (False, True)]


def test_without_a_fault_all_is_right():
    for feature, eager in product(("causal", "empty-rows"), (False, True)):
        judge(CudaOnCPU(eager).pin(**SMALL), "bf16", 32, feature)
    for eager in (False, True):
        judge_hopper(eager, *PLANTED_IN)
