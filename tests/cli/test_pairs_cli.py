"""`diff --pairs` from the command line, against the loopback Hub: published rows, eviction, failures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hub.hub_server import HubServer
from safetensors.torch import save
from slow_presets import slow_mukherjee, slow_zhu

from sparsity_audit.cli.main import cli
from sparsity_audit.errors import UsageError

TOKEN = "hf_averysecrettokenvalue0123456789"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def run(hub: HubServer, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line in a fresh process whose Hub is the loopback one."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        clean |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-m", "sparsity_audit.cli.main", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=clean, cwd=tmp_path, timeout=120, check=False
        )

    return call


def weights(dtype: torch.dtype, *, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (50, 20), "model.layers.0.mlp.up_proj.weight": (40, 25)}
    return {name: (torch.randn(shape, generator=rng) * 0.02).to(dtype) for name, shape in shapes.items()}


def trained(base: dict[str, torch.Tensor], *, share: float, step: float = 1e-3) -> dict[str, torch.Tensor]:
    """The base with the first `share` of each tensor's entries moved by `step`."""
    out = {}
    for name, tensor in base.items():
        moved = tensor.float().flatten().clone()
        moved[: round(share * moved.numel())] += step
        out[name] = moved.reshape(tensor.shape).to(tensor.dtype)
    return out


def upload(hub: HubServer, name: str, tensors: dict[str, torch.Tensor], **options: object) -> str:
    config = b'{"model_type": "tiny", "tie_word_embeddings": false}'
    return hub.add(name, {"config.json": config, "model.safetensors": save(tensors)}, **options)


def cached(tmp_path: Path) -> set[str]:
    """`org/model@<commit>` of what the cache holds."""
    found = (tmp_path / "hf" / "hub").glob("models--*/snapshots/*")
    return {p.parent.parent.name.removeprefix("models--").replace("--", "/") + f"@{p.name}" for p in found}


def test_stand_ins_for_published_rows_are_measured_by_the_papers_rule_and_judged(hub, run, tmp_path):
    sft = weights(torch.bfloat16)
    kto = trained(sft, share=0.04)
    upload(hub, "openbmb/Eurus-7b-sft", sft)
    upload(hub, "openbmb/Eurus-7b-kto", kto)
    out = tmp_path / "out"
    done = run("diff", "--pairs", "published:mukherjee2025", "--only", "eurus-7b-kto", "-o", str(out))
    assert done.returncode == 0, done.stderr
    row = next(
        r for r in json.loads((out / "pairs.json").read_bytes())["rows"] if r["name"] == "eurus-7b-kto"
    )
    unchanged, compared = slow_mukherjee(sft, kto, parameters=list(sft))
    assert (row["measured"]["compared"] - row["measured"]["changed"], row["measured"]["compared"]) == (
        unchanged,
        compared,
    )
    assert row["expected"]["passed"] is True
    assert (
        "| eurus-7b-kto | KTO | RL | 96.0 % | 96 ± 1 % | +0.0 | mukherjee2025, served | 2,000 |"
        in done.stdout
    )
    assert {p.name for p in (out / "figures").iterdir()} == {"pairs.pdf", "pairs.svg", "pairs.png"}


def test_a_published_figure_that_is_not_met_exits_with_1_and_says_by_how_much(hub, run, tmp_path):
    base = weights(torch.bfloat16)
    wide = {n: t.float() for n, t in trained(base, share=0.3).items()}
    wide = {n: t * (1 + 1e-4) for n, t in wide.items()}  # dense in fp32, hidden where it rounds away
    upload(hub, "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", base)
    upload(hub, "agentica-org/DeepScaleR-1.5B-Preview", wide)
    options = ("--only", "deepscaler-1.5b", "-o", "out", "--no-figures", "--format", "json")
    done = run("diff", "--pairs", "published:zhu2025", *options)
    assert done.returncode == 1, done.stderr
    row = next(r for r in json.loads(done.stdout)["rows"] if r["name"] == "deepscaler-1.5b")
    unchanged, compared = slow_zhu(base, wide, parameters=list(base))
    assert (row["measured"]["compared"] - row["measured"]["changed"], row["measured"]["compared"]) == (
        unchanged,
        compared,
    )
    assert "expectation failed: deepscaler-1.5b:" in done.stderr
    assert row["tuned_dtypes"] == ["fp32"]


@pytest.fixture
def three_pairs(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """Two pairs on one base, a third on a gated one; returns repository → commit."""
    base = weights(torch.bfloat16)
    commits = {"org/base": upload(hub, "org/base", base)}
    for number, share in enumerate((0.1, 0.2)):
        commits[f"org/tuned{number}"] = upload(hub, f"org/tuned{number}", trained(base, share=share))
    upload(hub, "org/gated", trained(base, share=0.5), token=TOKEN, gated=True)
    entries = [
        f"  - {{name: p{i}, base: org/base, tuned: org/{t}}}"
        for i, t in enumerate(("tuned0", "gated", "tuned1"))
    ]
    (tmp_path / "pairs.yaml").write_text("pairs:\n" + "\n".join(entries) + "\n")
    return commits


def test_a_gated_pair_is_recorded_and_the_status_is_2(run, three_pairs, tmp_path):
    done = run("diff", "--pairs", "pairs.yaml", "-o", "out", "--no-figures", "--format", "json")
    assert done.returncode == 2
    rows = json.loads(done.stdout)["rows"]
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    assert "gated" in rows[1]["message"]
    assert TOKEN not in done.stdout + done.stderr
    assert rows[0]["base_resolved"] == f"hf://org/base@{three_pairs['org/base']}"
    assert rows[0]["measured"]["sparsity"] == pytest.approx(0.9, abs=1e-9)  # 1800 of 2000


def test_finished_pairs_are_not_asked_for_again(hub, run, three_pairs):
    run("diff", "--pairs", "pairs.yaml", "-o", "out", "--no-figures", "--only", "p[02]", "--evict")
    hub.requests.clear()
    done = run("diff", "--pairs", "pairs.yaml", "-o", "out", "--no-figures", "--only", "p[02]", "--evict")
    assert done.returncode == 0, done.stderr
    assert hub.requests == []


def test_eviction_removes_what_the_run_downloaded_and_a_shared_base_comes_once(
    hub, run, three_pairs, tmp_path
):
    done = run("diff", "--pairs", "pairs.yaml", "-o", "out", "--no-figures", "--evict", "--format", "quiet")
    assert done.returncode == 2  # the gated pair
    assert cached(tmp_path) == set()
    downloads = hub.asked(r"^GET /[0-9a-f]{64}/model.safetensors")
    assert len(downloads) == 3
    assert len(set(downloads)) == 3
    assert f"evicted org/tuned0@{three_pairs['org/tuned0']}" in done.stderr


def test_eviction_never_removes_what_was_cached_before(hub, run, three_pairs, tmp_path):
    before = f"org/base@{three_pairs['org/base']}"
    assert run("inspect", "org/base").returncode == 0
    fork = hub.repos["org/base"].commits[three_pairs["org/base"]]
    # A fork shares its commits with the original.
    hub.add("org/fork", fork)
    hub.repos["org/fork"].commits = {three_pairs["org/tuned0"]: fork}
    hub.repos["org/fork"].branches = {"main": three_pairs["org/tuned0"]}
    assert run("inspect", "org/fork").returncode == 0
    kept = {before, f"org/fork@{three_pairs['org/tuned0']}"}
    for number in range(8):  # which repository a commit is found in first is up to a set's order
        folder = tmp_path / "hf" / "hub"
        shutil.copytree(folder / "models--org--fork", folder / f"models--org--fork{number}", symlinks=True)
        kept.add(f"org/fork{number}@{three_pairs['org/tuned0']}")
    assert cached(tmp_path) == kept
    old = hub.repos["org/tuned1"].branches["main"]
    assert run("inspect", "org/tuned1").returncode == 0
    upload(hub, "org/tuned1", trained(weights(torch.bfloat16), share=0.7))
    done = run("diff", "--pairs", "pairs.yaml", "-o", "out", "--no-figures", "--evict", "--format", "quiet")
    assert cached(tmp_path) == kept | {f"org/tuned1@{old}"}
    kept_lines = [line for line in done.stderr.splitlines() if line.startswith("kept ")]
    assert all(before in line and line.endswith(": cached before this run") for line in kept_lines)
    assert len(kept_lines) == 1
    reopened = run("inspect", before, "--json")
    assert reopened.returncode == 0, reopened.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pairs", "pairs.yaml"), "--pairs needs -o DIR"),
        (("--pairs", "pairs.yaml", "-o", "out", "--view", "served"), "--view cannot stand beside --pairs"),
        (("--pairs", "pairs.yaml", "-o", "out", "--criterion", "value"), "--criterion cannot stand beside"),
        (("base", "tuned", "--pairs", "pairs.yaml", "-o", "out"), "base cannot stand beside --pairs"),
        (("base", "tuned", "--evict", "--stream"), "--evict and --stream exclude each other"),
        (("base", "tuned", "--only", "x"), "--only needs --pairs"),
        (("base",), "Missing argument 'TUNED'"),
        ((), "Missing argument 'BASE'"),
        (("--pairs", "absent.yaml", "-o", "out"), "No such file"),
        (("--pairs", "published:none", "-o", "out"), "published:mukherjee2025"),
    ],
)
def test_usage_errors_exit_with_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.yaml").write_text("pairs: [{name: a, base: ./a, tuned: ./b}]")
    done = CliRunner().invoke(cli, ["diff", *arguments])
    if isinstance(done.exception, UsageError):
        assert (done.exception.exit_code, message in str(done.exception)) == (2, True)
    else:
        assert (done.exit_code, message in done.output) == (2, True)


def test_a_dry_run_lists_the_pairs_without_a_request(hub, run):
    done = run("diff", "--pairs", "published:mukherjee2025", "--dry-run")
    assert done.returncode == 0
    assert "eurus-7b-kto: hf://openbmb/Eurus-7b-sft → hf://openbmb/Eurus-7b-kto" in done.stdout
    assert "skipped unless named by --only: needs about 280 GB" in done.stdout
    assert hub.requests == []


def test_one_pair_prints_the_papers_number_and_stores_it(run, tmp_path, addition):
    pair = str(addition / "base-fp32"), str(addition / "grpo-fp32-seed0")
    done = run("diff", *pair, "--preset", "mukherjee2025", "-o", "out", "--no-figures")
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "out" / "report.json").read_bytes())["preset"]
    assert stored["preset"] == "mukherjee2025"
    assert (
        f"mukherjee2025: update sparsity {100 * stored['sparsity']:.2f} % of 148,928 entries" in done.stdout
    )


def test_an_absent_tracker_is_told_before_anything_is_read(run, tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError\n")
    done = run("diff", "no-such-base", "no-such-tuned", "--log", "wandb")
    assert done.returncode == 2
    assert "pip install 'sparsity-audit[wandb]'" in done.stderr


def test_a_card_goes_to_stdout_or_to_a_file(run, tmp_path, addition):
    pair = str(addition / "base-bf16"), str(addition / "grpo-bf16-seed0")
    assert run("mask", "export", *pair, "-o", "mask").returncode == 0
    printed = run("mask", "card", "mask")
    assert printed.stdout.startswith("---\ntags:\n- sparsity-audit\n")
    assert run("mask", "card", "mask", "-o", "mask/README.md").returncode == 0
    assert (tmp_path / "mask" / "README.md").read_text(encoding="utf-8") == printed.stdout
