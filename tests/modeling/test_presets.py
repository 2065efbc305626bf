"""The presets have the published sizes, and the depth rule is nanochat's."""

import pytest
import torch
import transformers
from helpers.models import DIALECTS

from tessera import TesseraConfig, TesseraForCausalLM
from tessera.configs.presets import preset_names

WANTED = {
    *("bytegpt", "llama-100m", "verse-mini", "verse-7b", "verse-70b", "gpt2-124m", "gpt2-350m"),
    *(f"nanochat-d{depth}" for depth in (12, 20, 24, 26)),
    *("bytegpt-tiny", "llama-tiny", "nanochat-tiny", "verse-tiny", "gpt2-tiny"),
}
TINY = [name for name in preset_names() if name.endswith("-tiny")]


def stored(config: transformers.PreTrainedConfig) -> int:
    """Parameters of a model without memory; a tied head counts once."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def test_every_preset_is_there_and_valid():
    assert set(preset_names()) >= WANTED
    for name in preset_names():
        assert TesseraConfig.from_preset(name).num_hidden_layers > 0


def test_bytegpt_has_the_numbers_of_the_original():
    config = TesseraConfig.from_preset("bytegpt")
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (256, 512, 12)
    assert (config.intermediate_size, config.moe_intermediate_size, config.num_attention_heads) == (
        2048,
        512,
        8,
    )
    assert config.mlp_layer_types == ["dense", "sparse"] * 6
    assert (config.n_routed_experts, config.n_shared_experts, config.num_experts_per_tok) == (16, 2, 4)
    assert (config.scoring_func, config.norm_topk_prob, config.routed_scaling_factor) == (
        "softmax",
        False,
        1.0,
    )
    assert (config.attention_type, config.q_lora_rank, config.kv_lora_rank) == ("latent", None, 128)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (64, 32, 64)
    assert config.max_position_embeddings == 4096
    expected = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 1024, "mscale": 0.707}
    assert expected.items() <= config.rope_parameters.items()
    assert (config.initializer, config.hidden_act, config.gated_mlp) == ("bytegpt", "silu", True)


def test_llama_100m_is_about_a_hundred_million_with_32k_tokens():
    config = TesseraConfig.from_preset("llama-100m")
    assert 95e6 < stored(config) < 115e6
    assert config.vocab_size == 32_000


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        # The library's default Mistral is the 7B; Llama 2 70B as its release has it.
        ("verse-7b", transformers.MistralConfig()),
        (
            "verse-70b",
            transformers.LlamaConfig(
                hidden_size=8192,
                intermediate_size=28_672,
                num_hidden_layers=80,
                num_attention_heads=64,
                num_key_value_heads=8,
                max_position_embeddings=4096,
            ),
        ),
    ],
)
def test_verse_has_the_shape_of_its_model_with_the_padded_o200k_vocabulary(name, theirs):
    ours = TesseraConfig.from_preset(name)
    assert ours.padded_vocab_size == 200_064
    for field in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
    ):
        assert getattr(ours, field) == getattr(theirs, field), field
    window = getattr(theirs, "sliding_window", None)
    assert ours.sliding_window == window
    assert ours.layer_types == ["sliding_attention" if window else "full_attention"] * ours.num_hidden_layers
    theirs.vocab_size = 200_064
    assert stored(ours) == stored(theirs)


@pytest.mark.parametrize(
    ("name", "theirs", "parameters"),
    [
        ("gpt2-124m", {}, 124_439_808),
        ("gpt2-350m", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, 354_823_168),
    ],
)
def test_gpt2_has_as_many_parameters_as_the_library_says(name, theirs, parameters):
    assert stored(TesseraConfig.from_preset(name)) == stored(transformers.GPT2Config(**theirs)) == parameters


# Stored totals of nanochat in July 2026, counted from its shapes: blocks, head, token and value embeddings.
@pytest.mark.parametrize(
    ("depth", "blocks", "table", "tables", "total"),
    [
        (12, 84.9e6, 25.2e6, 6, 286e6),
        (20, 393e6, 41.9e6, 10, 897e6),
        (24, 680e6, 50.3e6, 12, 1.38e9),
        (26, 864e6, 54.5e6, 13, 1.68e9),
    ],
)
def test_nanochat_stores_as_much_as_the_original(depth, blocks, table, tables, total):
    config = TesseraConfig.from_preset(f"nanochat-d{depth}")
    width = config.hidden_size
    assert (config.vocab_size, config.padded_vocab_size, config.max_position_embeddings) == (
        32768,
        32768,
        2048,
    )
    assert 12 * depth * width**2 == pytest.approx(blocks, rel=2e-3)
    assert 32768 * width == pytest.approx(table, rel=2e-3)
    assert sum(config.has_value_embedding(i) for i in range(depth)) == tables
    counted = stored(config)
    assert counted == pytest.approx(total, rel=3e-3)
    # Value gates (12 -> heads), a smear gate (24 -> 1) with its scale, a backout, two scalars a layer.
    small = tables * 12 * (width // 128) + 24 + 1 + 1 + 2 * depth
    assert counted == 12 * depth * width**2 + (2 + tables) * 32768 * width + small


def test_nanochat_attends_like_the_original():
    config = TesseraConfig.from_preset("nanochat-d12")
    kinds = [kind[0] for kind in config.layer_types]
    assert "".join(kinds) == "sssf" * 3
    # A quarter of the context before a token, and the token itself.
    assert config.sliding_window == 2048 // 4 + 1
    assert (config.rope_parameters["rope_theta"], config.qk_norm_scale) == (100_000.0, 1.2)
    assert [i for i in range(12) if config.has_value_embedding(i)] == [1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize("depth", range(1, 41))
def test_the_depth_rule_gives_the_sizes_of_nanochat(depth):
    """base_train.py: 64 channels a layer, rounded up to whole heads of 128."""
    config = TesseraConfig.from_preset(f"nanochat-d{depth}")
    width = (depth * 64 + 127) // 128 * 128
    assert config.num_hidden_layers == depth
    assert config.hidden_size == width
    assert config.num_attention_heads == config.num_key_value_heads == width // 128
    assert config.head_dim == 128
    assert config.intermediate_size == 4 * width
    assert config.layer_types[-1] == "full_attention"
    assert [config.has_value_embedding(i) for i in range(depth)] == [
        i % 2 == (depth - 1) % 2 for i in range(depth)
    ]


@pytest.mark.parametrize("depth", [20, 24, 26])
def test_a_preset_file_with_a_depth_equals_the_rule(depth):
    by_file = TesseraConfig.from_preset(f"nanochat-d{depth}")
    assert by_file.to_dict() == TesseraConfig.from_preset("nanochat-d12", depth=depth).to_dict()


@pytest.mark.parametrize(
    ("name", "depth", "width", "heads", "groups", "feed_forward"),
    [
        ("gpt2-124m", 24, 1536, 24, 1, 6144),
        ("llama-100m", 7, 320, 5, 1, 864),
        ("verse-mini", 6, 384, 6, 3, 1024),
        ("verse-tiny", 8, 192, 8, 2, 512),
    ],
)
def test_the_depth_rule_keeps_the_ratios_of_other_presets(name, depth, width, heads, groups, feed_forward):
    config = TesseraConfig.from_preset(name, depth=depth)
    assert config.num_hidden_layers == len(config.layer_types) == depth
    assert (config.hidden_size, config.num_attention_heads) == (width, heads)
    assert config.num_key_value_heads * groups == heads
    assert config.intermediate_size == feed_forward
    assert config.head_dim == TesseraConfig.from_preset(name).head_dim


def test_overrides_are_laid_over_a_preset_and_its_depth():
    config = TesseraConfig.from_preset("nanochat-d12", depth=4, vocab_size=100, padded_vocab_size=128)
    assert (config.num_hidden_layers, config.vocab_size, config.padded_vocab_size) == (4, 100, 128)


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_tiny_presets_are_small_and_run(name):
    assert set(DIALECTS) <= set(TINY)
    config = TesseraConfig.from_preset(name)
    model = TesseraForCausalLM(config).eval()
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert model(torch.arange(8)[None]).logits.isfinite().all()
