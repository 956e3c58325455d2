"""What is said of a pruned update: records made of the matching and of what was counted.

Contract: pure but for the list of files beside the weights; counts are sums of exact integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparsity_audit.align.records import Alignment, Side
from sparsity_audit.checkpoint.companions import Companions, choose_companions
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.masks.bitmask import popcount
from sparsity_audit.masks.metadata import tool_name
from sparsity_audit.masks.reader import MaskReader
from sparsity_audit.masks.shards import StoredTensor
from sparsity_audit.passes.plan import Plan
from sparsity_audit.passes.prune import PairCounts
from sparsity_audit.passes.prune_masks import KeepMask
from sparsity_audit.report.prune import PRUNE_FILE, PrunedTensor, PruneRecord, UnmatchedTensor
from sparsity_audit.stats.tally import Tally
from sparsity_audit.types import View

__all__ = ["PruneRecords"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneRecords:
    """All that was found, and the records made of it.

    Args:
        plan: The pairs.
        alignment: The matching behind them.
        tallies: Their tallies, for fingerprints.
        stored: The tensors of the results.
        counts: What was counted of each pair.
        like: The side that gave names and shapes.
        view: The view whose Δ was counted.
        seed: Of random selections.
    """

    plan: Plan
    alignment: Alignment
    tallies: Sequence[Tally]
    stored: Sequence[StoredTensor]
    counts: Sequence[PairCounts]
    like: Side
    view: View
    seed: int

    @property
    def side(self) -> Catalogue:
        """The checkpoint that gave names and shapes."""
        return self.plan.base if self.like == "base" else self.plan.tuned

    @property
    def folder(self) -> Path:
        """Where the files beside the weights lie."""
        return self.side.folder

    def record(self, number: int, mask: KeepMask) -> PruneRecord:
        """The record of one checkpoint, by its number in the counts."""
        kept = [counts.kept[number] for counts in self.counts]
        compared = sum(counts.entries for counts in self.counts)
        square = sum(counts.square for counts in self.counts)
        beside = self._companions()
        total = PruneRecord(
            tool=tool_name(),
            base=self.plan.base.resolved_label,
            tuned=self.plan.tuned.resolved_label,
            like=self.like,
            keep=mask.keep.key,
            complement=mask.keep.complement,
            sentence=mask.keep.sentence,
            seed=self.seed if mask.keep.kind == "random" else None,
            view=self.view.value,
            compared=compared,
            changed=sum(counts.changed for counts in self.counts),
            moved=sum(counts.moved for counts in self.counts),
            not_finite=sum(counts.not_finite for counts in self.counts),
            kept=sum(part.kept for part in kept),
            kept_changed=sum(part.changed for part in kept),
            kept_moved=sum(part.moved for part in kept),
            kept_share=sum(part.kept for part in kept) / compared if compared else None,
            update_density=sum(part.changed for part in kept) / compared if compared else None,
            square_share=min(sum(part.square for part in kept) / square, 1.0) if square else None,
            selections=mask.selections,
            selected_unmatched=_selected_outside(mask, compared, sum(part.kept for part in kept)),
            tensors=self._tensors(number),
            unmatched=self._unmatched(),
            aliases=dict(self.side.aliases),
            files=beside.taken,
            files_left=beside.left,
            findings=self.alignment.findings,
            notes=(),
        )
        return replace(total, notes=self._notes(total, mask))

    def _tensors(self, number: int) -> tuple[PrunedTensor, ...]:
        dtypes = {tensor.name: tensor.dtype for tensor in self.stored}
        return tuple(
            PrunedTensor(
                name=pair.name,
                tuned_name=pair.tuned.spec.name,
                rule=pair.rule,
                dtype=dtypes[(pair.base if self.like == "base" else pair.tuned).spec.name].value,
                base_fingerprint=f"{tally.base_fingerprint:016x}",
                tuned_fingerprint=f"{tally.tuned_fingerprint:016x}",
                entries=counts.entries,
                changed=counts.changed,
                moved=counts.moved,
                kept=counts.kept[number].kept,
                kept_moved=counts.kept[number].moved,
                square=counts.square,
                square_kept=counts.kept[number].square,
            )
            for pair, tally, counts in zip(self.plan.pairs, self.tallies, self.counts, strict=True)
        )

    def _unmatched(self) -> tuple[UnmatchedTensor, ...]:
        found = [
            UnmatchedTensor(
                side=left.side,
                name=left.name,
                entries=left.num_entries,
                reason=f"{left.reason}{f' ({left.detail})' if left.detail else ''}",
                written=left.side == self.like,
            )
            for left in self.alignment.leftovers
        ]
        found += [
            UnmatchedTensor(
                side=self.like,
                name=pair.name,
                entries=pair.base.num_entries,
                reason=pair.reason,
                written=True,
            )
            for pair in self.alignment.skipped
        ]
        return tuple(found)

    def _companions(self) -> Companions:
        names = [path.name for path in self.folder.iterdir() if path.is_file()]
        return choose_companions(name for name in names if name != PRUNE_FILE)

    def _notes(self, record: PruneRecord, mask: KeepMask) -> tuple[str, ...]:
        notes = []
        dtypes = {tensor.name: tensor.dtype for tensor in self.stored}
        wider = sum(dtypes[name] is not spec.dtype for name, spec in self.side.tensors.items())
        if wider:
            notes.append(
                f"{wider} tensors are stored in a wider dtype than in {self.like}; config.json is a copy and "
                "may name another, in which a loader would round them"
            )
        if record.aliases:
            notes.append(
                f"{len(record.aliases)} tied names are not written; the configuration ties them on loading"
            )
        asked = sum(selection.asked for selection in mask.selections)
        if mask.keep.kind == "top" and sum(s.selected for s in mask.selections) < asked:
            notes.append(f"{mask.keep.key} asks for {asked:,} entries, which is more than moved")
        if record.selected_unmatched:
            notes.append(
                f"{mask.keep.key} selects {record.selected_unmatched:,} entries where nothing was compared; "
                "they are not kept"
            )
        if record.not_finite:
            notes.append(f"{record.not_finite:,} entries have no finite Δ², and are left out of its sums")
        return tuple(notes)


def _selected_outside(mask: KeepMask, compared: int, kept: int) -> int:
    """Entries that a given mask selects where nothing was compared; 0 for masks that were made here."""
    if mask.keep.kind != "mask" or mask.mask is None:
        return 0
    with MaskReader(mask.mask) as reader:
        selected = sum(popcount(bits) for name in reader.tensors for _, bits in reader.blocks(name))
    return selected - (compared - kept if mask.keep.complement else kept)
