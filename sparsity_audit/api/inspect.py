"""What a checkpoint holds, from its headers alone.

Contract: no tensor data is read. An *entry* is a scalar in storage, tied names counted once; a *parameter* is
an entry of a floating-point dtype, so that position ids and quantisation codes do not count as parameters.
What `config.json` claims is shown beside what is stored, and a difference is a warning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.types import DType

__all__ = [
    "ConfigClaims",
    "DTypeTotal",
    "InspectedFile",
    "InspectedTensor",
    "Inspection",
    "inspect",
    "tensor_rows",
]

FORMAT = "sparsity-audit/inspection"
VERSION = 1

_CLAIMED = {
    "bfloat16": DType.BF16,
    "float16": DType.F16,
    "half": DType.F16,
    "float32": DType.F32,
    "float": DType.F32,
    "float64": DType.F64,
    "double": DType.F64,
    "float8_e4m3fn": DType.F8_E4M3,
    "float8_e5m2": DType.F8_E5M2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedFile:
    """One file of the checkpoint.

    Args:
        name: Name inside the checkpoint.
        num_bytes: Size of the file, headers included.
        num_tensors: Tensors stored in it.
    """

    name: str
    num_bytes: int
    num_tensors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedTensor:
    """One tensor.

    Args:
        name: Its name in the checkpoint.
        dtype: Its stored dtype, by the name people write (bf16, fp32, int64).
        shape: Its shape; [] is a scalar.
        num_entries: Number of scalars.
        num_bytes: Their bytes.
        file: Name of the file that holds it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_entries: int
    num_bytes: int
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DTypeTotal:
    """All tensors of one stored dtype.

    Args:
        dtype: The dtype.
        num_tensors: Tensors of that dtype.
        num_entries: Their entries.
        num_bytes: Their bytes.
    """

    dtype: str
    num_tensors: int
    num_entries: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigClaims:
    """What `config.json` says; each is None where it says nothing.

    Args:
        model_type: Architecture name.
        dtype: The dtype it claims (`dtype`, or the older `torch_dtype`), in its own spelling.
        tie_word_embeddings: Whether input and output embeddings are one tensor.
        quantization: Quantisation method.
    """

    model_type: str | None
    dtype: str | None
    tie_word_embeddings: bool | None
    quantization: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything the headers of a checkpoint say.

    Args:
        reference: What the user typed.
        resolved: An absolute path, or `hf://org/model@<commit>`.
        num_tensors: Tensors in storage.
        num_entries: Scalars in storage.
        num_parameters: Those of a floating-point dtype.
        num_bytes: Bytes of all entries.
        dtypes: Totals by stored dtype, largest first.
        files: The files, in reading order.
        tensors: The tensors, in name order.
        ties: Further names of a stored tensor → its name in `tensors`.
        config: What `config.json` claims.
        warnings: Where the claims and the storage differ.
        notes: What was found out on the way (the commit of a branch, for instance).
    """

    reference: str
    resolved: str
    num_tensors: int
    num_entries: int
    num_parameters: int
    num_bytes: int
    dtypes: tuple[DTypeTotal, ...]
    files: tuple[InspectedFile, ...]
    tensors: tuple[InspectedTensor, ...]
    ties: Mapping[str, str]
    config: ConfigClaims
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values, with its format and version first."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}


def inspect(reference: str | Path) -> Inspection:
    """What the checkpoint at `reference` (a local path or a Hub reference) holds; reads headers only.

    Raises:
        SparsityAuditError: One of its children, as `open_checkpoint` raises them.
    """
    catalogue = open_checkpoint(reference)
    specs = catalogue.tensors.values()
    per_file = _count_tensors(catalogue)
    claims = _config_claims(catalogue.config)
    return Inspection(
        reference=catalogue.reference,
        resolved=catalogue.resolved,
        num_tensors=len(catalogue.tensors),
        num_entries=catalogue.num_entries,
        num_parameters=sum(s.num_entries for s in specs if s.dtype.kind == "float"),
        num_bytes=catalogue.num_bytes,
        dtypes=_dtype_totals(catalogue),
        files=tuple(
            InspectedFile(name=entry.name, num_bytes=entry.num_bytes, num_tensors=per_file[number])
            for number, entry in enumerate(catalogue.files)
            if entry.content is None
        ),
        tensors=tuple(
            InspectedTensor(
                name=spec.name,
                dtype=spec.dtype.label,
                shape=spec.shape,
                num_entries=spec.num_entries,
                num_bytes=spec.num_bytes,
                file=catalogue.files[spec.file].name,
            )
            for spec in specs
        ),
        ties=dict(catalogue.aliases),
        config=claims,
        warnings=_warnings(catalogue, claims),
        notes=catalogue.notes,
    )


def _count_tensors(catalogue: Catalogue) -> Counter[int]:
    """By index of a file, how many tensors have entries in it."""
    counts = Counter[int]()
    for spec in catalogue.tensors.values():
        content = catalogue.files[spec.file].content
        counts.update((spec.file,) if content is None else content.files_of(spec))
    return counts


def tensor_rows(inspection: Inspection) -> list[tuple[str, str, str, str, str, str]]:
    """The tensors as a table: name, dtype, shape, entries, bytes, file; ties follow, with `= name`."""
    rows = [
        (t.name, t.dtype, _shape_text(t.shape), f"{t.num_entries:,}", f"{t.num_bytes:,}", t.file)
        for t in inspection.tensors
    ]
    return rows + [(name, "tied", f"= {stored}", "0", "0", "") for name, stored in inspection.ties.items()]


def _shape_text(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) if shape else "scalar"


def _dtype_totals(catalogue: Catalogue) -> tuple[DTypeTotal, ...]:
    groups: dict[DType, list[tuple[int, int]]] = {}
    for spec in catalogue.tensors.values():
        groups.setdefault(spec.dtype, []).append((spec.num_entries, spec.num_bytes))
    totals = [
        DTypeTotal(
            dtype=dtype.label,
            num_tensors=len(sizes),
            num_entries=sum(entries for entries, _ in sizes),
            num_bytes=sum(num_bytes for _, num_bytes in sizes),
        )
        for dtype, sizes in groups.items()
    ]
    return tuple(sorted(totals, key=lambda total: (-total.num_entries, total.dtype)))


def _config_claims(config: Mapping[str, Any]) -> ConfigClaims:
    # Models with several towers keep the language model's facts one level down.
    nested = config.get("text_config")
    text: Mapping[str, Any] = nested if isinstance(nested, dict) else {}
    quantization = config.get("quantization_config")

    def claim(*keys: str, kind: type) -> Any:
        found = [source.get(key) for source in (config, text) for key in keys]
        return next((value for value in found if isinstance(value, kind)), None)

    return ConfigClaims(
        model_type=claim("model_type", kind=str),
        dtype=claim("dtype", "torch_dtype", kind=str),
        tie_word_embeddings=claim("tie_word_embeddings", kind=bool),
        quantization=str(quantization.get("quant_method")) if isinstance(quantization, dict) else None,
    )


def _warnings(catalogue: Catalogue, claims: ConfigClaims) -> tuple[str, ...]:
    return (*_dtype_warning(catalogue, claims), *_tie_warning(catalogue, claims))


def _dtype_warning(catalogue: Catalogue, claims: ConfigClaims) -> tuple[str, ...]:
    if claims.dtype is None:
        return ()
    claimed = _CLAIMED.get(claims.dtype.removeprefix("torch."))
    if claimed is None:
        return (f"config.json claims dtype {claims.dtype!r}, which is not known here",)
    stored = Counter[DType]()
    for spec in catalogue.tensors.values():
        if spec.dtype.kind == "float":
            stored[spec.dtype] += spec.num_entries
    others = [f"{entries:,} {dtype.label}" for dtype, entries in stored.most_common() if dtype is not claimed]
    if not others:
        return ()
    rest = f" and {stored[claimed]:,} {claimed.label}" if stored[claimed] else ""
    return (f"config.json claims {claimed.label}, but {', '.join(others)}{rest} entries are stored",)


def _tie_warning(catalogue: Catalogue, claims: ConfigClaims) -> tuple[str, ...]:
    stored = [name for name in catalogue.tensors if name.endswith("lm_head.weight")]
    embeddings = [name for name in catalogue.tensors if name.endswith("embed_tokens.weight")]
    if claims.tie_word_embeddings and stored and embeddings:
        return (
            f"config.json says the embeddings are tied, but {embeddings[0]} and {stored[0]} are both stored",
        )
    return ()
