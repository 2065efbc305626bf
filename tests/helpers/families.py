"""Tiny models of every family of transformers, in its own class, and what is compared of a conversion."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from .weights import randomize

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 96}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Of a kind that Tessera does not have.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
}
GPT2 = {"vocab_size": 97, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
LATENT = {
    **SIZES,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}
DEEPSEEK_V3 = {**LATENT, "n_group": 4, "topk_group": 2}
# Tokens that configurations name, one or several, and settings that are no part of a model.
SETTINGS = {
    "bos_token_id": 5,
    "eos_token_id": [6, 7],
    "pad_token_id": 0,
    "initializer_range": 0.5,
    "attention_dropout": 0.25,
    "use_cache": False,
    "id2label": {0: "a", 1: "b", 2: "c"},
}
QWEN3_MOE = {
    **GROUPED,
    "head_dim": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
}


def _rope(rope_type: str, **others) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 5000.0, **others}}


# `family` or `family-what is particular`.
SAMPLES = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "llama-biases-llama3-tied": transformers.LlamaConfig(
        **GROUPED, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3, tie_word_embeddings=True
    ),
    "llama-head-yarn": transformers.LlamaConfig(
        **GROUPED, head_dim=24, rope_parameters={**YARN, "beta_fast": 16, "truncate": False}
    ),
    "llama-linear": transformers.LlamaConfig(**GROUPED, **_rope("linear", factor=2.0)),
    "llama-dynamic": transformers.LlamaConfig(**GROUPED, **_rope("dynamic", factor=2.0)),
    "llama-settings": transformers.LlamaConfig(**GROUPED, **SETTINGS, pretraining_tp=2, unknown_to_all=[1]),
    "llama-share-that-it-does-not-read": transformers.LlamaConfig(
        **GROUPED, **_rope("default", partial_rotary_factor=0.5)
    ),
    "mistral-window-tied": transformers.MistralConfig(
        **GROUPED, sliding_window=9, tie_word_embeddings=True, **_rope("linear", factor=4.0)
    ),
    "mistral-full": transformers.MistralConfig(**GROUPED, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**GROUPED, sliding_window=9, **SETTINGS),
    "qwen2-window-tied": transformers.Qwen2Config(
        **GROUPED,
        head_dim=24,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=2,
        tie_word_embeddings=True,
        rope_parameters=YARN,
    ),
    "qwen3": transformers.Qwen3Config(**GROUPED, head_dim=24, tie_word_embeddings=True),
    "qwen3-window": transformers.Qwen3Config(
        **GROUPED,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
        **_rope("dynamic", factor=2.0),
    ),
    "qwen3-window-of-no-layer": transformers.Qwen3Config(
        **GROUPED, head_dim=16, use_sliding_window=True, sliding_window=9, max_window_layers=8
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(**QWEN3_MOE, norm_topk_prob=True, **SETTINGS),
    "qwen3_moe-step-window-tied": transformers.Qwen3MoeConfig(
        **{**QWEN3_MOE, "num_hidden_layers": 4},
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        use_sliding_window=True,
        sliding_window=9,
        tie_word_embeddings=True,
        attention_bias=True,
        rope_parameters={**YARN, "attention_factor": 1.25},
    ),
    "qwen3_moe-dense": transformers.Qwen3MoeConfig(**QWEN3_MOE, mlp_only_layers=[0, 1, 2]),
    "mixtral": transformers.MixtralConfig(**GROUPED, router_jitter_noise=0.1, output_router_logits=True),
    "mixtral-window-tied": transformers.MixtralConfig(
        **GROUPED,
        head_dim=24,
        sliding_window=9,
        num_local_experts=4,
        tie_word_embeddings=True,
        rope_parameters=LLAMA3,
    ),
    "gpt2": transformers.GPT2Config(**GPT2),
    "gpt2-inner-untied": transformers.GPT2Config(
        **GPT2,
        n_inner=96,
        activation_function="gelu",
        tie_word_embeddings=False,
        summary_type="mean",
        reorder_and_upcast_attn=True,
        n_ctx=128,
    ),
    "deepseek_v2": transformers.DeepseekV2Config(**{**LATENT, "q_lora_rank": None}, aux_loss_alpha=0.001),
    "deepseek_v2-groups-yarn": transformers.DeepseekV2Config(
        **LATENT,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=4.0,
        attention_bias=True,
        rope_parameters=YARN,
    ),
    "deepseek_v2-groups-not-used": transformers.DeepseekV2Config(**LATENT, n_group=4, topk_group=2),
    "deepseek_v2-dense-biases": transformers.DeepseekV2Config(
        **{**LATENT, "first_k_dense_replace": 3}, mlp_bias=True, tie_word_embeddings=True
    ),
    # It claims a layer for multi-token prediction, as by default, which transformers' class does not have.
    "deepseek_v3": transformers.DeepseekV3Config(**DEEPSEEK_V3),
    "deepseek_v3-yarn": transformers.DeepseekV3Config(
        **DEEPSEEK_V3, rope_parameters=YARN, rope_interleave=False, num_mtp_layers=0
    ),
    "deepseek_v3-tied": transformers.DeepseekV3Config(**DEEPSEEK_V3, tie_word_embeddings=True),
    "deepseek_v3-dense": transformers.DeepseekV3Config(
        **{**DEEPSEEK_V3, "first_k_dense_replace": 3, "q_lora_rank": None}, num_mtp_layers=0
    ),
    "nanochat": transformers.NanoChatConfig(**GROUPED),
    "nanochat-head-biases-tied": transformers.NanoChatConfig(
        **GROUPED, head_dim=24, attention_bias=True, tie_word_embeddings=True, final_logit_softcapping=None
    ),
}


def family_of(sample: str) -> str:
    return sample.split("-")[0]


def family_model(sample: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A random tiny model of transformers' own class."""
    return randomize(transformers.AutoModelForCausalLM.from_config(SAMPLES[sample], dtype=dtype))


def save_family(sample: str, folder: Path, dtype: torch.dtype = torch.float32, **saving):
    """Saves such a model, and gives it."""
    model = family_model(sample, dtype)
    model.save_pretrained(folder, **saving)
    return model


def ids(vocab_size: int = 97, length: int = 40) -> torch.Tensor:
    """Two rows of random ids."""
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, vocab_size: int = 97) -> torch.Tensor:
    """Logits of such ids, in fp32."""
    return model.eval()(ids(vocab_size), use_cache=False).logits.float()


def weight_files(folder: Path) -> dict[str, bytes]:
    """The safetensors files of a directory, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def change_state(folder: Path, change) -> None:
    """Changes the tensors of a directory of one file in place."""
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def change_config(folder: Path, **changes) -> None:
    """Changes fields of a directory's configuration."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def loaded_config(folder: Path) -> dict:
    """A directory's configuration as transformers loads it, without what says where and how it was saved."""
    values = transformers.AutoConfig.from_pretrained(folder).to_dict()
    return {
        key: value for key, value in values.items() if key not in ("transformers_version", "_name_or_path")
    }
