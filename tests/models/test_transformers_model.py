"""Models of `transformers` behind the protocol: tiny random ones, vocabulary and template of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sparsity_audit
from sparsity_audit.api.token_models import ModelSource
from sparsity_audit.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedFormatError,
    UsageError,
)
from sparsity_audit.lab.folder import resolve_base
from sparsity_audit.models.sample import sample

pytestmark = pytest.mark.extras

WORDS = ["<pad>", "<s>", "</s>", "<user>", "<bot>", *(f"w{n}" for n in range(40))]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def spread(model) -> None:
    """Larger weights than a fresh model has: its logits must say something."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.15)


def save(
    folder: Path, *, seed: int = 0, kind: str = "Llama", words=WORDS, template=TEMPLATE, **config
) -> Path:
    """A random model of that kind with a word-level tokenizer."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(seed)
    options = SMALL | {"vocab_size": len(words)} | config
    settings = getattr(transformers, f"{kind}Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    if seed:
        spread(model)
    model.save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    if template:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, **options):
    return ModelSource(**({"reference": folder, "device": "cpu", "dtype": "auto"} | options)).load()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return save(folder / "base", seed=1), save(folder / "tuned", seed=2)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Llama", {}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Mistral", {"sliding_window": 4}),
        ("Gemma2", {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0}),
        ("Granite", {"logits_scaling": 4.0}),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    ],
)
def test_sampling_with_the_cache_draws_what_the_model_itself_says(tmp_path, kind, config) -> None:
    model = load(save(tmp_path / "model", seed=1, kind=kind, **config))
    prompts = [[1, 5, 6], [1, 9, 10, 11, 12, 13, 14], [1, 7]]
    made = sample(
        model, prompts, seeds=[1, 2, 3], eos_ids=(), max_new_tokens=6, temperature=0.0, batch_tokens=4096
    )
    for prompt, one in zip(prompts, made, strict=True):
        tokens = list(prompt)
        for token in one.tokens:
            logits = model.own_logits(torch.tensor([tokens]))[0, -1]
            # Greedy, but for ties within rounding: fp32 logits here are below 10.
            assert logits.max() - logits[token] < 1e-4
            tokens.append(token)


def test_the_labs_folder_gives_the_same_through_either_loader() -> None:
    ours = ModelSource(reference="mix", device="cpu", dtype="auto").load()
    from sparsity_audit.models.transformers_model import load_transformers_model

    theirs = load_transformers_model(resolve_base("mix"), dtype="fp32")
    assert theirs.tokenizer.encode_prompt("12+34=") == ours.tokenizer.encode_prompt("12+34=")
    assert theirs.tokenizer.encode_completion("S#46<eos>") == ours.tokenizer.encode_completion("S#46<eos>")
    assert theirs.tokenizer.vocabulary() == ours.tokenizer.vocabulary()
    assert (theirs.tokenizer.eos_ids, theirs.context_tokens) == (ours.tokenizer.eos_ids, ours.context_tokens)
    prompts = [ours.tokenizer.encode_prompt(text) for text in ("12+34=", "1234+9876=", "5+5=")]
    options = {
        "seeds": [1, 2, 3],
        "eos_ids": (2,),
        "max_new_tokens": 35,
        "temperature": 1.0,
        "batch_tokens": 999,
    }
    assert sample(ours, prompts, **options) == sample(theirs, prompts, **options)


def test_diverge_of_chats_end_to_end_with_one_model_at_a_time(models, tmp_path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "w1 w2"}]},
        {"prompt": "w3 w4 w5"},
        {"messages": [{"role": "user", "content": "w1 " * 80}]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"prompts": path, "num_samples": 2, "max_new_tokens": 8}
    report = sparsity_audit.tokens_diverge(*models, output=tmp_path / "out", **options)
    assert report.base.loader == "transformers"
    assert report.prompts[0].text.split() == ["<user>", "w1", "w2", "<bot>"]
    assert [f.prompt for f in report.failed] == [2]
    assert "no room in a context of 64" in report.failed[0].reason
    for one in report.sets:
        assert one.summary.sequences == 4
        assert 0 < one.summary.mean_js.value < 0.7
    sequential = sparsity_audit.tokens_diverge(*models, sequential=True, **options)
    assert sequential == report
    same = sparsity_audit.tokens_diverge(models[0], models[0], **options)
    assert [one.summary.mean_js.value for one in same.sets] == [0.0, 0.0]


def test_a_missing_chat_template_is_the_prompts_failure_and_the_other_sides_can_serve(
    models, tmp_path
) -> None:
    plain = save(tmp_path / "plain", seed=3, template=None)
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "w1"}]}) + "\n")
    options = {"prompts": path, "max_new_tokens": 4}
    with pytest.raises(UsageError, match="has no chat template"):
        sparsity_audit.tokens_diverge(models[0], plain, **options)
    report = sparsity_audit.tokens_diverge(models[0], plain, template="base", **options)
    assert any("encoded as the base model expects" in note for note in report.notes)


def test_other_vocabularies_are_refused_with_the_difference_unless_the_prefix_is_asked_for(
    models, tmp_path
) -> None:
    longer = save(tmp_path / "longer", seed=4, words=[*WORDS, "<think>"])
    other = save(tmp_path / "other", seed=4, words=[*WORDS[:-1], "w99"])
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w1 w2"}\n')
    options = {"prompts": path, "max_new_tokens": 4}
    with pytest.raises(UsageError, match=r"no token in base, '<think>' in tuned"):
        sparsity_audit.tokens_diverge(models[0], longer, **options)
    with pytest.raises(UsageError, match=r"first id 44: 'w39' in base, 'w99' in tuned"):
        sparsity_audit.tokens_diverge(models[0], other, **options)
    report = sparsity_audit.tokens_diverge(
        models[0], longer, vocabulary="common-prefix", num_samples=8, **options
    )
    assert report.vocabulary.size == len(WORDS)
    assert any("first 45 ids" in note for note in report.notes)


def test_half_precision_that_overflows_fails_its_completions(models, tmp_path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(models[1])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e6)
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    transformers.AutoTokenizer.from_pretrained(models[1]).save_pretrained(broken)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w1 w2"}\n')
    with pytest.raises(UsageError, match="no numbers"):
        sparsity_audit.tokens_diverge(models[0], broken, prompts=path, max_new_tokens=4, dtype="fp16")


def test_what_is_no_causal_model_is_one_error(models, tmp_path) -> None:
    import transformers

    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=45, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
    t5.save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedFormatError, match="T5ForConditionalGeneration is not a causal"):
        load(tmp_path / "t5")
    bert = save(tmp_path / "bert", seed=1, kind="Bert")
    with pytest.raises(UnsupportedFormatError, match="is not causal"):
        load(bert)
    mamba = save(tmp_path / "mamba", seed=1, kind="Mamba", state_size=4)
    with pytest.raises(UnsupportedFormatError, match="recurrent"):
        load(mamba)


def test_what_cannot_be_loaded_is_one_error(models, tmp_path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such directory"):
        load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorruptCheckpointError, match="cannot load it"):
        load(tmp_path / "empty")
    with pytest.raises(UsageError, match="'gpu7' is not there"):
        load(models[0], device="gpu7")
    from safetensors.torch import load_file, save_file

    headless = save(tmp_path / "headless", seed=1)
    weights = load_file(headless / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpointError, match=r"1 weights are missing, first 'lm_head.weight'"):
        load(headless)


def test_cross_sampling_has_both_models_own_samples_at_its_ends(models, tmp_path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "w1 w2"}, {"prompt": "w3"}, {"messages": [{"role": "user", "content": "w4 w5"}]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = sparsity_audit.tokens_cross_sample(
        *models,
        prompts=path,
        verifier=lambda _line, text: len(text) % 2,
        thresholds=(0.0, 0.05, 100.0),
        controls=("random",),
        max_new_tokens=8,
    )
    by_key = {point.key: point for point in found.points}
    never, always = by_key["forward-js-threshold-100"], by_key["forward-js-threshold-0"]
    assert (never.switched, never.difference.value) == (0, 0.0)
    assert always.switched == always.tokens == by_key["reverse-alone"].tokens
    assert always.accuracy == found.tuned_accuracy
    assert 0 < by_key["forward-js-threshold-0.05"].switched < by_key["forward-js-threshold-0.05"].tokens


def test_the_lab_cross_samples_alike_through_either_loader() -> None:
    from sparsity_audit.models.transformers_model import load_transformers_model
    from sparsity_audit.tokens.intervention import cross_sample
    from sparsity_audit.tokens.rules import Above

    ours = [load(resolve_base(name)) for name in ("mix", "single")]
    theirs = [load_transformers_model(resolve_base(name), dtype="fp32") for name in ("mix", "single")]
    prompts = [ours[0].tokenizer.encode_prompt(text) for text in ("12+34=", "1234+9876=", "5+5=")]
    options = {
        "rule": Above(signal="js", threshold=0.1),
        "seeds": [1, 2, 3],
        "eos_ids": (2,),
        "max_new_tokens": 30,
        "temperature": 1.0,
        "batch_tokens": 999,
    }
    one, other = cross_sample(*ours, prompts, **options), cross_sample(*theirs, prompts, **options)
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.switched, other.switched)


def test_patching_a_model_with_tied_embeddings_leaves_no_trace(tmp_path) -> None:
    folders = [
        save(tmp_path / name, seed=seed, tie_word_embeddings=True)
        for name, seed in (("base", 1), ("tuned", 2))
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w1 w2"}\n{"prompt": "w3"}\n')
    report = sparsity_audit.tokens_patch(*folders, prompts=path, parts=("layer",), max_new_tokens=5)
    assert [row.name for row in report.rows if row.direction == "add"] == [
        "embed",
        "layer 0",
        "layer 1",
        "norm",
    ]
    again = sparsity_audit.tokens_patch(*folders, prompts=path, parts=("layer",), max_new_tokens=5)
    assert again == report
