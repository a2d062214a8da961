"""backend="auto": the fastest backend that can run the problem, by a table of what was measured (auto.json).

    python -m flash2.core.auto docs/results/*/*.jsonl     # make the table anew of results files

Where nothing like the problem was measured, the order is the table's `assumed` one. Only what supports the problem is
ever picked, and `bench.py explain` says what was, why, and what the others lacked.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flash2 import core
from flash2.core import functional
from flash2.core.contract import DTYPE_NAMES, FEATURES, Backend, Capability, Spec
from flash2.core.problem import PRECISIONS, Problem
from flash2.core.results import Result, read_results
from flash2.core.training import runs

TABLE = Path(__file__).with_name("auto.json")
# The order where nothing was measured: by device class, else by kind of device. Guessed from how the kernels are built.
ASSUMED = {
    "sm_90": ["gluon", "cupy", "triton", "fa4", "fa3", "sdpa", "fa2", "sdpa-math", "naive"],
    "cuda": ["triton", "fa4", "fa2", "sdpa", "sdpa-math", "naive"],
    "cpu": ["numba", "sdpa", "sdpa-math", "naive"],
}
OURS = ("gluon", "cupy", "triton", "numba")
# Measured beside them, but nobody's choice: they compile for every shape, are the reference, or another's slower twin.
NEVER = ("flex", "naive", "auto", "gluon-deterministic", "numba-cuda")


def device_class(device: torch.device) -> str:
    """What the table knows a device by: cpu, or the architecture, as in sm_90."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


class Row(NamedTuple):
    """Backends on problems of one kind, the fastest first."""

    precision: str
    pass_: str
    mask: str  # full, causal, window
    head_dim: int
    seq: int  # keys
    order: list[str]

    def distance(self, problem: Problem) -> float:
        """How unlike `problem` what was measured is: another mask counts like four times the length."""
        off = abs(math.log2(self.head_dim / problem.head_dim)) * 2 + abs(math.log2(self.seq / max(problem.seq_kv, 1)))
        return off + 2 * (self.mask != mask_of(problem))


def mask_of(problem: Problem) -> str:
    """full, causal or window."""
    if problem.window is not None:
        return "window"
    return "causal" if problem.causal else "full"


class Table:
    """The rows of each device class."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.assumed: dict[str, list[str]] = fields["assumed"]
        self.rows = {device: [Row(*row) for row in rows] for device, rows in fields["measured"].items()}

    def order(self, problem: Problem, device: torch.device) -> tuple[list[str], str]:
        """(backends in the order in which they are to be asked, where that order comes from)."""
        kind = device_class(device)
        assumed = self.assumed.get(kind) or self.assumed.get(device.type, [])
        rows = [
            row for row in self.rows.get(kind, ())
            if row.precision == problem.precision and row.pass_ == problem.pass_
        ]  # fmt: skip
        if not rows:
            return assumed, f"an assumed order: nothing was measured for {problem.precision} {problem.pass_} on {kind}"
        nearest = min(rows, key=lambda row: row.distance(problem))
        why = (
            f"measured on {kind}: {nearest.precision} {nearest.pass_} {nearest.mask} d{nearest.head_dim} n{nearest.seq}"
        )
        return list(dict.fromkeys([*nearest.order, *assumed])), why


class Auto(Backend):
    """Hands each problem to the fastest backend that can run it, by name: core.find_backend() finds them."""

    name = "auto"
    autograd = True  # what is picked differentiates in its own way
    settled = True  # an admitted call is picked for again, by what holds then
    capability = Capability(
        devices=("cpu", "cuda"),
        precisions={  # fp32 in the class that is both fast and exact, where there is hardware for it
            "fp64": ("fp64",), "fp32": ("bf16x6", *(c for c in PRECISIONS["fp32"] if c != "bf16x6")),
            "fp16": ("fp16",), "bf16": ("bf16",),
        },
        features=frozenset(FEATURES) - {"hidden-nan"},
        head_dims=range(1, 1 << 16),
        deterministic=False,
    )  # fmt: skip

    def __init__(self, table: Table | None = None, find: Callable[[str, str], Backend] | None = None) -> None:
        self._given, self._find = table, find
        self._picks: dict[tuple, Backend] = {}

    @functools.cached_property
    def table(self) -> Table:
        """The one it was given, else auto.json."""
        return self._given or Table(json.loads(TABLE.read_text()))

    def capability_on(self, device):
        """On a CPU fp32 is IEEE."""
        if device.type != "cpu":
            return self.capability
        return _on_cpu

    def version(self):
        """How many kinds of problems the table has."""
        return f"table of {sum(map(len, self.table.rows.values()))} rows"

    def why_not(self, problem, device):
        """Nothing if anybody can run it, else what each lacks."""
        picked, refused = self._consult(problem, device, lse=False)
        return [] if picked else [f"{name}: {reason}" for name, reason in refused]

    def details(self, problem, device):
        """What is picked, by which row, and why those before it are not."""
        picked, refused = self._consult(problem, device, lse=False)
        passed = [f"not {name}: {reason}" for name, reason in refused]
        if picked is None:
            return passed
        return [f"{picked.name}, {self.table.order(problem, device)[1]}", *passed, *picked.details(problem, device)]

    def pick(self, problem: Problem, device: torch.device, *, lse: bool = False) -> Backend:
        """The first of the table's order that can run `problem`, with an lse if asked.

        Raises NotImplementedError with everybody's reasons when there is none.
        """
        picked, refused = self._consult(problem, device, lse)
        if picked is None:
            said = "; ".join(f"{name}: {reason}" for name, reason in refused)
            raise NotImplementedError(f"backend 'auto': nobody can run {problem.key()}: {said}")
        return picked

    def scratch_bytes(self, problem):
        """Of the one that is picked on this machine."""
        picked, _ = self._consult(problem, torch.device("cuda" if torch.cuda.is_available() else "cpu"), lse=False)
        return picked.scratch_bytes(problem) if picked else 0

    def forward(self, q, k, v, spec):
        """By whom pick() names."""
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        backend = functional.constant(self._picked, q.shape, k.shape, q.dtype, q.device, _hashable(spec), needs_grad)
        return functional.run(backend, q, k, v, spec, needs_grad=needs_grad)

    def _picked(self, *call) -> Backend:
        backend = self._picks.get(call)
        if backend is None:
            q_shape, k_shape, dtype, device, (scale, precision, causal, window, softcap, alibi, lse), needs_grad = call
            problem = Problem(
                batch=q_shape[0], heads_q=q_shape[1], heads_kv=k_shape[1], seq_q=q_shape[2], seq_kv=k_shape[2],
                head_dim=q_shape[3], dtype=DTYPE_NAMES[dtype], precision=precision, causal=causal, window=window,
                softcap=softcap, alibi=alibi, scale=None if scale == q_shape[3] ** -0.5 else scale,
                pass_="fwd+bwd" if needs_grad else "fwd",
            )  # fmt: skip
            backend = self.pick(problem, device, lse=lse)
            # Whoever is not settled may answer otherwise next time.
            if all(asked.settled for asked in self._asked(problem, device, backend)):
                if len(self._picks) >= 1 << 12:
                    self._picks.clear()
                self._picks[call] = backend
        return backend

    def _asked(self, problem: Problem, device: torch.device, picked: Backend) -> Iterable[Backend]:
        for name in self.table.order(problem, device)[0]:
            backend = self._named(name, device)
            if isinstance(backend, Backend):
                yield backend
                if backend is picked:
                    return

    def _named(self, name: str, device: torch.device) -> Backend | str:
        try:
            return (self._find or core.find_backend)(name, device.type)
        except (ValueError, ImportError) as error:  # a table from another version, a plug-in that is gone
            return str(error).split(";")[0]

    def _consult(
        self, problem: Problem, device: torch.device, lse: bool
    ) -> tuple[Backend | None, list[tuple[str, str]]]:
        """(who runs it, why each of those before does not)."""
        refused = []
        for name in self.table.order(problem, device)[0]:
            backend = self._named(name, device)
            if isinstance(backend, str):
                reasons = [backend]
            elif (reason := backend.unavailable()) is not None:
                reasons = [reason]
            else:
                reasons = backend.why_not(problem, device)
                if lse and "lse" not in backend.capability_on(device).features:
                    reasons = [*reasons, "no lse (return_lse=True)"]
                if not reasons:
                    return backend, refused
            refused.append((name, ", ".join(reasons)))
        return None, refused


_on_cpu = Capability(
    devices=("cpu",),
    precisions={dtype: classes[:1] for dtype, classes in PRECISIONS.items()},
    features=Auto.capability.features,
    head_dims=Auto.capability.head_dims,
    deterministic=False,
)


def _hashable(spec: Spec) -> tuple:
    alibi = spec.alibi_slopes is not None
    return spec.scale, spec.precision, spec.causal, spec.window, spec.softcap, alibi, spec.lse


# ---- the table


def rows_of(results: Iterable[Result]) -> dict[str, list[Row]]:
    """device class -> a Row for each kind of problem on which two or more backends were measured and right.

    One of our own kernels must be among them, or a comparison of other people's would put theirs in front.
    Several problems of one kind (batches, heads) count equally: what is averaged is the time over the best one's.
    Times of the forward and the backward of a problem add up to those of `fwd+bwd`.
    """
    times: dict[tuple[str, Problem], dict[str, float]] = defaultdict(dict)
    for result in results:
        if result.status == "ok" and result.ms is not None and result.backend not in NEVER:
            kind = result.environment.get("arch", "cpu")
            times[kind, result.problem][result.backend] = result.ms.median
    for (kind, problem), forward in list(times.items()):
        backward = times.get((kind, problem.replace(pass_="bwd")), {})
        if problem.pass_ == "fwd" and backward:
            both = {name: forward[name] + backward[name] for name in forward if name in backward}
            times[kind, problem.replace(pass_="fwd+bwd")] |= both
    slower: dict[tuple[str, str, str, str, int, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (kind, p), cell in times.items():
        if len(cell) > 1 and set(cell) & set(OURS):
            for name, ms in cell.items():
                key = kind, p.precision, p.pass_, mask_of(p), p.head_dim, p.seq_kv
                slower[key][name].append(math.log(ms / min(cell.values())))
    rows = defaultdict(list)
    for (kind, precision, pass_, mask, head_dim, seq), cells in sorted(slower.items()):
        most = max(map(len, cells.values()))
        ranked = {name: sum(logs) / len(logs) for name, logs in cells.items() if len(logs) == most}
        order = sorted(ranked, key=lambda name: (ranked[name], name))
        rows[kind].append(Row(precision, pass_, mask, head_dim, seq, order))
    return dict(rows)


def written(files: Sequence[Path], root: Path = Path()) -> str:
    """The text of auto.json, from results files named relative to `root`; training runs among them count for nothing."""
    files = [file for file in files if not runs.holds_runs(root / file)]
    measured = rows_of(result for file in files for result in read_results(root / file))
    lines = ["{", f'  "assumed": {json.dumps(ASSUMED)},']
    lines.append(f'  "from": {json.dumps([file.as_posix() for file in files])},')
    lines.append('  "measured": {')
    kinds = []
    for kind, rows in measured.items():
        kinds.append(f'    "{kind}": [\n' + ",\n".join(f"      {json.dumps(row)}" for row in rows) + "\n    ]")
    return "\n".join([*lines, ",\n".join(kinds), "  }", "}"]) + "\n"


if __name__ == "__main__":
    TABLE.write_text(written([Path(name) for name in sys.argv[1:]]))
