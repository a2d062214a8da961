"""A small model really trained: backends agree, the loss falls, a broken gradient shows, what goes wrong is said."""

from __future__ import annotations

import dataclasses
import functools
import math
import resource
import time

import pytest
import torch

from flash2 import get_backend
from flash2.backends.naive import Naive
from flash2.core.training import checkpoint, corpus
from flash2.core.training import trainer as training
from flash2.core.training.checkpoint import CheckpointError
from flash2.core.training.gpt import GPT
from flash2.core.training.options import SIZES, Options, chosen
from flash2.core.training.runs import Run, largest_gap
from flash2.core.training.trainer import AttentionClock, Diverged, Trainer, handle

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TINY = {
    "layers": 2, "width": 32, "heads": 2, "context": 48, "batch": 4, "steps": 50, "lr": 1e-2, "warmup": 5,
    "validation_tokens": 2048, "sample": 0,
}  # fmt: skip


def trainer(backend="sdpa", emit=lambda event: None, **changes) -> Trainer:
    backend = get_backend(backend) if isinstance(backend, str) else backend
    return Trainer(Options(**(TINY | changes)), backend, CPU, emit)


def as_run(trained: Trainer) -> Run:
    return Run(
        backend=trained.backend.name, status="error", reason="only its curve is used",
        options=trained.options.to_dict(), losses=tuple(trained.losses),
    )  # fmt: skip


@pytest.fixture(scope="module")
def baseline() -> Trainer:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained = trainer()
    trained.run()
    torch.set_num_threads(threads)
    return trained


def test_the_loss_falls(baseline):
    assert baseline.losses[0] == pytest.approx(math.log(256), abs=1e-5)  # the head begins at 0
    assert baseline.validation[-1][0] == 50 and baseline.validation[-1][1] < 3.3
    assert len(baseline.losses) == 50


@pytest.mark.parametrize("backend", ["naive", "numba"])
def test_backends_agree_over_fifty_steps(backend, baseline):
    trained = trainer(backend)
    trained.run()
    gap, step = largest_gap(as_run(trained), as_run(baseline))
    assert gap < 1e-4, f"at step {step}"
    assert trained.validation[-1][1] == pytest.approx(baseline.validation[-1][1], rel=1e-4)


class ForgetsDelta(Naive):
    """ds = p * dp: the rows of the softmax are taken for independent."""

    name = "forgets-delta"

    def backward(self, do, q, k, v, o, lse, spec):
        return super().backward(do, q, k, v, o * 0, lse, spec)


class LosesKeys(Naive):
    """dk and dv of one key in sixteen are left as they were allocated."""

    name = "loses-keys"

    def backward(self, do, q, k, v, o, lse, spec):
        dq, dk, dv = super().backward(do, q, k, v, o, lse, spec)
        dk[:, :, 5::16] = dv[:, :, 5::16] = 0
        return dq, dk, dv


class NoGradient(Naive):
    """A backward that gives nothing to q and k."""

    name = "no-gradient"

    def backward(self, do, q, k, v, o, lse, spec):
        dq, dk, dv = super().backward(do, q, k, v, o, lse, spec)
        return dq * 0, dk * 0, dv


@pytest.mark.parametrize("backend", [ForgetsDelta(), LosesKeys(), NoGradient()], ids=lambda backend: backend.name)
def test_a_broken_gradient_shows_in_the_curve(backend, baseline):
    trained = trainer(backend)
    trained.run()
    gap, _ = largest_gap(as_run(trained), as_run(baseline))
    assert gap > 1e-4


def test_weights_and_batches_depend_on_the_seed_alone():
    one, same, other = trainer("naive"), trainer("numba"), trainer("naive", seed=1)
    pairs = list(zip(one.model.parameters(), same.model.parameters(), other.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert sum(not torch.equal(a, c) for a, _, c in pairs) == 5  # the embedding, and qkv and up of each block
    a, b, c, d = (corpus.batch(one.text, 4, 49, seed, step) for seed, step in ((0, 3), (0, 3), (1, 3), (0, 4)))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, d)


@pytest.mark.parametrize("backend", ["triton", "sdpa-cudnn", "naive"])
def test_on_a_gpu_in_bf16(backend, pytestconfig):
    """With --device cuda: the loop's events, streams and pinned copies; curves within bf16's rounding."""
    device = torch.device(pytestconfig.getoption("--device"))
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    if (reason := get_backend(backend).unavailable()) is not None:
        pytest.skip(reason)
    options = Options(
        **(TINY | {"precision": "bf16", "context": 256, "width": 128, "sample": 16, "steps": 24, "lr": 5e-4})
    )
    events = []
    ours = Trainer(options, get_backend(backend), device, events.append)
    figures = ours.run()
    theirs = Trainer(options, get_backend("sdpa"), device, events.append)
    theirs.run()
    # At a learning rate at which rounding does not grow: it moves the curves by 2e-5, a lost dq by 1e-3.
    gap, step = largest_gap(as_run(ours), as_run(theirs))
    assert gap < 2e-4, f"at step {step}"
    assert 0 < figures["attention_share"] < 1 and figures["step_ms"]["p20"] > 0 and figures["peak_bytes"] > 1 << 20
    assert ours.losses[-1] < ours.losses[0] - 0.5
    assert figures["sample"] or backend == "sdpa-cudnn"  # cuDNN has nothing for a single key
    assert len(spans := ours.burst(3)) == 3 and min(spans) > 0


# ---- what the model is told and writes


def test_the_text_is_split_by_file():
    text = corpus.standard_library()
    assert text.files[0] > 4 * text.files[1] > 40
    assert len(text.train) > 4_000_000 and len(text.validation) > 300_000
    train, validation = (bytes(part.numpy()).split(b"\0", 1)[1].split(b"\0") for part in (text.train, text.validation))
    assert not {file for file in train if len(file) > 200} & {file for file in validation if len(file) > 200}
    assert b"def dataclass(" in bytes(text.train.numpy()) + bytes(text.validation.numpy())


def test_a_python_without_its_source_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no source code"):
        corpus.standard_library(str(tmp_path))


def test_validation_looks_at_the_whole_text_once():
    text = torch.arange(250, dtype=torch.uint8)
    windows = corpus.validation_windows(text, tokens=100, context=20)
    assert windows.shape == (5, 21) and windows[0, 0] == 0 and windows[-1, -1] == 249
    assert corpus.validation_windows(text, tokens=10**9, context=20).shape == (12, 21)


@pytest.mark.parametrize("backend", ["naive", "sdpa", "numba"])
def test_generation_with_the_cache_is_generation_without(backend, baseline):
    options = dataclasses.replace(baseline.options, window=11, kv_heads=1)
    model = GPT(options, get_backend(backend)).eval()
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    written = bytes(model.generate(b"import ", 24, temperature=0))
    text = b"import "
    for _ in range(24):
        with torch.no_grad():
            logits = model(torch.tensor([list(text)]))
        text += bytes([int(logits[0, -1].argmax())])
    assert b"import " + written == text and len(set(written)) > 3


def test_a_backend_that_cannot_sample_loses_no_run(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("no kernel for a single key")

    monkeypatch.setattr(GPT, "generate", refuse)
    figures = trainer("numba", steps=1, sample=20).run()
    assert figures["sample"] == ""
    assert figures["step_ms"]


def test_a_sample_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="must fit context 48"):
        next(GPT(Options(**TINY), get_backend("naive")).generate(b"x", 48))


def test_a_trained_model_writes_text():
    trained = trainer("numba", steps=1, sample=20)
    assert 1 <= len(trained.run()["sample"]) <= 20


# ---- time


class Slow(Naive):
    """10 ms forward, 20 ms backward."""

    name = "slow"

    def forward(self, q, k, v, spec):
        time.sleep(0.01)
        return super().forward(q, k, v, spec)

    def backward(self, do, q, k, v, o, lse, spec):
        time.sleep(0.02)
        return super().backward(do, q, k, v, o, lse, spec)


def quietly_compiled(test):
    """A test during which torch's compiler does what torch itself warns of."""
    for warning in ("ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute:UserWarning"):
        test = pytest.mark.filterwarnings(warning)(test)
    return test


def test_attentions_share_is_of_both_passes_of_every_layer():
    trained, clock = trainer(Slow()), AttentionClock(CPU)
    begin = time.perf_counter()
    with clock.watch(trained.model.attentions()):
        trained.train_step(0)
    whole = (time.perf_counter() - begin) * 1e3
    assert 2 * 30 <= clock.milliseconds() < whole
    assert all("attend" not in vars(module) for module in trained.model.attentions())


def test_what_a_run_reports():
    events = []
    figures = trainer("naive", events.append, steps=24, validate_every=10).run()
    assert 0 < figures["attention_share"] < 1 and figures["step_ms"]["p20"] <= figures["step_ms"]["median"]
    assert figures["parameters"] == sum(w.numel() for w in trainer().model.parameters())
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(24))
    assert [e["step"] for e in events if e["event"] == "validation"] == [10, 20, 24]
    assert len([e for e in events if e["event"] == "share"]) == 4  # the first of five falls into the warm-up


@quietly_compiled
def test_compiled_it_is_the_same_model():
    eager = trainer("naive", steps=2)
    eager.run()
    torch.compiler.reset()
    compiled = trainer("naive", steps=2)
    compiled.model.compile_around_attention(backend="eager")
    compiled.run()
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-6)


@quietly_compiled
def test_what_is_compiled_serves_every_layer_and_every_backend():
    """One graph before and one behind attention, in training and in validation; attention is in none of them."""
    torch.compiler.reset()
    graphs = []

    def note(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    for backend in ("naive", "sdpa"):
        compiled = trainer(backend, layers=3, steps=9, validate_every=4, sample=3, validation_tokens=192)
        compiled.model.compile_around_attention(backend=note)
        figures = compiled.run()
        assert 0 < figures["attention_share"] < 1
    assert len(graphs) == 4
    assert not any(word in graph for graph in graphs for word in ("softmax", "scaled_dot_product", "flash2"))


@quietly_compiled
def test_a_compiler_that_fails_is_named_with_the_way_around_it(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(
        GPT, "compile_around_attention", functools.partialmethod(GPT.compile_around_attention, backend=refuse)
    )
    events = []
    options = dataclasses.asdict(trainer(steps=2).options) | {"compile": True}
    handle(
        events.append,
        {
            "op": "train",
            "backend": "naive",
            "device": "cpu",
            "options": options,
            "file": None,
            "save_every": 0,
            "resume": False,
        },
    )
    assert events[-1]["status"] == "error"
    assert "RuntimeError: no compiler here" in events[-1]["reason"] and "--no-compile" in events[-1]["reason"]
    assert "\n" not in events[-1]["reason"]


def refuse(graph, inputs):
    """A compiler's backend that has no compiler."""
    raise RuntimeError("no compiler here\nand more lines")


# ---- steps in turns


class Racer(Naive):
    """Notes each forward in `calls`, and moves a clock of its own making: 100 s in a warm-up or after a switch."""

    def __init__(self, name: str, calls: list[str], seconds: float = 1.0) -> None:
        super().__init__()
        self.name, self.calls, self.seconds, self.now = name, calls, seconds, [0.0]

    def forward(self, q, k, v, spec):
        before = self.calls.count(self.name)
        self.calls.append(self.name)
        self.now[0] += 100.0 if before < training.BURST or before % training.BURST < 2 else self.seconds
        return super().forward(q, k, v, spec)


class Unavailable(Racer):
    def unavailable(self):
        return "no such card"


class Raises(Racer):
    """In round 1."""

    def forward(self, q, k, v, spec):
        if self.calls.count(self.name) == training.BURST + 3:
            raise RuntimeError("no luck\nat all")
        return super().forward(q, k, v, spec)


class GivesNaN(Racer):
    def forward(self, q, k, v, spec):
        o, lse = super().forward(q, k, v, spec)
        return o * math.nan, lse


def race(monkeypatch, *racers: Racer, rounds: int) -> list[dict]:
    """The worker's events; the clock is the racers'."""
    known, now = {racer.name: racer for racer in racers}, [0.0]
    for racer in racers:
        racer.now = now
    monkeypatch.setattr(training.core, "find_backend", lambda name, device: known[name])
    monkeypatch.setattr(training, "_moment", lambda device: now[0])
    events = []
    options = Options(**(TINY | {"layers": 1, "steps": 12})).to_dict()  # fewer steps than a race has
    training.handle(
        events.append, {"op": "race", "backends": [*known], "device": "cpu", "options": options, "rounds": rounds}
    )
    return events


def bursts(calls: list[str]) -> str:
    """One letter a burst; fails where a burst is not of one backend."""
    parts = [calls[at : at + training.BURST] for at in range(0, len(calls), training.BURST)]
    assert all(part == part[:1] * training.BURST for part in parts)
    return "".join(part[0] for part in parts)


BUGS = {"none": "", "the swap does nothing": "aaaaaaaaa", "steps after a switch count": "abcbcacab"}


@pytest.mark.parametrize("bug", BUGS)
def test_backends_take_turns_and_each_has_its_own_times(bug, monkeypatch):
    calls = []
    racers = [Racer(name, calls, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    if bug == "the swap does nothing":
        kept = Trainer.__init__
        monkeypatch.setattr(
            Trainer, "__init__", lambda self, o, _, device, emit: kept(self, o, racers[0], device, emit)
        )
    if bug == "steps after a switch count":
        monkeypatch.setattr(training, "SETTLE", 0)
    *turns, end = race(monkeypatch, *racers, rounds=2)
    assert [event["backend"] for event in turns] == [*"abcbcacab"]  # the first three warm up
    assert bursts(calls) == (BUGS[bug] or "abcbcacab")
    exact = {name: dict.fromkeys(("median", "p20", "p80"), 1e3 * (at + 1)) for at, name in enumerate("abc")}
    assert end["event"] == "end" and (end["turns"] == exact) == (bug == "none")


def test_who_fails_in_turns_is_left_out(monkeypatch):
    calls = []
    racers = [Unavailable("u", calls), Racer("a", calls), Raises("r", calls), GivesNaN("n", calls), Racer("b", calls)]
    events = race(monkeypatch, *racers, rounds=2)
    out = {event["backend"]: event["reason"] for event in events if event["event"] == "out"}
    assert out.keys() == {"u", "r", "n"} and out["u"] == "no such card" and out["r"] == "no luck"
    assert "nan with backend 'n'" in out["n"]
    assert events[-1]["turns"].keys() == {"a", "b"} and calls.count("a") == calls.count("b") == 3 * training.BURST
    assert calls.count("n") == training.BURST and calls.count("r") == training.BURST + 3


def test_a_burst_goes_on_and_after_the_last_step_begins_anew():
    trained, steps = trainer("naive", steps=5), []
    step = trained.train_step
    trained.train_step = lambda number: steps.append(number) or step(number)
    assert [len(trained.burst(4)), len(trained.burst(4))] == [4, 4] and steps == [0, 1, 2, 3, 4, 0, 1, 2]


def test_nobody_races_alone(monkeypatch):
    calls = []
    events = race(monkeypatch, Racer("a", calls), Unavailable("u", calls), rounds=2)
    assert events[-1] == {"event": "end", "turns": {}} and bursts(calls) == "a"


# ---- checkpoints


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(optimizer, tmp_path):
    whole, first, second = (trainer("naive", steps=9, validate_every=5, optimizer=optimizer) for _ in range(3))
    whole.run()
    saved = tmp_path / "runs" / "naive.pt"
    _interrupt(first, at=6)
    with pytest.raises(KeyboardInterrupt):
        first.run(saved, save_every=4)
    second.restore(saved)
    assert second.step == 4
    second.run(saved, save_every=4)
    assert second.losses == pytest.approx(whole.losses, rel=1e-6)
    assert dict(second.validation) == pytest.approx(dict(whole.validation), rel=1e-6)


def _interrupt(trained: Trainer, at: int) -> None:
    step = trained.train_step

    def interrupted(number):
        if number == at:
            raise KeyboardInterrupt
        return step(number)

    trained.train_step = interrupted


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """The limit on a file's size stands in for the disk: the write fails halfway, with the system's own error."""
    path, trained = tmp_path / "model.pt", trainer("naive")
    trained.save(path)
    good = path.read_bytes()
    trained.step = 7
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"no checkpoint could be written to .*model\.pt: .*still in"):
            trained.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]
    assert trained.saved == (path, 0)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    trainer("naive").save(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt is of another model: width 32, not 64"):
        trainer("naive", width=64).restore(tmp_path / "a.pt")


class Runs:
    """What pickle would run on loading."""

    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize(
    "what", [b"", b"PK\x03\x04 torn", Runs(), {"schema": 99}], ids=["empty", "torn", "code", "schema"]
)
def test_a_file_that_is_no_checkpoint_is_refused(what, tmp_path, capsys):
    path = tmp_path / "a.pt"
    if isinstance(what, bytes):
        path.write_bytes(what)
    else:
        torch.save(what, path)
    with pytest.raises(CheckpointError, match=r"a\.pt is no checkpoint"):
        checkpoint.load(path, {})
    assert "code ran" not in capsys.readouterr().out


class TurnsNaN(Naive):
    """Right for a while."""

    name = "turns-nan"
    calls = 0

    def forward(self, q, k, v, spec):
        o, lse = super().forward(q, k, v, spec)
        self.calls += 1
        return o * (math.nan if self.calls > 2 * 7 else 1.0), lse  # two layers: from step 7 on


def test_nan_ends_the_run_and_says_where(tmp_path):
    path = tmp_path / "run.pt"
    trained = trainer(TurnsNaN(), validate_every=1000)
    with pytest.raises(Diverged, match=r"loss of step 7 is nan with backend 'turns-nan'.*run\.pt, of step 6"):
        trained.run(path, save_every=3)
    assert checkpoint.load(path, trained.options.model())["step"] == 6
    with pytest.raises(Diverged, match="no checkpoint was kept"):
        trainer(TurnsNaN(), validate_every=1000).run()


# ---- options


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("linear", 0.525, 0.05), ("cosine", 0.5, 0.007), ("constant", 1.0, 1.0)]
)
def test_learning_rates(schedule, middle, last):
    options = Options(steps=24, warmup=4, lr=2.0, schedule=schedule)
    rates = [options.learning_rate(step) / 2 for step in range(24)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1 and rates[14 if schedule == "cosine" else 13] == pytest.approx(
        middle if schedule != "linear" else 0.55
    )
    assert rates[23] == pytest.approx(last, abs=1e-3) and max(rates) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 50}, "width 50 is not a multiple of heads 4"),
        ({"width": 12}, "is odd: rotary"),
        ({"kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": math.nan}, "lr must be above 0"),
        ({"dropout": 1.0}, "dropout must be below 1"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'; known: adamw, muon"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; known: linear"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; known: bf16, ieee"),
        ({"window": -1}, "window must be 0 or more"),
    ],
)
def test_bad_options_are_refused_in_words(changes, says):
    with pytest.raises(ValueError, match=says):
        Options(**changes)


def test_a_context_longer_than_the_text_is_refused():
    with pytest.raises(ValueError, match="is longer than the text"):
        trainer("naive", context=1 << 27)


def test_sizes():
    for kind in SIZES:
        assert chosen({"seed": 3}, kind, "cpu") == Options(**SIZES[kind], seed=3)
    with torch.device("meta"):
        counted = sum(weight.numel() for weight in GPT(chosen({}, "100m", "cuda"), get_backend("naive")).parameters())
    assert 95e6 < counted < 105e6
    assert chosen({}, "100m", "cuda").context == 4096
