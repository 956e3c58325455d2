import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.align.roles import Role, role_of

UNTIED = {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("name", "layer", "module", "kind"),
    [
        # Llama, Mistral, Qwen
        ("model.embed_tokens.weight", None, "embed", "embedding"),
        ("lm_head.weight", None, "head", "head"),
        ("model.norm.weight", None, "norm", "norm"),
        ("model.layers.31.self_attn.q_proj.weight", 31, "q_proj", "matrix"),
        ("model.layers.0.self_attn.k_proj.bias", 0, "bias", "bias"),
        ("model.layers.0.self_attn.o_proj.weight", 0, "o_proj", "matrix"),
        ("model.layers.0.mlp.gate_proj.weight", 0, "gate_proj", "matrix"),
        ("model.layers.10.mlp.down_proj.weight", 10, "down_proj", "matrix"),
        ("model.layers.0.input_layernorm.weight", 0, "norm", "norm"),
        ("model.layers.0.self_attn.q_norm.weight", 0, "norm", "norm"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", 0, "other", "other"),
        # Gemma
        ("model.layers.3.pre_feedforward_layernorm.weight", 3, "norm", "norm"),
        # Phi
        ("model.layers.0.self_attn.qkv_proj.weight", 0, "qkv_proj", "matrix"),
        ("model.layers.0.self_attn.qkv_proj.weight:v_proj", 0, "v_proj", "matrix"),
        ("model.layers.0.mlp.gate_up_proj.weight:up_proj", 0, "up_proj", "matrix"),
        ("model.layers.0.self_attn.dense.weight", 0, "o_proj", "matrix"),
        ("model.layers.0.mlp.fc1.weight", 0, "up_proj", "matrix"),
        ("model.final_layernorm.bias", None, "norm", "norm"),
        ("lm_head.bias", None, "bias", "bias"),
        # GPT-2
        ("transformer.wte.weight", None, "embed", "embedding"),
        ("wpe.weight", None, "embed", "embedding"),
        ("transformer.h.11.ln_1.weight", 11, "norm", "norm"),
        ("transformer.ln_f.bias", None, "norm", "norm"),
        ("h.0.attn.c_attn.weight", 0, "qkv_proj", "matrix"),
        ("h.0.attn.c_proj.weight", 0, "o_proj", "matrix"),
        ("h.0.mlp.c_fc.weight", 0, "up_proj", "matrix"),
        ("h.0.mlp.c_proj.weight", 0, "down_proj", "matrix"),
        ("h.0.attn.bias", 0, "other", "other"),
        ("h.0.attn.c_attn.bias", 0, "bias", "bias"),
        # GPT-NeoX
        ("gpt_neox.embed_in.weight", None, "embed", "embedding"),
        ("embed_out.weight", None, "head", "head"),
        ("gpt_neox.layers.5.attention.query_key_value.weight", 5, "qkv_proj", "matrix"),
        ("gpt_neox.layers.5.attention.query_key_value.bias", 5, "bias", "bias"),
        ("gpt_neox.layers.5.attention.dense.weight", 5, "o_proj", "matrix"),
        ("gpt_neox.layers.5.mlp.dense_h_to_4h.weight", 5, "up_proj", "matrix"),
        ("gpt_neox.layers.5.mlp.dense_4h_to_h.weight", 5, "down_proj", "matrix"),
        ("gpt_neox.layers.5.attention.masked_bias", 5, "other", "other"),
        ("gpt_neox.layers.5.attention.bias", 5, "other", "other"),
        # Falcon
        ("transformer.word_embeddings.weight", None, "embed", "embedding"),
        ("transformer.h.0.self_attention.query_key_value.weight", 0, "qkv_proj", "matrix"),
        ("transformer.h.0.self_attention.dense.weight", 0, "o_proj", "matrix"),
        ("transformer.h.0.ln_attn.weight", 0, "norm", "norm"),
        # OPT
        ("model.decoder.embed_positions.weight", None, "embed", "embedding"),
        ("model.decoder.layers.2.self_attn.out_proj.weight", 2, "o_proj", "matrix"),
        ("model.decoder.layers.2.fc2.weight", 2, "down_proj", "matrix"),
        ("model.decoder.layers.2.self_attn_layer_norm.bias", 2, "norm", "norm"),
        # BERT
        ("embeddings.word_embeddings.weight", None, "embed", "embedding"),
        ("bert.embeddings.position_embeddings.weight", None, "embed", "embedding"),
        ("embeddings.LayerNorm.weight", None, "norm", "norm"),
        ("embeddings.position_ids", None, "other", "other"),
        ("encoder.layer.0.attention.self.query.weight", 0, "q_proj", "matrix"),
        ("encoder.layer.0.attention.self.value.bias", 0, "bias", "bias"),
        ("encoder.layer.0.attention.output.dense.weight", 0, "o_proj", "matrix"),
        ("encoder.layer.0.attention.output.LayerNorm.bias", 0, "norm", "norm"),
        ("encoder.layer.0.intermediate.dense.weight", 0, "up_proj", "matrix"),
        ("encoder.layer.0.output.dense.weight", 0, "down_proj", "matrix"),
        ("pooler.dense.weight", None, "other", "matrix"),
        ("pooler.dense.bias", None, "bias", "bias"),
        ("cls.predictions.decoder.weight", None, "head", "head"),
        # Mixtures
        ("model.layers.1.block_sparse_moe.gate.weight", 1, "router", "router"),
        ("model.layers.1.mlp.gate.weight", 1, "router", "router"),
        ("model.layers.1.mlp.shared_expert_gate.weight", 1, "router", "router"),
        ("model.layers.1.mlp.shared_expert.up_proj.weight", 1, "up_proj", "matrix"),
        ("model.layers.1.mlp.experts.gate_up_proj", 1, "gate_up_proj", "matrix"),
        # Others
        ("score.weight", None, "other", "matrix"),
        ("module.model.layers.7._orig_mod.mlp.up_proj.weight", 7, "up_proj", "matrix"),
        ("v_head.summary.bias", None, "bias", "bias"),
    ],
)
def test_real_names_have_their_roles(name, layer, module, kind):
    role = role_of(name, UNTIED)
    assert (role.layer, role.module, role.kind, role.expert) == (layer, module, kind, None)


@pytest.mark.parametrize(("weight", "module"), [("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")])
def test_experts_have_a_number_and_the_module_of_their_matrix(weight, module):
    role = role_of(f"model.layers.4.block_sparse_moe.experts.7.{weight}.weight", UNTIED)
    assert role == Role(layer=4, module=module, kind="matrix", expert=7, stack="layers")


def test_towers_do_not_share_their_layers():
    text = role_of("language_model.model.layers.0.mlp.up_proj.weight", UNTIED)
    vision = role_of("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", UNTIED)
    assert (text.stack, vision.stack) == ("layers", "vision_tower.vision_model.encoder.layers")


def test_a_head_stored_alone_by_a_tied_model_is_the_embedding():
    assert role_of("lm_head.weight", {"tie_word_embeddings": True}).kind == "embedding"
    assert role_of("lm_head.weight", {}).kind == "head"
    assert role_of("lm_head.bias", {"tie_word_embeddings": True}).kind == "bias"


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.sampled_from(["model", "layers", "0", "x", "norm", "weight", "bias", "experts", "", ":q"]))
)
def test_any_name_has_a_role(parts):
    assert isinstance(role_of(".".join(parts), {}), Role)
