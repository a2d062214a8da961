"""What is measured of a process: its memory."""

import torch

from flash2.core.environment import PeakMemory


def test_peak_memory_in_a_process_that_has_not_used_the_device(monkeypatch):
    """The first thing a training worker does; torch answers "Invalid device argument" before CUDA is initialised."""
    ready = []

    def reset(device):
        if not ready:
            raise RuntimeError("Invalid device argument")

    monkeypatch.setattr(torch.cuda, "init", lambda: ready.append(True))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 130)
    assert PeakMemory(torch.device("cuda", 0)).bytes() == 30


def test_peak_memory_of_the_cpu_grows_with_what_is_touched():
    memory = PeakMemory(torch.device("cpu"))
    x = torch.ones(1 << 24)  # 64 MiB
    grown = memory.bytes()
    assert grown is None or grown >= 0.9 * x.nbytes
