"""What two papers call update sparsity, computed exactly as they compute it.

Contract: a preset is a selection over a finished `DiffReport` (which tensors, which view, which criterion),
so it costs no second pass; `preset_criteria` says what the pass must count for it. What their programs leave
out is listed, and what cannot be told from a report is a caveat, never a silent difference. See
docs/design/presets.md for where each rule comes from.

Source: 2505.11711 with https://github.com/SagnikMukherjee/sparsity_in_rl (`src/check_sparsity.py`, commit
c0d5511); 2511.08567 Def. 2.1 and 2.2, whose code is not published.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparsity_audit.align.records import LeftoverReason
from sparsity_audit.align.rules import is_embedding, is_vocabulary
from sparsity_audit.errors import UsageError
from sparsity_audit.report.preset import DroppedTensor, PresetResult
from sparsity_audit.report.schema import DiffReport, LeftoverRecord, TensorRecord
from sparsity_audit.stats.rollup import ViewSummary
from sparsity_audit.types import Criterion, DType, View

__all__ = ["PRESETS", "Preset", "apply_preset", "preset_criteria", "preset_named"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """How one paper measures.

    Args:
        name: What users type.
        criterion: The rule on two bf16 numbers; must be counted by the pass.
        rule: The rule in words.
        source: Paper and program.
    """

    name: str
    criterion: Criterion
    rule: str
    source: str


_WHOLE_PARAMETERS = (
    "over every entry of the base's parameters (buffers left out, tied tensors once, tensors that are "
    "missing or of another shape on the tuned side left out whole), all entries weighing the same"
)

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="mukherjee2025",
            # Their difference of two bf16 tensors is rounded to bf16, and so is the tolerance of `isclose`:
            # 1e-5 becomes 168·2⁻²⁴, and every |Δ| up to 168.5·2⁻²⁴ is rounded to at most that (a tie goes to
            # the even 168). So this tolerance on exact differences gives their counts, and 1e-5 does not.
            criterion=Criterion(kind="atol", parameter=168.5 * 2.0**-24),
            rule=f"both sides cast to bf16; unchanged when |bf16(Δ)| ≤ bf16(1e-5); {_WHOLE_PARAMETERS}",
            source="arXiv 2505.11711, github.com/SagnikMukherjee/sparsity_in_rl src/check_sparsity.py",
        ),
        Preset(
            name="zhu2025",
            criterion=Criterion(kind="rel", parameter=1e-3),
            rule=f"both sides in bf16; unchanged when |Δ| ≤ 1e-3·max(|base|, |tuned|); {_WHOLE_PARAMETERS}",
            source="arXiv 2511.08567 Def. 2.1 and 2.2 (code not published; which tensors it leaves out is "
            "not stated, so the choice of 2505.11711's program is used)",
        ),
    )
}

_FUSED = frozenset({"fused", "interleaved"})
# Last name components that model classes register as buffers, so that `named_parameters` lacks them.
_BUFFERS = frozenset(
    {
        *("inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "position_ids", "token_type_ids"),
        *("masked_bias", "e_score_correction_bias"),
        *("running_mean", "running_var", "num_batches_tracked"),
    }
)


def preset_named(name: str) -> Preset:
    """The preset of that name. Raises UsageError with the names there are."""
    if name not in PRESETS:
        raise UsageError(f"preset {name!r}", "not known", expected=" or ".join(sorted(PRESETS)))
    return PRESETS[name]


def preset_criteria(name: str, criteria: Sequence[Criterion | str] = ()) -> tuple[Criterion | str, ...]:
    """What to pass as `diff(criteria=…)` for a preset; the mask criterion stays what it would be without."""
    return (*(criteria or ("value",)), preset_named(name).criterion)


def apply_preset(report: DiffReport, name: str) -> PresetResult:
    """The number that the paper behind a preset would print for this pair.

    Args:
        report: The audit of a pair that counted the preset's criterion (see `preset_criteria`).
        name: `mukherjee2025` or `zhu2025`.

    Raises:
        UsageError: No such preset, or the report does not count its criterion.
    """
    preset = preset_named(name)
    key = preset.criterion.key
    if key not in report.criteria:
        raise UsageError(
            f"preset {name}",
            f"the report does not count {key}",
            expected=f"one of {', '.join(report.criteria)} does not do",
            remedy=f"run diff again with --preset {name}",
        )
    kept, dropped = _split(report)
    compared = changed = 0
    for tensor in kept:
        count = next(c for c in _served(tensor).counts if c.criterion == key)
        compared, changed = compared + count.compared, changed + count.changed
    return PresetResult(
        preset=preset.name,
        criterion=key,
        view=View.SERVED,
        compared=compared,
        changed=changed,
        sparsity=(compared - changed) / compared if compared else None,
        dropped=tuple(sorted(dropped, key=lambda tensor: tensor.name)),
        rule=preset.rule,
        source=preset.source,
        caveats=tuple(_caveats(report, kept)),
    )


def _split(report: DiffReport) -> tuple[list[TensorRecord], list[DroppedTensor]]:
    """Tensors in the denominator, and those of the base that are not."""
    kept: list[TensorRecord] = []
    dropped: list[DroppedTensor] = []
    left = {x.name: x for x in report.leftovers if x.side == "base"}
    embeddings = [t for t in report.tensors if t.summary.kind == "embedding" and is_embedding(t.name)]
    fused: dict[str, int] = {}
    for tensor in report.tensors:
        name, _, part = tensor.name.partition(":")
        if tensor.rule in _FUSED:
            fused[name if part else tensor.name] = fused.get(name, 0) + tensor.entries
            continue
        reason = _why_dropped(tensor, is_second_name=_is_tied_head(tensor, embeddings))
        if reason is None:
            kept.append(tensor)
        else:
            entries = tensor.entries + (left[name].num_entries if name in left else 0)
            dropped.append(DroppedTensor(name=tensor.name, entries=entries, reason=reason))
    dropped += [
        DroppedTensor(name=name, entries=entries, reason="stored fused on one side alone: other names there")
        for name, entries in fused.items()
    ]
    seen = {t.name for t in dropped}
    dropped += [
        DroppedTensor(name=x.name, entries=x.num_entries, reason=_why_left(x))
        for x in left.values()
        if x.name not in seen
    ]
    dropped += [
        DroppedTensor(name=x.name, entries=x.num_entries, reason=f"not compared: {x.reason}")
        for x in report.skipped
    ]
    return kept, dropped


def _why_dropped(tensor: TensorRecord, *, is_second_name: bool) -> str | None:
    if _is_buffer(tensor.name, tensor.summary.kind, tensor.summary.base_dtype):
        return "a buffer, not a parameter"
    if tensor.rule == "resized":
        return "shapes differ"
    return "tied to the embedding by the base's configuration" if is_second_name else None


def _is_buffer(name: str, kind: str, dtype: DType) -> bool:
    owner, _, last = name.rpartition(".")
    is_causal_mask = last == "bias" and kind == "other" and owner.rpartition(".")[2] in ("attn", "attention")
    return dtype.kind != "float" or last in _BUFFERS or is_causal_mask


def _is_tied_head(tensor: TensorRecord, embeddings: Sequence[TensorRecord]) -> bool:
    """Whether a head is stored although the configuration ties it (the roles then call it an embedding)."""
    is_head = is_vocabulary(tensor.name) and not is_embedding(tensor.name)
    return tensor.summary.kind == "embedding" and is_head and bool(embeddings)


def _why_left(leftover: LeftoverRecord) -> str:
    if leftover.reason in (LeftoverReason.SHAPE, LeftoverReason.TRANSPOSED, LeftoverReason.ADDED_ROWS):
        return "shapes differ"
    if leftover.reason == LeftoverReason.UNTIED:
        return "tied on the tuned side alone"
    return "no tensor of that name on the tuned side"


def _served(tensor: TensorRecord) -> ViewSummary:
    return tensor.summary.native if tensor.summary.served is None else tensor.summary.served


def _caveats(report: DiffReport, kept: Sequence[TensorRecord]) -> Iterable[str]:
    if report.level == "counts":
        yield (
            "NaN and infinite entries were not counted (--stats counts); the papers call an entry "
            "changed where both sides hold the same one, this number does not"
        )
    else:
        special = sum(min(_nonfinite(_served(t), "base"), _nonfinite(_served(t), "tuned")) for t in kept)
        if special:
            yield (
                f"up to {special} entries are the same NaN or infinity on both sides: changed by the paper's "
                "arithmetic (their difference is NaN), unchanged here"
            )
    untied = [x for x in report.leftovers if x.side == "base" and x.reason == LeftoverReason.UNTIED]
    for leftover in untied:
        yield (
            f"{leftover.name} ({leftover.num_entries} entries) is tied on the tuned side alone: the program "
            "compares it with the tied tensor, this number leaves it out"
        )
    scaled = sum(t.entries for t in kept if t.summary.base_dtype.itemsize == 1)
    if scaled:
        yield f"{scaled} entries are stored in fp8: what the program's loader makes of them is not known"
    mapped = sum(t.entries for t in kept if t.rule == "map")
    if mapped:
        yield f"{mapped} entries were matched by --map, which the program does not have"


def _nonfinite(summary: ViewSummary, side: str) -> int:
    specials = summary.base_specials if side == "base" else summary.tuned_specials
    return specials.nan + specials.inf
