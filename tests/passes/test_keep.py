"""What `--keep` understands, and what it calls the results."""

from __future__ import annotations

import pytest

from sparsity_audit.errors import UsageError
from sparsity_audit.passes.keep import Keep, keep_folders


@pytest.mark.parametrize(
    ("text", "key", "folder", "sentence"),
    [
        ("top:5%", "top:5%", "top-5pct", "the 5 % of the compared entries with the largest |Δ|"),
        ("top:0.5%", "top:0.5%", "top-0.5pct", "the 0.5 % of the compared entries with the largest |Δ|"),
        (
            "bottom:80%",
            "bottom:80%",
            "bottom-80pct",
            "the 80 % of the entries with Δ ≠ 0 with the smallest |Δ|",
        ),
        (
            "random:1000:tensor",
            "random:1000:tensor",
            "random-1000-tensor",
            "1,000 of the compared entries, drawn at random in each tensor",
        ),
        ("mask:a/b", "mask:a/b", "mask-b", "the entries of the mask"),
        ("all", "all", "all", "every compared entry"),
        ("none", "none", "none", "no entry"),
    ],
)
def test_a_selection_is_parsed_spelled_and_said(text, key, folder, sentence) -> None:
    keep = Keep.parse(text)
    assert (keep.key, keep.folder, keep.sentence) == (key, folder, sentence)
    assert Keep.parse(keep.key) == keep


def test_per_tensor_and_complement_belong_to_the_selection() -> None:
    keep = Keep.parse("top:5%", per_tensor=True, complement=True)
    assert (keep.key, keep.folder) == ("top:5%:tensor", "top-5pct-tensor-complement")
    assert keep.sentence.startswith("all compared entries but the 5 %")
    assert Keep.parse("top:5%:global", per_tensor=True).key == "top:5%"


@pytest.mark.parametrize(
    "text",
    ["", "top", "top:", "top:0%", "top:101%", "top:1.5", "least:5%", "mask:", "all:1", "bottom:5%:row"],
)
def test_what_is_not_understood_is_answered_with_the_forms(text) -> None:
    with pytest.raises(UsageError, match="mask:DIR, all or none"):
        Keep.parse(text)


def test_two_selections_of_one_name_are_refused() -> None:
    keeps = [Keep.parse("mask:a/m"), Keep.parse("mask:b/m")]
    with pytest.raises(UsageError, match="'mask-m'"):
        keep_folders(keeps)
