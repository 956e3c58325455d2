"""View tallies straight from arrays and from whole checkpoints, for tests of statistics."""

from pathlib import Path

import numpy as np

from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.store import LocalFile
from sparsity_audit.compare.accumulate import CODE_DTYPE, Accumulator, KernelSpec
from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.types import Criterion, DType

DATA = Path(__file__).parent / "data" / "addition"
KERNEL = NumpyKernel()
CRITERIA = tuple(Criterion.parse(k) for k in ("bitwise", "value", "atol:1e-5", "rel:1e-3"))


def tally(base, tuned, dtype, criteria=CRITERIA):
    acc = Accumulator(
        KernelSpec(dtype=dtype, criteria=criteria, mask=1, level="full"), rows=1, cols=base.size
    )
    KERNEL.compare(base.reshape(1, -1), tuned.reshape(1, -1), acc, first_row=0, first_col=0, bits=None)
    return acc.view_tally()


def load(folder):
    catalogue = open_checkpoint(DATA / folder)
    tensors = {}
    for name, spec in catalogue.tensors.items():
        buffer = bytearray(spec.num_bytes)
        with LocalFile(catalogue.files[spec.file]) as source:
            source.read_into(memoryview(buffer), spec.extent.start)
        tensors[name] = (spec.dtype, np.frombuffer(buffer, dtype=CODE_DTYPE[spec.dtype.itemsize]))
    return tensors


def to_bf16(codes, dtype):
    out = np.empty(codes.shape, dtype=np.uint16)
    KERNEL.to_bf16(codes, dtype, out)
    return out


def pair(base, tuned):
    """One (dtype, native, served) for all tensors of two folders together."""
    a, b = load(base), load(tuned)
    dtype = next(iter(a.values()))[0]
    x, y = (np.concatenate([side[n][1] for n in a]) for side in (a, b))
    served = None
    if dtype is not DType.BF16:
        served = tally(to_bf16(x, dtype), to_bf16(y, dtype), DType.BF16)
    return dtype, tally(x, y, dtype), served
