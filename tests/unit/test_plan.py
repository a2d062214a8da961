"""Options say the same on the command line, in a file and in a preset; what they cannot be is said in words."""

import pytest

from flash2.core import plan


@pytest.mark.parametrize(("text", "value"), [("512", 512), ("2k", 2048), ("1m", 1 << 20), (" 8K ", 8192)])
def test_sizes(text, value):
    assert plan.size(text) == value


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5k", "k", "1g", "99999999999", "2147483648", "2048m"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="is no size"):
        plan.size(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("none", None), ("1024:0", (1024, 0)), ("1024:", (1024, None)), ("1024", (1024, None)), (":3", (None, 3))],
)
def test_windows(text, value):
    assert plan.window(text) == value


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("sequence", "1", "unknown option 'sequence'; known: backends"),
        ("dtype", "int8", "dtype: 'int8' is not one of fp64, fp32, fp16, bf16"),
        ("backends", "a,,b", "empty item"),
        ("window", "a:b", "is no window"),
        ("softcap", "-1", "not a number from 0"),
        ("seed", "x", "not an integer"),
        ("causal", "maybe", "yes, no, both"),
        ("timeout", "nan", "not a number"),
    ],
)
def test_a_bad_value_names_the_option_and_the_choices(name, text, says):
    with pytest.raises(ValueError, match=says):
        plan.parse_option(name, text)


def problems(**given):
    given = {name.replace("_", "-"): text for name, text in given.items()}
    return plan.problems(plan.effective(given, {}, "cuda"))


def test_the_default_on_a_gpu_is_the_seeds_table():
    found = problems()
    assert [p.seq_q for p in found] == [512, 1024, 2048, 4096, 8192]
    assert all(
        (p.batch * p.seq_q, p.heads_q, p.head_dim, p.dtype, p.causal) == (16384, 32, 64, "fp32", False) for p in found
    )


def test_every_preset_gives_problems():
    for name in plan.PRESETS:
        assert problems(preset=name)
    assert {(p.head_dim, p.heads_q) for p in problems(preset="fa")} == {(64, 32), (128, 16), (256, 8)}


def test_the_command_line_wins_over_file_over_preset(tmp_path):
    (tmp_path / "c.toml").write_text('preset = "llama3-8b"\nseqlen = [256, "1k"]\nalibi = true\nbatch = 2\n')
    config = plan.read_config(str(tmp_path / "c.toml"))
    found = plan.problems(plan.effective({"seqlen": "128"}, config, "cpu"))
    assert [(p.seq_q, p.heads_q, p.heads_kv, p.batch, p.alibi) for p in found] == [(128, 32, 8, 2, True)]


def test_print_config_is_a_config(tmp_path):
    texts = plan.effective({"preset": "mistral-7b", "pass": "fwd,bwd"}, {}, "cuda")
    (tmp_path / "c.toml").write_text(plan.to_toml(texts))
    assert plan.problems(plan.effective({}, plan.read_config(str(tmp_path / "c.toml")), "cpu")) == plan.problems(texts)


@pytest.mark.parametrize("text", ["heads 3", 'sequence = "1"', 'dtype = "int8"', "seqlen = -1"])
def test_a_bad_file_is_named(tmp_path, text):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ValueError, match=r"c\.toml"):
        plan.read_config(str(tmp_path / "c.toml"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"batch": "2", "tokens": "1k"}, "batch and tokens"),
        ({"heads": "2", "hidden": "128"}, "heads and hidden"),
        ({"tokens": "1000", "seqlen": "512"}, "tokens 1000 is not a multiple of seqlen 512"),
        ({"heads": "3", "kv_heads": "2"}, "not a multiple of heads_kv"),
    ],
)
def test_contradictions(given, says):
    with pytest.raises(ValueError, match=says):
        problems(**given)


def test_cells_follow_the_classes_asked_for():
    problem = problems()[0]
    classes = {"a": {"fp32": ["ieee", "tf32"]}, "b": {"fp32": ["tf32x3"]}, "c": {"bf16": ["bf16"]}}
    assert plan.cells(problem, ["default"], classes) == [("a", "ieee"), ("b", "tf32x3"), ("c", "ieee")]
    assert plan.cells(problem, ["all"], classes) == [("a", "ieee"), ("a", "tf32"), ("b", "tf32x3"), ("c", "ieee")]
    assert plan.cells(problem, ["tf32", "bf16"], classes) == [("a", "tf32"), ("b", "tf32"), ("c", "tf32")]
