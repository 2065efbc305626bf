"""ByteGPT's own JSON means the same model here."""

import pytest
import torch

from tessera import TesseraConfig, TesseraForCausalLM
from tessera.conversion.model_args import config_from_model_args, is_model_args

# The configuration file that ByteGPT is trained with.
BYTEGPT = {
    "vocab_size": 256,
    "dim": 512,
    "inter_dim": 2048,
    "moe_inter_dim": 512,
    "n_layers": 12,
    "n_dense_layers": 1,
    "n_heads": 8,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "n_activated_experts": 4,
    "route_scale": 1.0,
    "q_lora_rank": 0,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "mscale": 0.707,
}
SMALL = {
    "dim": 32,
    "inter_dim": 64,
    "moe_inter_dim": 16,
    "n_layers": 3,
    "n_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


def test_the_file_of_bytegpt_gives_the_preset_save_for_its_dense_layers():
    config = config_from_model_args(BYTEGPT)
    preset = TesseraConfig.from_preset("bytegpt", mlp_layer_types="D" + "S" * 11, router_aux_loss_coef=0.0)
    ours, theirs = config.to_dict(), preset.to_dict()
    assert {key: (ours[key], theirs[key]) for key in theirs if ours[key] != theirs[key]} == {}
    assert config.q_lora_rank is None
    assert config.mlp_layer_types == ["dense"] + ["sparse"] * 11


def test_every_size_lands_in_its_field():
    args = {
        "vocab_size": 300,
        "dim": 64,
        "inter_dim": 96,
        "moe_inter_dim": 24,
        "n_layers": 5,
        "n_heads": 4,
        "n_dense_layers": 2,
        "n_routed_experts": 8,
        "n_shared_experts": 3,
        "n_activated_experts": 2,
        "n_expert_groups": 4,
        "n_limited_groups": 2,
        "score_func": "sigmoid",
        "route_scale": 2.5,
        "q_lora_rank": 12,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 10,
        "v_head_dim": 14,
        "max_seq_len": 2000,
        "original_seq_len": 500,
        "rope_theta": 5e4,
        "rope_factor": 4,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.5,
        "max_batch_size": 1,
        "dtype": "fp8",
    }
    config = config_from_model_args(args)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (300, 64, 96)
    assert (config.moe_intermediate_size, config.num_hidden_layers, config.num_attention_heads) == (24, 5, 4)
    assert config.mlp_layer_types == ["dense"] * 2 + ["sparse"] * 3
    assert (config.n_routed_experts, config.n_shared_experts, config.num_experts_per_tok) == (8, 3, 2)
    assert (config.n_group, config.topk_group) == (4, 2)
    assert (config.scoring_func, config.norm_topk_prob, config.routed_scaling_factor) == (
        "sigmoid",
        True,
        2.5,
    )
    assert (config.q_lora_rank, config.kv_lora_rank) == (12, 20)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (6, 10, 14)
    assert config.max_position_embeddings == 2000
    assert config.dtype is None
    expected = {
        "rope_type": "yarn",
        "rope_theta": 5e4,
        "factor": 4,
        "original_max_position_embeddings": 500,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.5,
        "mscale_all_dim": 0.5,
    }
    assert expected.items() <= config.rope_parameters.items()


def test_yarn_is_off_where_the_context_is_not_extended():
    config = config_from_model_args({**SMALL, "max_seq_len": 1024, "original_seq_len": 1024})
    assert config.rope_parameters["rope_type"] == "default"
    assert "mscale" not in config.rope_parameters


@torch.no_grad()
@pytest.mark.parametrize("dense", [0, 1, 3, 27])
def test_dense_layers_come_first_and_may_be_all(dense):
    """DeepSeek's 671B file has 3, its 16B one 1; as many as there are layers leaves no experts."""
    config = config_from_model_args({**SMALL, "n_dense_layers": dense})
    first = min(dense, 3)
    assert config.mlp_layer_types == ["dense"] * first + ["sparse"] * (3 - first)
    assert (config.n_routed_experts, config.num_experts_per_tok) == ((16, 4) if first < 3 else (0, 0))
    assert TesseraForCausalLM(config).eval()(torch.arange(9)[None]).logits.isfinite().all()


def test_overrides_are_tessera_fields_laid_over_it():
    config = config_from_model_args(BYTEGPT, mlp_layer_types="DS", vocab_size=260)
    assert (config.mlp_layer_types[:3], config.vocab_size) == (["dense", "sparse", "dense"], 260)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"n_layer": 3}, "ModelArgs has no 'n_layer'; did you mean 'n_layers'"),
        ({"wibble": 3}, "ModelArgs has no 'wibble'$"),
        ({"n_layers": "12"}, "n_layers must be a whole number, got '12'"),
        ({"n_layers": 12.0}, "n_layers must be a whole number, got 12.0"),
        ({"n_layers": True}, "n_layers must be a whole number, got True"),
        ({"dim": None}, "dim must be a whole number, got None"),
        ({"q_lora_rank": None}, "q_lora_rank must be a whole number"),
        ({"route_scale": "1"}, "route_scale must be a number, got '1'"),
        ({"mscale": [1]}, "mscale must be a number"),
        ({"score_func": 3}, "score_func must be a string"),
        ({"n_dense_layers": -1}, "n_dense_layers must be at least 0, got -1"),
        ({"n_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"n_activated_experts": 17}, r"num_experts_per_tok must lie between 1 and n_routed_experts \(16\)"),
        ({"qk_rope_head_dim": 31}, "rotated width of a head must be even"),
        ({"n_expert_groups": 3}, "does not divide into n_group"),
        ({"rope_factor": 0}, "factor must be a number of at least 1"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(args, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        config_from_model_args({**BYTEGPT, **args})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("values", "expected"), [(BYTEGPT, True), ({"hidden_size": 3}, False), ({}, False)])
def test_model_args_are_told_from_a_tessera_configuration(values, expected):
    assert is_model_args(values) is expected
    assert not is_model_args(TesseraConfig.from_preset("bytegpt").to_dict())
