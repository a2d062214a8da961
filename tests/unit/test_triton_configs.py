"""Which configuration a Triton kernel gets: pins, this machine's cache, the table, the fallback; and their words."""

from __future__ import annotations

import dataclasses
import json

import pytest

triton = pytest.importorskip("triton")

from flash2.backends.triton_fa2 import configs  # noqa: E402
from flash2.backends.triton_fa2.configs import Key, TileConfig, parse  # noqa: E402

KEY = Key(kernel="fwd", arch="sm90", precision="bf16", block_d=128, work="full", seq="long")
UNKNOWN = Key(kernel="fwd", arch="sm80", precision="bf16", block_d=128, work="full", seq="long")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nobody's cache and nobody's pins."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FLASH2_TRITON_PIN", raising=False)
    forget()
    yield tmp_path / "flash2" / "triton.json"
    forget()


def forget():
    """As a new process begins."""
    for function in (configs.pins_of_environment, configs.cached, configs._cache):
        function.cache_clear()


@pytest.mark.parametrize("config", [
    TileConfig(block_m=64, block_n=128),
    TileConfig(block_m=64, block_n=128, max_regs=168, late=True),
    TileConfig(block_m=16, block_n=16, num_warps=1, num_stages=1, tma=True, ws=True, one_loop=True, late=True,
               prepared=True, resident=True, mixed=True, split=True),
])  # fmt: skip
def test_text_and_back(config):
    assert parse(str(config)) == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "ROWSxKEYS"),
        ("64x128", "ROWSxKEYS"),
        ("64x128 w4 s2 tna", "unknown flag 'tna'"),
        ("64x100 w4 s2", "powers of two"),
        ("8x64 w4 s2", "powers of two"),
        ("64x64 w3 s2", "powers of two"),
        ("64x64 w4 s0", "stages"),
        ("64x64 w4 s2 r512", "registers 24 to 255"),
        ("64x64 r168 w4 s2", "ROWSxKEYS"),
    ],
)
def test_a_wrong_configuration_is_told_what_one_is(text, says):
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_every_row_of_the_tables_is_for_a_kernel_and_class_there_is():
    for arch in configs.TABLES:
        rows = configs.table(arch)
        assert rows
        for (kernel, precision, block_d, work), config in rows.items():
            assert kernel in configs.KERNELS
            assert precision in ("bf16", "fp16", "tf32", "bf16x6", "bf16x3", "tf32x3", "ieee")
            assert block_d in (16, 32, 64, 128, 256)
            work, _, length = work.partition("/")
            assert work in configs.WORK
            assert length in ("", "short")
            assert {(kernel, precision, block_d, kind) for kind in ("full", "masked")} <= set(
                rows
            )  # nobody tunes one alone
            if config.split:
                assert kernel == "dkdv"
                assert {(kind, precision, block_d, work) for kind in ("dk", "dv")} <= set(rows)


@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm90", "sm100", "sm120"])
def test_a_fallback_needs_no_descriptors_and_little_shared_memory(arch):
    """It serves an arch that nobody raced, and tensors that no descriptor describes."""
    for kernel in configs.KERNELS:
        for precision in ("bf16", "fp16", "tf32", "bf16x6", "bf16x3", "tf32x3", "ieee"):
            for block_d in (16, 32, 64, 128, 256):
                key = Key(kernel=kernel, arch=arch, precision=precision, block_d=block_d, work="dressed", seq="long")
                config = configs.fallback(key)
                assert not (
                    config.tma or config.ws or config.prepared or config.resident or config.mixed or config.split
                )
                element = 2 if precision in ("bf16", "fp16") else 4
                step = config.block_m if kernel in ("dkdv", "dk", "dv") else config.block_n
                assert 2 * config.num_stages * step * block_d * element <= 101_376, (key, config)


def test_every_fallback_is_of_a_kernel_and_class_there_is():
    for arch in configs.FALLBACKS:
        assert arch in ("any", "sm80", "sm86", "sm90", "sm100", "sm120")
        for kernel, precision, block_d, work in configs._fallbacks(arch):
            assert kernel in ("fwd", "dkdv", "dq")
            assert precision in ("bf16", "fp16", "tf32", "bf16x6", "bf16x3", "tf32x3", "ieee")
            assert block_d in (32, 64, 128, 256)
            assert work == "any"


def test_a_row_serves_the_smaller_head_dims_but_no_larger_one():
    assert configs.known(KEY) == configs.table("sm90")["fwd", "bf16", 128, "full"]
    small = Key(kernel="fwd", arch="sm90", precision="bf16", block_d=16, work="masked", seq="short")
    assert configs.known(small) == configs.table("sm90")["fwd", "bf16", 64, "masked/short"]
    dressed = dataclasses.replace(KEY, kernel="dkdv", work="dressed")
    assert configs.known(dressed) == configs.table("sm90")["dkdv", "bf16", 128, "dressed"]
    plain = dataclasses.replace(KEY, work="dressed")  # has no row of its own
    assert configs.known(plain) == configs.table("sm90")["fwd", "bf16", 128, "masked"]
    wide = Key(kernel="fwd", arch="sm90", precision="tf32", block_d=256, work="masked", seq="short")
    assert configs.known(wide) is None
    assert configs.choose(wide) == (configs.fallback(wide), "fallback")  # a known device tunes nothing


def test_a_short_problem_has_its_own_row_where_there_is_one(monkeypatch):
    rows = configs.parse_rows("""
        fwd bf16 64 full        64x128 w4 s2
        fwd bf16 64 full/short  64x64 w4 s2
        fwd bf16 64 masked      32x32 w4 s2
    """)
    monkeypatch.setattr(configs, "table", lambda arch: rows)
    for seq, work, text in (
        ("long", "full", "64x128 w4 s2"), ("short", "full", "64x64 w4 s2"), ("short", "dressed", "32x32 w4 s2"),
    ):  # fmt: skip
        assert configs.known(dataclasses.replace(KEY, block_d=64, seq=seq, work=work)) == parse(text)


def test_order_of_the_sources(monkeypatch):
    row = configs.known(KEY)
    assert configs.choose(KEY, "GPU") == (row, "table")
    assert configs.choose(UNKNOWN, "GPU") is None
    mine = parse("32x32 w4 s1")
    configs.keep("GPU", KEY, mine)
    assert configs.choose(KEY, "GPU") == (mine, "tuned on this machine")
    assert configs.choose(KEY, "another GPU") == (row, "table")
    monkeypatch.setenv("FLASH2_TRITON_PIN", "fwd=16x16 w1 s1; dq=32x64 w4 s2")
    configs.pins_of_environment.cache_clear()
    assert configs.choose(KEY, "GPU") == (parse("16x16 w1 s1"), "FLASH2_TRITON_PIN")


def test_the_cache_outlives_the_process_and_joins_with_other_writers(own_cache):
    configs.keep("GPU", UNKNOWN, parse("32x32 w4 s1"))
    other = json.loads(own_cache.read_text())
    other[next(iter(other))]["dq-sm80-bf16-d64-full-long"] = "64x64 w4 s2"
    own_cache.write_text(json.dumps(other))
    forget()
    configs.keep("GPU", KEY, parse("16x16 w1 s1"))
    forget()
    assert configs.choose(UNKNOWN, "GPU") == (parse("32x32 w4 s1"), "tuned on this machine")
    assert set(configs.cached("GPU")) == {str(UNKNOWN), str(KEY), "dq-sm80-bf16-d64-full-long"}


@pytest.mark.parametrize("content", ["{", "[]", '{"GPU": 3}', "\x00"])
def test_a_broken_cache_is_named_and_passed_over(own_cache, content):
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text(content)
    with pytest.warns(UserWarning, match="triton.json is not readable"):
        assert configs.choose(KEY, "GPU") == (configs.known(KEY), "table")


def test_a_row_of_another_format_in_the_cache_is_passed_over(own_cache):
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text(json.dumps({f"GPU, triton {triton.__version__}": {str(KEY): "fast please"}}))
    assert configs.choose(KEY, "GPU") == (configs.known(KEY), "table")


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "flash2").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="is not kept"):
        configs.keep("GPU", UNKNOWN, parse("32x32 w4 s1"))
    assert configs.choose(UNKNOWN, "GPU") == (parse("32x32 w4 s1"), "tuned on this machine")


@pytest.mark.parametrize("text", ["forward=64x64 w4 s2", "fwd 64x64 w4 s2", "fwd=64x64"])
def test_a_wrong_pin_is_told_what_one_is(text):
    with pytest.raises(ValueError, match=r"kernels: fwd|for example"):
        configs.parse_pins(text)


def test_pins_of_a_backend():
    from flash2.backends.triton_fa2 import TritonFA2

    backend = TritonFA2()
    assert backend.pin(fwd="64x64 w4 s2 tma") is backend
    assert backend.pins == {"fwd": parse("64x64 w4 s2 tma")}
    assert backend.pin().pins == {}
    with pytest.raises(ValueError, match="kernels: fwd"):
        backend.pin(forward="64x64 w4 s2")
