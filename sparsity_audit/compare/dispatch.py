"""Which kernel runs, and on which device.

Contract: importing this module imports neither torch nor numba, and neither does resolving `auto` on a
machine without an NVIDIA device. The choice never changes a result, because all kernels are equal.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparsity_audit.compare.accumulate import Kernel
from sparsity_audit.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from sparsity_audit.compare.overlap_counts import OverlapCounter

__all__ = ["NUMPY_LIMIT_BYTES", "KernelName", "load_kernel", "load_overlap_counter", "resolve_device"]

KernelName = Literal["auto", "numpy", "numba", "reference"]

NUMPY_LIMIT_BYTES = 64 << 20
"""Below this many bytes on both sides together numpy is done before numba is imported."""

_NUMPY_LIMIT_POPCOUNTS = 1 << 28
_NUMPY_LIMIT_STRATA = 1 << 25
"""The same for overlaps: words of pairs of runs that are counted, and entries that are put in strata."""

_DRIVER_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")


def resolve_device(text: str) -> str:
    """`cpu`, `cuda` or `cuda:i` for what the user wrote: `auto`, `cpu`, `cuda` or `cuda:i`.

    Raises:
        UsageError: The text is none of these, or names a CUDA device that is not there.
    """
    if text == "cpu":
        return "cpu"
    if text == "auto":
        return "cuda" if _num_cuda_devices() else "cpu"
    if not re.fullmatch(r"cuda(:[0-9]{1,4})?", text):
        raise UsageError(
            f"device {text!r}",
            "not understood",
            expected="auto, cpu, cuda or cuda:INDEX",
            remedy="--device auto",
        )
    found = _num_cuda_devices()
    index = int(text.partition(":")[2] or 0)
    if index < found:
        return text
    raise UsageError(
        f"device {text!r}",
        f"{found} CUDA devices can be used here" if found else "no CUDA device can be used here",
        expected="an NVIDIA device with its driver, and a torch built for CUDA",
        remedy="--device cpu gives the same result",
    )


def load_kernel(name: KernelName, *, num_bytes: int, device: str = "cpu") -> Kernel:
    """The kernel to use.

    Args:
        name: A CPU kernel, which then runs whatever the device; `auto` chooses.
        num_bytes: Bytes to compare, both sides.
        device: What `resolve_device` returned.

    Raises:
        MissingExtraError: `numba` was asked for and is not installed.
    """
    if name == "auto" and device != "cpu":
        from sparsity_audit.compare.device_kernel import DeviceKernel

        return DeviceKernel(device)
    has_numba = importlib.util.find_spec("numba") is not None
    if name == "auto":
        name = "numba" if has_numba and num_bytes >= NUMPY_LIMIT_BYTES else "numpy"
    if name == "reference":
        from sparsity_audit.compare.reference import ReferenceKernel

        return ReferenceKernel()
    if name == "numpy":
        from sparsity_audit.compare.numpy_kernel import NumpyKernel

        return NumpyKernel()
    if not has_numba:
        raise _no_numba()
    from sparsity_audit.compare.numba_kernel import NumbaKernel

    return NumbaKernel()


def load_overlap_counter(
    name: Literal["auto", "numpy", "numba"], *, runs: int, num_entries: int, by_stratum: bool
) -> Callable[[int | None], OverlapCounter]:
    """What makes the counters of an overlap; it is called with the number of strata, None for none.

    Args:
        name: The kernel; `auto` chooses by what numpy would take.
        runs: Number of masks.
        num_entries: Entries of all tensors.
        by_stratum: Whether entries are put in strata.

    Raises:
        MissingExtraError: `numba` was asked for and is not installed.
    """
    has_numba = importlib.util.find_spec("numba") is not None
    if name == "auto":
        popcounts = num_entries // 64 * runs * (runs + 1) // 2
        is_large = popcounts >= _NUMPY_LIMIT_POPCOUNTS or (by_stratum and num_entries >= _NUMPY_LIMIT_STRATA)
        name = "numba" if has_numba and is_large else "numpy"
    if name == "numpy":
        from sparsity_audit.compare.overlap_counts import NumpyCounter

        return lambda _strata: NumpyCounter(runs)
    if not has_numba:
        raise _no_numba()
    from sparsity_audit.compare.numba_overlap import new_counter

    return partial(new_counter, runs)


def _no_numba() -> MissingExtraError:
    return MissingExtraError(
        "kernel 'numba'", "numba is not installed", remedy="pip install numba, or use the numpy kernel"
    )


def _num_cuda_devices() -> int:
    """CUDA devices that torch can use; torch is imported only where a driver is in sight."""
    if not _sees_driver() or importlib.util.find_spec("torch") is None:
        return 0
    from sparsity_audit.compare.device_kernel import num_cuda_devices

    return num_cuda_devices()


def _sees_driver() -> bool:
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    if os.name == "nt":
        return shutil.which("nvidia-smi") is not None
    return any(Path(file).exists() for file in _DRIVER_FILES)
