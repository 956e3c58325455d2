"""Run child processes in turn and measure them; what the end-to-end benchmarks share.

Contract: this module and whoever imports it stay small and import no numpy, because the kernel counts the
pages of a parent as its child's until the child has started its own program: a large parent would show as
the child's peak memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One finished child: wall and CPU seconds, peak resident bytes, captured stdout."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    output: bytes = b""

    def to_json(self) -> dict[str, Any]:
        """The numbers."""
        return {
            "wall_s": round(self.wall_s, 4),
            "cpu_s": round(self.cpu_s, 4),
            "peak_rss_mb": round(self.peak_rss_bytes / 1e6, 1),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One line of the table.

    Args:
        name: What is measured, against what.
        row: The row of the benchmark it came from.
        value: The figure; None when it could not be measured.
        limit: The bar; None for figures that are only reported.
        unit: `×` for ratios.
        at_least: Whether larger is better.
        note: What a reader must know.
    """

    name: str
    row: str
    value: float | None
    limit: float | None = None
    unit: str = "×"
    at_least: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        """`met`, `missed`, `reported` or `not measured`."""
        if self.value is None:
            return "not measured"
        if self.limit is None:
            return "reported"
        return (
            "met" if (self.value >= self.limit if self.at_least else self.value <= self.limit) else "missed"
        )

    def to_json(self) -> dict[str, Any]:
        """All of it, with the verdict."""
        return {
            "bar": self.name,
            "row": self.row,
            "value": None if self.value is None else round(self.value, 4),
            "limit": self.limit,
            "sense": "at least" if self.at_least else "at most",
            "unit": self.unit,
            "verdict": self.verdict,
            "note": self.note,
        }

    def to_line(self) -> str:
        """One printed line."""
        value = "–" if self.value is None else f"{self.value:.3g} {self.unit}"
        sense = "≥" if self.at_least else "≤"
        limit = "" if self.limit is None else f"{sense} {self.limit:.3g} {self.unit}"
        note = f"  ({self.note})" if self.note else ""
        return f"{self.name:62} {value:>12} {limit:>12}  {self.verdict}{note}"


def run(
    command: Sequence[str | Path],
    *,
    status: int = 0,
    capture: bool = False,
    env: Mapping[str, str] | None = None,
) -> Sample:
    """Run a child to its end; stop the benchmark when it does not exit with `status`."""
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        child = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output if capture else subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, **(env or {})},
        )
        try:
            _, wait_status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            child.wait()
            raise
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(wait_status)
        if child.returncode != status:
            errors.seek(0)
            text = errors.read().decode(errors="replace")[-2000:]
            raise SystemExit(f"{' '.join(map(str, command))}\nexited with {child.returncode}:\n{text}")
        output.seek(0)
        return Sample(
            wall_s=wall,
            cpu_s=usage.ru_utime + usage.ru_stime,
            peak_rss_bytes=usage.ru_maxrss * 1024,
            output=output.read() if capture else b"",
        )


def in_turn(actions: Mapping[str, Callable[[], Sample]], rounds: int) -> dict[str, list[Sample]]:
    """Every action once a round, so that a drifting machine hits all of them alike."""
    samples: dict[str, list[Sample]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            samples[name].append(action())
    return samples


def ratio(above: Iterable[float], below: Iterable[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def walls(samples: Iterable[Sample]) -> list[float]:
    """Wall seconds."""
    return [sample.wall_s for sample in samples]


def summary(samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """Medians, and all samples behind them."""
    return {
        name: {
            "median_wall_s": round(statistics.median(walls(each)), 4),
            "median_cpu_s": round(statistics.median(s.cpu_s for s in each), 4),
            "peak_rss_mb": round(max(s.peak_rss_bytes for s in each) / 1e6, 1),
            "samples": [s.to_json() for s in each],
        }
        for name, each in samples.items()
    }


def warm(files: Iterable[Path]) -> None:
    """Read files, so that they lie in the page cache."""
    buffer = bytearray(_CHUNK_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def drop_from_cache(files: Iterable[Path]) -> None:
    """Ask the kernel to forget the files' pages; whether it did is for `resident_share` to tell."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident_share(files: Iterable[Path]) -> float | None:
    """Share of the files' pages that lie in the page cache; None where the system does not tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mincore"):
        return None
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    pages = resident = 0
    for path in files:
        size = path.stat().st_size
        if size == 0:
            continue
        with path.open("rb") as stream:
            address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, stream.fileno(), 0)
        if address == ctypes.c_void_p(-1).value:
            return None
        flags = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        failed = libc.mincore(address, size, flags)
        libc.munmap(address, size)
        if failed:
            return None
        pages += len(flags)
        resident += len(flags) - flags.raw.count(0)
    return resident / pages if pages else None


def machine() -> dict[str, Any]:
    """What a result belongs to."""
    facts: dict[str, Any] = {
        "architecture": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": f"{platform.system()} {platform.release()}",
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
    }
    with contextlib.suppress(OSError):
        fields = dict(
            [part.strip() for part in line.split(":", 1)]
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if ":" in line
        )
        facts["cpu"] = fields.get("model name", "unknown")
        facts["mhz_at_start"] = fields.get("cpu MHz")
        facts["cache"] = fields.get("cache size")
    return facts


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Python's version and the packages'; None for those that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    for tool in ("cat", "cmp"):
        text = run([tool, "--version"], capture=True).output.decode().splitlines()
        found[tool] = text[0] if text else None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        here = Path(__file__).parent
        describe = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(describe, capture_output=True, text=True, check=True)
        found["commit"] = done.stdout.strip()
    return found


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
