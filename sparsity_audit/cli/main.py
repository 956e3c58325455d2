"""`sparsity-audit`: the command group, its exit codes and its error messages.

Contract: commands are imported when they are called, so that `--help` stays light. Exit 0 done,
1 a stated expectation failed, 2 usage, input or I/O error and any uncaught exception, 130 interrupted.
An expected error prints one message on stderr and no traceback; a bug prints its traceback.
"""

from __future__ import annotations

import importlib
import io
import sys
import traceback
from typing import Any, NoReturn

import click

from sparsity_audit import __version__
from sparsity_audit.cli.object_outputs import ObjectOutputs, object_outputs
from sparsity_audit.errors import SparsityAuditError

__all__ = ["cli", "entry_point"]

_COMMANDS = {
    "diff": ("diff_command", "diff", "Compare two checkpoints: how sparse is the update, and why."),
    "inspect": ("inspect_command", "inspect", "Print a checkpoint's headers: tensors, dtypes, ties, shards."),
    "lab": ("lab_commands", "lab", "Real RL fine-tuning of a small model on one CPU core."),
    "mask": ("mask_commands", "mask", "Make, combine, convert and describe update masks."),
    "merge": ("merge_command", "merge", "Join the shares of a run that was split over machines."),
    "overlap": ("overlap_command", "overlap", "Compare runs: how much of their overlap is chance."),
    "patch": ("patch_commands", "patch", "Ship an update as the entries that changed; rebuild bit for bit."),
    "plot": ("plot_command", "plot", "Draw figures of finished audits, several side by side."),
    "series": ("series_command", "series", "Follow the weights along the saved steps of a run."),
    "prune": ("prune_command", "prune", "Write a base with a part of an update as a checkpoint."),
    "recovery": ("recovery_command", "recovery", "Judge a retrained subnetwork against the full run."),
    "retrain": ("retrain_command", "retrain", "Train only a subnetwork, and the controls it needs."),
    "report": ("report_command", "report", "Render finished audits again, without the checkpoints."),
    "tokens": ("tokens_commands", "tokens", "Compare what two models say: which tokens RL changed."),
}


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Names in alphabetical order."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import one command."""
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        return getattr(importlib.import_module(f"sparsity_audit.cli.{module}"), attribute)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Remember the arguments, by which a call that has to upload something knows itself again."""
        ObjectOutputs(ctx, tuple(args))
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what it wrote for an object store is uploaded at its end."""
        outputs = object_outputs(ctx)
        assert outputs is not None, "made by parse_args"
        return outputs.run(lambda: super(_LazyGroup, self).invoke(ctx))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][2]) for name in self.list_commands(ctx)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command when there is none of that name."""
        name = args[0]
        if name not in _COMMANDS and not name.startswith("-"):
            import difflib

            close = difflib.get_close_matches(name, _COMMANDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Commands: {', '.join(sorted(_COMMANDS))}."
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sparsity-audit")
def cli() -> None:
    """What RL fine-tuning changed in the weights, and how much of it is rounding.

    \b
    Example:
      sparsity-audit diff examples/addition/base examples/addition/grpo-seed0
    """


def entry_point() -> NoReturn:
    """Run the command line and exit with its status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that is not UTF-8, or a file name that is not: a sign less, not a failed run.
            stream.reconfigure(errors="replace")
    try:
        status = cli.main(standalone_mode=False)
    except SparsityAuditError as error:
        _fail(f"error: {error}", error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except BrokenPipeError:
        # The reader of stdout (head, say) has enough; Python would complain once more at exit.
        sys.stdout = None
        sys.exit(2)
    except Exception:  # noqa: BLE001 - the last line of defence: a bug must not look like a failed gate
        traceback.print_exc()
        _fail("error: this is a bug in sparsity-audit; please report it with the lines above", 2)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(status)


if __name__ == "__main__":
    entry_point()
