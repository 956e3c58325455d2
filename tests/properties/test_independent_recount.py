"""Everything countable in a report, counted again from the files without the package's code.

Contract: decoding, rounding, criteria and sums below are written from the definitions in docs/ and share
nothing with `sparsity_audit`; the checkpoints are written with safetensors and torch themselves.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsity_audit.api.diff import diff
from sparsity_audit.report.schema import DiffReport

KEYS = ("bitwise", "value", "atol:1e-5", "rel:1e-3", "ulp:1", "ulp:0", "atol:0.5", "rel:0.3", "atol:0")
FLOATS = {
    torch.bfloat16: (8, 7, torch.int16),
    torch.float16: (5, 10, torch.int16),
    torch.float32: (8, 23, torch.int32),
    torch.float64: (11, 52, torch.int64),
}
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


def _random(rng: np.random.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random weights; a sixth of them has random bits, a sixth is special."""
    exponent_bits, mantissa_bits, code = FLOATS[dtype]
    size, width = math.prod(shape), 1 + exponent_bits + mantissa_bits
    words = torch.tensor(rng.normal(0, 0.02, size) * 2.0 ** rng.integers(-9, 3, size), dtype=torch.float64)
    values = words.to(dtype).view(code).numpy().copy()
    bits = rng.integers(0, 2**63, size, dtype=np.int64).astype(np.uint64) * np.uint64(2) + np.uint64(1)
    noise = (bits >> np.uint64(64 - width)).astype(f"u{width // 8}").view(values.dtype)
    kind = rng.integers(0, 6, size)
    top, infinity = -(1 << (width - 1)), ((1 << exponent_bits) - 1) << mantissa_bits
    special = np.array(
        [0, top, infinity, top + infinity, infinity + 1, infinity + 3, 1, top + 1, infinity - 1, 2]
    )
    values = np.where(
        kind == 0, noise, np.where(kind == 1, rng.choice(special.astype(values.dtype), size), values)
    )
    return torch.from_numpy(values).view(dtype).reshape(shape)


def _moved(rng: np.random.Generator, tensor: torch.Tensor) -> torch.Tensor:
    """Some codes shifted by a few, some signs flipped, some entries redrawn."""
    code = FLOATS[tensor.dtype][2]
    values = tensor.reshape(-1).view(code).numpy().copy()
    kind = rng.integers(0, 8, len(values))
    values = np.where(kind < 3, values + rng.integers(-3, 4, len(values)).astype(values.dtype), values)
    values = np.where(kind == 3, values ^ np.iinfo(values.dtype).min, values)
    fresh = _random(rng, tensor.dtype, (len(values),)).view(code).numpy()
    return torch.from_numpy(np.where(kind == 4, fresh, values)).view(tensor.dtype).reshape(tensor.shape)


def _codes(tensor: torch.Tensor) -> list[int]:
    width = tensor.element_size() * 8
    return [int(c) % (1 << width) for c in tensor.reshape(-1).view(FLOATS[tensor.dtype][2]).tolist()]


def _bf16_code(value: float) -> int:
    """Nearest bf16, ties to even, in exact arithmetic on float64."""
    sign = 0x8000 if math.copysign(1, value) < 0 else 0
    if math.isnan(value):
        return 0x7FC0
    if math.isinf(value) or value == 0:
        return sign | (0x7F80 if value else 0)
    exponent = max(math.frexp(abs(value))[1] - 1, -126)
    steps = round(Fraction(abs(value)) / Fraction(2) ** (exponent - 7))
    rounded = steps * Fraction(2) ** (exponent - 7)
    if rounded >= 2**128:
        return sign | 0x7F80
    return sign | int(np.float32(float(rounded)).view(np.uint32)) >> 16


class _Entries:
    """Both sides of one pair in one view: codes, values, and the dtype's layout."""

    def __init__(self, base: torch.Tensor, tuned: torch.Tensor, *, served: bool) -> None:
        if base.dtype != tuned.dtype and not served:
            wide = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
            base, tuned = base.to(wide), tuned.to(wide)
        self.shape = base.shape
        self.values = [
            t.reshape(-1).to(torch.float64).tolist() if t.dtype.is_floating_point else t.reshape(-1).tolist()
            for t in (base, tuned)
        ]
        self.is_float = base.dtype.is_floating_point
        self.dtype = torch.bfloat16 if served else base.dtype
        if not self.is_float:
            self.codes = self.values
            return
        self.codes = [_codes(t) for t in (base, tuned)]
        if served:
            for side, tensor in enumerate((base, tuned)):
                if tensor.dtype != torch.bfloat16:
                    self.codes[side] = [_bf16_code(v) for v in self.values[side]]
            self.values = [
                (np.array(c, dtype=np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64).tolist()
                for c in self.codes
            ]

    def __iter__(self):
        return zip(*self.codes, *self.values, strict=True)

    def ordered(self, code: int) -> int:
        top = 1 << sum(FLOATS[self.dtype][:2])
        return code if code < top else -(code - top)

    def distance(self, a: int, b: int) -> int:
        return abs(self.ordered(a) - self.ordered(b)) if self.is_float else abs(int(b) - int(a))

    def changed(self, key: str, a: int, b: int, x: float, y: float) -> bool:
        kind, _, text = key.partition(":")
        if kind == "bitwise":
            return a != b
        if x != x or y != y:
            return (x != x) != (y != y)
        if x == y or kind == "value":
            return x != y
        if self.is_float and (math.isinf(x) or math.isinf(y)):
            return True
        if kind == "ulp":
            return self.distance(a, b) > int(text)
        delta = abs(y - x)
        if kind == "atol":
            return delta > (float(text) if self.is_float else math.floor(float(text)))
        return float(delta) > float(text) * float(max(abs(x), abs(y)))

    def mask(self, key: str) -> np.ndarray:
        return np.array([self.changed(key, *entry) for entry in self], dtype=bool)

    def specials(self, side: int) -> dict[str, int]:
        counts = dict.fromkeys(("nan", "inf", "pos_zero", "neg_zero", "subnormal"), 0)
        smallest = 0.0 if not self.is_float else torch.finfo(self.dtype).tiny
        for value in self.values[side] if self.is_float else ():
            name = "nan" if value != value else "inf" if math.isinf(value) else None
            if value == 0:
                name = "neg_zero" if math.copysign(1, value) < 0 else "pos_zero"
            elif name is None and abs(value) < smallest:
                name = "subnormal"
            if name is not None:
                counts[name] += 1
        return counts

    def deltas(self) -> tuple[list[float], int]:
        """|Δ| of value changes with finite squares, and how many others there are."""
        with np.errstate(over="ignore", invalid="ignore"):
            found = [
                abs(float(np.float64(y) - np.float64(x)) if self.is_float else float(y - x))
                for a, b, x, y in self
                if self.changed("value", a, b, x, y)
            ]
            kept = [d for d in found if math.isfinite(float(np.float64(d) * np.float64(d)))]
        return kept, len(found) - len(kept)

    def rates(self) -> dict[tuple[str, int | None], list[int]]:
        """(kind, exponent) of the base → entries, changed, of those by one code."""
        rows: dict[tuple[str, int | None], list[int]] = defaultdict(lambda: [0, 0, 0])
        smallest = torch.finfo(self.dtype).tiny
        for a, b, x, y in self:
            if x != x or math.isinf(x):
                key = ("nan" if x != x else "infinity", None)
            elif abs(x) < smallest:
                key = ("subnormal" if x else "zero", None)
            else:
                key = ("normal", math.frexp(abs(x))[1] - 1)
            changed = self.changed("value", a, b, x, y)
            finite = math.isfinite(x) and math.isfinite(y)
            rows[key] = [
                n + int(m)
                for n, m in zip(
                    rows[key], (True, changed, changed and finite and self.distance(a, b) == 1), strict=True
                )
            ]
        return rows


def _check_view(found: Any, entries: _Entries) -> None:
    size = len(entries.codes[0])
    for count in found.counts:
        changed = int(entries.mask(count.criterion).sum())
        assert (count.criterion, count.compared, count.changed) == (count.criterion, size, changed)
        assert count.density == (changed / size if size else None)
        assert count.sparsity == ((size - changed) / size if size else None)
    if entries.is_float:
        flips = sum(x != 0 and y != 0 and (x < 0) != (y < 0) for _, _, x, y in entries if x == x and y == y)
        assert found.sign_flips == flips
    for side, specials in enumerate((found.base_specials, found.tuned_specials)):
        assert {
            k: getattr(specials, k) for k in ("nan", "inf", "pos_zero", "neg_zero", "subnormal")
        } == entries.specials(side)
    deltas, lost = entries.deltas()
    assert found.nonfinite_deltas == lost
    total = sum(map(Fraction, deltas), Fraction())
    assert found.l1 == (float(total) if total < Fraction(2) ** 1024 else None)
    assert found.max_abs == max(deltas, default=0.0)
    assert found.l2 == _root(d * d for d in deltas)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = [
            float(np.float64(x) * np.float64(x)) if entries.is_float else float(x) * float(x)
            for x in entries.values[0]
        ]
    norm = _root(s for s in squares if math.isfinite(s))
    assert found.base_l2 == norm
    if norm == 0:
        assert found.relative_l2 is None
    else:
        assert found.relative_l2 == pytest.approx(found.l2 / norm, rel=4e-16)


def _root(squares: Any) -> float:
    """Square root of an exact sum, to nearest: integer root with 200 bits to spare."""
    total = sum(map(Fraction, squares), Fraction())
    scale = 1 << 1400
    return float(Fraction(math.isqrt(int(total * scale * scale)), scale))


def _tensors(rng: np.random.Generator) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Base and tuned: all dtypes, all mixtures of float dtypes, a resized vocabulary, a fused matrix."""
    base: dict[str, torch.Tensor] = {}
    tuned: dict[str, torch.Tensor] = {}
    layer = "model.layers.{}."
    for number, dtype in enumerate(FLOATS):
        prefix = layer.format(number)
        for name, shape in (
            ("mlp.down_proj.weight", (int(rng.integers(1, 9)), int(rng.integers(1, 40)))),
            ("input_layernorm.weight", (int(rng.integers(1, 90)),)),
            ("mlp.down_proj.bias", (int(rng.integers(0, 2)),)),
            ("scale", ()),
        ):
            base[prefix + name] = _random(rng, dtype, shape)
            tuned[prefix + name] = _moved(rng, base[prefix + name])
    mixed = [(a, b) for a in FLOATS for b in FLOATS if a is not b]
    for number, (a, b) in enumerate(mixed):
        name = f"model.layers.9.mixed{number}.weight"
        base[name] = _random(rng, a, (3, 7))
        # NaN of any payload becomes one NaN: what widening does to payloads is nobody's promise.
        base[name][base[name].isnan()] = math.nan
        tuned[name] = _moved(rng, base[name].nan_to_num(0.25)).to(b)
        tuned[name][tuned[name].isnan()] = math.nan
    for dtype, low, high in (
        (torch.int8, -128, 128),
        (torch.uint8, 0, 256),
        (torch.int64, -(2**40), 2**40),
        (torch.bool, 0, 2),
    ):
        name = f"model.buffer_{str(dtype).removeprefix('torch.')}"
        values = rng.integers(low, high, (4, 5))
        base[name] = torch.tensor(values).to(dtype)
        tuned[name] = torch.tensor(
            np.where(rng.random((4, 5)) < 0.5, values, rng.integers(low, high, (4, 5)))
        ).to(dtype)
    base["model.embed_tokens.weight"] = _random(rng, torch.bfloat16, (20, 8))
    tuned["model.embed_tokens.weight"] = torch.cat(
        [_moved(rng, base["model.embed_tokens.weight"]), torch.ones(3, 8, dtype=torch.bfloat16)]
    )
    base["model.layers.5.mlp.gate_up_proj.weight"] = _random(rng, torch.float32, (12, 6))
    moved = _moved(rng, base["model.layers.5.mlp.gate_up_proj.weight"])
    tuned["model.layers.5.mlp.gate_proj.weight"], tuned["model.layers.5.mlp.up_proj.weight"] = (
        moved[:6].clone(),
        moved[6:].clone(),
    )
    tuned["model.extra.weight"] = torch.ones(11)
    return base, tuned


def _sides(
    base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], record: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = base[record.name.partition(":")[0]], tuned[record.tuned_name]
    if a.shape != b.shape and "gate_up" in record.name:
        first = 0 if "gate_proj" in record.tuned_name else 6
        return a[first : first + 6], b
    return a, b[: len(a)] if a.shape else b


def _check(
    report: DiffReport, base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], *, mask: str, view: str
) -> None:
    rates: dict[tuple[str, str], dict[tuple[str, int | None], list[int]]] = defaultdict(
        lambda: defaultdict(lambda: [0, 0, 0])
    )
    per_group: dict[tuple[str, str, str], list[tuple[int, int]]] = defaultdict(list)
    for record in report.tensors:
        a, b = _sides(base, tuned, record)
        native = _Entries(a, b, served=False)
        _check_view(record.summary.native, native)
        has_served = native.is_float and {a.dtype, b.dtype} != {torch.bfloat16}
        assert (record.summary.served is not None) == has_served
        served = _Entries(a, b, served=True) if has_served else native
        if has_served:
            _check_view(record.summary.served, served)
        for name, entries, shown in (("native", native, True), ("served", served, has_served)):
            if entries.is_float and shown:
                for key, row in entries.rates().items():
                    there = rates[name, NAMES[entries.dtype]]
                    there[key] = [n + m for n, m in zip(there[key], row, strict=True)]
            for key in KEYS:
                pair = int(entries.mask(key).sum()), len(entries.codes[0])
                per_group[name, key, "all"].append(pair)
                if record.summary.layer is not None:
                    per_group[name, key, str(record.summary.layer)].append(pair)
        shape = (math.prod(a.shape[:-1]), a.shape[-1]) if a.shape else (1, 1)
        lines = (served if view == "served" else native).mask(mask).reshape(shape)
        assert record.summary.rows is not None
        assert record.summary.cols is not None
        for axis, counts in ((record.summary.rows, lines.sum(1)), (record.summary.cols, lines.sum(0))):
            assert (axis.lines, axis.touched) == (len(counts), int((counts > 0).sum())), record.name
    for found in report.precision:
        expected = rates[str(found.view), str(found.dtype)]
        assert {(r.kind, r.exponent): [r.entries, r.changed, r.one_ulp] for r in found.rates} == {
            k: v for k, v in expected.items() if v[0]
        }
    _check_rollups(report, per_group)


def _check_rollups(report: DiffReport, groups: dict[tuple[str, str, str], list[tuple[int, int]]]) -> None:
    for rollups in report.rollups:
        for rollup in (rollups.totals[0], *rollups.by_layer):
            assert {c.total.criterion for c in rollup.counts} == set(KEYS)
            for count in rollup.counts:
                members = groups[str(rollups.view), count.total.criterion, rollup.key]
                assert (count.total.changed, count.total.compared) == tuple(
                    map(sum, zip(*members, strict=True))
                )
                densities = [changed / size for changed, size in members if size]
                assert count.mean_density == pytest.approx(sum(densities) / len(densities), rel=1e-14)


def _check_accounts(
    report: DiffReport, base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]
) -> None:
    compared = sum(r.summary.native.counts[0].compared for r in report.tensors)
    lost: Counter[str] = Counter()
    for left in report.leftovers:
        lost[left.side] += left.num_entries
    for side, account, tensors in (
        ("base", report.accounts.base, base),
        ("tuned", report.accounts.tuned, tuned),
    ):
        assert account.total == sum(t.numel() for t in tensors.values())
        assert (account.compared, account.skipped, account.leftover) == (compared, 0, lost[side])
        assert account.total == compared + lost[side]
    assert lost == {"tuned": 3 * 8 + 11}


@pytest.mark.parametrize(
    ("seed", "kernel", "unit_bytes", "mask", "view"),
    [
        (0, "numpy", None, "value", "native"),
        (1, "numba", None, "value", "native"),
        (2, "numba", 1, "bitwise", "served"),
        (3, "numpy", 200, "ulp:1", "native"),
        (4, "numba", 300, "atol:1e-5", "served"),
        (5, "reference", 64, "rel:1e-3", "native"),
    ],
)
def test_a_report_states_what_an_independent_recount_finds(
    tmp_path: Path, seed: int, kernel: Any, unit_bytes: int | None, mask: str, view: str
) -> None:
    base, tuned = _tensors(np.random.default_rng(seed))
    save_file(base, tmp_path / "base.safetensors")
    strided = {name: t.t().contiguous().t() if t.ndim == 2 and seed % 2 else t for name, t in tuned.items()}
    torch.save(strided, tmp_path / "tuned.bin")
    report = diff(
        tmp_path / "base.safetensors",
        tmp_path / "tuned.bin",
        criteria=[mask, *(key for key in KEYS if key != mask)],
        view=view,
        kernel=kernel,
        unit_bytes=unit_bytes,
        workers=2,
        device="cpu",
    )
    assert len(report.tensors) == len(base) + 1
    _check_accounts(report, base, tuned)
    _check(report, base, tuned, mask=mask, view=view)
