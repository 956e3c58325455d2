"""A run that is split into shares: the same bytes as one process, and no report from half of them."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from support import plan_of

from sparsity_audit import DiffQuestion, diff, diff_share, merge
from sparsity_audit.cli.main import cli
from sparsity_audit.errors import ChangedInputError, OutputError, UsageError
from sparsity_audit.passes.shares import plan_of_share, shares_of

UNIT_BYTES = 20_000


@pytest.fixture
def pair(addition, monkeypatch) -> tuple[str, str]:
    """A pair named relatively, so that reports hold no path of this machine."""
    monkeypatch.chdir(addition)
    return "base-bf16", "grpo-bf16-seed0"


def _files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and p.name != "run.json"}


def _run_shares(pair, folders, count, *, mask=None, only=None, **asked) -> None:
    question = DiffQuestion.of(unit_bytes=UNIT_BYTES, **asked)
    for index in range(count) if only is None else only:
        folder = folders[index % len(folders)]
        where = {"output": folder, "mask": mask, "workers": 1, "kernel": "numpy"}
        diff_share(*pair, shard_index=index, num_shards=count, question=question, **where)


def test_shares_cover_every_unit_once_and_differ_by_at_most_a_unit(addition) -> None:
    plan = plan_of(addition / "base-bf16", addition / "grpo-bf16-seed0", unit_bytes=3000)
    whole = plan.num_bytes
    for count in (1, 2, 3, 7, len(plan.units), 3 * len(plan.units)):
        shares = shares_of(plan, count)
        assert len(shares) == count
        assert tuple(unit for share in shares for unit in share) == plan.units
        sizes = [plan_of_share(plan, index, count).num_bytes for index in range(count)]
        assert sum(sizes) == whole
        assert max(sizes) - whole / count <= 2 * 3000 * 2
        assert all(plan_of_share(plan, index, count).key == plan.key for index in range(count))


@pytest.mark.parametrize(("count", "apart"), [(1, False), (3, False), (5, True), (40, True)])
@pytest.mark.parametrize("criterion", ["value", "top:3%"])
def test_merged_shares_are_the_bytes_of_one_run(tmp_path, pair, count, apart, criterion) -> None:
    asked = {"criteria": [criterion, "ulp:2"], "view": "served", "structure": "on"}
    diff(*pair, output=tmp_path / "whole", mask=tmp_path / "whole-mask", unit_bytes=UNIT_BYTES, **asked)
    folders = [tmp_path / f"share{i}" for i in range(3 if apart else 1)]
    _run_shares(pair, folders, count, mask=tmp_path / "mask", **asked)
    assert not (tmp_path / "mask").exists()
    report = merge(folders, workers=1)
    assert _files(folders[0]) == _files(tmp_path / "whole")
    assert _files(tmp_path / "mask") == _files(tmp_path / "whole-mask")
    assert sum(tensor.entries for tensor in report.tensors) == 148_928
    assert not list(tmp_path.glob("share*/share-*"))


def test_bits_of_two_shares_meet_in_one_byte_of_a_fused_bias(tmp_path, write_checkpoint) -> None:
    """Rows of a fused bias that end within a byte, in shares of their own."""
    rng = np.random.default_rng(0)
    heads = {"q": 20, "k": 12, "v": 12}  # 44 entries: k begins at bit 4 of a byte
    name = "model.layers.0.self_attn."
    fused = rng.normal(size=(44, 64)).astype(np.float32)
    bias = rng.normal(size=44).astype(np.float32)
    base = {f"{name}qkv_proj.weight": fused, f"{name}qkv_proj.bias": bias}
    tuned, row = {}, 0
    for head, rows in heads.items():
        change = rng.random(rows) < 0.5
        tuned[f"{name}{head}_proj.weight"] = fused[row : row + rows]
        tuned[f"{name}{head}_proj.bias"] = np.where(
            change, bias[row : row + rows] + 1, bias[row : row + rows]
        )
        row += rows
    tuned = {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in tuned.items()}
    pair = write_checkpoint("base", base), write_checkpoint("tuned", tuned)
    whole = diff(*pair, mask=tmp_path / "whole")
    assert sum(tensor.entries for tensor in whole.tensors) == 44 * 65
    for count in (2, 6, 9):
        folder, mask = tmp_path / f"shares{count}", tmp_path / f"mask{count}"
        _run_shares(pair, [folder], count, mask=mask)
        merge([folder])
        assert _files(mask) == _files(tmp_path / "whole")


KILLED_SHARE = """
    import os, signal
    from sparsity_audit import seams, DiffQuestion, diff_share
    left = {count}
    def observer(point):
        global left
        if point == {point!r}:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    seams.observer = observer
    question = DiffQuestion.of(unit_bytes={unit_bytes})
    diff_share({base!r}, {tuned!r}, shard_index=1, num_shards=2, output={out!r}, mask={mask!r},
               question=question, workers=1, kernel="numpy")
"""


@pytest.mark.parametrize(
    ("point", "count"), [("unit compared", 3), ("unit journaled", 4), ("pass finished", 1)]
)
def test_a_killed_share_is_named_by_merge_and_goes_on_where_it_stopped(tmp_path, pair, point, count) -> None:
    diff(*pair, output=tmp_path / "whole", mask=tmp_path / "whole-mask", unit_bytes=UNIT_BYTES)
    out, mask = tmp_path / "out", tmp_path / "mask"
    _run_shares(pair, [out], 2, mask=mask, only=[0])
    code = textwrap.dedent(KILLED_SHARE).format(
        count=count,
        point=point,
        unit_bytes=UNIT_BYTES,
        base=pair[0],
        tuned=pair[1],
        out=str(out),
        mask=str(mask),
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(UsageError, match=r"unfinished shares: 1 \("):
        merge([out])
    assert not (out / "report.json").exists()
    assert not mask.exists()
    notes: list[str] = []
    where = {"output": out, "mask": mask, "on_note": notes.append}
    diff_share(*pair, shard_index=1, num_shards=2, question=DiffQuestion.of(unit_bytes=UNIT_BYTES), **where)
    assert [note for note in notes if note.startswith("resuming")]
    merge([out])
    assert _files(out) == _files(tmp_path / "whole")
    assert _files(mask) == _files(tmp_path / "whole-mask")


def test_a_merge_that_was_killed_keeps_the_shares_and_can_be_run_again(tmp_path, pair) -> None:
    diff(*pair, output=tmp_path / "whole", mask=tmp_path / "whole-mask", unit_bytes=UNIT_BYTES)
    for point in ("mask finished", "file written"):
        out, mask = tmp_path / point[:4], tmp_path / f"{point[:4]}-mask"
        _run_shares(pair, [out], 3, mask=mask)
        code = (
            "import os, signal\nfrom sparsity_audit import seams, merge\n"
            f"seams.observer = lambda point: point == {point!r} and os.kill(os.getpid(), signal.SIGKILL)\n"
            f"merge([{str(out)!r}])\n"
        )
        killed = subprocess.run([sys.executable, "-c", code], check=False, timeout=120)
        assert killed.returncode == -signal.SIGKILL
        merge([out])
        assert _files(out) == _files(tmp_path / "whole")
        assert _files(mask) == _files(tmp_path / "whole-mask")


def test_missing_shares_are_all_named(tmp_path, pair) -> None:
    _run_shares(pair, [tmp_path / "out"], 9, only=[0, 2, 8])
    with pytest.raises(UsageError, match=r"6 of 9 shares are missing: 1, 3-7"):
        merge([tmp_path / "out"])


def test_a_folder_without_shares_says_what_makes_them(tmp_path) -> None:
    with pytest.raises(UsageError, match="--shard-index I --num-shards N"):
        merge([tmp_path])


def test_a_folder_that_is_not_there_is_no_folder_without_shares(tmp_path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        merge([tmp_path / "mistyped"])
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is no directory"):
        merge([tmp_path / "file"])


def test_merging_again_says_that_it_was_done(tmp_path, pair) -> None:
    _run_shares(pair, [tmp_path / "out"], 2)
    merge([tmp_path / "out"])
    with pytest.raises(UsageError, match=r"holds no share, but a finished report(?s:.*)merged already"):
        merge([tmp_path / "out"])


def test_a_share_does_not_work_for_a_report_that_is_finished(tmp_path, pair) -> None:
    _run_shares(pair, [tmp_path / "out"], 2)
    merge([tmp_path / "out"])
    with pytest.raises(OutputError, match="holds the report of a finished run"):
        _run_shares(pair, [tmp_path / "out"], 2, only=[0])
    assert not list((tmp_path / "out").glob("share-*"))


def test_a_local_checkpoint_is_not_sought_on_the_hub_when_shares_are_merged_elsewhere(
    tmp_path, pair, monkeypatch
) -> None:
    _run_shares(pair, [tmp_path / "out"], 2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"base-bf16 and grpo-bf16-seed0: .*not here"):
        merge([tmp_path / "out"])


def test_shares_of_different_questions_are_not_joined(tmp_path, pair) -> None:
    _run_shares(pair, [tmp_path / "out"], 2, only=[0])
    _run_shares(pair, [tmp_path / "out"], 2, only=[1], lr=1e-4, weights_dtype="bf16")
    with pytest.raises(UsageError, match=r"another run than share-00000-of-00002\.jsonl: lr 0\.0001"):
        merge([tmp_path / "out"])


def test_shares_of_two_splits_are_not_joined(tmp_path, pair) -> None:
    _run_shares(pair, [tmp_path / "out"], 2)
    _run_shares(pair, [tmp_path / "out"], 3, only=[2])
    with pytest.raises(UsageError, match=r"shares of 2 .* and of 3"):
        merge([tmp_path / "out"])
    _run_shares(pair, [tmp_path / "out"], 3, only=[0])  # the first share of both splits is there
    with pytest.raises(UsageError, match=r"shares of 2 .* and of 3"):
        merge([tmp_path / "out"])


def test_one_share_in_two_folders_is_refused(tmp_path, pair) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    _run_shares(pair, folders, 2)
    _run_shares(pair, [folders[0]], 2, only=[1])
    with pytest.raises(UsageError, match="the same share lies in"):
        merge(folders)


def test_a_checkpoint_that_was_replaced_since_is_refused(tmp_path, addition, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(addition / "base-bf16", "base")
    shutil.copytree(addition / "grpo-bf16-seed0", "tuned")
    _run_shares(("base", "tuned"), [Path("out")], 2)
    os.utime("tuned/model.safetensors", ns=(1, 1))
    with pytest.raises(ChangedInputError, match="not the checkpoints that the shares compared"):
        merge(["out"])


def test_mask_bits_that_no_share_kept_cannot_be_asked_of_merge(tmp_path, pair) -> None:
    _run_shares(pair, [tmp_path / "out"], 2)
    with pytest.raises(UsageError, match=r"ran without --mask(?s:.*)--mask and --overwrite"):
        merge([tmp_path / "out"], mask=tmp_path / "mask")
    assert not (tmp_path / "mask").exists()


def test_mask_bits_that_are_lost_make_a_share_unfinished(tmp_path, pair) -> None:
    _run_shares(pair, [tmp_path / "out"], 2, mask=tmp_path / "mask")
    (tmp_path / "out" / "share-00001-of-00002.bits.safetensors").unlink()
    with pytest.raises(UsageError, match=r"unfinished shares: 1 \(no mask bits\)"):
        merge([tmp_path / "out"])
    _run_shares(pair, [tmp_path / "out"], 2, mask=tmp_path / "mask", only=[1])
    merge([tmp_path / "out"])
    assert (tmp_path / "mask").is_dir()


def test_a_share_with_other_options_does_not_take_over_what_is_there(tmp_path, pair) -> None:
    _run_shares(pair, [tmp_path / "out"], 2, only=[1])
    with pytest.raises(OutputError, match="other inputs or options"):
        _run_shares(pair, [tmp_path / "out"], 2, only=[1], criteria=["ulp:3"])


@pytest.mark.parametrize("index", [-1, 2])
def test_a_share_outside_the_split_is_refused(tmp_path, pair, index) -> None:
    with pytest.raises(UsageError, match=r"0 … 1"):
        diff_share(*pair, shard_index=index, num_shards=2, output=tmp_path, question=DiffQuestion.of())


def test_a_question_survives_its_journal_and_has_the_defaults_of_diff() -> None:
    asked = {"criteria": ["top:1%", "ulp:2"], "maps": [("a", "b")], "preset": "zhu2025", "lr": 1e-6}
    question = DiffQuestion.of(**asked, view="served", weights_dtype="bf16", spectral=["*.q_proj.*"])
    assert DiffQuestion.from_json(json.loads(json.dumps(question.to_json()))) == question
    defaults = {name: p.default for name, p in inspect.signature(diff).parameters.items()}
    plain = {name: defaults[name] for name in defaults if name in DiffQuestion.__dataclass_fields__}
    assert plain.keys() == DiffQuestion.__dataclass_fields__.keys()
    assert DiffQuestion.of(**plain) == DiffQuestion()


def test_the_command_line_splits_merges_and_judges(tmp_path, pair, capfd) -> None:
    out = str(tmp_path / "out")
    for index in ("0", "1"):
        split = ["-o", out, "--shard-index", index, "--num-shards", "2", "--no-figures"]
        assert cli.main(["diff", *pair, *split, "--max-sparsity", "0.001"], standalone_mode=False) == 0
    assert "share 1 of 2" in capfd.readouterr().out
    assert cli.main(["merge", out, "--json"], standalone_mode=False) == 1
    captured = capfd.readouterr()
    assert json.loads(captured.out)["gates"][0]["passed"] is False
    assert "expectation failed: max-sparsity" in captured.err
    assert sorted(p.name for p in (tmp_path / "out").glob("share-*")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "OUT", "--shard-index", "0"], "stand together"),
        (["--shard-index", "0", "--num-shards", "2"], "needs -o"),
        (
            ["-o", "OUT", "--shard-index", "0", "--num-shards", "2", "--log", "tensorboard"],
            "give it to `merge`",
        ),
    ],
)
def test_half_a_split_on_the_command_line_is_a_usage_error(tmp_path, pair, options, message) -> None:
    import click

    options = [str(tmp_path / "out") if text == "OUT" else text for text in options]
    with pytest.raises(click.UsageError, match=message):
        cli.main(["diff", *pair, *options], standalone_mode=False)
