"""What the kernels compute where their tiles meet: every feature on lengths of several tiles with a rest, judged.

The interpreter's tiles are 64 queries by 32 keys, and 32 by 64 for dk and dv. The contract suite has the small problems.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import triton.language as tl
from judged import Case

from flash2.backends.triton_fa2 import TritonFA2, launch, prepare
from flash2.backends.triton_fa2.configs import KERNELS, TileConfig
from flash2.core.contract import spec_of
from flash2.core.inputs import make_inputs
from flash2.core.problem import Problem

# (class, problem, how its inputs look), every layout, upstream and distribution somewhere among them.
PROBLEMS = {
    "full": ("ieee", {"seq_q": 100, "seq_kv": 70, "batch": 2}, {"layout": "bshd", "upstream": "transpose"}),
    "full-even": ("fp16", {"seq_q": 128, "seq_kv": 64}, {"upstream": "sum"}),
    "causal": ("bf16", {"seq_q": 100, "batch": 2, "causal": True}, {"layout": "packed", "upstream": "cat"}),
    "causal-more-keys": ("fp16", {"seq_q": 70, "seq_kv": 161, "causal": True}, {"layout": "sliced"}),
    "causal-more-queries": ("ieee", {"seq_q": 161, "seq_kv": 70, "causal": True}, {"layout": "offset"}),
    "causal-no-keys-at-all-but-one": ("bf16", {"seq_q": 140, "seq_kv": 1, "causal": True}, {}),
    "window": ("ieee", {"seq_q": 70, "seq_kv": 100, "window": (20, 9)}, {"layout": "strided"}),
    "window-of-one": ("fp16", {"seq_q": 100, "window": (0, 0)}, {"upstream": "dense"}),
    "window-left": ("bf16", {"seq_q": 100, "seq_kv": 70, "window": (33, None)}, {}),
    "window-right": ("fp16", {"seq_q": 70, "seq_kv": 100, "window": (None, 40)}, {}),
    "window-wider-than-all": ("ieee", {"seq_q": 70, "seq_kv": 100, "window": (500, 500)}, {}),
    "window-far-right": ("ieee", {"seq_q": 10, "seq_kv": 200, "window": (5, 0)}, {"distribution": "needle"}),
    "causal-window": ("ieee", {"seq_q": 100, "seq_kv": 70, "causal": True, "window": (40, 3)}, {}),
    "groups": (
        "fp16",
        {"seq_q": 40, "seq_kv": 70, "heads_q": 6, "causal": True, "batch": 2},
        {"layout": "expanded-batch"},
    ),
    "one-key-head": ("ieee", {"seq_q": 70, "seq_kv": 40, "heads_kv": 1}, {"layout": "expanded-heads"}),
    "softcap": ("ieee", {"seq_q": 70, "seq_kv": 100, "softcap": 2.0}, {"distribution": "x3"}),
    "softcap-causal": ("bf16", {"seq_q": 100, "softcap": 30.0, "causal": True}, {"distribution": "x10"}),
    "alibi": ("ieee", {"seq_q": 70, "seq_kv": 100, "alibi": True}, {}),
    "alibi-causal": ("fp16", {"seq_q": 100, "seq_kv": 70, "alibi": True, "causal": True}, {}),
    "everything": (
        "ieee",
        {"seq_q": 70, "seq_kv": 100, "causal": True, "window": (50, 0), "softcap": 5.0, "alibi": True, "scale": -0.4},
        {"upstream": "cat"},
    ),
    "scale-negative": ("ieee", {"seq_q": 70, "seq_kv": 100, "scale": -0.3}, {"distribution": "half"}),
    "scale-negative-causal": ("bf16", {"seq_q": 100, "scale": -0.3, "causal": True}, {}),
    "scale-zero": ("fp16", {"seq_q": 70, "seq_kv": 100, "scale": 0.0, "causal": True}, {}),
    "scale-subnormal": ("ieee", {"seq_q": 70, "seq_kv": 100, "scale": 1e-40}, {}),
    "logits-far-below-zero": ("ieee", {"seq_q": 70, "seq_kv": 100}, {"distribution": "shifted"}),
    "logits-far-below-zero-causal": ("fp16", {"seq_q": 100, "causal": True}, {"distribution": "shifted"}),
    "logits-extreme": ("ieee", {"seq_q": 70, "seq_kv": 100}, {"distribution": "extreme"}),
    "head-dim-1": ("fp16", {"seq_q": 70, "seq_kv": 33, "head_dim": 1}, {}),
    "head-dim-5": ("ieee", {"seq_q": 70, "seq_kv": 33, "head_dim": 5, "causal": True}, {"layout": "sliced"}),
    "head-dim-40": ("bf16", {"seq_q": 70, "seq_kv": 33, "head_dim": 40}, {"layout": "packed"}),
    "head-dim-45": ("ieee", {"seq_q": 33, "seq_kv": 70, "head_dim": 45, "causal": True}, {}),
    "head-dim-80": ("fp16", {"seq_q": 70, "seq_kv": 33, "head_dim": 80, "causal": True}, {"layout": "sliced"}),
    "head-dim-200": ("ieee", {"seq_q": 33, "seq_kv": 70, "head_dim": 200}, {}),
    "head-dim-256": ("bf16", {"seq_q": 33, "seq_kv": 70, "head_dim": 256, "causal": True}, {}),
    "one-by-one": ("bf16", {"seq_q": 1, "seq_kv": 1}, {}),
    "one-query": ("ieee", {"seq_q": 1, "seq_kv": 161, "causal": True}, {"distribution": "needle"}),
    "one-key": ("fp16", {"seq_q": 161, "seq_kv": 1}, {}),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(case, name):
    precision, fields, how = PROBLEMS[name]
    precise = case(precision)
    precise.judge(precise.problem(**{"heads_q": 2, "heads_kv": 2, "head_dim": 16, **fields}), **how)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_hidden_values_in_tiles_of_their_own_reach_nothing(case, device, bad):
    """Keys from 64 on hold `bad`: tiles that rows below 64 never load, so not one bit of their o and dq changes."""
    if device.type == "cuda":
        pytest.skip("a GPU's tiles may be larger")
    precise = case("ieee")
    problem = precise.problem(seq_q=130, heads_q=2, head_dim=16, causal=True)
    inputs = make_inputs(problem, device=precise.device)
    clean = precise.run(problem, inputs)
    inputs.k[:, :, 64:], inputs.v[:, :, 64:] = bad, bad
    out = precise.run(problem, inputs)
    for name in ("o", "lse", "dq"):
        assert torch.equal(out[name][:, :, :64], clean[name][:, :, :64]), name
        assert not torch.equal(out[name], clean[name]), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_hidden_keys_in_a_shared_tile_reach_no_output(case, bad):
    """Inside a tile the mask replaces the logits of hidden keys, whatever they are (v is multiplied by a weight of 0,
    so the backend does not declare hidden-nan)."""
    precise = case("ieee")
    problem = precise.problem(seq_q=70, heads_q=2, head_dim=16, causal=True, pass_="fwd")
    inputs = make_inputs(problem, device=precise.device)
    clean = precise.run(problem, inputs)
    inputs.k[:, :, 40:] = bad
    out = precise.run(problem, inputs)
    for name in ("o", "lse"):
        assert torch.equal(out[name][:, :, :40], clean[name][:, :, :40]), name


class Pinned(TritonFA2):
    """All kernels in given configurations, and in every class of maths the launcher knows."""

    name = "pinned"

    def __init__(self, **pins: TileConfig):
        self.pins = pins

    def capability_on(self, device):
        return self.capability

    def forward(self, q, k, v, spec):
        return launch.attend(q, k, v, spec, self.pins)

    def backward(self, do, q, k, v, o, lse, spec):
        return launch.differentiate(do, q, k, v, o, lse, spec, self.pins)


SMALL = TileConfig(block_m=32, block_n=16, num_warps=4, num_stages=2)
FLAGS = [field.name for field in dataclasses.fields(TileConfig) if isinstance(field.default, bool)]
BANDS = {
    "full": {"seq_q": 50, "seq_kv": 70, "softcap": 3.0},
    "band": {"seq_q": 70, "seq_kv": 90, "causal": True, "window": (33, 0), "heads_kv": 1},
    "even": {"seq_q": 64, "seq_kv": 64, "causal": True},
}


FLOAT32 = ("prepared", "resident", "mixed")  # with tma
SWITCHES = {  # class -> switches that are on together
    "fp16": [(), *((flag,) for flag in FLAGS if flag not in FLOAT32), tuple(f for f in FLAGS if f not in FLOAT32)],
    "tf32": [("tma", "prepared"), ("tma", "prepared", "split"), tuple(FLAGS)],
    **{
        name: [("tma", "prepared"), *(("tma", "prepared", own, "split") for own in ("resident", "mixed")), tuple(FLAGS)]
        for name in ("bf16x3", "bf16x6")
    },
}


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize(
    ("precision", "on"),
    [pytest.param(name, on, id=f"{name}-{'+'.join(on) or 'none'}") for name, sets in SWITCHES.items() for on in sets],
)
def test_configurations_agree(device, true_bf16, precision, on, band):
    """Every switch of a configuration, alone and all together, computes the same function."""
    if device.type == "cuda":
        pytest.skip("which configurations a GPU takes depends on it; the tuner judges them all")
    config = SMALL.replace(**dict.fromkeys(on, True))
    pinned = Case(Pinned(**dict.fromkeys(KERNELS, config)), precision, device)
    pinned.judge(pinned.problem(**{"heads_q": 2, "heads_kv": 2, "head_dim": 16, **BANDS[band]}))


@pytest.mark.parametrize("pass_", ["fwd", "fwd+bwd"])
def test_rows_in_another_order_than_their_weights_are_caught(device, monkeypatch, pass_):
    if device.type == "cuda":
        pytest.skip("a compiled kernel takes no patch")
    monkeypatch.setattr(prepare, "evens_first", lambda x: x)
    on = SMALL.replace(tma=True, prepared=True)
    pins = {kernel: on if (kernel == "fwd") == (pass_ == "fwd") else SMALL for kernel in KERNELS}
    pinned = Case(Pinned(**pins), "tf32", device)
    with pytest.raises(AssertionError, match="breaks T"):
        pinned.judge(pinned.problem(heads_q=1, head_dim=16, seq_q=64, pass_=pass_))


def test_turned_heads_end_in_zeros(device):
    """Rows 0 2 4 6 1 3 5 7 of every eight, as columns; those past the last one are 0."""
    x = torch.randn(2, 3, 77, 5, device=device)
    q = torch.empty_like(x)
    turned = launch.TurnHeads(
        launch.Maths(q, q, spec_of(Problem(heads_q=3, seq_q=77, head_dim=5, dtype="fp32", precision="tf32"), None))
    )(x)
    rows = torch.nn.functional.pad(x, (0, 0, 0, 3)).unflatten(2, (10, 4, 2)).transpose(3, 4).flatten(2, 4)
    assert torch.equal(turned, rows.mT)


@pytest.fixture
def true_bf16(device, monkeypatch):
    """The interpreter multiplies the bits of bfloat16 numbers: here it is given their values."""
    if device.type == "cuda":
        return
    from triton.runtime import interpreter

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    multiply = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: multiply(self, widened(a), widened(b), *rest),
    )
