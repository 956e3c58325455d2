"""The card of a mask: its numbers, its YAML, and that its code reads the bits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sparsity_audit import mask_export, mask_info, mask_ops
from sparsity_audit.api.card import card_text, mask_card
from sparsity_audit.errors import MaskError, UsageError

ENCODINGS = ["packed", "bool", "indices", "pt"]


@pytest.fixture(scope="module")
def masks(addition, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("masks")
    pair = addition / "base-bf16", addition / "grpo-bf16-lr1e-4-seed0"
    for encoding in ENCODINGS:
        mask_export(*pair, folder / encoding, encoding=encoding)
    return {encoding: folder / encoding for encoding in ENCODINGS}


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_code_on_the_card_reads_the_mask(masks, encoding, monkeypatch):
    card = mask_card(masks[encoding])
    monkeypatch.chdir(masks[encoding])
    found: dict[str, Any] = {}
    exec(code_of(card), found)
    info = mask_info(masks[encoding])
    assert {n: (m.shape, int(m.sum())) for n, m in found["mask"].items()} == {
        t.name: (t.shape, t.selected) for t in info.tensors
    }


def test_odd_shapes_are_read_by_the_code_too(write_checkpoint, tmp_path, monkeypatch):
    arrays = {
        "scalar": np.float32(1.0),
        "empty": np.zeros((0, 3), np.float32),
        "odd": np.arange(21, dtype=np.float32).reshape(3, 7),
    }
    base = write_checkpoint("base", {n: np.asarray(a) for n, a in arrays.items()})
    tuned = write_checkpoint(
        "tuned", {n: np.asarray(a) + np.float32(n != "empty") for n, a in arrays.items()}
    )
    mask_export(base, tuned, tmp_path / "mask")
    monkeypatch.chdir(tmp_path / "mask")
    found: dict[str, Any] = {}
    exec(code_of(mask_card(tmp_path / "mask")), found)
    assert {n: m.shape for n, m in found["mask"].items()} == {n: np.shape(a) for n, a in arrays.items()}
    assert all(m.all() for m in found["mask"].values())


def test_the_table_sums_to_the_masks_own_counts(masks):
    info = mask_info(masks["packed"])
    rows = re.findall(
        r"^\| (\w+) \| (\d+) \| ([\d,]+) \| ([\d,]+) \| [\d.]+ % \|$", card_text(info), re.MULTILINE
    )
    counts = np.array([[int(cell.replace(",", "")) for cell in row[1:]] for row in rows])
    assert counts.sum(axis=0).tolist() == [len(info.tensors), info.compared, info.selected]
    assert {row[0] for row in rows} >= {"q_proj", "down_proj", "norm", "embed", "head"}


def test_the_card_says_polarity_criterion_view_and_that_it_does_not_prune(masks):
    card = mask_card(masks["packed"])
    for text in (
        "| polarity | 1 = updated |",
        "| criterion | `value` |",
        "| view | native |",
        "not a pruning mask",
    ):
        assert text in card


def test_the_front_matter_is_yaml_and_names_a_base_from_the_hub(masks):
    from dataclasses import replace

    from sparsity_audit.masks.metadata import SourceReference

    info = mask_info(masks["packed"])
    local = yaml.safe_load(card_text(info).split("---\n")[1])
    assert local == {"tags": ["sparsity-audit", "update-mask"]}
    hub = SourceReference(reference="org/model", resolved="hf://org/model@" + "a" * 40)
    named = replace(info, metadata=replace(info.metadata, base=hub))
    assert yaml.safe_load(card_text(named).split("---\n")[1])["base_model"] == ["org/model"]


def test_hostile_references_do_not_leave_their_cell(masks):
    from dataclasses import replace

    from sparsity_audit.masks.metadata import SourceReference

    info = mask_info(masks["packed"])
    bad = SourceReference(reference="x`|\n---\n# Owned", resolved="hf://not a reference\n")
    card = card_text(replace(info, metadata=replace(info.metadata, base=bad)))
    (line,) = [line for line in card.splitlines() if "Owned" in line]
    assert line.startswith("| base | `x'")
    assert yaml.safe_load(card.split("---\n")[1]) == {"tags": ["sparsity-audit", "update-mask"]}


def test_a_derived_mask_names_its_operation(masks, tmp_path):
    mask_ops("not", [masks["packed"]], tmp_path / "not")
    assert "made by the operation `not`" in mask_card(tmp_path / "not")


def test_the_card_is_written_where_asked(masks, tmp_path):
    text = mask_card(masks["packed"], tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text


def test_what_is_no_mask_directory_is_refused(masks, tmp_path):
    with pytest.raises(UsageError, match="a mask directory"):
        mask_card(masks["pt"] / "mask.pt")
    with pytest.raises(MaskError):
        mask_card(tmp_path)
