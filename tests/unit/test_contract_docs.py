"""docs/contract.md declares what the code declares."""

import pytest
from feature_table import DOCUMENT, END, written

from flash2.core.contract import FEATURES


def test_the_table_is_what_the_capabilities_say():
    text = DOCUMENT.read_text()
    assert written(text) == text, "run: python tests/feature_table.py"


def test_every_feature_is_explained():
    text = DOCUMENT.read_text()
    assert [feature for feature in FEATURES if f"`{feature}`" not in text.partition(END)[2]] == []


def test_a_document_without_markers_is_refused():
    with pytest.raises(ValueError, match="lacks"):
        written("# Contract")
