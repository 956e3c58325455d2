"""What trainers write is read as the whole model is: same catalogue, same bytes, same report."""

import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from sparsity_audit import diff
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsafePickleError,
    UnsupportedFormatError,
)
from sparsity_audit.types import View

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

FORMS = ("dcp", "titan", "prime", "verl", "hf")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sharded")
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-m", "sharded_checkpoints", str(root)],
        check=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    return root


def codes(catalogue: Catalogue, name: str, *, step: int = 4) -> bytes:
    """A tensor's bytes, read a few entries at a time."""
    spec = catalogue.tensors[name]
    out = bytearray(spec.num_bytes)
    source = catalogue.files[spec.file].open()
    for first in range(0, spec.num_entries, step):
        stop = min(first + step, spec.num_entries)
        target = memoryview(out)[first * spec.dtype.itemsize : stop * spec.dtype.itemsize]
        read_entries(source, spec, first, target)
    source.close()
    return bytes(out)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_tensors_of_the_whole_model(written, form):
    catalogue = open_checkpoint(written / form / "tuned")
    whole = load_file(written / "whole" / "tuned" / "model.safetensors")
    assert set(catalogue.tensors) == set(whole)
    for name, tensor in whole.items():
        assert catalogue.tensors[name].shape == tuple(tensor.shape), name
        for step in (1, 4, 1000):
            assert codes(catalogue, name, step=step) == raw(tensor), (name, step)
    assert all(entry.content is None for entry in catalogue.files[:-1])


@pytest.mark.parametrize("form", FORMS)
def test_the_report_of_a_sharded_pair_is_that_of_the_whole_pair(written, form):
    def facts(kind: str) -> dict:
        report = asdict(diff(written / kind / "base", written / kind / "tuned", structure="on"))
        return {key: value for key, value in report.items() if key not in ("base", "tuned")}

    assert facts(form) == facts("whole")


@pytest.mark.parametrize("form", ["dcp", "titan", "prime"])
def test_the_fp32_copy_in_an_optimizer_is_read_when_it_is_asked_for(written, form):
    catalogue = open_checkpoint(f"{written / form / 'tuned'}#master")
    whole = load_file(written / "master" / "tuned" / "model.safetensors")
    assert set(catalogue.tensors) == set(whole)
    for name, tensor in whole.items():
        assert codes(catalogue, name) == raw(tensor), name
    assert catalogue.reference.endswith("#master")


def test_a_master_copy_is_compared_with_the_weights_of_the_same_folder(written):
    folder = written / "dcp" / "tuned"
    report = diff(folder, f"{folder}#master")
    native, served = (report.headline("value", view) for view in View)
    assert native is not None
    assert served is not None
    assert native.changed == native.compared
    assert 0 <= served.changed < native.changed


def test_weights_that_are_fp32_already_are_the_master_copy(tmp_path):
    dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=tmp_path / "c")
    catalogue = open_checkpoint(f"{tmp_path / 'c'}#master")
    assert any("they are the master copy" in note for note in catalogue.notes)


def test_a_folder_without_fp32_copies_says_what_it_holds_instead(tmp_path):
    state = {"model": {"w": torch.ones(3).bfloat16()}, "optim": {"state": {"w": {"exp_avg": torch.ones(3)}}}}
    dcp.save(state, checkpoint_id=tmp_path / "c")
    with pytest.raises(UnsupportedFormatError, match="exp_avg"):
        open_checkpoint(f"{tmp_path / 'c'}#master")
    with pytest.raises(CheckpointNotFoundError, match="no directory"):
        open_checkpoint("nowhere#master")


@pytest.mark.parametrize("form", ["dcp", "verl"])
def test_missing_ranks_are_named(written, tmp_path, form):
    folder = shutil.copytree(written / form / "tuned", tmp_path / "c")
    gone = next(folder.glob("__1_*.distcp" if form == "dcp" else "model*rank_1.pt"))
    gone.unlink()
    with pytest.raises(CheckpointNotFoundError, match=gone.name):
        open_checkpoint(folder)


def test_a_missing_rank_of_sharded_safetensors_is_named(written, tmp_path):
    folder = shutil.copytree(written / "hf" / "tuned", tmp_path / "c")
    next(folder.glob("shard-00001-*")).unlink()
    with pytest.raises(CheckpointNotFoundError, match="shard-00001"):
        open_checkpoint(folder)


def test_a_truncated_distcp_file_is_refused(written, tmp_path):
    folder = shutil.copytree(written / "dcp" / "tuned", tmp_path / "c")
    file = next(folder.glob("__1_*.distcp"))
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(CorruptCheckpointError, match="truncated"):
        open_checkpoint(folder)


def test_a_chunk_that_is_not_what_the_metadata_say_is_refused_when_it_is_read(written, tmp_path):
    folder = shutil.copytree(written / "dcp" / "tuned", tmp_path / "c")
    file = next(folder.glob("__0_*.distcp"))
    file.write_bytes(bytes(len(file.read_bytes())))
    catalogue = open_checkpoint(folder)
    with pytest.raises(CorruptCheckpointError, match="piece of"):
        codes(catalogue, "model.layers.0.self_attn.q_proj.weight")


def test_ranks_of_two_saves_are_refused(written, tmp_path):
    folder = shutil.copytree(written / "verl" / "tuned", tmp_path / "c")
    torch.save({"w": torch.ones(2)}, folder / "model_world_size_2_rank_1.pt")
    with pytest.raises(CorruptCheckpointError, match="other tensors"):
        open_checkpoint(folder)
    shutil.copy(folder / "model_world_size_2_rank_1.pt", folder / "model_world_size_4_rank_1.pt")
    with pytest.raises(CorruptCheckpointError, match="world sizes 2, 4"):
        open_checkpoint(folder)


def test_one_file_of_several_ranks_is_refused_with_the_way_to_read_it(written):
    with pytest.raises(UnsupportedFormatError, match="directory that holds the pieces"):
        open_checkpoint(written / "verl" / "tuned" / "model_world_size_2_rank_0.pt")


def test_tied_tensors_of_one_rank_are_one_tensor(tmp_path):
    table = torch.ones(4, 2)
    torch.save({"embed": table, "head": table, "x": table[:2]}, tmp_path / "model_world_size_1_rank_0.pt")
    catalogue = open_checkpoint(tmp_path)
    assert set(catalogue.tensors) == {"embed", "x"}
    assert catalogue.aliases == {"head": "embed"}


def test_a_folder_inside_is_found_where_trainers_put_it(written, tmp_path):
    shutil.copytree(written / "dcp" / "tuned", tmp_path / "checkpoint-100" / "pytorch_model_fsdp_0")
    catalogue = open_checkpoint(tmp_path / "checkpoint-100")
    assert len(catalogue.tensors) == 7
    assert any("read its folder pytorch_model_fsdp_0" in note for note in catalogue.notes)


def test_a_file_that_changes_after_opening_is_noticed(written, tmp_path):
    folder = shutil.copytree(written / "dcp" / "tuned", tmp_path / "c")
    catalogue = open_checkpoint(folder)
    os.utime(next(folder.glob("*.distcp")), (1, 1))
    with pytest.raises(Exception, match="changed during the run"):
        catalogue.verify_unchanged()


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/never",))


def test_metadata_that_ask_for_code_are_refused(tmp_path):
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "c")
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Evil()}))
    with pytest.raises(UnsafePickleError, match="system"):
        open_checkpoint(tmp_path / "c")


def metadata_of(folder: Path):
    return pickle.loads((folder / ".metadata").read_bytes())


def change(folder: Path, edit) -> None:
    data = metadata_of(folder)
    edit(data)
    (folder / ".metadata").write_bytes(pickle.dumps(data))


def chunks(data, name="model.model.layers.0.self_attn.q_proj.weight"):
    return data.state_dict_metadata[name].chunks


def test_hostile_metadata_are_refused(written, tmp_path):
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    def overlapping(data):
        chunks(data)[1] = ChunkStorageMetadata(offsets=torch.Size([3, 0]), sizes=torch.Size([3, 6]))

    def missing(data):
        chunks(data).pop()

    def absurd(data):
        data.state_dict_metadata["model.lm_head.weight"].size = torch.Size([2**40, 2**40])

    def outside(data):
        for place in data.storage_data.values():
            place.relative_path = "../../etc/passwd"

    def nowhere(data):
        data.storage_data.clear()

    def transformed(data):
        for place in data.storage_data.values():
            place.transform_descriptors = ["zstd"]

    cases = {
        overlapping: "leaves the tensor|overlap",
        missing: "hold 18 of its 30 entries",
        absurd: "hold 24 of its|absurd",
        outside: "a file of the checkpoint",
        nowhere: "does not say where",
        transformed: "transformed when it was saved",
    }
    for number, (edit, message) in enumerate(cases.items()):
        folder = shutil.copytree(written / "dcp" / "tuned", tmp_path / str(number))
        change(folder, edit)
        with pytest.raises((CorruptCheckpointError, UnsupportedFormatError), match=message):
            open_checkpoint(folder)


def test_any_damaged_byte_of_the_metadata_gives_an_error_or_the_same_shapes(written, tmp_path):
    folder = shutil.copytree(written / "dcp" / "tuned", tmp_path / "c")
    data = (folder / ".metadata").read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(150):
        spoiled = bytearray(data)
        spoiled[draw.integers(len(data))] = draw.integers(256)
        (folder / ".metadata").write_bytes(spoiled[: draw.integers(len(data) // 2, len(data) + 1)])
        try:
            catalogue = open_checkpoint(folder)
        except (ValueError, FileNotFoundError):
            continue
        assert catalogue.num_bytes < 1 << 20
