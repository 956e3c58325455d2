"""DPO, SimPO, KTO, ORPO and GRPO against TRL's own loss code, on the same tensors.

Matched against TRL 1.x. It has no free loss functions: the methods are called unbound, on an object that has
the attributes they read and in place of a model one that returns given log-probabilities. Semantics matched:

- DPO (`DPOTrainer._compute_loss`, `sigmoid`, reverse KL, no smoothing): ours exactly.
- KTO (`KTOTrainer._compute_loss`): ours exactly; the reference point is TRL's mean over mismatched
  completions, clamped at 0, on one process.
- SimPO (`experimental.cpo`, `simpo`, no smoothing, `cpo_alpha` 0): TRL takes γ/β off inside β(…), which is γ.
- ORPO (`experimental.orpo.odds_ratio_loss`): the odds-ratio part; TRL's NLL covers prompt and completion,
  ours the completion, so the NLL is not compared.
- GRPO (`GRPOTrainer._compute_loss`, importance sampling by token, one process, no accumulation): `grpo` is
  our `sequence-mean`, `bnpo` our `token-mean`; β · k3 is added, and the clipped share is TRL's `region_mean`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsity_audit.lab import losses

pytestmark = pytest.mark.extras
trl = pytest.importorskip("trl", reason="the parity tests need trl (the `extras` environment)")

RELATIVE = 1e-6  # fp32, the same operations in another order


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _lengths_mask(rows: int, seq: int, *, seed: int) -> Tensor:
    lengths = torch.randint(1, seq + 1, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return torch.arange(seq) < lengths


def _logprobs(rows: int, seq: int, *, seed: int) -> Tensor:
    return -_random(rows, seq, seed=seed).abs()


class _Accelerator:
    device = torch.device("cpu")

    def gather_for_metrics(self, value: Any) -> Any:
        return value

    gather = gather_for_metrics

    def reduce(self, value: Any, reduction: str) -> Any:
        return value

    def unwrap_model(self, model: Any) -> Any:
        return model


class _Given(torch.nn.Module):
    """A model whose fused head returns these log-probabilities (0 at padding, as the head gives them).

    A module and not a function: where peft is installed TRL looks at its submodules.
    """

    is_gradient_checkpointing = False

    def __init__(self, logprobs: Tensor) -> None:
        super().__init__()
        self.logprobs = logprobs

    def forward(self, **_inputs: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(self.logprobs)
        return SimpleNamespace(
            log_probs=self.logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )


def _trainer(cls: type, model: Any, ref_model: Any, **attributes: Any) -> Any:
    """An object of the trainer's class without its constructor, which would want data and a real model."""
    from collections import defaultdict

    trainer = object.__new__(cls)
    settings = {
        "accelerator": _Accelerator(),
        "args": SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None),
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "model": model,
        "ref_model": ref_model,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        **attributes,
    }
    for name, value in settings.items():
        setattr(trainer, name, value)
    return trainer


def _inputs(mask: Tensor) -> dict[str, Tensor]:
    """Token ids and masks with one prompt token in front, as the trainers want them."""
    shifted = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], dim=1)
    return {
        "input_ids": torch.ones_like(shifted),
        "attention_mask": torch.ones_like(shifted),
        "completion_mask": shifted,
    }


def _same(ours: Tensor, theirs: Tensor, leaf: Tensor, their_leaf: Tensor) -> None:
    """Equal values, and equal gradients by the log-probabilities of the tokens."""
    assert ours.item() == pytest.approx(theirs.item(), rel=RELATIVE)
    (grad,), (their_grad,) = torch.autograd.grad(ours, leaf), torch.autograd.grad(theirs, their_leaf)
    assert grad.abs().max() > 0
    assert (grad - their_grad).abs().max() <= RELATIVE * grad.abs().max() + 1e-9


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_dpo_is_trls_sigmoid_loss(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    from trl.trainer import dpo_trainer

    monkeypatch.setattr(dpo_trainer, "disable_gradient_checkpointing", lambda *_args: nullcontext())
    mask = _lengths_mask(12, 9, seed=0)
    logprobs, ref = (_logprobs(12, 9, seed=seed) for seed in (1, 2))
    leaf, their_leaf = (logprobs.clone().requires_grad_(True) for _ in range(2))
    trainer = _trainer(
        dpo_trainer.DPOTrainer,
        _Given(their_leaf * mask),
        _Given(ref * mask),
        beta=beta,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        label_smoothing=0.0,
        use_weighting=False,
    )
    theirs = dpo_trainer.DPOTrainer._compute_loss(trainer, trainer.model, _inputs(mask), False)
    ratios = losses.sequence_logprobs(leaf - ref, mask, average=False)
    _same(losses.dpo_loss(ratios[:6], ratios[6:], beta=beta), theirs, leaf, their_leaf)


@pytest.mark.parametrize("shift", [0.3, -0.3])
def test_kto_is_trls_loss_with_its_reference_point(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shift makes the estimated KL positive in one case, and clamped at 0 in the other."""
    from contextlib import nullcontext

    from trl.trainer import kto_trainer

    monkeypatch.setattr(kto_trainer, "disable_gradient_checkpointing", lambda *_args: nullcontext())
    mask = _lengths_mask(10, 7, seed=0)
    logprobs, ref = (_logprobs(10, 7, seed=seed) for seed in (1, 2))
    mismatched = _random(10, seed=3) + shift
    desirable = _random(10, seed=4) > 0
    leaf, their_leaf = (logprobs.clone().requires_grad_(True) for _ in range(2))
    policy, reference = _Given(their_leaf * mask), _Given(ref * mask)
    trainer = _trainer(
        kto_trainer.KTOTrainer,
        policy,
        reference,
        beta=0.1,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.0,
        undesirable_weight=1.5,
        _compute_kl_logps=lambda model, _batch: mismatched if model is policy else torch.zeros(10),
    )
    batch = {**_inputs(mask), "label": desirable}
    theirs = kto_trainer.KTOTrainer._compute_loss(trainer, policy, batch, False)
    ours = losses.kto_loss(
        losses.sequence_logprobs(leaf - ref, mask, average=False),
        desirable,
        reference_point=losses.kto_reference_point(mismatched),
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.5,
    )
    assert (losses.kto_reference_point(mismatched) > 0) == (shift > 0)
    _same(ours, theirs, leaf, their_leaf)


def _their_logprobs(trainer_class: type, logits: Tensor, labels: Tensor) -> Tensor:
    return trainer_class.get_batch_logps(logits, labels, average_log_prob=True)


def _labelled(rows: int, seq: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits over 11 tokens, labels with −100 outside the completions, and our mask of them."""
    logits = 2 * _random(rows, seq, 11, seed=1)
    mask = _lengths_mask(rows, seq - 1, seed=0)
    tokens = torch.randint(11, (rows, seq), generator=torch.Generator().manual_seed(2))
    labels = torch.where(torch.cat([torch.zeros(rows, 1, dtype=torch.bool), mask], dim=1), tokens, -100)
    return logits, labels, mask


def _our_logprobs(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    picked = labels[:, 1:].clamp(min=0).unsqueeze(-1)
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, picked).squeeze(-1)
    return losses.sequence_logprobs(logprobs, mask, average=True)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_simpo_is_trls_cpo_trainer_with_the_simpo_loss(margin: float) -> None:
    from trl.experimental.cpo import CPOTrainer

    logits, labels, mask = _labelled(12, 9)
    leaf, their_leaf = (logits.clone().requires_grad_(True) for _ in range(2))
    trainer = _trainer(
        CPOTrainer,
        None,
        None,
        beta=2.0,
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=margin,
        label_smoothing=0.0,
    )
    their_means = _their_logprobs(CPOTrainer, their_leaf, labels)
    theirs = CPOTrainer.cpo_loss(trainer, their_means[:6], their_means[6:])[0].mean()
    means = _our_logprobs(leaf, labels, mask)
    ours = losses.simpo_loss(means[:6], means[6:], beta=2.0, margin=margin)
    _same(ours, theirs, leaf, their_leaf)


def test_orpo_is_trls_odds_ratio_loss() -> None:
    from trl.experimental.orpo import ORPOTrainer

    logits, labels, mask = _labelled(12, 9)
    leaf, their_leaf = (logits.clone().requires_grad_(True) for _ in range(2))
    trainer = _trainer(ORPOTrainer, None, None, beta=0.1)
    their_means = _their_logprobs(ORPOTrainer, their_leaf, labels)
    # Its sign is turned where the trainer adds it to the NLL: loss = nll − losses.mean().
    theirs = -ORPOTrainer.odds_ratio_loss(trainer, their_means[:6], their_means[6:])[0].mean()
    means = _our_logprobs(leaf, labels, mask)
    ours = losses.orpo_loss(means[:6], means[6:], chosen_nll=torch.tensor(0.0), weight=0.1)
    _same(ours, theirs, leaf, their_leaf)


@pytest.mark.parametrize(("loss_type", "normalisation"), [("grpo", "sequence-mean"), ("bnpo", "token-mean")])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_clipped_loss_with_its_kl_is_trls_grpo(loss_type, normalisation, beta: float) -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer

    mask = _lengths_mask(12, 9, seed=0)
    logprobs, ref = (_logprobs(12, 9, seed=seed) for seed in (1, 2))
    old = logprobs + 0.3 * _random(12, 9, seed=3)
    advantages = _random(12, seed=4)
    leaf, their_leaf = (logprobs.clone().requires_grad_(True) for _ in range(2))
    trainer = _trainer(
        GRPOTrainer,
        SimpleNamespace(training=True),
        None,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=0.2,
        loss_type=loss_type,
        importance_sampling_level="token",
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_a, **_k: (their_leaf, torch.zeros(12, 9), None),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
    )
    inputs = {
        "prompt_ids": torch.ones(12, 1, dtype=torch.long),
        "prompt_mask": torch.ones(12, 1, dtype=torch.long),
        "completion_ids": torch.ones(12, 9, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
    }
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
    weights = losses.token_weights(mask, normalisation=normalisation)
    ours = losses.clipped_policy_loss(leaf, old, advantages, clip=0.2, weights=weights)
    ours = ours + beta * losses.weighted_sum(losses.k3(leaf, ref), weights)
    share = losses.clipped_share(leaf, old, advantages, clip=0.2, completion_mask=mask)
    assert 0.1 < share < 0.9
    assert trainer._metrics["train"]["clip_ratio/region_mean"] == [pytest.approx(share)]
    _same(ours, theirs, leaf, their_leaf)
