"""`mask export` gives the mask that diffing gives, in every encoding, and leaves nothing else behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsity_audit import SparsityAuditError, diff, mask_convert, mask_export, mask_info

PAIR = ("base-bf16", "grpo-bf16-lr1e-4-seed0")


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_packed_export_is_the_mask_of_a_diff(addition, tmp_path) -> None:
    base, tuned = (addition / name for name in PAIR)
    report = diff(base, tuned, mask=tmp_path / "while-diffing")
    info = mask_export(base, tuned, tmp_path / "exported")
    assert _files(tmp_path / "exported") == _files(tmp_path / "while-diffing")
    assert (info.selected, info.compared) == (report.headlines[1].changed, 148_928) == (27_481, 148_928)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "while-diffing"]


@pytest.mark.parametrize("encoding", ["bool", "indices", "pt"])
def test_every_encoding_holds_the_same_entries_and_no_scratch_is_left(addition, tmp_path, encoding) -> None:
    base, tuned = (addition / name for name in PAIR)
    info = mask_export(base, tuned, tmp_path / "mask", encoding=encoding)
    assert (info.encoding, info.selected) == (encoding, 27_481)
    assert [path.name for path in tmp_path.iterdir()] == ["mask"]
    mask_export(base, tuned, tmp_path / "packed")
    mask_convert(tmp_path / "mask", tmp_path / "back", "packed")
    ours, back = mask_info(tmp_path / "packed"), mask_info(tmp_path / "back")
    assert [(t.name, t.selected) for t in back.tensors] == [(t.name, t.selected) for t in ours.tensors]


def test_the_largest_movements_are_exported_in_the_view_asked_for(addition, tmp_path) -> None:
    base, tuned = addition / "base-fp32", addition / "grpo-fp32-seed0"
    top = mask_export(base, tuned, tmp_path / "top", criterion="top:1%")
    assert (top.selected, top.metadata.criterion) == (1489, "top:1%")
    served = mask_export(base, tuned, tmp_path / "served", view="served")
    assert (served.selected, served.metadata.view) == (130_500, "served")


def test_an_existing_mask_is_kept_unless_overwriting_is_asked_for(addition, tmp_path) -> None:
    base, tuned = (addition / name for name in PAIR)
    mask_export(base, tuned, tmp_path / "mask")
    before = _files(tmp_path / "mask")
    with pytest.raises(SparsityAuditError):
        mask_export(base, tuned, tmp_path / "mask", criterion="atol:1e-5")
    assert _files(tmp_path / "mask") == before
    again = mask_export(base, tuned, tmp_path / "mask", criterion="atol:1e-5", overwrite=True)
    assert (again.selected, again.metadata.criterion) == (27_475, "atol:1e-5")


def test_an_export_that_fails_leaves_nothing(addition, tmp_path) -> None:
    with pytest.raises(SparsityAuditError):
        mask_export(addition / "base-bf16", tmp_path / "absent", tmp_path / "mask", encoding="bool")
    assert list(tmp_path.iterdir()) == []
