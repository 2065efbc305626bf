"""What a configuration costs: parameters, floating-point operations and cache, counted on a model without
memory.

This file is for the package's own tools and does not travel to the Hub.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .configuration_tessera import TesseraConfig
from .feed_forward import TesseraExperts, TesseraRouter, TesseraUngatedExperts
from .layers import TesseraGate
from .modeling_tessera import TesseraForCausalLM


@dataclass(frozen=True)
class Costs:
    """Sizes of a model.

    Attributes:
        parameters: all of them; a tied head counts once.
        active: those that one token uses, with K of E routed experts.
        embedding: tables that are looked up and not multiplied with: tokens, positions, value embeddings.
        training_flops: per token, forward and backward at the longest context or at the length asked for; a
            multiply-add is two operations, attention is causal and counted where it sees, recomputation is
            not counted.
        cache_bytes: per token and sequence in bf16, over all layers; sliding layers stop growing at their
            window.
    """

    parameters: int
    active: int
    embedding: int
    training_flops: int
    cache_bytes: int


def count_costs(config: TesseraConfig, length: int | None = None) -> Costs:
    """Counts the costs of a configuration; nothing is allocated.

    Args:
        config: the model.
        length: tokens in a row; default: the model's context.
    """
    with torch.device("meta"):
        model = TesseraForCausalLM(config)
    total = model.num_parameters()
    embedding = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    idle = 0
    multiplied = 0
    for module in model.modules():
        if isinstance(module, nn.Linear | TesseraGate | TesseraRouter):
            multiplied += module.weight.numel()
        elif isinstance(module, TesseraExperts | TesseraUngatedExperts):
            stored = sum(p.numel() for p in module.parameters())
            used = stored * config.num_experts_per_tok // config.n_routed_experts
            multiplied += used
            idle += stored - used
    ahead = config.num_mtp_layers if config.train_mtp else 0
    multiplied += ahead * model.lm_head.weight.numel()
    kinds = [config.attention_kind(i) for i in range(config.num_hidden_layers + ahead)]
    context = config.max_position_embeddings if length is None else length
    forward = 2 * multiplied + sum(attention_flops(config, kind, context) for kind in kinds)
    return Costs(total, total - idle, embedding, 3 * forward, _cache_bytes(config))


def attention_flops(config: TesseraConfig, kind: str, context: int) -> int:
    """Forward operations of scores and weighted values for one token in a layer of a kind, on average over
    a context."""
    window = min(config.sliding_window, context) if kind == "sliding_attention" else context
    # Position t sees min(t + 1, window) positions.
    seen = (window * (window + 1) / 2 + (context - window) * window) / context
    value_dim = config.v_head_dim if config.attention_type == "latent" else config.head_dim
    return round(2 * config.num_attention_heads * (config.qk_head_dim + value_dim) * seen)


def _cache_bytes(config: TesseraConfig) -> int:
    if config.attention_type == "latent":
        width = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        width = 2 * config.num_key_value_heads * config.head_dim
    embedding = config.hidden_size if config.smear else 0
    return 2 * (width * config.num_hidden_layers + embedding)
