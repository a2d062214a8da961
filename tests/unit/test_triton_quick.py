"""The quick launch hands Triton's C launcher what Triton's own Python would; no GPU needed."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.__version__.startswith("3.6."):
    pytest.skip(f"its launcher is that of triton 3.6, this is {triton.__version__}", allow_module_level=True)

from triton.backends.nvidia import driver  # noqa: E402

from flash2.backends.gluon_hopper import launch as gluon  # noqa: E402
from flash2.backends.triton_fa2 import launch  # noqa: E402
from flash2.core import quick  # noqa: E402

GRID, DEVICE, TAIL = (7, 1, 1), 0, (3, 0.5, True, "tf32")
META = {"swizzle": 3, "elem_size": 2, "elem_type": 1, "block_size": [1, 1, 64, 64], "fp4_padded": False}


@pytest.fixture
def encoded(monkeypatch):
    """What Triton encodes as descriptors: (address, shape, strides) a time; and a driver that does no more than that."""
    made = []

    def fill(address, swizzle, elem_size, elem_type, block_size, shape, strides, padding):
        made.append((address, tuple(shape), tuple(strides)))
        return "map", made[-1]

    active = SimpleNamespace(
        utils=SimpleNamespace(fill_tma_descriptor=fill),
        get_current_device=lambda: DEVICE,
        get_current_stream=lambda device: 1234 + device,
    )
    monkeypatch.setattr(type(triton.runtime.driver), "active", property(lambda self: active))
    return made


def collect(got: list, *arguments) -> None:
    """The C launcher."""
    got.append(arguments)


def compiled_for(shells: tuple, got: list):
    """A CompiledKernel whose C launcher appends its arguments to `got`."""
    signature = {n: "*bf16" if shell is None else "tensordesc<bf16[1, 1, 64, 64]>" for n, shell in enumerate(shells)}
    metas = [META for shell in shells if shell is not None]
    launcher = object.__new__(driver.CudaLauncher)
    launcher.num_ctas, launcher.launch_cooperative_grid, launcher.launch_pdl = 1, False, False
    launcher.global_scratch_size = launcher.profile_scratch_size = 0
    launcher.global_scratch_align = launcher.profile_scratch_align = 1
    launcher.launch = driver.wrap_handle_tensordesc(partial(collect, got), signature, metas)
    kernel = object.__new__(triton.compiler.CompiledKernel)
    kernel.name, kernel.src, kernel.module, kernel._run, kernel.function = "kernel", None, 1, launcher, 99
    kernel.packed_metadata, kernel.metadata = (4, 1, 1000), SimpleNamespace(tensordesc_meta=metas)
    return kernel


@pytest.fixture(params=[True, False], ids=["descriptors", "pointers"])
def both(request, encoded):
    """(quick launch, Triton's, what the C launcher got, tensors maker)."""

    def tensors():
        return torch.zeros(2, 4, 256, 64, dtype=torch.bfloat16), torch.zeros(2, 4, 256), None

    x, *_ = tensors()
    shells = (quick.hollow(launch.descriptor(x, (1, 1, 64, 64))), None, None) if request.param else (None, None, None)
    got: list = []
    kernel = compiled_for(shells, got)
    ours = quick.runner(kernel, GRID, DEVICE, shells if request.param else (), launch.moved, TAIL)

    def theirs(some: tuple) -> None:
        described = (launch.moved(shell, x) if shell else x for shell, x in zip(shells, some, strict=True))
        kernel[GRID](*described, *TAIL)

    return ours, theirs, got, tensors


def plain(arguments: tuple) -> list:
    """Tensors as their addresses; without the hooks and the metadata for them, which do nothing when there are none."""
    head, hooks, rest = arguments[:10], arguments[10:13], arguments[13:]
    assert all(hook is None or not getattr(hook, "calls", ()) for hook in hooks)
    return [*head, *(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in rest)]


def test_the_same_arguments(both):
    ours, theirs, got, tensors = both
    for _ in range(3):
        some = tensors()
        ours(some)
        theirs(some)
        mine, reference = got[-2:]
        assert plain(mine) == plain(reference)


def test_an_address_is_encoded_once_and_a_new_one_anew(both, encoded):
    ours, _, got, tensors = both
    first, second = tensors(), tensors()
    ours(first)
    many = len(encoded)
    ours(first)
    assert len(encoded) == many
    ours(second)
    assert len(encoded) == 2 * many
    assert plain(got[0]) == plain(got[1]) != plain(got[2])


def test_descriptors_are_not_kept_for_ever(both, encoded):
    ours, _, _, tensors = both
    some = [tensors() for _ in range(2 * quick.KEPT)]
    for arguments in some:
        ours(arguments)
    kept = [c.cell_contents for c in ours.__closure__ if isinstance(c.cell_contents, tuple)]
    encoders = [e for part in kept for e in part if isinstance(e, quick.Encoded)]
    assert bool(encoders) == bool(encoded)
    assert all(len(e.kept) <= quick.KEPT for e in encoders)


def test_a_profilers_hooks_are_called(both, monkeypatch):
    ours, _, got, tensors = both
    hook = type(triton.knobs.runtime.launch_enter_hook)()
    hook.add(lambda metadata: None)
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hook)
    ours(tensors())
    assert hook in got[-1][10:13]


@pytest.mark.parametrize("what", ["version", "scratch"])
def test_otherwise_triton_launches(encoded, monkeypatch, what):
    kernel = compiled_for((None,), [])
    if what == "version":
        monkeypatch.setattr(triton, "__version__", "3.9.0")
    else:
        kernel._run.global_scratch_size = 128
    assert quick.runner(kernel, GRID, DEVICE, (), launch.moved, TAIL) is None


class Dispatch:
    """A Gluon kernel whose compiled form is already there."""

    params = (SimpleNamespace(name="q_desc", is_constexpr=False), SimpleNamespace(name="WIDE", is_constexpr=True))

    def __init__(self, compiled) -> None:
        self.compiled = compiled

    def __getitem__(self, grid):
        return lambda *_arguments, **_options: self.compiled


def test_a_gluon_launch_is_as_quick(encoded):
    x, lse = torch.zeros(2, 4, 256, 64, dtype=torch.bfloat16), torch.zeros(2, 4, 256)
    got: list = []
    shell = gluon.descriptor(x, 64, 64)
    kernel = compiled_for((shell, None), got)
    planned = gluon.Launch(Dispatch(kernel), (7,), ((64, 64), None), (3, 0.5), {"WIDE": True})
    planned(x, lse)  # through the dispatch, which launches nothing here
    planned(x, lse)
    encodings = len(encoded)
    planned(x, lse)
    assert len(encoded) == encodings
    kernel[GRID](shell, lse, 3, 0.5, True)
    assert len(got) == 3
    first, second, reference = ((*arguments[:3], *arguments[4:]) for arguments in map(plain, got))  # but for the stream
    assert first == second == reference
