"""The pages declare what the code declares."""

import pytest
from feature_table import CONTRACT, END, TABLES, lacking, written

from flash2.core.contract import FEATURES, Capability


@pytest.mark.parametrize("document", TABLES, ids=lambda path: path.name)
def test_the_table_is_what_the_capabilities_say(document):
    text = document.read_text()
    assert written(text, TABLES[document]()) == text, "run: python tests/feature_table.py"


def test_every_feature_is_explained():
    text = CONTRACT.read_text()
    assert [feature for feature in FEATURES if f"`{feature}`" not in text.partition(END)[2]] == []


def test_a_document_without_markers_is_refused():
    with pytest.raises(ValueError, match="lacks"):
        written("# Contract", "table")


def test_what_is_not_declared_is_lacking():
    every = {"fp64": ("fp64",), "fp16": ("fp16",), "bf16": ("bf16",)}
    whole = Capability(
        devices=("cpu", "cuda"),
        precisions={**every, "fp32": ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")},
        features=frozenset(FEATURES),
        head_dims=range(1, 1 << 20),
    )
    assert lacking(whole) == []
    part = Capability(
        devices=("cuda",),
        precisions={"fp16": ("fp16",), "fp32": ("tf32", "tf32x3")},
        features=frozenset(FEATURES) - {"alibi"},
        min_arch=(9, 0),
        max_arch=(9, 0),
        head_dims=range(8, 257, 8),
        backward=False,
        deterministic=False,
    )
    assert lacking(part) == [
        "no CPU", "only sm_90", "no fp64", "no fp32 in ieee, bf16x3, bf16x6", "no bf16", "no alibi",
        "no head_dim above 256", "head_dim from 8 on in steps of 8", "no backward", "not the same bits every time",
    ]  # fmt: skip
