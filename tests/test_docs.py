"""The documents say what the code does: generated references, links, examples, the table of tests."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from sparsity_audit.cli.main import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path for path in (*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md") if path.is_file()
)
_INPUTS = (
    "base",
    "tuned",
    "full",
    "sub",
    "reference",
    "path",
    "paths",
    "like",
    "directories",
    "pairs",
    "run",
    "runs",
)
_MINUTES = ("study",)
"""Commands without inputs that take minutes; tests of their own run them."""


def _label(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=_label)


def _blocks(document: Path, language: str) -> Iterator[tuple[str, str]]:
    """(info string, body) of the document's fenced blocks in a language."""
    text = document.read_text(encoding="utf-8")
    for info, body in re.findall(r"^```([^\n]*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        if info.split()[:1] == [language]:
            yield info, body


def _generator():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_files_are_fresh(capsys) -> None:
    assert _generator().main(["--check"]) == 0, capsys.readouterr().err


def test_check_names_each_stale_file_and_writes_nothing(tmp_path, monkeypatch, capsys) -> None:
    module = _generator()
    monkeypatch.setattr(module, "DOCS", tmp_path)
    assert module.main(["--check"]) == 1
    error = capsys.readouterr().err
    assert "docs/cli.md is stale" in error
    assert "docs/report.schema.json is stale" in error
    assert list(tmp_path.iterdir()) == []
    assert module.main([]) == 0
    assert module.main(["--check"]) == 0
    (tmp_path / "cli.md").write_text("edited")
    assert module.main(["--check"]) == 1


def test_the_generated_reference_does_not_depend_on_the_terminal(monkeypatch) -> None:
    wide = _generator().generate()
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "dumb")
    assert _generator().generate() == wide


def test_every_option_of_every_command_stands_in_the_command_reference() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for words, command in _generator().commands():
        section = re.search(
            rf"^## {re.escape(words)}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL
        )
        assert section is not None, words
        for param in command.params:
            if isinstance(param, click.Option):
                missing = [name for name in param.opts if f"`{name}`" not in section[1]]
                assert not missing, (words, missing)


def _anchors(document: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_internal_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), f"{_label(document)}: {target}"
        assert found.is_relative_to(ROOT), f"{_label(document)}: {target}"
        if anchor and found.suffix == ".md":
            assert anchor in _anchors(found), f"{_label(document)}: {target}"


def _examples(document: Path) -> list[tuple[list[str], int]]:
    """(arguments, expected exit status) of the document's `sparsity-audit` lines."""
    found = []
    for _, body in _blocks(document, "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            if line.startswith("sparsity-audit "):
                status = re.search(r"#.*\bexit (\d+)", line)
                found.append((shlex.split(line, comments=True)[1:], int(status[1]) if status else 0))
    return found


def _parse(arguments: list[str]) -> click.Context:
    """The context of the command that the arguments name; raises click.UsageError."""
    command, words = cli, list(arguments)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        word = words.pop(0)
        found = command.get_command(click.Context(command), word)
        assert found is not None, f"no command {word!r} in {arguments}"
        command = found
    return command.make_context(" ".join(arguments), words)


def _inputs_exist(context: click.Context) -> bool:
    choices = {p.name for p in context.command.params if isinstance(p.type, click.Choice)}
    for name in _INPUTS:
        value = None if name in choices else context.params.get(name)
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None and not Path(str(item)).exists():
                return False
    return True


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A working directory with the examples in it, as after cloning."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _link_frozen_runs(folder: Path) -> None:
    (folder / "tests").mkdir()
    (folder / "tests" / "data").symlink_to(ROOT / "tests" / "data")


@each_document
def test_command_lines_parse_and_those_on_the_examples_run(document: Path, clone: Path, capsys) -> None:
    if document.parent.name == "guide":  # the figures' own commands would take half a minute
        _link_frozen_runs(clone)
    for info, body in _blocks(document, "yaml"):
        (clone / info.split()[1]).write_text(body)
    for arguments, status in _examples(document):
        context = _parse(arguments)
        if _inputs_exist(context) and context.command.name not in _MINUTES:
            found = cli.main(arguments, standalone_mode=False) or 0
            assert found == status, (arguments, found, capsys.readouterr())


def test_the_guide_has_examples_that_run(clone: Path) -> None:
    running = [
        arguments
        for document in DOCUMENTS
        for arguments, _ in _examples(document)
        if "--config" not in arguments and _inputs_exist(_parse(arguments))
    ]
    assert len(running) >= 10, running


@each_document
def test_python_examples_run(document: Path, clone: Path, capsys) -> None:
    _link_frozen_runs(clone)
    for _, body in _blocks(document, "python"):
        if "examples/" in body:
            exec(compile(body, _label(document), "exec"), {})
        else:
            ast.parse(body)


def _test_names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_status_table_names_tests_and_files_that_exist() -> None:
    text = (ROOT / "docs" / "status.md").read_text(encoding="utf-8")
    identifiers = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(identifiers) > 50
    for file, name in identifiers:
        assert (ROOT / file).is_file(), file
        assert name in _test_names(ROOT / file), f"{file}::{name}"
    for file in re.findall(r"`((?:tests|benchmarks|docs|notebooks|examples)/[\w./-]+)`", text):
        assert (ROOT / file).exists(), file
    assert "TODO" not in text, "a point without an answer"


def test_nothing_in_the_documents_points_at_the_machine_they_were_written_on() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(work|root|tmp|home)/", text), _label(document)
