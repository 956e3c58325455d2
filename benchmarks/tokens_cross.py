"""What cross-sampling costs: its time against generating with one model, on the same prompts.

    python benchmarks/tokens_cross.py [--json benchmarks/results/tokens-cross-speed.json] [--rounds 5]

One thread, CPU time, so that a busy machine does not show. Each round runs each row once, ratios are taken
within a round, medians are shown. Every row writes the same number of tokens: no token ends a completion. The
bar is 2.5 times the time of `models.sample` with the primary model. Rows: the lab's base and a tuned twin
(vocabulary 20), and two random Llamas as wide as memory traffic matters (hidden 512, vocabulary 32,000), in a
small batch.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Bar, machine, ratio, versions

from sparsity_audit.lab.language_model import LabModel, load_lab_model
from sparsity_audit.lab.model import Llama, LlamaConfig
from sparsity_audit.models.noise import row_seed
from sparsity_audit.models.sample import sample
from sparsity_audit.tokens.intervention import cross_sample
from sparsity_audit.tokens.rules import Above, First, Rule

_LIMIT = 2.5
_RULES: dict[str, Rule] = {
    "js > 0.1": Above(signal="js", threshold=0.1),
    "js > 0": Above(signal="js", threshold=0.0),
    "first position": First(num=1),
}


def nearby(model: LabModel, *, seed: int) -> LabModel:
    """A second model of the same shape with slightly other weights."""
    twin = Llama(model.llama.config)
    twin.load_state_dict(model.llama.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.02 * float(weight.std()))
    return LabModel(twin, name="twin")


def wide(seed: int) -> LabModel:
    """A random Llama: hidden 512, 4 layers, vocabulary 32,000; 45 million parameters."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=32_000,
        max_position_embeddings=512,
    )
    llama, generator = Llama(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in llama.parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
    return LabModel(llama, name="wide")


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(name: str, model: LabModel, *, rows: int, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """One pair of models: generating with one, and taking turns under each rule."""
    twin = nearby(model, seed=1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.vocab_size, (rows, prompt), generator=generator).tolist()
    options: dict[str, Any] = {
        "seeds": [row_seed(0, row) for row in range(rows)],
        "eos_ids": (),
        "max_new_tokens": new,
        "temperature": 1.0,
        "batch_tokens": rows * (prompt + new),
    }
    times: dict[str, list[float]] = {"generate": [], **{rule: [] for rule in _RULES}}
    for _ in range(rounds):
        times["generate"].append(cpu_seconds(lambda: sample(model, tokens, **options)))
        for label, rule in _RULES.items():
            seconds = cpu_seconds(lambda rule=rule: cross_sample(model, twin, tokens, rule=rule, **options))
            times[label].append(seconds)
    written = rows * new
    return {
        "row": name,
        "sequences": rows,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "parameters": sum(p.numel() for p in model.llama.parameters()),
        "tokens_per_cpu_s": {label: round(written / statistics.median(t)) for label, t in times.items()},
        "ratio": {label: round(ratio(times[label], times["generate"]), 3) for label in _RULES},
        "cpu_s": {label: [round(t, 4) for t in each] for label, each in times.items()},
    }


def main() -> int:
    """Measure, print, write; 1 where the bar is missed."""
    parser = argparse.ArgumentParser(description="Time of cross-sampling against generating with one model.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="small sizes, for the tests")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lab, rounds = load_lab_model("mix"), arguments.rounds
    if arguments.smoke:
        rows = [measure("lab, mix", lab, rows=4, prompt=10, new=6, rounds=rounds)]
    else:
        rows = [
            measure("lab, mix", lab, rows=512, prompt=11, new=35, rounds=rounds),
            measure("lab, mix, 32 sequences", lab, rows=32, prompt=11, new=35, rounds=rounds),
            measure("hidden 512, vocabulary 32,000", wide(0), rows=8, prompt=32, new=24, rounds=rounds),
        ]
    bars = [
        Bar(
            name=f"{row['row']}: {label}",
            row=row["row"],
            value=ratio,
            limit=_LIMIT,
            note=f"{row['tokens_per_cpu_s'][label]:,} tokens a CPU second, one model "
            f"{row['tokens_per_cpu_s']['generate']:,}",
        )
        for row in rows
        for label, ratio in row["ratio"].items()
    ]
    for bar in bars:
        print(bar.to_line())
    if arguments.json is not None:
        report = {
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "command": "python benchmarks/tokens_cross.py --json benchmarks/results/tokens-cross-speed.json",
            "machine": machine(),
            "versions": versions(["sparsity-audit", "torch"]),
            "rounds": rounds,
            "threads": 1,
            "bars": [bar.to_json() for bar in bars],
            "rows": rows,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return 0 if arguments.smoke or all(bar.verdict == "met" for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
