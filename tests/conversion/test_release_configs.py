"""Configurations as public releases have them, in their own words: each goes round, with as many parameters.

The sizes are those of the models' `config.json`; there are no weights here, models are built without memory.
"""

import json

import pytest
import torch
import transformers

from tessera import TesseraConfig
from tessera.conversion.families import FAMILIES
from tessera.conversion.rules import model_shapes

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MISTRAL = {
    **_LLAMA,
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}
_QWEN = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_DEEPSEEK_SCALING = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
_DEEPSEEK_V2 = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {**_DEEPSEEK_SCALING, "mscale": 0.707, "mscale_all_dim": 0.707},
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
# Each with its parameters in billions, as far as its name or its paper says.
RELEASES = {
    "Llama-2-7b": (
        6.74,
        {
            **_LLAMA,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "num_key_value_heads": 32,
            "pretraining_tp": 1,
            "rope_scaling": None,
            "torch_dtype": "float16",
            "vocab_size": 32000,
        },
    ),
    "Llama-3.1-8B": (
        8.03,
        {
            **_LLAMA,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "torch_dtype": "bfloat16",
            "vocab_size": 128256,
        },
    ),
    "Mistral-7B-v0.1": (
        7.24,
        {**_MISTRAL, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000},
    ),
    "Mistral-7B-v0.3": (
        7.25,
        {**_MISTRAL, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
    ),
    "Qwen2.5-7B": (
        7.62,
        {
            **_QWEN,
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "eos_token_id": 151643,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "sliding_window": 131072,
            "use_mrope": False,
            "vocab_size": 152064,
        },
    ),
    "Qwen3-8B": (
        8.19,
        {
            **_QWEN,
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "sliding_window": None,
        },
    ),
    "Qwen3-30B-A3B": (
        30.53,
        {
            **_QWEN,
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
        },
    ),
    "Mixtral-8x7B": (
        46.70,
        {
            **_MISTRAL,
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "attention_dropout": 0.0,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "vocab_size": 32000,
        },
    ),
    "DeepSeek-V2-Lite": (
        15.71,
        {
            **_DEEPSEEK_V2,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 64,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
            "topk_method": "greedy",
        },
    ),
    "DeepSeek-V2": (
        235.74,
        {
            **_DEEPSEEK_V2,
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "n_group": 8,
            "n_routed_experts": 160,
            "num_attention_heads": 128,
            "num_hidden_layers": 60,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "routed_scaling_factor": 16.0,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
        },
    ),
    "DeepSeek-V3": (
        671.03,
        {
            **_DEEPSEEK_V2,
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            "bos_token_id": 0,
            "eos_token_id": 1,
            "ep_size": 1,
            "first_k_dense_replace": 3,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": 1536,
            "rope_scaling": {**_DEEPSEEK_SCALING, "mscale": 1.0, "mscale_all_dim": 1.0},
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "vocab_size": 129280,
        },
    ),
    "gpt2-xl": (
        1.56,
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
            "attn_pdrop": 0.1,
            "bos_token_id": 50256,
            "embd_pdrop": 0.1,
            "eos_token_id": 50256,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "n_ctx": 1024,
            "n_embd": 1600,
            "n_head": 25,
            "n_layer": 48,
            "n_positions": 1024,
            "output_past": True,
            "resid_pdrop": 0.1,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
    ),
}


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_goes_round_and_has_as_many_parameters(release, tmp_path):
    billions, values = RELEASES[release]
    family = FAMILIES[values["model_type"]]
    # What a Tessera directory holds is what goes back.
    family.config_from(values).save_pretrained(tmp_path / "ours")
    ours = TesseraConfig.from_pretrained(tmp_path / "ours")
    theirs = family.config_for(ours)
    theirs.dtype = ours.dtype
    theirs.save_pretrained(tmp_path / "back")
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text(json.dumps(values))
    source, back = (transformers.AutoConfig.from_pretrained(tmp_path / d) for d in ("source", "back"))
    where = ("transformers_version", "_name_or_path")
    one, other = ({k: v for k, v in c.to_dict().items() if k not in where} for c in (source, back))
    assert other == one

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(source)
    expected = sum(p.numel() for p in model.parameters())
    assert expected / 1e9 == pytest.approx(billions, abs=0.006)
    # In transformers' class the layers that predict further ahead are another model.
    ours.num_mtp_layers, ours.mtp_mlp_layer_types = 0, None
    shapes = model_shapes(ours)
    buffers = sum(shape.numel() for name, shape in shapes.items() if "e_score_correction_bias" in name)
    assert sum(shape.numel() for shape in shapes.values()) - buffers == expected
