"""Group a mask's entries by the magnitude of the base weight, reading the base block by block.

Contract: strata are those of `stats.strata` in the mask's view (a `served` mask groups by the codes
rounded to bf16), so that a draw within them keeps what rounding explains. The base is only accepted
when its fingerprints are the mask's: a mask from another base would be matched to the wrong weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.accumulate import CODE_DTYPE, Kernel
from sparsity_audit.compare.dispatch import KernelName, load_kernel
from sparsity_audit.compare.numpy_kernel import strata_of, to_float64
from sparsity_audit.errors import MaskError
from sparsity_audit.masks.bitmask import Block, compared_spans
from sparsity_audit.masks.metadata import MaskTensor
from sparsity_audit.masks.reader import MaskReader
from sparsity_audit.masks.sampling import OUTSIDE, UniformGrouping
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.types import DType, TensorSpec

__all__ = ["MagnitudeGrouping", "StrataGrouping", "base_fingerprint"]

_CHUNK_ENTRIES = 1 << 18
_MAGNITUDE_BITS = 15
_EXACT_IN_BF16 = frozenset({DType.BF16, DType.F8_E4M3, DType.F8_E5M2})


class StrataGrouping(UniformGrouping):
    """Groups are tensor × exponent of |w_base| × mantissa = 0; integers are one group a tensor.

    Args:
        like: The mask to imitate.
        base: The checkpoint it was made from.
        force: Accept a base whose fingerprints are not known or differ.
        kernel: Which CPU kernel reads codes; `auto` goes by the size of the base.

    Raises:
        MaskError: The base lacks a tensor, has another shape, or is not the mask's base.
    """

    def __init__(
        self, like: MaskReader, base: Catalogue, *, force: bool = False, kernel: KernelName = "auto"
    ) -> None:
        super().__init__(like)
        self._files = OpenFiles(base)
        self._kernel = load_kernel(kernel, num_bytes=base.num_bytes)
        self._fill_strata = _fill_of(self._kernel)
        self._served = like.metadata.view == "served"
        self._scratch = threading.local()
        self._specs: dict[str, TensorSpec] = {}
        for name, tensor in like.tensors.items():
            spec = base.tensors.get(base.aliases.get(name, name))
            found = "not there" if spec is None else f"shape {list(spec.shape)}"
            if spec is None or spec.shape != tensor.shape:
                raise MaskError(
                    f"{base.resolved}: tensor {name!r}",
                    found,
                    expected=f"shape {list(tensor.shape)}, as in the mask {like.catalogue.path}",
                    remedy="give the base checkpoint the mask was made from",
                )
            self._specs[name] = spec
            if not force:
                self._verify_base(tensor, spec, base)

    def num_groups(self, name: str) -> int:
        """Strata of the tensor's dtype in the mask's view."""
        dtype = self.view_dtype(name)
        return 2 * dtype.layout.num_exponents if dtype.kind == "float" else 1

    def groups(self, name: str, block: Block) -> np.ndarray:
        """Stratum of each entry's base code."""
        groups = np.empty(block.num_entries, dtype=np.int16)
        self.groups_into(name, block, groups)
        return groups

    def groups_into(self, name: str, block: Block, groups: np.ndarray) -> None:
        """`groups` into int16[num_entries]; codes are read into memory that each thread uses again."""
        spec, dtype = self._specs[name], self.view_dtype(name)
        if dtype.kind == "float":
            codes = self._codes("stored", block.num_entries, spec.dtype)
            read_entries(self._files[spec.file], spec, block.first_entry, codes.view(np.uint8).data)
            if dtype is not spec.dtype:
                rounded = self._codes("rounded", block.num_entries, dtype)
                self._kernel.to_bf16(codes, spec.dtype, rounded)
                codes = rounded
            self._groups_into(codes, dtype, groups)
        else:
            groups[:] = 0
        end = 0
        for start, stop in compared_spans(block, self._like.tensors[name].entry_ranges):
            groups[end:start] = OUTSIDE
            end = stop
        groups[end:] = OUTSIDE

    def stored_codes(self, name: str, block: Block) -> np.ndarray:
        """The base's codes of a block in row-major order, as stored."""
        spec = self._specs[name]
        codes = np.empty(block.num_entries, dtype=CODE_DTYPE[spec.dtype.itemsize])
        read_entries(self._files[spec.file], spec, block.first_entry, codes.view(np.uint8).data)
        return codes

    def stored_dtype(self, name: str) -> DType:
        """How the base stores a tensor."""
        return self._specs[name].dtype

    def view_dtype(self, name: str) -> DType:
        """The dtype whose codes have the strata: bf16 where the mask's view rounds to it."""
        dtype = self._specs[name].dtype
        rounds = self._served and dtype.kind == "float" and dtype not in _EXACT_IN_BF16
        return DType.BF16 if rounds else dtype

    def _groups_into(self, codes: np.ndarray, dtype: DType, groups: np.ndarray) -> None:
        self._fill_strata(codes, dtype, groups)

    def __getstate__(self) -> dict[str, Any]:
        """All but the memory of this process's threads; the base was verified here."""
        return {name: value for name, value in self.__dict__.items() if name != "_scratch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._scratch = threading.local()

    def close(self) -> None:
        """Close the base's files."""
        self._files.close()

    def _codes(self, purpose: str, count: int, dtype: DType) -> np.ndarray:
        held: np.ndarray | None = getattr(self._scratch, purpose, None)
        if held is None or held.nbytes < count * dtype.itemsize:
            held = np.empty(-(-count * dtype.itemsize // 8), dtype=np.uint64)
            setattr(self._scratch, purpose, held)
        return held.view(CODE_DTYPE[dtype.itemsize])[:count]

    def _verify_base(self, tensor: MaskTensor, spec: TensorSpec, base: Catalogue) -> None:
        expected = tensor.fingerprints[0]
        subject = f"{base.resolved}: tensor {tensor.name!r}"
        if expected == 0 and tensor.num_compared:
            raise MaskError(
                subject,
                "cannot be checked: the mask does not record the base's fingerprint",
                remedy="--force takes your word that this is the mask's base",
            )
        found = base_fingerprint(tensor, spec, self._files, self._kernel)
        if found != expected:
            raise MaskError(
                subject,
                f"fingerprint {found:016x}",
                expected=f"{expected:016x}, of the base the mask was made from",
                remedy="give that base checkpoint; --force matches to this one all the same",
            )


class MagnitudeGrouping(StrataGrouping):
    """Groups are the upper 15 bits of the code of |w_base|, ascending with |w|: finer than `magnitude`.

    That is the whole code of a 16-bit number, and exponent and 7 bits of the mantissa of fp32. Arguments and
    errors are those of `StrataGrouping`.
    """

    def num_groups(self, name: str) -> int:
        """2¹⁵ where the tensor holds floats."""
        return 1 << _MAGNITUDE_BITS if self.view_dtype(name).kind == "float" else 1

    def magnitudes(self, name: str, groups: np.ndarray) -> np.ndarray:
        """|w| of groups (the smallest of a group of several numbers), float64; zeros for integers."""
        dtype = self.view_dtype(name)
        if dtype.kind != "float":
            return np.zeros(len(groups))
        code = CODE_DTYPE[dtype.itemsize].type
        return to_float64(groups.astype(code) << code(_dropped_bits(dtype)), dtype)

    def _groups_into(self, codes: np.ndarray, dtype: DType, groups: np.ndarray) -> None:
        code = CODE_DTYPE[dtype.itemsize].type
        groups[:] = (codes & code((1 << 8 * dtype.itemsize - 1) - 1)) >> code(_dropped_bits(dtype))


def _dropped_bits(dtype: DType) -> int:
    return max(8 * dtype.itemsize - 1 - _MAGNITUDE_BITS, 0)


def _fill_of(kernel: Kernel) -> Callable[[np.ndarray, DType, np.ndarray], None]:
    """What writes the strata of codes: compiled where the kernel is."""
    if kernel.name == "numba":
        from sparsity_audit.compare.numba_strata import fill_strata

        return fill_strata

    def fill(codes: np.ndarray, dtype: DType, strata: np.ndarray) -> None:
        strata[:] = strata_of(codes, dtype)

    return fill


def base_fingerprint(tensor: MaskTensor, spec: TensorSpec, files: OpenFiles, kernel: Kernel) -> int:
    """Sum mod 2⁶⁴ of the fingerprints of the tensor's compared slices, as the mask records it."""
    total = 0
    buffer = np.empty(_CHUNK_ENTRIES * spec.dtype.itemsize // 8, dtype=np.uint64)
    for start, stop in tensor.entry_ranges:
        word = 0
        for first in range(start, stop, _CHUNK_ENTRIES):
            used = min(_CHUNK_ENTRIES, stop - first) * spec.dtype.itemsize
            words = buffer[: -(-used // 8)]
            words[-1] = 0
            read_entries(files[spec.file], spec, first, words.view(np.uint8).data[:used])
            total += kernel.fingerprint(words, word)
            word += len(words)
    return total % 2**64
