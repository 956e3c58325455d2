"""Which files a checkpoint made of another takes along."""

from sparsity_audit.checkpoint.companions import choose_companions


def test_configuration_tokenizer_and_code_are_taken_weights_and_training_state_are_not() -> None:
    taken = [
        *(
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
        ),
        *("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
        *("modeling_x.py", "LICENSE", "preprocessor_config.json"),
    ]
    left = ["README.md", "trainer_state.json", "all_results.json"]
    weights = [
        *(
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "optimizer.pt",
            ".gitattributes",
        ),
        *("pytorch_model.bin.index.json", "training_args.bin", "a.gguf", "model.safetensors.partial"),
    ]
    found = choose_companions([*weights, *left, *taken])
    assert list(found.taken) == sorted(taken)
    assert list(found.left) == sorted(left)
