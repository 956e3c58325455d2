"""The CUDA branch of the streamer on a machine without CUDA: which stream waits for what, and when.

Streams and events only note what they were asked; the copies are ordinary ones. `tests/gpu` runs the
real thing.
"""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from sparsity_audit.passes import device_stream
from sparsity_audit.passes.device_stream import Reader, stream_blocks


class FakeCuda:
    """Records (what, stream, event) in the order of the calls."""

    def __init__(self) -> None:
        self.log: list[tuple] = []
        self.compute = self._make_stream("compute")
        self.num_streams = 0

    def _make_stream(self, name: str):
        return types.SimpleNamespace(
            name=name,
            wait_event=lambda event: self.log.append(("wait", name, event)),
            wait_stream=lambda other: self.log.append(("wait stream", name, other.name)),
            synchronize=lambda: self.log.append(("finish", name, None)),
        )

    def Stream(self, device: torch.device):
        self.num_streams += 1
        return self._make_stream(f"copy {self.num_streams}")

    def Event(self, *, blocking: bool = False):
        event = types.SimpleNamespace()
        event.record = lambda stream: self.log.append(("record", stream.name, event))
        event.synchronize = lambda: self.log.append(("host waits", None, event))
        return event

    def current_stream(self, device: torch.device):
        return self.compute

    def stream(self, stream):
        return contextlib.nullcontext()


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    shim = types.SimpleNamespace(
        Tensor=torch.Tensor,
        uint8=torch.uint8,
        device=torch.device,
        cuda=fake,
        empty=lambda size, *, dtype, pin_memory=False, device=None: torch.empty(size, dtype=dtype),
    )
    monkeypatch.setattr(device_stream, "torch", shim)
    return fake


def test_compute_waits_for_both_copies_and_a_slot_is_filled_again_only_after_its_use(cuda):
    def reader(n: int) -> Reader:
        def read(buffer: memoryview) -> None:
            cuda.log.append(("read", None, n))
            buffer[:] = bytes([n]) * 8

        return Reader(num_bytes=8, read=read)

    blocks = ((n, reader(n), reader(n)) for n in range(7))
    for got in stream_blocks(blocks, device="cuda", slots=2, slot_bytes=8):
        assert got.base.tolist() == got.tuned.tolist() == [got.block] * 8
        cuda.log.append(("use", None, got.block))
    log = cuda.log
    assert cuda.num_streams == 2
    assert [entry[:2] for entry in log[-2:]] == [("finish", "copy 1"), ("finish", "copy 2")]
    assert sum(what == "wait stream" for what, _, _ in log) == 4
    for n in range(7):
        use = log.index(("use", None, n))
        waited = [event for what, stream, event in log[:use] if (what, stream) == ("wait", "compute")][-2:]
        copied = [event for what, stream, event in log[:use] if what == "record" and stream != "compute"]
        assert all(any(event is known for known in copied) for event in waited)
        assert len({id(event) for event in waited}) == 2
        marked = next(i for i in range(use, len(log)) if log[i][:2] == ("record", "compute"))
        again = [i for i, entry in enumerate(log) if entry == ("read", None, n + 2)]
        assert len(again) == (2 if n + 2 < 7 else 0)
        for read in again:
            assert read > marked
            waits = [event for what, stream, event in log[read:] if what == "wait" and stream != "compute"]
            assert any(event is log[marked][2] for event in waits)


def test_the_host_half_is_overwritten_only_after_its_copy_is_done(cuda):
    reader = Reader(num_bytes=8, read=lambda buffer: cuda.log.append(("read", None, None)))
    list(stream_blocks(((n, reader, reader) for n in range(4)), device="cuda", slots=1, slot_bytes=8))
    open_waits = 0
    for what, _, _ in cuda.log:
        open_waits += {"host waits": 1, "read": -1}.get(what, 0)
        assert open_waits >= 0
    assert open_waits == 0
