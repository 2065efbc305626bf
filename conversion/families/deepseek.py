"""DeepSeek-V2 and DeepSeek-V3: latent attention, dense layers first and then sparse ones with shared experts.

What belongs here: families with multi-head latent attention. V2 routes by softmax, with or without a limit on
groups; V3 by sigmoid with a correction bias, and has layers for multi-token prediction.
"""

from typing import Any

from transformers import PreTrainedConfig

from tessera.modeling.configuration_tessera import TesseraConfig

from .experts import no_experts, single_experts
from .family import DECODER, FREQUENCIES, LLAMA_NAMES, Family, same_names

_LATENT = (
    *DECODER,
    "attention_bias",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)


def _layers_from(theirs: PreTrainedConfig) -> dict[str, Any]:
    if not theirs.n_shared_experts:
        raise ValueError("n_shared_experts must be at least 1")
    if theirs.num_key_value_heads != theirs.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads ({theirs.num_key_value_heads}) must equal num_attention_heads "
            f"({theirs.num_attention_heads}): latent attention expands one latent to all heads"
        )
    depth = theirs.num_hidden_layers
    dense = min(theirs.first_k_dense_replace, depth)
    return {
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (depth - dense),
        **({} if dense < depth else no_experts()),
    }


def _layers_for(ours: TesseraConfig) -> dict[str, Any]:
    dense = [kind == "dense" for kind in ours.mlp_layer_types]
    values = {
        "first_k_dense_replace": dense.index(False) if False in dense else len(dense),
        "num_key_value_heads": ours.num_attention_heads,
    }
    if all(dense):
        # The family has these in any case; no layer looks at them.
        values |= dict.fromkeys(("n_shared_experts", "n_routed_experts", "num_experts_per_tok"), 1)
        values["moe_intermediate_size"] = 1
    return values


def _v2_from(theirs: PreTrainedConfig) -> dict[str, Any]:
    limited = theirs.topk_method == "group_limited_greedy"
    return {
        **_layers_from(theirs),
        # Without the limit the class does not look at these two.
        "n_group": theirs.n_group if limited else 1,
        "topk_group": theirs.topk_group if limited else 1,
    }


def _v2_for(ours: TesseraConfig) -> dict[str, Any]:
    return {
        **_layers_for(ours),
        "topk_method": "group_limited_greedy" if ours.n_group > 1 else "greedy",
        "n_group": ours.n_group,
        "topk_group": ours.topk_group,
    }


DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    fields=same_names(*_LATENT, "mlp_bias", attention_output_bias="attention_bias"),
    fixed={"attention_type": "latent", "rope_interleave": True},
    required={
        # Two of its norms have this epsilon whatever the configuration says.
        "rms_norm_eps": (1e-6,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        # transformers' class does not look at it, DeepSeek's own code does: with True they are two models.
        "norm_topk_prob": (False, None),
        "moe_layer_freq": (1,),
    },
    rules=[*single_experts(), *LLAMA_NAMES],
    packed=LLAMA_NAMES,
    ignored=FREQUENCIES,
    derive=_v2_from,
    derive_theirs=_v2_for,
)


def _v3_from(theirs: PreTrainedConfig) -> dict[str, Any]:
    layers = _layers_from(theirs)
    sparse = "sparse" in layers["mlp_layer_types"]
    # Layers that predict further ahead always have experts, so a model without has none of these.
    ahead = theirs.num_mtp_layers if sparse else 0
    return {
        **layers,
        "num_mtp_layers": ahead,
        "mtp_mlp_layer_types": ["sparse"] * ahead or None,
        "router_correction_bias": sparse,
    }


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    fields=same_names(
        *_LATENT,
        "rope_interleave",
        "n_group",
        "topk_group",
        "norm_topk_prob",
        attention_output_bias="attention_bias",
    ),
    fixed={"attention_type": "latent", "scoring_func": "sigmoid"},
    required={
        "rms_norm_eps": (1e-6,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
    },
    rules=[*single_experts(), *LLAMA_NAMES],
    packed=LLAMA_NAMES,
    ignored=FREQUENCIES,
    predicts_ahead=True,
    repeated={
        "model.embed_tokens.weight": "model.layers.{i}.embed_tokens.weight",
        "lm_head.weight": "model.layers.{i}.shared_head.head.weight",
    },
    derive=_v3_from,
    derive_theirs=lambda ours: _layers_for(ours) | {"num_mtp_layers": ours.num_mtp_layers},
)
