"""The pass over base, full run and retrained runs, against the slow reference and however it is cut."""

from __future__ import annotations

import numpy as np
import pytest
from coded_checkpoint import write
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsity_audit as sa
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.compare.dispatch import load_kernel
from sparsity_audit.compare.reference import ReferenceKernel, decode
from sparsity_audit.errors import ChangedInputError
from sparsity_audit.masks.reader import open_mask
from sparsity_audit.passes import execute, plan
from sparsity_audit.passes import recovery as passes
from sparsity_audit.passes.recovery import FULL_MASK, align_recovery, measure_recovery
from sparsity_audit.stats.recovery import RecoverySums, reference_sums
from sparsity_audit.types import DType, View

SHAPES = {"a": (3, 4, 7), "b": (13,), "c": (), "d": (0, 5), "e": (5, 130)}
SPECIAL = [0x0000, 0x8000, 0x7FC1, 0xFF81, 0x7F80, 0xFF80, 0x0001, 0x3F80, 0x3F81]


def _measure(folders, *, mask=FULL_MASK, own=None, view=View.NATIVE, kernel="numpy", workers=1):
    base, full, *runs = (open_checkpoint(folder) for folder in folders)
    return measure_recovery(
        base,
        full,
        runs,
        align_recovery(base, full, runs, maps=(), view=view),
        mask=mask,
        own_masks=[None] * len(runs) if own is None else own,
        view=view,
        kernel=load_kernel(kernel, num_bytes=0),
        workers=workers,
    )


def _side(rng: np.random.Generator, near: dict | None = None) -> dict:
    """bf16 codes with special values; most entries those of `near`, where it is given."""
    found = {}
    for name, shape in SHAPES.items():
        codes = np.where(rng.random(shape) < 0.3, rng.choice(SPECIAL, shape), rng.integers(0, 2**16, shape))
        if near is not None:
            codes = np.where(rng.random(shape) < 0.6, near[name][1], codes)
        found[name] = ("BF16", np.asarray(codes, dtype=np.uint16))
    return found


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    has_mask=st.booleans(),
    unit_bytes=st.sampled_from([64, 300, 1 << 20]),
    workers=st.integers(1, 3),
)
def test_counts_and_sums_are_those_of_the_reference(
    tmp_path_factory, seed, has_mask, unit_bytes, workers
) -> None:
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("recovery")
    base = _side(rng)
    full = _side(rng, base)
    sides = [base, full, _side(rng, full), _side(rng, base)]
    folders = [write(folder / str(number), side) for number, side in enumerate(sides)]
    flags = {name: rng.random(shape) < 0.4 for name, shape in SHAPES.items()}
    mask = FULL_MASK
    if has_mask:
        bits = {name: ("BOOL", flag.astype(np.uint8)) for name, flag in flags.items()}
        sa.mask_convert(write(folder / "bits", bits), folder / "mask")
        mask = open_mask(folder / "mask")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_UNIT_BYTES", unit_bytes)
        patch.setattr(plan.blocks_of, "__kwdefaults__", {"block_bytes": 1024})
        found = _measure(folders, mask=mask, own=[mask, None], workers=workers)

    def value(code: int) -> float:
        return decode(code, DType.BF16)

    moved, first = 0, None
    for name in SHAPES:
        codes = [side[name][1].reshape(-1).tolist() for side in sides]
        inside = flags[name].reshape(-1).tolist()
        if not has_mask:
            inside = [_differ(value(b), value(f)) for b, f in zip(*codes[:2], strict=True)]
        for number, run in enumerate((codes[0], *codes[2:])):
            slow = reference_sums(zip(codes[0], codes[1], run, inside, strict=True), value)
            fast = found.sums[name][number]
            for field in RecoverySums.__dataclass_fields__:
                got = getattr(fast, field).tolist()
                if field in ("dot", "square_full", "square_run", "square_apart"):
                    scale = slow["square_full"], slow["square_run"]
                    for side in (0, 1):
                        # Few addends, in another order: some units in the last place of the largest.
                        limit = 1e-13 * max(*(s[side] for s in scale), abs(slow[field][side]), 1e-300)
                        assert abs(got[side] - slow[field][side]) <= 8 * limit, (name, number, field)
                else:
                    assert got == slow[field], (name, number, field)
        wrong = [
            i for i, (b, r, x) in enumerate(zip(codes[0], codes[2], inside, strict=True)) if b != r and not x
        ]
        moved += len(wrong)
        if wrong and first is None:
            first = (name, wrong[0])
    frozen = found.frozen[1]
    assert found.frozen[0] is None
    assert found.frozen[2] is None
    assert frozen is not None
    assert frozen.moved == moved
    assert (None if frozen.first is None else (frozen.first.tensor, frozen.first.entry)) == first


def _differ(x: float, y: float) -> bool:
    """Under `value`: both NaN are equal."""
    return not (x == y or (np.isnan(x) and np.isnan(y)))


@pytest.mark.parametrize("view", [View.NATIVE, View.SERVED])
def test_kernels_and_workers_agree_on_real_runs(addition, view) -> None:
    names = ("base-fp32", "grpo-fp32-seed0", "grpo-fp32-seed1", "sft-fp32")
    folders = [addition / name for name in names]
    one = _measure(folders, view=view)
    two = _measure(folders, view=view, kernel="numba", workers=3)
    assert one.frozen == two.frozen
    for name, runs in one.sums.items():
        for a, b in zip(runs, two.sums[name], strict=True):
            for field in RecoverySums.__dataclass_fields__:
                assert np.array_equal(getattr(a, field), getattr(b, field)), (name, field)


def test_the_reference_kernel_counts_the_same(addition) -> None:
    folders = [addition / name for name in ("base-bf16", "ppo-bf16", "dpo-bf16")]
    name = "model.layers.0.self_attn.k_proj.weight"
    found = _measure(folders)
    base, full, sub = (open_checkpoint(folder) for folder in folders)
    aligned = align_recovery(base, full, [sub], maps=(), view=View.NATIVE)
    units = tuple(unit for unit in aligned.units if aligned.tensors[unit.pair].name == name)
    from dataclasses import replace

    slow = measure_recovery(
        base,
        full,
        [sub],
        replace(aligned, units=units),
        mask=FULL_MASK,
        own_masks=[None],
        view=View.NATIVE,
        kernel=ReferenceKernel(),
        workers=1,
    )
    assert list(slow.sums) == [name]
    for a, b in zip(slow.sums[name], found.sums[name], strict=True):
        assert np.array_equal(a.unequal, b.unequal)


def test_the_served_view_compares_what_is_rounded_and_freezes_what_is_stored(tmp_path) -> None:
    def side(name, *values):
        codes = np.array([values], dtype=np.float32).view(np.uint32)
        return write(tmp_path / name, {"w": ("F32", codes)})

    base, full = side("base", 1.0, 1.0, 1.0), side("full", 1.0 + 1e-4, 1.5, 1.0)
    sub = side("sub", 1.0, 1.5 + 1e-4, 1.0)
    native, served = (
        _measure([base, full, sub], view=view, own=[FULL_MASK]) for view in (View.NATIVE, View.SERVED)
    )
    assert native.sums["w"][1].entries.tolist() == [2, 1]
    assert native.sums["w"][1].unequal[0, 0] == 2
    assert served.sums["w"][1].entries.tolist() == [1, 2]
    assert served.sums["w"][1].unequal.sum() == 0
    moved = side("moved", 1.0 + 1e-4, 1.5, 1.0 + 2**-23)
    found = _measure([base, full, moved], view=View.SERVED, own=[FULL_MASK]).frozen[1]
    assert found is not None
    assert (found.entries, found.moved) == (2, 2)
    assert found.first is not None
    assert (found.first.entry, found.first.base) == (0, 1.0)


def test_sides_of_other_dtypes_are_compared_as_numbers(tmp_path) -> None:
    def bf16(name, *values):
        codes = np.array([values], dtype=np.float32).view(np.uint32) >> 16
        return write(tmp_path / name, {"w": ("BF16", codes.astype(np.uint16))})

    base, full = bf16("base", 1.0, 2.0, -0.0), bf16("full", 1.5, 2.0, 3.0)
    codes = np.array([[1.5, 2.0, -0.0]], dtype=np.float32).view(np.uint32)
    sub = write(tmp_path / "sub", {"w": ("F32", codes)})
    found = _measure([base, full, sub], own=[FULL_MASK])
    assert found.sums["w"][1].unequal[:, 0].tolist() == [1, 0]
    assert found.frozen[1] is not None
    assert found.frozen[1].moved == 0


def test_fused_parts_find_their_bits_and_offenders_their_entry(tmp_path) -> None:
    rng, block = np.random.default_rng(2), "model.layers.0.self_attn."
    fused = {
        f"{block}qkv_proj.weight": ("F32", rng.integers(0, 2**29, (16, 12), dtype=np.uint32)),
        f"{block}qkv_proj.bias": ("F32", rng.integers(0, 2**29, 16, dtype=np.uint32)),
    }
    split = {
        name.replace("qkv_proj", part): ("F32", rows.copy())
        for name, (_, codes) in fused.items()
        for part, rows in zip(("q_proj", "k_proj", "v_proj"), np.split(codes, [8, 12]), strict=True)
    }
    flags = {name: rng.random(codes.shape) < 0.5 for name, (_, codes) in fused.items()}
    flags[f"{block}qkv_proj.weight"][9, 5] = False
    bits = {name: ("BOOL", flag.astype(np.uint8)) for name, flag in flags.items()}
    sa.mask_convert(write(tmp_path / "bits", bits), tmp_path / "mask")
    mask = open_mask(tmp_path / "mask")
    full, sub = ({name: (dtype, codes.copy()) for name, (dtype, codes) in split.items()} for _ in range(2))
    for name, (_, codes) in full.items():
        codes += 1
        sub[name] = ("F32", codes.copy())
    sub = {name: ("F32", _masked(name, split, sub, flags, block)) for name in split}
    sub[f"{block}k_proj.weight"][1][1, 5] += 3
    folders = [write(tmp_path / n, side) for n, side in (("base", fused), ("full", full), ("sub", sub))]
    found = _measure(folders, mask=mask, own=[mask])
    inside = sum(int(flag.sum()) for flag in flags.values())
    assert sum(sums[1].entries[0] for sums in found.sums.values()) == inside
    assert sum(int(sums[1].unequal[0, 0]) for sums in found.sums.values()) == 0
    frozen = found.frozen[1]
    assert frozen is not None
    assert frozen.first is not None
    assert (frozen.moved, frozen.first.tensor, frozen.first.entry) == (
        1,
        f"{block}qkv_proj.weight",
        9 * 12 + 5,
    )


def _masked(name, split, trained, flags, block) -> np.ndarray:
    """Trained where the fused mask says so, the base's elsewhere."""
    part, kind = name.removeprefix(block).split(".")
    parts = dict(
        zip(("q_proj", "k_proj", "v_proj"), np.split(flags[f"{block}qkv_proj.{kind}"], [8, 12]), strict=True)
    )
    return np.where(parts[part], trained[name][1], split[name][1])


def test_tensors_that_not_all_runs_have_are_named(tmp_path) -> None:
    ones = np.ones((2, 3), dtype=np.uint32)
    numbers = np.arange(4, dtype=np.int64).view(np.uint64)
    base = write(tmp_path / "base", {"w": ("F32", ones), "v": ("F32", ones), "n": ("I64", numbers)})
    full = write(tmp_path / "full", {"w": ("F32", 2 * ones), "v": ("F32", ones), "n": ("I64", numbers)})
    sub = write(tmp_path / "sub", {"w": ("F32", 3 * ones), "n": ("I64", numbers)})
    base_c, full_c, sub_c = (open_checkpoint(path) for path in (base, full, sub))
    aligned = align_recovery(base_c, full_c, [sub_c], maps=(), view=View.NATIVE)
    assert aligned.left_out == {"n": "no float numbers", "v": "not matched in every run"}
    assert list(_measure([base, full, sub]).sums) == ["w"]


def test_a_file_that_changes_is_an_error(tmp_path, monkeypatch) -> None:
    ones = np.ones((2, 3), dtype=np.uint32)
    folders = [write(tmp_path / str(n), {"w": ("F32", n * ones)}) for n in range(1, 4)]
    read = execute.read_entries

    def changing(*arguments):
        (folders[2] / "model.safetensors").touch()
        return read(*arguments)

    monkeypatch.setattr(execute, "read_entries", changing)
    with pytest.raises(ChangedInputError, match="changed during the run"):
        _measure(folders)
