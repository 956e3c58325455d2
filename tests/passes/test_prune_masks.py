"""Random selections have exact counts and no favourites; a mask of another base is refused."""

from __future__ import annotations

import numpy as np
import pytest
from support import plan_of

from sparsity_audit import diff, mask_export
from sparsity_audit.errors import MaskError
from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor
from sparsity_audit.masks.sampling import RandomSource
from sparsity_audit.passes import prune_masks
from sparsity_audit.passes.mask_sink import mask_tensors
from sparsity_audit.passes.prune_masks import QuotaGrouping, open_base_mask
from sparsity_audit.types import Criterion


def _drawn(plan, quotas, *, seed) -> dict[str, np.ndarray]:
    tensors = {name: MaskTensor.whole(name, spec.shape) for name, spec in plan.base.tensors.items()}
    source = RandomSource(
        tensors, MaskMetadata(criterion="value", view="native"), QuotaGrouping(plan.pairs, quotas), seed=seed
    )
    found = {}
    for name in tensors:
        parts = [
            np.unpackbits(bits, axis=-1, count=block.num_cols, bitorder="little").reshape(-1)
            for block, bits in source.blocks(name)
        ]
        found[name] = np.concatenate([*parts, np.zeros(0, dtype=np.uint8)])
    return found


@pytest.fixture
def fused(write_checkpoint):
    """A base with fused rows, whose parts are pairs of their own; and a resized vocabulary."""
    rng = np.random.default_rng(1)
    block = "model.layers.0.self_attn."
    base = {f"{block}qkv_proj.weight": rng.normal(size=(16, 12)).astype(np.float32)}
    base["model.embed_tokens.weight"] = rng.normal(size=(10, 12)).astype(np.float32)
    tuned = {f"{block}{part}.weight": np.zeros((rows, 12), dtype=np.float32)
             for part, rows in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4))}  # fmt: skip
    tuned["model.embed_tokens.weight"] = np.zeros((7, 12), dtype=np.float32)
    return plan_of(write_checkpoint("base", base), write_checkpoint("tuned", tuned))


@pytest.mark.parametrize("seed", range(4))
def test_each_part_gets_exactly_its_quota_and_nothing_lies_outside(fused, seed) -> None:
    names = [pair.name.rpartition(":")[2] for pair in fused.pairs]
    assert names == ["model.embed_tokens.weight", "k_proj", "q_proj", "v_proj"]
    found = _drawn(fused, [30, 48, 0, 7], seed=seed)
    qkv = found["model.layers.0.self_attn.qkv_proj.weight"]
    assert [int(part.sum()) for part in np.split(qkv, [96, 144])] == [0, 48, 7]
    embed = found["model.embed_tokens.weight"]
    assert (embed[:84].sum(), embed[84:].sum()) == (30, 0)


def test_every_entry_of_a_part_is_drawn_as_often(fused) -> None:
    total = np.zeros(120, dtype=np.int64)
    for seed in range(800):
        total += _drawn(fused, [30, 0, 24, 0], seed=seed)["model.embed_tokens.weight"]
    # 84 entries, each drawn with p = 30/84: sd 13.5 of a count of 286. Largest of 84: p(> 4.9 sd) = 4e-5.
    assert abs(total[:84] - 800 * 30 / 84).max() < 4.9 * np.sqrt(800 * 30 / 84 * 54 / 84)


def test_quotas_over_the_checkpoint_are_drawn_and_within_tensors_are_shares(fused) -> None:
    over = prune_masks._quotas(fused.pairs, Criterion.parse("top:25%"), 3)
    assert sum(over) == round(0.25 * (84 + 192))
    assert over != prune_masks._quotas(fused.pairs, Criterion.parse("top:25%"), 4)
    assert prune_masks._quotas(fused.pairs, Criterion.parse("top:25%:tensor"), 3) == [21, 12, 24, 12]
    assert prune_masks._quotas(fused.pairs, Criterion.parse("top:50:tensor"), 3) == [50, 48, 50, 48]


def _opened(path, plan, *, alignment, force=False, known=None):
    mine = {tensor.name: tensor for tensor in mask_tensors(plan.base, alignment)}
    return open_base_mask(path, plan.base, mine, known or {}, force=force)


def test_a_mask_is_known_by_the_fingerprints_of_its_base(addition, tmp_path, write_checkpoint) -> None:
    from sparsity_audit.align.match import match

    mask_export(addition / "base-bf16", addition / "ppo-bf16", tmp_path / "mask")
    plan = plan_of(addition / "base-bf16", addition / "dpo-bf16")
    alignment = match(plan.base, plan.tuned)
    assert len(_opened(tmp_path / "mask", plan, alignment=alignment).tensors) == 30
    other = plan_of(addition / "sft-bf16", addition / "dpo-bf16")
    with pytest.raises(MaskError, match="made from a base with the fingerprint"):
        _opened(tmp_path / "mask", other, alignment=match(other.base, other.tuned))
    assert _opened(tmp_path / "mask", other, alignment=match(other.base, other.tuned), force=True)


def test_a_mask_of_other_tensors_or_shapes_is_refused_even_by_force(tmp_path, write_checkpoint) -> None:
    from sparsity_audit.align.match import match

    def checkpoint(name, **shapes):
        arrays = {key: np.full(shape, len(name), dtype=np.float32) for key, shape in shapes.items()}
        return write_checkpoint(name, arrays)

    diff(checkpoint("a", w=(2, 3)), checkpoint("bb", w=(2, 3)), stats="counts", mask=tmp_path / "mask")
    for number, (shapes, found) in enumerate(
        [
            ({"w": (3, 2)}, "shape"),
            ({"z": (2, 3)}, "not in the base"),
            ({"w": (2, 3), "z": (1,)}, "not in the mask"),
        ]
    ):
        plan = plan_of(checkpoint(f"x{number}", **shapes), checkpoint(f"yy{number}", **shapes))
        with pytest.raises(MaskError, match=found):
            _opened(tmp_path / "mask", plan, alignment=match(plan.base, plan.tuned), force=True)
