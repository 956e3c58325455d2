"""Which files of a folder are the checkpoint."""

from __future__ import annotations

import pytest

from sparsity_audit.checkpoint.layout import abridged, choose_layout, missing_shards, unread_weights

INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
TRAINER = [
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state_0.pth",
    "optimizer.bin",
]


@pytest.mark.parametrize(
    ("names", "index", "files"),
    [
        ([INDEX, "model.safetensors", TORCH_INDEX], INDEX, ()),
        (["model.safetensors", "pytorch_model.bin"], None, ("model.safetensors",)),
        (["b.safetensors", "a.safetensors", TORCH_INDEX], None, ("a.safetensors", "b.safetensors")),
        (["model.safetensors", "adapter.safetensors"], None, ("model.safetensors",)),
        ([TORCH_INDEX, "pytorch_model.bin"], TORCH_INDEX, ()),
        (["pytorch_model.bin", "other.bin"], None, ("pytorch_model.bin",)),
        (["policy.pt", *TRAINER], None, ("policy.pt",)),
        (["consolidated.00.pth"], None, ("consolidated.00.pth",)),
    ],
)
def test_the_first_kind_that_is_there_decides(names, index, files):
    layout = choose_layout(names)
    assert (layout.index, layout.files) == (index, files)


@pytest.mark.parametrize("names", [[], TRAINER, ["README.md", "model.gguf"], [".model.safetensors"]])
def test_a_folder_without_weights_has_no_layout(names):
    assert choose_layout(names) is None


def test_missing_numbers_are_named():
    files = ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    assert missing_shards(files) == ("model-00002-of-00003.safetensors",)
    assert missing_shards(["model.safetensors"]) == ()


def test_weights_left_unread_are_listed_without_trainer_state():
    names = ["model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "config.json", *TRAINER]
    assert unread_weights(names, ["model.safetensors"]) == ("consolidated.safetensors", "pytorch_model.bin")


def test_long_lists_are_abridged_with_a_count():
    assert abridged(["a", "b"]) == "a, b"
    assert abridged(list("abcdef")) == "a, b, c, d and 2 more"
