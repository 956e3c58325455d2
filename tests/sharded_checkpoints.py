"""Two ranks that write one model as trainers do: `python -m sharded_checkpoints FOLDER`.

FOLDER/whole/{base,tuned} are safetensors; FOLDER/dcp, titan, prime, verl and hf hold the same tensors, cut.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

PREFIX = "model.layers.0."
CUTS = {
    f"{PREFIX}self_attn.q_proj.weight": [Shard(0)],
    f"{PREFIX}mlp.up_proj.weight": [Shard(1)],
    f"{PREFIX}mlp.experts": [Shard(1)],
    f"{PREFIX}input_layernorm.weight": [Shard(0)],
    f"{PREFIX}one_row": [Shard(0)],
    "model.norm.weight": [Replicate()],
    "lm_head.weight": None,
}


def model(side: str) -> dict[str, torch.Tensor]:
    """Weights of uneven shapes; the tuned side differs in some entries of each tensor."""
    draw = torch.Generator().manual_seed(7)
    sizes = [(5, 6), (4, 7), (2, 3, 5), (9,), (1, 4), (6,), (3, 8)]
    tensors = {n: torch.randn(s, generator=draw).bfloat16() for n, s in zip(CUTS, sizes, strict=True)}
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    if side == "tuned":
        for tensor in tensors.values():
            tensor.view(-1)[::3] += 0.25
    return tensors


def optimizer(weights: dict[str, torch.Tensor | DTensor]) -> dict[str, object]:
    """AdamW's state with an fp32 copy of each weight, a little off the bf16 grid."""
    state = {
        name: {
            "step": torch.tensor(3.0),
            "exp_avg": torch.zeros_like(w, dtype=torch.float32),
            "master_param": w.float() + 1e-4,
        }
        for name, w in weights.items()
    }
    return {"state": state, "param_groups": {"lr": 1e-6}}


def write(rank: int, root: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    for side in ("base", "tuned"):
        whole = model(side)
        cut = {
            name: w if CUTS[name] is None else distribute_tensor(w.clone(), mesh, CUTS[name])
            for name, w in whole.items()
        }
        states = {
            "dcp": {"model": cut, "optimizer": optimizer(cut), "step": 3},
            "titan": {
                **cut,
                "optimizer": optimizer(cut),
                "lr_scheduler": {"last": 3},
                "train_state": {"n": 1},
            },
            "prime": {"app": {"model": cut, "optimizers": optimizer(cut)}},
        }
        for kind, state in states.items():
            dcp.save(state, checkpoint_id=root / kind / side)
        dcp.save(cut, storage_writer=HuggingFaceStorageWriter(str(root / "hf" / side), save_distributed=True))
        for folder in (root / "verl" / side, root / "whole"):
            folder.mkdir(parents=True, exist_ok=True)
        torch.save(cut, root / "verl" / side / f"model_world_size_2_rank_{rank}.pt")
        torch.save({"state": {}}, root / "verl" / side / f"optim_world_size_2_rank_{rank}.pt")
        if rank == 0:
            (root / "whole" / side).mkdir()
            save_file(whole, root / "whole" / side / "model.safetensors")
            (root / "master" / side).mkdir(parents=True)
            save_file(
                {n: w.float() + 1e-4 for n, w in whole.items()}, root / "master" / side / "model.safetensors"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(write, args=(Path(sys.argv[1]),), nprocs=2)
