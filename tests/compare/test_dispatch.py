from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from sparsity_audit.compare import dispatch
from sparsity_audit.compare.dispatch import (
    NUMPY_LIMIT_BYTES,
    load_kernel,
    load_overlap_counter,
    resolve_device,
)
from sparsity_audit.errors import MissingExtraError, UsageError


@pytest.fixture
def devices(monkeypatch):
    """Sets how many CUDA devices there seem to be."""

    def there_are(count: int) -> None:
        monkeypatch.setattr(dispatch, "_sees_driver", lambda: count > 0)
        monkeypatch.setattr("sparsity_audit.compare.device_kernel.num_cuda_devices", lambda: count)

    return there_are


def without(monkeypatch, module: str) -> None:
    """Makes one module look as if it were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))


@pytest.mark.parametrize(("count", "expected"), [(0, "cpu"), (1, "cuda"), (4, "cuda")])
def test_auto_takes_cuda_where_there_is_a_device(devices, count, expected):
    devices(count)
    assert resolve_device("auto") == expected


def test_a_named_device_is_kept(devices):
    devices(2)
    assert [resolve_device(text) for text in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]


@pytest.mark.parametrize("text", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_that_is_not_there_is_a_usage_error_with_a_remedy(devices, text):
    devices(0)
    with pytest.raises(UsageError) as caught:
        resolve_device(text)
    assert str(caught.value) == (
        f"device '{text}': no CUDA device can be used here\n"
        "  expected: an NVIDIA device with its driver, and a torch built for CUDA\n"
        "  remedy: --device cpu gives the same result"
    )


def test_an_index_beyond_the_last_device_is_a_usage_error(devices):
    devices(2)
    with pytest.raises(UsageError, match=r"device 'cuda:2': 2 CUDA devices can be used here"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("text", ["", "gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "mps", "cuda:00000"])
def test_anything_else_is_a_usage_error(text):
    with pytest.raises(UsageError, match="expected: auto, cpu, cuda or cuda:INDEX"):
        resolve_device(text)


def test_a_machine_without_torch_has_no_cuda(devices, monkeypatch):
    devices(1)
    without(monkeypatch, "torch")
    assert resolve_device("auto") == "cpu"


@pytest.mark.parametrize("hidden", ["", " ", "-1"])
def test_hidden_devices_are_not_looked_for(monkeypatch, hidden):
    monkeypatch.setattr(dispatch, "_DRIVER_FILES", ("/",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert not dispatch._sees_driver()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert dispatch._sees_driver()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert dispatch._sees_driver()


@pytest.mark.parametrize(
    ("name", "num_bytes", "expected"),
    [
        ("auto", NUMPY_LIMIT_BYTES - 1, "numpy"),
        ("auto", NUMPY_LIMIT_BYTES, "numba"),
        ("numpy", 1 << 40, "numpy"),
        ("numba", 0, "numba"),
        ("reference", 1 << 40, "reference"),
    ],
)
def test_the_cpu_kernel_follows_the_size_unless_named(name, num_bytes, expected):
    assert load_kernel(name, num_bytes=num_bytes).name == expected


def test_a_cuda_device_takes_the_device_kernel_unless_another_is_named():
    assert load_kernel("auto", num_bytes=0, device="cuda").name == "device"
    assert load_kernel("numpy", num_bytes=0, device="cuda").name == "numpy"


def test_without_numba_auto_stays_with_numpy_and_naming_it_is_an_error(monkeypatch):
    without(monkeypatch, "numba")
    assert load_kernel("auto", num_bytes=1 << 40).name == "numpy"
    with pytest.raises(MissingExtraError, match="numba is not installed"):
        load_kernel("numba", num_bytes=0)


@pytest.mark.parametrize(
    ("name", "runs", "num_entries", "by_stratum", "expected"),
    [
        ("auto", 2, 10**9, False, "NumpyCounter"),
        ("auto", 10, 10**9, False, "WordCounter"),
        ("auto", 2, 1 << 25, True, "TableCounter"),
        ("auto", 2, (1 << 25) - 1, True, "NumpyCounter"),
        ("numpy", 10, 10**12, True, "NumpyCounter"),
        ("numba", 2, 1, False, "WordCounter"),
    ],
)
def test_what_counts_an_overlap_follows_from_how_much_there_is_to_count_unless_named(
    name, runs, num_entries, by_stratum, expected
):
    new_counter = load_overlap_counter(name, runs=runs, num_entries=num_entries, by_stratum=by_stratum)
    assert type(new_counter(512 if by_stratum else None)).__name__ == expected


def test_without_numba_overlaps_are_counted_in_numpy_and_naming_it_is_an_error(monkeypatch):
    without(monkeypatch, "numba")
    new_counter = load_overlap_counter("auto", runs=10, num_entries=10**10, by_stratum=True)
    assert type(new_counter(512)).__name__ == "NumpyCounter"
    with pytest.raises(MissingExtraError, match="numba is not installed"):
        load_overlap_counter("numba", runs=2, num_entries=1, by_stratum=False)


def test_choosing_on_a_machine_without_a_driver_imports_neither_torch_nor_numba():
    code = (
        "import sys\n"
        "from sparsity_audit.compare import dispatch\n"
        "dispatch._DRIVER_FILES = ()\n"
        "assert dispatch.resolve_device('auto') == 'cpu'\n"
        "assert dispatch.load_kernel('auto', num_bytes=0, device='cpu').name == 'numpy'\n"
        "print(sorted({'torch', 'numba'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
