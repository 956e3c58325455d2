"""The runs of an overlap: masks opened, those of checkpoints made, all of them checked against each other.

Contract: headers alone are read, but for the checkpoints whose masks are made, and for a base that must be
proven to be the masks' base. What does not belong together is a `MaskError` that shows both sides.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

from sparsity_audit.api.sides import open_against
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.errors import MaskError, UsageError
from sparsity_audit.masks.algebra import CombinedSource, Operand
from sparsity_audit.masks.metadata import UNSPECIFIED
from sparsity_audit.masks.reader import MaskCatalogue, MaskReader, open_mask
from sparsity_audit.masks.shards import INDEX_NAME
from sparsity_audit.passes.base_strata import MagnitudeGrouping, StrataGrouping
from sparsity_audit.passes.deltas import sum_deltas
from sparsity_audit.passes.engine import Workers
from sparsity_audit.stats.agreement import DeltaAgreement, delta_agreement
from sparsity_audit.types import Criterion, View

__all__ = ["OpenedRuns", "agreement", "base_strata", "named_runs", "open_runs", "place_of", "verified"]


def named_runs(runs: Sequence[str | Path], reference: str | Path | None) -> list[str]:
    """The runs as texts, the reference among them. Raises UsageError."""
    given = [str(run) for run in runs]
    if reference is not None and place_of(given, reference) is None:
        given.append(str(reference))
    if len(given) < 2:
        raise UsageError(
            "overlap",
            f"{len(given)} runs",
            expected="two or more masks or checkpoints, or a YAML file of them",
        )
    doubled = [text for text, count in Counter(map(_same_path, given)).items() if count > 1]
    if doubled:
        raise UsageError(
            doubled[0], "given twice", expected="different runs: a run overlaps with itself entirely"
        )
    return given


def place_of(given: Sequence[str], run: str | Path) -> int | None:
    """Which of the runs `run` is, by the path it leads to; None where it is none of them."""
    paths = [_same_path(text) for text in given]
    return paths.index(_same_path(str(run))) if _same_path(str(run)) in paths else None


def _same_path(text: str) -> str:
    path = Path(text).expanduser()
    return str(path.resolve()) if path.exists() else text


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedRuns:
    """The runs' masks and what they were made of; parallel."""

    masks: tuple[MaskCatalogue, ...]
    kinds: tuple[Literal["mask", "checkpoint"], ...]


def open_runs(
    given: Sequence[str],
    stack: ExitStack,
    *,
    base: str | Path | None,
    criterion: Criterion | str | None,
    view: View | str | None,
    make: Callable[..., object],
    note: Callable[[str], None],
) -> OpenedRuns:
    """Open the masks, and make those of checkpoints under the same question."""
    masks = {run: open_mask(run) for run in given if (Path(run).expanduser() / INDEX_NAME).is_file()}
    question = _question(masks, criterion=criterion, view=view)
    missing = [run for run in given if run not in masks]
    if missing and base is None:
        raise MaskError(
            missing[0],
            "no mask directory",
            expected=f"a directory with {INDEX_NAME}, or a checkpoint beside its base",
            remedy="--base BASE compares checkpoints; `diff BASE RUN --mask DIR` makes a mask to keep",
        )
    if missing and UNSPECIFIED in question:
        raise MaskError(
            next(iter(masks)),
            "a mask that does not record its criterion and view",
            expected="those under which the masks of checkpoints are to be made",
            remedy="make their masks with `diff BASE RUN --mask DIR`, then compare masks with --force",
        )
    if missing:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparsity-audit-")))
        for number, run in enumerate(missing):
            note(f"making the mask of {run} ({question[0]}, {question[1]} view)")
            make(base, run, criteria=question[:1], view=question[1], mask=scratch / str(number))
            masks[run] = open_mask(scratch / str(number))
    return OpenedRuns(
        masks=tuple(masks[run] for run in given),
        kinds=tuple("checkpoint" if run in missing else "mask" for run in given),
    )


def _question(
    masks: Mapping[str, MaskCatalogue], *, criterion: Criterion | str | None, view: View | str | None
) -> tuple[str, str]:
    """Criterion and view of all runs: as asked, else those of the first mask. Raises MaskError."""
    parsed = Criterion.parse(criterion) if isinstance(criterion, str) else criterion
    asked = (None if parsed is None else parsed.key, None if view is None else View(view).value)
    for run, mask in masks.items():
        found = (mask.metadata.criterion, mask.metadata.view)
        for what, wanted, there in zip(("criterion", "view"), asked, found, strict=True):
            if wanted is not None and wanted != there:
                raise MaskError(
                    run,
                    f"a mask made under {what} {there!r}",
                    expected=f"{wanted!r}, as asked",
                    remedy=f"leave --{what} to the masks, or give the checkpoint in place of this mask",
                )
    first = next((mask.metadata for mask in masks.values()), None)
    known = ("value", View.NATIVE.value) if first is None else (first.criterion, first.view)
    return asked[0] or known[0], asked[1] or known[1]


def base_strata(
    inputs: OpenedRuns, readers: Sequence[MaskReader], base: Catalogue, stack: ExitStack, *, force: bool
) -> tuple[StrataGrouping, MagnitudeGrouping]:
    """Strata of the base's weights, and finer ones.

    Raises:
        MaskError: The base is not known to be the masks' base.
    """
    made = [reader for reader, kind in zip(readers, inputs.kinds, strict=True) if kind == "checkpoint"]
    like = made[0] if made else min(readers, key=lambda reader: len(reader.tensors))
    # A mask made from this base a moment ago needs no proof of it, and the others share its base.
    strata = StrataGrouping(like, base, force=force or bool(made))
    finer = MagnitudeGrouping(like, base, force=True)  # the same base, which was verified a line above
    return stack.enter_context(closing(strata)), stack.enter_context(closing(finer))


def verified(
    given: Sequence[str], readers: Sequence[MaskReader], *, force: bool
) -> tuple[CombinedSource, tuple[str, ...]]:
    """What all masks compare, and what differs where that was forced. Raises MaskError."""
    operands = [Operand(path=run, source=reader) for run, reader in zip(given, readers, strict=True)]
    notes: list[str] = []
    try:
        combined = CombinedSource("and", operands)
    except MaskError as error:
        if not force:
            raise
        notes.append(f"forced: {error.subject}: {error.found}; what follows compares unlike things")
        combined = CombinedSource("and", operands, force=True)
    if not combined.tensors:
        raise MaskError(" and ".join(given), "no tensor in common", expected="masks of one model")
    for name in combined.tensors:
        ranges = [reader.tensors[name].compared for reader in readers]
        other = next((place for place, found in enumerate(ranges) if found != ranges[0]), None)
        if other is None:
            continue
        subject = f"{given[0]} and {given[other]}: tensor {name!r}"
        found = f"compared rows {[list(pair) for pair in ranges[0]]!r:.80} and "
        found += f"{[list(pair) for pair in ranges[other]]!r:.80}"
        if not force:
            raise MaskError(
                subject, found, expected="the same rows", remedy="--force counts the rows compared in all"
            )
        notes.append(f"forced: {subject}: {found}; only common rows are counted")
    return combined, tuple(notes)


def agreement(
    inputs: OpenedRuns,
    given: Sequence[str],
    base: Catalogue | None,
    *,
    view: str,
    maps: Sequence[tuple[str, str]],
    workers: Workers,
) -> tuple[dict[tuple[int, int], DeltaAgreement], list[str]]:
    """Signs and cosines of the Δ of every pair of checkpoints, and what a reader must know of them."""
    places = [place for place, kind in enumerate(inputs.kinds) if kind == "checkpoint"]
    if base is None or len(places) < 2:
        return {}, ["no signs and cosines of Δ: they need two runs given as checkpoints"]
    found = sum_deltas(
        base,
        [open_against(base, given[place]) for place in places],
        [inputs.masks[place] for place in places],
        maps=maps,
        view=View(view),
        workers=workers,
    )
    notes = [
        f"Δ of {name}: {reason}; left out of signs and cosines" for name, reason in found.left_out.items()
    ]
    return {
        (r, q): delta_agreement(found.sums, i, j) for (i, r), (j, q) in combinations(enumerate(places), 2)
    }, notes
