"""Find the fastest correct configuration of each kernel: `python -m flash2.backends.triton_fa2.tune --help`.

Candidates are compiled in parallel, dropped when they spill or do not fit, judged against float64, and timed
interleaved with a cold L2 cache. The command sweeps a grid for the frozen table and ends with the rows to put there;
autotune() tunes one problem. Compiling takes most of the time and no GPU: --compile-only 90 does it beforehand, into
Triton's cache (TRITON_CACHE_DIR) and the file --builds, which a sweep with the same --builds then reads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import torch
import triton

from flash2.backends.triton_fa2 import configs, launch, offline
from flash2.backends.triton_fa2.configs import FLAGS, KERNELS, Key, TileConfig
from flash2.core.contract import TORCH_DTYPES, spec_of
from flash2.core.problem import Problem

# Relative rms error above which a configuration is broken, by class of maths: several times what rounding explains.
BROKEN = {"bf16": 1e-2, "fp16": 2e-3, "tf32": 4e-3, "bf16x3": 1e-4, "bf16x6": 1e-5, "tf32x3": 1e-5, "ieee": 1e-5}
REGISTERS, SHARED = 1 << 16, 228 << 10  # of one multiprocessor, sm_80 and newer; smaller devices have less to share
AUTOTUNED = 6  # configurations timed for a key that no table knows
MATMULS = {"fwd": 2, "dkdv": 4, "dk": 3, "dv": 2, "dq": 3}
# Tiles the size of block_m x block_n or rows x block_d that a kernel holds: accumulators, other float32 tiles, operands.
HOLDS = {"fwd": (1, 1, 1), "dkdv": (2, 2, 2), "dk": (1, 2, 2), "dv": (1, 1, 1), "dq": (1, 2, 2)}


def candidates(kernel: str, problem: Problem, arch: int, *, ws: bool = False) -> list[TileConfig]:
    """Every configuration worth compiling. What spills or does not fit is found by the compiler. `ws` adds the
    warp-specialised ones, which may hang."""
    block_d = max(16, triton.next_power_of_2(problem.head_dim))
    wide = problem.dtype == "fp32"
    if kernel in ("dk", "dv") and block_d < (128 if wide else 256) and problem.precision not in ("bf16x6", "ieee"):
        return []  # both accumulators fit into the registers
    masked = problem.band != (None, None) or problem.softcap != 0 or problem.alibi
    hopper = arch >= 90 and arch != 120
    parts = {"bf16x3": 2, "bf16x6": 3}.get(problem.precision, 1)
    turned = problem.precision == "tf32"
    sizes = (32, 64, 128) if wide or block_d > 128 else (64, 128)
    if (parts > 1 or turned) and block_d > 64:
        sizes = (16, *sizes)
    found = []
    for m, n, warps, stages, tma, one_loop, late, prepared, home in itertools.product(
        (*sizes, 256) if kernel == "fwd" and block_d <= 64 and not wide else sizes,
        sizes,
        (4, 8),
        (1, 2, 3, 4),
        (True, False) if hopper else (False,),
        (False, True) if masked else (False,),
        (False, True) if kernel == "fwd" else (False,),
        (False, True) if parts > 1 or turned else (False,),
        ("", "resident", "mixed") if parts > 1 else ("",),
    ):
        keys = kernel in ("dkdv", "dk", "dv")  # a program owns keys and loops over queries, or the reverse
        rows, step = (n, m) if keys else (m, n)
        accumulators, tiles, operands = HOLDS[kernel]
        registers = (accumulators * rows * block_d + (tiles + late) * rows * step) / (32 * warps)  # a thread
        element = 2 * parts if prepared and parts > 1 else 4 if wide else 2
        tiles_a_step = {"dkdv": 4, "dk": 3, "dq": 3}.get(kernel, 2) if prepared and turned else 2
        own = element if parts == 1 or not prepared else {"resident": 2 * parts, "mixed": 2 * parts - 2, "": 0}[home]
        shared = (operands * rows * own + tiles_a_step * stages * step * element) * block_d
        # What the compiler adds to these: up to 60, without descriptors 100; with late the two tiles overlap in part.
        most = 260 if late else 210 if tma or arch < 90 else 150
        if not 12 <= registers <= most or shared > offline.shared_limit(arch) or rows < 32 * warps // 4:
            continue
        if ((late or prepared) and not tma) or (late and prepared and turned):
            continue
        if (home and not (prepared and rows >= 64)) or (late and home == "mixed"):
            continue
        if problem.precision == "ieee":  # bound by the fma units, not by loads
            useful = not tma and not late and m * n <= 1024 * warps and stages <= 2
        elif wide:  # operands and their split parts want registers too
            useful = registers <= 160 and stages in ((1, 2, 3) if prepared else (2, 3))
        else:  # without descriptors registers are short: one choice each
            useful = stages in (2, 3) if tma else stages == 2 and one_loop == masked
        if not useful:
            continue
        flags = {"tma": tma, "one_loop": one_loop, "late": late, "prepared": prepared, **({home: True} if home else {})}
        found.append(TileConfig(block_m=m, block_n=n, num_warps=warps, num_stages=stages, **flags))
        plain = kernel == "fwd" and not wide and tma and not late and one_loop == masked
        if ws and plain and m == 128 and warps == 4:
            found.append(found[-1].replace(ws=True, one_loop=True))
    return found


def narrowed(kernel: str, problem: Problem, arch: int, steps: int) -> list[TileConfig]:
    """Those of candidates() that are at most `steps` changes away from one that won a race: on this arch, for this
    kernel, class and head_dim, or else from the winner at another head_dim with its tile cut to size. All of them
    where nothing was ever raced."""
    block_d = max(16, triton.next_power_of_2(problem.head_dim))
    rows = {
        (d, config): None
        for (name, precision, d, _), config in configs.table(f"sm{arch}").items()
        if (name, precision) == (kernel, problem.precision)
    }
    full = problem.band == (None, None)
    rows = {(d, config.replace(one_loop=config.one_loop and not full)): None for d, config in rows}
    origins = [config for d, config in rows if d == block_d]
    if not origins:
        origins = [config for _, config in rows]
        origins += [c.replace(block_n=c.block_n // 2) for c in origins] + [
            c.replace(block_m=c.block_m // 2) for c in origins
        ]
        steps = min(steps - 1, 1)
    found = candidates(kernel, problem, arch)
    if not origins:
        return found
    if all(origin.tma for origin in origins):  # then descriptors are no question
        found = [config for config in found if config.tma]
    return [config for config in found if min(distance(config, origin) for origin in origins) <= steps]


def distance(a: TileConfig, b: TileConfig) -> float:
    """How many changes lead from a to b: a size halved or doubled, a flag, another number of stages."""
    sizes = sum(abs(math.log2(getattr(a, name) / getattr(b, name))) for name in ("block_m", "block_n", "num_warps"))
    flags = sum(getattr(a, name) != getattr(b, name) for name in FLAGS if name != "split")
    return sizes + flags + (a.num_stages != b.num_stages)


def squeezed(config: TileConfig, build: offline.Build) -> TileConfig | None:
    """`config` with few enough registers that one more program fits on a multiprocessor, where shared memory allows it
    and the compiler need not give up more than a fifth of them."""
    threads = 32 * config.num_warps
    resident = REGISTERS // threads // max(build.registers, 1)
    if SHARED // (build.shared + 1024) <= resident:
        return None
    allowed = REGISTERS // threads // (resident + 1) // 8 * 8
    return config.replace(max_regs=allowed) if allowed >= 0.8 * build.registers else None


def relaxed(config: TileConfig, build: offline.Build) -> TileConfig | None:
    """`config` with leave to take every register, where the compiler spilled rather than take more than 168."""
    short = build.spills > 0 and build.registers <= 168 and config.max_regs == 0
    return config.replace(max_regs=255) if short and config.num_warps <= 8 else None


def resized(config: TileConfig, build: offline.Build | str, arch: int) -> TileConfig | None:
    """`config` squeezed() or relaxed(), where that may help."""
    if isinstance(build, str):
        return None
    return squeezed(config, build) if usable(build, arch) else relaxed(config, build)


class Data:
    """Random tensors of one problem and everything its kernels write."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem = problem
        dtype = TORCH_DTYPES[problem.dtype]
        random = torch.Generator(device=device).manual_seed(0)
        shapes = {"q": (problem.heads_q, problem.seq_q), "k": (problem.heads_kv, problem.seq_kv)}
        shapes |= {"v": shapes["k"], "do": shapes["q"]}
        for name, (heads, seq) in shapes.items():
            x = torch.randn(problem.batch, heads, seq, problem.head_dim, generator=random, device=device)
            setattr(self, name, x.to(dtype))
        slopes = 0.5 ** torch.arange(1, problem.heads_q + 1, device=device).float() if problem.alibi else None
        self.spec = spec_of(problem, slopes)
        self.o, self.dq = torch.empty_like(self.q), torch.empty_like(self.q)
        self.dk, self.dv = torch.empty_like(self.k), torch.empty_like(self.v)
        self.lse = torch.empty(self.q.shape[:3], device=device)

    def stage(self, kernel: str, config: TileConfig, others: launch.Pins) -> Callable[[], None]:
        """A call of `kernel` alone under `config`. The backward kernels need o and lse to be there."""
        pins = pinned(kernel, config, others)
        if kernel == "fwd":
            plan = launch.plan_forward(self.q, self.k, self.v, self.o, self.spec, pins)
            return lambda: plan(self.q, self.k, self.v, self.o, self.lse, self.spec.alibi_slopes)
        plan = launch.plan_backward(self.do, self.q, self.k, self.v, self.o, self.dq, self.dk, self.dv, self.spec, pins)
        lse2, delta = torch.empty((2, self.q.shape[0] * self.q.shape[1], plan.rows_padded), device=self.q.device)
        plan.statistics(self.o, self.do, self.lse, lse2, delta)
        shared = (self.q, self.k, self.v, self.do, lse2, delta)
        if kernel == "dq":
            return lambda: plan.q(*shared, self.dq, self.spec.alibi_slopes)
        return lambda: plan.kv[kernel](*shared, self.dk, self.dv, self.spec.alibi_slopes)

    def outputs(self, kernel: str) -> tuple[torch.Tensor, ...]:
        """What `kernel` writes."""
        return written(kernel, self.o, self.dq, self.dk, self.dv)


def written(kernel: str, o, dq, dk, dv) -> tuple[torch.Tensor, ...]:
    """Those of the tensors that `kernel` writes."""
    return {"fwd": (o,), "dkdv": (dk, dv), "dk": (dk,), "dv": (dv,), "dq": (dq,)}[kernel]


def pinned(kernel: str, config: TileConfig, others: launch.Pins) -> launch.Pins:
    """`others` with `kernel` under `config`, and so that `kernel` is launched at all."""
    split = {"dkdv": others["dkdv"].replace(split=True)} if kernel in ("dk", "dv") else {}
    return {**others, **split, kernel: config}


def exact(data: Data) -> dict[str, tuple[torch.Tensor, ...]]:
    """float64 outputs by kernel name; also puts the true o and lse into `data`."""
    problem, spec = data.problem, data.spec
    q, k, v = (x.double().requires_grad_() for x in (data.q, data.k, data.v))
    group = problem.heads_q // problem.heads_kv
    s = q @ k.repeat_interleave(group, 1).mT * spec.scale
    if spec.softcap:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    i = torch.arange(problem.seq_q, device=q.device)[:, None] + problem.seq_kv - problem.seq_q
    far = torch.arange(problem.seq_kv, device=q.device)[None, :] - i
    if spec.alibi_slopes is not None:
        s = s - spec.alibi_slopes.double()[:, None, None] * far.abs()
    left, right = spec.band
    hidden = (far > right) if right is not None else torch.zeros_like(far, dtype=torch.bool)
    if left is not None:
        hidden = hidden | (far < -left)
    s = s.masked_fill(hidden, -torch.inf)
    o = torch.softmax(s, -1).nan_to_num() @ v.repeat_interleave(group, 1)  # a row of -inf alone is 0
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), data.do.double())
    data.o.copy_(o.detach())
    data.lse.copy_(s.detach().logsumexp(-1))
    return {kernel: written(kernel, o.detach(), dq, dk, dv) for kernel in KERNELS}


def error(got: Iterable[torch.Tensor], want: Iterable[torch.Tensor]) -> float:
    """Worst relative rms error of the outputs; nan where one holds a nan."""
    errors = [((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]
    return sum(errors) if any(e != e for e in errors) else max(errors)


def race(calls: list[Callable[[], None]], rounds: int, flush: torch.Tensor, seconds: float = 2) -> list[float]:
    """Median milliseconds of each call on the device, taken in turns, each with a cold L2; fewer rounds, but three at
    the least, once `seconds` are over."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    torch.cuda.synchronize()
    began = time.monotonic()
    for turn in range(rounds):
        if turn >= 3 and time.monotonic() - began > seconds:
            break
        events = []
        for call in calls:
            torch.cuda._sleep(400_000)  # 0.2 ms: what is timed is queued before the device gets to it
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        for series, (begin, end) in zip(times, events, strict=True):
            series.append(begin.elapsed_time(end))
    return [statistics.median(series) for series in times]


Job = tuple[str, Problem, TileConfig]


def compile_job(job: Job, arch: int) -> dict[Job, offline.Build | str]:
    """Build one kernel, and its resized() form, into Triton's on-disk cache, where a later launch finds them; the
    reason if it does not build."""
    kernel, problem, config = job
    narrow = problem.replace(pass_="fwd" if kernel == "fwd" else "bwd")
    planned, tensors = offline.planned(narrow, pinned(kernel, config, STARTERS))[kernel]
    try:
        build = offline.build(planned, tensors, arch, sass=False)
    except Exception as error:  # whatever a compiler of this size raises or asserts, the candidate is out
        return {job: f"{type(error).__name__}: {str(error)[:200]}"}
    if not config.max_regs and (other := resized(config, build, arch)) is not None:
        return {job: build, **compile_job((kernel, problem, other), arch)}
    return {job: build}


STARTERS = {name: TileConfig(block_m=64, block_n=32, num_stages=1) for name in KERNELS}


class Builds:
    """What candidates compiled to: read from `file` where somebody compiled them before, else compiled in `workers`
    processes from the moment they are asked for, and written there."""

    def __init__(self, file: Path | None, arch: int, workers: int) -> None:
        self.file, self.arch, self.workers = file, arch, workers
        self.known: dict[Job, offline.Build | str] = {}
        self.running: dict[Job, Future] = {}
        self.pool: ProcessPoolExecutor | None = None
        self.deadline = math.inf  # time.monotonic() after which nothing is waited for
        if file is not None and file.exists():
            for line in file.read_text().splitlines():
                entry = json.loads(line)
                if entry["arch"] == arch:
                    job = entry["kernel"], Problem.from_dict(entry["problem"]), configs.parse(entry["config"])
                    build = entry["build"]
                    self.known[job] = build if isinstance(build, str) else offline.Build(*build, Counter())

    def start(self, jobs: Iterable[Job]) -> None:
        """Have them compiled, in this order, without waiting."""
        for job in jobs:
            if job not in self.known and job not in self.running:
                if self.pool is None:
                    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
                    self.pool = ProcessPoolExecutor(self.workers, mp_context=context)
                self.running[job] = self.pool.submit(compile_job, job, self.arch)

    def of(self, job: Job) -> offline.Build | str:
        """The build, or why there is none."""
        self.start([job])
        if job in self.running:
            try:
                left = self.deadline - time.monotonic()
                found = self.running[job].result(None if left == math.inf else max(0.0, left))
            except TimeoutError:
                return "not compiled in time"
            del self.running[job]
            self.known |= found
            for (kernel, problem, config), build in found.items() if self.file is not None else ():
                numbers = build if isinstance(build, str) else (build.registers, build.spills, build.shared)
                line = {"arch": self.arch, "kernel": kernel, "problem": problem.to_dict(), "config": str(config)}
                with self.file.open("a") as out:
                    out.write(json.dumps({**line, "build": numbers}) + "\n")
        return self.known[job]

    def usable(self, kernel: str, problem: Problem, tried: list[TileConfig]) -> list[TileConfig]:
        """Those of `tried` and of their resized() forms that fit."""
        others = [resized(c, self.of((kernel, problem, c)), self.arch) for c in tried]
        every = dict.fromkeys((*tried, *filter(None, others)))
        return [c for c in every if usable(self.of((kernel, problem, c)), self.arch)]

    def stop(self) -> None:
        """End the processes."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def usable(build: offline.Build | str, arch: int) -> bool:
    """No spills, and the shared memory is there."""
    return not isinstance(build, str) and build.spills == 0 and build.shared <= offline.shared_limit(arch)


class Bench:
    """What runs on the device, in a process of its own: a kernel that hangs or breaks the context costs no more."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda")
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=self.device)
        self.key: tuple | None = None

    def data(self, problem: Problem, exactly: bool) -> Data:
        """The tensors of `problem`, kept until another one is asked for; with the float64 outputs if `exactly`."""
        if self.key != (problem, exactly):
            self.key = self.current = self.want = None  # free the old before making the new
            self.current = Data(problem, self.device)
            if exactly:
                self.want = exact(self.current)
            else:
                self.current.stage("fwd", STARTERS["fwd"], STARTERS)()  # o and lse for the backward kernels
            self.key = (problem, exactly)
        return self.current

    def judge(self, kernel: str, problem: Problem, config: TileConfig) -> float | str:
        """Relative rms error on a small relative of `problem` (the same binary), or why it does not run."""
        small = problem.replace(batch=1, heads_q=problem.heads_q // problem.heads_kv * 2, heads_kv=2,
                                seq_q=1024, seq_kv=1024)  # fmt: skip
        data = self.data(small, exactly=True)
        o = data.o.clone()
        try:
            call = data.stage(kernel, config, STARTERS)
            for out in data.outputs(kernel):
                out.fill_(torch.nan)
            call()
            torch.cuda.synchronize()
        except triton.runtime.errors.TritonError as reason:  # too much shared memory, say
            return f"{type(reason).__name__}: {str(reason)[:200]}"
        wrong = error(data.outputs(kernel), self.want[kernel])
        data.o.copy_(o)
        return wrong if wrong <= BROKEN[problem.precision] else f"wrong: error {wrong:.2e}"

    def race(self, kernel: str, problem: Problem, configs: list[TileConfig], rounds: int) -> list[float]:
        """Median milliseconds of each configuration."""
        data = self.data(problem, exactly=False)
        return race([data.stage(kernel, config, STARTERS) for config in configs], rounds, self.flush)

    def rivals(self, problem: Problem, rounds: int) -> dict[str, tuple[float, float]]:
        """See the function."""
        return rivals(problem, self.device, rounds)


class Hang(RuntimeError):
    """The device did not answer in time."""


def _serve(pipe) -> None:
    bench = Bench()
    pipe.send(None)
    while True:
        method, arguments = pipe.recv()
        try:
            pipe.send((True, getattr(bench, method)(*arguments)))
        except Exception as failure:  # told to the parent, which ends this process: its context may be gone
            pipe.send((False, f"{type(failure).__name__}: {str(failure)[:300]}"))


class Worker:
    """A Bench in a process that is replaced when it hangs or fails."""

    def __init__(self) -> None:
        self.process = None

    def ask(self, method: str, *arguments: object, seconds: float = 20) -> object:
        """The answer of Bench.`method`; Hang after `seconds`, RuntimeError in the words of what it raised."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
            if not self.pipe.poll(90):
                self.stop()
                raise Hang("no CUDA context within 90 s")
            self.pipe.recv()
        self.pipe.send((method, arguments))
        try:
            if not self.pipe.poll(seconds):
                raise Hang(f"no answer within {seconds:.0f} s")
            good, answer = self.pipe.recv()
        except (Hang, EOFError) as failure:
            self.stop()
            raise Hang(str(failure) or "the process died") from failure
        if not good:
            self.stop()
            raise RuntimeError(answer)
        return answer

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join(10)
            self.process = None


def tune_kernel(
    worker: Worker, kernel: str, problems: list[Problem], configs: list[TileConfig], keep: int, rounds: int, write,
    stays: TileConfig | None = None,
) -> list[dict]:  # fmt: skip
    """Judge `configs`, time those that are right on the first problem, and the `keep` best, and `stays`, on every one.

    Returns one record a configuration: error, milliseconds by length or why it is out; `write` gets each at once.
    """
    records = []
    hangs: Counter[bool] = Counter()
    for config in configs:
        record: dict = {"config": config, "error": None, "reason": None, "ms": {}, "final": False}
        try:
            if hangs[config.ws] >= (2 if config.ws else 3):
                raise RuntimeError("skipped: others of its kind hung")
            answer = worker.ask("judge", kernel, problems[0], config, seconds=30)
        except RuntimeError as failure:
            hangs[config.ws] += isinstance(failure, Hang)
            answer = str(failure)
        record["reason" if isinstance(answer, str) else "error"] = answer
        records.append(record)
        if record["reason"]:
            write(record)
            print(f"   out: {config}: {answer}", flush=True)
    alive = [record for record in records if record["reason"] is None]
    print(f"   {len(alive)} of {len(records)} are right", flush=True)
    for turn, problem in enumerate((problems[0], *problems)):
        try:
            times = worker.ask("race", kernel, problem, [r["config"] for r in alive], rounds if turn else 4, seconds=30)
        except RuntimeError as failure:
            print(f"   race at {problem.seq_q}: {failure}", flush=True)
            continue
        for record, ms in zip(alive, times, strict=True):
            record["ms"][problem.seq_q] = ms
            record["final"] = turn > 0
        if turn == 0:
            alive.sort(key=lambda record: (record["config"] != stays, record["ms"][problem.seq_q]))
            for record in alive[keep:]:
                write(record)
            del alive[keep:]
    for record in alive:
        write(record)
    return records


def autotune(key: Key, problem: Problem, device: torch.device) -> TileConfig:
    """The fastest right one of a few configurations for `key`, kept for the next process; the fallback if none is.

    Times a relative of `problem` that fills the device, and says so on stderr, since it takes seconds.
    """
    print(f"flash2: tuning the Triton kernel {key}, once on this machine", file=sys.stderr)
    major, minor = torch.cuda.get_device_capability(device)
    arch = 10 * major + minor
    seq = min(4096, max(problem.seq_q, problem.seq_kv))
    group = problem.heads_q // problem.heads_kv
    heads_kv = max(1, min(problem.heads_kv, 32 // group))
    problem = problem.replace(batch=max(1, 16384 // seq), heads_q=heads_kv * group, heads_kv=heads_kv, seq_q=seq,
                              seq_kv=seq, scale=None, pass_="fwd+bwd")  # fmt: skip
    bench, right = Bench(device), []
    for config in likely(key, problem, arch):
        build = compile_job((key.kernel, problem, config), arch)[key.kernel, problem, config]
        if usable(build, arch) and not isinstance(bench.judge(key.kernel, problem, config), str):
            right.append(config)
        if len(right) == AUTOTUNED:
            break
    times = bench.race(key.kernel, problem, right, 8)
    best = right[times.index(min(times))] if right else configs.fallback(key)
    configs.keep(torch.cuda.get_device_name(device), key, best)
    return best


def likely(key: Key, problem: Problem, arch: int) -> list[TileConfig]:
    """candidates() in the order worth trying: what won on other devices, then the larger tiles; few stages first."""
    won = {
        plainly(config)
        for name in configs.TABLES
        for (kernel, precision, _, _), config in configs.table(name).items()
        if (kernel, precision) == (key.kernel, key.precision)
    }
    plain = {config: plainly(config) for config in candidates(key.kernel, problem, arch)}
    return sorted(plain, key=lambda c: (plain[c] not in won, -c.block_m * c.block_n, c.num_stages, str(c)))


def plainly(config: TileConfig) -> TileConfig:
    """`config` without what only some devices and classes have."""
    return config.replace(tma=False, late=False, prepared=False, resident=False, mixed=False, max_regs=0)


def rivals(problem: Problem, device: torch.device, rounds: int) -> dict[str, tuple[float, float]]:
    """name -> (forward, backward) milliseconds of torch's pinned SDPA kernels, for scale."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    data = Data(problem, device)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    q, k, v = (x.detach().requires_grad_() for x in (data.q, data.k, data.v))
    pinned = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}
    if problem.dtype == "fp32":
        pinned = {"sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION}
    times = {}
    for name, which in pinned.items():
        with sdpa_kernel(which):
            attend = torch.nn.functional.scaled_dot_product_attention
            with torch.no_grad():
                (forward,) = race([lambda: attend(q, k, v, is_causal=problem.causal)], rounds, flush)  # noqa: B023
            o = attend(q, k, v, is_causal=problem.causal)
            (backward,) = race([lambda: torch.autograd.grad(o, (q, k, v), data.do, retain_graph=True)], rounds, flush)  # noqa: B023
        times[name] = (forward, backward)
    return times


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m flash2.backends.triton_fa2.tune", description=__doc__)
    words = lambda text: text.split(",")  # noqa: E731
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--kernel", type=words, default=list(KERNELS), help=f"of {','.join(KERNELS)} (default: all)")
    parser.add_argument("--precision", type=words, default=["bf16"], help="classes of maths, e.g. bf16,tf32,bf16x6")
    parser.add_argument("--head-dim", type=numbers, default=[64, 128, 256])
    parser.add_argument("--mask", type=words, default=["full", "causal"])
    parser.add_argument("--cells", action="append", default=[], metavar="KERNELS/CLASSES/HEAD_DIMS/MASKS[/NEAR]",
                        help="instead of those and --near, in the order given: fwd,dq/bf16/64,128/full; may be repeated")  # fmt: skip
    parser.add_argument("--seqlen", type=numbers, default=[2048, 8192], help="the first one sieves the candidates")
    parser.add_argument("--tokens", type=int, default=16384, help="batch * seqlen")
    parser.add_argument("--width", type=int, default=2048, help="heads * head_dim")
    parser.add_argument("--near", type=int, default=2, help="try what is so many changes from an earlier winner")
    parser.add_argument("--wide", action="store_true", help="try every candidate")
    parser.add_argument("--keep", type=int, default=5, help="candidates timed at every length")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", type=re.compile, default=re.compile(""), metavar="REGEX",
                        help="try only configurations in whose name this is found, e.g. 'late|128x.* w8'")  # fmt: skip
    parser.add_argument("--ws", action="store_true", help="also try warp specialisation (may hang; a hang costs 20 s)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 3), help="processes that compile")
    parser.add_argument("--budget", type=float, default=460, help="seconds after which no new cell is begun")
    parser.add_argument("--builds", type=Path, help="file that remembers what candidates compiled to")
    parser.add_argument(
        "--compile-only", type=int, metavar="ARCH", help="fill --builds for this one, 90 for 9.0; no GPU"
    )
    parser.add_argument("--out", type=Path, default=Path("tune.jsonl"))
    return parser.parse_args(arguments)


def cells(options: argparse.Namespace, arch: int) -> list[tuple[str, list[Problem], list[TileConfig]]]:
    """(kernel, problems by length, configurations to try before the squeezed ones) in the order they are measured."""
    grid = []
    plain = (options.kernel, options.precision, options.head_dim, options.mask, [options.near])
    for cell in options.cells or ["/".join(",".join(map(str, part)) for part in plain)]:
        kernels, precisions, head_dims, masks, *near = (part.split(",") for part in cell.split("/"))
        steps = int(near[0][0]) if near else options.near
        for precision, kernel, d, mask in itertools.product(precisions, kernels, map(int, head_dims), masks):
            dtype = precision if precision in ("bf16", "fp16") else "fp32"
            problems = [
                Problem(batch=max(1, options.tokens // n), heads_q=max(1, options.width // d), seq_q=n, head_dim=d,
                        dtype=dtype, precision=precision, causal=mask == "causal", pass_="fwd+bwd")
                for n in options.seqlen
            ]  # fmt: skip
            if options.wide or options.ws:
                found = candidates(kernel, problems[0], arch, ws=options.ws)
            else:
                found = narrowed(kernel, problems[0], arch, steps)
            if found := [config for config in found if options.only.search(str(config))]:
                grid.append((kernel, problems, found))
    return grid


def main(arguments: list[str] | None = None) -> int:
    """Sweep a grid, print the best of each cell and the table's rows, append every record to --out."""
    options = parse(arguments)
    began = time.monotonic()
    arch = options.compile_only or 10 * torch.cuda.get_device_capability()[0]
    grid = cells(options, arch)
    builds = Builds(options.builds, arch, options.workers)
    for kernel, problems, some in grid:
        builds.start([("fwd", problems[0], STARTERS["fwd"]), *((kernel, problems[0], config) for config in some)])
    if options.compile_only:
        for kernel, problems, some in grid:
            fit = builds.usable(kernel, problems[0], some)
            print(
                f"{cell_name(kernel, problems[0])}: {len(fit)} of {len(some)} at {time.monotonic() - began:.0f} s",
                flush=True,
            )
        builds.stop()
        return 0
    builds.deadline = began + options.budget
    where = {"device": torch.cuda.get_device_name(), "triton": triton.__version__, "torch": torch.__version__}
    times_of_rivals: dict[Problem, dict] = {}
    worker, raced = Worker(), {}
    with options.out.open("a") as file:
        for kernel, problems, some in grid:
            first = problems[0]
            if time.monotonic() - began > options.budget:
                print(f"budget spent before {cell_name(kernel, first)}", flush=True)
                continue

            def write(record: dict, kernel: str = kernel, problems: list[Problem] = problems) -> None:
                build = builds.of((kernel, problems[0], record["config"]))
                line = {**where, "kernel": kernel, "problems": [p.to_dict() for p in problems], **record,
                        "config": str(record["config"]), "registers": build.registers, "shared": build.shared}  # fmt: skip
                file.write(json.dumps(line) + "\n")
                file.flush()

            fit = builds.usable(kernel, first, some)
            print(f"\n{cell_name(kernel, first)} at {time.monotonic() - began:.0f} s", flush=True)
            now = present(kernel, first, arch)
            records = tune_kernel(worker, kernel, problems, fit, options.keep, options.rounds, write, now)
            for problem in problems:
                if problem not in times_of_rivals:
                    try:
                        times_of_rivals[problem] = worker.ask("rivals", problem, options.rounds, seconds=60)
                    except RuntimeError as failure:
                        print(f"   torch's kernels at {problem.key()}: {failure}", flush=True)
                        times_of_rivals[problem] = {}
                    line = {**where, "problem": problem.to_dict(), "rivals_ms": times_of_rivals[problem]}
                    file.write(json.dumps(line) + "\n")
                    file.flush()
            show(kernel, problems, records, builds, times_of_rivals)
            raced[kernel, first] = records
    worker.stop()
    builds.stop()
    print("\n" + "\n".join(rows(raced, arch)))
    print(f"done in {time.monotonic() - began:.0f} s", flush=True)
    return 0


def cell_name(kernel: str, problem: Problem) -> str:
    """What a sweep calls one of its cells."""
    return f"{kernel} {problem.precision} d{problem.head_dim} {'causal' if problem.causal else 'full'}"


def present(kernel: str, problem: Problem, arch: int, *, short: bool = False) -> TileConfig | None:
    """The table's row for a cell, or for its short problems, as it is raced: alone, and with the loops that whole
    tiles need."""
    work = "masked" if problem.causal else "full"
    block_d = max(16, triton.next_power_of_2(problem.head_dim))
    table, where = configs.table(f"sm{arch}"), (kernel, problem.precision, block_d)
    now = table.get((*where, work))
    if short:
        now = table.get((*where, f"{work}/short"), now)
    return None if now is None else now.replace(split=False, one_loop=now.one_loop and problem.causal)


def means(records: list[dict], *, short: bool) -> dict[TileConfig, float]:
    """Geometric means in milliseconds over the lengths up to configs.SHORT, or over those above, of what ran them all;
    the fastest first."""
    finals = [{n: ms for n, ms in r["ms"].items() if (n <= configs.SHORT) == short} for r in records if r["final"]]
    lengths = max(map(len, finals), default=0)
    mean = {
        record["config"]: statistics.geometric_mean(ms.values())
        for record, ms in zip((r for r in records if r["final"]), finals, strict=True)
        if lengths and len(ms) == lengths
    }
    return dict(sorted(mean.items(), key=lambda item: item[1]))


def rows(raced: dict[tuple[str, Problem], list[dict]], arch: int) -> list[str]:
    """The table's rows for what was raced, each with how it stands to the row that the table has now; one for short
    problems where it is 2 % faster there than the long ones' row."""
    lines = []
    for (kernel, problem), records in raced.items():
        long = next(iter(means(records, short=False)), None)
        for short in (False, True):
            mean = means(records, short=short)
            if not mean:
                continue
            best = next(iter(mean))
            if short and long in mean and mean[long] < 1.02 * mean[best]:
                continue
            comment = f"{mean[best]:.3f} ms"
            apart = [means(raced.get((part, problem), []), short=short) for part in ("dk", "dv")]
            if kernel == "dkdv" and all(apart):
                together, parted = mean[best], sum(next(iter(part.values())) for part in apart)
                comment += f", apart {parted:.3f} ms"
                best = best.replace(split=parted < together)
            now = present(kernel, problem, arch, short=short)
            if now in mean:
                comment += f", {mean[now] / next(iter(mean.values())):.3f}x faster than {now}"
            classes = "bf16,fp16" if problem.precision == "bf16" else problem.precision
            block_d = max(16, triton.next_power_of_2(problem.head_dim))
            work = ("masked" if problem.causal else "full") + ("/short" if short else "")
            lines.append(f"        {kernel:5} {classes:10} {block_d:3} {work:12} {best!s:36} # {comment}")
    return lines


def show(kernel: str, problems: list[Problem], records: list[dict], builds: Builds, others: dict) -> None:
    """The cell's best configurations in TFLOP/s of this kernel's own products, and torch's for scale."""
    first = problems[0]
    fwd = [p.replace(pass_="fwd").flops for p in problems]
    for record in sorted((r for r in records if r["final"]), key=lambda r: sum(r["ms"].values())):
        build = builds.of((kernel, first, record["config"]))
        speeds = "  ".join(
            f"{p.seq_q}: {ms:.3f} ms {work * MATMULS[kernel] / 2 / ms / 1e9:.0f}"
            for p, work in zip(problems, fwd, strict=True)
            if (ms := record["ms"].get(p.seq_q))
        )
        print(f"   {record['config']!s:34} {speeds}  ({build.registers} regs, err {record['error']:.1e})")
    for name in others[first]:
        column = 0 if kernel == "fwd" else 1
        print(f"   {name:34} " + "  ".join(
            f"{p.seq_q}: {others[p][name][column]:.3f} ms {work * (2.5 if column else 1) / others[p][name][column] / 1e9:.0f}"
            for p, work in zip(problems, fwd, strict=True) if name in others[p]), flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
