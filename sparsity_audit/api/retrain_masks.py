"""The masks of a retraining: the subnetwork's, and those of its controls, below one directory.

Contract: every mask lies packed in `masks/LABEL`, complete or absent, and is of the base: names, shapes and
fingerprints are compared before anything is trained. A mask that selects nothing or everything is refused.
What lies there already is kept where it is the same question's, and never replaced.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from sparsity_audit.align.match import match
from sparsity_audit.align.roles import LayerModuleKeys
from sparsity_audit.api.masks import MaskInfo, mask_info, mask_ops, mask_random
from sparsity_audit.api.retrain_controls import Control
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.errors import MaskError, OutputError, UsageError
from sparsity_audit.masks.encodings import write_mask
from sparsity_audit.masks.reader import MaskReader, open_mask
from sparsity_audit.masks.shards import INDEX_NAME
from sparsity_audit.masks.sources import MaskSource, open_source
from sparsity_audit.masks.whole import WholeTensorsSource
from sparsity_audit.passes.mask_sink import mask_tensors
from sparsity_audit.passes.prune_masks import open_base_mask
from sparsity_audit.training.update_masks import mask_folder

__all__ = ["SUBNETWORK", "RetrainMasks"]

SUBNETWORK = "subnetwork"
"""Label of the mask that is judged."""


class RetrainMasks:
    """Makes and keeps the masks of one retraining.

    Args:
        folder: Where they lie.
        base: What training starts from.
        seed: Of random draws.
        force: Take masks whose base cannot be shown to be this one.
    """

    def __init__(self, folder: Path, base: Catalogue, *, seed: int, force: bool) -> None:
        self._folder, self._base, self._seed, self._force = folder, base, seed, force

    @staticmethod
    def verify(path: str | Path, base: Catalogue, *, force: bool) -> None:
        """Refuse what is no mask of the base, before anything is written.

        Raises:
            MaskError: No mask, of another model, without a polarity, or it selects nothing or everything.
        """
        folder = mask_folder(path)
        info = mask_info(folder)
        _verify_extent(str(path), info)
        if info.encoding == "packed":
            compared = {tensor.name: tensor for tensor in mask_tensors(base, match(base, base))}
            open_base_mask(folder, base, compared, {}, force=force)

    def subnetwork(self, mask: str | Path) -> Path:
        """A packed copy of the mask that is judged."""
        return self._copied(SUBNETWORK, mask)

    def of_control(self, control: Control) -> Path:
        """The mask of a control.

        Raises:
            MaskError: `other` is no mask of the base.
            UsageError: There is no such layer.
            OutputError: It cannot be written.
        """
        like, target = self._folder / SUBNETWORK, self._folder / control.label
        if control.kind == "other":
            assert control.mask is not None
            return self._copied(control.label, control.mask)
        if (target / INDEX_NAME).is_file():
            return target
        shutil.rmtree(target, ignore_errors=True)
        if control.kind == "random":
            mask_random(like, target, seed=self._seed)
        elif control.kind == "magnitude":
            mask_random(like, target, seed=self._seed, base=self._base.reference, force=self._force)
        elif control.kind == "complement":
            mask_ops("not", [like], target)
        else:
            self._write_layer(control, like, target)
        _verify_extent(str(target), mask_info(target))
        return target

    def _copied(self, label: str, mask: str | Path) -> Path:
        target = self._folder / label
        if (target / INDEX_NAME).is_file():
            with closing(open_source(target)) as kept, closing(open_source(mask)) as given:
                if not _same_bits(kept, given):
                    raise OutputError(
                        str(target),
                        f"is another mask than {mask}",
                        expected="one retraining a directory",
                        remedy="choose another -o",
                    )
            return target
        shutil.rmtree(target, ignore_errors=True)
        with closing(open_source(mask)) as source:
            write_mask(source, target, "packed")
        compared = {tensor.name: tensor for tensor in mask_tensors(self._base, match(self._base, self._base))}
        open_base_mask(target, self._base, compared, {}, force=self._force)
        return target

    def _write_layer(self, control: Control, like: Path, target: Path) -> None:
        with closing(MaskReader(open_mask(like))) as reader:
            chosen = layer_tensors(control, reader.tensors, self._base)
            metadata = replace(
                reader.metadata, criterion=f"layer:{control.layer}", tuned=None, origin={"operation": "layer"}
            )
            write_mask(WholeTensorsSource(reader.tensors, metadata, chosen), target, "packed")


def layer_tensors(control: Control, names: Mapping[str, object], base: Catalogue) -> frozenset[str]:
    """Tensors of a control's layer. Raises UsageError, naming the layers, where there is no such one."""
    keys = LayerModuleKeys(names, base.config)
    by_name = {name: keys.layer(name) for name in names}
    chosen = frozenset(name for name, layer in by_name.items() if layer == control.layer)
    if not chosen:
        layers = sorted({layer for layer in by_name.values() if layer is not None}, key=_natural)
        raise UsageError(
            f"--controls layer:{control.layer}",
            "the base has no such layer",
            expected=", ".join(layers) or "a model with layers",
        )
    return chosen


def _natural(text: str) -> tuple[str, int]:
    stack, _, number = text.rpartition(".")
    return stack, int(number)


def _verify_extent(subject: str, info: MaskInfo) -> None:
    if info.selected == 0 or info.selected == info.compared:
        what = "none" if info.selected == 0 else "all"
        result = "nothing would be trained" if info.selected == 0 else "nothing would be frozen"
        raise MaskError(
            subject,
            f"selects {what} of {info.compared:,} entries, so {result}",
            expected="a subnetwork; 1 = may be updated",
            remedy="is it inverted? `sparsity-audit mask info` counts; `mask ops not` turns a mask round",
        )


def _same_bits(kept: MaskSource, given: MaskSource) -> bool:
    if kept.tensors.keys() != given.tensors.keys():
        return False
    for name, tensor in kept.tensors.items():
        if tensor.shape != given.tensors[name].shape:
            return False
        for (_, mine), (_, other) in zip(kept.blocks(name), given.blocks(name), strict=True):
            if not np.array_equal(mine, other):
                return False
    return True
