"""A base and a PEFT adapter as one checkpoint: W + scale · B A, merged while it is read.

Contract: the result has the names, shapes and dtypes of the base; targeted weights are merged in fp32 and
rounded once to the base's dtype, as `merge_and_unload` does, or left in fp32 (`rounded=False`). Tensors that
the adapter stores whole (`modules_to_save`, trained biases) take the place of the base's. Every tensor of
the adapter is used, or the adapter is refused. An adapter whose names or shapes are not the base's is one of
another base: an error.

Source: LoRA 2106.09685, rsLoRA 2312.03732 (alpha ÷ √r), DoRA 2402.09353 eq. 5; peft 0.21
`tuners/lora/layer.py`, `variants.py` for the order of roundings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sparsity_audit.checkpoint.adapter_config import AdapterConfig, read_adapter_config
from sparsity_audit.checkpoint.layout import abridged
from sparsity_audit.checkpoint.merging import Factors, Merge, merged_entry
from sparsity_audit.checkpoint.spelling import MASTER
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.errors import CorruptCheckpointError, UnsupportedFormatError, UsageError
from sparsity_audit.types import DType, TensorSpec

__all__ = ["merge_adapter"]

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>A|B|embedding_A|embedding_B|magnitude_vector)(?:\.default)?(?P<end>\.weight|\.bias)?"
)
_PREFIXES = ("base_model.model.", "base_model.")
_MERGED_DTYPES = (DType.BF16, DType.F16, DType.F32, DType.F64)


@dataclass(slots=True)
class _Module:
    """What the adapter holds for one module."""

    factors: dict[str, TensorSpec] = field(default_factory=dict)


def merge_adapter(base: Catalogue, adapter: Catalogue, *, rounded: bool = True) -> Catalogue:
    """The catalogue of the base with the adapter merged into it.

    Args:
        base: The base.
        adapter: An adapter, as `open_checkpoint` reads one: `adapter.adapter` is its configuration.
        rounded: Whether merged weights have the base's dtype; otherwise fp32 (fp64 on an fp64 base).

    Raises:
        UsageError: An adapter of another base: its modules or shapes are not the base's.
        UnsupportedFormatError: A kind of adapter or an option that is not merged, or a quantised base.
        CorruptCheckpointError: A factor without its partner, or a configuration without meaning.
    """
    assert adapter.adapter is not None, adapter.reference
    subject = adapter.reference
    config = read_adapter_config(adapter.adapter, subject=subject)
    offset = len(base.files)
    modules: dict[str, _Module] = {}
    whole: dict[str, TensorSpec] = {}
    for stored, spec in adapter.tensors.items():
        moved = replace(spec, file=spec.file + offset)
        match = _FACTOR.fullmatch(_without_prefix(stored))
        if match is None:
            whole[_whole_name(stored)] = moved
        elif match["end"] == ".bias":
            raise UnsupportedFormatError(
                subject, f"holds {stored!r}: lora_bias is not merged here", remedy="merge it with peft"
            )
        else:
            modules.setdefault(match["module"], _Module()).factors[match["kind"]] = moved
    tensors, aliases = dict(base.tensors), dict(base.aliases)
    _put_whole(base, whole, tensors, aliases, subject)
    merges = _merges(config, modules, tensors, aliases, subject)
    files = (*base.files, *adapter.files)
    entry, specs = merged_entry(merges, files, path=adapter.files[0].path, rounded=rounded)
    tensors |= specs
    suffix = "" if rounded else MASTER
    return replace(
        base,
        reference=f"{base.reference}+{adapter.reference}",
        resolved=f"{base.resolved}+{adapter.resolved_label.removesuffix(MASTER)}{suffix}",
        files=(*files, entry),
        tensors=dict(sorted(tensors.items())),
        aliases=aliases,
        notes=(*_notes(base, adapter, config, whole, merges, rounded=rounded),),
    )


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _whole_name(stored: str) -> str:
    """Name in the base of a tensor that the adapter stores whole."""
    name = _without_prefix(stored).replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
    return name.replace(".base_layer.", ".")


def _put_whole(
    base: Catalogue,
    whole: Mapping[str, TensorSpec],
    tensors: dict[str, TensorSpec],
    aliases: dict[str, str],
    subject: str,
) -> None:
    unknown = sorted(name for name in whole if name not in tensors and name not in aliases)
    if unknown:
        raise UsageError(
            subject,
            f"holds {len(unknown)} tensors that {base.reference} does not have: {abridged(unknown)}",
            expected="an adapter of this base",
            remedy="give the base that adapter_config.json names",
        )
    for name, spec in whole.items():
        aliases.pop(name, None)  # a copy of its own: no longer tied
        tensors[name] = replace(spec, name=name)


def _merges(
    config: AdapterConfig,
    modules: Mapping[str, _Module],
    tensors: Mapping[str, TensorSpec],
    aliases: Mapping[str, str],
    subject: str,
) -> list[Merge]:
    names = {module: f"{module}.weight" for module in modules}
    unknown = sorted(name for name in names.values() if aliases.get(name, name) not in tensors)
    if unknown or not modules:
        raise UsageError(
            subject,
            f"adapts {len(unknown)} of {len(modules)} modules that are not in the base: {abridged(unknown)}"
            if modules
            else "holds no LoRA factors",
            expected="an adapter of this base, whose names are those of the base's tensors",
            remedy="give the base that adapter_config.json names, not one in which tensors are fused",
        )
    merges: dict[str, Merge] = {}
    for module, found in sorted(modules.items()):
        stored = aliases.get(names[module], names[module])
        if stored in merges:
            raise UnsupportedFormatError(
                subject, f"adapts both names of the tied tensor {stored!r}", remedy="merge it with peft"
            )
        merges[stored] = _merge(config, module, found, tensors[stored], subject)
    return list(merges.values())


def _merge(config: AdapterConfig, module: str, found: _Module, spec: TensorSpec, subject: str) -> Merge:
    factors = _factors(config, module, found, subject)
    rank, scale = factors.rank, config.scale(module, factors.rank)
    if spec.dtype not in _MERGED_DTYPES:
        raise UnsupportedFormatError(
            f"tensor {spec.name!r}",
            f"stored as {spec.dtype.label}, into which an adapter is not merged",
            remedy="give the base in bf16, fp16 or fp32",
        )
    shape = (factors.rows, factors.cols)
    if spec.shape != shape:
        raise UsageError(
            f"{subject}: {module}",
            f"adapts a weight of {list(shape)} with rank {rank}",
            expected=f"{list(spec.shape)}, as {spec.name!r} of the base is",
            remedy="give the base that adapter_config.json names",
        )
    if factors.magnitude is not None and factors.magnitude.num_entries != spec.shape[0]:
        raise CorruptCheckpointError(
            f"{subject}: {module}", f"{factors.magnitude.num_entries} DoRA lengths for {spec.shape[0]} rows"
        )
    return Merge(base=spec, factors=factors, scale=scale)


def _factors(config: AdapterConfig, module: str, found: _Module, subject: str) -> Factors:
    kinds = found.factors
    embeds = "embedding_A" in kinds or "embedding_B" in kinds
    first, second = (kinds.get(f"{'embedding_' * embeds}{side}") for side in "AB")
    if first is None or second is None or len(first.shape) != 2 or len(second.shape) != 2:
        raise UnsupportedFormatError(
            f"{subject}: {module}",
            "holds no pair of matrices A and B",
            expected="lora_A (rank × inputs) and lora_B (outputs × rank)",
            remedy="convolutions are not merged here; merge it with peft",
        )
    if any(spec.dtype not in _MERGED_DTYPES for spec in kinds.values()):
        raise UnsupportedFormatError(
            f"{subject}: {module}",
            "holds factors that are not bf16, fp16 or fp32",
            remedy="merge it with peft",
        )
    if first.shape[0] != second.shape[1] or not first.shape[0]:
        raise CorruptCheckpointError(
            f"{subject}: {module}",
            f"A is {list(first.shape)}, B is {list(second.shape)}",
            expected="one rank",
        )
    magnitude = kinds.get("magnitude_vector")
    if config.dora != (magnitude is not None):
        raise CorruptCheckpointError(
            f"{subject}: {module}",
            "holds no DoRA lengths" if config.dora else "holds DoRA lengths",
            expected=f"as use_dora={str(config.dora).lower()} says",
        )
    swapped = embeds or config.transposed
    if magnitude is not None and swapped:
        raise UnsupportedFormatError(
            f"{subject}: {module}",
            "DoRA of a transposed weight or an embedding is not merged here",
            remedy="merge it with peft's merge_and_unload, save, and compare the result",
        )
    return Factors(first=first, second=second, swapped=swapped, embeds=embeds, magnitude=magnitude)


def _notes(
    base: Catalogue,
    adapter: Catalogue,
    config: AdapterConfig,
    whole: Mapping[str, TensorSpec],
    merges: list[Merge],
    *,
    rounded: bool,
) -> tuple[str, ...]:
    name = adapter.reference
    notes = [*base.notes, *adapter.notes]
    kind = "DoRA" if config.dora else "rsLoRA" if config.root_rank else "LoRA"
    how = (
        f"rounded once to the base's dtype, as peft's merge_and_unload does; {name}#master leaves them in "
        "fp32, and the report then states the share that bf16 shows"
        if rounded
        else "left in fp32"
    )
    notes.append(f"{name}: {kind} merged into {len(merges)} weights of {base.reference}, {how}")
    if whole:
        notes.append(f"{name}: {len(whole)} whole tensors replace the base's: {abridged(sorted(whole))}")
    if config.base and _last_name(config.base) != _last_name(base.reference):
        notes.append(f"{name}: made for the base {config.base!r}; names and shapes fit {base.reference}")
    return tuple(notes)


def _last_name(reference: str) -> str:
    return reference.rstrip("/").rpartition("/")[2].partition("@")[0].lower()
