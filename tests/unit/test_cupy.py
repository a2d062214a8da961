"""The cupy backend's Python: what it compiles and keeps, what it says where something is missing, how it launches."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch

from flash2 import get_backend
from flash2.backends import cupy_cuda
from flash2.backends.cupy_cuda import compile, fp32, hopper, launch
from flash2.core.contract import spec_of
from flash2.core.problem import Problem

DEFINES = {"BLOCK_M": 128, "WARPS": 4}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a compiler that notes what it compiles."""
    made = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compile, "nvrtc_version", lambda: "13.0")
    monkeypatch.setattr(compile, "compiled", lambda source, text, flags: made.append((source, flags)) or b"code")
    return made


# ---- what is kept


def test_a_source_is_compiled_once(cache):
    first, second = (compile.cubin("half_forward.cu", DEFINES, "sm_90a") for _ in range(2))
    assert len(cache) == 1 and first.path == second.path and first.path.read_bytes() == b"code"
    assert second.seconds == pytest.approx(first.seconds, abs=1e-3)


def test_whatever_changes_the_code_is_compiled_anew(cache, monkeypatch, tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    for path in compile.SOURCES.glob("*.cu*"):
        (sources / path.name).write_text(path.read_text())
    monkeypatch.setattr(compile, "SOURCES", sources)
    compile.cubin("half_forward.cu", DEFINES, "sm_90a")
    compile.cubin("half_forward.cu", {**DEFINES, "WARPS": 8}, "sm_90a")
    compile.cubin("half_forward.cu", DEFINES, "sm_80")
    compile.cubin("half_gradients_q.cu", DEFINES, "sm_90a")
    monkeypatch.setattr(compile, "nvrtc_version", lambda: "13.1")
    compile.cubin("half_forward.cu", DEFINES, "sm_90a")
    with (sources / "params.cuh").open("a") as file:  # not included by half_forward.cu itself
        file.write("// another word\n")
    compile.cubin("half_forward.cu", DEFINES, "sm_90a")
    assert len(cache) == 6


def test_the_cache_is_the_users_own(cache):
    path = compile.cubin("half_forward.cu", DEFINES, "sm_90a").path
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o077 == 0
    os.chmod(path.parent, 0o770)
    with pytest.raises(RuntimeError, match=r"open to other users .* chmod 700"):
        compile.cubin("half_forward.cu", DEFINES, "sm_90a")


def test_half_a_file_is_never_taken(cache, monkeypatch):
    path = compile.cubin("half_forward.cu", DEFINES, "sm_90a").path
    path.unlink()  # as if it had ended between the note and the code
    assert compile.cubin("half_forward.cu", DEFINES, "sm_90a").path.read_bytes() == b"code" and len(cache) == 2
    path.unlink()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        compile.cubin("half_forward.cu", DEFINES, "sm_90a")
    assert not path.exists() and not list(path.parent.glob("*.part"))


@pytest.mark.parametrize(
    ("defines", "arch", "says"),
    [
        ({"BLOCK_M": "128"}, "sm_90a", "an integer"),
        ({"BLOCK_M=1 -DX": 1}, "sm_90a", "a name in capitals"),
        ({}, "sm_90a --help", "not of the form"),
    ],
)
def test_only_integers_become_options(defines, arch, says):
    with pytest.raises(ValueError, match=says):
        compile.options(defines, arch)


@pytest.mark.parametrize("text", ["128x64", "128x64 w4", "axb w4 s2", "128x64 w4 s2; x"])
def test_a_pin_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="form"):
        get_backend("cupy").pin(forward=text)
    with pytest.raises(ValueError, match="unknown kernel 'backward'; known: forward"):
        get_backend("cupy").pin(backward="128x64 w4 s2")


def test_nvrtc_compiles_a_source_of_each_family(tmp_path, monkeypatch):
    pytest.importorskip("cupy_backends", reason="no CuPy")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for dtype, precision in (("bf16", "bf16"), ("fp32", "ieee"), ("fp32", "tf32")):
        problem = Problem(seq_q=64, head_dim=64, dtype=dtype, precision=precision)
        (kernel,) = launch.kernels_of(problem, 80, {})
        found = compile.cubin(kernel.source, kernel.defines, "sm_80")
        assert found.path.read_bytes().startswith(b"\x7fELF") and found.seconds > 0
    with pytest.raises(RuntimeError, match=r"NVRTC cannot compile half_forward.cu(?s:.*)error"):
        compile.cubin("half_forward.cu", {}, "sm_80")


# ---- what is missing


def lacking():
    """As unavailable() says, looked up afresh."""
    cupy_cuda._lacking.cache_clear()
    try:
        return get_backend("cupy").unavailable()
    finally:
        cupy_cuda._lacking.cache_clear()


def test_what_is_missing_is_said_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(cupy_cuda.importlib.util, "find_spec", lambda name: None)
    assert lacking() == "CuPy is not installed; pip install 'flash2-triton[cupy]'"
    monkeypatch.setattr(cupy_cuda.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lacking() == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def gone():
        raise ImportError("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(compile, "_nvrtc", lambda: SimpleNamespace(getVersion=gone))
    assert "libnvrtc.so.13: cannot open" in lacking() and "pip install" in lacking() and "\n" not in lacking()
    monkeypatch.setattr(compile, "_nvrtc", lambda: SimpleNamespace(getVersion=lambda: (13, 0)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert lacking() is None
    (tmp_path / "flash2/cupy").chmod(0o777)
    assert "open to other users" in lacking()


def test_an_old_nvrtc_compiles_for_the_newest_it_knows(monkeypatch):
    known = SimpleNamespace(getSupportedArchs=lambda: (75, 80, 86, 90, 100), getVersion=lambda: (12, 8))
    monkeypatch.setattr(compile, "_nvrtc", lambda: known)
    names = [compile.arch_name(capability) for capability in ((8, 0), (8, 9), (9, 0), (10, 3))]
    assert names == ["sm_80", "sm_86", "sm_90a", "sm_100"]
    with pytest.raises(RuntimeError, match=r"NVRTC 12.8 does not know sm_120; pip install .* --upgrade"):
        compile.arch_name((12, 0))


# ---- what is launched


class Device:
    """Stands for CuPy and its driver: notes what is loaded and launched."""

    def __init__(self, monkeypatch):
        self.launched, self.shared, self.entered, self.inside = [], {}, [], threading.local()
        self.arch, self.encoded, self.moved = 80, [], []
        names = ("cupy", "cupy_backends", "cupy_backends.cuda", "cupy_backends.cuda.api", "cupy_backends.cuda.libs")
        for name in names:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        api = sys.modules["cupy_backends.cuda.api"]
        api.driver = SimpleNamespace(launchKernel=self.launch, ctxGetCurrent=lambda: getattr(self.inside, "context", 0))
        api.runtime = SimpleNamespace(setDevice=self.enter, free=lambda pointer: None)
        sys.modules["cupy"].RawModule = lambda path: SimpleNamespace(get_function=lambda name: Function(self, name))
        monkeypatch.setattr(launch, "arch_of", lambda device: self.arch)
        monkeypatch.setattr(launch, "processors_of", lambda device: 4)
        monkeypatch.setattr(hopper, "encode", lambda place, x, rows: self.encoded.append((place, x.data_ptr(), rows)))
        monkeypatch.setattr(hopper, "mover", lambda: lambda place, pointer: self.moved.append((place, pointer)))
        monkeypatch.setattr(launch, "_plans", {})
        monkeypatch.setattr(launch, "_modules", {})
        monkeypatch.setattr(compile, "arch_name", lambda capability: "sm_80")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))

    def enter(self, index):
        self.entered.append(threading.get_ident())
        self.inside.context = 1

    def launch(self, function, gx, gy, gz, bx, by, bz, shared, stream, arguments, extra):
        assert self.inside.context, "no current context"
        params = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))[0]
        params += hopper.HEAD if self.arch == 90 else 0
        pointers = launch.POINTERS.unpack(ctypes.string_at(params, launch.POINTERS.size))
        self.after = ctypes.string_at(params + launch.POINTERS.size + launch.CONSTANTS.size, hopper.TAIL.size)
        self.launched.append(
            SimpleNamespace(grid=(gx, gy, gz), block=(bx, by, bz), shared=shared, stream=stream, pointers=pointers)
        )


class Function:
    """Stands for CuPy's RawKernel."""

    def __init__(self, device, name):
        self.__dict__.update(device=device, name=name, kernel=SimpleNamespace(ptr=5))

    def __setattr__(self, name, value):
        self.device.shared[self.name] = (name, value)


@pytest.fixture
def device(monkeypatch, cache):
    return Device(monkeypatch)


def tensors(problem):
    make = lambda heads, seq: torch.zeros(problem.batch, heads, seq, problem.head_dim, dtype=torch.bfloat16)  # noqa: E731
    q, k = make(problem.heads_q, problem.seq_q), make(problem.heads_kv, problem.seq_kv)
    return q, k, k.clone(), spec_of(problem)


def test_a_call_is_one_launch_on_torchs_stream(device):
    problem = Problem(batch=3, heads_q=4, heads_kv=2, seq_q=300, head_dim=64, dtype="bf16")
    q, k, v, spec = tensors(problem)
    o, lse = launch.attend(q, k, v, spec)
    (one,) = device.launched
    assert one.stream == 77 and one.grid == (3 * 4 * 3, 1, 1) and one.block == (128, 1, 1)
    assert one.pointers == (*(x.data_ptr() for x in (q, k, v, o, lse)), *[0] * 8)
    assert one.shared > 48 * 1024
    assert device.shared == {"cuda_attention_forward": ("max_dynamic_shared_size_bytes", one.shared)}
    launch.differentiate(torch.ones_like(o), q, k, v, o, lse, spec)
    assert len(device.launched) == 4


def test_many_heads_go_on_grid_x(device):
    problem = Problem(batch=1, heads_q=70_000, seq_q=2, head_dim=8, dtype="bf16")
    launch.attend(*tensors(problem))
    assert device.launched[0].grid == (70_000, 1, 1)


def test_a_thread_without_a_context_gets_one(device):
    """Autograd's threads have none until they ask the runtime for something, and the driver's launch asks for none."""
    q, k, v, spec = tensors(Problem(seq_q=16, head_dim=16, dtype="bf16"))
    launch.attend(q, k, v, spec)
    seen = []

    def other():
        with contextlib.suppress(AssertionError, AttributeError):
            launch.attend(q, k, v, spec)
            seen.append(threading.get_ident())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen and len(device.launched) == 2 and set(device.entered) == {threading.get_ident(), *seen}


def test_a_plan_is_made_once_a_layout(device):
    q, k, v, spec = tensors(Problem(heads_q=2, seq_q=16, head_dim=16, dtype="bf16"))
    for _ in range(2):
        launch.attend(q, k, v, spec)
    assert len(launch._plans) == 1
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    launch.attend(turned, k, v, spec)
    assert len(launch._plans) == 2


# ---- shares of dQ


def planned(**fields):
    """(Maths, kernels' names) of an IEEE backward on an H100."""
    problem = Problem(**{"seq_q": 2048, "head_dim": 64, "dtype": "fp32", "precision": "ieee", "pass_": "bwd", **fields})
    sizes = launch.maths_of(problem, 90)
    return sizes, sizes.gradients({})


@pytest.mark.parametrize("seq", [512, 1024, 2048, 4096, 8192, 16384])
def test_the_default_grid_has_one_kernel_for_both_sides(seq):
    for causal in (False, True):
        sizes, names = planned(batch=16384 // seq, heads_q=32, seq_q=seq, causal=causal)
        assert names == ["statistics", "gradients", "gradients_sum"]
        blocks, tiles = 16384 // seq * 32 * sizes.parts, seq // 128
        assert 1 <= sizes.parts <= tiles and blocks >= 0.95 * 264  # of two blocks a multiprocessor
        assert 4 * torch.Size(sizes.shares).numel() <= fp32.SHARES_LIMIT


@pytest.mark.parametrize(
    "fields",
    [
        {"seq_q": 1 << 17, "heads_q": 8},  # few parts would leave most multiprocessors without a block
        {"head_dim": 256, "heads_q": 64, "batch": 4},
        {"precision": "tf32", "heads_q": 64, "batch": 4},
    ],
)
def test_two_kernels_where_one_does_not_suit(fields):
    sizes, names = planned(**fields)
    assert names == ["statistics", "gradients_kv", "gradients_q"] and sizes.parts == 0 and sizes.shares == ()
    problem = Problem(**{"seq_q": 2048, "head_dim": 64, "dtype": "fp32", "precision": "ieee", **fields})
    assert get_backend("cupy").scratch_bytes(problem.replace(pass_="bwd")) < 4 * problem.batch * problem.heads_q * (
        problem.seq_q * problem.head_dim
    )


def test_pins_choose_one_kernel_or_two():
    problem = Problem(heads_q=4, seq_q=500, head_dim=64, dtype="fp32", precision="ieee", pass_="bwd")
    for pin, names in (
        ({"gradients": "64x64 w2 s2"}, ["gradients", "gradients_sum"]),
        ({"gradients_q": "64x64 w2 s2"}, ["gradients_kv", "gradients_q"]),
    ):
        pins = {name: launch.parse_tile(text) for name, text in pin.items()}
        assert [kernel.name for kernel in launch.kernels_of(problem, 90, pins)] == ["statistics", *names]
    with pytest.raises(ValueError, match="does not suit"):
        launch.kernels_of(problem.replace(precision="tf32"), 90, {"gradients": launch.parse_tile("64x64 w2 s2")})


def test_shares_begin_at_zero_and_are_the_scratch_that_is_foretold(device, monkeypatch):
    problem = Problem(
        batch=2, heads_q=4, heads_kv=2, seq_q=300, head_dim=40, dtype="fp32", precision="ieee", pass_="bwd"
    )
    q, k, v, spec = (x.float() if isinstance(x, torch.Tensor) else x for x in tensors(problem))
    monkeypatch.setattr(launch, "processors_of", lambda device: 132)
    monkeypatch.setattr(launch, "arch_of", lambda device: 90)
    made, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: made.append(zeros(*a, **k)) or made[-1])
    launch.differentiate(q, q, k, v, q, q[..., 0], spec)
    (shares,) = made
    assert [one.pointers[12] for one in device.launched] == [shares.data_ptr()] * 3
    assert shares.shape == (2 * 4, 3, 384, 64)
    assert device.launched[1].grid == (2 * 2 * 3, 1, 1) and device.launched[2].grid == (2 * 4 * 10, 1, 1)
    backend, statistics = get_backend("cupy"), 8 * 2 * 4 * (300 + 128)
    assert backend.scratch_bytes(problem) == statistics + shares.nbytes


# ---- Hopper's forward


def test_hoppers_plan_has_maps_that_follow_the_tensors(device):
    device.arch = 90
    q, k, v, spec = tensors(Problem(batch=2, heads_q=4, heads_kv=2, seq_q=300, head_dim=128, dtype="bf16"))
    launch.attend(q, k, v, spec)
    places = [place for place, *_ in device.encoded]
    assert [rest for _, *rest in device.encoded] == [[q.data_ptr(), 128], [k.data_ptr(), 128], [v.data_ptr(), 128]]
    assert places == [places[0] + n * hopper.MAP for n in range(3)] and places[0] % 64 == 0
    other = k.clone()
    launch.attend(q, other, v, spec)
    assert len(device.encoded) == 3  # the plan is kept
    assert device.moved[3:] == list(zip(places, (q.data_ptr(), other.data_ptr(), v.data_ptr()), strict=True))
    last = device.launched[-1]
    assert last.grid == (4, 1, 1) and last.block == (384, 1, 1) and last.pointers[1] == other.data_ptr()
    table, rounds, row_tiles = hopper.TAIL.unpack(device.after)
    assert (table, rounds, row_tiles) == (0, 0, 2 * 4 * 3)


def test_a_refused_address_is_an_error(device, monkeypatch):
    device.arch = 90
    monkeypatch.setattr(hopper, "mover", lambda: lambda place, pointer: 1)
    q, k, v, spec = tensors(Problem(seq_q=300, head_dim=64, dtype="bf16"))
    with pytest.raises(RuntimeError, match="cuTensorMapReplaceAddress refuses"):
        launch.attend(q, k, v, spec)
    assert not device.launched


ELSEWHERE = {
    "another head_dim": {"head_dim": 256},
    "columns that are no 16 bytes": {"head_dim": 60},
    "a dressed score": {"softcap": 3.0},
    "slopes": {"alibi": True},
    "a scale below 0": {"scale": -1.0},
    "float32": {"dtype": "fp32"},
}


@pytest.mark.parametrize("why", ELSEWHERE)
def test_what_hoppers_forward_is_not_made_for_runs_on_mma(why):
    problem = Problem(**{"seq_q": 300, "head_dim": 64, "dtype": "bf16", **ELSEWHERE[why]})
    (kernel,) = launch.kernels_of(problem, 90, {})
    assert kernel.source != hopper.SOURCE
    with pytest.raises(ValueError, match="does not suit"):
        launch.kernels_of(problem, 90, {"forward": launch.parse_tile("wgmma 128x128 s2 q2")})
    plain = Problem(seq_q=300, head_dim=64, dtype="bf16")
    sources = [launch.kernels_of(plain, arch, {})[0].source for arch in (80, 90, 100)]
    assert sources == ["half_forward.cu", hopper.SOURCE, "half_forward.cu"]


def test_what_tma_cannot_read_runs_on_mma(device):
    device.arch = 90
    q, k, v, spec = tensors(Problem(heads_q=2, seq_q=300, head_dim=64, dtype="bf16"))
    launch.attend(q, k[:, :1].expand_as(k), v, spec)  # a stride of 0
    assert not device.encoded and device.launched[-1].block == (128, 1, 1)


@pytest.mark.parametrize("text", ["wgmma 128x128 s2 q2", "wgmma 192x64 s3 q1 turns ordered qreg"])
def test_hoppers_tiles_are_read_as_they_are_written(text):
    assert str(launch.parse_tile(text)) == text
    with pytest.raises(ValueError, match=r"any of turns, ordered, qreg"):
        launch.parse_tile(text + " fast")


def maths(**fields):
    problem = Problem(**{"head_dim": 128, "dtype": "bf16", **fields})
    q = torch.empty(problem.batch, problem.heads_q, problem.seq_q, 128, device="meta", dtype=torch.bfloat16)
    k = torch.empty(problem.batch, problem.heads_kv, problem.seq_kv, 128, device="meta", dtype=torch.bfloat16)
    return launch.Maths(q, k, spec_of(problem), 90, 132)


@pytest.mark.parametrize(
    "fields",
    [
        {"batch": 4, "heads_q": 16, "seq_q": 2048, "causal": True},
        {"batch": 32, "heads_q": 16, "seq_q": 512, "causal": True},
        {"heads_q": 16, "seq_q": 16384, "causal": True},
        {"batch": 3, "heads_q": 12, "heads_kv": 4, "seq_q": 3000, "seq_kv": 3100, "causal": True, "window": (1300, 0)},
    ],
)
def test_every_row_tile_has_one_block_and_blocks_have_as_much_to_do(fields):
    sizes, blocks = maths(**fields), 132
    tile = hopper.tile(sizes)
    rounds, table = hopper.order(sizes, tile, blocks)
    lengths = hopper.key_tiles(sizes, tile)
    assert len(table) == rounds * blocks
    assert sorted(t for t in table if t >= 0) == list(range(sizes.batch * sizes.heads * len(lengths)))
    work = [sum(lengths[t % len(lengths)] + 1 for t in table[block::blocks] if t >= 0) for block in range(blocks)]
    assert max(work) <= 1.03 * sum(work) / blocks + 1
    for block in range(blocks):  # no tile after the end
        own = [t >= 0 for t in table[block::blocks]]
        assert own == sorted(own, reverse=True)


def test_row_tiles_of_one_length_need_no_table():
    for sizes in (maths(heads_q=64, seq_q=2048), maths(heads_q=2, seq_q=300, causal=True)):
        assert hopper.order(sizes, hopper.tile(sizes), 132) == (0, [])


# ---- what the kernels can read


def rows(x):
    return x.data_ptr() % 16 == 0 and all(
        s * x.element_size() % 16 == 0 for s, n in zip(x.stride()[:3], x.shape, strict=False) if n > 1
    )


BASE = torch.arange(2 * 3 * 8 * 32, dtype=torch.float32).reshape(2, 3, 8, 32).bfloat16()
READ = {
    "contiguous": (BASE, True),
    "bshd": (BASE.transpose(1, 2).contiguous().transpose(1, 2), True),
    "expanded over heads": (BASE[:, :1].expand(2, 3, 8, 32), True),
    "every second row": (BASE[:, :, ::2], True),
    "a slice that begins off 16 bytes": (BASE[..., 1:17], False),
    "rows of 20": (BASE[..., :20].contiguous(), False),
    "head_dim strided": (BASE.transpose(2, 3), False),
    "all strides 0": (torch.ones((), dtype=torch.bfloat16).expand(2, 3, 8, 32), False),
}


@pytest.mark.parametrize("layout", READ)
def test_what_cannot_be_read_16_bytes_at_once_is_copied(layout):
    x, as_it_is = READ[layout]
    found = launch.readable(x)
    assert (found is x) == as_it_is
    assert torch.equal(found, x) and found.stride(3) == 1 and rows(found)
    out = launch.output_like(x)
    assert out.shape == x.shape and out.stride(3) == 1 and out.dtype == x.dtype
