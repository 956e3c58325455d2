"""From a Hub reference to a catalogue, against the loopback Hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import safetensors_bytes, sharded_files
from safetensors.numpy import save

from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.errors import CheckpointNotFoundError

ONE = {
    "config.json": b'{"model_type": "tiny"}',
    "model.safetensors": safetensors_bytes({"w": [1.0, 2.0], "v": [3.0]}),
}
NOISE = {
    "README.md": b"# tiny",
    "flax_model.msgpack": b"x" * 10,
    "tf_model.h5": b"x" * 10,
    "onnx/model.onnx": b"x" * 10,
    "original/consolidated.00.pth": b"x" * 10,
    "pytorch_model.bin": b"x" * 10,
    "training_args.bin": b"x" * 10,
    "tokenizer.json": b"{}",
}


def test_a_single_safetensors_file_is_opened_and_the_branch_is_noted_as_a_commit(hub, open_reference):
    commit = hub.add("org/model", ONE)
    answer = open_reference("org/model")
    assert answer["reference"] == "org/model"
    assert answer["resolved"] == f"hf://org/model@{commit}"
    assert answer["files"] == ["model.safetensors"]
    assert answer["tensors"] == ["v", "w"]
    assert answer["config"] == {"model_type": "tiny"}
    assert answer["notes"] == [f"org/model: main is commit {commit}"]


def test_only_the_files_that_make_the_checkpoint_are_fetched(hub, open_reference):
    hub.add("org/model", {**ONE, **NOISE})
    open_reference("org/model")
    fetched = {line.split("?")[0].rpartition("/")[2] for line in hub.asked(r"^GET .*(/resolve/|Signature)")}
    assert fetched == {"config.json", "model.safetensors"}


def test_weights_that_are_not_read_are_named_whatever_the_cache_holds(hub, open_reference, tmp_path):
    commit = hub.add("org/model", {**ONE, **NOISE})
    (note,) = open_reference(f"org/model@{commit}")["notes"]
    assert note == f"org/model@{commit}: read model.safetensors; ignored pytorch_model.bin"
    (shard,) = (tmp_path / "hf").rglob("snapshots/*/model.safetensors")
    (shard.parent / "stray.safetensors").write_bytes(b"x")
    assert open_reference(f"org/model@{commit}")["notes"] == [note]


def test_shards_are_found_through_their_index(hub, open_reference):
    commit = hub.add("org/model", {**sharded_files(3), "consolidated.safetensors": b"x"})
    answer = open_reference(f"hf://org/model@{commit}")
    assert answer["files"] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert answer["tensors"] == ["layer.0", "layer.1", "layer.2"]
    assert answer["notes"] == [
        f"hf://org/model@{commit}: read model-00001-of-00003.safetensors …; ignored consolidated.safetensors"
    ]
    assert not hub.asked("consolidated")


def test_torch_files_are_fetched_only_where_there_is_no_safetensors(hub, open_reference, tmp_path):
    import torch

    torch.save({"w": torch.arange(4.0)}, tmp_path / "w.bin")
    files = {
        "pytorch_model.bin": (tmp_path / "w.bin").read_bytes(),
        "optimizer.pt": b"x",
        "training_args.bin": b"x",
    }
    hub.add("org/model", files)
    answer = open_reference("org/model")
    assert (answer["files"], answer["tensors"]) == (["pytorch_model.bin"], ["w"])
    assert not hub.asked("optimizer|training_args")


def test_a_branch_is_resolved_to_the_commit_it_stands_at(hub, open_reference):
    hub.add("org/model", ONE)
    commit = hub.add("org/model", {"model.safetensors": safetensors_bytes({"u": [1.0]})}, branch="step-100")
    answer = open_reference("org/model@step-100")
    assert answer["resolved"] == f"hf://org/model@{commit}"
    assert answer["tensors"] == ["u"]
    assert answer["notes"] == [f"org/model@step-100: step-100 is commit {commit}"]


def test_a_pull_request_reference_keeps_its_slashes(hub, open_reference):
    commit = hub.add("org/model", ONE, branch="refs/pr/1")
    assert open_reference("hf://org/model@refs/pr/1")["resolved"] == f"hf://org/model@{commit}"


def test_a_branch_that_moves_in_the_middle_does_not_mix_two_checkpoints(hub, open_reference):
    commit = hub.add("org/model", sharded_files(2))

    def move(request):
        if "/tree/" in request.path:
            hub.add("org/model", {"model.safetensors": safetensors_bytes({"other": [9.0]})})

    hub.on_request = move
    answer = open_reference("org/model")
    assert answer["resolved"] == f"hf://org/model@{commit}"
    assert answer["tensors"] == ["layer.0", "layer.1"]


def test_every_request_after_resolution_names_the_commit(hub, open_reference):
    commit = hub.add("org/model", sharded_files(2))
    open_reference("org/model")
    lines = hub.asked("org/model")
    assert lines[0] == "GET /api/models/org/model"
    assert len(lines) > 4
    assert all(commit in line for line in lines[1:])


def test_a_subfolder_is_a_checkpoint_of_its_own(hub, open_reference):
    files = {**ONE, **{f"checkpoints/step-5/{k}": v for k, v in sharded_files(2).items()}}
    commit = hub.add("org/model", files)
    answer = open_reference("hf://org/model@main/checkpoints/step-5")
    assert answer["resolved"] == f"hf://org/model@{commit}/checkpoints/step-5"
    assert answer["files"][0] == "checkpoints/step-5/model-00001-of-00002.safetensors"
    assert not hub.asked("resolve/[^/]*/model.safetensors")
    assert open_reference(answer["resolved"])["tensors"] == answer["tensors"]


def test_a_second_run_downloads_no_file(hub, open_reference):
    hub.add("org/model", sharded_files(2))
    first = open_reference("org/model")
    hub.requests.clear()
    assert open_reference("org/model").value == first.value
    assert hub.asked("org/model")
    assert not hub.asked("resolve|Signature")


def test_a_local_path_wins_and_says_so_and_the_scheme_reaches_the_hub(hub, open_reference, tmp_path):
    commit = hub.add("org/model", ONE)
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(safetensors_bytes({"local": [1.0]}))
    local = open_reference("org/model")
    assert local["tensors"] == ["local"]
    assert local["resolved"] == str(folder)
    assert local["notes"] == [
        "org/model: the local path of this name was used; write hf://org/model for the Hub"
    ]
    assert not hub.requests
    assert open_reference("hf://org/model")["resolved"] == f"hf://org/model@{commit}"


def test_the_cache_serves_offline_and_says_that_the_hub_was_not_asked(hub, open_reference):
    commit = hub.add("org/model", ONE)
    online = open_reference("org/model")
    hub.requests.clear()
    for reference in ("org/model", f"org/model@{commit}"):
        offline = open_reference(reference, HF_HUB_OFFLINE="1")
        assert offline["resolved"] == online["resolved"]
        assert offline["tensors"] == online["tensors"]
        assert f"{reference}: offline, only the files cached at commit {commit} were seen" in offline["notes"]
    assert not hub.requests


def test_offline_an_unrecorded_branch_is_not_guessed_among_several_commits(hub, open_reference):
    commits = [hub.add("org/model", {**ONE, f"{i}.txt": b""}) for i in range(2)]
    for commit in commits:
        open_reference(f"org/model@{commit}")
    answer = open_reference("org/model", HF_HUB_OFFLINE="1")
    assert answer["error"] == "HubError"
    assert all(commit in answer.message for commit in commits)
    assert "write hf://org/model@<commit>" in answer.message


def test_offline_an_incompletely_cached_checkpoint_is_refused(hub, open_reference, tmp_path):
    hub.add("org/model", sharded_files(2))
    open_reference("org/model")
    (shard,) = (tmp_path / "hf").rglob("snapshots/*/model-00002-of-00002.safetensors")
    shard.unlink()
    answer = open_reference("org/model", HF_HUB_OFFLINE="1")
    assert answer["error"] == "CheckpointNotFoundError"
    assert "model-00002-of-00002.safetensors" in answer.message


def test_progress_bars_stay_out_of_pipes(hub, open_reference):
    hub.add("org/model", sharded_files(2))
    answer = open_reference("org/model")
    assert "%|" not in answer.stderr
    assert "\r" not in answer.stderr


def test_a_renamed_model_is_noted(hub, open_reference):
    hub.add("org/model", ONE)
    hub.repos["org/model"].id = "neworg/model"
    assert "org/model: the Hub calls this model neworg/model" in open_reference("org/model")["notes"]


def test_local_checkpoints_never_import_the_hub_library(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(ONE["model.safetensors"])
    code = (
        "import json, sys\n"
        "from sparsity_audit.checkpoint.opening import open_checkpoint\n"
        "open_checkpoint(sys.argv[1])\n"
        "heavy = ['huggingface_hub', 'torch', 'numpy', 'rich', 'click', 'httpx', 'httpx2', 'requests']\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []


def test_a_path_object_is_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="no such file or directory"):
        open_checkpoint(Path("org/model"))


def test_an_adapter_on_the_hub_is_merged_into_a_base_on_the_hub(hub, open_reference):
    base = {"model.safetensors": save({"q.weight": np.ones((4, 6), np.float32)})}
    factors = {"q.lora_A.weight": np.ones((2, 6), np.float32), "q.lora_B.weight": np.ones((4, 2), np.float32)}
    config = {"peft_type": "LORA", "lora_alpha": 2, "base_model_name_or_path": "org/base"}
    adapter = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save({f"base_model.model.{n}": v for n, v in factors.items()}),
    }
    commits = hub.add("org/base", base), hub.add("org/adapter", adapter)
    answer = open_reference("org/base+org/adapter")
    assert answer["tensors"] == ["q.weight"]
    assert answer["resolved"] == f"hf://org/base@{commits[0]}+hf://org/adapter@{commits[1]}"
    assert answer["files"][:2] == ["model.safetensors", "adapter_model.safetensors"]
