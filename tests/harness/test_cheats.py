"""Every dishonest backend is rejected by the real harness, in a real worker; the honest one is believed."""

from pathlib import Path

import cheats
import pytest

from flash2.core.problem import Problem
from flash2.core.sweep import Sweep

FILE = Path(cheats.__file__)


@pytest.fixture(scope="module")
def sweep(request):
    device = request.config.getoption("--device")
    sweep = Sweep(resolve="flash2.backends:get_backend", device=device, timeout=120, seconds=0.05)
    sweep.hello([])
    yield sweep
    sweep.close()


def measure(sweep, name, dtype="fp32"):
    problem = Problem(batch=2, heads_q=3, seq_q=200, head_dim=32, dtype=dtype, causal=True)
    (result,) = sweep.run_group(problem, [(f"{FILE}:{name}", problem.precision)], baseline="none")
    return result


@pytest.mark.parametrize("name", cheats.CHEATS)
def test_a_cheat_is_rejected(sweep, name):
    result = measure(sweep, name, "fp16" if name == "EightBitProbabilities" else "fp32")
    assert result.status in ("wrong", "error") and result.tflops is None, cheats.CHEATS[name].__doc__
    assert result.reason


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_honest_backend_is_believed(sweep, dtype):
    result = measure(sweep, "Honest", dtype)
    assert result.status == "ok", result.reason


def test_a_replaced_clock_measures_nothing_else(sweep):
    honest, thief = measure(sweep, "Honest"), measure(sweep, "StopsTheClock")
    assert thief.status != "ok" or 0.1 < thief.ms.median / honest.ms.median < 10
    sweep.close()  # that worker's clocks are not to be trusted


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ZeroesInputs", "input"),
        ("MutatesInputs", "input"),
        ("FallsBack", "not its own kernel"),
        ("CachesByPointer", "timed calls"),
        ("OnlyInWarmUp", "timed calls"),
    ],
)
def test_the_reason_names_the_deed(sweep, name, says):
    assert says in measure(sweep, name).reason
