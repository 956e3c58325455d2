"""Notebooks run from a clone with the public interface alone, and are committed as they ran."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TIMEOUT_S = 60

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _texts(notebook) -> list[str]:
    """What each code cell printed; figures are left out, for they depend on fonts."""
    printed = []
    for cell in _code_cells(notebook):
        parts = [output.text for output in cell.outputs if output.output_type == "stream"]
        parts += [
            output.data["text/plain"]
            for output in cell.outputs
            if "data" in output and "image/png" not in output.data
        ]
        printed.append("".join(parts))
    return printed


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["lab", "masked_recovery", "overlap", "quickstart", "tokens"]


@each_notebook
def test_a_notebook_runs_in_a_clone_and_prints_what_is_committed(path: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "examples", clone / "examples")
    shutil.copytree(ROOT / "tests" / "data", clone / "tests" / "data")
    (clone / "notebooks").mkdir()
    committed = nbformat.read(path, as_version=4)
    executed = nbformat.read(path, as_version=4)
    for cell in _code_cells(executed):
        cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(clone / "notebooks")}}
    nbclient.NotebookClient(executed, timeout=TIMEOUT_S, kernel_name="python3", resources=resources).execute()
    stale = f"run `jupyter execute --inplace notebooks/{path.name}` and look at the changes"
    assert _texts(executed) == _texts(committed), stale


@each_notebook
def test_a_notebook_is_committed_with_its_outputs_and_without_paths_of_a_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = _code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert "error" not in kinds
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    for text in _texts(notebook):
        assert not re.search(r"(?<![\w.])/(work|root|tmp|home|Users)/", text), text


@each_notebook
def test_a_notebook_uses_the_public_interface_alone(path: Path) -> None:
    source = "\n".join(cell.source for cell in _code_cells(nbformat.read(path, as_version=4)))
    assert re.findall(r"^[ \t]*(?:import|from) sparsity_audit.*$", source, flags=re.MULTILINE) == [
        "import sparsity_audit as sa"
    ]
    assert not re.search(r"\bsa\.\w*\._", source)
