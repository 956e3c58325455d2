"""Update sparsity of a model in training, against base weights in memory, without saving.

Contract: the counts are those that `diff` makes of the two checkpoints, by the same kernel, on the model's
device (CPU or CUDA), for named criteria; of a sharded model each rank counts its shards and the sums are
taken over ranks. The base is one copy of the weights (this rank's shards).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sparsity_audit.compare.accumulate import Accumulator, KernelSpec
from sparsity_audit.compare.device_kernel import DeviceKernel
from sparsity_audit.errors import UsageError
from sparsity_audit.training.parameters import local, name_parameters, shard_like
from sparsity_audit.types import Criterion, DType

__all__ = ["BaseCopy", "LiveCounts"]

_DTYPES = {
    torch.bfloat16: DType.BF16,
    torch.float16: DType.F16,
    torch.float32: DType.F32,
    torch.float64: DType.F64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveCounts:
    """Entries of the whole model, and how many changed.

    Args:
        step: The training step.
        compared: Entries compared; a tied tensor once.
        changed: Entries changed, by criterion.
    """

    step: int
    compared: int
    changed: Mapping[str, int]

    def sparsity(self, criterion: str) -> float:
        """1 − changed ÷ compared under a criterion."""
        return (self.compared - self.changed[criterion]) / self.compared


class BaseCopy:
    """A copy of a model's weights to compare later weights with.

    Args:
        model: Its parameters, tied ones once.
        base: Weights to compare with instead of the present ones: name → whole tensor of the same dtype.

    Raises:
        UsageError: `base` lacks a parameter, or has another shape or dtype.
    """

    def __init__(self, model: torch.nn.Module, *, base: Mapping[str, torch.Tensor] | None = None) -> None:
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._sharded = False
        for named in name_parameters(model):
            parameter = named.parameter
            self._sharded |= hasattr(parameter, "to_local")
            if base is None:
                self._pairs.append((parameter, local(parameter).clone()))
                continue
            given = next((base[name] for name in named.names if name in base), None)
            found = "not there" if given is None else f"{given.dtype} of shape {list(given.shape)}"
            if given is None or given.shape != parameter.shape or given.dtype is not parameter.dtype:
                raise UsageError(
                    f"base tensor {named.name!r}",
                    found,
                    expected=f"{parameter.dtype} of shape {list(parameter.shape)}, as in the model",
                )
            self._pairs.append((parameter, shard_like(given.to(parameter.device), parameter).clone()))

    def count(self, criteria: Sequence[Criterion], *, step: int) -> LiveCounts:
        """Compare now. Where the model is sharded, every rank must call this."""
        wanted = tuple(dict.fromkeys([Criterion.parse("bitwise"), Criterion.parse("value"), *criteria]))
        totals = torch.zeros(1 + len(wanted), dtype=torch.int64)
        for parameter, base in self._pairs:
            now = local(parameter).contiguous()
            if now.numel() == 0:
                continue
            spec = KernelSpec(dtype=_DTYPES[now.dtype], criteria=wanted, mask=1, level="counts")
            matrix = (-1, now.shape[-1] if now.dim() else 1)
            acc = Accumulator(spec, rows=now.reshape(matrix).shape[0], cols=matrix[1])
            kernel = DeviceKernel(str(now.device))
            sides = base.contiguous().view(matrix), now.view(matrix)
            kernel.compare_tensors(*sides, acc, first_row=0, first_col=0, want_bits=False)
            kernel.finish(acc)
            totals += torch.tensor([acc.entries, *acc.changed.tolist()])
        if self._sharded:
            device = self._pairs[0][1].device
            totals = totals.to(device)
            torch.distributed.all_reduce(totals)
        compared, *changed = totals.tolist()
        counts = {c.key: n for c, n in zip(wanted, changed, strict=True) if c in criteria}
        return LiveCounts(step=step, compared=compared, changed=counts)
