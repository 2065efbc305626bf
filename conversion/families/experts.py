"""Mixtures of experts with grouped-query attention: Mixtral and Qwen3-MoE; and how experts are stored.

What belongs here: families with a softmax router and no shared experts, and the rules of single experts,
which other families use too. The releases have one tensor an expert; transformers stacks them when it loads,
and saves them either way.
"""

from typing import Any

from transformers import PreTrainedConfig

from tessera.modeling.configuration_tessera import TesseraConfig

from ..rules import UNSTACKED, UNSTACKED_PAIRS, Rule
from .family import DECODER, EXPERT_COUNTS, FREQUENCIES, GROUPED, LLAMA_NAMES, Family, same_names
from .heads import head_dim_for, head_dim_from, one_window_for, one_window_from


def single_experts(
    block: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> list[Rule]:
    """Rules for experts that are stored one by one.

    Args:
        block: their name for the feed-forward layer.
        gate, up, down: their names for the three matrices of an expert.
    """
    expert = f"model.layers.{{i}}.{block}.experts.{{e}}"
    return [
        Rule(
            "model.layers.{i}.mlp.experts.gate_up_proj",
            (f"{expert}.{gate}.weight", f"{expert}.{up}.weight"),
            UNSTACKED_PAIRS,
        ),
        Rule("model.layers.{i}.mlp.experts.down_proj", f"{expert}.{down}.weight", UNSTACKED),
    ]


def no_experts() -> dict[str, Any]:
    """Fields of Tessera for a model without sparse layers, whatever its configuration says of experts."""
    return dict.fromkeys(EXPERT_COUNTS, 0)


def _all_sparse(theirs: PreTrainedConfig) -> dict[str, Any]:
    return {
        "mlp_layer_types": ["sparse"] * theirs.num_hidden_layers,
        **head_dim_from(theirs),
        **one_window_from(theirs),
    }


def _mixtral_for(ours: TesseraConfig) -> dict[str, Any]:
    values = {**head_dim_for(ours), **one_window_for(ours)}
    if "sparse" not in ours.mlp_layer_types:
        # It will be refused, for being dense and not for having no number here.
        values |= {"intermediate_size": 8, "num_local_experts": 1, "num_experts_per_tok": 1}
    return values


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    fields=same_names(
        *(name for name in GROUPED if name != "intermediate_size"),
        "num_experts_per_tok",
        "router_aux_loss_coef",
        "output_router_logits",
        moe_intermediate_size="intermediate_size",
        n_routed_experts="num_local_experts",
    ),
    fixed={"norm_topk_prob": True},
    rules=[
        *single_experts("block_sparse_moe", "w1", "w3", "w2"),
        Rule("model.layers.{i}.mlp.gate.weight", "model.layers.{i}.block_sparse_moe.gate.weight"),
        *LLAMA_NAMES,
    ],
    packed=LLAMA_NAMES,
    ignored=FREQUENCIES,
    derive=_all_sparse,
    derive_theirs=_mixtral_for,
)


def _qwen3_moe_from(theirs: PreTrainedConfig) -> dict[str, Any]:
    step, depth = theirs.decoder_sparse_step, theirs.num_hidden_layers
    if step < 1:
        raise ValueError(f"decoder_sparse_step must be at least 1, got {step}")
    sparse = {i for i in range(step - 1, depth, step) if theirs.num_experts} - set(theirs.mlp_only_layers)
    kinds = ["sparse" if i in sparse else "dense" for i in range(depth)]
    return {
        "mlp_layer_types": kinds,
        **head_dim_from(theirs),
        **one_window_from(theirs),
        **({} if sparse else no_experts()),
    }


def _qwen3_moe_for(ours: TesseraConfig) -> dict[str, Any]:
    dense = [i for i, kind in enumerate(ours.mlp_layer_types) if kind == "dense"]
    window = one_window_for(ours)
    values = {
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
        "use_sliding_window": window["sliding_window"] is not None,
        **window,
        **head_dim_for(ours),
    }
    if len(dense) == ours.num_hidden_layers:
        # The family has a number in any case; no layer looks at it.
        values["moe_intermediate_size"] = ours.moe_intermediate_size or ours.intermediate_size
    return values


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    fields=same_names(
        *DECODER,
        "num_key_value_heads",
        "attention_bias",
        "moe_intermediate_size",
        "num_experts_per_tok",
        "norm_topk_prob",
        "router_aux_loss_coef",
        "output_router_logits",
        attention_output_bias="attention_bias",
        n_routed_experts="num_experts",
    ),
    fixed={"qk_norm": "before_rope"},
    rules=[*single_experts(), *LLAMA_NAMES],
    packed=LLAMA_NAMES,
    ignored=FREQUENCIES,
    derive=_qwen3_moe_from,
    derive_theirs=_qwen3_moe_for,
)
