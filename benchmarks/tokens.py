"""What a token audit costs: scoring against generating, and memory at a large vocabulary.

Contract: everything is synthetic and on one thread. `speed` samples completions with one model (the cached
loop of the package), then scores them with two models and takes all divergences; the bar is a ratio of the
two times. `memory` scores one sequence of 4,096 tokens over a vocabulary of 150,000 in a process of its own,
and reports what the scoring adds to the peak, against the bound that was asked for and against the logits it
never holds.

    python benchmarks/tokens.py --json benchmarks/results/tokens.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from harness import machine, versions

from sparsity_audit.lab.language_model import LabModel
from sparsity_audit.lab.model import Llama, LlamaConfig, initialise
from sparsity_audit.models.noise import row_seed
from sparsity_audit.models.sample import sample
from sparsity_audit.models.score import Resident, Scored
from sparsity_audit.tokens.positions import measure

_MIB = 1 << 20
_MAX_RATIO = 2.5
"""Scoring with two models and all divergences ÷ generating the same tokens with one."""


def model(seed: int, *, hidden: int, layers: int, vocab_size: int, context: int) -> LabModel:
    """A random model whose head is not zero."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=vocab_size,
        max_position_embeddings=context,
    )
    generator = torch.Generator().manual_seed(seed)
    llama: Llama = initialise(config, generator=generator)
    with torch.no_grad():
        llama.lm_head.weight.normal_(std=hidden**-0.5, generator=generator)
    return LabModel(llama, name=f"random {seed}")


def speed(
    name: str, *, hidden: int, layers: int, vocab_size: int, rows: int, new_tokens: int
) -> dict[str, Any]:
    """Seconds of generating with one model and of scoring the same tokens with two, best of three."""
    options = {"hidden": hidden, "layers": layers, "vocab_size": vocab_size, "context": 16 + new_tokens}
    base, tuned = model(0, **options), model(1, **options)
    prompts = [[1 + (row + place) % (vocab_size - 1) for place in range(16)] for row in range(rows)]
    seeds = [row_seed(0, row) for row in range(rows)]
    generating, scoring = [], []
    for _ in range(3):
        start = time.perf_counter()
        made = sample(
            base,
            prompts,
            seeds=seeds,
            eos_ids=(),
            max_new_tokens=new_tokens,
            temperature=1.0,
            batch_tokens=1 << 20,
        )
        generating.append(time.perf_counter() - start)
        sequences = [
            Scored(prompt=tuple(p), completion=one.tokens) for p, one in zip(prompts, made, strict=True)
        ]
        start = time.perf_counter()
        found = measure(
            Resident(base),
            Resident(tuned),
            sequences,
            vocab_size=vocab_size,
            top_k=5,
            top_p=None,
            with_tops=(),
            batch_tokens=16_384,
            chunk_bytes=512 * _MIB,
        )
        scoring.append(time.perf_counter() - start)
    assert found.num == rows * new_tokens
    ratio = min(scoring) / min(generating)
    return {
        "row": f"speed: {name}",
        **{key: value for key, value in options.items() if key != "context"},
        "tokens": found.num,
        "generate_tokens_per_s": round(found.num / min(generating)),
        "score_tokens_per_s": round(found.num / min(scoring)),
        "ratio": round(ratio, 3),
        "bar": f"score / generate ≤ {_MAX_RATIO}",
        "met": ratio <= _MAX_RATIO,
    }


def memory(*, vocab_size: int, length: int, chunk_bytes: int) -> dict[str, Any]:
    """Peak memory of one long sequence over a large vocabulary; call it in a process of its own."""
    options = {"hidden": 256, "layers": 2, "vocab_size": vocab_size, "context": length}
    base, tuned = model(0, **options), model(1, **options)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
    sequences = [Scored(prompt=tuple(ids[:16]), completion=tuple(ids[16:]))]
    # Not getrusage: its peak is inherited from the parent that started this process.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    found = measure(
        Resident(base),
        Resident(tuned),
        sequences,
        vocab_size=vocab_size,
        top_k=5,
        top_p=None,
        with_tops=(),
        batch_tokens=16_384,
        chunk_bytes=chunk_bytes,
    )
    added = _status_bytes("VmHWM") - before
    whole = 2 * length * vocab_size * 4
    return {
        "row": "memory",
        "vocab_size": vocab_size,
        "length": length,
        "positions": found.num,
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "chunk_mib": chunk_bytes // _MIB,
        "models_mib": round(before / _MIB),
        "added_mib": round(added / _MIB),
        "logits_of_both_mib": round(whole / _MIB),
        "ratio": round(added / chunk_bytes, 3),
        "bar": "added / chunk ≤ 1.25",
        "met": added <= 1.25 * chunk_bytes,
    }


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def main() -> int:
    """Run all rows; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description="What a token audit costs.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", default="speed,memory")
    parser.add_argument("--vocab", type=int, default=150_000)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--chunk-mib", type=int, default=256)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        chunk = arguments.chunk_mib * _MIB
        print(json.dumps(memory(vocab_size=arguments.vocab, length=arguments.length, chunk_bytes=chunk)))
        return 0
    rows = []
    if "speed" in arguments.rows:
        rows.append(speed("the lab's base", hidden=64, layers=3, vocab_size=20, rows=256, new_tokens=40))
        rows.append(speed("a small model", hidden=512, layers=8, vocab_size=32_000, rows=8, new_tokens=64))
    if "memory" in arguments.rows:
        options = [
            f"--{key}={value}" for key, value in (("vocab", arguments.vocab), ("length", arguments.length))
        ]
        command = [sys.executable, __file__, "--child", f"--chunk-mib={arguments.chunk_mib}", *options]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))
    if arguments.json is not None:
        report = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": "python benchmarks/tokens.py",
            "machine": machine(),
            "versions": versions(["sparsity-audit", "torch", "numpy"]),
            "rows": rows,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
