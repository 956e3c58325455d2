"""Two ranks of masked training under FSDP2, started by `python -m torch.distributed.run`.

Each check is an assertion on every rank, against the same training on the unsharded model.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from small_models import TokenModel, bits_of, loss_of, random_mask, token_model
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from sparsity_audit import SubnetworkAdamW, freeze_outside
from sparsity_audit.errors import FrozenEntryChangedError


def sharded(seed: int) -> TokenModel:
    """A model whose shards are uneven: 11, 9 and 7 rows on two ranks, and a bias of one entry on rank 0."""
    model = token_model(seed, width=7, hidden=9)
    model.down.bias = torch.nn.Parameter(model.down.bias[:1].detach().clone())
    for layer in (model.up, model.down):
        fully_shard(layer)
    fully_shard(model)
    return model


def plain(seed: int) -> TokenModel:
    """The same, whole."""
    model = token_model(seed, width=7, hidden=9)
    model.down.bias = torch.nn.Parameter(model.down.bias[:1].detach().clone())
    return model


def masks() -> dict[str, torch.Tensor]:
    """Bits for every parameter; the one-entry bias is trained."""
    mask = random_mask(plain(0), 1)
    mask["down.bias"][0] = True
    return mask


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.4, foreach=False)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, *, clip: float) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, scale=20.0).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Codes of every parameter, gathered from the ranks."""
    return {
        name: bits_of(p.full_tensor() if hasattr(p, "full_tensor") else p)
        for name, p in model.named_parameters()
    }


def assert_frozen(model: torch.nn.Module, mask: dict[str, torch.Tensor]) -> None:
    before, after = whole(plain(0)), whole(model)
    for name, bits in mask.items():
        assert torch.equal(before[name][~bits], after[name][~bits]), name
    moved = sum(int((before[name] != after[name]).sum()) for name in mask)
    assert moved > sum(int(bits.sum()) for bits in mask.values()) // 2, moved


def check_freeze(_: Path) -> None:
    """Every rank has the same batch, so the sharded run is the unsharded one but for the clip's sum."""
    mask = masks()
    model, twin = sharded(0), plain(0)
    optimizer, other = adamw(model), adamw(twin)
    frozen = freeze_outside(model, optimizer, mask)
    freeze_outside(twin, other, mask)
    # A clip that never acts: its norm is a sum over ranks, in another order than over one tensor.
    train(model, optimizer, range(4), clip=1e9)
    train(twin, other, range(4), clip=1e9)
    assert_frozen(model, mask)
    ours, theirs = whole(model), whole(twin)
    for name in mask:
        assert torch.equal(ours[name], theirs[name]), name
    train(model, optimizer, range(4, 6), clip=0.5)
    assert_frozen(model, mask)
    proof = frozen.verify_frozen()
    counts = torch.tensor([proof.num_frozen, proof.num_trainable])
    dist.all_reduce(counts)
    assert counts.tolist() == [
        sum(int((~bits).sum()) for bits in mask.values()),
        # The bias of one trained entry is not watched: nothing of it is frozen.
        sum(int(bits.sum()) for bits in mask.values()) - 1,
    ]
    row = int((~mask["embed.weight"][:6]).any(1).nonzero()[0])
    if dist.get_rank() == 0:
        with torch.no_grad():
            model.embed.weight.to_local()[row] += 1
        with pytest.raises(FrozenEntryChangedError, match=r"'embed.weight', entry \["):
            frozen.verify_frozen()


def check_resume(folder: Path) -> None:
    """Saved with torch.distributed.checkpoint and resumed, the run ends where an uninterrupted one ends."""
    mask = masks()
    uninterrupted = sharded(0)
    optimizer = adamw(uninterrupted)
    freeze_outside(uninterrupted, optimizer, mask)
    train(uninterrupted, optimizer, range(6), clip=0.5)

    model = sharded(0)
    optimizer = adamw(model)
    frozen = freeze_outside(model, optimizer, mask)
    train(model, optimizer, range(3), clip=0.5)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(folder))
    fingerprints = frozen.state_dict()

    model = sharded(5)
    optimizer = adamw(model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=str(folder))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    frozen = freeze_outside(model, optimizer, mask, resumed_from=fingerprints)
    train(model, optimizer, range(3, 6), clip=0.5)
    frozen.verify_frozen()
    assert_frozen(model, mask)
    expected, found = whole(uninterrupted), whole(model)
    for name in mask:
        assert torch.equal(expected[name], found[name]), name


def check_subnetwork(_: Path) -> None:
    """`SubnetworkAdamW` on shards takes the steps it takes on whole parameters."""
    mask = masks()
    model, twin = sharded(0), plain(0)
    ours = SubnetworkAdamW(model, mask, lr=0.05, weight_decay=0.4)
    theirs = SubnetworkAdamW(twin, mask, lr=0.05, weight_decay=0.4)
    train(model, ours, range(4), clip=1e9)
    train(twin, theirs, range(4), clip=1e9)
    assert_frozen(model, mask)
    expected, found = whole(twin), whole(model)
    for name in mask:
        assert torch.equal(expected[name], found[name]), name
    total = torch.tensor(ours.state_bytes())
    dist.all_reduce(total)
    assert int(total) <= 12 * sum(int(bits.sum()) for bits in mask.values())


CHECKS = (check_freeze, check_resume, check_subnetwork)


def main() -> None:
    """Run the checks on this rank; rank 0 prints the name of each that passed on all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for check in CHECKS:
        check(Path(sys.argv[1]))
        dist.barrier()
        if dist.get_rank() == 0:
            print("passed", check.__name__)
    # Every check has passed on every rank. Taking gloo's threads down aborts now and then on a busy machine
    # ("terminate called without an active exception"), which would say nothing of what is tested.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
