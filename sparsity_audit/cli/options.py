"""Options and printing that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import click

from sparsity_audit.cli.object_outputs import object_outputs
from sparsity_audit.errors import UsageError
from sparsity_audit.types import Criterion

__all__ = [
    "CRITERIA",
    "CRITERION",
    "MAP_RULE",
    "OUTPUT_PATH",
    "ByteProgress",
    "config_option",
    "echo_note",
    "engine_options",
    "format_options",
    "progress_is_wanted",
    "stream_option",
]

_Command = TypeVar("_Command", bound=Callable[..., Any])


class _CriterionType(click.ParamType):
    name = "criterion"

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Criterion:
        if isinstance(value, Criterion):
            return value
        try:
            return Criterion.parse(str(value))
        except UsageError as error:
            self.fail(f"{error.subject} {error.found}; expected {error.expected}", param, ctx)


class _MapRuleType(click.ParamType):
    name = "regex=repl"

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        pattern, found, replacement = str(value).partition("=")
        if not found:
            self.fail(
                f"{value!r} has no '='; expected REGEX=REPL, for instance '^actor\\.=model.'", param, ctx
            )
        return pattern, replacement


class _OutputPath(click.Path):
    """A path to write to; a prefix in an object store gives the path of its stage.

    Empty text, which an unset shell variable gives, would be the working directory.
    """

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        if value == "":
            self.fail("the path is empty; '.' is the working directory", param, ctx)
        if "://" in str(value):
            from sparsity_audit.checkpoint.object_store import is_object_reference

            outputs = None if ctx is None else object_outputs(ctx)
            if outputs is None or not is_object_reference(str(value)):
                self.fail(
                    f"{value} is neither a path on this machine nor a prefix in an object store "
                    "(s3://, gs://, az://)",
                    param,
                    ctx,
                )
            return outputs.take(str(value))
        return super().convert(value, param, ctx)


class _CriteriaType(click.ParamType):
    name = "criteria"

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[Criterion, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return Criterion.parse_several(str(value))
        except UsageError as error:
            self.fail(f"{error.subject} {error.found}; expected {error.expected}", param, ctx)


CRITERIA = _CriteriaType()
CRITERION = _CriterionType()
MAP_RULE = _MapRuleType()
OUTPUT_PATH = _OutputPath(path_type=Path)


def _choose_access(access: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def choose(ctx: click.Context, _param: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's call
        if value:
            from sparsity_audit.checkpoint.access import hub_access

            ctx.with_resource(hub_access(access))

    return choose


def stream_option(command: _Command) -> _Command:
    """Add `--stream`: everything that the command opens on the Hub is read by ranges."""
    return click.option(
        "--stream",
        is_flag=True,
        expose_value=False,
        callback=_choose_access("stream"),
        help="Read checkpoints on the Hub by ranges, without downloading them; needs no disk.",
    )(command)


def format_options(command: _Command) -> _Command:
    """Add `--format` and its short form `--json`."""
    command = click.option("--json", "as_json", is_flag=True, help="Short for --format json.")(command)
    return click.option(
        "--format",
        "output_format",
        type=click.Choice(["human", "json", "quiet"]),
        default="human",
        show_default=True,
        help="What goes to stdout.",
    )(command)


def engine_options(command: _Command) -> _Command:
    """Add `--engine` and `--workers`."""
    command = click.option(
        "--workers",
        type=click.IntRange(min=1),
        help="Threads [default: one a core, at most 8]; with --engine ray, tasks at once [default: all].",
    )(command)
    return click.option(
        "--engine",
        type=click.Choice(["threads", "ray"]),
        default="threads",
        show_default=True,
        help="ray: work units on the Ray cluster at RAY_ADDRESS, or on one of this machine's cores that is "
        "started for the run; needs the extra `ray`. The result is the same.",
    )(command)


def _load_config(ctx: click.Context, _param: click.Parameter, value: Path | None) -> None:
    if value is None:
        return
    import yaml

    try:
        settings = yaml.safe_load(value.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(str(value), f"cannot be read as YAML ({type(error).__name__})") from error
    if not isinstance(settings, dict):
        raise UsageError(str(value), "is not a YAML map", expected="keys named like the flags")
    known = {name.lstrip("-"): p for p in ctx.command.params for name in p.opts if p.name != "config"}
    unknown = sorted(str(key) for key in settings if str(key) not in known)
    if unknown:
        raise UsageError(
            str(value), f"unknown keys {', '.join(unknown)}", expected=f"some of {', '.join(sorted(known))}"
        )
    found = {
        known[str(key)].name: _config_value(known[str(key)], setting, subject=f"{value}: {key}")
        for key, setting in settings.items()
        if setting is not None
    }
    ctx.default_map = {**(ctx.default_map or {}), **found}


def _config_value(parameter: click.Parameter, value: Any, *, subject: str) -> Any:
    """What click would get from the command line, in the types it expects of a default. Raises UsageError."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        if isinstance(value, bool):
            return value
        raise UsageError(subject, f"{value!r} is neither on nor off", expected="true or false")
    takes_several = parameter.nargs == -1 or (isinstance(parameter, click.Option) and parameter.multiple)
    items = value if takes_several and isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (str, int, float)):
            raise UsageError(
                subject,
                f"{item!r} is not a value of this flag",
                expected="a text or a number" + (", or a list of them" if takes_several else ""),
            )
    texts = [str(item) for item in items]
    return texts if takes_several else texts[0]


def config_option(command: _Command) -> _Command:
    """Add `--config run.yaml`, whose keys are the flags; flags on the command line win."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        callback=_load_config,
        is_eager=True,
        expose_value=False,
        help="YAML file with the same keys as the flags.",
    )(command)


def echo_note(text: str) -> None:
    """A line for the user, on stderr, so that stdout stays data."""
    click.echo(text, err=True)


def progress_is_wanted(output_format: str) -> bool:
    """Whether a progress bar would be seen by somebody."""
    return output_format == "human" and sys.stderr.isatty()


class ByteProgress:
    """A bar on stderr while a terminal watches; rich is imported only then."""

    def __init__(self, *, shown: bool) -> None:
        self._shown, self._bar, self._task = shown, None, None

    def __enter__(self) -> Self:
        return self

    def update(self, done_bytes: int, total_bytes: int) -> None:
        """Show how many bytes of both sides are compared."""
        if not self._shown:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("compare", total=total_bytes)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=done_bytes)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
