"""A journal gives back what was written, and stops at the first line a kill cut short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsity_audit.errors import OutputError
from sparsity_audit.passes.journal import Journal
from sparsity_audit.stats.tally import AxisCounts, DecayCounts, Tally, ViewTally


def _tally(n: int) -> Tally:
    zeros = np.zeros(3, dtype=np.int64)
    axes = AxisCounts(rows=zeros + n, cols=np.arange(4, dtype=np.int64), band=zeros, outside=zeros)
    view = ViewTally(
        entries=10 * n,
        changed={"bitwise": n, "value": n},
        strata={3: 10 * n},
        cells={(3, 1): n},
        abs_sum=2**1100 + n,
        max_abs=0.1 * n,
        decay=DecayCounts(band=n),
    )
    return Tally(native=view, served=view, base_fingerprint=2**64 - n, tuned_fingerprint=n, axes=axes)


def _found(path: Path) -> dict[str, Tally]:
    journal = Journal(path, plan_key="k")
    journal.close()
    return dict(journal.done)


def _journal(path: Path, *, key: str = "k") -> Journal:
    return Journal(path, plan_key=key)


def test_what_was_appended_is_found_again(tmp_path: Path) -> None:
    journal = _journal(tmp_path / "j")
    for n in (1, 2):
        journal.append(f"u{n}", _tally(n))
    journal.close()
    assert _found(tmp_path / "j") == {"u1": _tally(1), "u2": _tally(2)}


@pytest.mark.parametrize("cut", [1, 5, 200])
def test_a_cut_line_is_dropped_and_written_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j"
    journal = _journal(path)
    journal.append("u1", _tally(1))
    journal.append("u2", _tally(2))
    journal.close()
    path.write_bytes(path.read_bytes()[:-cut])
    again = _journal(path)
    assert dict(again.done) == {"u1": _tally(1)}
    again.append("u2", _tally(2))
    again.close()
    assert _found(path) == {"u1": _tally(1), "u2": _tally(2)}


def test_a_flipped_bit_ends_the_journal_there(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = _journal(path)
    journal.append("u1", _tally(1))
    middle = path.stat().st_size
    journal.append("u2", _tally(2))
    journal.close()
    data = bytearray(path.read_bytes())
    data[middle + 40] ^= 1
    path.write_bytes(bytes(data))
    assert _found(path) == {"u1": _tally(1)}


def test_a_journal_of_another_plan_is_refused_with_the_remedy(tmp_path: Path) -> None:
    _journal(tmp_path / "j").close()
    with pytest.raises(OutputError, match="--overwrite"):
        _journal(tmp_path / "j", key="other")


def test_a_file_that_is_no_journal_counts_as_empty_only_when_nothing_in_it_is_valid(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"")
    assert _found(tmp_path / "j") == {}


def test_a_journal_in_use_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    journal = _journal(tmp_path / "j")
    journal.append("u1", _tally(1))
    before = (tmp_path / "j").read_bytes()
    for restart in (False, True):
        with pytest.raises(OutputError, match="another run is writing here"):
            Journal(tmp_path / "j", plan_key="k", restart=restart)
    assert (tmp_path / "j").read_bytes() == before
    journal.close()
    assert _found(tmp_path / "j") == {"u1": _tally(1)}


def test_the_journal_of_another_version_is_refused_not_misread(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sparsity_audit.passes.journal.version", lambda _name: "0.0.1")
    _journal(tmp_path / "j").close()
    monkeypatch.undo()
    with pytest.raises(OutputError, match="another version"):
        _journal(tmp_path / "j")


def test_a_restarted_journal_holds_no_unit_of_the_earlier_run(tmp_path: Path) -> None:
    journal = _journal(tmp_path / "j", key="other")
    journal.append("u1", _tally(1))
    journal.close()
    journal = Journal(tmp_path / "j", plan_key="k", restart=True)
    journal.append("u2", _tally(2))
    journal.restart()
    journal.append("u3", _tally(3))
    journal.close()
    assert _found(tmp_path / "j") == {"u3": _tally(3)}
