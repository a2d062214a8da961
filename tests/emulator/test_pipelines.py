"""Every pipeline of the Gluon kernels on the emulator: right whatever the schedule, and every planted fault is seen.

A choice by default; `pytest tests/emulator --every-kernel` has every shipped configuration with every feature.
"""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from judged import judged

pytest.importorskip("triton")

from emulator.gluon_emulator import emulated
from emulator.machine import Hazard

from flash2.backends.gluon_hopper import configs, gradients, launch
from flash2.core.contract import spec_of
from flash2.core.problem import Problem
from flash2.core.reference import attention_reference

# Lengths of several tiles with a rest; the blocks of the forward are fewer than its row tiles, so each computes some.
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({"seq_q": 256}, {}),
    "rest": ({"seq_q": 300, "seq_kv": 411, "batch": 2, "heads_q": 1}, {"layout": "bshd", "upstream": "transpose"}),
    "causal": ({"seq_q": 391, "causal": True}, {"upstream": "sum"}),
    "more-keys": ({"seq_q": 200, "seq_kv": 530, "causal": True}, {"layout": "sliced", "upstream": "cat"}),
    "empty-rows": ({"seq_q": 450, "seq_kv": 200, "causal": True}, {}),
    "one-key": ({"seq_q": 140, "seq_kv": 1, "causal": True}, {}),
    "window": ({"seq_q": 391, "causal": True, "window": (150, 0)}, {}),
    "window-both": ({"seq_q": 300, "seq_kv": 411, "window": (70, 90)}, {}),
    "groups": ({"seq_q": 200, "seq_kv": 300, "heads_q": 4, "heads_kv": 2, "causal": True}, {"layout": "packed"}),
    "groups-window": (
        {"seq_q": 200, "seq_kv": 300, "heads_q": 6, "heads_kv": 2, "causal": True, "window": (90, 0)},
        {"upstream": "transpose"},
    ),
    "softcap": ({"seq_q": 300, "softcap": 5.0}, {"distribution": "x3"}),
    "scale": ({"seq_q": 200, "scale": -0.2, "causal": True}, {}),
    "grows": ({"seq_q": 300, "heads_q": 1, "scale": 1.0}, {"distribution": "x10"}),
    "narrow": ({"seq_q": 200, "narrow": 8, "causal": True}, {}),
    "everything": (
        {"seq_q": 300, "seq_kv": 411, "heads_kv": 1, "causal": True, "window": (170, 0), "softcap": 5.0, "narrow": 3},
        {"upstream": "cat"},
    ),
}  # fmt: skip
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)  # where configurations change; the problems here are short
FORWARD, BACKWARD, DETERMINISTIC = PASSES = ("fwd", "bwd", "bwd-deterministic")
BLOCKS = 3  # multiprocessors


def problem_of(head_dim: int, dtype: str, feature: str) -> Problem:
    """The problem of one cell; `narrow` columns are missing, which the kernels pad."""
    fields = {"heads_q": 2, "dtype": dtype, **FEATURES[feature][0]}
    return Problem(head_dim=head_dim - fields.pop("narrow", 0), **fields)


def shipped(problem: Problem) -> list[configs.ForwardConfig]:
    """The forward's configurations for problems like this one, of any length."""
    spec = spec_of(problem)
    shapes = [(1, 1, length, problem.head_dim) for length in LENGTHS]
    return list(dict.fromkeys(launch.chosen(spec, shape, shape[2]) for shape in shapes))


def run(problem: Problem, pass_: str, seed: int, config=None, edits=None, **how: Any) -> None:
    """One pass of `problem` on the emulator, judged; raises Hazard, or AssertionError for a wrong result."""
    inputs, judge = judged(problem.replace(precision=None, pass_="fwd+bwd"), "cpu", **how)
    spec = spec_of(problem)
    with (
        emulated(seed, edits),
        mock.patch.object(launch, "multiprocessors", return_value=BLOCKS),
        mock.patch.dict(launch._plans, clear=True),
        mock.patch.dict(vars(gradients).get("_plans", launch._plans), clear=True),
    ):
        if pass_ == FORWARD:
            o, lse = launch.attend(inputs.q, inputs.k, inputs.v, spec, config)
            outputs = {"o": o, "lse": lse}
        else:
            o, lse = saved(problem, **how)
            grads = gradients.differentiate(
                inputs.do, inputs.q, inputs.k, inputs.v, o, lse, spec,
                deterministic=pass_ == DETERMINISTIC, config=config,
            )  # fmt: skip
            outputs = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    verdict = judge.check(outputs, problem.precision)
    assert verdict.ok, verdict.reason


@functools.lru_cache(maxsize=64)
def saved(problem: Problem, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a forward keeps for the backward, rounded from float64."""
    x, p = judged(problem.replace(precision=None, pass_="fwd+bwd"), "cpu", **how)[0], problem
    o, lse = attention_reference(
        x.q, x.k, x.v, causal=p.causal, window=p.window, softcap=p.softcap, scale=p.scale
    )  # fmt: skip
    return o.to(x.q.dtype), lse.float()


MATRIX = {
    f"d{head_dim}-{dtype}-{feature}-{pass_}": (head_dim, dtype, feature, pass_)
    for head_dim, dtype, feature, pass_ in product((64, 128, 256), ("bf16", "fp16"), FEATURES, PASSES)
}
# Each head_dim with each pass, each feature with each pass.
CHOICE = [
    f"d{head_dim}-{dtype}-{feature}-{pass_}"
    for (i, feature), (j, pass_) in product(enumerate(FEATURES), enumerate(PASSES))
    for head_dim, dtype in [((64, 128, 256)[(i + j) % 3], ("bf16", "fp16")[i % 2])]
]


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        every = metafunc.config.getoption("every_kernel")
        metafunc.parametrize("cell", [pytest.param(MATRIX[n], id=n) for n in (MATRIX if every else CHOICE)])


@pytest.fixture(autouse=True)
def poison(one_thread):
    """What torch.empty hands out holds NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_every_schedule_is_right(cell, request):
    head_dim, dtype, feature, pass_ = cell
    problem, how = problem_of(head_dim, dtype, feature), FEATURES[feature][1]
    for config in shipped(problem) if pass_ == FORWARD else [None]:
        for seed in range(5 if request.config.getoption("every_kernel") else 1):
            run(problem, pass_, random.Random(f"{cell} {seed}").randrange(1 << 30), config, **how)


# What configs.py can say beyond what it says now.
Forward = configs.ForwardConfig
VARIANTS = [
    (64, Forward(groups=3, overlap=False)),
    (64, Forward(q_columns=32, overlap=False, turns=False)),
    (64, Forward(block_n=64, q_slots=1, overlap=False, blocks=2)),
    (64, Forward(block_n=64, kv_slots=3, q_slots=1, q_columns=64, overlap=False)),
    (128, Forward(q_slots=1, q_columns=64, overlap=False)),
    (128, Forward(q_slots=1, q_columns=128, ordered=False)),
    (128, Forward(ordered=False)),
    (256, Forward(block_n=64, q_slots=0)),
    (256, Forward(block_n=64, q_slots=0, q_columns=128, overlap=False)),
    (256, Forward(block_n=128, kv_slots=1, q_slots=0, overlap=False)),
]


Fused = functools.partial(gradients.Config, fused=True)
KV_RESIDENT = {"block_m": 64, "stages": 3, "lse_first": True, "apart": True, "resident_kv": True}
VARIANTS += [
    (64, Fused(block_m=128, lse_first=True, dv_late=True)),
    (64, Fused(block_m=64, apart=True, dv_late=True, stages=3)),
    (64, Fused(block_m=128, lse_first=True, dq_late=True)),
    (64, Fused(block_m=128, lse_first=True, fixed=True)),
    (64, Fused(**KV_RESIDENT)),
    (128, Fused(block_m=64, dq_late=True)),
    (128, Fused(block_m=64, lse_first=True)),
]


@pytest.mark.parametrize("feature", ["rest", "causal", "groups", "scale", "everything"])
@pytest.mark.parametrize(("head_dim", "config"), VARIANTS, ids=str)
def test_every_variant_is_right(head_dim, config, feature):
    pass_ = FORWARD if isinstance(config, Forward) else BACKWARD
    for seed in range(2):
        run(problem_of(head_dim, "bf16", feature), pass_, seed, config, **FEATURES[feature][1])


# ---- what is done wrong is seen


@dataclass(frozen=True)
class Fault:
    """A change of one kernel function, where it shows, and what the emulator says of it."""

    bug: str
    where: str
    old: str
    new: str
    says: str
    cell: tuple[int, str, str]  # head_dim, feature, pass
    config: dict[str, Any] | None = None


F128, F256 = (128, "causal", FORWARD), (256, "rest", FORWARD)
B128, D256 = (128, "causal", BACKWARD), (256, "causal", DETERMINISTIC)
B64 = (64, "causal", BACKWARD)
AT_ONCE = {"block_m": 64}  # dQ in the step whose dS it is of
APART = {"block_m": 64, "stages": 3, "lse_first": True, "apart": True}
LATE = {"block_m": 64, "dq_late": True}
FENCED, UNFENCED = "    fence_async_shared()\n    if APART:", "    if APART:"
RELEASE_K = "    bar_arrive(slot + k_free(KV_SLOTS), 128 * (GROUPS + 1))\n"
RELEASE_V = "        bar_arrive(v_slot + v_free(KV_SLOTS), THREADS)\n"
FAULTS = [
    # forward: the consumers
    Fault("K is read before it is there", "forward.first_tile", "mbarrier.wait(k_full.index(slot), phase)", "pass",
          r"race: .*k_s", F128),
    Fault("V is read before it is there", "forward.next_tile", "mbarrier.wait(v_full.index(v_slot), v_phase)", "pass",
          r"race: .*v_s", F128),
    Fault("Q is read before it is there", "forward.consumer",
          "mbarrier.wait(q_full.index(slot * GROUPS + CID), (r // SLOTS) & 1)", "pass",
          r"race: .*q_s", F128),
    Fault("K is released while it is read", "forward.first_tile",
          "    s = warpgroup_mma_wait(0, deps=[s_done])  # [64, BN]\n" + RELEASE_K,
          RELEASE_K + "    s = warpgroup_mma_wait(0, deps=[s_done])\n",
          r"a TMA load writes k_s", F128),
    Fault("V is released while it is read", "forward.next_tile",
          "        acc = warpgroup_mma_wait(0, deps=[o_done])  # [64, D]\n" + RELEASE_V,
          RELEASE_V + "        acc = warpgroup_mma_wait(0, deps=[o_done])\n",
          r"a TMA load writes v_s", F128),
    Fault("Q is released while it is read", "forward.consumer", "            acc = gl.zeros(",
          "            bar_arrive(slot + q_free(KV_SLOTS), THREADS)\n            acc = gl.zeros(",
          r"arrives twice|threads arrive|a TMA load writes q_s|race", F128, {"q_columns": 0}),
    Fault("the phase of a ring is the other one", "forward.ring", "(g // SLOTS) & 1", "((g // SLOTS) & 1) ^ 1",
          r"deadlock: .*waits for parity|race", F128),
    Fault("the phase of a ring turns at every tile", "forward.ring", "(g // SLOTS) & 1", "g & 1",
          r"deadlock: .*waits for parity|race", F128),
    Fault("V's slot is released as K's", "forward.next_tile", RELEASE_V,
          "        bar_arrive(v_slot + k_free(KV_SLOTS), THREADS)\n", r"arrives twice|deadlock", F128),
    Fault("all slots of V are released by one barrier", "forward.next_tile", RELEASE_V,
          "        bar_arrive(v_free(KV_SLOTS), THREADS)\n", r"arrives twice|deadlock", F128),
    Fault("V is never released", "forward.next_tile", RELEASE_V, "",
          r"deadlock: producer waits for bar \d+ .*consumer 1 waits for parity", F128),
    Fault("V is released twice", "forward.next_tile", RELEASE_V, RELEASE_V * 2, r"arrives twice", F128),
    Fault("a barrier of fewer threads", "forward.next_tile", RELEASE_V, RELEASE_V.replace("THREADS", "256"),
          r"bar \d+ is used by .* with \d+ threads, by others with", F128),
    Fault("O is used before its product is done", "forward.next_tile", "acc = warpgroup_mma_wait(0, deps=[o_done])",
          "acc = warpgroup_mma_wait(1, deps=[o_done])", r"used before warpgroup_mma_wait", F128),
    Fault("nobody has the first turn", "forward.consumer", "if TURNS and CID == GROUPS - 1:",
          "if TURNS and CID == GROUPS:", r"deadlock: .*consumer 1 waits for bar \d+ .*consumer 2 waits for bar", F128),
    Fault("a tile that is passed over is not released", "forward.skip_tiles",
          "bar_arrive(slot + v_free(KV_SLOTS), THREADS)", "pass", r"deadlock: producer waits for bar",
          (64, "causal", FORWARD), {"block_n": 64}),
    Fault("O is staged without a fence", "forward.store_tile", "fence_async_shared()", "pass",
          r"no fence: consumer \d reads o_s", F128),
    Fault("O is staged while the tile before leaves", "forward.store_tile", "    tma_store_wait(0)", "    pass",
          r"consumer \d writes o_s.*while a TMA store of consumer \d reads it", F128),
    Fault("the block ends before O has left", "forward.consumer",
          "        row = row_next\n    tma_store_wait(0)", "        row = row_next",
          r"consumer \d ends with a TMA store in flight", F128),
    Fault("Q's buffer is released before O has left it", "forward.consumer",
          "                tma_store_wait(0)\n                bar_arrive", "                bar_arrive",
          r"a TMA load writes q_s.*while a TMA store of consumer \d reads it", F256),
    Fault("V is released while it is read, one product after the other", "forward.next_tile",
          "acc = warpgroup_mma_wait(1, deps=[o_done])  # [64, D]\n        bar_arrive(v_slot + v_free(KV_SLOTS), THREADS)",
          "bar_arrive(v_slot + v_free(KV_SLOTS), THREADS)\n        acc = warpgroup_mma_wait(1, deps=[o_done])",
          r"a TMA load writes v_s", F128, {"overlap": False}),
    Fault("half of Q's columns are used twice", "forward.issue_scores",
          "q_tile.slice(Q_COLUMNS, rest, 1)", "q_tile.slice(0, rest, 1)", r"T1|T2|T3", F256, {"q_columns": 128}),
    Fault("a sum is rescaled, O is not", "forward.rescaled", "return gl.inline_asm_elementwise(",
          "return acc\n    gl.inline_asm_elementwise(", r"T1|T2|T3", (128, "grows", FORWARD)),
    Fault("a maximum that has grown is forgotten", "forward.raised", "s_max > m_i + 8.0", "s_max > m_i + 800.0",
          r"T1|T2|T3|nan|inf", (128, "grows", FORWARD)),
    # forward: the producer
    Fault("K is loaded before its slot is free", "forward.producer",
          "bar_sync(slot + k_free(KV_SLOTS), THREADS)", "pass", r"a TMA load writes k_s|arrives twice", F128),
    Fault("Q is loaded before its buffer is free", "forward.load_q", "if r >= SLOTS:", "if r > SLOTS:",
          r"a TMA load writes q_s|race: a TMA load writes q_s", F128, {"q_columns": 0}),
    Fault("half of V's bytes are expected", "forward.producer",
          "mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)",
          "mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes // 2)", r"deadlock|race", F128),
    Fault("the groups share one buffer of Q", "forward.load_q", "q_s.index(slot * GROUPS + c)", "q_s.index(slot * GROUPS)",
          r"race|T1|nan", F128),
    # backward: fused
    Fault("dS is overwritten while dQ is computed of it", "backward.fused_step", "c = i % 2", "c = i % 1",
          r"race: fused_consumer \d (reads|writes) ds_ring|writes ds_ring.*while a wgmma", B128, AT_ONCE),
    Fault("the other consumer's dS is not waited for", "backward.fused_step", "consumers_sync(DS_READY)", "pass",
          r"race: fused_consumer \d (reads|writes) ds_ring|writes ds_ring.* while a wgmma", B128, AT_ONCE),
    Fault("dS is stored without a fence", "backward.fused_step", FENCED, UNFENCED,
          r"no fence: fused_consumer \d reads ds_ring", B128, AT_ONCE),
    Fault("the statistics' bytes are not expected", "backward.load_queries",
          "q_desc.block_type.nbytes + stats_desc.block_type.nbytes", "q_desc.block_type.nbytes",
          r"deadlock|race: fused_consumer", B128),
    Fault("dO is read before it is there", "backward.fused_step",
          "mbarrier.wait(do_full.index(b), (i // STAGES) & 1)", "pass", r"race: .*do_ring", B64),
    Fault("dK is staged over a K that the other consumer reads", "backward.fused_consumer",
          "consumers_sync(DONE)", "pass", r"writes k_tile.*while a wgmma|race: .* k_tile", B128, AT_ONCE),
    Fault("dK leaves without a fence", "backward.fused_consumer",
          "        fence_async_shared()\n        group_barrier()\n        mbarrier.arrive(finished", "        group_barrier()\n        mbarrier.arrive(finished",
          r"no fence: fused_\w+( \d)? reads [kv]_tile", B128),
    Fault("another head's dQ is added to", "backward.fused_consumer", "base += walk[2] + opaque_zero() - n", "pass",
          r"T1|T2|T3", (64, "groups", BACKWARD), LATE),
    Fault("the second half of the keys is masked like the first", "backward.own_steps", "CID * 64)", "0)", r"T1|T2|T3", B128),
    Fault("a step more is left out than nobody sees", "backward.own_steps", "gl.minimum(own_lo - lo, n)",
          "gl.minimum(own_lo - lo + 1, n)", r"T1|T2|T3", (128, "groups", BACKWARD)),
    Fault("heads take turns, but not where they are masked", "backward.fused_walk", "(i - first) // turns", "(i - first)",
          r"T1|T2|T3", (64, "groups", BACKWARD)),
    Fault("a step left out does not wait for Q", "backward.blind_start", "mbarrier.wait(q_full", "(q_full",
          r"race: .*q_ring", (128, "groups", BACKWARD)),
    # backward: from one key tile to the next
    Fault("K is loaded over a dK that has not left", "backward.load_ahead", "tma_store_wait(0)  # dK", "pass  # dK",
          r"a TMA load writes [kv]_tile.*while a TMA store", B64, APART),
    Fault("K is loaded a tile too early", "backward.fused_producer", "limit = gl.minimum(r + SLOTS, count)",
          "limit = gl.minimum(r + SLOTS + 1, count)", r"a TMA load writes k_tile|race|deadlock", (64, "more-keys", BACKWARD), APART),
    Fault("the product that nobody looks at reads a Q that is being loaded", "backward.fused_consumer",
          "gl.where((r + 1 < count) & (next_walk[1] > 0), 1, 0)", "0", r"q_ring|stats_ring", B64, APART),
    Fault("dK and dV leave before they are there", "backward.fused_producer",
          "mbarrier.wait(finished.index(r % 2), (r // 2) & 1)", "pass", r"reads [kv]_tile|writes [kv]_tile|race", B64, APART),
    Fault("who has finished says so at the other tile's barrier", "backward.fused_consumer",
          "mbarrier.arrive(finished.index(r % 2))", "mbarrier.arrive(finished.index(0))", r"deadlock|arrival too many|race", B64, APART),
    Fault("the phase of K and V does not turn", "backward.fused_consumer", "(r // SLOTS) & 1)", "0)",
          r"race|deadlock|T1|T2|T3", B64, APART),
    # backward: fused, dQ by a group of its own
    Fault("dS is overwritten while the group computes dQ of it", "backward.fused_step",
          "mbarrier.wait(ds_free.index(c), ((i // 2) & 1) ^ 1)", "pass",
          r"arrives twice|writes ds_ring.*while a wgmma|race", B64, APART),
    Fault("the group frees dS before dQ is done", "backward.dq_group",
          "                dq = warpgroup_mma_wait(0, deps=[token])\n                if part == PARTS - 1:\n"
          "                    mbarrier.arrive(ds_free.index(c))\n",
          "                if part == PARTS - 1:\n                    mbarrier.arrive(ds_free.index(c))\n"
          "                dq = warpgroup_mma_wait(0, deps=[token])\n",
          r"writes ds_ring.*while a wgmma|race: fused_consumer \d writes ds_ring", B64, APART),
    Fault("the group does not wait for the second half of dS", "backward.dq_group",
          "            pair_sync(HANDED + 2 * c + 1)\n", "", r"race: dq_group reads ds_ring|deadlock|arrives twice|race", B64, APART),
    Fault("dS is handed to the group without a fence", "backward.fused_step", FENCED, UNFENCED,
          r"no fence: dq_group reads ds_ring", B64, APART),
    Fault("the group reads K when dK is in its place", "backward.fused_consumer", "everyone_sync(DONE)", "pass",
          r"writes k_tile.*while a wgmma|race: .* k_tile|deadlock", B64, APART),
    Fault("the next scores begin before their Q is there", "backward.issue_scores",
          "mbarrier.wait(q_full.index(b), (i // STAGES) & 1, pred=i < end)", "pass", r"race: .*(q_ring|stats_ring)|a TMA load writes q_ring", B64, APART),
    # backward: fused, dQ a step late
    Fault("the other's dS is read before it is there", "backward.late_step", "pair_sync(HANDED + 2 * c + 1 - CID)",
          "pass", r"race: fused_consumer \d (reads|writes) ds_ring|writes ds_ring|arrives twice|deadlock", B128, LATE),
    Fault("dS is handed over without a fence", "backward.hand_over", "    fence_async_shared()\n", "",
          r"no fence: fused_consumer \d reads ds_ring", B128, LATE),
    Fault("dS has one slot", "backward.hand_over", "ds_ring.index(i & 1)", "ds_ring.index(0)",
          r"race: fused_consumer \d (reads|writes) ds_ring|writes ds_ring.*while a wgmma", B128, LATE),
    Fault("Q is loaded while dK is computed of it", "backward.fused_producer",
          "everyone_sync(FREE + i % STAGES)", "pass", r"a TMA load writes (q|do|stats)_ring|arriv|race", B128, LATE),
    Fault("Q is free before dK is done", "backward.late_step",
          "    dk = warpgroup_mma_wait(1, deps=[dk_token])\n    everyone_arrive(FREE + ((i - 1) & (STAGES - 1)))\n",
          "    everyone_arrive(FREE + ((i - 1) & (STAGES - 1)))\n    dk = warpgroup_mma_wait(1, deps=[dk_token])\n",
          r"a TMA load writes (q|do|stats)_ring", B128, LATE),
    Fault("one barrier frees all stages", "backward.fused_producer", "everyone_sync(FREE + i % STAGES)",
          "everyone_sync(FREE)", r"deadlock|arrives twice", B128, LATE),
    Fault("dO of a late step is read before it is there", "backward.late_step",
          "mbarrier.wait(do_full.index(b), (i // STAGES) & 1)", "pass", r"race: .*do_ring", B128, LATE),
    Fault("dQ goes to the next tile", "backward.late_walk", "base + i - 1", "base + i", r"T1|T2|T3", B128, LATE),
    Fault("a half of dQ is added where the other one belongs", "backward.add_half", " + h * (n // 4)", "",
          r"T1|T2|T3", (128, "full", BACKWARD), LATE),
    Fault("the last dQ is forgotten", "backward.late_end", "add_dq(sums, index, CID, dq, factor, SHAPE, FIXED)", "pass",
          r"T1|T2|T3", B128, LATE),
    Fault("a head's first step comes twice", "backward.fused_consumer", "CID, g, 1, base, before", "CID, g, 0, base, before",
          r"T1|T2|T3|arrives twice|deadlock|arrival|asked for|race", B128, LATE),
    Fault("the last head's step is forgotten", "backward.late_walk", "before if GROUPED else base + i - 1", "base + i - 1",
          r"T1|T2|T3", (128, "groups", BACKWARD), LATE),
    # backward: fused, dQ in fixed point
    Fault("rows are scaled beyond their bound", "backward.gluon_row_statistics", "bits = 29.0", "bits = 60.0",
          r"times what its row's bound allows", (64, "full", DETERMINISTIC)),
    Fault("another row's factor", "backward.rows_factor", "row = index * BM", "row = index * BM + 1",
          r"T1|T2|T3|bound allows", (64, "full", DETERMINISTIC)),
    Fault("the halves of an integer are confused", "backward.gluon_round_dq", "tl.join(low, high)", "tl.join(high, low)",
          r"T1|T2|T3", (128, "full", DETERMINISTIC)),
    # backward: two kernels
    Fault("V is released while dP is computed of it", "backward.q_step", "dp = warpgroup_mma_wait(0, deps=[dp_token])",
          "dp = warpgroup_mma_wait(1, deps=[dp_token])", r"used before warpgroup_mma_wait", D256),
    Fault("the next K is read before it is there", "backward.q_step",
          "mbarrier.wait(k_full.index(b2), ((i + 1) // K_STAGES) & 1, pred=i + 1 < n)", "pass",
          r"race: .*k_ring", D256),
    Fault("K is released while dQ is computed of it", "backward.q_step",
          "    dq = warpgroup_mma_wait(1, deps=[dq_token])\n    if i + K_STAGES < n:\n        everyone_arrive(FREE + b)",
          "    if i + K_STAGES < n:\n        everyone_arrive(FREE + b)\n    dq = warpgroup_mma_wait(1, deps=[dq_token])",
          r"a TMA load writes k_ring", D256),
    Fault("an mbarrier counts one arrival too few", "backward.gluon_gradients_kv",
          "mbarrier.init(q_free.index(j), count=2)", "mbarrier.init(q_free.index(j), count=1)",
          r"an arrival too many|a TMA load writes q_ring|race|deadlock", D256),
    Fault("an mbarrier counts one arrival too many", "backward.gluon_gradients_kv",
          "mbarrier.init(do_free.index(j), count=2)", "mbarrier.init(do_free.index(j), count=3)",
          r"deadlock: wide_producer waits for parity", D256),
    Fault("P's buffer is waited for in the wrong phase", "backward.wide_v_step",
          "((i // P_STAGES) & 1) ^ 1", "(i // P_STAGES) & 1", r"deadlock", D256),
    Fault("P is read before it is there", "backward.wide_k_consumer",
          "mbarrier.wait(p_full.index(c), (i // P_STAGES) & 1)", "pass", r"race: wide_k_consumer reads p_ring|race: wide_v_consumer writes p_ring", D256),
    Fault("dO is released while dV is computed of it", "backward.wide_v_step",
          "    dv = warpgroup_mma_wait(1, deps=[dv_token])\n    mbarrier.arrive(do_free.index(b))",
          "    mbarrier.arrive(do_free.index(b))\n    dv = warpgroup_mma_wait(1, deps=[dv_token])",
          r"a TMA load writes do_ring", D256),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.bug)
def test_a_planted_fault_is_found(fault):
    head_dim, feature, pass_ = fault.cell
    problem, how = problem_of(head_dim, "bf16", feature), FEATURES[feature][1]
    config = None
    if pass_ == FORWARD:
        config = shipped(problem)[0].replace(**fault.config or {})
    elif fault.config:
        config = Fused(**fault.config)
    run(problem, pass_, 0, config, **how)  # without the fault it is right
    said = []
    for seed in range(8):  # a few show in some schedules only
        try:
            run(problem, pass_, seed, config, {fault.where: (fault.old, fault.new)}, **how)
        except (Hazard, AssertionError) as error:
            said.append(str(error))
            break
    assert said, "not found"
    assert re.search(fault.says, said[0]), said[0]
