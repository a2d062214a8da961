"""Backends that break while they run, each in its own way; the sweep goes on around them."""

import os
import signal
import time

import torch
from cheats import Honest


class Segfault(Honest):
    """Dies as a kernel with a wild pointer does."""

    def forward(self, q, k, v, spec):
        os.kill(os.getpid(), signal.SIGSEGV)


class Exits(Honest):
    """Ends the process from within."""

    def forward(self, q, k, v, spec):
        os._exit(3)


class Hangs(Honest):
    """Never comes back."""

    def forward(self, q, k, v, spec):
        while True:
            time.sleep(1)


class HangsWhenTimed(Honest):
    """Comes back while it is judged, not while it is timed."""

    def __init__(self):
        self.calls = 0

    def forward(self, q, k, v, spec):
        self.calls += 1
        while self.calls > 8:
            time.sleep(1)
        return super().forward(q, k, v, spec)


class RaisesWhenTimed(Honest):
    """Raises only after it was admitted."""

    def __init__(self):
        self.calls = 0

    def forward(self, q, k, v, spec):
        self.calls += 1
        if self.calls > 8:
            raise RuntimeError("out of luck")
        return super().forward(q, k, v, spec)


class OutOfMemory(Honest):
    """Asks for more than any machine has."""

    def forward(self, q, k, v, spec):
        return torch.empty(1 << 48), None


class PredictsOutOfMemory(Honest):
    """Says beforehand that it will not fit."""

    def scratch_bytes(self, problem):
        return 1 << 60


class Raises(Honest):
    """Fails with two lines of text."""

    def forward(self, q, k, v, spec):
        raise RuntimeError("the kernel did not launch\nand more detail")


class Refuses(Honest):
    """Finds out at run time that it cannot."""

    def forward(self, q, k, v, spec):
        raise NotImplementedError("head_dim 32 needs a newer library")


class Missing(Honest):
    """Is not installed."""

    def unavailable(self):
        return "package nothing is not installed: pip install nothing"


class Chatty(Honest):
    """Prints to stdout, where the table goes."""

    def forward(self, q, k, v, spec):
        print("hello from a library")
        os.write(1, b"hello from its C code\n")
        return super().forward(q, k, v, spec)
