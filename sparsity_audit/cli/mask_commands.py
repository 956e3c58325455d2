"""`sparsity-audit mask`: describe, combine, convert and draw update masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsity_audit.cli.options import (
    CRITERION,
    MAP_RULE,
    OUTPUT_PATH,
    echo_note,
    engine_options,
    stream_option,
)
from sparsity_audit.types import View

if TYPE_CHECKING:
    from sparsity_audit.api.masks import MaskInfo

__all__ = ["mask"]

_MASK = click.Path(path_type=Path)
_OUTPUT = click.option(
    "-o", "--output", "out", type=OUTPUT_PATH, required=True, help="New or empty directory."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the full record as JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def mask() -> None:
    """Make, combine, convert and describe update masks (1 = updated; a 0 does not mean "prune").

    \b
    Example:
      sparsity-audit mask info MASK
    """


@mask.command()
@click.argument("path", type=_MASK)
@_JSON
def info(path: Path, *, as_json: bool) -> None:
    """Print how many entries of each tensor a mask selects, and what it was made from.

    PATH is a mask directory, or a .pt or safetensors mask of another tool.

    \b
    Example:
      sparsity-audit mask info MASK --json
    """
    from sparsity_audit.api.masks import mask_info

    record = mask_info(path)
    if as_json:
        _print_json(record.to_json())
        return
    _print_info(record)
    width = max([len(tensor.name) for tensor in record.tensors] + [len("tensor")])
    click.echo(f"\n{'tensor':<{width}}  {'compared':>14}  {'selected':>14}  {'density':>9}  shape")
    for tensor in record.tensors:
        click.echo(
            f"{tensor.name:<{width}}  {tensor.compared:>14,}  {tensor.selected:>14,}  "
            f"{_percent(tensor.density):>9}  {list(tensor.shape)}"
        )


@mask.command()
@click.argument("path", type=_MASK)
@click.option("-o", "--output", "out", type=_MASK, help="File to write instead of stdout.")
def card(path: Path, out: Path | None) -> None:
    """Print the Hub's README for a mask directory: what it is, density per module, how to load it.

    \b
    Example:
      sparsity-audit mask card MASK -o MASK/README.md
    """
    from sparsity_audit.api.card import mask_card

    text = mask_card(path, out)
    if out is None:
        click.echo(text, nl=False)


@mask.command()
@click.argument("op", type=click.Choice(["and", "or", "minus", "not", "xor", "k-of-n"]))
@click.argument("paths", nargs=-1, required=True, type=_MASK, metavar="MASK...")
@_OUTPUT
@click.option("--k", type=int, help="k-of-n: select what at least k of the masks select.")
@click.option("--force", is_flag=True, help="Combine masks of other bases, criteria or tensors all the same.")
@engine_options
@_JSON
def ops(op: Any, paths: tuple[Path, ...], out: Path, k: int | None, *, as_json: bool, **options: Any) -> None:
    """Combine masks: and, or, xor, minus (the first without the others), not, k-of-n.

    \b
    Example:
      sparsity-audit mask ops and MASK_SEED0 MASK_SEED1 -o BOTH
      sparsity-audit mask ops k-of-n MASK... --k 2 -o AT_LEAST_TWO
    """
    from sparsity_audit.api.masks import mask_ops

    record = mask_ops(op, list(paths), out, k=k, **options)
    for tensor in record.left_out:
        click.echo(f"left out: {tensor.name} ({tensor.reason})", err=True)
    _print_result(record.to_json(), record.result, as_json=as_json)


@mask.command()
@click.argument("path", type=_MASK)
@_OUTPUT
@click.option(
    "--format",
    "encoding",
    type=click.Choice(["packed", "bool", "indices", "pt"]),
    default="packed",
    show_default=True,
    help="Encoding to write.",
)
@click.option("--inverted", is_flag=True, help="The foreign mask has 1 where an entry was not updated.")
@_JSON
def convert(path: Path, out: Path, encoding: Any, *, inverted: bool, as_json: bool) -> None:
    """Write a mask in another encoding, or import one that another tool wrote.

    \b
    Example:
      sparsity-audit mask convert MASK -o MASK_PT --format pt
      sparsity-audit mask convert their_mask.pt -o MASK
    """
    from sparsity_audit.api.masks import mask_convert

    record = mask_convert(path, out, encoding, inverted=inverted)
    _print_result(record.to_json(), record.result, as_json=as_json)


@mask.command()
@click.option("--like", type=_MASK, required=True, help="Mask whose counts are matched.")
@_OUTPUT
@click.option("--seed", type=click.IntRange(min=0), required=True, help="The same seed gives the same mask.")
@click.option("--base", help="Base checkpoint: match counts in each stratum of |w_base| as well.")
@click.option("--force", is_flag=True, help="Accept a base that cannot be shown to be the mask's.")
@stream_option
@_JSON
def random(like: Path, out: Path, seed: int, base: str | None, *, force: bool, as_json: bool) -> None:
    """Draw a random mask with exactly the counts of another: the control for an update mask.

    \b
    Example:
      sparsity-audit mask random --like MASK --seed 1 -o CONTROL
      sparsity-audit mask random --like MASK --seed 1 --base BASE -o MATCHED
    """
    from sparsity_audit.api.masks import mask_random

    record = mask_random(like, out, seed=seed, base=base, force=force)
    _print_result(record.to_json(), record.result, as_json=as_json)


def _print_json(record: dict[str, Any]) -> None:
    click.echo(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False))


def _print_result(record: dict[str, Any], result: MaskInfo, *, as_json: bool) -> None:
    if as_json:
        _print_json(record)
    else:
        _print_info(result)


def _print_info(record: MaskInfo) -> None:
    metadata = record.metadata
    sizes = record.to_json()["sizes_bytes"]
    click.echo(f"{record.path}: {record.encoding}, criterion {metadata.criterion}, view {metadata.view}")
    for side, source in (("base ", metadata.base), ("tuned", metadata.tuned)):
        if source is not None:
            click.echo(f"  {side}    {source.resolved}")
    click.echo(f"  origin   {metadata.origin.get('operation', 'not recorded')}")
    click.echo(
        f"  selected {record.selected:,} of {record.compared:,} compared entries"
        f" (update density {_percent(record.density)}; {record.entries - record.compared:,} not compared)"
    )
    click.echo(
        f"  size     packed {sizes['packed']:,} bytes, indices {sizes['indices']:,} bytes:"
        f" {record.smallest_encoding} is smaller"
    )


def _percent(density: float | None) -> str:
    return "–" if density is None else f"{100 * density:.3f} %"


@mask.command()
@click.argument("base")
@click.argument("tuned")
@_OUTPUT
@click.option(
    "--format",
    "encoding",
    type=click.Choice(["packed", "bool", "indices", "pt"]),
    default="packed",
    show_default=True,
    help="How the mask is stored.",
)
@click.option(
    "--criterion",
    type=CRITERION,
    default="value",
    show_default=True,
    help="What counts as changed; top:1% selects the largest movements.",
)
@click.option(
    "--view",
    type=click.Choice([v.value for v in View]),
    default=View.NATIVE.value,
    show_default=True,
    help="As stored, or with both sides rounded to bf16.",
)
@click.option(
    "--map", "maps", type=MAP_RULE, multiple=True, help="Rename tuned tensors: REGEX=REPL, as in re.sub."
)
@engine_options
@click.option("--overwrite", is_flag=True, help="Replace an earlier packed mask in the directory.")
@stream_option
@_JSON
def export(*, as_json: bool, **options: Any) -> None:
    """Write the update mask of a pair: 1 where TUNED differs from BASE.

    \b
    Example:
      sparsity-audit mask export BASE TUNED -o MASK --format indices --criterion top:1%
    """
    from sparsity_audit.api.export import mask_export

    info = mask_export(**options, on_note=echo_note)
    if as_json:
        _print_json(info.to_json())
    else:
        _print_info(info)
