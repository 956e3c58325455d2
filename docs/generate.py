"""Write the references that are made from the code: `docs/cli.md` and the JSON Schemas of the records.

Contract: the output is a function of the code alone, not of terminal width, locale or help formatter.
`--check` writes nothing, names each stale file and exits 1.
"""  # noqa: INP001 - a script beside documents, not a package

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from sparsity_audit.cli.main import cli
from sparsity_audit.report.critical import critical_json_schema as tokens_critical_json_schema
from sparsity_audit.report.cross import cross_json_schema
from sparsity_audit.report.lab_critical import critical_json_schema
from sparsity_audit.report.lab_track import track_json_schema
from sparsity_audit.report.overlap import overlap_json_schema
from sparsity_audit.report.pairs import pairs_json_schema
from sparsity_audit.report.patch import patch_info_json_schema
from sparsity_audit.report.prune import prune_json_schema
from sparsity_audit.report.recovery import recovery_json_schema
from sparsity_audit.report.retrain import retrain_json_schema
from sparsity_audit.report.schema import json_schema
from sparsity_audit.report.series import series_json_schema
from sparsity_audit.report.study import study_json_schema
from sparsity_audit.report.study_full import study_full_json_schema
from sparsity_audit.report.tokens import tokens_json_schema
from sparsity_audit.report.tokens_patch import patch_json_schema
from sparsity_audit.report.tokens_series import tokens_series_json_schema

__all__ = ["NAME", "commands", "generate", "main"]

DOCS = Path(__file__).resolve().parent
NAME = "sparsity-audit"
_HEAD = f"""# Command line

<!-- Written by docs/generate.py; do not edit. -->

`{NAME}` prints data on stdout, notes and progress on stderr. Exit status: 0 done, 1 a stated expectation
failed, 2 usage, input or I/O error and any uncaught exception, 130 interrupted. Authentication and cache are
those of the Hub library (`HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`). Every command has `-h` and `--help`;
`{NAME} --version` prints the version.
"""


def commands(command: click.Command = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command and group from `command` down, with its words as typed, in depth-first name order."""
    yield " ".join((NAME, *path)), command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=NAME)
        for name in sorted(command.list_commands(context)):
            found = command.get_command(context, name)
            assert found is not None, name
            yield from commands(found, (*path, name))


def generate() -> dict[Path, str]:
    """Path → text of each generated file."""
    sections = [_HEAD, *[_section(words, command) for words, command in commands()]]
    schemas = {
        "report.schema.json": json_schema(),
        "pairs.schema.json": pairs_json_schema(),
        "overlap.schema.json": overlap_json_schema(),
        "prune.schema.json": prune_json_schema(),
        "recovery.schema.json": recovery_json_schema(),
        "series.schema.json": series_json_schema(),
        "tokens.schema.json": tokens_json_schema(),
        "tokens-series.schema.json": tokens_series_json_schema(),
        "tokens-cross.schema.json": cross_json_schema(),
        "tokens-critical.schema.json": tokens_critical_json_schema(),
        "tokens-patch.schema.json": patch_json_schema(),
        "retrain.schema.json": retrain_json_schema(),
        "patch-info.schema.json": patch_info_json_schema(),
        "lab-track.schema.json": track_json_schema(),
        "lab-critical.schema.json": critical_json_schema(),
        "lab-study.schema.json": study_json_schema(),
        "lab-study-full.schema.json": study_full_json_schema(),
    }
    return {DOCS / "cli.md": "\n".join(sections)} | {
        DOCS / name: json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        for name, schema in schemas.items()
    }


def _section(words: str, command: click.Command) -> str:
    lines = [f"## {words}", "", "```", _usage(words, command), "```", "", *_help(command)]
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=NAME)
        below = ", ".join(f"`{words} {name}`" for name in sorted(command.list_commands(context)))
        lines += [f"Commands: {below}.", ""]
    options = [p for p in command.params if isinstance(p, click.Option)]
    if options:
        lines += ["| option | value | meaning |", "|---|---|---|", *[_row(option) for option in options], ""]
    return "\n".join(lines)


def _usage(words: str, command: click.Command) -> str:
    parts = [words]
    if command.params:
        parts.append("[OPTIONS]")
    if isinstance(command, click.Group):
        parts.append("COMMAND …")
    for param in command.params:
        if isinstance(param, click.Argument):
            choices = param.type.choices if isinstance(param.type, click.Choice) else ()
            name = "{" + "|".join(choices) + "}" if choices else (param.metavar or str(param.name).upper())
            parts.append(name)
    return " ".join(parts)


def _help(command: click.Command) -> list[str]:
    """The help's paragraphs; the lines under `Example:` become a code block."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        text = paragraph.replace("\b\n", "").replace("\b", "").strip("\n")
        if text.startswith("Example:\n"):
            example = inspect.cleandoc(text.partition("\n")[2])
            lines += ["Example:", "", "```bash", *example.splitlines(), "```", ""]
        elif text:
            lines += [*text.splitlines(), ""]
    return lines


def _row(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    notes = [(option.help or "For tests.").rstrip(".") + "."]
    if option.required:
        notes.append("Required.")
    if option.multiple:
        notes.append("Repeatable.")
    if option.hidden:
        notes.append("Not shown in `--help`.")
    if option.show_default:
        notes.append(f"Default `{option.default}`.")
    return f"| {names} | {_value(option)} | {' '.join(notes).replace('|', chr(92) + '|')} |"


def _value(option: click.Option) -> str:
    if option.is_flag:
        return "flag"
    if isinstance(option.type, click.Choice):
        return ", ".join(f"`{choice}`" for choice in option.type.choices)
    name = option.metavar or {"integer range": "integer", "float range": "float"}.get(
        option.type.name, option.type.name
    )
    return f"`{name.upper()}`"


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or with `--check` compare them; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/cli.md and the JSON Schemas.")
    parser.add_argument("--check", action="store_true", help="exit 1 and name the files that are stale")
    check = parser.parse_args(arguments).check
    stale = 0
    for path, text in generate().items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if check:
            sys.stderr.write(f"docs/{path.name} is stale: run `python docs/generate.py` (or `make docs`)\n")
        else:
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"wrote docs/{path.name}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
