"""Stacked experts against single ones: every expert's matrix is a run of entries of the stack."""

import pytest

from sparsity_audit.align.match import match
from sparsity_audit.align.records import LeftoverReason
from sparsity_audit.align.roles import role_of

STACK = "model.layers.0.mlp.experts."


def _stacked(experts=3, inner=6, hidden=4, *, transposed=False):
    up, down = (2 * inner, hidden), (hidden, inner)
    if transposed:
        up, down = up[::-1], down[::-1]
    return {f"{STACK}gate_up_proj": (experts, *up), f"{STACK}down_proj": (experts, *down)}


def _single(experts=3, inner=6, hidden=4, *, path=STACK, names=("gate_proj", "up_proj", "down_proj")):
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return {
        f"{path}{expert}.{name}.weight": shape
        for expert in range(experts)
        for name, shape in zip(names, shapes, strict=True)
    }


MIXTRAL = {"path": "model.layers.0.block_sparse_moe.experts.", "names": ("w1", "w3", "w2")}


@pytest.mark.parametrize("single", [_single(), _single(**MIXTRAL)])
def test_a_stacked_base_is_compared_expert_by_expert(make_catalogue, single):
    result = match(make_catalogue(_stacked()), make_catalogue(single))
    assert result.leftovers == ()
    assert len(result.pairs) == 9
    places = {
        (p.base.spec.name.rpartition(".")[2], p.name.partition(":")[2]): p.base.runs for p in result.pairs
    }
    names = [name.split(".")[-2] for name in [*single][:3]]
    for expert in range(3):
        gate, up = 48 * expert, 48 * expert + 24
        assert places["gate_up_proj", f"{expert}.{names[0]}"] == ((gate, gate + 24),)
        assert places["gate_up_proj", f"{expert}.{names[1]}"] == ((up, up + 24),)
        assert places["down_proj", f"{expert}.{names[2]}"] == ((24 * expert, 24 * expert + 24),)
    assert any("of single experts" in finding for finding in result.findings)
    roles = {(role_of(p.name, {}).expert, role_of(p.name, {}).module) for p in result.pairs}
    assert roles == {(e, module) for e in range(3) for module in ("gate_proj", "up_proj", "down_proj")}


def test_a_stacked_tuned_side_is_compared_under_the_names_of_the_base(make_catalogue):
    result = match(make_catalogue(_single(2)), make_catalogue(_stacked(2)))
    assert [pair.name for pair in result.pairs] == sorted(_single(2))
    assert {pair.rule for pair in result.pairs} == {"fused"}
    assert result.leftovers == ()


@pytest.mark.parametrize("count", [2, 5])
def test_another_number_of_experts_leaves_them_all_over(make_catalogue, count):
    result = match(make_catalogue(_stacked(3)), make_catalogue(_single(count)))
    assert result.pairs == ()
    detail = next(left.detail for left in result.leftovers if left.name.endswith("down_proj"))
    assert ("no 2.down_proj" if count == 2 else "3 experts against 5") in detail


@pytest.mark.parametrize(("inner", "hidden"), [(6, 4), (2, 4), (4, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_transposed_stacks_are_called_so_even_where_one_is_square(make_catalogue, inner, hidden, transposed):
    stack = _stacked(2, inner, hidden, transposed=transposed)
    result = match(make_catalogue(stack), make_catalogue(_single(2, inner, hidden)))
    if transposed:
        assert result.pairs == ()
        assert {left.reason for left in result.leftovers} == {LeftoverReason.TRANSPOSED}
    else:
        assert len(result.pairs) == 6


def test_a_square_stack_alone_is_not_guessed(make_catalogue):
    base = make_catalogue({f"{STACK}down_proj": (2, 4, 4)})
    tuned = make_catalogue({f"{STACK}{e}.down_proj.weight": (4, 4) for e in range(2)})
    result = match(base, tuned)
    assert {left.reason for left in result.leftovers} == {LeftoverReason.INTERLEAVED}
    assert "may be transposed" in result.leftovers[0].detail


def test_stacks_that_are_each_others_transpose_are_called_so(make_catalogue):
    result = match(make_catalogue(_stacked()), make_catalogue(_stacked(transposed=True)))
    assert {left.reason for left in result.leftovers} == {LeftoverReason.TRANSPOSED}


def test_shared_experts_are_no_stack(make_catalogue):
    name = "model.layers.0.mlp.shared_experts.gate_proj.weight"
    result = match(make_catalogue(_stacked() | {name: (6, 4)}), make_catalogue(_single() | {name: (6, 4)}))
    assert result.leftovers == ()
    assert len(result.pairs) == 10
