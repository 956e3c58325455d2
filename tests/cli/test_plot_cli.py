"""`plot` and `report`: what they write from finished audits, and what they refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparsity_audit import diff, plot, render
from sparsity_audit.errors import OutputError, UsageError


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsity_audit.cli.main", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ}
    )


@pytest.fixture(scope="module")
def audits(addition, tmp_path_factory) -> Path:
    """Two finished audits: `fp32` as the command line writes it, `bf16` without figures."""
    folder = tmp_path_factory.mktemp("audits")
    done = run(
        "diff",
        addition / "base-fp32",
        addition / "grpo-fp32-seed0",
        "-o",
        folder / "fp32",
        "--format",
        "quiet",
    )
    assert (done.returncode, done.stderr) == (0, "")
    diff(addition / "base-bf16", addition / "grpo-bf16-seed0", output=folder / "bf16", workers=1)
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_output_directory_holds_every_figure_in_every_format_and_the_tables(audits) -> None:
    names = {name for name in _files(audits / "fp32") if "/" in name}
    figures = ("headline", "change-rate", "density", "layers", "ulps", "delta", "tolerance")
    assert names == {f"figures/{f}.{suffix}" for f in figures for suffix in ("pdf", "svg", "png", "txt")} | {
        f"tables/{table}.tex" for table in ("headline", "modules", "layers")
    }
    assert not (audits / "bf16" / "figures").exists()


def test_rendering_again_without_the_checkpoints_gives_the_bytes_that_diff_wrote(audits, tmp_path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("report.json", "axis_counts.safetensors"):
        shutil.copy(audits / "fp32" / name, copy / name)
    done = run("report", copy)
    assert (done.returncode, done.stderr) == (0, "")
    found, wanted = _files(copy), _files(audits / "fp32")
    del wanted["run.json"]
    assert found == wanted
    made = set(found) - {"report.json", "axis_counts.safetensors"}
    assert {str(Path(line).relative_to(copy)) for line in done.stdout.splitlines()} == made


def test_several_audits_get_a_folder_each_beside_tables_and_figures_with_all_of_them(
    audits, tmp_path
) -> None:
    out = tmp_path / "out"
    render([audits / "fp32", audits / "bf16"], output=out, labels=["a/b", "c"], figures=False)
    assert {p.name for p in out.iterdir()} == {"a__b", "c", "tables"}
    assert _files(out)["c/tensors.csv"] == (audits / "bf16" / "tensors.csv").read_bytes()
    assert b"a/b & native" in _files(out)["tables/headline.tex"]
    assert b"c & native" in _files(out)["tables/headline.tex"]


def test_plot_writes_the_figures_asked_for_side_by_side_and_prints_their_paths(audits, tmp_path) -> None:
    out = tmp_path / "figures"
    options = (
        "--figure",
        "change-rate",
        "--format",
        "svg",
        "--width",
        "6.75",
        "--label",
        "A",
        "--label",
        "B",
    )
    done = run("plot", audits / "fp32", audits / "bf16", "-o", out, *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [str(out / "change-rate.svg"), str(out / "change-rate.txt")]
    text = (out / "change-rate.svg").read_text()
    assert 'width="486pt"' in text  # 6.75 in
    assert ">A<" in text
    assert ">B<" in text


def test_plot_draws_what_diff_drew(audits, tmp_path) -> None:
    plot([audits / "fp32"], output=tmp_path, figures=["headline"])
    for name, data in _files(tmp_path).items():
        assert data == (audits / "fp32" / "figures" / name).read_bytes(), name


def test_nothing_is_replaced_without_being_asked(audits, tmp_path) -> None:
    arguments = {"figures": ["headline"], "formats": ["svg"]}
    plot([audits / "bf16"], output=tmp_path, **arguments)
    (tmp_path / "headline.svg").write_text("mine")
    with pytest.raises(OutputError, match=r"holds headline\.svg and 1 more.*\n.*--overwrite"):
        plot([audits / "bf16"], output=tmp_path, **arguments)
    assert (tmp_path / "headline.svg").read_text() == "mine"
    plot([audits / "bf16"], output=tmp_path, overwrite=True, **arguments)
    assert (tmp_path / "headline.svg").read_text() != "mine"
    with pytest.raises(OutputError, match="--overwrite"):
        render([audits / "bf16"], output=audits / "bf16", figures=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "gif"), "no such format: gif; expected some of pdf,svg,png"),
        (("--figure", "pie"), "--figure: unknown: pie\n  expected: of headline, change-rate, density"),
        (("-o", ""), "Invalid value for '-o' / '--output'"),
        (("--width", "4"), "'4' is not one of '3.25', '5.5', '6.75'"),
        (("--label", "a", "--label", "b"), "labels: 2 for 1 reports"),
    ],
)
def test_what_plot_cannot_do_is_exit_2_with_the_choices(audits, tmp_path, options, message) -> None:
    done = run("plot", audits / "bf16", "-o", tmp_path / "out", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [plot, render])
def test_what_is_no_finished_audit_is_refused(command, audits, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"holds no report\.json"):
        command([tmp_path / "nowhere"], output=tmp_path / "out")
    (tmp_path / "journal.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="unfinished run\n  remedy: give its diff command again"):
        command([audits / "bf16", tmp_path], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_axis_counts_are_named(audits, tmp_path) -> None:
    shutil.copy(audits / "bf16" / "report.json", tmp_path / "report.json")
    (tmp_path / "axis_counts.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match=r"axis_counts\.safetensors: cannot be read"):
        render([tmp_path], figures=False)


@pytest.mark.parametrize("labels", [("figures", "b"), ("..", "b"), ("a/b", "a__b")])
def test_a_label_that_cannot_name_a_folder_of_its_own_is_refused(audits, tmp_path, labels) -> None:
    with pytest.raises(UsageError, match="cannot name a folder of its own"):
        render([audits / "fp32", audits / "bf16"], output=tmp_path, labels=labels, figures=False)
    assert not list(tmp_path.iterdir())


def test_parquet_is_written_when_asked_for(audits, tmp_path) -> None:
    pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    render([audits / "bf16"], output=tmp_path, figures=False, parquet=True)
    assert (tmp_path / "tensors.parquet").read_bytes()[:4] == b"PAR1"


def test_help_of_both_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom sparsity_audit.cli.main import cli\n"
        "for name in ('plot', 'report'):\n"
        "    assert CliRunner().invoke(cli, [name, '--help']).exit_code == 0\n"
        "print(*{m.partition('.')[0] for m in sys.modules} & {'numpy', 'matplotlib', 'jinja2', 'pydantic'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
