"""Master weights of DeepSpeed ZeRO: written as its engine lays them out, read as zero_to_fp32.py does."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError

GROUPS = [{"a.weight": (5, 7), "b.weight": (3,)}, {"norm.weight": (11,), "bias": ()}]


def weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {n: torch.randn(shape, generator=draw) for group in GROUPS for n, shape in group.items()}


def padded(flat: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.cat([flat, torch.zeros(-len(flat) % multiple)])


def stage2(tensors: dict[str, torch.Tensor], ranks: int) -> list[dict]:
    """Groups flattened, padded to 2 × ranks, cut into equal parts."""
    states = [[] for _ in range(ranks)]
    for group in GROUPS:
        flat = padded(torch.cat([tensors[name].reshape(-1) for name in group]), 2 * ranks)
        for rank, part in enumerate(flat.chunk(ranks)):
            states[rank].append(part.clone())
    about = {"zero_stage": 2, "partition_count": [ranks] * 2}
    return [about | {"single_partition_of_fp32_groups": parts} for parts in states]


def stage3(tensors: dict[str, torch.Tensor], ranks: int) -> list[dict]:
    """Each parameter padded and cut into equal parts; sub-groups of two parameters each."""
    states = []
    for rank in range(ranks):
        parts = [padded(t.reshape(-1), ranks).chunk(ranks)[rank] for t in tensors.values()]
        flat = [torch.cat(parts[:2]), torch.cat(parts[2:])]
        states.append({"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": flat})
    return states


def save(folder: Path, states: list[dict], *, prefix: str = "zero_pp_rank", **model) -> Path:
    folder.mkdir(parents=True)
    for rank, state in enumerate(states):
        whole = {"optimizer_state_dict": state, "ds_version": "0.17.0"}
        torch.save(whole, folder / f"{prefix}_{rank}_mp_rank_00_optim_states.pt")
    shapes = [OrderedDict((n, torch.Size(shape)) for n, shape in group.items()) for group in GROUPS]
    about = {"module": {}, "param_shapes": shapes, "buffer_names": [], "shared_params": [["tied", "bias"]]}
    torch.save(about | model, folder / "mp_rank_00_model_states.pt")
    return folder


def read(catalogue, name: str) -> torch.Tensor:
    spec = catalogue.tensors[name]
    out = bytearray(spec.num_bytes)
    read_entries(catalogue.files[spec.file].open(), spec, 0, memoryview(out))
    return torch.frombuffer(out, dtype=torch.float32).reshape(spec.shape)


@pytest.mark.parametrize("layout", [stage2, stage3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("prefix", ["zero_pp_rank", "bf16_zero_pp_rank"])
def test_every_parameter_is_put_together_from_its_partitions(tmp_path, layout, ranks, prefix):
    tensors = weights()
    folder = save(tmp_path / "global_step7", layout(tensors, ranks), prefix=prefix)
    catalogue = open_checkpoint(f"{folder}#master")
    assert set(catalogue.tensors) == set(tensors)
    assert catalogue.aliases == {"tied": "bias"}
    for name, tensor in tensors.items():
        assert torch.equal(read(catalogue, name), tensor), name


def test_the_folder_that_latest_names_is_found(tmp_path):
    save(tmp_path / "global_step7", stage2(weights(), 2))
    (tmp_path / "latest").write_text("global_step7\n")
    assert len(open_checkpoint(f"{tmp_path}#master").tensors) == 4
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(UnsupportedFormatError):
        open_checkpoint(f"{tmp_path}#master")


@pytest.mark.parametrize("layout", [stage2, stage3])
def test_missing_ranks_are_refused(tmp_path, layout):
    folder = save(tmp_path / "g", layout(weights(), 3))
    (folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointNotFoundError, match="those of 3"):
        open_checkpoint(f"{folder}#master")
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointNotFoundError, match="zero_pp_rank_0"):
        open_checkpoint(f"{folder}#master")


def test_partitions_that_do_not_fit_the_shapes_are_refused(tmp_path):
    states = stage2(weights(), 2)
    states[1]["single_partition_of_fp32_groups"][0] = torch.zeros(3)
    folder = save(tmp_path / "g", states)
    with pytest.raises(CorruptCheckpointError, match="fp32 partitions of"):
        open_checkpoint(f"{folder}#master")
    states = stage3(weights(), 2)
    states[0]["fp32_flat_groups"][0] = torch.zeros(400)
    folder = save(tmp_path / "h", states)
    with pytest.raises(CorruptCheckpointError, match="entries a rank"):
        open_checkpoint(f"{folder}#master")


def test_what_has_no_master_is_refused_by_name(tmp_path):
    folder = save(tmp_path / "g", stage2(weights(), 1), frozen_param_shapes={"x.weight": torch.Size([2])})
    with pytest.raises(UnsupportedFormatError, match=r"x\.weight"):
        open_checkpoint(f"{folder}#master")
    torch.save({"optimizer_state_dict": {"state": {}}}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save({"param_shapes": []}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(UnsupportedFormatError, match="no fp32 partitions"):
        open_checkpoint(f"{folder}#master")
