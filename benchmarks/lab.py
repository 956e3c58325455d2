"""Tokens per second of the lab's generation against `transformers.generate`, and what a training pass costs.

    .venv-extras/bin/python benchmarks/lab.py [--json PATH] [--base mix] [--rounds 5]

Greedy decoding on one thread, in CPU time, both on the same prompts: completions must be equal, so that both
make the same tokens. Each round runs each row once; the table shows medians, ratios are taken within a
round. Tokens are those up to and including `<eos>`; what is computed behind it in a batch is not counted.
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

import torch
from harness import machine, versions
from transformers import LlamaForCausalLM

from sparsity_audit.lab.folder import load_model, resolve_base
from sparsity_audit.lab.generate import generate
from sparsity_audit.lab.model import Llama
from sparsity_audit.lab.rollout import (
    Rollouts,
    greedy,
    logprobs_of,
    pad_prompts,
    sample,
    teacher_forced,
)
from sparsity_audit.lab.tasks import Addition, Problem

TASK = Addition()
LIMIT = TASK.max_new_tokens(4)
BATCHES = (16, 128, 512)
PACKAGES = ("sparsity-audit", "torch", "transformers", "safetensors")


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def check_equal(ours: Llama, theirs: LlamaForCausalLM, problems: tuple[Problem, ...]) -> int:
    """The tokens both make; stops where the completions differ."""
    made = greedy(ours, problems, task=TASK, max_new_tokens=LIMIT)
    found = run_theirs(theirs, problems)
    assert torch.equal(found, made.completions), "completions differ: the rates would not be comparable"
    return int(made.completion_mask.sum())


def run_theirs(theirs: LlamaForCausalLM, problems: tuple[Problem, ...]) -> torch.Tensor:
    prompts, mask = pad_prompts(problems)
    found = theirs.generate(prompts, attention_mask=mask.long(), do_sample=False, max_new_tokens=LIMIT)
    return found[:, prompts.shape[1] :]


def run_ours(ours: Llama, problems: tuple[Problem, ...]) -> None:
    prompts, mask = pad_prompts(problems)
    generate(ours, prompts, mask, max_new_tokens=LIMIT, temperature=1.0, generator=None)


def generation(ours: Llama, theirs: LlamaForCausalLM, batch: int, rounds: int) -> dict[str, object]:
    problems = TASK.sample(batch, lengths={4: 1.0}, generator=torch.Generator().manual_seed(0))
    tokens = check_equal(ours, theirs, problems)
    pairs = [
        (cpu_seconds(lambda: run_ours(ours, problems)), cpu_seconds(lambda: run_theirs(theirs, problems)))
        for _ in range(rounds)
    ]
    return {
        "batch": batch,
        "tokens": tokens,
        "ours_tokens_per_s": round(statistics.median(tokens / own for own, _ in pairs)),
        "transformers_tokens_per_s": round(statistics.median(tokens / other for _, other in pairs)),
        "ratio": round(statistics.median(other / own for own, other in pairs), 2),
    }


def training(ours: Llama, rounds: int) -> dict[str, float]:
    """CPU seconds of sampling 16 × 8 rollouts, of reading them again, and of reading with the gradient."""
    generator = torch.Generator().manual_seed(0)
    problems = TASK.sample(16, lengths={4: 1.0}, generator=generator)

    def rollouts() -> Rollouts:
        return sample(
            ours,
            problems,
            task=TASK,
            num_samples=8,
            max_new_tokens=LIMIT,
            temperature=1.0,
            generator=generator,
        )

    made = rollouts()

    def read() -> torch.Tensor:
        return logprobs_of(teacher_forced(ours, made), made.completions, temperature=1.0).sum()

    rows = {"sample": rollouts, "read": torch.no_grad()(read), "read_and_backward": lambda: read().backward()}
    return {
        f"{name}_cpu_s": round(statistics.median(cpu_seconds(work) for _ in range(rounds)), 4)
        for name, work in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--base", default="mix", help="mix, single or a path")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = resolve_base(options.base)
    ours, theirs = load_model(folder), LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [generation(ours, theirs, batch, options.rounds) for batch in BATCHES]
    costs = training(ours, options.rounds)
    print(f"{'batch':>6} {'lab tokens/s':>13} {'transformers':>13} {'ratio':>6}")
    for row in rows:
        print(
            f"{row['batch']:>6} {row['ours_tokens_per_s']:>13,} {row['transformers_tokens_per_s']:>13,}"
            f" {row['ratio']:>6}"
        )
    print(f"16 × 8 rollouts: {costs}")
    if options.json:
        record = {
            "command": " ".join(["python", "benchmarks/lab.py", *sys.argv[1:]]),
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "machine": machine(),
            "versions": versions(PACKAGES),
            "base": options.base,
            "rounds": options.rounds,
            "generation": rows,
            "training_16x8": costs,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
