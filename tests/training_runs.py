"""A small masked training run with saves, which a test interrupts.

`python -m training_runs KIND FOLDER KILL_AT`
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from small_models import loss_of, random_mask, token_model

from sparsity_audit import SubnetworkAdamW, freeze_outside, seams

KINDS = {"frozen": torch.float32, "compact": torch.float32, "stochastic": torch.bfloat16}


def train(kind: str, folder: Path) -> None:
    """12 steps with a save after every third, from the last save if there is one; then `end.pt`."""
    model = token_model(0, dtype=KINDS[kind])
    mask = random_mask(model, 1)
    save = folder / "save.pt"
    resumed = torch.load(save, weights_only=True) if save.exists() else None
    if resumed is not None:
        model.load_state_dict(resumed["model"])
    frozen = None
    if kind == "frozen":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
        frozen = freeze_outside(model, optimizer, mask, resumed_from=resumed and resumed["frozen"])
    else:
        rounding = "stochastic" if kind == "stochastic" else "nearest"
        optimizer = SubnetworkAdamW(model, mask, lr=0.05, weight_decay=0.3, rounding=rounding)
    if resumed is not None:
        optimizer.load_state_dict(resumed["optimizer"])
    for step in range(resumed["step"] if resumed else 0, 12):
        optimizer.zero_grad()
        loss_of(model, step, scale=20.0).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 3 == 2:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            state["frozen"] = frozen.state_dict() if frozen else None
            torch.save(state, folder / "save.partial")
            (folder / "save.partial").replace(save)
    torch.save(model.state_dict(), folder / "end.pt")


def main() -> None:
    """Train, and die at the given named point of a step."""
    kind, folder, left = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

    def observer(point: str) -> None:
        nonlocal left
        left -= point in ("parameters stepped", "parameter scattered")
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    seams.observer = observer
    train(kind, folder)


if __name__ == "__main__":
    main()
