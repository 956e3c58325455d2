"""The masks of a recovery, and its record made of what a pass found.

Contract: masks are verified to be of the base before anything is read; the record is a function of counts,
sums and what is known of the runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsity_audit.align.match import match
from sparsity_audit.align.roles import LayerModuleKeys
from sparsity_audit.api.recovery_inputs import Metrics, run_facts
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.masks.metadata import tool_name
from sparsity_audit.masks.reader import MaskCatalogue
from sparsity_audit.passes.aligned import AlignedRuns
from sparsity_audit.passes.mask_sink import mask_tensors
from sparsity_audit.passes.prune_masks import open_base_mask
from sparsity_audit.passes.recovery import FULL_MASK, MaskChoice, RecoveryPass
from sparsity_audit.report.recovery import (
    FrozenRecord,
    GroupRecovery,
    LeftOutPair,
    PartsRecord,
    RecoveryReport,
    RecoveryRun,
    ScoreRecord,
)
from sparsity_audit.stats.chance import share_of
from sparsity_audit.stats.recovery import CRITERIA, RecoverySums, part_recovery
from sparsity_audit.stats.recovery_verdict import (
    ControlFigures,
    RecoveryFigures,
    recovery_sentence,
    recovery_warnings,
)
from sparsity_audit.stats.scores import difference_interval, recovered_share, wilson_interval
from sparsity_audit.types import View

__all__ = ["RecoveryBuild", "RecoveryMasks"]

_BF16 = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryMasks:
    """The mask of the report, and what each run was allowed to move, with its name."""

    mask: MaskCatalogue | str
    own: tuple[MaskChoice, ...]
    names: tuple[str | None, ...]

    @classmethod
    def open(
        cls,
        sides: Sequence[Catalogue],
        mask: str | Path | None,
        of_controls: Sequence[str | Path | None],
        *,
        maps: Sequence[tuple[str, str]],
        force: bool,
    ) -> RecoveryMasks:
        """Open and verify them.

        Args:
            sides: Base, full and the runs.
            mask: That of the report; None for what full changed.
            of_controls: That of each control.
            maps: Rules that rename tensors of full to base names.
            force: Take masks whose base cannot be shown to be this one.

        Raises:
            MaskError: A mask is not one of the base.
        """
        base = sides[0]
        compared = {t.name: t for t in mask_tensors(base, match(base, sides[1], maps=tuple(maps)))}

        def opened(path: str | Path) -> MaskCatalogue:
            return open_base_mask(path, base, compared, {}, force=force)

        first = FULL_MASK if mask is None else opened(mask)
        others = tuple(None if path is None else opened(path) for path in of_controls)
        names = ["what full changed" if mask is None else str(mask)]
        names += [None if path is None else str(path) for path in of_controls]
        return cls(mask=first, own=(first, *others), names=tuple(names))

    @property
    def criterion(self) -> str:
        """Of the report's mask."""
        return self.mask.metadata.criterion if isinstance(self.mask, MaskCatalogue) else "value"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryBuild:
    """All that was found, and the report made of it.

    Args:
        sides: Base, full and the runs.
        labels: Theirs.
        aligned: Full and the runs, matched with the base.
        masks: The masks.
        found: What the pass found.
        scores: Task scores; None without.
        view: The view.
    """

    sides: Sequence[Catalogue]
    labels: Sequence[str]
    aligned: AlignedRuns
    masks: RecoveryMasks
    found: RecoveryPass
    scores: Metrics | None
    view: View

    def report(self) -> RecoveryReport:
        """The record."""
        runs = tuple(self._run(number) for number in range(len(self.sides) - 1))
        facts, parts = run_facts(self.sides[1]), runs[0].parts
        compared, inside = parts.overall.entries, parts.inside.entries
        figures = self._figures(runs)
        return RecoveryReport(
            tool=tool_name(),
            base=self.sides[0].resolved_label,
            full=self.sides[1].resolved_label,
            full_seed=facts.seed,
            full_precision=facts.precision,
            mask=self.masks.names[0] if self._has_mask else None,
            criterion=self.masks.criterion,
            view=self.view.value,
            compared=compared,
            inside=inside,
            density=share_of(inside, compared),
            criteria=tuple(criterion.key for criterion in CRITERIA),
            metric=None if self.scores is None else self.scores.metric,
            full_score=self._score("full"),
            runs=runs,
            verdict=recovery_sentence(figures),
            warnings=recovery_warnings(figures),
            left_out=tuple(LeftOutPair(name=n, reason=r) for n, r in self.aligned.left_out.items()),
            notes=self._notes(runs),
        )

    @property
    def _has_mask(self) -> bool:
        return isinstance(self.masks.mask, MaskCatalogue)

    def _run(self, number: int) -> RecoveryRun:
        """Run 0 is the base, 1 sub, then the controls."""
        place = 0 if number == 0 else number + 1
        side, label = self.sides[place], self.labels[place]
        sums = {name: parts[number] for name, parts in self.found.sums.items()}
        keys = LayerModuleKeys(sums, self.sides[0].config)
        facts = run_facts(side)
        role: Literal["base", "sub", "control"] = ("base", "sub", "control")[min(number, 2)]
        return RecoveryRun(
            label=label,
            role=role,
            reference=side.resolved_label,
            dtypes=tuple(sorted(self._dtypes(place))),
            seed=facts.seed,
            precision=facts.precision,
            parts=_parts(list(sums.values())),
            frozen=self._frozen(number),
            score=self._score(label),
            by_layer=_groups(sums, keys.layer),
            by_module=_groups(sums, keys.module),
            by_tensor=_groups(sums, lambda name: name),
        )

    def _dtypes(self, place: int) -> set[str]:
        return {(t.base, *t.tuned)[place].spec.dtype.label for t in self.aligned.tensors}

    def _frozen(self, number: int) -> FrozenRecord | None:
        count = self.found.frozen[number]
        name = self.masks.names[number - 1] if number else None
        if count is None or name is None:
            return None
        return FrozenRecord(mask=name, entries=count.entries, moved=count.moved, first=count.first)

    def _score(self, label: str) -> ScoreRecord | None:
        known = {} if self.scores is None else self.scores.accuracies
        if label not in known:
            return None
        is_run = label not in ("base", "full")
        return ScoreRecord(
            accuracy=known[label],
            interval=wilson_interval(known[label]),
            share=recovered_share(known["base"], known["full"], known[label]) if is_run else None,
            lead=difference_interval(known["sub"], known[label]) if is_run and label != "sub" else None,
        )

    def _figures(self, runs: Sequence[RecoveryRun]) -> RecoveryFigures:
        base, sub, *controls = runs
        full, mine = run_facts(self.sides[1]), (sub.seed, sub.precision)
        known = full.seed is not None and mine[0] is not None
        precisions = [p for p in (full.precision, mine[1]) if p is not None]
        inside, overall = sub.parts.inside, sub.parts.overall
        return RecoveryFigures(
            share=None if sub.score is None else sub.score.share,
            controls=tuple(
                ControlFigures(
                    label=run.label,
                    share=None if run.score is None else run.score.share,
                    lead=None if run.score is None else run.score.lead,
                )
                for run in controls
            ),
            density=share_of(inside.entries, overall.entries),
            run_inside=inside.shares,
            base_inside=base.parts.inside.shares,
            run_overall=overall.shares,
            frozen_moved={
                run.label: run.frozen.moved
                for run in runs
                if run.frozen is not None and (run.role != "sub" or self._has_mask)
            },
            same_seed=full.seed == mine[0] if known else None,
            is_bf16=all(p == _BF16 for p in precisions) if precisions else None,
        )

    def _notes(self, runs: Sequence[RecoveryRun]) -> tuple[str, ...]:
        notes = []
        unmasked = [run.label for run in runs if run.role == "control" and run.frozen is None]
        if unmasked:
            notes.append(
                f"no frozen check of {', '.join(unmasked)}: --control-mask NAME=MASK says what a control was "
                "allowed to move"
            )
        alone = runs[1].frozen
        if alone is not None and alone.moved and not self._has_mask:
            notes.append(
                f"sub moved {alone.moved:,} entries that full left alone; --mask MASK says what it was "
                "allowed to move"
            )
        lost = runs[1].parts.overall.not_finite
        if lost:
            notes.append(f"{lost:,} entries of sub have no finite Δ; they are in no cosine, sign or norm")
        return tuple(notes)


def _parts(sums: Sequence[RecoverySums]) -> PartsRecord:
    total = RecoverySums.of_blocks(sums)
    return PartsRecord(
        inside=part_recovery(total, "inside"),
        outside=part_recovery(total, "outside"),
        overall=part_recovery(total, "overall"),
    )


def _groups(sums: Mapping[str, RecoverySums], key: Callable[[str], str | None]) -> tuple[GroupRecovery, ...]:
    held: dict[str, list[RecoverySums]] = {}
    for name, part in sums.items():
        group = key(name)
        if group is not None:
            held.setdefault(group, []).append(part)
    return tuple(GroupRecovery(key=name, parts=_parts(parts)) for name, parts in held.items())
