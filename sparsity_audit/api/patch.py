"""Sparse patches: make, apply, describe.

Contract: outputs appear whole or not at all; nothing that exists is replaced. What `patch_apply` writes has
the hash of the tuned checkpoint for every tensor, or it writes nothing. Defaults live here and nowhere
below.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from sparsity_audit.api.sides import open_against, open_base, verify_distinct
from sparsity_audit.checkpoint.companions import choose_companions
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.errors import AlignmentError, ChangedInputError, UsageError
from sparsity_audit.masks.metadata import tool_name
from sparsity_audit.masks.shards import CHECKPOINT_NAMING, MAX_SHARD_BYTES, ShardWriter
from sparsity_audit.passes.patch_apply import apply_patches, patched_tensors, verify_chain
from sparsity_audit.passes.patch_make import write_patch
from sparsity_audit.passes.patch_manifest import (
    MANIFEST,
    Codec,
    PatchFile,
    PatchManifest,
    PatchSide,
    PatchTensor,
    digest_of,
    render_manifest,
)
from sparsity_audit.passes.patch_read import PatchReader
from sparsity_audit.report.output import write_atomically
from sparsity_audit.report.patch import PatchEncodings, PatchInfo, PatchSizes
from sparsity_audit.report.staging import StagedDirectory

__all__ = ["patch_apply", "patch_info", "patch_make"]

_MAX_WORKERS = 8
_FILES = "files"


def patch_make(
    base: str | Path | Catalogue,
    tuned: Sequence[str | Path | Catalogue],
    output: str | Path,
    *,
    codec: Codec = "none",
    workers: int | None = None,
    on_note: Callable[[str], None] | None = None,
) -> tuple[PatchInfo, ...]:
    """Write what turns the base into a tuned checkpoint; with several, a chain from each to the next.

    Args:
        base: Directory, file or reference of the base, or a catalogue opened before.
        tuned: One tuned checkpoint, or the steps of a series in their order.
        output: New or empty directory: the patch, or with several steps one below it for each (`0001`,
            `0002`).
        codec: `none`, or `zstd` for smaller files (extra `zstd`).
        workers: Threads; default one a core, at most 8. The result is the same.
        on_note: Called with lines for the user.

    Returns:
        What each patch holds and costs.

    Raises:
        UsageError: No tuned checkpoint, one side twice in a row, or a patch in the place of a checkpoint.
        AlignmentError: No tensor has a counterpart of its name, dtype and shape.
        OutputError: `output` is not empty, or cannot be written; nothing is left behind.
        MissingExtraError: zstd is asked for and not installed.
        SparsityAuditError: As `open_checkpoint` of a side.
    """
    note = on_note or (lambda _text: None)
    if not tuned:
        raise UsageError("patch", "no tuned checkpoint is named", expected="one or more")
    for reference in (base, *tuned):
        _verify_no_patch(reference)
    first = open_base(base)
    sides = [first, *(open_against(first, step) for step in tuned)]
    for before, after in itertools.pairwise(sides):
        verify_distinct(before, after)
    for text in (text for side in sides for text in side.notes):
        note(text)
    _ = [side.folder for side in sides]  # refused now, not when the tensors are compared
    workers = workers or min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
    target = Path(output)
    names = [f"{number:04d}" for number in range(1, len(sides))] if len(sides) > 2 else [""]
    with StagedDirectory(target, _folders(sides)) as stage:
        for before, after, name in zip(sides[:-1], sides[1:], names, strict=True):
            note(f"{before.reference} → {after.reference}: comparing {len(after.tensors)} tensors")
            folder = stage.content / name
            folder.mkdir(exist_ok=True)
            tensors = write_patch(before, after, folder, scratch=stage.scratch, codec=codec, workers=workers)
            _verify_counterparts(before, after, tensors)
            files = _write_files(before, after, folder)
            manifest = _manifest(before, after, tensors, files, codec)
            write_atomically(folder / MANIFEST, render_manifest(manifest))
        stage.commit()
    return tuple(_info(target / name) for name in names)


def patch_apply(
    base: str | Path | Catalogue,
    patches: Sequence[str | Path],
    output: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Path:
    """Write the checkpoint that a patch, or the last of a chain, was made from; returns its directory.

    Args:
        base: What the first patch was made against.
        patches: Patch directories in the order in which they were made; a directory of a series stands for
            all of its patches.
        output: New or empty directory.
        max_shard_bytes: Tensor bytes after which a new file begins.
        workers: Threads; default one a core, at most 8.
        on_note: Called with lines for the user.

    Raises:
        UsageError: The base is not the one of the first patch, or patches do not follow one another.
        CorruptCheckpointError: A patch is truncated or damaged.
        UnsupportedFormatError: No patch, or one of a newer version.
        OutputError: `output` is not empty, or cannot be written; nothing is left behind.
    """
    note = on_note or (lambda _text: None)
    folders = [folder for patch in patches for folder in _patch_folders(Path(patch))]
    if not folders:
        raise UsageError("patch", "no patch is named", expected="one or more patch directories")
    _verify_no_patch(base)
    first = open_base(base)
    for text in first.notes:
        note(text)
    _ = first.folder
    workers = workers or min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
    inputs = [*_folders([first]), *(Path(folder) for folder in folders)]
    with ExitStack() as stack:
        readers = [stack.enter_context(closing(PatchReader(folder))) for folder in folders]
        verify_chain(readers)
        stage = stack.enter_context(StagedDirectory(Path(output), inputs))
        writer = ShardWriter(
            stage.content,
            patched_tensors(readers[-1]),
            naming=CHECKPOINT_NAMING,
            metadata_of=lambda _names: {"format": "pt"},
            late_key=None,
            max_shard_bytes=max_shard_bytes,
        )
        try:
            apply_patches(first, readers, writer, workers=workers)
            writer.finish(lambda _names: {"format": "pt"})
        finally:
            writer.close()
        for text in _copy_files(first, readers, stage.content):
            note(text)
        aliases = readers[-1].manifest.aliases
        if aliases:
            note(f"{len(aliases)} second names of tied tensors are not written; the model ties them itself")
        stage.commit()
    return Path(output)


def patch_info(patches: str | Path | Sequence[str | Path]) -> tuple[PatchInfo, ...]:
    """What patches hold and cost, from their manifests and headers alone.

    Args:
        patches: A patch directory, a directory of a series, or several.

    Raises:
        UnsupportedFormatError: No patch, or one of a newer version.
        CorruptCheckpointError: Truncated or damaged.
    """
    given = [patches] if isinstance(patches, str | Path) else patches
    return tuple(_info(folder) for patch in given for folder in _patch_folders(Path(patch)))


def _patch_folders(path: Path) -> list[Path]:
    """The patch itself, or those of the series in it, in name order."""
    if (path / MANIFEST).is_file() or not path.is_dir():
        return [path]
    steps = sorted(inner for inner in path.iterdir() if (inner / MANIFEST).is_file())
    return steps or [path]


def _verify_no_patch(reference: str | Path | Catalogue) -> None:
    """Arguments in the wrong order end here, and not in the lack of weights in a patch."""
    if isinstance(reference, Catalogue):
        return
    if any((folder / MANIFEST).is_file() for folder in _patch_folders(Path(reference))):
        raise UsageError(
            str(reference),
            "is a patch",
            expected="a checkpoint",
            remedy="`patch apply BASE PATCH -o OUT` makes a checkpoint of it",
        )


def _folders(sides: Sequence[Catalogue]) -> list[Path]:
    return list(dict.fromkeys(file.path.parent for side in sides for file in side.files))


def _verify_counterparts(base: Catalogue, tuned: Catalogue, tensors: Sequence[PatchTensor]) -> None:
    if tensors and all(tensor.base_sha256 is None for tensor in tensors):
        raise AlignmentError(
            f"{base.reference} and {tuned.reference}",
            f"none of {len(tensors)} tensors has a counterpart of its name, dtype and shape",
            expected="two checkpoints with the same names",
            remedy="convert both to one layout and dtype; look at them with `inspect`",
        )


def _manifest(
    base: Catalogue,
    tuned: Catalogue,
    tensors: tuple[PatchTensor, ...],
    files: tuple[PatchFile, ...],
    codec: Codec,
) -> PatchManifest:
    made = digest_of((t.name, t.dtype, t.shape, t.sha256) for t in tensors)
    # Tensors of the base that have no counterpart do not matter to the patch, and are not read.
    used = digest_of((t.name, t.dtype, t.shape, t.base_sha256) for t in tensors if t.base_sha256)
    names = {tensor.name for tensor in tensors} | set(tuned.aliases)
    return PatchManifest(
        tool=tool_name(),
        base=PatchSide(reference=base.resolved_label, digest=used),
        tuned=PatchSide(reference=tuned.resolved_label, digest=made),
        codec=codec,
        tensors=tensors,
        aliases=dict(tuned.aliases),
        removed=tuple(sorted(base.tensors.keys() - names)),
        files=files,
    )


def _write_files(base: Catalogue, tuned: Catalogue, folder: Path) -> tuple[PatchFile, ...]:
    """Describe the files beside the tuned weights, and store those that the base does not have."""
    source, other = tuned.folder, base.folder
    names = choose_companions(p.name for p in source.iterdir() if p.is_file()).taken
    found = []
    for name in names:
        data = _bytes(source / name)
        same = (other / name).is_file() and _bytes(other / name) == data
        if not same:
            (folder / _FILES).mkdir(exist_ok=True)
            write_atomically(folder / _FILES / name, data)
        sha256 = hashlib.sha256(data).hexdigest()
        found.append(PatchFile(name=name, num_bytes=len(data), sha256=sha256, stored=not same))
    return tuple(found)


def _copy_files(base: Catalogue, patches: Sequence[PatchReader], target: Path) -> list[str]:
    """Write the files beside the weights; returns what could not be, and why."""
    notes = []
    for file in patches[-1].manifest.files:
        path = _place_of(file, base, patches)
        data = _bytes(path) if path.is_file() else None
        if data is None or hashlib.sha256(data).hexdigest() != file.sha256:
            found = "is not there" if data is None else "is another one"
            notes.append(f"{file.name} is not written: {path} {found}; copy it from the tuned checkpoint")
            continue
        write_atomically(target / file.name, data)
    return notes


def _place_of(file: PatchFile, base: Catalogue, patches: Sequence[PatchReader]) -> Path:
    """Where a file lies: in the last patch that stores it as it is, or beside the base."""
    for patch in reversed(patches):
        held = next((f for f in patch.manifest.files if (f.name, f.sha256) == (file.name, file.sha256)), None)
        if held is not None and held.stored:
            return patch.folder / _FILES / file.name
    return base.folder / file.name


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ChangedInputError(str(path), error.strerror or "cannot be read") from error


def _info(folder: Path) -> PatchInfo:
    with closing(PatchReader(folder)) as reader:
        manifest, num_bytes = reader.manifest, reader.num_bytes
    tensors = manifest.tensors
    changed = sum(tensor.changed for tensor in tensors)
    entries = sum(tensor.num_entries for tensor in tensors)
    counts = Counter(tensor.encoding for tensor in tensors)
    return PatchInfo(
        path=str(folder),
        tool=manifest.tool,
        base=manifest.base.reference,
        base_digest=manifest.base.digest,
        tuned=manifest.tuned.reference,
        tuned_digest=manifest.tuned.digest,
        codec=manifest.codec,
        num_tensors=len(tensors),
        num_whole=sum(tensor.base_sha256 is None for tensor in tensors),
        num_entries=entries,
        changed=changed,
        update_density=changed / entries if entries else None,
        sizes=_sizes(tensors, num_bytes),
        encodings=tuple(
            PatchEncodings(
                encoding=encoding,
                num_tensors=counts[encoding],
                changed=sum(t.changed for t in tensors if t.encoding == encoding),
            )
            for encoding in sorted(counts)
        ),
        files=tuple(file.name for file in manifest.files if file.stored),
        removed=manifest.removed,
    )


def _sizes(tensors: Sequence[PatchTensor], stored: int) -> PatchSizes:
    def total(*keys: str) -> int:
        """Positions in the shortest of some encodings, and values; tensors that are stored whole count so."""
        found = 0
        for tensor in (t for t in tensors if t.changed):
            places = min((tensor.sizes[key] for key in keys if key in tensor.sizes), default=0)
            found += places + tensor.changed * tensor.dtype.itemsize
        return found

    best = sum(
        t.num_bytes if t.encoding == "dense" else t.sizes.get(t.encoding, 0) + t.changed * t.dtype.itemsize
        for t in tensors
    )
    return PatchSizes(
        dense=sum(tensor.num_bytes for tensor in tensors),
        indices=total("indices"),
        mask=total("mask"),
        gaps=total("gap8", "gap16"),
        best=best,
        stored=stored,
    )
