"""Peaks belong to a class; no time may beat them."""

import time

import pytest
import torch

from flash2.core import environment
from flash2.core.peaks import floor_ms, peak


def test_a_class_of_k_products_has_a_kth_of_the_peak():
    h200 = "NVIDIA H200"
    for precision, base, products in (("bf16x6", "bf16", 6), ("bf16x3", "bf16", 3), ("tf32x3", "tf32", 3)):
        assert products * peak(h200, precision, {}).tflops == pytest.approx(peak(h200, base, {}).tflops)
    assert peak(h200, "ieee", {}).tflops < peak(h200, "tf32", {}).tflops / 7


def test_an_unknown_device_is_held_against_what_was_measured():
    assert peak("Some CPU", "ieee", {"ieee": 0.2}).source == "measured"
    assert peak("Some CPU", "bf16", {"ieee": 0.2}) is None
    assert floor_ms("Some CPU", "bf16", 10**12, 0, {"ieee": 0.2}) == 0


@pytest.mark.parametrize("faster", [torch.Tensor, type(torch.ones(1).numpy())])
def test_a_cpus_peak_is_its_better_blas(monkeypatch, faster):
    class Timer:
        """1 ms for a matmul of the faster library, 2 ms for the other's."""

        def burst(self, call, count):
            return [1.0 if isinstance(call(), faster) else 2.0] * count

    monkeypatch.setattr(environment, "timer_for", lambda device: Timer())
    assert environment.measured_ceilings(torch.device("cpu")) == {"ieee": pytest.approx(2 * 2048**3 / 1e9)}


def test_a_rate_counts_calls_that_the_device_ended():
    queued, ended = [], []

    def synchronize():
        time.sleep(0.002 * len(queued))  # a device that needs 2 ms a call
        ended.extend(queued)
        queued.clear()

    rate = environment.calls_a_second(lambda: queued.append(1), synchronize, 0.1)
    assert not queued and ended
    assert 250 < rate <= 500


@pytest.mark.parametrize(
    ("flops", "moved", "ms"), [(989.4e12, 0, 1000), (0, 4800 * 10**9 + (64 << 20), 1000), (1e9, 1e6, 1e-3)]
)
def test_the_floor_is_the_larger_of_work_and_traffic(flops, moved, ms):
    assert floor_ms("NVIDIA H200", "bf16", int(flops), int(moved), {}) == pytest.approx(ms, rel=0.02)
