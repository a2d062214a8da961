"""The timer against work of known cost."""

import statistics
import time

import pytest
import torch

from flash2.core import timing
from flash2.core.environment import measured_ceilings


def test_cpu_timer_measures_a_sleep():
    samples = timing.CpuTimer().burst(lambda: time.sleep(0.02), 3)
    assert all(20 <= ms < 30 for ms in samples)


def test_rounds_take_turns_and_prepare_each_burst():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    before, after = [], []
    samples = timing.time_interleaved(
        calls, timing.CpuTimer(), seconds=0.1,
        before_burst=lambda name, number: before.append((name, number)), after_burst=after.append,
    )  # fmt: skip
    rounds = len(samples["a"].rounds)
    assert rounds >= timing.ROUNDS[0]
    assert before == [("a", 0), ("b", 0)] + [(name, n) for n in range(1, rounds + 1) for name in "ab"]
    assert after == ["a", "b"] * rounds
    assert all(len(samples[name].rounds) == rounds for name in "ab")
    assert "aba" not in "".join(order)  # bursts: each call several times before the next has its turn


def test_a_very_slow_call_is_left_at_three_rounds():
    samples = timing.time_interleaved({"slow": lambda: time.sleep(0.1)}, timing.CpuTimer(), seconds=0.02)
    assert len(samples["slow"].rounds) == 3


@pytest.mark.parametrize(("medians", "settled"), [([1.0] * 7, True), ([1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.0], False)])
def test_settled_means_the_median_is_known(medians, settled):
    assert timing.settled(timing.Samples([[m] for m in medians])) is settled


def test_a_call_that_is_slower_is_measured_slower():
    calls = {"one": lambda: time.sleep(0.005), "four": lambda: time.sleep(0.02)}
    samples = timing.time_interleaved(calls, timing.CpuTimer(), seconds=0.1)
    ratio = statistics.median(samples["four"].medians()) / statistics.median(samples["one"].medians())
    assert 3.5 < ratio < 4.2


def test_ceilings_are_plausible():
    assert 0.001 < measured_ceilings(torch.device("cpu"))["ieee"] < 100


@pytest.fixture
def cuda(request):
    if not request.config.getoption("--device").startswith("cuda"):
        pytest.skip("needs a GPU (--device cuda)")
    return torch.device("cuda", torch.cuda.current_device())


def test_agrees_with_do_bench_on_a_long_kernel(cuda):
    from triton.testing import do_bench

    a = torch.randn(8192, 8192, device=cuda, dtype=torch.bfloat16)
    timer = timing.CudaTimer(cuda)
    ratios = []
    for _ in range(5):  # in turn, so that the clock's drift hits both; a rest, so that neither meets the power cap
        time.sleep(0.3)
        ours = statistics.median(timer.burst(lambda: a @ a, 20))
        time.sleep(0.3)
        ratios.append(ours / do_bench(lambda: a @ a, warmup=5, rep=40, return_mode="median"))
    assert abs(statistics.median(ratios) - 1) < 0.02, ratios


def test_times_a_copy_within_3_percent_of_its_bandwidth(cuda):
    timer = timing.CudaTimer(cuda)
    one, two = (torch.randn(1 << 28, device=cuda) for _ in range(2))  # 1 GiB, 2 GiB moved a copy
    short = statistics.median(timer.burst(lambda: two[: 1 << 27].copy_(one[: 1 << 27]), 20))
    long = statistics.median(timer.burst(lambda: two.copy_(one), 20))
    marginal = (2 * (1 << 27) * 4) / (long - short) * 1e3  # bytes/s without what every launch costs
    assert abs(2 * one.numel() * 4 / long * 1e3 / marginal - 1) < 0.03
    assert marginal < 4.8e12  # no faster than the memory


def test_a_kernel_is_timed_on_a_cold_cache(cuda):
    timer = timing.CudaTimer(cuda)
    x = torch.randn(1 << 23, device=cuda)  # 32 MiB fit the L2
    cold = statistics.median(timer.burst(lambda: x.sum(), 20))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # back to back, so that no launch is waited for
        for _ in range(100):
            x.sum()
    assert cold > 1.1 * statistics.median(timer.burst(graph.replay, 5)) / 100


def test_the_host_of_a_call_is_not_timed(cuda, monkeypatch):
    """Half a millisecond of Python before and between two small kernels."""
    timer = timing.CudaTimer(cuda)
    x = torch.randn(1 << 16, device=cuda)

    def quick():
        x.add_(1), x.add_(1)

    def slow():
        for _ in range(2):
            end = time.perf_counter() + 2.5e-4
            while time.perf_counter() < end:
                pass
            x.add_(1)

    quick_ms, slow_ms = (statistics.median(timer.burst(call, 30)) for call in (quick, slow))
    assert slow_ms < 1.3 * quick_ms + 0.002
    monkeypatch.setattr(timing, "_device_sleep", lambda cycles: None)
    assert statistics.median(timer.burst(slow, 30)) > 0.2  # without the lead the device waits inside the span
