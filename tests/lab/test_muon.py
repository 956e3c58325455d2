"""Muon's steps are orthogonal, and are those of torch's own where it has one."""

from __future__ import annotations

import pytest
import torch

from sparsity_audit.lab.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_a_step_has_singular_values_near_one_and_keeps_the_directions(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    step = orthogonalised(matrix)
    assert ((torch.linalg.svdvals(step) - 0.95).abs() < 0.3).all()
    # The same singular vectors: UᵀXV is diagonal.
    inner = left.T @ step @ right.T
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-4
    assert values.min() > 0.1, "small singular values would need more iterations"


def test_steps_follow_the_definition_of_nesterov_momentum() -> None:
    weight = torch.nn.Parameter(torch.zeros(12, 3))
    optimizer = Muon([weight], lr=0.1, momentum=0.9)
    gradients = [torch.randn(12, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    expected, average = torch.zeros(12, 3), torch.zeros(12, 3)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        average = 0.9 * average + 0.1 * gradient
        expected = expected - 0.1 * 2 * orthogonalised(0.1 * gradient + 0.9 * average)
    assert (weight - expected).abs().max() < 1e-5


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon to compare with")
def test_steps_are_those_of_torch_up_to_its_iteration_in_bf16() -> None:
    ours, theirs = (torch.nn.Parameter(torch.zeros(12, 8)) for _ in range(2))
    first = Muon([ours], lr=0.1, momentum=0.95)
    second = torch.optim.Muon([theirs], lr=0.1, momentum=0.95, weight_decay=0.0)
    for i in range(3):
        ours.grad = torch.randn(12, 8, generator=torch.Generator().manual_seed(i))
        theirs.grad = ours.grad.clone()
        first.step()
        second.step()
    # A step's entries are about lr / sqrt(8) = .035; eight bits of mantissa, five iterations, three steps.
    assert (ours - theirs).abs().max() < 5e-3
