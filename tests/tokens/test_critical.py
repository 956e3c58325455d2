"""Forced substitution: what is kept, what is put in its place, and what follows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from token_models import random_model
from token_policies import WrittenModel

from sparsity_audit.models.score import Scored, log_probabilities
from sparsity_audit.tokens.critical import Place, certainty, continuations, read_positions, substitutes

MODEL = random_model(3, spread=3.2)
SEQUENCES = (
    Scored(prompt=(1, 5, 6), completion=(7, 8, 9, 2)),
    Scored(prompt=(1, 4), completion=(3, 3)),
)


def read(model=MODEL, sequences=SEQUENCES, *, seed=0, vocab_size=20, **options):
    defaults = {"never": (0,), "batch_tokens": 1000, "chunk_bytes": 1 << 20}
    return read_positions(model, sequences, seed=seed, vocab_size=vocab_size, **{**defaults, **options})


def go_on(places, reading, *, model=MODEL, num=2, limit=6, **options):
    defaults = {"seed": 0, "eos_ids": (2,), "temperature": 1.0, "batch_tokens": 1000}
    return continuations(
        model, SEQUENCES, places, reading, num=num, max_new_tokens=limit, **{**defaults, **options}
    )


def test_certainty_is_one_less_the_entropys_share_of_its_maximum() -> None:
    rows = log_probabilities(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -math.inf, -math.inf, -math.inf]]))
    assert certainty(rows).tolist() == pytest.approx([0.0, 1.0])
    half = log_probabilities(torch.tensor([[0.0, 0.0, -math.inf, -math.inf]]))
    assert float(certainty(half)) == pytest.approx(0.5)
    assert float(certainty(log_probabilities(torch.tensor([[3.0]])))) == 1.0


def test_a_substitute_is_another_token_that_can_occur() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, -math.inf]]).repeat(200, 1)
    noise = torch.empty(200, 4).exponential_(generator=torch.Generator().manual_seed(0))
    found = substitutes(logits, torch.ones(200, dtype=torch.int64), never=(0,), noise=noise)
    assert set(found.tolist()) == {2}
    alone = substitutes(logits[:1], torch.tensor([2]), never=(0, 1), noise=noise[:1])
    assert alone.tolist() == [-1]


def test_readings_are_in_place_whatever_the_chunks_and_batches() -> None:
    found = read()
    assert [len(row) for row in found.certainty] == [4, 2]
    for options in ({"chunk_bytes": 1}, {"batch_tokens": 4}):
        again = read(**options)
        for name in ("certainty", "kept_probability"):
            for one, other in zip(getattr(found, name), getattr(again, name), strict=True):
                # float32 logits in other shapes: rounding
                assert one == pytest.approx(other, abs=1e-5)
        for one, other in zip(found.substitute, again.substitute, strict=True):
            assert np.array_equal(one, other)
    for one, sequence in zip(found.substitute, SEQUENCES, strict=True):
        assert not (one == np.array(sequence.completion)).any()
        assert not (one == 0).any()


def test_continuations_keep_the_prefix_force_the_token_and_respect_the_limit() -> None:
    reading = read()
    places = [Place(sequence=0, position=2), Place(sequence=1, position=0)]
    found = go_on(places, reading)
    assert len(found) == 2 * 2 * 2
    for one in found:
        completion = SEQUENCES[one.place.sequence].completion
        position = one.place.position
        assert one.tokens[:position] == completion[:position]
        other = reading.substitute[one.place.sequence][position]
        assert one.tokens[position] == (completion[position] if one.is_kept else other)
        assert position < len(one.tokens) <= 6


def test_a_forced_end_is_the_end() -> None:
    found = go_on([Place(sequence=0, position=3)], read(), num=1)
    kept = next(one for one in found if one.is_kept)
    assert kept.tokens == SEQUENCES[0].completion


def test_a_continuation_does_not_depend_on_the_other_places() -> None:
    reading = read()
    first, second = Place(sequence=0, position=1), Place(sequence=1, position=1)
    together = go_on([first, second], reading)
    assert [one for one in together if one.place == second] == go_on([second], reading)


def test_a_place_without_another_token_gives_nothing() -> None:
    certain = WrittenModel(lambda _seen: [0, 0, 0, 1], vocab_size=4)
    reading = read(certain, (Scored(prompt=(1,), completion=(3, 3)),), vocab_size=4)
    assert reading.substitute[0].tolist() == [-1, -1]
    assert go_on([Place(sequence=0, position=0)], reading, model=certain) == []
