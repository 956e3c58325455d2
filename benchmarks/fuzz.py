"""Coverage-guided fuzzing of the readers with atheris: every input is read, or refused by an error of ours.

    python benchmarks/fuzz.py [--targets safetensors,torch-zip,pickle,mask] [--seconds 225] [--json PATH]

Needs `pip install atheris`. Each target runs alone in a child on one core, from small valid files that this
script makes; the child goes on after a finding, and findings are told apart by the error and the line that
raised it. A finding is: any exception but `SparsityAuditError`; a message that lacks the path, is longer than
3,000 characters or cannot be encoded; more than 1 s of CPU or 64 MiB more of peak memory for one input; an
input that ends or hangs the process. The exit status is 1 when there is one.

The first byte of an input decides its frame: 0, the bytes are the file; otherwise the script supplies what a
random change would break at once (the header's length, the archive around a pickle, JSON inside JSON).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TARGETS = ("safetensors", "torch-zip", "pickle", "mask")
MAX_CPU_SECONDS = 1.0
MAX_GROWTH_KIB = 64 * 1024
MAX_RSS_MIB = 1024
MAX_HANG_SECONDS = 20
MAX_INPUT_BYTES = 8192
MAX_MESSAGE = 3000
_MAX_FINDINGS = 64
_MAX_READ_BYTES = 1 << 16
_SHARD = "mask-00001-of-00001.safetensors"

JSON_TOKENS = [
    *('{"', '":', "[0,0]", "[]", "{}", "null", "-1", "1e3", "9223372036854775807", '"\\ud800"', '"\\u0000"'),
    *('"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"BF16"', '"F4"', '"F8_E4M3"', '"C64"'),
]
MASK_TOKENS = [
    *('"index"', '"header"', '"weight_map"', '"metadata"', '"shards"', '"compared_rows"', '"shapes"', '"U8"'),
    *('"fingerprints"', '"aliases"', '"origin"', '"references"', '"packed"', '"indices"', '".."', '"bool"'),
]
PICKLE_TOKENS = [
    *("ctorch._utils\n_rebuild_tensor_v3\n", "ctorch.nn.parameter\nParameter\n", "ctorch\nfloat8_e5m2\n"),
    *("ctorch._tensor\n_rebuild_from_type_v2\n", "ccollections\nOrderedDict\n", "cbuiltins\nset\n"),
    *(
        "ctorch.storage\nUntypedStorage\n",
        "X\x05\0\0\0state",
        "X\x0c\0\0\0param_groups",
        "X\x07\0\0\0storage",
    ),
]
ZIP_TOKENS = ["PK\x01\x02", "PK\x03\x04", "PK\x05\x06", "PK\x06\x06", "PK\x06\x07", "archive/data/0"]
TOKENS = {
    "safetensors": JSON_TOKENS,
    "torch-zip": ZIP_TOKENS + PICKLE_TOKENS,
    "pickle": PICKLE_TOKENS,
    "mask": JSON_TOKENS + MASK_TOKENS,
}


def header_bytes(raw: bytes) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file."""
    stop = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:stop], raw[stop:]


def framed_header(header: bytes, data: bytes) -> bytes:
    """A safetensors file with the right header length."""
    return len(header).to_bytes(8, "little") + header + data


def seed_torch(folder: Path) -> tuple[list[bytes], list[bytes]]:
    """Archives that `torch.save` wrote, and the pickles in them."""
    import io
    import zipfile

    import torch

    model = torch.nn.Linear(3, 2)
    plain = {
        "epoch": 1,
        "model": {
            **model.state_dict(),
            "p": model.weight,
            "t": torch.ones(2, 3).t(),
            "e": torch.ones(1).expand(4, 5),
            "f8": torch.ones(2).to(torch.float8_e4m3fn),
        },
    }
    optimizer = torch.optim.Adam(model.parameters())
    sparse = {
        "w": torch.ones(2),
        "s": torch.eye(2).to_sparse(),
        "q": torch.ones(2, dtype=torch.complex64).conj(),
    }
    archives = []
    for i, state in enumerate(
        (plain, {"model": {"w": torch.ones(0, 5)}, "opt": optimizer.state_dict()}, sparse)
    ):
        torch.save(state, folder / f"{i}.pt")
        archives.append((folder / f"{i}.pt").read_bytes())
    opened = [zipfile.ZipFile(io.BytesIO(raw)) for raw in archives]
    pickles = [z.read(next(n for n in z.namelist() if n.endswith("data.pkl"))) for z in opened]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as small:
        for info in opened[0].infolist():
            small.writestr(info.filename, opened[0].read(info))
    return [*archives, buffer.getvalue()], pickles


def seed_safetensors() -> list[bytes]:
    """Files of the reference implementation."""
    import torch
    from safetensors.torch import save

    return [
        save({"a.weight": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, {"format": "pt"}),
        save({"s": torch.tensor(1.5), "empty": torch.ones(0, 7), "i": torch.arange(3)}),
        save({}, {"k": "v"}),
    ]


def seed_mask(folder: Path) -> tuple[bytes, bytes]:
    """Index and only shard of a mask."""
    import numpy as np

    from sparsity_audit.masks.bitmask import pack_bits
    from sparsity_audit.masks.container import MaskWriter
    from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor
    from sparsity_audit.masks.shards import INDEX_NAME

    shapes = {"a.weight": (3, 13), "b.bias": (9,), "c": (), "d": (4, 0)}
    tensors = [MaskTensor.whole(name, shape) for name, shape in shapes.items()]
    metadata = MaskMetadata(criterion="value", view="native", aliases={"tied": "a.weight"}, tool="fuzz")
    with MaskWriter(folder / "mask", tensors, metadata) as writer:
        for name, shape in shapes.items():
            writer.write_bits(name, 0, pack_bits(np.ones(shape, dtype=bool)))
        writer.finish(dict.fromkeys(shapes, (7, 8)))
    return (folder / "mask" / INDEX_NAME).read_bytes(), (folder / "mask" / _SHARD).read_bytes()


def make_seeds(target: str, folder: Path) -> list[bytes]:
    """Inputs to start from; what the frames need is left in `folder`."""
    if target == "safetensors":
        files = seed_safetensors()
        return [b"\0" + raw for raw in files] + [
            b"\1" + header.rstrip() + data for header, data in map(header_bytes, files)
        ]
    if target == "mask":
        index, shard = seed_mask(folder)
        (folder / "index.json").write_bytes(index)
        (folder / "shard").write_bytes(shard)
        header = json.loads(header_bytes(shard)[0])
        for key, text in header["__metadata__"].items():
            with contextlib.suppress(ValueError):
                header["__metadata__"][key] = json.loads(text)
        header["__metadata__"]["format_version"] = str(header["__metadata__"]["format_version"])
        both = json.dumps({"index": json.loads(index), "header": header}, separators=(",", ":"))
        return [b"\0" + shard, b"\1" + both.encode()]
    archives, pickles = seed_torch(folder)
    (folder / "archive").write_bytes(archives[-1])
    (folder / "pickle").write_bytes(pickles[0])
    return [b"\0" + raw for raw in archives] if target == "torch-zip" else pickles


def write_seeds(target: str, folder: Path) -> None:
    """Fill `folder`/corpus."""
    (folder / "corpus").mkdir()
    for i, content in enumerate(make_seeds(target, folder)):
        (folder / "corpus" / f"seed-{i}").write_bytes(content)


def safetensors_writer(_: Path, place: Path) -> Callable[[bytes], Path]:
    """A function that puts an input where the reader looks."""
    path = place / "m.safetensors"

    def write(data: bytes) -> Path:
        content = data[1:]
        if data[:1] != b"\0":
            stop = content.rfind(b"}") + 1
            content = framed_header(content[:stop], content[stop:])
        path.write_bytes(content)
        return path

    return write


def archive_writer(_: Path, place: Path) -> Callable[[bytes], Path]:
    """As `safetensors_writer`, for whole archives."""
    path = place / "m.bin"

    def write(data: bytes) -> Path:
        path.write_bytes(data[1:])
        return path

    return write


def pickle_writer(folder: Path, place: Path) -> Callable[[bytes], Path]:
    """As `safetensors_writer`; the pickle lies in a sound archive."""
    import zipfile

    path = place / "m.bin"
    with zipfile.ZipFile(folder / "archive") as archive:
        prefix = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        members = {name: archive.read(name) for name in archive.namelist() if name != prefix}

    def write(data: bytes) -> Path:
        with zipfile.ZipFile(path, "w") as changed:
            changed.writestr(prefix, data)
            for name, content in members.items():
                changed.writestr(name, content)
        return path

    return write


def mask_writer(folder: Path, place: Path) -> Callable[[bytes], Path]:
    """As `safetensors_writer`; the path is a mask directory."""
    from sparsity_audit.masks.shards import INDEX_NAME

    index, shard = (folder / "index.json").read_bytes(), (folder / "shard").read_bytes()
    bits = header_bytes(shard)[1]

    def write(data: bytes) -> Path:
        new_index, new_shard = index, data[1:]
        if data[:1] != b"\0":
            with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):
                both = json.loads(data[1:])
                strings = both["header"].get("__metadata__", {})
                both["header"]["__metadata__"] = {
                    key: value if isinstance(value, str) else json.dumps(value)
                    for key, value in strings.items()
                }
                new_index = json.dumps(both["index"]).encode()
                new_shard = framed_header(json.dumps(both["header"]).encode(), bits)
        (place / INDEX_NAME).write_bytes(new_index)
        (place / _SHARD).write_bytes(new_shard)
        return place

    return write


def read_checkpoint(path: Path) -> None:
    """Open it and read the end of each tensor."""
    from sparsity_audit.checkpoint.opening import open_checkpoint
    from sparsity_audit.checkpoint.reading import read_entries
    from sparsity_audit.checkpoint.store import LocalFile

    catalogue = open_checkpoint(path)
    num_bytes = path.stat().st_size
    for name, spec in catalogue.tensors.items():
        name.encode()
        assert spec.extent.stop <= num_bytes, (spec, num_bytes)
        count = min(spec.num_entries, _MAX_READ_BYTES // spec.dtype.itemsize)
        with LocalFile(catalogue.files[spec.file]) as source:
            out = bytearray(count * spec.dtype.itemsize)
            read_entries(source, spec, spec.num_entries - count, memoryview(out))
    for text in (*catalogue.notes, *catalogue.aliases):
        text.encode()
    assert all(name in catalogue.tensors for name in catalogue.aliases.values()), catalogue.aliases


def read_mask(path: Path) -> None:
    """Open it and read all bits."""
    from sparsity_audit.masks.reader import MaskReader, open_mask

    catalogue = open_mask(path)
    for text in (*catalogue.tensors, *catalogue.metadata.aliases, catalogue.metadata.criterion):
        text.encode()
    with MaskReader(catalogue) as reader:
        for name in catalogue.tensors:
            for _ in reader.blocks(name):
                pass


def fuzz_child(target: str, folder: Path, arguments: list[str]) -> None:
    """Run one target until its time is over; never returns."""
    import atheris

    with atheris.instrument_imports(include=["sparsity_audit"]):
        import sparsity_audit.checkpoint.opening
        import sparsity_audit.checkpoint.reading
        import sparsity_audit.masks.reader  # noqa: F401
    from sparsity_audit.errors import SparsityAuditError

    place = folder / "place"
    place.mkdir()
    writers = {
        "safetensors": safetensors_writer,
        "torch-zip": archive_writer,
        "pickle": pickle_writer,
        "mask": mask_writer,
    }
    write = writers[target](folder, place)
    read = read_mask if target == "mask" else read_checkpoint
    findings = Findings(folder / "findings", place)

    def one_input(data: bytes) -> None:
        path = write(data)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        try:
            read(path)
        except SparsityAuditError as error:
            message = str(error)
            if str(path) not in message or len(message) > MAX_MESSAGE or not encodes(message):
                findings.add(data, "message", error)
        except Exception as error:  # noqa: BLE001
            findings.add(data, "exception", error)
        seconds = time.process_time() - start
        if seconds > MAX_CPU_SECONDS:
            findings.add(data, f"took {seconds:.1f} s")
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        if growth > MAX_GROWTH_KIB:
            findings.add(data, f"took {growth // 1024} MiB more")

    atheris.Setup([sys.argv[0], *arguments], one_input)
    atheris.Fuzz()


def encodes(text: str) -> bool:
    """Whether a terminal could show it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Findings:
    """Findings of one child, one file each, told apart by kind, error and place."""

    def __init__(self, folder: Path, place: Path) -> None:
        self.folder, self.place = folder, place
        self.seen: set[tuple[str, ...]] = set()
        folder.mkdir()

    def add(self, data: bytes, kind: str, error: BaseException | None = None) -> None:
        """Write a finding down unless its like is known."""
        frames = traceback.extract_tb(error.__traceback__)[-4:] if error else []
        where = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]
        key = (kind.split()[0], type(error).__name__, *where[-2:])
        if key in self.seen or len(self.seen) >= _MAX_FINDINGS:
            return
        self.seen.add(key)
        found: dict[str, Any] = {
            "kind": kind,
            "where": where,
            "input_base64": base64.b64encode(data).decode(),
        }
        if error is not None:
            text = str(error).replace(str(self.place), "DIR")[:400]
            found["error"] = f"{type(error).__name__}: {text!a}"
        (self.folder / f"{len(self.seen):03}.json").write_text(json.dumps(found))


def run_target(target: str, *, seconds: int, seed: int, folder: Path) -> dict[str, Any]:
    """One child's result."""
    corpus = folder / "corpus"
    command = [sys.executable, __file__, "--folder", str(folder)]
    # A child starts with the peak memory of its parent, so the parent never loads torch.
    subprocess.run([*command, "--seeds-of", target], check=True)
    num_seeds = sum(1 for _ in corpus.iterdir())
    lines = [
        '"' + "".join(f"\\x{byte:02x}" for byte in token.encode("latin-1")) + '"' for token in TOKENS[target]
    ]
    (folder / "tokens").write_text("\n".join(lines) + "\n")
    options = {
        "max_total_time": seconds,
        "seed": seed,
        "max_len": MAX_INPUT_BYTES,
        "timeout": MAX_HANG_SECONDS,
        "rss_limit_mb": MAX_RSS_MIB,
        "dict": folder / "tokens",
        "artifact_prefix": f"{folder}/died-",
        "print_final_stats": 1,
    }
    flags = [f"-{name}={value}" for name, value in options.items()]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    done = subprocess.run(
        [*command, "--child", target, "--", *flags, str(corpus)], capture_output=True, check=False
    )
    wall = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    log = (done.stdout + done.stderr).decode(errors="replace")
    result = {"target": target, "seconds": round(wall, 1), "seeds": num_seeds, **figures(log)}
    result["cpu_seconds"] = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)
    result["corpus_files"] = sum(1 for _ in corpus.iterdir())
    result["findings"] = list(found_in(folder))
    if done.returncode != 0 or "executions" not in result:
        tail = log.replace(str(folder), "DIR")[-1500:]
        died = [base64.b64encode(p.read_bytes()).decode() for p in sorted(folder.glob("died-*"))]
        result["findings"].append(
            {"kind": f"exit status {done.returncode}", "log": tail, "input_base64": died}
        )
    return result


def figures(log: str) -> dict[str, int]:
    """The numbers libFuzzer prints: its last state and its final statistics."""
    wanted = {
        "executions": r"stat::number_of_executed_units:\s*(\d+)",
        "executions_per_second": r"stat::average_exec_per_sec:\s*(\d+)",
        "new_inputs": r"stat::new_units_added:\s*(\d+)",
        "slowest_input_seconds": r"stat::slowest_unit_time_sec:\s*(\d+)",
        "peak_rss_mib": r"stat::peak_rss_mb:\s*(\d+)",
        "coverage_edges": r"^#\d+\s.*\bcov: (\d+)",
        "coverage_features": r"^#\d+\s.*\bft: (\d+)",
        "coverage_features_of_seeds": r"^#\d+\s+INITED.*\bft: (\d+)",
    }
    found = {name: re.findall(pattern, log, re.MULTILINE) for name, pattern in wanted.items()}
    return {name: int(values[-1]) for name, values in found.items() if values}


def found_in(folder: Path) -> Iterator[dict[str, Any]]:
    """The findings the child wrote down."""
    for path in sorted((folder / "findings").glob("*.json")):
        yield json.loads(path.read_text())


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=225, help="per target")
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--seeds-of", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seeds_of:
        write_seeds(options.seeds_of, options.folder)
        return 0
    if options.child:
        fuzz_child(options.child, options.folder, options.flags)
        return 0
    from harness import machine, versions

    result: dict[str, Any] = {
        "command": f"python benchmarks/fuzz.py --targets {options.targets} --seconds {options.seconds}"
        f" --seed {options.seed}",
        "machine": machine(),
        "versions": versions(["sparsity-audit", "atheris", "numpy", "torch", "safetensors"]),
        "date": time.strftime("%Y-%m-%d"),
        "bounds": {
            "cpu_seconds": MAX_CPU_SECONDS,
            "growth_mib": MAX_GROWTH_KIB // 1024,
            "bytes": MAX_INPUT_BYTES,
        },
        "targets": [],
    }
    for target in options.targets.split(","):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            found = run_target(target, seconds=options.seconds, seed=options.seed, folder=Path(folder))
        result["targets"].append(found)
        counts = {name: value for name, value in found.items() if name not in ("target", "findings")}
        print(f"{target}: {len(found['findings'])} findings, {counts}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(found["findings"] for found in result["targets"]))


if __name__ == "__main__":
    raise SystemExit(main())
