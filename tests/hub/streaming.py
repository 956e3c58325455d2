"""A small pair of checkpoints, on the loopback Hub and on the disk, and its diff from either."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

from hub_server import HubServer

from sparsity_audit.api.diff import diff
from sparsity_audit.checkpoint.access import hub_access
from sparsity_audit.checkpoint.read_ahead import Pace, with_pace
from sparsity_audit.report.schema import to_json

QUICK = {"kernel": "numpy", "workers": 2, "unit_bytes": 700, "structure": "off"}
SMALL = Pace(window_bytes=2000, in_flight=2, buffered_bytes=3000)


def reset(hub: HubServer) -> None:
    hub.requests.clear()
    hub.faults.clear()
    hub.cuts.clear()
    hub.expired.clear()
    hub.signed.clear()
    hub.ignores_range, hub.num_cuts, hub.sent_bytes, hub.on_request = False, 0, 0, None


def shard_names(count: int) -> list[str]:
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def bf16_file(tensors: dict[str, tuple[tuple[int, ...], bytes]]) -> bytes:
    header, data = {}, b""
    for name, (shape, raw) in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [len(data), len(data + raw)]}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def checkpoint(seed: int, *, shards: int = 3, moved: tuple[int, ...] = ()) -> dict[str, bytes]:
    """Files of a small bf16 model; in the shards `moved` every ninth entry of a seeded draw is another."""
    rng, move = random.Random(0), random.Random(seed)
    names, files, where = shard_names(shards), {"config.json": b'{"model_type": "tiny"}'}, {}
    for number, file in enumerate(names):
        tensors = {}
        for part, shape in (("a.weight", (12, 40)), ("b.weight", (40, 24)), ("norm.weight", (40,))):
            count = shape[0] * (shape[1] if len(shape) > 1 else 1)
            codes = [rng.choice((0, 0x8000)) | rng.randint(0x3800, 0x3FFF) for _ in range(count)]
            if number in moved:
                codes = [c ^ 1 if move.random() < 0.11 else c for c in codes]
            name = f"model.layers.{number}.{part}"
            tensors[name], where[name] = (shape, struct.pack(f"<{count}H", *codes)), file
        files[file] = bf16_file(tensors)
    return {**files, "model.safetensors.index.json": json.dumps({"weight_map": where}).encode()}


def save(files: dict[str, bytes], folder: Path) -> str:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


def streamed(*, pace: Pace = SMALL, base: str = "hf://org/base", tuned: str = "hf://org/tuned", **options):
    with hub_access("stream"), with_pace(pace):
        return diff(base, tuned, **{**QUICK, **options})


def local(tmp_path, **options):
    return diff(str(tmp_path / "base"), str(tmp_path / "tuned"), **{**QUICK, **options})


def numbers(report) -> dict:
    """The report without names of places: what must not depend on how bytes came."""
    record = json.loads(to_json(report))
    for side in ("base", "tuned"):
        for key in ("reference", "resolved", "notes"):
            record[side].pop(key)
    return record


def gets(hub: HubServer, host: str = "storage") -> list:
    return [r for r in hub.requests if r.host == host and r.method == "GET"]
