"""What the contract cannot see of torch's kernels: that the pinned one ran, and that flex was compiled."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from flash2 import attention, get_backend
from flash2.backends.sdpa import SDPBackend, _known_faults, boolean_mask, dense, plan
from flash2.core.problem import Problem, visible_band

ends = st.one_of(st.none(), st.integers(0, 12))


@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.one_of(st.none(), st.tuples(ends, ends)))
def test_sdpa_is_told_the_same_mask(seq_q, seq_kv, causal, window):
    """Each form of `plan` sees exactly the pairs of the band, counted one by one."""
    band = left, right = visible_band(causal, window)
    i = torch.arange(seq_q)[:, None] + seq_kv - seq_q
    far = torch.arange(seq_kv)[None, :] - i
    want = torch.ones(seq_q, seq_kv, dtype=torch.bool)
    want &= far >= -left if left is not None else True
    want &= far <= right if right is not None else True

    empty, form = plan(band, seq_q, seq_kv)
    rest = torch.empty(1, 1, seq_q - empty, 1)
    k = torch.empty(1, 1, seq_kv, 1)
    told = torch.ones(seq_q - empty, seq_kv, dtype=torch.bool)
    if form == "square":
        assert seq_q - empty == seq_kv
        told = told.tril()  # top left
    elif form == "lower-right":
        told = told.tril(seq_kv - (seq_q - empty))
    elif form == "mask":
        told = boolean_mask(band, rest, k)
    assert torch.equal(want[empty:], told)
    assert not want[:empty].any()
    assert told.any(-1).all(), "a row without keys is left to the kernel"


def kernels_of(name: str, **options) -> list[str]:
    """torch's operators in one call and its backward on the CPU."""
    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:  # torch 2.11 warns without
        attention(q, k, v, backend=name, **options).sum().backward()
    return [event.name for event in record.events()]


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (3, 1)}], ids=str)
def test_the_pinned_kernel_runs(options):
    flash, math = kernels_of("sdpa-flash", **options), kernels_of("sdpa-math", **options)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in flash
    assert "aten::_scaled_dot_product_attention_math" not in flash
    assert "aten::_scaled_dot_product_attention_math" in math
    assert not any("flash" in name for name in math)
    own = re.compile(get_backend("sdpa-flash").capability_on(torch.device("cpu")).kernels, re.IGNORECASE)
    heavy = [name for name in flash if re.search("attention|flash|gemm|mm$", name, re.IGNORECASE)]
    assert heavy
    assert all(own.search(name) for name in heavy)
    assert not own.search("aten::_scaled_dot_product_attention_math")


def test_a_pin_leaves_the_users_settings_alone():
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    x = torch.randn(1, 1, 4, 8)
    attention(x, x, x, backend="sdpa-math")
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()) == before


LARGE = {"batch": 4096, "heads_q": 64, "seq_q": 64, "head_dim": 128}  # 2^31 elements


@pytest.mark.parametrize(
    ("kernel", "fields", "said"),
    [
        (None, {"scale": 0.0}, "scale <= 0"),
        (SDPBackend.FLASH_ATTENTION, {"batch": 40_000, "heads_q": 2}, "batch * heads 80000"),
        (SDPBackend.CUDNN_ATTENTION, {**LARGE, "pass_": "bwd"}, "backward of 2147483648 elements"),
        (None, {**LARGE, "heads_q": 1, "seq_q": 1, "seq_kv": 4096, "pass_": "bwd"}, "backward of 2147483648 elements"),
        (None, {**LARGE, "pass_": "fwd"}, None),
        (None, {**LARGE, "batch": 4095, "pass_": "bwd"}, None),
        (SDPBackend.MATH, {**LARGE, "pass_": "bwd", "scale": -1.0}, None),
    ],
    ids=str,
)
def test_what_torchs_kernels_get_wrong_is_refused(kernel, fields, said):
    reasons = _known_faults(Problem(**{"seq_q": 64, "head_dim": 64, "dtype": "bf16", **fields}), kernel)
    assert [said in reason for reason in reasons] == ([True] if said else [])


def test_a_kernel_torch_refuses_at_run_time_is_refused_in_words(monkeypatch):
    """Where the forecast was wrong the error says so, and no other kernel takes its place."""
    backend = get_backend("sdpa-flash")
    monkeypatch.setattr("flash2.backends.sdpa.dense", lambda x: x)
    x = torch.randn(1, 1, 4, 16)[..., ::2]  # torch's flash kernel wants a last stride of 1
    with pytest.raises(NotImplementedError, match="'sdpa-flash': torch will not run its kernel here"):
        attention(x, x, x, backend=backend)


def test_dense_copies_only_what_it_must():
    x = torch.randn(2, 3, 4, 8)
    assert dense(x) is x
    assert dense(x.transpose(1, 2)).data_ptr() == x.data_ptr()
    assert dense(x[..., ::2]).is_contiguous()


@pytest.fixture
def flex():
    backend = type(get_backend("flex"))()  # its own compiled kernels
    if (reason := backend.unavailable()) is not None:
        pytest.skip(reason)
    return backend


def test_flex_refuses_to_run_eagerly(flex):
    """Switched off, torch.compile hands back the function itself, which would materialise every score."""
    x = torch.randn(1, 1, 5, 8)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="about to run eagerly"):
        attention(x, x, x, backend=flex)


def test_flex_does_not_meet_the_recompile_limit(flex):
    """More shapes than the limit: each is compiled, under a limit of one recompilation."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for seq in (5, 6):
            x = torch.randn(1, 1, seq, 8)
            want = attention(x, x, x, backend="naive")
            assert torch.allclose(attention(x, x, x, backend=flex), want, atol=1e-5)
    assert len(flex._compiled) == 2


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"PATH": "/nowhere"}, "install g++"),
        ({"TORCHDYNAMO_DISABLE": "1"}, "unset it"),
        ({"TORCH_COMPILE_DISABLE": "1"}, "unset it"),
    ],
    ids=str,
)
def test_flex_says_what_it_lacks(monkeypatch, environment, says):
    monkeypatch.delenv("CXX", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert says in get_backend("flex").unavailable()


def test_flex_needs_pythons_headers(monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": "/nowhere"})
    if "g++" in (reason := get_backend("flex").unavailable()):
        pytest.skip(reason)
    assert "python3-dev" in reason
