"""Positions of completions: ordered, whole, and without what could not be scored."""

from __future__ import annotations

import math

import numpy as np
import torch
from token_models import Faulty, random_model

from sparsity_audit.models.score import Resident, Scored, score
from sparsity_audit.tokens.divergence import js_divergence
from sparsity_audit.tokens.positions import COLUMNS, measure

SEQUENCES = [
    Scored(prompt=(1, 3), completion=(4, 5, 6, 2)),
    Scored(prompt=(1, 3, 8, 8, 8, 8), completion=(9, 2)),
    Scored(prompt=(1,), completion=tuple(range(3, 18))),
]


def measured(base, tuned, sequences=SEQUENCES, **options):
    options = {
        "vocab_size": 20,
        "top_k": 3,
        "top_p": None,
        "with_tops": (),
        "batch_tokens": 4096,
        "chunk_bytes": 1 << 20,
    } | options
    return measure(Resident(base), Resident(tuned), sequences, **options)


def test_rows_are_ordered_and_every_column_is_there() -> None:
    found = measured(random_model(0), random_model(1), batch_tokens=20, chunk_bytes=5000, top_p=0.9)
    lengths = [len(one.completion) for one in SEQUENCES]
    assert set(found.columns) == set(COLUMNS)
    assert found.columns["sequence"].tolist() == np.repeat(range(3), lengths).tolist()
    assert found.columns["position"].tolist() == [n for length in lengths for n in range(length)]
    assert found.columns["token"].tolist() == [t for one in SEQUENCES for t in one.completion]
    chunk = next(
        score(
            Resident(random_model(0)),
            Resident(random_model(1)),
            SEQUENCES[:1],
            vocab_size=20,
            batch_tokens=99,
            chunk_bytes=1 << 20,
        )
    )
    wanted = js_divergence(chunk.base, chunk.tuned).numpy()
    # Another batch: fp32 logits below 10 differ by some 1e-6, JS by no more.
    assert np.abs(found.columns["js"][:4] - wanted).max() < 1e-5


def test_tops_are_kept_for_the_sequences_asked_for_and_agree_with_the_columns() -> None:
    found = measured(random_model(0), random_model(1), with_tops=(0, 2), batch_tokens=20, chunk_bytes=5000)
    assert sorted(found.tops) == [0, 2]
    for number, tops in found.tops.items():
        mine = found.columns["sequence"] == number
        assert tops.base_ids.shape == (mine.sum(), 3)
        assert tops.base_ids[:, 0].tolist() == found.columns["top_base"][mine].tolist()
        assert tops.tuned_ids[:, 0].tolist() == found.columns["top_tuned"][mine].tolist()
        assert (np.diff(tops.tuned_logprobs, axis=1) <= 0).all()


def test_a_sequence_with_a_broken_position_is_left_out_whole_and_listed() -> None:
    def spoil(hidden, tokens, _mask):
        return torch.where((tokens == 9)[..., None], math.nan, hidden)

    found = measured(random_model(0), Faulty(1, hidden=spoil), with_tops=(0, 1, 2))
    assert [(one.sequence, one.position) for one in found.broken] == [(1, 1), (2, 7)]
    assert set(found.columns["sequence"].tolist()) == {0}
    assert sorted(found.tops) == [0]
    assert all(np.isfinite(found.columns[name]).all() for name in ("js", "entropy_base"))


def test_a_model_against_itself_differs_nowhere() -> None:
    found = measured(random_model(0), random_model(0), top_p=0.5)
    for name in ("js", "js_nucleus", "kl_base_tuned", "kl_tuned_base"):
        assert (found.columns[name] == 0).all(), name
    assert (found.columns["top_k_overlap"] == 1).all()
