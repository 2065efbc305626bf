"""Counted costs equal those of a real model: its parameters, its measured products, its cache in memory."""

import pytest
import torch
from helpers.models import EVERY_MODEL, tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from tessera import TesseraConfig, TesseraForCausalLM
from tessera.modeling.accounting import count_costs


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_parameters_and_embeddings_equal_those_of_the_model(name):
    config = tiny_config(name)
    costs = count_costs(config)
    model = TesseraForCausalLM(config)
    assert costs.parameters == sum(p.numel() for p in model.parameters())
    tables = {"embed_tokens", "embed_positions", "value_embed"}
    looked_up = [p for name, p in model.named_parameters() if name.split(".")[-2] in tables]
    assert costs.embedding == sum(p.numel() for p in looked_up)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_active_parameters_leave_out_the_experts_that_a_token_does_not_choose(name):
    config = tiny_config(name)
    costs = count_costs(config)
    idle = config.mlp_layer_types.count("sparse") * (config.n_routed_experts - config.num_experts_per_tok)
    matrices = 3 if config.gated_mlp else 2
    expert = matrices * config.hidden_size * (config.moe_intermediate_size or 0)
    assert costs.active == costs.parameters - idle * expert
    assert (costs.active < costs.parameters) == bool(config.n_routed_experts)


def test_bytegpt_by_hand():
    """Every term written out; 12 layers of latent attention, dense and sparse in turn."""
    attention = 512 * 8 * 96 + 512 * (128 + 32) + 128 + 128 * 8 * (64 + 64) + 8 * 64 * 512
    expert = 3 * 512 * 512
    dense, shared, router = 3 * 512 * 2048, 3 * 512 * 1024, 16 * 512
    norms = 2 * 512
    rest = 2 * 256 * 512 + 512
    total = 12 * (attention + norms) + 6 * dense + 6 * (16 * expert + shared + router) + rest
    costs = count_costs(TesseraConfig.from_preset("bytegpt"))
    assert costs.parameters == total
    assert costs.active == total - 6 * 12 * expert
    assert costs.embedding == 256 * 512
    assert costs.cache_bytes == 12 * (128 + 32) * 2
    weights = 12 * (attention - 128) + 6 * dense + 6 * (4 * expert + shared + router) + 256 * 512
    scores_and_values = 12 * 8 * (96 + 64) * (4096 + 1) / 2
    assert costs.training_flops == pytest.approx(6 * (weights + scores_and_values))


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_flops_equal_the_products_of_a_forward_pass(name):
    """The counter sees every score of a T x T square; the account counts those in sight."""
    length = 24
    config = tiny_config(name, max_position_embeddings=length)
    if config.attention_type == "latent":
        config.latent_attention_mode = "naive"
    model = TesseraForCausalLM(config).eval()
    # Written out, attention and experts are plain products that the counter knows.
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(length)[None], use_cache=False)
    measured = counter.get_total_flops()

    value_dim = config.v_head_dim if config.attention_type == "latent" else config.head_dim
    score = 2 * config.num_attention_heads * (config.qk_head_dim + value_dim)
    hidden = 0
    for kind in config.layer_types:
        window = config.sliding_window if kind == "sliding_attention" else length
        hidden += sum(not query - window < key <= query for query in range(length) for key in range(length))
    counted = count_costs(config).training_flops / 3 * length
    # Angles are a product by broadcasting, which neither counts; the account rounds once a layer.
    assert counted == pytest.approx(measured - score * hidden, abs=length * config.num_hidden_layers)
    assert score * hidden > length * config.num_hidden_layers


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_cache_bytes_equal_the_growth_of_a_real_cache(name):
    config = tiny_config(name)
    if config.sliding_window is not None:
        config.sliding_window = 64
    model = TesseraForCausalLM._from_config(config, dtype=torch.bfloat16).eval()

    def held(length: int) -> int:
        cache = DynamicCache(config=config)
        model(torch.arange(length)[None], past_key_values=cache, use_cache=True)
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    assert held(30) - held(10) == 20 * count_costs(config).cache_bytes
