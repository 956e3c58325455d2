"""Write the tuned checkpoint from a base and one or more patches, proving every tensor by its hash.

Contract: memory is a few segments a worker. The base's tensors are hashed while they are read, and the
result's while they are written; a hash that differs is an error, and the caller has given nothing a name
yet. Absolute values override, so that a chain costs one pass over the base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.errors import CorruptCheckpointError, UsageError
from sparsity_audit.masks.shards import ShardWriter, StoredTensor
from sparsity_audit.passes.engine import map_units
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.passes.patch_encoding import SEGMENT_ENTRIES
from sparsity_audit.passes.patch_manifest import PatchTensor
from sparsity_audit.passes.patch_read import PatchReader
from sparsity_audit.seams import reached
from sparsity_audit.types import TensorSpec

__all__ = ["apply_patches", "patched_tensors", "verify_chain"]


def verify_chain(patches: Sequence[PatchReader]) -> None:
    """Raise UsageError unless each patch starts from what the one before makes."""
    for before, after in pairwise(patches):
        for tensor in after.manifest.tensors:
            made = before.tensors.get(tensor.name)
            if tensor.base_sha256 not in (None, None if made is None else made.sha256):
                raise UsageError(
                    f"{after.folder}: tensor {tensor.name!r}",
                    f"applies to {after.manifest.base.reference}, which {before.folder} does not make",
                    expected=f"a patch made against {before.manifest.tuned.reference}",
                    remedy="give the patches of a series in the order in which they were made",
                )


def patched_tensors(patch: PatchReader) -> tuple[StoredTensor, ...]:
    """The tensors of the checkpoint that a patch makes."""
    return tuple(StoredTensor(name=t.name, dtype=t.dtype, shape=t.shape) for t in patch.manifest.tensors)


def apply_patches(
    base: Catalogue, patches: Sequence[PatchReader], writer: ShardWriter, *, workers: int
) -> None:
    """Write all tensors of what the last patch makes. The writer stays open.

    Args:
        base: The checkpoint that the first patch applies to.
        patches: In the order in which they were made; see `verify_chain`.
        writer: Takes `patched_tensors` of the last.
        workers: Threads, each with a tensor of its own.

    Raises:
        UsageError: The base is not the one of the first patch.
        CorruptCheckpointError: A patch is damaged: what it makes has another hash.
        ChangedInputError: A file changed during the run.
    """
    jobs = [_job(base, patches, tensor) for tensor in patches[-1].manifest.tensors]
    jobs.sort(key=lambda job: (-job.tensor.num_bytes, job.tensor.name))
    task = _Task(base, OpenFiles(base), writer)
    try:
        with closing(map_units(task.write, jobs, workers=workers)) as results:
            for _ in results:
                reached("tensor patched")
    finally:
        task.files.close()
    base.verify_unchanged()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One tensor: where its entries begin, and what is laid over them.

    Args:
        tensor: The tensor to make.
        spec: The base's; None where a patch holds all entries.
        base_sha256: What the base's codes must hash to.
        layers: Patches and their tensors, first to last.
        first: The patch that is next to the base.
    """

    tensor: PatchTensor
    spec: TensorSpec | None
    base_sha256: str | None
    layers: tuple[tuple[PatchReader, PatchTensor], ...]
    first: PatchReader


def _job(base: Catalogue, patches: Sequence[PatchReader], last: PatchTensor) -> _Job:
    layers: list[tuple[PatchReader, PatchTensor]] = []
    tensor, wanted = last, None
    for patch in reversed(patches):
        found = patch.tensors.get(tensor.name)
        if found is None or (wanted is not None and found.sha256 != wanted):
            raise CorruptCheckpointError(
                f"{patch.folder}: tensor {tensor.name!r}", "is not what the next patch applies to"
            )
        if found.encoding != "none":
            layers.append((patch, found))
        if found.encoding == "dense" or found.base_sha256 is None:
            return _Job(tensor=last, spec=None, base_sha256=None, layers=tuple(reversed(layers)), first=patch)
        tensor, wanted = found, found.base_sha256
    spec = base.tensors.get(base.aliases.get(tensor.name, tensor.name))
    if spec is None or (spec.dtype, spec.shape) != (tensor.dtype, tensor.shape):
        found = "has no such tensor" if spec is None else f"{spec.dtype} of shape {list(spec.shape)}"
        raise _other_base(base, patches[0], tensor, found)
    return _Job(tensor=last, spec=spec, base_sha256=wanted, layers=tuple(reversed(layers)), first=patches[0])


def _other_base(base: Catalogue, patch: PatchReader, tensor: PatchTensor, found: str) -> UsageError:
    return UsageError(
        f"{base.reference}: tensor {tensor.name!r}",
        found,
        expected=f"that of {patch.manifest.base.reference}, against which {patch.folder} was made",
        remedy="apply the patch to its own base, unchanged",
    )


@dataclass(frozen=True, slots=True)
class _Task:
    """What the workers share."""

    base: Catalogue
    files: OpenFiles
    writer: ShardWriter

    def write(self, job: _Job) -> None:
        """Make one tensor, segment by segment."""
        tensor, itemsize = job.tensor, job.tensor.dtype.itemsize
        of_base, of_result = hashlib.sha256(), hashlib.sha256()
        for number, first in enumerate(range(0, tensor.num_entries, SEGMENT_ENTRIES)):
            codes = np.empty(min(SEGMENT_ENTRIES, tensor.num_entries - first), dtype=f"<u{itemsize}")
            if job.spec is not None:
                read_entries(self.files[job.spec.file], job.spec, first, codes.view(np.uint8).data)
                of_base.update(codes.data.cast("B"))
            for patch, layer in job.layers:
                places, values = patch.segment(layer, number)
                codes[places] = values
            if job.layers:
                of_result.update(codes.data.cast("B"))
            self.writer.write(tensor.name, first * itemsize, codes.data.cast("B"))
        if job.spec is not None and of_base.hexdigest() != job.base_sha256:
            raise _other_base(self.base, job.first, tensor, f"has sha256 {of_base.hexdigest()[:16]}…")
        made = of_result if job.layers or job.spec is None else of_base
        if made.hexdigest() != tensor.sha256:
            raise CorruptCheckpointError(
                f"{job.layers[-1][0].folder if job.layers else job.first.folder}: tensor {tensor.name!r}",
                f"makes codes of sha256 {made.hexdigest()[:16]}…",
                expected=f"{tensor.sha256[:16]}…, that of the tuned checkpoint",
                remedy="the patch is damaged; copy or make it again",
            )
