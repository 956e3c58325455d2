"""Teacher forcing of two models: alignment, chunks, batches, padding, and one model at a time."""

from __future__ import annotations

import torch
from token_models import random_model

from sparsity_audit.models.score import (
    BYTES_PER_LOGIT,
    Chunk,
    Resident,
    Scored,
    log_probabilities,
    score,
    spill,
)

VOCAB = 20
TOLERANCE = 1e-5
"""Of log-probabilities: another shape of batch is another order of fp32 sums; logits here are below 10."""

GENERATOR = torch.Generator().manual_seed(0)
SEQUENCES = [
    Scored(
        prompt=(1, *torch.randint(3, 20, (p,), generator=GENERATOR).tolist()),
        completion=tuple(torch.randint(2, 20, (c,), generator=GENERATOR).tolist()),
    )
    for p, c in ((2, 5), (9, 1), (1, 17), (4, 4), (6, 11))
]


def scored(base, tuned, sequences=SEQUENCES, *, batch_tokens=4096, chunk_bytes=1 << 20, vocab_size=VOCAB):
    chunks = list(
        score(
            base, tuned, sequences, vocab_size=vocab_size, batch_tokens=batch_tokens, chunk_bytes=chunk_bytes
        )
    )
    parts = [torch.cat([getattr(c, name) for c in chunks]) for name in Chunk.__dataclass_fields__]
    order = (parts[0] * 1000 + parts[1]).argsort()
    return [part[order] for part in parts], chunks


def sides():
    return Resident(random_model(0)), Resident(random_model(1))


def test_each_position_has_the_distribution_before_its_token() -> None:
    (sequence, position, token, base, tuned), _ = scored(*sides())
    row = 0
    for number, one in enumerate(SEQUENCES):
        for place, wanted in enumerate(one.completion):
            ids = torch.tensor([[*one.prompt, *one.completion[:place]]])
            mask = torch.ones_like(ids, dtype=torch.bool)
            for seed, found in ((0, base), (1, tuned)):
                model = random_model(seed)
                alone = torch.log_softmax(model.logits(model.hidden_states(ids, mask))[0, -1].double(), dim=0)
                assert (found[row] - alone).abs().max() < TOLERANCE
            assert (int(sequence[row]), int(position[row]), int(token[row])) == (number, place, wanted)
            row += 1
    assert row == len(token)


def test_chunks_and_batches_change_rounding_alone() -> None:
    whole, _ = scored(*sides())
    for options in ({"batch_tokens": 1}, {"batch_tokens": 30}, {"chunk_bytes": 1}, {"chunk_bytes": 9000}):
        parts, _ = scored(*sides(), **options)
        for part, wanted in zip(parts[:3], whole[:3], strict=True):
            assert torch.equal(part, wanted)
        for part, wanted in zip(parts[3:], whole[3:], strict=True):
            assert (part - wanted).abs().max() < TOLERANCE


def test_a_chunk_holds_no_more_than_its_bytes() -> None:
    _, chunks = scored(*sides(), chunk_bytes=3 * BYTES_PER_LOGIT * VOCAB)
    assert max(len(chunk.token) for chunk in chunks) == 3
    _, chunks = scored(*sides(), chunk_bytes=1)
    assert {len(chunk.token) for chunk in chunks} == {1}


def test_one_model_at_a_time_gives_the_same_bits(tmp_path) -> None:
    whole, _ = scored(*sides(), batch_tokens=40)
    base = random_model(0)
    spilled = spill(base, SEQUENCES, tmp_path, batch_tokens=40)
    head = base.llama.lm_head
    base.llama.model = None  # what is left of the base is its head
    del base
    assert head.weight.shape[0] == VOCAB
    parts, _ = scored(spilled, Resident(random_model(1)), batch_tokens=40)
    for part, wanted in zip(parts, whole, strict=True):
        assert torch.equal(part, wanted)


def test_a_common_prefix_is_renormalised() -> None:
    (*_, base, _), _ = scored(*sides(), vocab_size=7)
    assert base.shape[1] == 7
    assert (base.exp().sum(dim=1) - 1).abs().max() < 1e-12


def test_rows_that_are_no_distribution_are_nan() -> None:
    inf = torch.inf
    rows = torch.tensor([[0.0, torch.nan], [0.0, inf], [-inf, -inf], [0.0, -inf]])
    found = log_probabilities(rows)
    assert found.isnan().all(dim=1).tolist() == [True, True, True, False]
    assert found[3].tolist() == [0.0, -inf]
