"""Every loss against a case worked out by hand, its gradient's sign, its zero and what must not change it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparsity_audit.lab import losses

MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])
TOKENS = losses.token_weights(MASK, normalisation="token-mean")
SEQUENCES = losses.token_weights(MASK, normalisation="sequence-mean")
LOG2, LOG4 = math.log(2), math.log(4)


def _grad(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


def _leaf(values: Tensor | list) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).clone().requires_grad_(True)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LOGPROBS = -_random(2, 4).abs()
OLD = LOGPROBS + 0.5 * _random(2, 4, seed=1)


# Normalisation


def test_each_token_counts_the_same_under_token_mean_and_each_completion_under_sequence_mean() -> None:
    quarter, sixth = 1 / 4, 1 / 6
    assert torch.equal(TOKENS, torch.tensor([[quarter, quarter, quarter, 0], [quarter, 0, 0, 0]]))
    assert SEQUENCES.flatten().tolist() == pytest.approx([sixth] * 3 + [0, 1 / 2, 0, 0, 0])


@pytest.mark.parametrize("normalisation", ["token-mean", "sequence-mean"])
def test_weights_sum_to_one_and_an_empty_minibatch_weighs_nothing(normalisation) -> None:
    assert losses.token_weights(MASK, normalisation=normalisation).sum() == pytest.approx(1)
    empty = losses.token_weights(torch.zeros(2, 4, dtype=torch.bool), normalisation=normalisation)
    assert torch.equal(empty, torch.zeros(2, 4))
    assert losses.sft_loss(LOGPROBS, weights=empty) == 0


# Policy gradients


def test_reinforce_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, 9.0], [-4.0, 9.0, 9.0, 9.0]])
    loss = losses.policy_gradient_loss(logprobs, torch.tensor([2.0, -1.0]), weights=TOKENS)
    assert loss == pytest.approx((2 * 6 - 4) / 4)
    loss = losses.policy_gradient_loss(logprobs, torch.tensor([2.0, -1.0]), weights=SEQUENCES)
    assert loss == pytest.approx((2 * 2 - 4) / 2)


def test_a_step_against_the_gradient_raises_good_tokens_and_lowers_bad_ones() -> None:
    leaf = _leaf(LOGPROBS)
    for loss in (
        losses.policy_gradient_loss(leaf, torch.tensor([1.0, -1.0]), weights=TOKENS),
        losses.clipped_policy_loss(leaf, LOGPROBS, torch.tensor([1.0, -1.0]), clip=0.2, weights=TOKENS),
    ):
        grad = _grad(loss, leaf)
        assert (grad[0, :3] < 0).all()
        assert grad[1, 0] > 0


def test_no_advantage_means_no_gradient() -> None:
    leaf = _leaf(LOGPROBS)
    nothing = torch.zeros(2)
    assert not _grad(losses.policy_gradient_loss(leaf, nothing, weights=TOKENS), leaf).any()
    assert not _grad(losses.clipped_policy_loss(leaf, OLD, nothing, clip=0.2, weights=TOKENS), leaf).any()


@pytest.mark.parametrize("weights", [TOKENS, SEQUENCES], ids=["token-mean", "sequence-mean"])
def test_at_ratio_one_ppo_is_reinforce(weights) -> None:
    """The value is −Σ w A and the gradient −w A, the closed form at ρ = 1."""
    leaf, advantages = _leaf(LOGPROBS), torch.tensor([1.5, -0.5])
    loss = losses.clipped_policy_loss(leaf, LOGPROBS, advantages, clip=0.2, weights=weights)
    assert loss.item() == pytest.approx(-(weights.sum(1) * advantages).sum().item())
    reinforce = losses.policy_gradient_loss(leaf, advantages, weights=weights)
    assert torch.equal(_grad(loss, leaf), _grad(reinforce, leaf))
    assert torch.equal(_grad(reinforce, leaf), -weights * advantages[:, None])


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.1, 1.0, 1.1, 1.1),  # inside: ρA, slope dρ/dlogπ · A = ρA
        (1.5, 1.0, 1.2, 0.0),  # above and good: clipped
        (0.5, 1.0, 0.5, 0.5),  # below and good: the way back is open
        (0.5, -1.0, -0.8, 0.0),  # below and bad: clipped
        (1.5, -1.0, -1.5, -1.5),  # above and bad: the way back is open
    ],
)
def test_ppo_under_the_clip_on_either_side(ratio, advantage, value, slope) -> None:
    leaf = _leaf([[math.log(ratio)]])
    one = torch.ones(1, 1)
    loss = losses.clipped_policy_loss(
        leaf, torch.zeros(1, 1), torch.tensor([advantage]), clip=0.2, weights=one
    )
    assert loss.item() == pytest.approx(-value, rel=1e-6)
    assert _grad(loss, leaf).item() == pytest.approx(-slope, rel=1e-6)
    share = losses.clipped_share(
        leaf, torch.zeros(1, 1), torch.tensor([advantage]), clip=0.2, completion_mask=one.bool()
    )
    assert share == (slope == 0)


def test_the_clipped_share_counts_tokens_not_padding() -> None:
    old = torch.zeros(2, 4)
    moved = torch.tensor([[1.0, 0.0, -1.0, 1.0], [-1.0, 1.0, 1.0, 1.0]])
    share = losses.clipped_share(moved, old, torch.tensor([1.0, -1.0]), clip=0.2, completion_mask=MASK)
    assert share == 2 / 4
    nothing = torch.zeros_like(MASK)
    assert losses.clipped_share(moved, old, torch.ones(2), clip=0.2, completion_mask=nothing) == 0


def test_rows_without_advantage_can_be_dropped_before_the_backward_pass() -> None:
    """Weights come from the whole minibatch, so the rows that stay keep their share."""
    advantages = torch.tensor([0.7, 0.0])
    whole, part = _leaf(LOGPROBS), _leaf(LOGPROBS[:1])
    all_rows = losses.clipped_policy_loss(whole, OLD, advantages, clip=0.2, weights=TOKENS)
    kept = losses.clipped_policy_loss(part, OLD[:1], advantages[:1], clip=0.2, weights=TOKENS[:1])
    assert all_rows.item() == kept.item()
    assert torch.equal(_grad(all_rows, whole)[:1], _grad(kept, part))


def test_value_loss_by_hand() -> None:
    values = _leaf([[1.0, 2.0, 3.0, 7.0], [0.0, 7.0, 7.0, 7.0]])
    returns = torch.tensor([[1.0, 1.0, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
    loss = losses.value_loss(values, returns, weights=TOKENS)
    assert loss.item() == pytest.approx(0.5 * (0 + 1 + 4 + 4) / 4)
    grad = _grad(loss, values)
    assert grad.tolist() == [[0, 0.25, 0.5, 0], [-0.5, 0, 0, 0]]
    assert losses.value_loss(values, values.detach(), weights=TOKENS) == 0


# KL


def _policies(seed: int = 3) -> tuple[Tensor, Tensor]:
    logits = _random(2, 6, seed=seed).double()
    return logits[0].log_softmax(0), logits[1].log_softmax(0)


def test_the_exact_kl_by_hand_and_zero_against_itself() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25], [1.0, 1.0, 1.0]]).log()
    ref = torch.tensor([[0.25, 0.5, 0.25], [5.0, 5.0, 5.0]]).log()
    assert losses.exact_kl(logits, ref).tolist() == pytest.approx([0.5 * LOG2 - 0.25 * LOG2, 0])
    assert losses.exact_kl(logits, logits).tolist() == [0, 0]


def test_the_estimators_by_hand() -> None:
    logprob, ref = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    assert losses.k1(logprob, ref).item() == pytest.approx(LOG2)
    assert losses.k2(logprob, ref).item() == pytest.approx(0.5 * LOG2**2)
    assert losses.k3(logprob, ref).item() == pytest.approx(0.5 - 1 + LOG2)
    for estimator in (losses.k1, losses.k2, losses.k3):
        assert estimator(logprob, logprob) == 0


def test_k1_and_k3_are_unbiased_and_k2_is_not_in_expectation() -> None:
    policy, ref = _policies()
    truth = losses.exact_kl(policy, ref)
    expected = {
        name: (policy.exp() * getattr(losses, name)(policy, ref)).sum().item() for name in ("k1", "k2", "k3")
    }
    assert expected["k1"] == pytest.approx(truth.item(), rel=1e-12)
    assert expected["k3"] == pytest.approx(truth.item(), rel=1e-12)
    assert abs(expected["k2"] / truth.item() - 1) > 0.05


def test_sampling_finds_the_same_biases_and_k3_varies_less_than_k1() -> None:
    policy, ref = _policies()
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=torch.manual_seed(0))
    truth = losses.exact_kl(policy, ref).item()
    samples = {name: getattr(losses, name)(policy, ref)[drawn] for name in ("k1", "k2", "k3")}
    z = {name: ((x.mean() - truth) / (x.std() / len(x) ** 0.5)).abs().item() for name, x in samples.items()}
    assert z["k1"] < 4
    assert z["k3"] < 4
    assert z["k2"] > 20
    assert (samples["k3"] >= 0).all()
    assert (samples["k1"] < 0).any()


def test_as_losses_k1_is_inert_k2_descends_the_kl_and_k3_the_opposite_direction() -> None:
    """E_π of the gradient, summed over the vocabulary: what each estimator really minimises."""
    logits, ref = _random(6, seed=3).double().requires_grad_(True), _policies()[1]

    def expected_gradient(name: str) -> Tensor:
        policy = logits.log_softmax(0)
        return _grad((policy.detach().exp() * getattr(losses, name)(policy, ref)).sum(), logits)

    reverse = _grad(losses.exact_kl(logits, ref), logits)
    forward = _grad(losses.exact_kl(ref, logits), logits)
    assert expected_gradient("k1").abs().max() < 1e-14
    assert (expected_gradient("k2") - reverse).abs().max() < 1e-14
    assert (expected_gradient("k3") - forward).abs().max() < 1e-14
    assert (forward - reverse).abs().max() > 0.01


def test_certainties_by_hand_at_both_ends_and_between() -> None:
    uniform, sure = torch.zeros(4), torch.tensor([0.0, -1e4, -1e4, -1e4])
    coin = torch.tensor([0.5, 0.5, 1e-30, 1e-30]).log()
    mixed = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    rows = torch.stack([uniform, sure, coin, mixed])
    assert losses.shannon_certainty(rows).tolist() == pytest.approx([0, 1, 0.5, 1 - 1.75 / 2], abs=1e-6)
    greatest = losses.max_probability_certainty(rows, temperature=1.0)
    assert greatest.tolist() == pytest.approx([0, 1, 0.5, 0.5], abs=1e-6)
    assert (greatest >= losses.shannon_certainty(rows) - 1e-6).all()
    cooler = losses.max_probability_certainty(mixed, temperature=0.5)
    assert cooler.item() == pytest.approx(1 + math.log(16 / 22) / LOG4)


# Likelihood and preferences


def test_sequence_logprobs_add_or_average_the_tokens_of_the_completion() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, 9.0], [-4.0, 9.0, 9.0, 9.0]])
    assert losses.sequence_logprobs(logprobs, MASK, average=False).tolist() == [-6, -4]
    assert losses.sequence_logprobs(logprobs, MASK, average=True).tolist() == [-2, -4]
    empty = torch.zeros_like(MASK)
    assert losses.sequence_logprobs(logprobs, empty, average=True).tolist() == [0, 0]


def test_sft_by_hand_and_zero_where_the_policy_is_sure() -> None:
    leaf = _leaf([[-1.0, -2.0, -3.0, 9.0], [-4.0, 9.0, 9.0, 9.0]])
    loss = losses.sft_loss(leaf, weights=TOKENS)
    assert loss.item() == 10 / 4
    assert torch.equal(_grad(loss, leaf), -TOKENS)
    assert losses.sft_loss(torch.zeros(2, 4), weights=TOKENS) == 0


def test_dpo_by_hand_its_sign_and_its_zero() -> None:
    chosen, rejected = _leaf([2.0, 0.0]), _leaf([-1.0, 0.0])
    loss = losses.dpo_loss(chosen, rejected, beta=0.5)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1.5)) + LOG2) / 2)
    assert (_grad(loss, chosen) < 0).all()
    assert (_grad(loss, rejected) > 0).all()
    assert losses.dpo_loss(torch.tensor([500.0]), torch.tensor([-500.0]), beta=0.5) == 0


def test_dpo_sees_only_the_difference_of_the_log_ratios() -> None:
    chosen, rejected = _random(8, seed=1), _random(8, seed=2)
    shifted = losses.dpo_loss(chosen + 3, rejected + 3, beta=0.1)
    assert shifted.item() == pytest.approx(losses.dpo_loss(chosen, rejected, beta=0.1).item(), rel=1e-6)


def test_simpo_by_hand_its_sign_and_its_zero() -> None:
    chosen, rejected = _leaf([-0.5]), _leaf([-1.0])
    loss = losses.simpo_loss(chosen, rejected, beta=2.0, margin=0.3)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-(2 * 0.5 - 0.3))))
    assert _grad(loss, chosen) < 0
    assert _grad(loss, rejected) > 0
    assert losses.simpo_loss(torch.tensor([0.0]), torch.tensor([-500.0]), beta=2.0, margin=0.3) == 0


def test_kto_by_hand_its_signs_and_its_zero() -> None:
    leaf, desirable = _leaf([1.0, -2.0]), torch.tensor([True, False])

    def loss(ratios: Tensor) -> Tensor:
        return losses.kto_loss(
            ratios,
            desirable,
            reference_point=torch.tensor(0.5),
            beta=0.2,
            desirable_weight=1.0,
            undesirable_weight=2.0,
        )

    expected = (1 / (1 + math.exp(0.2 * 0.5)) + 2 / (1 + math.exp(0.2 * 2.5))) / 2
    assert loss(leaf).item() == pytest.approx(expected)
    grad = _grad(loss(leaf), leaf)
    assert grad[0] < 0 < grad[1]
    assert loss(torch.tensor([1e4, -1e4])) == 0


def test_the_reference_point_of_kto_is_a_kl_that_is_never_negative_and_carries_no_gradient() -> None:
    leaf = _leaf([1.0, 3.0])
    point = losses.kto_reference_point(leaf)
    assert point == 2
    assert not point.requires_grad
    assert losses.kto_reference_point(torch.tensor([-1.0, -3.0])) == 0


def test_orpo_by_hand_its_sign_and_its_parts() -> None:
    chosen, rejected = _leaf([math.log(0.8)]), _leaf([math.log(0.5)])
    nll = torch.tensor(0.7)
    loss = losses.orpo_loss(chosen, rejected, chosen_nll=nll, weight=0.1)
    assert loss.item() == pytest.approx(0.7 + 0.1 * math.log1p(1 / 4))
    assert _grad(loss, chosen) < 0
    assert _grad(loss, rejected) > 0
    assert losses.orpo_loss(chosen, rejected, chosen_nll=nll, weight=0.0) == nll


def test_orpo_stays_finite_where_the_policy_is_nearly_sure() -> None:
    chosen = _leaf([-1e-7])
    loss = losses.orpo_loss(chosen, torch.tensor([-20.0]), chosen_nll=torch.tensor(0.0), weight=0.1)
    assert 0 <= loss.item() < 1e-6
    assert torch.isfinite(_grad(loss, chosen)).all()


def test_the_implicit_reward_loss_by_hand_its_signs_and_its_zero() -> None:
    rewards = _leaf([[0.5, 0.25, 0.25, 9.0], [-2.0, 9.0, 9.0, 9.0]])
    loss = losses.implicit_reward_loss(rewards, torch.tensor([1.0, 0.0]), completion_mask=MASK)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 2)
    grad = _grad(loss, rewards)
    assert (grad[0, :3] < 0).all()
    assert grad[1, 0] > 0
    sure = torch.tensor([[400.0, 0, 0, 0], [-400.0, 0, 0, 0]])
    assert losses.implicit_reward_loss(sure, torch.tensor([1.0, 0.0]), completion_mask=MASK) == 0


# What must not matter


def _completion_losses(logprobs: Tensor, *, rows: Tensor, fill: float) -> dict[str, Tensor]:
    """Every loss over completions, with `rows` of the minibatch and padding that holds `fill`."""
    mask = MASK[rows]
    weights = SEQUENCES[rows]
    ref, old = (torch.where(mask, x[rows], fill) for x in (OLD, OLD))
    advantages = torch.where(mask, _random(2, 4, seed=5)[rows], fill)
    padded = torch.where(mask, logprobs[rows], fill)
    return {
        "reinforce": losses.policy_gradient_loss(padded, advantages, weights=weights),
        "ppo": losses.clipped_policy_loss(padded, old, advantages, clip=0.2, weights=weights),
        "value": losses.value_loss(padded, advantages, weights=weights),
        "sft": losses.sft_loss(padded, weights=weights),
        "sums": losses.sequence_logprobs(padded, mask, average=False).square().sum(),
        "means": losses.sequence_logprobs(padded, mask, average=True).square().sum(),
        "implicit": losses.implicit_reward_loss(
            padded - ref, torch.tensor([1.0, 0.0])[rows], completion_mask=mask
        ),
    }


LOSS_NAMES = ("reinforce", "ppo", "value", "sft", "sums", "means", "implicit")


@pytest.mark.parametrize("fill", [7.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", LOSS_NAMES)
def test_what_stands_in_the_padding_reaches_neither_loss_nor_gradient(name, fill) -> None:
    rows = torch.arange(2)
    plain, dirty = _leaf(LOGPROBS), _leaf(LOGPROBS)
    expected = _completion_losses(plain, rows=rows, fill=0.0)[name]
    found = _completion_losses(dirty, rows=rows, fill=fill)[name]
    assert found.item() == expected.item()
    assert torch.equal(_grad(found, dirty), _grad(expected, plain))


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_the_order_of_the_minibatch_does_not_matter(name) -> None:
    leaf, other = _leaf(LOGPROBS), _leaf(LOGPROBS)
    expected = _completion_losses(leaf, rows=torch.arange(2), fill=0.0)[name]
    found = _completion_losses(other, rows=torch.tensor([1, 0]), fill=0.0)[name]
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (_grad(found, other) - _grad(expected, leaf)).abs().max() < 1e-6


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: losses.dpo_loss(a, b, beta=0.1),
        lambda a, b: losses.simpo_loss(a, b, beta=2.0, margin=0.5),
        lambda a, b: losses.orpo_loss(
            -a.abs() - 0.1, -b.abs() - 0.1, chosen_nll=torch.tensor(0.0), weight=0.1
        ),
        lambda a, b: losses.kto_loss(
            a,
            b > 0,
            reference_point=torch.tensor(0.1),
            beta=0.1,
            desirable_weight=1.0,
            undesirable_weight=1.0,
        ),
    ],
    ids=["dpo", "simpo", "orpo", "kto"],
)
def test_the_order_of_pairs_does_not_matter(loss) -> None:
    a, b, order = _random(8, seed=1), _random(8, seed=2), torch.randperm(8, generator=torch.manual_seed(0))
    assert loss(a[order], b[order]).item() == pytest.approx(loss(a, b).item(), rel=1e-6)
