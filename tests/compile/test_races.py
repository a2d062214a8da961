"""No kernel for sm_90 touches what a product in flight uses, whichever Triton compiled it.

A choice of them by default; `pytest -n auto tests/compile --every-kernel` has all.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

import wgmma
from builds import FEATURES, compiled, problem_of, shipped

from flash2.backends.triton_fa2 import offline

MATRIX = {
    f"{precision}-d{head_dim}-{feature}-{pass_}": (precision, head_dim, feature, pass_)
    for precision in ("bf16", "fp16", "tf32", "tf32x3", "bf16x3", "bf16x6")
    for head_dim in (64, 128, 256)
    for feature in FEATURES
    for pass_ in ("fwd", "bwd")
}
CHOICE = [
    "bf16-d64-full-fwd",
    "bf16-d128-causal-fwd",
    "bf16-d256-full-fwd",
    "fp16-d256-causal-fwd",
    "bf16-d256-all-fwd",
    "bf16x3-d64-full-fwd",
    "tf32-d64-causal-fwd",
    "bf16-d64-causal-bwd",
    "bf16-d256-full-bwd",
]


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", list(MATRIX) if metafunc.config.getoption("every_kernel") else CHOICE)


def kernels_of(name: str):
    """(arguments of checked(), is the kernel's configuration a row of the table?) of each kernel that multiplies."""
    problem = problem_of(*MATRIX[name])
    found = shipped(problem, 90)
    pins = {kernel: config for kernel, (config, _) in found.items()}
    for kernel in offline.planned(problem, pins):
        if kernel != "statistics":
            yield (problem, kernel, pins), found[kernel][1]


def checked(problem, kernel, pins) -> tuple[int, list[str]] | str:
    """(asynchronous products, races) of one kernel, or what its compiler says."""
    build = compiled(problem, kernel, pins, 90)
    return build if isinstance(build, str) else (build.instructions["HGMMA"], wgmma.races(build.listing))


def test_no_race(name):
    wrong = []
    for job, of_the_table in kernels_of(name):
        _, kernel, pins = job
        what, found = f"{kernel} ({pins[kernel]})", checked(*job)
        assert not isinstance(found, str), f"{what}: {found}"
        products, races = found
        if of_the_table and not products:
            wrong.append(f"{what}: no HGMMA to check")
        wrong += [f"{what}: {race}" for race in races]
    assert not wrong, "\n".join(wrong)


# ---- the check itself

# From the forward at head_dim 256 (128x64 w8 s2 tma one_loop late) by Triton 3.6, as it was when p was converted before
# the wait for the next k: a part of its loop's instructions. On the GPU its results were NaN.
EARLY = """
        /*2ae0*/                   FMNMX R13, R152, R153, !PT ;
        /*2bc0*/                   MUFU.EX2 R190, R190 ;
        /*2c40*/                   MUFU.EX2 R184, R184 ;
        /*2ef0*/                   WARPGROUP.ARRIVE ;
        /*2f60*/                   F2FP.BF16.F32.PACK_AB R190, R185, R190 ;
        /*2fa0*/                   HGMMA.64x64x16.F32.BF16 R152, gdesc[UR20], RZ, !UPT ;
        /*2fc0*/                   F2FP.BF16.F32.PACK_AB R196, R15, R196 ;
        /*3330*/                   HGMMA.64x64x16.F32.BF16 R152, gdesc[UR40], R152, gsb0 ;
        /*3340*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*3390*/                   FMUL R24, R24, R14.reuse ;
        /*3be0*/                   WARPGROUP.ARRIVE ;
        /*3c40*/                   HGMMA.64x256x16.F32.BF16 R24, R196, gdesc[UR28].tnspB, R24 ;
        /*3df0*/                   HGMMA.64x256x16.F32.BF16 R24, R192, gdesc[UR4].tnspB, R24 ;
        /*3e20*/                   HGMMA.64x256x16.F32.BF16 R24, R188, gdesc[UR28].tnspB, R24 ;
        /*3e40*/                   HGMMA.64x256x16.F32.BF16 R24, R184, gdesc[UR4].tnspB, R24, gsb0 ;
        /*4010*/              @!P0 BRA 0x2ae0 ;
        /*4050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*4060*/                   F2FP.BF16.F32.PACK_AB R11, R156, R11 ;
        /*4070*/                   STG.E.128 desc[UR30][R2.64], R24 ;
        /*4080*/                   EXIT ;
"""
OPERAND, ACCUMULATOR = "an operand of a product in flight", "the accumulator of a product in flight"
EARLY_RACES = [
    f"0x2bc0 MUFU.EX2 writes R190, {OPERAND}",
    f"0x2c40 MUFU.EX2 writes R184, {OPERAND}",
    f"0x2f60 F2FP.BF16.F32.PACK_AB writes R190, {OPERAND}",
    f"0x2fc0 F2FP.BF16.F32.PACK_AB writes R196, {OPERAND}",
]
FIRST_WAIT, LAST_WAIT = re.findall(r".*DEPBAR.*\n", EARLY)
TAKEN, ARRIVE = "@!P0 BRA 0x2ae0", "/*2ef0*/                   WARPGROUP.ARRIVE ;"


def test_the_order_that_raced_is_found():
    assert wgmma.races(EARLY) == EARLY_RACES


# What is done to EARLY -> the races it has then.
CHANGES = {
    "the loop waits first": (lambda s: s.replace("/*2ae0*/", FIRST_WAIT.strip().replace("3340", "2ad0") + "\n/*2ae0*/")
                             .replace("BRA 0x2ae0", "BRA 0x2ad0"), []),
    "no loop": (lambda s: s.replace(TAKEN, "NOP"), []),
    "a loop by a branch of its own": (lambda s: s.replace(TAKEN, "BRA P1, 0x2ae0"), EARLY_RACES),
    "a branch over the first products": (
        lambda s: s.replace("/*2ef0*/                   WARPGROUP.ARRIVE", "/*2ef0*/  @P1 BRA 0x3390"),
        [*EARLY_RACES, f"0x3390 FMUL writes R24, {ACCUMULATOR}"],
    ),
    "a wait that leaves the newer group in flight": (
        lambda s: s.replace(FIRST_WAIT, FIRST_WAIT.replace("0x0", "0x1")),
        [f"0x2ae0 FMNMX reads R152, {ACCUMULATOR}", *EARLY_RACES],
    ),
    "no wait at the end": (lambda s: s.replace(LAST_WAIT, ""), [*EARLY_RACES, f"0x4070 STG.E.128 reads R24, {ACCUMULATOR}"]),
    "a wide load into the last register of an operand": (
        lambda s: s.replace("/*2bc0*/                   MUFU.EX2 R190, R190", "/*2bc0*/  LDS.128 R181, [R3]"),
        [EARLY_RACES[0].replace("MUFU.EX2", "LDS.128").replace("R190", "R184"), *EARLY_RACES[1:]],
    ),
    "one beside it": (
        lambda s: s.replace("/*2bc0*/                   MUFU.EX2 R190, R190", "/*2bc0*/  LDS.128 R180, [R3]"),
        EARLY_RACES[1:],
    ),
    "products that no branch leads to": (
        lambda s: s.replace("WARPGROUP.ARRIVE", "BRA 0x4050", 1),
        ["0x2fa0 HGMMA.64x64x16.F32.BF16 was not reached", "0x3330 HGMMA.64x64x16.F32.BF16 was not reached",
         *(f"0x{n} HGMMA.64x256x16.F32.BF16 was not reached" for n in ("3c40", "3df0", "3e20", "3e40"))],
    ),
    "products that an indirect branch leads to": (
        lambda s: "/*2ad0*/ BRX R2 -0x2ae0 ;\n" + s.replace("WARPGROUP.ARRIVE", "BRA 0x4050", 1), EARLY_RACES[:2]),
    "products that read p from shared memory": (lambda s: re.sub(r"R24, R\d+, gdesc", "R24, gdesc[UR60], gdesc", s), []),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_found_after_a_change(change):
    altered, want = CHANGES[change]
    assert (listing := altered(EARLY)) != EARLY
    assert wgmma.races(listing) == want


def test_functions_are_apart():
    """What one leaves in flight is no concern of the next."""
    function = "        Function : f\n"
    assert wgmma.races(function + EARLY.replace(TAKEN, "NOP") + function + EARLY.replace(TAKEN, "NOP")) == []
