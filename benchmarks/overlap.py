"""The bars of `sparsity-audit overlap`: counts of many masks, and what the magnitude null adds.

    python benchmarks/overlap.py [--entries 1e9] [--json PATH] [--workdir DIR] [--rows counts,magnitude,rss]

Makes its own pair (benchmarks/pairs.py) and masks (benchmarks/masks.py), runs every command as a child
process, in turn, and prints one line a bar. benchmarks/README.md says what each row measures.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diff import (
    BAR_ENTRIES,
    BAR_REPEATS,
    COLD_SHARE,
    HERE,
    PACKAGES,
    Bench,
    Pair,
    audit,
    cat,
    diff,
    open_workdir,
    write_json,
)
from harness import Sample, in_turn, machine, ratio, resident_share, run, summary, versions, walls, warm

RUNS = 10


def masks_of(bench: Bench, pair: Pair) -> list[Path]:
    """Masks of RUNS runs from the pair's base, made when first needed; the first is the pair's own."""
    folder = pair.folder / "masks"
    runs = [folder / str(run) for run in range(RUNS)]
    if not all((run / "mask.safetensors.index.json").exists() for run in runs):
        print(f"# making {RUNS} masks of {pair.folder.name} …", file=sys.stderr, flush=True)
        first = pair.folder / "first-mask"
        diff(pair, stats="counts", workers=bench.workers, mask=first)
        run([sys.executable, HERE / "masks.py", first, folder, "--runs", str(RUNS)])
    return runs


def count(masks: Sequence[Path], *, workers: int, base: Path | None = None, capture: bool = True) -> Sample:
    """One pass over the masks' bits, by strata where there is a base."""
    strata = [] if base is None else ["--base", base]
    command = [sys.executable, HERE / "overlap_pass.py", *masks, *strata, "--workers", str(workers)]
    return run(command, capture=capture)


def shards(masks: Sequence[Path]) -> list[Path]:
    """Files that hold the masks' bits."""
    return [path for mask in masks for path in sorted(mask.glob("*.safetensors"))]


def verify(bench: Bench, pair: Pair) -> None:
    """Stop unless both ways of counting find what the generator counted; these runs fill numba's cache."""
    masks = masks_of(bench, pair)
    plain, by_strata = (
        json.loads(count(masks, workers=bench.workers, base=base).output) for base in (None, pair.sides[0])
    )
    expected = (pair.facts["counts"]["entries"], pair.facts["counts"]["value"])
    for found in (plain, by_strata):
        if (found["entries"], found["changed"][0]) != expected or found["core"] != plain["core"]:
            raise SystemExit(f"{pair.folder.name}: found {found}, not {expected}")
    count(masks[:2], workers=bench.workers, base=pair.sides[0])
    diff(pair, stats="full", workers=bench.workers)


def cpus(samples: Sequence[Sample]) -> list[float]:
    """CPU seconds, of all threads."""
    return [sample.cpu_s for sample in samples]


def passes(samples: Sequence[Sample]) -> list[float]:
    """CPU seconds of the pass alone, its kernel loaded before; reading included."""
    return [json.loads(sample.output)["count_cpu_s"] for sample in samples]


def less(whole: Sequence[float], small: Sequence[float]) -> list[float]:
    """The steady state: what grows with the model, round by round."""
    return [a - b for a, b in zip(whole, small, strict=True)]


def in_cache_note(files: Sequence[Path]) -> str:
    """What a reader must know about the page cache."""
    share = resident_share(files)
    return "" if share is None or share > 1 - COLD_SHARE else f"only {share:.0%} was in the cache"


def counts_row(bench: Bench) -> None:
    """Counts of ten masks without strata, beside reading their bytes."""
    pair = bench.pair(bench.entries)
    verify(bench, pair)
    masks = masks_of(bench, pair)
    files = shards(masks)
    warm(files)
    note = in_cache_note(files)
    many = f"{bench.workers} workers"
    actions: dict[str, Callable[[], Sample]] = {
        "cat of the masks": lambda: run(["cat", *files]),
        "1 worker": partial(count, masks, workers=1),
        many: partial(count, masks, workers=bench.workers),
    }
    samples = in_turn(actions, bench.repeats)
    bench.rows["counts"] = {
        "masks": RUNS,
        "pair": pair.folder.name,
        "bytes": sum(path.stat().st_size for path in files),
        "cpu_s_of_the_pass": {name: passes(samples[name]) for name in ("1 worker", many)},
        "runs": summary(samples),
    }
    limit = 0.5 * pair.facts["counts"]["entries"] / BAR_ENTRIES
    reading = cpus(samples["cat of the masks"])
    for name in ("1 worker", many):
        title, spent = f"counts of {RUNS} masks, {name}", passes(samples[name])
        bench.add("counts", f"{title}: CPU", statistics.median(spent), limit, unit="s", note=note)
        bench.add("counts", f"{title}: CPU, best round", min(spent), unit="s")
        bench.add("counts", f"{title}: CPU / cat of the masks", ratio(spent, reading))
        bench.add("counts", f"{title}: CPU, whole process", statistics.median(cpus(samples[name])), unit="s")
    bench.add("counts", f"cat of the {RUNS} masks: CPU", statistics.median(reading), unit="s")


def magnitude_row(bench: Bench) -> None:
    """The pass of the magnitude null against diff with all statistics and cat; and the whole command."""
    big, small = bench.pair(bench.entries), bench.small()
    for pair in (big, small):
        verify(bench, pair)
    files = [*big.files, *shards(masks_of(bench, big))]
    warm(files)
    note = in_cache_note(files)
    actions: dict[str, Callable[[], Sample]] = {"cat": partial(cat, big)}
    for size, pair in (("", big), (", small", small)):
        masks, base = masks_of(bench, pair), pair.sides[0]
        quiet = ("--base", base, "--workers", str(bench.workers), "--format", "quiet")
        actions |= {
            f"diff{size}": partial(diff, pair, stats="full", workers=bench.workers),
            f"2 masks{size}": partial(count, masks[:2], workers=bench.workers, base=base),
            f"{RUNS} masks{size}": partial(count, masks, workers=bench.workers, base=base),
            f"overlap command, 2 masks{size}": partial(audit, "overlap", *masks[:2], *quiet),
        }
    samples = in_turn(actions, bench.repeats)
    bench.rows["magnitude"] = {"pair": big.folder.name, "bytes": big.num_bytes, "runs": summary(samples)}
    for what, seconds in (("CPU", cpus), ("wall", walls)):
        below = less(seconds(samples["diff"]), seconds(samples["diff, small"]))
        for who in ("2 masks", f"{RUNS} masks", "overlap command, 2 masks"):
            steady = less(seconds(samples[who]), seconds(samples[f"{who}, small"]))
            limit = 1.5 if who == "2 masks" else None
            usable = min(*steady, *below) > 0
            name = f"magnitude null, {who}: steady state / diff, {what}"
            why = note if usable else "the pair is too small: start-up hides the steady state"
            bench.add("magnitude", name, ratio(steady, below) if usable else None, limit, note=why)
            whole = ratio(seconds(samples[who]), seconds(samples["diff"]))
            bench.add("magnitude", f"magnitude null, {who}: whole process / diff, {what}", whole, limit)
        against_cat = ratio(seconds(samples["2 masks"]), seconds(samples["cat"]))
        bench.add(
            "magnitude", f"magnitude null, 2 masks: whole process / cat base tuned, {what}", against_cat
        )


def rss_row(bench: Bench) -> None:
    """Peak resident memory of the pass at two sizes."""
    peaks: dict[str, dict[str, float]] = {}
    samples: dict[str, list[Sample]] = {}
    for size, entries in (("whole", bench.entries), ("quarter", bench.quarter)):
        pair = bench.pair(entries)
        verify(bench, pair)
        masks, base = masks_of(bench, pair), pair.sides[0]
        for title, action in {
            f"{RUNS} masks": partial(count, masks, workers=bench.workers),
            "2 masks by strata": partial(count, masks[:2], workers=bench.workers, base=base),
            f"{RUNS} masks by strata": partial(count, masks, workers=bench.workers, base=base),
        }.items():
            found = samples[f"{title}, {size}"] = [action() for _ in range(min(bench.repeats, 3))]
            peaks.setdefault(title, {})[size] = max(s.peak_rss_bytes for s in found) / 1e6
    bench.rows["rss"] = {"runs": summary(samples)}
    for title, peak in peaks.items():
        bench.add("rss", f"peak RSS, {title}, {bench.workers} workers", max(peak.values()), unit="MB")
        bench.add("rss", f"peak RSS, {title}: whole / a quarter", peak["whole"] / peak["quarter"], 1.05)


ROWS: dict[str, Callable[[Bench], None]] = {
    "counts": counts_row,
    "magnitude": magnitude_row,
    "rss": rss_row,
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
    parser.add_argument("--workdir", type=Path, help="where pairs and masks are made and found again")
    parser.add_argument("--repeats", type=int, default=BAR_REPEATS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=parse_rows, default=list(ROWS), help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--note", help="what a reader of the results must know; stored with them")
    parser.add_argument("--keep", action="store_true", help="leave pairs and masks in --workdir")
    options = parser.parse_args(args)
    if options.entries < 1e6 or options.repeats < 1 or options.workers < 1:
        parser.error("--entries is at least 1e6; --repeats and --workers are at least 1")
    if options.keep and options.workdir is None:
        parser.error("--keep needs --workdir")
    return options


def main() -> None:
    options = parse_args()
    command = f"python benchmarks/overlap.py --entries {options.entries:.10g} --repeats {options.repeats}"
    result: dict[str, Any] = {
        "benchmark": "overlap",
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": f"{command} --workers {options.workers} --rows {','.join(options.rows)}",
        "note": options.note,
        "machine": machine(),
        "versions": versions(PACKAGES),
        "is_at_the_size_of_the_bars": options.entries >= BAR_ENTRIES and options.repeats >= BAR_REPEATS,
    }
    if not result["is_at_the_size_of_the_bars"]:
        print(f"# the bars hold for ≥ {BAR_ENTRIES:.0e} entries and ≥ {BAR_REPEATS} repeats; this is a trial")
    with open_workdir(options) as bench:
        for name in options.rows:
            print(f"# {name} …", file=sys.stderr, flush=True)
            load, shown = round(os.getloadavg()[0], 2), len(bench.bars)
            ROWS[name](bench)
            bench.rows[name]["load_average"] = [load, round(os.getloadavg()[0], 2)]
            for bar in bench.bars[shown:]:
                print(bar.to_line(), flush=True)
            result["pairs"] = {key: pair.facts for key, pair in bench.pairs.items()}
            result["bars"] = [bar.to_json() for bar in bench.bars]
            result["rows"] = bench.rows
            if options.json:
                write_json(options.json, result)


if __name__ == "__main__":
    main()
