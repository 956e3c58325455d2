"""`sparsity-audit patch make|apply|info`: an update as the entries that changed."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sparsity_audit.cli.options import OUTPUT_PATH, echo_note, format_options

__all__ = ["patch"]

_PATCHES = click.argument("patches", nargs=-1, required=True, type=click.Path(path_type=Path))
_WORKERS = click.option(
    "--workers", type=click.IntRange(min=1), help="Threads [default: one a core, at most 8]."
)


@click.group()
def patch() -> None:
    """Ship an update as the entries that changed, and rebuild the checkpoint bit for bit.

    \b
    Example:
      sparsity-audit patch make examples/addition/base examples/addition/grpo-seed0 -o update
      sparsity-audit patch apply examples/addition/base update -o rebuilt
    """


@patch.command(short_help="Write what turns BASE into TUNED.")
@click.argument("base")
@click.argument("tuned", nargs=-1, required=True)
@click.option("-o", "--output", type=OUTPUT_PATH, required=True, help="New directory for the patch.")
@click.option(
    "--codec",
    type=click.Choice(["none", "zstd"]),
    default="none",
    show_default=True,
    help="Compress positions and values (extra `zstd`).",
)
@_WORKERS
@format_options
def make(
    *,
    base: str,
    tuned: tuple[str, ...],
    output: Path,
    codec: str,
    workers: int | None,
    output_format: str,
    as_json: bool,
) -> None:
    """Write what turns BASE into TUNED: places and stored values of the entries whose codes differ.

    Values are absolute, so that nothing drifts. Every tensor carries its sha256. Given several TUNED, the
    steps of a series, each is written against the one before.

    \b
    Example:
      sparsity-audit patch make examples/addition/base examples/addition/grpo-seed0 \\
          examples/addition/grpo-seed1 -o updates
    """
    from sparsity_audit.api.patch import patch_make

    chosen = "zstd" if codec == "zstd" else "none"
    infos = patch_make(base, tuned, output, codec=chosen, workers=workers, on_note=echo_note)
    echo_note(f"patch written to {output}")
    _show(infos, output_format="json" if as_json else output_format)


@patch.command(short_help="Rebuild the tuned checkpoint from BASE and PATCHES.")
@click.argument("base")
@_PATCHES
@click.option("-o", "--output", type=OUTPUT_PATH, required=True, help="New directory for the checkpoint.")
@_WORKERS
def apply(*, base: str, patches: tuple[Path, ...], output: Path, workers: int | None) -> None:
    """Rebuild the tuned checkpoint from BASE and PATCHES, or write nothing.

    Each tensor of BASE is hashed while it is read and each of the result while it is written; both hashes
    must be those of the patch. Several patches are a series, in its order; its directory stands for all of
    them.

    \b
    Example:
      sparsity-audit patch apply examples/addition/base update -o rebuilt-again
    """
    from sparsity_audit.api.patch import patch_apply

    written = patch_apply(base, patches, output, workers=workers, on_note=echo_note)
    echo_note(f"checkpoint written to {written}: every tensor has the sha256 that the patch states")


@patch.command(short_help="Print what PATCHES hold, and sizes beside others.")
@_PATCHES
@format_options
def info(*, patches: tuple[Path, ...], output_format: str, as_json: bool) -> None:
    """Print what PATCHES hold, and their size beside the dense checkpoint and other encodings.

    \b
    Example:
      sparsity-audit patch info update
    """
    from sparsity_audit.api.patch import patch_info

    _show(patch_info(patches), output_format="json" if as_json else output_format)


def _show(infos: tuple, *, output_format: str) -> None:
    from sparsity_audit.report.patch import patch_info_to_json, print_patch_info

    if output_format == "json":
        sys.stdout.buffer.write(patch_info_to_json(infos[0] if len(infos) == 1 else infos))
        sys.stdout.buffer.flush()
    elif output_format == "human":
        for record in infos:
            print_patch_info(record)
