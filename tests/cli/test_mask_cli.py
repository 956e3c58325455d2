"""`sparsity-audit mask`: data on stdout, one call a command, helps with examples."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from sparsity_audit.cli.mask_commands import mask
from sparsity_audit.errors import MaskError, OutputError
from sparsity_audit.masks.bitmask import pack_bits
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor
from sparsity_audit.masks.reader import open_mask


def _make(folder, bits, **about):
    metadata = MaskMetadata(**({"criterion": "value", "view": "native"} | about))
    with MaskWriter(folder, [MaskTensor.whole("layer.weight", bits.shape)], metadata) as writer:
        writer.write_bits("layer.weight", 0, pack_bits(bits))
        writer.finish()
    return str(folder)


@pytest.fixture
def pair(tmp_path):
    left = np.zeros((4, 5), dtype=np.bool_)
    right = left.copy()
    left[:2] = True
    right[1:3] = True
    return [_make(tmp_path / "left", left), _make(tmp_path / "right", right)]


def _run(*arguments):
    result = CliRunner().invoke(mask, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_info_prints_counts_density_criterion_and_tensors(pair):
    text = _run("info", pair[0])
    assert "criterion value, view native" in text
    assert "selected 10 of 20 compared entries (update density 50.000 %; 0 not compared)" in text
    assert "layer.weight" in text
    assert "[4, 5]" in text


def test_info_as_json_is_the_record(pair):
    record = json.loads(_run("info", pair[0], "--json"))
    assert (record["selected"], record["compared"], record["density"]) == (10, 20, 0.5)
    assert record["tensors"][0]["name"] == "layer.weight"


@pytest.mark.parametrize(
    ("arguments", "selected"),
    [(["and"], 5), (["or"], 15), (["xor"], 10), (["minus"], 5), (["k-of-n", "--k", "1"], 15)],
)
def test_ops_write_the_combination_and_report_it(pair, tmp_path, arguments, selected):
    record = json.loads(_run("ops", *arguments, *pair, "-o", tmp_path / "out", "--json"))
    assert record["result"]["selected"] == selected
    assert open_mask(tmp_path / "out").metadata.origin["operation"] == arguments[0]


def test_not_takes_one_mask(pair, tmp_path):
    assert "selected 10 of 20" in _run("ops", "not", pair[0], "-o", tmp_path / "out")


def test_tensors_a_forced_operation_leaves_out_are_told_on_stderr(pair, tmp_path):
    other = _make(tmp_path / "other", np.ones((2, 2), dtype=np.bool_))
    arguments = ["ops", "and", pair[0], other, "-o", str(tmp_path / "out"), "--force", "--json"]
    result = CliRunner().invoke(mask, arguments)
    assert result.exit_code == 0
    assert "left out: layer.weight (shapes [4, 5] and [2, 2])" in result.stderr
    assert json.loads(result.stdout)["left_out"][0]["name"] == "layer.weight"


@pytest.mark.parametrize("encoding", ["packed", "bool", "indices", "pt"])
def test_convert_writes_the_encoding_asked_for(pair, tmp_path, encoding):
    record = json.loads(_run("convert", pair[0], "-o", tmp_path / "out", "--format", encoding, "--json"))
    assert record["result"]["encoding"] == encoding
    assert record["result"]["selected"] == 10


def test_convert_imports_a_foreign_mask_with_inverted_polarity(tmp_path):
    torch.save({"w": torch.tensor([True, False, False])}, tmp_path / "theirs.pt")
    text = _run("convert", tmp_path / "theirs.pt", "-o", tmp_path / "out", "--inverted")
    assert "selected 2 of 3" in text
    assert "criterion unspecified" in text


def test_random_draws_the_same_count_and_says_what_was_matched(pair, tmp_path):
    record = json.loads(_run("random", "--like", pair[0], "--seed", 3, "-o", tmp_path / "out", "--json"))
    assert (record["result"]["selected"], record["seed"], record["matched"]) == (10, 3, "tensor")


def test_errors_reach_the_caller_with_their_message(pair, tmp_path):
    assert isinstance(CliRunner().invoke(mask, ["info", str(tmp_path / "nothing")]).exception, MaskError)
    result = CliRunner().invoke(mask, ["ops", "not", pair[0], "-o", pair[1]])
    assert isinstance(result.exception, OutputError)


@pytest.mark.parametrize(
    "arguments", [["random", "--like", "x", "-o", "y"], ["ops", "nand", "x", "-o", "y"], ["info"]]
)
def test_wrong_usage_exits_with_2(arguments):
    assert CliRunner().invoke(mask, arguments).exit_code == 2


@pytest.mark.parametrize("command", [None, "info", "ops", "convert", "random"])
def test_every_help_ends_with_an_example(command):
    text = _run(*([command] if command else []), "--help")
    assert "Example:\n    sparsity-audit mask " in text or "Example:\n  sparsity-audit mask " in text
