"""Hopper's asynchronous products in SASS: is a register touched while one may still read or write it?

HGMMA returns before the tensor cores are done. Until WARPGROUP.DEPBAR its accumulator may be neither read nor written
and the registers of its A operand not written (PTX ISA, wgmma.mma_async). A compiler that converts the next tile's
operand too early breaks that, and the outcome depends on who is faster.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
REGISTER = re.compile(r"(?<![A-Z])R(\d+)")
PREDICATE = re.compile(r"!?U?P[T0-9]$")
# Their first operand is read, whatever it is.
NO_RESULT = re.compile(r"BAR|BRA|BRX|JMX|CALL|RET|EXIT|NANOSLEEP|WARPSYNC|DEPBAR|R2P|[A-Z0-9]*SETP")
WIDE = {"128": 4, "64": 2, "WIDE": 2}
MOST_GROUPS = 8


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line: its address, is it predicated, opcode, the registers it reads and writes, where it may jump.

    An asynchronous product (HGMMA) has `operand`, the registers of A, and `accumulator`; one that `commits` ends a
    group. A wait (WARPGROUP.DEPBAR) has `leaves`, how many groups may be pending after it.
    """

    address: int
    guarded: bool
    opcode: str
    reads: frozenset[int] = frozenset()
    writes: frozenset[int] = frozenset()
    target: int | None = None
    operand: frozenset[int] = frozenset()
    accumulator: frozenset[int] = frozenset()
    commits: bool = False
    leaves: int | None = None

    @property
    def leaps(self) -> bool:
        """Does, or if guarded may, the next instruction not follow?"""
        return self.target is not None or self.opcode in ("EXIT", "BRX")


Group = tuple[frozenset[int], frozenset[int]]  # the registers that a group of products reads, and accumulates in
NOTHING: Group = (frozenset(), frozenset())


def races(listing: str) -> list[str]:
    """Each instruction of a cubin's SASS that touches what a product in flight uses, in words, and each product that no
    way leads to.

    Every way through every function is followed, around loops too, until nothing new can be pending.
    """
    found = []
    for function in re.split(r"^\s*Function : ", listing, flags=re.MULTILINE):
        found += _races([parse(match) for match in LINE.finditer(function)])
    return found


def _races(code: list[Instruction]) -> list[str]:
    place = {now.address: n for n, now in enumerate(code)}
    # Where an indirect branch may lead: the listing does not say.
    anywhere = [n for n, before in enumerate(code, 1) if before.leaps and not before.guarded]
    found = {now.address: f"{now.address:#06x} {now.opcode} was not reached" for now in code if now.accumulator}
    reached: set[int] = set()
    seen: set[tuple[int, tuple[Group, ...]]] = set()
    # The groups in flight, the oldest first; the last is the one that is not committed yet.
    todo: list[tuple[int, tuple[Group, ...]]] = [(0, (NOTHING,))]
    while todo:
        n, groups = todo.pop()
        while n < len(code):
            now = code[n]
            if now.accumulator and n not in reached:
                reached.add(n)
                del found[now.address]
            if now.leaves is not None:
                groups = (*groups[max(len(groups) - 1 - now.leaves, 0) : -1], groups[-1])
            if what := clash(now, groups):
                found[now.address] = f"{now.address:#06x} {now.opcode} {what}"
            if now.accumulator:
                reading, accumulating = groups[-1]
                groups = (*groups[:-1], (reading | now.operand, accumulating | now.accumulator))
                if now.commits:
                    groups = (*groups, NOTHING)
                    if len(groups) > MOST_GROUPS:
                        oldest = groups[0][0] | groups[1][0], groups[0][1] | groups[1][1]
                        groups = (oldest, *groups[2:])
            if now.leaps:
                known = [place[now.target]] if now.target in place else []
                entries = {(to, groups) for to in (anywhere if now.opcode == "BRX" else known)}
                todo += entries - seen
                seen |= entries
                if not now.guarded:
                    break
            n += 1
    return [found[address] for address in sorted(found)]


def clash(now: Instruction, groups: tuple[Group, ...]) -> str:
    """What `now` touches of the products in flight; the next product may go on with their accumulator."""
    operands = frozenset().union(*(reading for reading, _ in groups))
    accumulators = frozenset().union(*(accumulating for _, accumulating in groups))
    if bad := now.writes & operands or now.accumulator & operands:
        return f"writes R{min(bad)}, an operand of a product in flight"
    if bad := now.writes & accumulators:
        return f"writes R{min(bad)}, the accumulator of a product in flight"
    if bad := (now.reads | now.operand) & accumulators:
        return f"reads R{min(bad)}, the accumulator of a product in flight"
    return ""


def parse(line: re.Match[str]) -> Instruction:
    """One match of LINE."""
    address, guard, opcode, text = int(line[1], 16), line[2], line[3], line[4].strip()
    parts = opcode.split(".")
    operands = [operand.strip() for operand in text.split(",")] if text else []
    guarded = guard is not None or (parts[0] == "BRA" and len(operands) > 1)
    if parts[0] == "HGMMA":
        return product(address, guarded, opcode, parts, operands)
    if opcode.startswith("WARPGROUP.DEPBAR"):
        return Instruction(address, guarded, opcode, leaves=int(operands[-1], 16))
    target = int(operands[-1].split()[-1], 16) if parts[0] == "BRA" else None
    while operands and PREDICATE.match(operands[0]):
        operands = operands[1:]
    wide = max((WIDE.get(part, 1) for part in parts[1:]), default=1)
    if parts[0] == "LDSM":
        wide = int(parts[-1]) if parts[-1].isdigit() else 1
    elif parts[0] == "HMMA":
        wide = 4 if "F32" in parts else 2
    writes = frozenset()
    if operands and not NO_RESULT.match(parts[0]) and (result := re.fullmatch(r"R(\d+)(\.\w+)*", operands[0])):
        writes, operands = span(int(result[1]), wide), operands[1:]
    reads = frozenset(int(number) for operand in operands for number in REGISTER.findall(operand))
    return Instruction(address, guarded, opcode, reads, writes, target)


def product(address: int, guarded: bool, opcode: str, parts: list[str], operands: list[str]) -> Instruction:
    """HGMMA.64xNxK.TYPE.. D, A, B, C: a thread holds N / 2 registers of D in float32, and four of A, if A is in any."""
    columns = int(parts[1].split("x")[1])
    first = re.match(r"R(\d+)", operands[1])
    return Instruction(
        address, guarded, opcode,
        operand=span(int(first[1]), 4) if first else frozenset(),
        accumulator=span(int(operands[0][1:]), columns // (2 if parts[2] == "F32" else 4)),
        commits=operands[-1].startswith("gsb"),
    )  # fmt: skip


def span(first: int, count: int) -> frozenset[int]:
    """Registers first, first + 1, ..."""
    return frozenset(range(first, first + count))
