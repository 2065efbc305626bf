"""Tiny models of every dialect, and mixtures that no preset has."""

from tessera import TesseraConfig, TesseraForCausalLM

from .weights import randomize

DIALECTS = ["bytegpt-tiny", "llama-tiny", "nanochat-tiny", "verse-tiny", "gpt2-tiny"]

# Tiles away from the dialect they come from. Each entry: preset, fields laid over it.
MIXTURES = {
    "latent-learned-layernorm": (
        "bytegpt-tiny",
        {"position_embedding_type": "learned", "norm_type": "layer_norm", "rope_parameters": None},
    ),
    "latent-sliding-lowrank-sigmoid": (
        "bytegpt-tiny",
        {
            "layer_types": "SL",
            "sliding_window": 5,
            "q_lora_rank": 16,
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "router_correction_bias": True,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
        },
    ),
    "moe-qknorm-softcap": (
        "llama-tiny",
        {
            "qk_norm": "before_rope",
            "attn_logit_softcapping": 5.0,
            "mlp_layer_types": "DS",
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "nanochat-moe-smear-gqa": (
        "nanochat-tiny",
        {
            "num_key_value_heads": 2,
            "mlp_layer_types": "S",
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "vocab_size": 250,
            "padded_vocab_size": 256,
        },
    ),
    "partial-rotary-interleaved-llama3": (
        "llama-tiny",
        {
            "vocab_size": 250,
            "padded_vocab_size": 256,
            "rope_interleave": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
}

EVERY_MODEL = [*DIALECTS, *MIXTURES]


def tiny_config(name: str, **overrides) -> TesseraConfig:
    """A config small enough for tests: short windows, so that 24 tokens reach past them; no dropout."""
    preset, fields = MIXTURES.get(name, (name, {}))
    base = {"attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = TesseraConfig.from_preset(preset, **{**base, **fields, **overrides})
    if config.sliding_window is not None and "sliding_window" not in overrides:
        config.sliding_window = 7
    return config


def tiny_model(name: str, seed: int = 0, **overrides) -> TesseraForCausalLM:
    """A tiny model with random weights, in eval mode."""
    return randomize(TesseraForCausalLM(tiny_config(name, **overrides)), seed)
