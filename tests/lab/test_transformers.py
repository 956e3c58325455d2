"""The lab's folders in the hands of `transformers`: same logits, same tokens, same greedy completions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsity_audit.lab.folder import load_model, resolve_base, save_model
from sparsity_audit.lab.model import SIZES, Llama, initialise
from sparsity_audit.lab.rollout import greedy, pad_prompts, sample
from sparsity_audit.lab.tasks import Addition
from sparsity_audit.lab.vocabulary import EOS, PAD, TOKENS, decode, encode, encode_prompt

pytestmark = pytest.mark.extras

TASK = Addition()
TOLERANCE = 1e-5
"""Of logits in fp32, relative to the largest of them (about 20): another order of sums, some ULP."""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def theirs(folder: Path) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def problems(num: int) -> tuple:
    return TASK.sample(num, lengths={1: 1, 2: 1, 3: 1, 4: 1}, generator=torch.Generator().manual_seed(0))


def logits_differ(ours: Llama, folder: Path) -> float:
    """The largest difference of logits on real rollouts, relative to the largest logit."""
    made = sample(
        ours,
        problems(16),
        task=TASK,
        num_samples=1,
        max_new_tokens=35,
        temperature=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    mask = made.attention_mask
    with torch.no_grad():
        own = ours(made.tokens, mask)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        other = theirs(folder)(made.tokens, attention_mask=mask.long(), position_ids=positions).logits
    return float((own - other)[mask].abs().max() / own[mask].abs().max())


@pytest.mark.parametrize("name", ["mix", "single"])
def test_logits_of_the_shipped_bases_are_those_of_transformers(name: str) -> None:
    assert logits_differ(load_model(resolve_base(name)), resolve_base(name)) < TOLERANCE


@pytest.mark.parametrize("size", SIZES)
def test_logits_of_every_size_are_those_of_transformers(size: str, tmp_path: Path) -> None:
    model = initialise(SIZES[size], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    save_model(model, tmp_path / size, dtype="fp32")
    assert logits_differ(model, tmp_path / size) < TOLERANCE


def test_greedy_completions_are_those_of_generate() -> None:
    folder = resolve_base("mix")
    made = greedy(load_model(folder), problems(64), task=TASK, max_new_tokens=35)
    prompts, mask = pad_prompts(problems(64))
    found = theirs(folder).generate(prompts, attention_mask=mask.long(), do_sample=False, max_new_tokens=35)
    assert torch.equal(found[:, prompts.shape[1] :], made.completions)


def test_gradients_are_those_of_transformers() -> None:
    folder = resolve_base("mix")
    ours, other = load_model(folder), theirs(folder)
    tokens = torch.tensor([encode_prompt("1234+5678=" + TASK.write(problems(1)[0], "S"))])
    for logits in (ours(tokens), other(tokens).logits):
        torch.log_softmax(logits, -1).gather(-1, tokens.unsqueeze(-1)).mean().backward()
    gradients = dict(other.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(gradients)
    for name, weight in ours.named_parameters():
        scale = weight.grad.abs().max()
        assert (weight.grad - gradients[name].grad).abs().max() < 1e-4 * scale, name


def test_the_tokenizer_loads_and_encodes_and_decodes_alike() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_base("mix"))
    assert len(tokenizer) == 20
    assert tokenizer.convert_ids_to_tokens(range(20)) == list(TOKENS)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, EOS)
    for problem in problems(32):
        assert tokenizer(problem.prompt)["input_ids"] == encode_prompt(problem.prompt)
        for fmt in TASK.formats:
            text = TASK.write(problem, fmt)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids == encode(text)
            assert tokenizer.decode(ids) == text == decode(ids)


def test_the_tokenizer_pads_on_the_left_as_the_lab_does() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_base("mix"))
    found = tokenizer([problem.prompt for problem in problems(8)], padding=True, return_tensors="pt")
    prompts, mask = pad_prompts(problems(8))
    assert torch.equal(found["input_ids"], prompts)
    assert torch.equal(found["attention_mask"].bool(), mask)


def test_a_character_outside_the_alphabet_is_an_error_there_too() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_base("mix"))
    with pytest.raises(Exception, match=r"\[UNK\]|unk"):
        tokenizer("12 + 34")


def test_a_folder_that_transformers_saved_again_loads_and_keeps_its_weights(tmp_path: Path) -> None:
    theirs(resolve_base("mix")).save_pretrained(tmp_path / "again")
    first, again = load_model(resolve_base("mix")), load_model(tmp_path / "again")
    assert first.config == again.config
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, first.state_dict()[name])
