"""Options of the whole suite: which device the contract is tested on, and which backends."""

import dataclasses
import logging
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Triton 3.9 warns where it is left open whether a * b + c may be one instruction; up to there it may.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# A fixed choice of examples, so that a failure in CI is the failure at home; the first call of a kernel may compile.
settings.register_profile(
    "flash2",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("flash2")


def pytest_addoption(parser):
    group = parser.getgroup("flash2")
    group.addoption("--device", default="cpu", help="device of the contract suite: cpu (default), cuda, cuda:1")
    group.addoption("--backends", default="", help="run the contract suite on these alone: names or file.py:Class, ...")
    group.addoption(
        "--every-shape",
        action="store_true",
        help="also try every shape on backends that compile each one for seconds",
    )
    group.addoption(
        "--every-kernel",
        action="store_true",
        help="compile every shipped kernel for every architecture, not a choice of them",
    )


def pytest_configure(config):
    # torch 2.13's compiler warns about itself when it is first imported.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
    # A backward thread without a context yet: torch 2.11 sets it up, and says so.
    config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS, but there was no current CUDA context")
    # Thousands of empty lines under a failed test; pytest 9.2 also listens to loggers that do not propagate.
    logging.getLogger("torch.__trace").addFilter(lambda record: False)
    config.addinivalue_line("markers", "few_shapes: also run on backends that compile every shape for seconds")
    if os.environ.get("TRITON_INTERPRET") == "1":  # its numpy warns where a GPU is silent: nan, inf - inf, old idioms
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
        config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")
        quicken_interpreter()
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":  # its numpy warns where a GPU is silent
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:flash2.backends.numba_cuda_kernels")
        quicken_simulator()


def quicken_simulator():
    """numba's simulator polls the threads of a block without rest, which takes the interpreter from them: let them
    meet at a barrier. If one never comes or raises, the barrier breaks and all of them end."""
    from numba.cuda.simulator import kernel

    def run(block, grid_point, *args):
        points = list(np.ndindex(*block._block_dim))
        barrier = threading.Barrier(len(points), timeout=10)

        def body():
            try:
                block._f(*args)
            except BaseException:
                barrier.abort()
                raise

        threads = [kernel.BlockThread(body, block, grid_point, point, block._debug) for point in points]
        for thread in threads:
            thread.syncthreads = barrier.wait
            thread.start()
        for thread in threads:
            thread.join()
        raised = [thread.exception for thread in threads if thread.exception]
        raised.sort(key=lambda pair: isinstance(pair[0], threading.BrokenBarrierError))  # the cause comes first
        if raised:
            raise raised[0][0].with_traceback(raised[0][1])

    kernel.BlockManager.run = run


def quicken_interpreter():
    """Triton's interpreter replaces the functions of triton.language when a kernel starts, and again in every helper
    that the kernel calls; once, in both of the language's modules, is enough. Its check of every integer sum for
    overflow is for lengths that nobody interprets. The two are more than half of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, everywhere = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda function: patch(everywhere)
    interpreter.InterpretedFunction.__call__ = lambda helper, *args, **kwargs: helper.rewrite()(*args, **kwargs)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


@pytest.fixture
def one_thread():
    """Torch on one thread: tensors of a few thousand elements only wait for a second, for long if the cores are busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
