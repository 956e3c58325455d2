"""TRL's SFT trainer under accelerate's FSDP2 with a subnetwork, two ranks on the CPU.

accelerate 1.15 lets only accelerators become `FSDP`: with gloo on the CPU it silently keeps `MULTI_CPU`,
which is DDP (`AcceleratorState.__init__`). Its FSDP2 code has no such limit, so the state is set here after
the trainer has made it; what lies behind it, wrapping, saves and the callback's proofs, is what a GPU runs.

Started by `python -m torch.distributed.run -m sharded_trl FOLDER WRAP`, WRAP one of fsdp2 and ddp.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from small_models import random_mask
from test_hooks import trainer_of
from transformers import AutoModelForCausalLM

import sparsity_audit as sa


def shard(trainer) -> None:
    """Make accelerate wrap the model with `fully_shard`."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
        reshard_after_forward=True,
        cpu_offload=False,
    )
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    trainer.is_fsdp_enabled = True


def main() -> None:
    """Train, compare with the base on every rank, and keep the weights."""
    folder, wrap = Path(sys.argv[1]), sys.argv[2]
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    base = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    mask = random_mask(model, 1)
    trainer = trainer_of("sft", model, folder / wrap, [sa.SubnetworkCallback(mask)])
    if wrap == "fsdp2":
        shard(trainer)
    trainer.train()
    named = list(trainer.model.named_parameters())
    assert {type(weight).__name__ for _, weight in named} == {"DTensor" if wrap == "fsdp2" else "Parameter"}
    whole = {n: (w.full_tensor() if wrap == "fsdp2" else w).detach().contiguous() for n, w in named}
    moved = {name: whole[name].view(torch.int32) != base[name].view(torch.int32) for name in base}
    assert sum(int(moved[name][~mask[name]].sum()) for name in base) == 0
    assert sum(int(moved[name][mask[name]].sum()) for name in base) > 500
    if trainer.accelerator.process_index == 0:
        torch.save(whole, folder / f"{wrap}.pt")
        print(f"passed {wrap}")
    sys.stdout.flush()
    os._exit(0)  # see sharded_training: taking gloo's threads down may abort


if __name__ == "__main__":
    main()
