"""Group a mask's entries by the magnitude of the base weight, reading the base block by block.

Contract: strata are those of `stats.strata` in the mask's view (a `served` mask groups by the codes
rounded to bf16), so that a draw within them keeps what rounding explains. The base is only accepted
when its fingerprints are the mask's: a mask from another base would be matched to the wrong weights.
"""

from __future__ import annotations

import numpy as np

from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.accumulate import CODE_DTYPE
from sparsity_audit.compare.numpy_kernel import NumpyKernel, strata_of, to_float64
from sparsity_audit.errors import MaskError
from sparsity_audit.masks.bitmask import Block
from sparsity_audit.masks.metadata import MaskTensor
from sparsity_audit.masks.reader import MaskReader
from sparsity_audit.masks.sampling import OUTSIDE, UniformGrouping
from sparsity_audit.passes.execute import OpenFiles
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

    Raises:
        MaskError: The base lacks a tensor, has another shape, or is not the mask's base.
    """

    def __init__(self, like: MaskReader, base: Catalogue, *, force: bool = False) -> None:
        super().__init__(like)
        self._files = OpenFiles(base)
        self._kernel = NumpyKernel()
        self._served = like.metadata.view == "served"
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
        compared = super().groups(name, block)
        dtype = self.view_dtype(name)
        if dtype.kind != "float":
            return compared
        codes = self.stored_codes(name, block)
        if dtype is not self.stored_dtype(name):
            rounded = np.empty(codes.shape, dtype=np.uint16)
            self._kernel.to_bf16(codes, self.stored_dtype(name), rounded)
            codes = rounded
        return np.where(compared == OUTSIDE, OUTSIDE, self._groups_of(codes, dtype)).astype(np.int16)

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

    def _groups_of(self, codes: np.ndarray, dtype: DType) -> np.ndarray:
        return strata_of(codes, dtype)

    def close(self) -> None:
        """Close the base's files."""
        self._files.close()

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

    def _groups_of(self, codes: np.ndarray, dtype: DType) -> np.ndarray:
        code = CODE_DTYPE[dtype.itemsize].type
        return (codes & code((1 << 8 * dtype.itemsize - 1) - 1)) >> code(_dropped_bits(dtype))


def _dropped_bits(dtype: DType) -> int:
    return max(8 * dtype.itemsize - 1 - _MAGNITUDE_BITS, 0)


def base_fingerprint(tensor: MaskTensor, spec: TensorSpec, files: OpenFiles, kernel: NumpyKernel) -> int:
    """Sum mod 2⁶⁴ of the fingerprints of the tensor's compared slices, as the mask records it."""
    total = 0
    for start, stop in tensor.entry_ranges:
        word = 0
        for first in range(start, stop, _CHUNK_ENTRIES):
            count = min(_CHUNK_ENTRIES, stop - first)
            used = count * spec.dtype.itemsize
            words = np.zeros(-(-used // 8), dtype=np.uint64)
            read_entries(files[spec.file], spec, first, words.view(np.uint8).data[:used])
            total += kernel.fingerprint(words, word)
            word += len(words)
    return total % 2**64
