"""Step time and state of masked training, as ratios to dense `AdamW(fused=True)` taken in one run.

    python benchmarks/masked_optimizer.py --json benchmarks/results/masked-optimizer.json
    python benchmarks/masked_optimizer.py --entries 1e6 --repeats 5 --threads 1         (a trial)

Each round takes one step in turn with: the fused dense optimizer; the same after masking the gradients by
hand (which freezes nothing: decay and momentum move every entry); the same under `freeze_outside`;
`SubnetworkAdamW`, alone and with the masking of gradients that its hooks do in the backward pass. Medians
of the rounds' ratios, wall and CPU time. Masks are uniform at random, the worst case for reading by
position. fp32 weights, as 8 matrices. With `--crossover`, compact against dense state by density, on one
thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import harness
import torch

from sparsity_audit import SubnetworkAdamW, freeze_outside

NUM_TENSORS = 8
FLOOR = "AdamW(fused=True)"
BARS = {0.05: 0.5, 0.2: 0.75, 0.3: 1.0}


class Weights(torch.nn.Module):
    """Matrices of random weights, with gradients, that nothing computes with."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        rows = max(8, round((entries / NUM_TENSORS) ** 0.5))
        for number in range(NUM_TENSORS):
            parameter = torch.nn.Parameter(torch.randn(rows, rows) * 0.02)
            parameter.grad = torch.randn(rows, rows) * 1e-3
            self.register_parameter(f"w{number}", parameter)

    @property
    def entries(self) -> int:
        """Entries of all matrices."""
        return sum(p.numel() for p in self.parameters())


def random_masks(weights: Weights, density: float) -> dict[str, torch.Tensor]:
    return {name: torch.rand(p.shape) < density for name, p in weights.named_parameters()}


def dense_adamw(weights: Weights) -> torch.optim.AdamW:
    return torch.optim.AdamW(weights.parameters(), lr=1e-5, fused=True)


def masked_by_hand(weights: Weights, masks: dict[str, torch.Tensor]) -> Callable[[], object]:
    optimizer, zero = dense_adamw(weights), torch.zeros(())

    def step() -> None:
        for name, parameter in weights.named_parameters():
            torch.where(masks[name], parameter.grad, zero, out=parameter.grad)
        optimizer.step()

    return step


def frozen(weights: Weights, masks: dict[str, torch.Tensor]) -> Callable[[], object]:
    optimizer = dense_adamw(weights)
    freeze_outside(weights, optimizer, masks)

    def step() -> None:
        run_gradient_hooks(weights)
        optimizer.step()

    return step


def run_gradient_hooks(weights: Weights) -> None:
    """What a backward pass would call."""
    for parameter in weights.parameters():
        for hook in parameter._post_accumulate_grad_hooks.values():  # noqa: SLF001 - no public way
            hook(parameter)


def measure(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Wall and CPU seconds of each action, round by round; the first round warms up."""
    times: dict[str, dict[str, list[float]]] = {name: {"wall_s": [], "cpu_s": []} for name in actions}
    for number in range(repeats + 1):
        for name, action in actions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            action()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number:
                times[name]["wall_s"].append(wall)
                times[name]["cpu_s"].append(cpu)
    return times


def ratios(times: dict[str, dict[str, list[float]]], floor: str) -> dict[str, dict[str, float]]:
    return {
        name: {
            clock.removesuffix("_s"): round(harness.ratio(samples, times[floor][clock]), 3)
            for clock, samples in each.items()
        }
        for name, each in times.items()
        if name != floor
    }


def compare(entries: int, density: float, *, threads: int, repeats: int) -> dict[str, Any]:
    """One row: a size, a density, a number of threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    weights = [Weights(entries) for _ in range(5)]
    masks = random_masks(weights[0], density)
    plain = SubnetworkAdamW(weights[3], masks, lr=1e-5, mask_gradients=False)
    hooked = SubnetworkAdamW(weights[4], masks, lr=1e-5)

    def hooked_step() -> None:
        run_gradient_hooks(weights[4])
        hooked.step()

    actions = {
        FLOOR: dense_adamw(weights[0]).step,
        "AdamW(fused=True), gradients masked by hand": masked_by_hand(weights[1], masks),
        "AdamW(fused=True) under freeze_outside": frozen(weights[2], masks),
        "SubnetworkAdamW": plain.step,
        "SubnetworkAdamW, gradients masked by its hooks": hooked_step,
    }
    load = os.getloadavg()[0]
    times = measure(actions, repeats)
    selected = sum(int(bits.sum()) for bits in masks.values())
    return {
        "entries": weights[0].entries,
        "density": density,
        "threads": threads,
        "load_average_before": round(load, 2),
        "floor_wall_ns_per_entry": round(
            statistics.median(times[FLOOR]["wall_s"]) / weights[0].entries * 1e9, 3
        ),
        "ratios_to_the_floor": ratios(times, FLOOR),
        "state_bytes_per_parameter": {
            "dense": 8.0,
            "SubnetworkAdamW": round(plain.state_bytes() / weights[0].entries, 4),
            "12 d": round(12 * selected / weights[0].entries, 4),
        },
    }


def crossover(entries: int, density: float, *, repeats: int) -> dict[str, Any]:
    """Dense state over compact state at one density, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weights = [Weights(entries) for _ in range(2)]
    masks = random_masks(weights[0], density)
    forms = {"compact": 1.0, "dense": 0.0}
    optimizers = {
        name: SubnetworkAdamW(each, masks, lr=1e-5, dense_above=above, mask_gradients=False)
        for (name, above), each in zip(forms.items(), weights, strict=True)
    }
    times = measure({name: optimizer.step for name, optimizer in optimizers.items()}, repeats)
    return {
        "entries": weights[0].entries,
        "density": density,
        "dense_over_compact": ratios(times, "compact")["dense"],
        "state_bytes_per_parameter": {
            name: round(optimizer.state_bytes() / weights[0].entries, 4)
            for name, optimizer in optimizers.items()
        },
    }


def bar_of(row: dict[str, Any]) -> harness.Bar:
    clock = "cpu" if row["threads"] == 1 else "wall"
    name = f"SubnetworkAdamW / {FLOOR}, {row['entries'] / 1e6:.0f} M, {row['density']:.0%}"
    return harness.Bar(
        name=f"{name}, {row['threads']} thread{'s' * (row['threads'] > 1)}",
        row="step",
        value=row["ratios_to_the_floor"]["SubnetworkAdamW"][clock],
        limit=BARS.get(row["density"]),
        note=f"{clock} time; an aim, not a promise",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", default="1e6,1e7,5e7", help="sizes, comma-separated")
    parser.add_argument("--densities", default="0.05,0.2,0.3", help="comma-separated")
    parser.add_argument("--threads", default="1,2", help="comma-separated")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds, after one that warms up")
    parser.add_argument("--crossover", action="store_true", help="also compact against dense state")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    sizes = [round(float(text)) for text in options.entries.split(",")]
    densities = [float(text) for text in options.densities.split(",")]
    threads = [int(text) for text in options.threads.split(",")]
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "benchmarks/masked_optimizer.py", *_without_json(sys.argv[1:])]),
        "machine": harness.machine(),
        "versions": harness.versions(["torch", "numpy", "sparsity-audit"]),
        "repeats": options.repeats,
        "rows": [],
    }
    for size in sizes:
        for count in threads:
            for density in densities:
                row = compare(size, density, threads=count, repeats=options.repeats)
                result["rows"].append(row)
                print(bar_of(row).to_line())
                for name, each in row["ratios_to_the_floor"].items():
                    print(f"    {name:50} wall {each['wall']:6.2f} ×   cpu {each['cpu']:6.2f} ×")
    loads = [row["load_average_before"] for row in result["rows"]]
    if max(loads) > len(os.sched_getaffinity(0)):
        result["note"] = "The machine was busy (see the load averages): small differences mean nothing."
    result["bars"] = [bar_of(row).to_json() for row in result["rows"]]
    if options.crossover:
        result["crossover"] = []
        for density in (0.1, 0.3, 0.5, 0.7, 0.9):
            row = crossover(sizes[0], density, repeats=options.repeats)
            result["crossover"].append(row)
            print(f"dense / compact state at {density:.0%}: {row['dense_over_compact']['wall']:.2f} ×")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _without_json(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--json":
            kept.append(argument)
        skip = argument == "--json"
    return kept


if __name__ == "__main__":
    main()
