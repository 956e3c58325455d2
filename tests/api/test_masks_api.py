"""The mask functions on masks of real checkpoints, and their refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

from sparsity_audit.api.masks import mask_convert, mask_info, mask_ops, mask_random
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.checkpoint.store import Catalogue, LocalFile
from sparsity_audit.compare.reference import ReferenceKernel
from sparsity_audit.errors import MaskError, OutputError, UsageError
from sparsity_audit.masks.bitmask import pack_bits, unpack_bits
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor, SourceReference
from sparsity_audit.masks.reader import MaskReader, open_mask

_DATA = Path(__file__).parents[1] / "data" / "addition"
_BASE = _DATA / "base-bf16"


def _codes(path: Path) -> tuple[Catalogue, dict[str, np.ndarray]]:
    catalogue = open_checkpoint(path)
    codes = {}
    with LocalFile(catalogue.files[0]) as file:
        for name, spec in catalogue.tensors.items():
            codes[name] = np.empty(spec.shape, dtype=f"u{spec.dtype.itemsize}")
            read_entries(file, spec, 0, memoryview(codes[name].reshape(-1).view(np.uint8)))
    return catalogue, codes


def _fingerprint(codes: np.ndarray) -> int:
    data = codes.tobytes()
    words = np.frombuffer(data.ljust(-(-len(data) // 8) * 8, b"\0"), dtype=np.uint64)
    return ReferenceKernel().fingerprint(words, 0)


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> dict[str, Path]:
    """Update masks (`value`; these files hold no NaN and no changed zero sign) of two real runs."""
    folder = tmp_path_factory.mktemp("masks")
    base, before = _codes(_BASE)
    prints = {name: _fingerprint(codes) for name, codes in before.items()}
    made = {}
    for seed in (0, 1):
        tuned, after = _codes(_DATA / f"grpo-bf16-lr1e-4-seed{seed}")
        tensors = [
            MaskTensor.whole(name, codes.shape, fingerprints=(prints[name], seed + 1))
            for name, codes in before.items()
        ]
        metadata = MaskMetadata(
            criterion="value",
            view="native",
            base=SourceReference(reference="base", resolved=base.resolved),
            tuned=SourceReference(reference="tuned", resolved=tuned.resolved),
        )
        made[f"seed{seed}"] = folder / f"seed{seed}"
        with MaskWriter(made[f"seed{seed}"], tensors, metadata) as writer:
            for name in before:
                writer.write_bits(name, 0, pack_bits(before[name] != after[name]))
            writer.finish()
    return made


def _bits(path: Path) -> dict[str, np.ndarray]:
    with MaskReader(open_mask(path)) as reader:
        return {n: unpack_bits(reader.read_packed(n), t.shape) for n, t in reader.tensors.items()}


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _write(target: Path, tensors: list[MaskTensor], metadata: MaskMetadata, bits=None) -> Path:
    with MaskWriter(target, tensors, metadata) as writer:
        for name, selected in (bits or {}).items():
            writer.write_bits(name, 0, pack_bits(selected))
        writer.finish()
    return target


# ---- info and ops


def test_info_gives_the_published_sparsity_of_a_real_run(masks):
    info = mask_info(masks["seed0"])
    assert info.entries == info.compared == 148_928
    assert 1 - info.density == pytest.approx(0.8155, abs=5e-5)
    record = info.to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["selected"] == sum(tensor["selected"] for tensor in record["tensors"])
    assert record["smallest_encoding"] == "packed"


def test_and_over_or_of_two_real_runs_is_the_published_jaccard(masks, tmp_path):
    paths = [masks["seed0"], masks["seed1"]]
    both = mask_ops("and", paths, tmp_path / "and").result
    either = mask_ops("or", paths, tmp_path / "or").result
    assert both.selected / either.selected == pytest.approx(0.9224, abs=5e-5)
    assert both.metadata.origin["operation"] == "and"
    assert [source["path"] for source in both.metadata.origin["inputs"]] == [str(path) for path in paths]
    assert both.metadata.base == mask_info(paths[0]).metadata.base
    assert both.metadata.tuned is None
    for name, tensor in open_mask(tmp_path / "and").tensors.items():
        assert tensor.fingerprints == (open_mask(paths[0]).tensors[name].fingerprints[0], 0)


@pytest.mark.parametrize(("selected", "smallest"), [(249, "indices"), (250, "packed")])
def test_a_sparse_mask_is_smaller_as_indices(tmp_path, selected, smallest):
    few = np.zeros((100, 80), dtype=np.bool_)
    few.reshape(-1)[:selected] = True
    metadata = MaskMetadata(criterion="value", view="native")
    info = mask_info(_write(tmp_path / "m", [MaskTensor.whole("w", few.shape)], metadata, {"w": few}))
    assert info.smallest_encoding == smallest
    assert info.to_json()["sizes_bytes"] == {"packed": 1000, "indices": 4 * selected}


def test_not_selects_only_what_was_compared(tmp_path):
    tensors = [
        MaskTensor(name="w", shape=(4, 3), compared=((1, 3),)),
        MaskTensor(name="b", shape=(11,), compared=((2, 9),)),
        MaskTensor(name="s", shape=(), compared=()),
    ]
    _write(tmp_path / "m", tensors, MaskMetadata(criterion="value", view="native"))
    result = mask_ops("not", [tmp_path / "m"], tmp_path / "not").result
    assert result.selected == result.compared == 2 * 3 + 7
    bits = _bits(tmp_path / "not")
    assert np.flatnonzero(bits["w"].any(axis=1)).tolist() == [1, 2]
    assert np.flatnonzero(bits["b"]).tolist() == list(range(2, 9))


def test_a_result_is_compared_only_where_all_operands_are(tmp_path):
    metadata = MaskMetadata(criterion="value", view="native")
    ones = {"w": np.ones((6, 3), dtype=np.bool_)}
    top = MaskTensor(name="w", shape=(6, 3), compared=((0, 2), (2, 4)), fingerprints=(5, 5))
    selected = ones["w"].copy()
    selected[4:] = False
    _write(tmp_path / "a", [top], metadata, {"w": selected})
    _write(tmp_path / "b", [MaskTensor.whole("w", (6, 3), fingerprints=(9, 9))], metadata, ones)
    result = mask_ops("or", [tmp_path / "a", tmp_path / "b"], tmp_path / "out").result
    assert (result.compared, result.selected) == (12, 12)
    tensor = open_mask(tmp_path / "out").tensors["w"]
    assert tensor.compared == ((0, 2), (2, 4))
    assert tensor.fingerprints == (0, 0), "a fingerprint of other slices would be wrong"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criterion": "bitwise"}, "criterion 'value' and 'bitwise'"),
        ({"view": "served"}, "view 'native' and 'served'"),
        ({"shape": (3, 5)}, r"tensor 'w': shapes \[3, 4\] and \[3, 5\]"),
        ({"name": "v"}, r"tensor 'v': only in .*theirs"),
        ({"fingerprints": (2, 1)}, "base fingerprints 0000000000000001 and 0000000000000002"),
    ],
)
def test_masks_that_do_not_belong_together_are_refused_with_both_sides(tmp_path, change, message):
    def make(folder, changes):
        about = {
            "name": "w",
            "shape": (3, 4),
            "fingerprints": (1, 1),
            "criterion": "value",
            "view": "native",
        } | changes
        metadata = MaskMetadata(criterion=about["criterion"], view=about["view"])
        tensor = MaskTensor.whole(about["name"], about["shape"], fingerprints=about["fingerprints"])
        return _write(folder, [tensor, MaskTensor.whole("common", (5,))], metadata)

    paths = [make(tmp_path / "mine", {}), make(tmp_path / "theirs", change)]
    with pytest.raises(MaskError, match=message) as caught:
        mask_ops("and", paths, tmp_path / "out")
    assert "mine" in str(caught.value)
    assert "theirs" in str(caught.value)
    assert "--force" in str(caught.value)
    assert not (tmp_path / "out").exists()
    forced = mask_ops("and", paths, tmp_path / "out", force=True)
    kept = {tensor.name for tensor in forced.result.tensors}
    assert "common" in kept
    lost = {tensor.name for tensor in forced.left_out}
    assert kept | lost >= {"w", change.get("name", "w")}
    assert not kept & lost


def test_every_two_masks_are_checked_for_the_same_base_not_only_the_first(tmp_path):
    metadata = MaskMetadata(criterion="value", view="native")
    paths = [
        _write(tmp_path / f"m{i}", [MaskTensor.whole("w", (3,), fingerprints=(i, 0))], metadata)
        for i in range(3)
    ]
    mask_ops("and", paths[:2], tmp_path / "unknown-is-no-contradiction")
    with pytest.raises(MaskError, match=r"m1 and .*m2: tensor 'w': base fingerprints"):
        mask_ops("and", paths, tmp_path / "out")


@pytest.mark.parametrize(
    ("op", "count", "k", "message"),
    [
        ("not", 2, None, "2 masks[^\0]*one mask"),
        ("and", 1, None, "1 masks[^\0]*two or more"),
        ("k-of-n", 2, None, "k = None"),
        ("k-of-n", 2, 3, "k = 3[^\0]*1 … 2"),
        ("or", 2, 1, "k belongs to k-of-n"),
        ("nand", 2, None, "not known"),
    ],
)
def test_operations_with_the_wrong_number_of_masks_are_refused(masks, tmp_path, op, count, k, message):
    with pytest.raises(UsageError, match=message):
        mask_ops(op, [masks["seed0"]] * count, tmp_path / "out", k=k)
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_never_overwritten(masks, tmp_path):
    before = _bytes(masks["seed0"])
    for call in (
        lambda out: mask_ops("not", [masks["seed1"]], out),
        lambda out: mask_convert(masks["seed1"], out, "bool"),
        lambda out: mask_random(masks["seed1"], out, seed=0),
    ):
        with pytest.raises(OutputError, match="not empty"):
            call(masks["seed0"])
    assert _bytes(masks["seed0"]) == before


# ---- random


def test_a_random_mask_has_the_count_of_every_tensor_and_depends_on_the_seed_alone(masks, tmp_path):
    like = masks["seed0"]
    first = mask_random(like, tmp_path / "a", seed=5)
    mask_random(like, tmp_path / "b", seed=5)
    other = mask_random(like, tmp_path / "c", seed=6)
    counts = [tensor.selected for tensor in mask_info(like).tensors]
    assert [tensor.selected for tensor in first.result.tensors] == counts
    assert [tensor.selected for tensor in other.result.tensors] == counts
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")
    assert (
        _bits(tmp_path / "a")["model.embed_tokens.weight"].tolist()
        != _bits(tmp_path / "c")["model.embed_tokens.weight"].tolist()
    )
    assert first.result.metadata.tuned is None
    assert first.result.metadata.origin["seed"] == 5


def test_random_masks_overlap_as_chance_says(masks, tmp_path):
    """Per tensor the overlap is hypergeometric; 6 standard deviations over the 30-odd tensors."""
    mask_random(masks["seed0"], tmp_path / "r", seed=11)
    real, drawn = _bits(masks["seed0"]), _bits(tmp_path / "r")
    for name, bits in real.items():
        n, k = bits.size, int(bits.sum())
        mean, variance = k * k / n, (k * (n - k) / n) ** 2 / max(n - 1, 1)
        assert abs((bits & drawn[name]).sum() - mean) <= 6 * np.sqrt(variance) + 1e-9, name


def test_a_random_mask_stays_within_the_compared_rows(tmp_path):
    tensor = MaskTensor(name="w", shape=(50, 9), compared=((7, 12), (30, 40)))
    selected = np.zeros((50, 9), dtype=np.bool_)
    selected[7:9] = True
    like = _write(tmp_path / "m", [tensor], MaskMetadata(criterion="value", view="native"), {"w": selected})
    mask_random(like, tmp_path / "r", seed=0)
    drawn = _bits(tmp_path / "r")["w"]
    assert drawn.sum() == 18
    assert set(np.flatnonzero(drawn.any(axis=1))) <= {*range(7, 12), *range(30, 40)}


def test_a_tensor_of_several_blocks_keeps_its_count(tmp_path):
    shape = (3, 2_500_001)  # three blocks a row
    selected = np.zeros(shape, dtype=np.bool_)
    selected[1, 5:700_000] = True
    like = _write(
        tmp_path / "m",
        [MaskTensor.whole("w", shape)],
        MaskMetadata(criterion="value", view="native"),
        {"w": selected},
    )
    mask_random(like, tmp_path / "r", seed=3)
    drawn = _bits(tmp_path / "r")["w"]
    assert drawn.sum() == selected.sum()
    rows = drawn.sum(axis=1)
    share = selected.sum() / 3
    assert np.abs(rows - share).max() < 6 * np.sqrt(share)


def test_a_magnitude_matched_mask_has_the_count_of_every_stratum(masks, tmp_path):
    record = mask_random(masks["seed0"], tmp_path / "r", seed=2, base=_BASE)
    real, drawn = _bits(masks["seed0"]), _bits(tmp_path / "r")
    _, base = _codes(_BASE)
    for name, codes in base.items():
        # bf16: sign, 8 exponent bits, 7 mantissa bits, read off here by hand
        strata = 2 * ((codes >> 7) & 0xFF).astype(int) + ((codes & 0x7F) == 0)
        counts = [np.bincount(strata[bits[name]], minlength=512) for bits in (real, drawn)]
        assert np.array_equal(counts[0], counts[1]), name
    assert any(not np.array_equal(real[name], drawn[name]) for name in real)
    assert record.matched == "tensor × exponent of |w_base| × mantissa = 0"


def test_magnitude_matching_explains_most_of_the_real_overlap(masks, tmp_path):
    """Jaccard of seed 0 with a control of seed 1: .118 by density per tensor, .916 by strata."""
    real = _bits(masks["seed0"])
    jaccard = {}
    for name, base in (("tensor", None), ("stratum", _BASE)):
        mask_random(masks["seed1"], tmp_path / name, seed=4, base=base)
        drawn = _bits(tmp_path / name)
        both = sum(int((real[n] & drawn[n]).sum()) for n in real)
        jaccard[name] = both / sum(int((real[n] | drawn[n]).sum()) for n in real)
    assert jaccard["tensor"] == pytest.approx(0.1177, abs=0.005)
    assert jaccard["stratum"] == pytest.approx(0.9160, abs=0.003)


def test_another_base_is_refused_unless_forced(masks, tmp_path):
    wrong = _DATA / "sft-bf16"
    with pytest.raises(MaskError, match=r"fingerprint [0-9a-f]{16}\n  expected: [0-9a-f]{16}, of the base"):
        mask_random(masks["seed0"], tmp_path / "r", seed=0, base=wrong)
    assert not (tmp_path / "r").exists()
    mask_random(masks["seed0"], tmp_path / "r", seed=0, base=wrong, force=True)


def test_a_mask_without_fingerprints_needs_force_to_be_matched(masks, tmp_path):
    mask_convert(masks["seed0"], tmp_path / "pt", "pt")
    mask_convert(tmp_path / "pt" / "mask.pt", tmp_path / "imported", "packed")
    with pytest.raises(MaskError, match=r"does not record the base's fingerprint[^\0]*--force"):
        mask_random(tmp_path / "imported", tmp_path / "r", seed=0, base=_BASE)
    mask_random(tmp_path / "imported", tmp_path / "r", seed=0, base=_BASE, force=True)


def test_a_base_without_the_masks_tensors_is_refused(tmp_path):
    like = _write(
        tmp_path / "m", [MaskTensor.whole("nowhere", (3,))], MaskMetadata(criterion="value", view="native")
    )
    with pytest.raises(MaskError, match=r"tensor 'nowhere': not there[^\0]*shape \[3\]"):
        mask_random(like, tmp_path / "r", seed=0, base=_BASE, force=True)


def test_served_masks_are_matched_by_the_codes_rounded_to_bf16(tmp_path):
    _, base = _codes(_DATA / "base-fp32")
    name = "model.embed_tokens.weight"
    selected = np.asarray(np.random.default_rng(0).random(base[name].shape) < 0.2)
    for view in ("native", "served"):
        tensor = MaskTensor.whole(name, selected.shape, fingerprints=(_fingerprint(base[name]), 0))
        like = _write(tmp_path / view, [tensor], MaskMetadata(criterion="value", view=view), {name: selected})
        mask_random(like, tmp_path / f"{view}-r", seed=0, base=_DATA / "base-fp32")
        drawn = _bits(tmp_path / f"{view}-r")[name]
        codes = base[name]
        if view == "served":
            values = codes.view(np.float32)
            bf16 = ((codes + 0x7FFF + ((codes >> 16) & 1)) >> 16).astype(np.uint32)
            assert np.isfinite(values).all()
            strata = 2 * ((bf16 >> 7) & 0xFF).astype(int) + ((bf16 & 0x7F) == 0)
        else:
            strata = 2 * ((codes >> 23) & 0xFF).astype(int) + ((codes & 0x7FFFFF) == 0)
        assert np.array_equal(
            np.bincount(strata[selected], minlength=512), np.bincount(strata[drawn], minlength=512)
        )


def test_a_negative_seed_is_refused(masks, tmp_path):
    with pytest.raises(UsageError, match="seed"):
        mask_random(masks["seed0"], tmp_path / "r", seed=-1)
