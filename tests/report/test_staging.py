"""A directory appears whole or not at all."""

from __future__ import annotations

import pytest

from sparsity_audit.errors import OutputError
from sparsity_audit.report.staging import StagedDirectory


def _make(target, inputs=()):
    return StagedDirectory(target, inputs)


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_has_the_name_before_the_commit_and_nothing_else_is_left_after_it(tmp_path, exists) -> None:
    target = tmp_path / "a" / "out"
    if exists:
        target.mkdir(parents=True)
    with _make(target) as stage:
        (stage.content / "file").write_text("x")
        (stage.scratch / "more").write_text("y")
        assert not (target / "file").exists()
        stage.commit()
    assert (target / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_an_error_leaves_nothing(tmp_path) -> None:
    def fail() -> None:
        with _make(tmp_path / "out") as stage:
            (stage.content / "file").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed(tmp_path) -> None:
    left = tmp_path / ".out.partial" / "content"
    left.mkdir(parents=True)
    (left / "old").write_text("x")
    with _make(tmp_path / "out") as stage:
        assert list(stage.content.iterdir()) == []
        stage.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_do_not_write_at_once(tmp_path) -> None:
    with _make(tmp_path / "out") as first:
        (first.content / "file").write_text("x")
        with pytest.raises(OutputError, match="another run is writing here"):
            _make(tmp_path / "out")
        assert (first.content / "file").exists()


def test_what_exists_is_not_replaced(tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    for target, found in ((tmp_path / "full", "not empty"), (tmp_path / "full" / "file", "is a file")):
        with pytest.raises(OutputError, match=found):
            _make(target)
    with _make(tmp_path / "late") as stage:
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "theirs").write_text("x")
        with pytest.raises(OutputError, match="filled by somebody else"):
            stage.commit()
    assert (tmp_path / "late" / "theirs").read_text() == "x"


def test_a_target_inside_or_around_an_input_is_refused(tmp_path) -> None:
    source = tmp_path / "runs" / "base"
    source.mkdir(parents=True)
    for target in (source, source / "below" / "deep", tmp_path / "runs"):
        with pytest.raises(OutputError, match="inside of the input"):
            _make(target, [source])
    assert list(source.iterdir()) == []
