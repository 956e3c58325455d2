"""The bars of `sparsity-audit diff`, end to end, each as a ratio taken in one run.

    python benchmarks/diff.py [--entries 1e9] [--json PATH] [--workdir DIR] [--rows warm-counts,rss]

Makes its own pairs (benchmarks/pairs.py), runs every command as a child process, A and B in turn, and
prints one line a bar. benchmarks/README.md says what each row measures and how to read it.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harness import (
    Bar,
    Sample,
    available_bytes,
    drop_from_cache,
    in_turn,
    machine,
    ratio,
    resident_share,
    run,
    summary,
    versions,
    walls,
    warm,
)

HERE = Path(__file__).parent
BAR_ENTRIES, BAR_REPEATS = 1_000_000_000, 5
SMALL_ENTRIES = 1_000_000
PACKAGES = ("sparsity-audit", "numpy", "numba", "llvmlite", "safetensors", "torch")
RSS_LIMITS_MB = {"2 workers": 180, "8 workers": 250, "numpy": 64}
COLD_SHARE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A generated pair and what is known about it."""

    folder: Path
    facts: dict[str, Any]

    @property
    def sides(self) -> tuple[Path, Path]:
        """Base and tuned."""
        return self.folder / "base", self.folder / "tuned"

    @property
    def files(self) -> list[Path]:
        """Shards of both sides, base first."""
        return [path for side in self.sides for path in sorted(side.glob("*.safetensors"))]

    @property
    def num_bytes(self) -> int:
        """Bytes of both sides."""
        return sum(path.stat().st_size for path in self.files)


@dataclass(slots=True, kw_only=True)
class Bench:
    """What the rows share: options, pairs made when first needed, and results."""

    entries: int
    repeats: int
    workers: int
    workdir: Path
    pairs: dict[str, Pair] = field(default_factory=dict)
    verified: set[Path] = field(default_factory=set)
    rows: dict[str, Any] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)

    @property
    def quarter(self) -> int:
        """Entries of the second size."""
        return self.entries // 4

    def pair(self, entries: int, dtype: str = "bf16", *, copy: bool = False) -> Pair:
        """A pair of at least so many entries."""
        name = f"{dtype}-{entries}" + ("-copy" if copy else "")
        if name not in self.pairs:
            folder = self.workdir / name
            print(f"# making {name} …", file=sys.stderr, flush=True)
            more = ["--copy"] if copy else []
            run(
                [
                    sys.executable,
                    HERE / "pairs.py",
                    folder,
                    "--entries",
                    str(entries),
                    "--dtype",
                    dtype,
                    *more,
                ]
            )
            facts = json.loads((folder / "pair.json").read_text())
            self.pairs[name] = Pair(folder=folder, facts=facts)
        return self.pairs[name]

    def big(self) -> Pair:
        """The pair of the bars; it has a copy for `cmp`."""
        return self.pair(self.entries, copy=True)

    def small(self, dtype: str = "bf16") -> Pair:
        """The pair that costs start-up, kernel load and report, and next to no reading."""
        return self.pair(min(SMALL_ENTRIES, self.entries // 10), dtype)

    def add(self, row: str, name: str, value: float | None, limit: float | None = None, **more: Any) -> None:
        """Put one line into the table."""
        self.bars.append(Bar(name=name, row=row, value=value, limit=limit, **more))


def audit(*args: str | Path, **more: Any) -> Sample:
    """One run of the command line."""
    return run([sys.executable, "-m", "sparsity_audit.cli.main", *args], **more)


def diff(
    pair: Pair, *, stats: str, workers: int, kernel: str = "numba", mask: Path | None = None, **more: Any
) -> Sample:
    """One quiet diff; an older mask is removed before the clock starts."""
    args: list[str | Path] = ["diff", *pair.sides, "--stats", stats, "--kernel", kernel, "--device", "cpu"]
    args += ["--workers", str(workers), "--format", "quiet", "--structure", "off"]
    if mask is not None:
        shutil.rmtree(mask, ignore_errors=True)
        args += ["--mask", mask]
    return audit(*args, **more)


def cat(pair: Pair) -> Sample:
    """Both sides to /dev/null."""
    return run(["cat", *pair.files])


def cmp(pair: Pair) -> Sample:
    """The base against its identical copy, to the last byte."""
    names = sorted(path.name for path in (pair.folder / "base").glob("*.safetensors"))
    script = " && ".join(f'cmp "$1/base/{name}" "$1/copy/{name}"' for name in names)
    return run(["sh", "-c", script, "sh", pair.folder])


def verify(bench: Bench, pair: Pair) -> None:
    """Stop unless diff finds exactly the changes that were made; these runs also warm numba's cache."""
    if pair.folder in bench.verified:
        return
    for stats in ("counts", "full"):
        args = [
            "--stats",
            stats,
            "--kernel",
            "numba",
            "--device",
            "cpu",
            "--workers",
            str(bench.workers),
            "--json",
        ]
        report = json.loads(audit("diff", *pair.sides, *args, capture=True).output)
        for criterion in ("bitwise", "value"):
            rows = [r for r in report["headlines"] if (r["criterion"], r["view"]) == (criterion, "native")]
            found = {(row["compared"], row["changed"]) for row in rows}
            expected = (pair.facts["counts"]["entries"], pair.facts["counts"][criterion])
            if found != {expected}:
                raise SystemExit(f"{pair.folder.name}: {criterion}: diff found {found}, not {expected}")
    bench.verified.add(pair.folder)


def warm_row(bench: Bench, row: str, *, stats: str, dtype: str = "bf16") -> None:
    """Steady state and whole process against cat and cmp, warm."""
    if dtype == "bf16":
        big, small = bench.big(), bench.small()
    else:
        big, small = bench.pair(bench.quarter, dtype, copy=True), bench.small(dtype)
    mask = bench.workdir / "mask" if stats == "counts" else None
    verify(bench, big)
    files = [*big.files, *sorted((big.folder / "copy").glob("*.safetensors")), *small.files]
    warm(files)
    in_cache = resident_share(files)
    actions: dict[str, Callable[[], Sample]] = {
        "cat": partial(cat, big),
        "cmp": partial(cmp, big),
        "diff": partial(diff, big, stats=stats, workers=bench.workers, mask=mask),
        "diff of the small pair": partial(diff, small, stats=stats, workers=bench.workers, mask=mask),
    }
    samples = in_turn(actions, bench.repeats)
    bench.rows[row] = {
        "pair": big.folder.name,
        "small_pair": small.folder.name,
        "bytes": big.num_bytes,
        "resident_share_before": in_cache,
        "runs": summary(samples),
        "gb_per_s_of_cat": round(big.num_bytes / statistics.median(walls(samples["cat"])) / 1e9, 2),
    }
    whole, cats, cmps = walls(samples["diff"]), walls(samples["cat"]), walls(samples["cmp"])
    steady = [a - b for a, b in zip(whole, walls(samples["diff of the small pair"]), strict=True)]
    what = {"counts": "count + mask", "full": "all statistics"}[stats]
    title = f"diff, {what}, {dtype}, warm"
    is_bar = dtype == "bf16"
    note = "" if in_cache is None or in_cache > 1 - COLD_SHARE else f"only {in_cache:.0%} was in the cache"
    limits = (1.0, None) if stats == "counts" else (1.5, 1.0)
    for below, times, limit in (("cat", cats, limits[0]), ("cmp", cmps, limits[1])):
        value: float | None = ratio(steady, times)
        if min(steady) <= 0:
            value, note = None, "the pair is too small: start-up hides the steady state"
        name = f"{title}: steady state / {below}"
        bench.add(row, name, value, limit if is_bar else None, note=note)
        bench.add(row, f"{title}: whole process / {below}", ratio(whole, times))


def cold_row(bench: Bench) -> None:
    """Whole process against cat, each after dropping the pair from the page cache."""
    pair = bench.big()
    verify(bench, pair)
    left: list[float | None] = []

    def cold(action: Callable[[], Sample]) -> Sample:
        drop_from_cache(pair.files)
        left.append(resident_share(pair.files))
        return action()

    actions: dict[str, Callable[[], Sample]] = {
        "cat": partial(cold, partial(cat, pair)),
        "diff": partial(cold, partial(diff, pair, stats="full", workers=bench.workers)),
    }
    samples = in_turn(actions, max(3, bench.repeats // 2) if bench.repeats > 1 else 1)
    warm_cat = cat(pair)
    worked = all(share is not None and share < COLD_SHARE for share in left)
    rate = pair.num_bytes / statistics.median(walls(samples["cat"])) / 1e9
    bench.rows["cold"] = {
        "pair": pair.folder.name,
        "bytes": pair.num_bytes,
        "dropping_the_cache_worked": worked,
        "resident_share_after_dropping": left,
        "runs": summary(samples),
        "gb_per_s_of_cat": round(rate, 2),
        "cold_cat_over_warm_cat": round(
            ratio(walls(samples["cat"]), [warm_cat.wall_s] * len(samples["cat"])), 2
        ),
    }
    value = ratio(walls(samples["diff"]), walls(samples["cat"])) if worked else None
    note = f"cat reads {rate:.2f} GB/s" if worked else "the page cache could not be dropped"
    bench.add("cold", "diff, all statistics, bf16, cold: whole process / cat", value, 1.05, note=note)


def rss_row(bench: Bench) -> None:
    """Peak resident memory of diff with all statistics and a mask, at two sizes."""
    settings = {"2 workers": (2, "numba"), "8 workers": (8, "numba"), "numpy": (2, "numpy")}
    mask = bench.workdir / "mask"
    pairs = {"whole": bench.big(), "quarter": bench.pair(bench.quarter)}
    for pair in pairs.values():
        verify(bench, pair)
    peaks: dict[str, dict[str, float]] = {}
    samples: dict[str, list[Sample]] = {"an empty child": [run(["true"])]}
    for setting, (workers, kernel) in settings.items():
        peaks[setting] = {}
        for size, pair in pairs.items():
            action = partial(diff, pair, stats="full", workers=workers, kernel=kernel, mask=mask)
            # The numpy kernel takes a minute on the large pair, and its peak hardly varies.
            found = [action() for _ in range(1 if kernel == "numpy" else min(bench.repeats, 3))]
            samples[f"{setting}, {size}"] = found
            peaks[setting][size] = max(s.peak_rss_bytes for s in found) / 1e6
    bench.rows["rss"] = {
        "pairs": {size: pair.folder.name for size, pair in pairs.items()},
        "runs": summary(samples),
    }
    for setting, peak in peaks.items():
        worst = max(peak.values())
        bench.add("rss", f"peak RSS, {setting}", worst, RSS_LIMITS_MB[setting], unit="MB")
        bench.add("rss", f"peak RSS, {setting}: whole pair / a quarter", peak["whole"] / peak["quarter"])


def startup_row(bench: Bench) -> None:
    """CPU seconds until the first header is read, and of other runs that read next to nothing."""
    small = bench.small()
    first_file = small.files[0]
    missing = bench.workdir / "missing"
    quiet = ("--format", "quiet")
    actions: dict[str, Callable[[], Sample]] = {
        "python": lambda: run([sys.executable, "-c", "pass"]),
        "--help": lambda: audit("--help"),
        "diff --help": lambda: audit("diff", "--help"),
        "diff until the base's header is read": lambda: audit("diff", small.sides[0], missing, status=2),
        "inspect": lambda: audit("inspect", first_file),
        "diff of the small pair, numpy": lambda: audit("diff", *small.sides, "--kernel", "numpy", *quiet),
    }
    samples = in_turn(actions, 2 * bench.repeats + 1)
    bench.rows["startup"] = {"pair": small.folder.name, "runs": summary(samples)}
    for name, each in samples.items():
        limit = 0.3 if name.startswith("diff until") else None
        bench.add(
            "startup", f"start-up CPU: {name}", statistics.median(s.cpu_s for s in each), limit, unit="s"
        )


def jit_row(bench: Bench) -> None:
    """The first run ever with the numba kernel: everything is compiled into an empty cache."""
    small = bench.small()
    with tempfile.TemporaryDirectory() as cache:
        action = partial(diff, small, stats="full", workers=1, env={"NUMBA_CACHE_DIR": cache})
        first, second = action(), action()
    samples = {"first run": [first], "second run": [second]}
    bench.rows["jit"] = {"pair": small.folder.name, "runs": summary(samples)}
    bench.add("jit", "first run ever: compiling the bf16 kernel", first.wall_s - second.wall_s, unit="s")
    bench.add("jit", "later runs: the small pair, kernel loaded from its cache", second.wall_s, unit="s")


def papers_row(bench: Bench) -> None:
    """CPU time and memory of whole-tensor scripts against ours, count for count."""
    if versions(["torch"])["torch"] is None:
        bench.add(
            "papers", "whole-tensor script / diff: CPU", None, 15, at_least=True, note="torch is missing"
        )
        return
    pairs = {"a quarter": bench.pair(bench.quarter)}
    # The script's mapped pages and largest tensors; more would push the pair itself out of the cache.
    if available_bytes() > 2 * bench.entries * 4:
        pairs["whole"] = bench.big()
    found: dict[str, Any] = {}
    for size, pair in pairs.items():
        verify(bench, pair)
        warm(pair.files)
        theirs = partial(run, [sys.executable, HERE / "whole_tensor.py", *pair.sides], capture=True)
        actions: dict[str, Callable[[], Sample]] = {
            "whole-tensor script": theirs,
            "diff, counts": partial(diff, pair, stats="counts", workers=bench.workers),
            "diff, all statistics": partial(diff, pair, stats="full", workers=bench.workers),
        }
        samples = in_turn(actions, min(bench.repeats, 3))
        script = json.loads(samples["whole-tensor script"][-1].output)
        found[size] = {"pair": pair.folder.name, "script": script, "runs": summary(samples)}
        is_bar = size == list(pairs)[-1]
        for mine in ("diff, counts", "diff, all statistics"):
            cpu, rss = (
                ratio(*([value(s) for s in samples[who]] for who in ("whole-tensor script", mine)))
                for value in (lambda s: s.cpu_s, lambda s: float(s.peak_rss_bytes))
            )
            at_bar = is_bar and mine == "diff, counts"
            note = f"{pair.folder.name}"
            title = f"whole-tensor script / {mine}"
            bench.add("papers", f"{title}: CPU", cpu, 15 if at_bar else None, at_least=True, note=note)
            bench.add("papers", f"{title}: peak RSS", rss, 25 if at_bar else None, at_least=True, note=note)
    bench.rows["papers"] = found


ROWS: dict[str, Callable[[Bench], None]] = {
    "warm-counts": lambda bench: warm_row(bench, "warm-counts", stats="counts"),
    "warm-full": lambda bench: warm_row(bench, "warm-full", stats="full"),
    "fp32": lambda bench: warm_row(bench, "fp32", stats="full", dtype="fp32"),
    "cold": cold_row,
    "rss": rss_row,
    "startup": startup_row,
    "jit": jit_row,
    "papers": papers_row,
}


def parse_rows(text: str) -> list[str]:
    """Row names from a comma-separated list."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = sorted(set(names) - set(ROWS))
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}; rows are {', '.join(ROWS)}")
    return names


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=float, default=BAR_ENTRIES, help="of the bf16 pair (default 1e9)")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--workdir", type=Path, help="where pairs are made and found again")
    parser.add_argument("--repeats", type=int, default=BAR_REPEATS)
    parser.add_argument("--workers", type=int, default=2, help="of the rows that compare times")
    parser.add_argument("--rows", type=parse_rows, default=list(ROWS), help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--keep", action="store_true", help="leave the pairs in --workdir for the next run")
    options = parser.parse_args(args)
    if options.entries < 1e6 or options.repeats < 1 or options.workers < 1:
        parser.error("--entries is at least 1e6; --repeats and --workers are at least 1")
    if options.keep and options.workdir is None:
        parser.error("--keep needs --workdir")
    return options


@contextmanager
def open_workdir(options: argparse.Namespace) -> Iterator[Bench]:
    """A bench over a directory whose pairs and mask are removed at the end."""
    with tempfile.TemporaryDirectory(prefix="sparsity-audit-bench-") as temporary:
        workdir = Path(temporary) if options.workdir is None else options.workdir.absolute()
        workdir.mkdir(parents=True, exist_ok=True)
        bench = Bench(
            entries=int(options.entries), repeats=options.repeats, workers=options.workers, workdir=workdir
        )
        try:
            yield bench
        finally:
            shutil.rmtree(workdir / "mask", ignore_errors=True)
            if not options.keep:
                for pair in bench.pairs.values():
                    shutil.rmtree(pair.folder, ignore_errors=True)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Where, when and how; paths are left out, because results are committed."""
    command = f"python benchmarks/diff.py --entries {options.entries:.10g} --repeats {options.repeats}"
    command += f" --workers {options.workers} --rows {','.join(options.rows)}"
    return {
        "benchmark": "diff",
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine(),
        "versions": versions(PACKAGES),
        "is_at_the_size_of_the_bars": options.entries >= BAR_ENTRIES and options.repeats >= BAR_REPEATS,
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial_path.replace(path)


def main() -> None:
    options = parse_args()
    result = describe(options)
    if not result["is_at_the_size_of_the_bars"]:
        print(f"# the bars hold for ≥ {BAR_ENTRIES:.0e} entries and ≥ {BAR_REPEATS} repeats; this is a trial")
    with open_workdir(options) as bench:
        for name in options.rows:
            print(f"# {name} …", file=sys.stderr, flush=True)
            load = round(os.getloadavg()[0], 2)
            shown = len(bench.bars)
            ROWS[name](bench)
            if name in bench.rows:
                bench.rows[name]["load_average_before"] = load
            for bar in bench.bars[shown:]:
                print(bar.to_line(), flush=True)
            result["pairs"] = {key: pair.facts for key, pair in bench.pairs.items()}
            result["bars"] = [bar.to_json() for bar in bench.bars]
            result["rows"] = bench.rows
            if options.json:
                write_json(options.json, result)


if __name__ == "__main__":
    main()
