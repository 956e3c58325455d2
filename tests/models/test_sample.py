"""Sampling with a cache: a row is a function of its prompt, its seed and the model."""

from __future__ import annotations

import math

import pytest
import torch
from token_models import Faulty, random_model

from sparsity_audit.errors import UsageError
from sparsity_audit.models.batches import pad, plan_batches
from sparsity_audit.models.noise import RowNoise, choose, row_seed
from sparsity_audit.models.sample import sample

PROMPTS = [[1, 3, 4], [1, 5], [1, 3, 4, 6, 7, 8], [1, 9, 9]] * 4
SEEDS = [row_seed(0, "test", n) for n in range(len(PROMPTS))]
EOS = (2,)


def drawn(model, prompts=PROMPTS, *, seeds=None, **options):
    options = {"eos_ids": EOS, "max_new_tokens": 12, "temperature": 1.0, "batch_tokens": 4096} | options
    return sample(model, prompts, seeds=SEEDS if seeds is None else seeds, **options)


def test_a_row_does_not_depend_on_its_batch() -> None:
    model = random_model(0)
    whole = drawn(model)
    assert drawn(model, batch_tokens=1) == whole
    assert drawn(model, batch_tokens=50) == whole
    alone = [drawn(model, [prompt], seeds=[seed])[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert alone == whole
    assert len({one.tokens for one in whole}) > 8


def test_a_completion_ends_with_one_of_several_end_tokens_or_is_truncated() -> None:
    model = random_model(0)
    ends = (2, 7, 11)
    found = drawn(model, eos_ids=ends, max_new_tokens=9)
    for one in found:
        assert one.truncated == (one.tokens[-1] not in ends)
        assert not set(one.tokens[:-1]) & set(ends)
        assert len(one.tokens) == 9 or not one.truncated
    assert 0 < sum(one.truncated for one in found) < len(found)


def test_a_prompt_near_the_context_is_cut_by_it_and_the_others_are_not() -> None:
    model = random_model(0, context=16)
    prompts = [[1, *[3] * 12], [1, 3]]
    found = drawn(model, prompts, seeds=[1, 2], eos_ids=(), max_new_tokens=12)
    assert [len(one.tokens) for one in found] == [3, 12]
    assert all(one.truncated for one in found)
    assert found[1] == drawn(model, prompts[1:], seeds=[2], eos_ids=(), max_new_tokens=12)[0]


def test_temperature_zero_takes_the_most_probable_token() -> None:
    model = random_model(3)
    found = drawn(model, PROMPTS[:1], seeds=SEEDS[:1], temperature=0.0, eos_ids=())[0]
    tokens = list(PROMPTS[0])
    for token in found.tokens:
        ids = torch.tensor([tokens])
        logits = model.logits(model.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool)))[0, -1]
        assert token == int(logits.argmax())
        tokens.append(token)


def test_logits_that_are_no_numbers_fail_the_row_and_not_its_neighbours() -> None:
    def spoil(hidden, tokens, _mask):
        return torch.where((tokens == 9)[..., None], math.nan, hidden)

    found = drawn(Faulty(0, hidden=spoil), PROMPTS[:4], seeds=SEEDS[:4])
    assert [one.failed for one in found][3]
    assert found[3].tokens == ()
    clean = drawn(random_model(0), PROMPTS[:4], seeds=SEEDS[:4])
    assert [one for one, two in zip(found, clean, strict=True) if not one.failed and 9 not in two.tokens] == [
        two for two in clean[:3] if 9 not in two.tokens
    ]


def test_noise_draws_tokens_by_their_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -torch.inf, -1.0]])
    rows = range(1000)
    noise = RowNoise([row_seed(5, row) for row in rows], vocab_size=5, device=torch.device("cpu"))
    drawn_tokens = torch.cat([choose(logits, noise.draw(rows), temperature=2.0) for _ in range(6)])
    counts = torch.bincount(drawn_tokens, minlength=5)
    expected = torch.softmax(logits[0] / 2, dim=0) * len(drawn_tokens)
    assert counts[3] == 0
    seen = expected > 0
    chi2 = float(((counts - expected)[seen] ** 2 / expected[seen]).sum())
    assert chi2 < 21.1  # 3 degrees of freedom: p = 1e-4


def test_the_noise_of_a_row_stands_still_while_others_draw() -> None:
    device = torch.device("cpu")
    together, alone = (RowNoise([7, 8], vocab_size=4, device=device) for _ in range(2))
    together.draw([0, 1])
    together.draw([0])
    alone.draw([1])
    assert torch.equal(together.draw([1]), alone.draw([1]))


def test_numbers_that_cannot_be_are_refused() -> None:
    model = random_model(0)
    for temperature in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="temperature"):
            drawn(model, temperature=temperature)
    with pytest.raises(UsageError, match="max_new_tokens"):
        drawn(model, max_new_tokens=0)


def test_every_row_is_in_one_batch_within_the_bound() -> None:
    lengths = [5, 90, 3, 3, 40, 1, 7]
    batches = plan_batches(lengths, batch_tokens=40)
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 40
    tokens, mask = pad([[4, 5], [6]], pad_id=0, side="left", device=torch.device("cpu"))
    assert tokens.tolist() == [[4, 5], [0, 6]]
    assert mask.tolist() == [[True, True], [False, True]]
