"""Plans of a mixture of experts in block-scaled fp8: real headers over data that is a hole in a file.

The same writer makes the 671 B checkpoint of `benchmarks/plan_671b.py`; here it is a few hundred tensors.
"""

from __future__ import annotations

import importlib
import json
import math
import tracemalloc
from pathlib import Path

import pytest
from click.testing import CliRunner

from sparsity_audit import plan_diff
from sparsity_audit.api.diff_question import DiffQuestion, prepare
from sparsity_audit.cli.main import cli

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
UNIT_BYTES = 64 << 20
ITEMSIZE = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
MAX_BYTES_A_TENSOR = 1100
"""Peak memory of a plan that a matched tensor may cost: 750 when this was written.

Python's own bookkeeping and the allocator's gaps come on top: 1,250 resident."""


@pytest.fixture
def write_sides(tmp_path, monkeypatch):
    """Write both sides; returns them and the tensors that each has."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    shape = importlib.import_module("moe_shape")

    def write(*, layers: int, experts: int, shards: int) -> tuple[list[str], list]:
        tensors = list(shape.moe_tensors(layers=layers, experts=experts))
        sides = [tmp_path / f"{side}-{experts}" for side in ("base", "tuned")]
        for side in sides:
            shape.write_sparse(side, tensors, shards=shards)
        return list(map(str, sides)), tensors

    return write


def test_a_dry_run_of_sparse_files_prints_bytes_units_and_the_expected_time(write_sides) -> None:
    sides, tensors = write_sides(layers=5, experts=8, shards=6)
    total = sum(math.prod(shape) * ITEMSIZE[dtype] for _, dtype, shape in tensors)
    scaled = sum(math.prod(shape) for _, dtype, shape in tensors if dtype == "F8_E4M3")
    apparent = sum(file.stat().st_size for file in Path(sides[0]).iterdir())
    stored = sum(512 * file.stat().st_blocks for file in Path(sides[0]).iterdir())
    assert stored < 1_000_000 < 5_000_000_000 < apparent, "the data should take no disk"
    done = CliRunner().invoke(cli, ["diff", *sides, "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["num_pairs"] == len(tensors)
    assert plan["num_bytes"] == 2 * total
    assert plan["num_entries"] == sum(math.prod(shape) for _, _, shape in tensors)
    assert plan["leftovers"] == []
    # The stated rates of docs/design/cluster.md: codes with block scales, and everything else.
    seconds = 2 * scaled / 0.03e9 + 2 * (total - scaled) / 2.0e9
    assert plan["expected_s"] == pytest.approx(seconds, rel=1e-9)
    shown = CliRunner().invoke(cli, ["diff", *sides, "--dry-run"])
    assert f"{plan['num_bytes']:,} bytes" in shown.stdout
    assert f"{plan['num_units']:,}" in shown.stdout
    assert f"{len(tensors)} pairs" in shown.stdout


def test_its_units_stand_in_the_order_of_names_and_cover_every_tensor_once(write_sides) -> None:
    sides, tensors = write_sides(layers=4, experts=4, shards=5)
    plan = prepare(*sides, DiffQuestion.of(unit_bytes=UNIT_BYTES), probe=False).plan
    assert [pair.name for pair in plan.pairs] == sorted(name for name, _, _ in tensors)
    place = (0, 0)
    shapes = {name: shape for name, _, shape in tensors}
    for unit in plan.units:
        pair = plan.pairs[unit.pair]
        assert (unit.pair, unit.first_entry) == place
        end = unit.first_entry + unit.num_entries
        is_last = end == math.prod(shapes[pair.name])
        place = (unit.pair + 1, 0) if is_last else (unit.pair, end)
        assert unit.num_entries * pair.base.spec.dtype.itemsize <= UNIT_BYTES
    assert place == (len(plan.pairs), 0)
    assert len({pair.base.spec.file for pair in plan.pairs}) > 1
    assert plan.num_bytes == plan_diff(*sides).num_bytes


def test_its_codes_are_compared_as_values_of_their_block_scales(write_sides) -> None:
    sides, tensors = write_sides(layers=4, experts=2, shards=2)
    plan = prepare(*sides, DiffQuestion.of(), probe=False).plan
    scales = {
        pair.name: (pair.base.scale.spec.name, pair.tuned.scale.spec.name, pair.base.scale.block)
        for pair in plan.pairs
        if pair.base.scale is not None and pair.tuned.scale is not None
    }
    codes = [name for name, dtype, _ in tensors if dtype == "F8_E4M3"]
    assert scales == {name: (f"{name}_scale_inv", f"{name}_scale_inv", (128, 128)) for name in codes}


def test_memory_grows_with_the_number_of_tensors_by_a_stated_amount(write_sides, monkeypatch) -> None:
    # Room for the largest index that is taken is asked for at once; only what is used of it becomes resident.
    monkeypatch.setattr("sparsity_audit.checkpoint.opening.MAX_JSON_BYTES", 1_000_000)
    few, many = (write_sides(layers=5, experts=experts, shards=8) for experts in (8, 232))
    plan_diff(*few[0])  # what is imported or cached once is no cost of a tensor
    peaks = []
    for sides, _ in (few, many):
        tracemalloc.start()
        plan_diff(*sides)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    cost = (peaks[1] - peaks[0]) / (len(many[1]) - len(few[1]))
    assert cost <= MAX_BYTES_A_TENSOR
