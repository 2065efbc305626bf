"""What a configuration refuses, what it derives, and that JSON gives it back."""

import copy
import json
import random

import pytest
import torch
from helpers.models import EVERY_MODEL, tiny_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from tessera import TesseraConfig, TesseraForCausalLM
from tessera.configs.presets import preset_names

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}
EXPERTS = {
    "mlp_layer_types": "DS",
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
LATENT = {
    "attention_type": "latent",
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
NAN, INFINITY = float("nan"), float("inf")


def build(**fields) -> TesseraConfig:
    return TesseraConfig(**{**SIZES, **fields})


def rope(**values) -> dict:
    return {"rope_parameters": values}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", "256"),
        ("vocab_size", None),
        ("hidden_size", 16.0),
        ("num_hidden_layers", True),
        ("smear", 1),
        ("use_cache", "yes"),
        ("attention_bias", None),
        ("attention_dropout", True),
        ("rms_norm_eps", "1e-6"),
        ("hidden_act", None),
        ("norm_type", "rmsnorm"),
        ("attention_type", "mla"),
        ("qk_norm", "after"),
        ("scoring_func", "tanh"),
        ("initializer", "xavier"),
        ("position_embedding_type", "alibi"),
        ("layer_types", [1, 2]),
        ("mlp_layer_types", 2),
        ("rope_parameters", []),
        ("eos_token_id", "2"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(name, value):
    with pytest.raises(StrictDataclassError, match=f"'{name}'"):
        build(**{name: value})


REFUSED = [
    # sizes
    ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
    ({"vocab_size": -1}, "vocab_size must be at least 1, got -1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
    ({"padded_vocab_size": 0}, "padded_vocab_size must be at least 1 or null"),
    ({"vocab_size": 2**62}, "vocab_size must be at most 2147483647"),
    ({"max_position_embeddings": int(1e30)}, "max_position_embeddings must be at most"),
    ({"layer_types": "S", "sliding_window": 2**70}, "sliding_window must be at most"),
    ({"layer_types": "S", "sliding_window": 0}, "sliding_window must be at least 1 or null"),
    ({"layer_types": "S", "sliding_window": 1}, "sliding_window must be at least 2, got 1"),
    ({"n_shared_experts": -1}, "n_shared_experts must be at least 0"),
    # numbers
    ({"attention_dropout": NAN}, "attention_dropout must be a probability"),
    ({"embd_pdrop": 1}, "embd_pdrop must be a probability"),
    ({"resid_pdrop": -0.1}, "resid_pdrop must be a probability"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a positive number"),
    ({"rms_norm_eps": NAN}, "rms_norm_eps must be a positive number"),
    ({"initializer_range": -1.0}, "initializer_range must be a number of at least 0"),
    ({"final_logit_softcapping": 0}, "final_logit_softcapping must be a positive number or null"),
    ({"attn_logit_softcapping": INFINITY}, "attn_logit_softcapping must be a positive number or null"),
    ({"qk_norm": "before_rope", "qk_norm_scale": NAN}, "qk_norm_scale must be a positive number"),
    ({"qk_norm_scale": 1.2}, "qk_norm_scale=1.2 has no effect without qk_norm"),
    # heads
    ({"num_attention_heads": 3}, r"hidden_size \(16\) does not divide into num_attention_heads \(3\)"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, r"multiple of num_key_value_heads \(3\)"),
    (
        {"num_key_value_heads": 4},
        r"num_attention_heads \(2\) must be a multiple of num_key_value_heads \(4\)",
    ),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1 or null"),
    # layers
    ({"layer_types": "S"}, "sliding_attention layers, but sliding_window is not set"),
    ({"layer_types": "SX"}, "layer_types as a pattern is made of the letters .* got 'SX'"),
    ({"layer_types": ""}, "layer_types as a pattern"),
    ({"mlp_layer_types": "DX"}, "mlp_layer_types as a pattern is made of the letters .* got 'DX'"),
    ({"layer_types": []}, "layer_types has 0 entries for num_hidden_layers=2"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for num_hidden_layers=2"),
    ({"mlp_layer_types": ["dense"]}, "mlp_layer_types has 1 entries for num_hidden_layers=2"),
    ({"layer_types": ["full_attention", "chunked"]}, "layer_types knows .* got chunked"),
    # rotary positions
    ({"head_dim": 7}, "rotated width of a head must be even, got 7"),
    ({**LATENT, "qk_rope_head_dim": 3}, "must be even, got 3 .*qk_rope_head_dim 3"),
    (rope(partial_rotary_factor=0.4), "must be even, got 3"),
    (rope(partial_rotary_factor=0), "partial_rotary_factor must be a number in"),
    (rope(partial_rotary_factor=2.0), "partial_rotary_factor must be a number in"),
    (rope(partial_rotary_factor=None), "partial_rotary_factor must be a number in"),
    (
        rope(rope_type="longrope", factor=2.0),
        "rope_type must be one of default, linear, dynamic, yarn, llama3; got 'long",
    ),
    (rope(rope_type=None), "rope_type must be one of .* got None"),
    (rope(rope_type=["yarn"]), "rope_type must be one of"),
    (rope(theta=5), "rope_type 'default' has no key 'theta'; did you mean 'rope_theta'"),
    (rope(factor=2.0), "rope_parameters has factor but no rope_type that uses it"),
    ({"head_dim": 2, **rope(rope_type="dynamic", factor=2.0)}, "'dynamic' needs at least 4 rotated channels"),
    ({"rope_parameters": {1: 2}}, "rope_type 'default' has no key '1'"),
    (rope(full_attention={"rope_theta": 9.0}), "cannot be given by layer type"),
    (rope(rope_type="linear"), "rope_type 'linear' needs factor"),
    (rope(rope_type="llama3", factor=2.0), "rope_type 'llama3' needs original_max_position_embeddings"),
    (rope(rope_type="yarn", factor=2.0), "rope_type 'yarn' needs original_max_position_embeddings"),
    (
        rope(rope_type="llama3", factor=2.0, original_max_position_embeddings=64),
        "rope_type 'llama3' needs high_freq_factor, low_freq_factor",
    ),
    (rope(rope_type="linear", factor=None), "factor must be a number of at least 1, got None"),
    (rope(rope_type="linear", factor="2"), "factor must be a number of at least 1, got '2'"),
    (rope(rope_type="linear", factor=0.5), "factor must be a number of at least 1"),
    (rope(rope_theta=None), "rope_theta must be a number above 1, got None"),
    (rope(rope_theta=True), "rope_theta must be a number above 1"),
    (rope(rope_theta=NAN), "rope_theta must be a number above 1"),
    ({"rope_theta": -1.0}, "rope_theta must be a number above 1"),
    (rope(**{**YARN, "original_max_position_embeddings": 0}), "original_max_position_embeddings must be"),
    (rope(**YARN, mscale="a"), "mscale must be a number of at least 0"),
    (rope(**YARN, beta_fast=-3), "beta_fast must be a positive number"),
    (rope(**YARN, beta_fast=1), r"beta_fast \(1\) must be larger than beta_slow \(1\)"),
    (rope(**YARN, truncate=1), "truncate must be true or false"),
    (rope(**{**LLAMA3, "high_freq_factor": 1.0}), "high_freq_factor .* must be larger than low_freq_factor"),
    # latent attention
    ({"attention_type": "latent"}, "needs kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim"),
    ({**LATENT, "kv_lora_rank": None}, "attention_type='latent' needs kv_lora_rank"),
    ({**LATENT, "q_lora_rank": 0}, "q_lora_rank must be at least 1 or null"),
    ({"kv_lora_rank": 8}, "only attention_type='latent' has kv_lora_rank"),
    ({"v_head_dim": 8}, "only attention_type='latent' has v_head_dim"),
    ({**LATENT, "num_key_value_heads": 1}, r"num_key_value_heads \(1\) must equal num_attention_heads \(2\)"),
    ({**LATENT, "qk_norm": "before_rope"}, "qk_norm cannot be combined with latent attention"),
    ({**LATENT, "value_embedding_interval": 2}, "value embeddings need attention_type='multi_head'"),
    # experts
    ({"mlp_layer_types": "S"}, "sparse layers, but n_routed_experts is 0"),
    ({"n_routed_experts": 4}, "n_routed_experts is set, but mlp_layer_types has no sparse layer"),
    ({"n_shared_experts": 2}, "n_shared_experts is 2, but mlp_layer_types has no sparse layer"),
    ({"num_experts_per_tok": 2}, "num_experts_per_tok is 2, but mlp_layer_types has no sparse layer"),
    ({**EXPERTS, "moe_intermediate_size": None}, "sparse layers need moe_intermediate_size"),
    ({**EXPERTS, "moe_intermediate_size": 12}, "moe_intermediate_size to be a multiple of 8, got 12"),
    ({**EXPERTS, "hidden_size": 12}, "hidden_size to be a multiple of 8, got 12"),
    ({**EXPERTS, "num_experts_per_tok": 5}, r"num_experts_per_tok must lie between 1 and .* \(4\), got 5"),
    ({**EXPERTS, "num_experts_per_tok": 0}, "num_experts_per_tok must lie between 1"),
    ({**EXPERTS, "n_group": 3}, r"n_routed_experts \(4\) does not divide into n_group \(3\)"),
    ({**EXPERTS, "n_group": 2, "topk_group": 3}, r"topk_group \(3\) is larger than n_group \(2\)"),
    ({**EXPERTS, "n_group": 4}, r"num_experts_per_tok \(2\) is more than the 1 experts of topk_group \(1\)"),
    ({**EXPERTS, "topk_group": 0}, "topk_group must be at least 1"),
    ({**EXPERTS, "mlp_bias": True}, "mlp_bias cannot be combined with sparse layers"),
    ({**EXPERTS, "routed_scaling_factor": 0}, "routed_scaling_factor must be a positive number"),
    ({**EXPERTS, "router_aux_loss_coef": NAN}, "router_aux_loss_coef must be a number of at least 0"),
    ({**EXPERTS, "num_experts": 8}, "num_experts is another name of n_routed_experts: 8 and 4 differ"),
    # the other tiles
    ({"padded_vocab_size": 31}, r"padded_vocab_size \(31\) is smaller than vocab_size \(32\)"),
    ({"hidden_act": "sillu"}, "no activation hidden_act='sillu'; did you mean 'silu'"),
    ({"norm_type": "layer_norm", "norm_weight": False}, "norm_weight=False is for norm_type='rms_norm'"),
    ({"value_embedding_interval": 0}, "value_embedding_interval must be at least 1 or null"),
    ({"value_embedding_interval": 2, "value_gate_channels": 17}, r"value_gate_channels \(17\) must lie"),
    ({"smear": True}, r"smear_gate_channels \(24\) must lie between 1 and hidden_size \(16\)"),
    ({"dtype": "bf17"}, "dtype must name a dtype of torch such as 'bfloat16', got 'bf17'"),
    ({"dtype": "nn"}, "dtype must name a dtype"),
    ({"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config is not supported"),
    ({"converted_from": {"fields": {}}}, "converted_from has the model_type .*; got model_type=None"),
    ({"converted_from": {"model_type": "llama", "fields": [1], "x": 2}}, r"got fields=\[1\], x=2"),
    # names
    ({"hiden_size": 16}, "TesseraConfig has no field 'hiden_size'; did you mean 'hidden_size'"),
    ({"n_experts": 4}, "no field 'n_experts'; did you mean 'num_experts'"),
    ({"wibble": 1}, "TesseraConfig has no field 'wibble'$"),
    ({"to_dict": 1}, "no field 'to_dict'"),
    ({"rotary_dim": 4}, "no field 'rotary_dim'"),
    ({"model_type": "llama"}, "is of model type 'llama', not 'tessera'"),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED, ids=[sentence[:50] for _, sentence in REFUSED])
def test_what_cannot_work_is_refused_in_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        build(**fields)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 230


@pytest.mark.parametrize(
    ("fields", "length"),
    [(EXPERTS, 9), (LATENT, 9), (rope(**LINEAR), 9), (rope(**YARN), 9), (rope(**LLAMA3), 9), ({}, 1)],
)
def test_the_bases_of_the_refusals_work(fields, length):
    model = TesseraForCausalLM(build(**fields)).eval()
    with torch.no_grad():
        assert model(torch.arange(length)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (("gpt2-124n", {}), "no preset 'gpt2-124n'; did you mean 'gpt2-124m'"),
        (("../models/bytegpt", {}), r"no preset '../models/bytegpt'.*presets: bytegpt,"),
        (("llama-d12", {}), "no preset 'llama-d12'"),
        (("nanochat-d0", {}), "depth must be a whole number of layers, at least 1; got 0"),
        (("llama-tiny", {"depth": True}), "depth must be a whole number"),
        (("llama-tiny", {"depth": 2.0}), "depth must be a whole number"),
        (("bytegpt", {"n_heads": 4}), "no field 'n_heads'"),
        (("bytegpt", {"num_experts_per_tok": 17}), r"num_experts_per_tok must lie between 1 and .* \(16\)"),
    ],
)
def test_an_unknown_preset_or_depth_is_refused(call, sentence):
    name, overrides = call
    with pytest.raises(ValueError, match=sentence):
        TesseraConfig.from_preset(name, **overrides)


ROUND_TRIPS = {
    **{name: lambda name=name: TesseraConfig.from_preset(name) for name in preset_names()},
    **{name: lambda name=name: tiny_config(name) for name in EVERY_MODEL if name not in preset_names()},
    "labels, ids and a dtype": lambda: build(
        num_labels=3, eos_token_id=[1, 2], pad_token_id=0, dtype="bfloat16", architectures=["Some"]
    ),
    "converted": lambda: build(converted_from={"model_type": "llama", "fields": {"pretraining_tp": 2}}),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_json_gives_the_configuration_back(name, tmp_path):
    config = ROUND_TRIPS[name]()
    config.save_pretrained(tmp_path / "once")
    once = TesseraConfig.from_pretrained(tmp_path / "once")
    once.save_pretrained(tmp_path / "twice")
    twice = AutoConfig.from_pretrained(tmp_path / "twice")
    assert type(twice) is TesseraConfig
    assert once.to_diff_dict() == config.to_diff_dict() == twice.to_diff_dict()
    files = [(tmp_path / folder / "config.json").read_text() for folder in ("once", "twice")]
    assert files[0] == files[1]
    saved = json.loads(files[0])
    assert saved["model_type"] == "tessera"
    for field in TesseraConfig.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys():
        expected = getattr(config, field)
        assert getattr(twice, field) == expected, field
    for other in (copy.deepcopy(config), TesseraConfig.from_dict(config.to_dict())):
        assert other.to_dict() == config.to_dict()


def test_unset_fields_are_derived():
    config = build(num_attention_heads=4, attention_bias=True)
    assert (config.head_dim, config.num_key_value_heads, config.padded_vocab_size) == (4, 4, 32)
    assert config.attention_output_bias is True
    assert config.layer_types == ["full_attention"] * 2
    assert config.mlp_layer_types == ["dense"] * 2
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}


def test_patterns_are_tiled_and_the_last_layer_is_full_where_the_pattern_has_a_full_layer():
    letters = {"sliding_attention": "S", "full_attention": "L"}

    def spelled(pattern, depth):
        config = build(layer_types=pattern, num_hidden_layers=depth, sliding_window=4)
        return "".join(letters[kind] for kind in config.layer_types)

    assert spelled("SSSL", 7) == "SSSLSSL"
    assert spelled("SL", 1) == "L"
    assert spelled("S", 3) == "SSS"
    assert build(**EXPERTS, num_hidden_layers=3).mlp_layer_types == ["dense", "sparse", "dense"]


def test_latent_heads_are_derived_again_from_changed_sizes():
    saved = build(**LATENT).to_dict()
    config = TesseraConfig(**{**saved, "qk_rope_head_dim": 8})
    assert config.head_dim == config.qk_head_dim == 12
    assert config.rotary_dim == 8
    assert config.rope_parameters["partial_rotary_factor"] == pytest.approx(8 / 12)


@pytest.mark.parametrize(("nope", "rotated"), [(14, 30), (19, 26), (47, 2), (45, 4), (64, 32), (128, 64)])
def test_library_scaling_rotates_exactly_the_rotary_part_of_a_latent_head(nope, rotated):
    """The library computes int(head * share): 44 * (30 / 44) is 29.99, and truncates to 29."""
    fields = {**LATENT, "qk_nope_head_dim": nope, "qk_rope_head_dim": rotated}
    config = build(**fields, **rope(**YARN))
    assert int(config.head_dim * config.rope_parameters["partial_rotary_factor"]) == rotated
    frequencies = TesseraForCausalLM(config).model.rotary_emb.inv_freq
    assert frequencies.shape == (rotated // 2,)
    # The fastest pairs are not scaled by YaRN, the slowest are divided by the factor.
    slowest = 10_000.0 ** (-(rotated - 2) / rotated) / 2.0
    if rotated > 2:
        assert frequencies[-1].item() == pytest.approx(slowest, rel=1e-5)
    assert frequencies[0].item() == pytest.approx(1.0 if rotated > 2 else frequencies[0].item())


@pytest.mark.parametrize("alias", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_has_the_names_that_the_library_looks_for(alias):
    fields = {name: value for name, value in EXPERTS.items() if name != "n_routed_experts"}
    config = build(**fields, **{alias: 6})
    assert config.n_routed_experts == getattr(config, alias) == 6
    setattr(config, alias, 8)
    assert config.n_routed_experts == 8
    assert alias not in config.to_dict()


def test_rope_scaling_of_older_files_is_understood():
    config = build(rope_scaling={"type": "linear", "factor": 3.0}, rope_theta=500.0)
    assert config.rope_parameters["rope_type"] == "linear"
    assert (config.rope_parameters["factor"], config.rope_parameters["rope_theta"]) == (3.0, 500.0)


def test_keys_of_another_rope_type_change_nothing_and_survive_a_round_trip():
    config = build(**rope(**LINEAR, beta_fast=32))
    assert TesseraConfig.from_dict(config.to_dict()).rope_parameters == config.rope_parameters
    with torch.device("meta"):
        assert TesseraForCausalLM(config).model.rotary_emb.rope_type == "linear"


def test_the_padded_vocabulary_follows_a_vocabulary_without_padding():
    config, padded = build(), build(padded_vocab_size=64)
    config.vocab_size = padded.vocab_size = 40
    assert (config.padded_vocab_size, padded.padded_vocab_size) == (40, 64)


def test_an_attribute_that_a_library_sets_is_not_saved(tmp_path):
    config = build()
    config.layer_norm_epsilon = 1.0
    config.save_pretrained(tmp_path)
    assert not hasattr(TesseraConfig.from_pretrained(tmp_path), "layer_norm_epsilon")


def test_a_given_dictionary_is_left_alone():
    given = {"rope_type": "default"}
    build(**LATENT, rope_parameters=given)
    assert given == {"rope_type": "default"}


STALE = [
    ({}, "num_hidden_layers", 3, "layer_types has 2 entries for num_hidden_layers=3"),
    ({}, "layer_types", None, "layer_types cannot be null"),
    ({}, "layer_types", "SL", "layer_types must list every layer"),
    ({}, "head_dim", None, "head_dim cannot be null"),
    ({}, "num_key_value_heads", 4, "must be a multiple of num_key_value_heads"),
    ({}, "hidden_size", -1, "hidden_size must be at least 1"),
    ({"padded_vocab_size": 48}, "vocab_size", 64, r"padded_vocab_size \(48\) is smaller than vocab_size"),
    ({}, "rope_parameters", {}, "rope_type 'default' needs rope_theta, rope_type"),
    (LATENT, "qk_rope_head_dim", 8, r"head_dim \(8\) is not that of the latent sizes \(12\)"),
    (EXPERTS, "num_experts", 1, "num_experts_per_tok must lie between 1"),
]


@pytest.mark.parametrize(("fields", "name", "value", "sentence"), STALE)
def test_fields_that_no_longer_fit_are_refused_by_the_model(fields, name, value, sentence, tmp_path):
    config = build(**fields)
    setattr(config, name, value)
    with pytest.raises(ValueError, match=sentence):
        TesseraForCausalLM(config)
    with pytest.raises(StrictDataclassError, match=sentence):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_overrides_of_a_saved_configuration_are_checked(tmp_path):
    build(**EXPERTS).save_pretrained(tmp_path)
    assert TesseraConfig.from_pretrained(tmp_path, num_experts_per_tok=3).num_experts_per_tok == 3
    with pytest.raises(ValueError, match="layer_types has 2 entries"):
        TesseraForCausalLM(TesseraConfig.from_pretrained(tmp_path, num_hidden_layers=3))
    with pytest.raises(StrictDataclassError, match="'num_hidden_layers'"):
        TesseraConfig.from_pretrained(tmp_path, num_hidden_layers="3")


def test_without_experts_there_is_no_balance_loss_to_look_for():
    config = build(router_aux_loss_coef=0.1, output_router_logits=True)
    assert config.router_aux_loss_coef == 0
    assert config.output_router_logits is False


def draw_fields(rng: random.Random) -> dict:
    """Tiles at random, good and bad: about a third of them fit together."""

    def maybe(chance, **values):
        return (
            {name: rng.choice(choices) for name, choices in values.items()} if rng.random() < chance else {}
        )

    fields = {
        "vocab_size": rng.choice([1, 7, 32]),
        "hidden_size": rng.choice([2, 8, 12, 15, 24]),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": rng.choice([1, 2, 3, 4]),
        "intermediate_size": rng.choice([1, 8, 17]),
        "max_position_embeddings": 16,
        "position_embedding_type": rng.choice(["rope", "learned", "none"]),
        "norm_type": rng.choice(["rms_norm", "rms_norm", "layer_norm"]),
        "hidden_act": rng.choice(["silu", "gelu_new", "relu2", "tanh"]),
        "gated_mlp": rng.random() < 0.5,
        "tie_word_embeddings": rng.random() < 0.3,
        "initializer": rng.choice(["normal", "gpt2", "bytegpt", "nanochat"]),
        **maybe(0.3, num_key_value_heads=[1, 1, 2, 3]),
        **maybe(0.4, head_dim=[1, 2, 4, 5, 6, 8]),
        **maybe(0.3, padded_vocab_size=[7, 32, 40]),
        **maybe(0.4, layer_types=["S", "SL", "L", "LS"], sliding_window=[None, 1, 2, 3, 100]),
        **maybe(0.3, qk_norm=["before_rope", "after_rope"], qk_norm_scale=[1.0, 1.2]),
        **maybe(0.2, attn_logit_softcapping=[0.5, 5]),
        **maybe(0.2, final_logit_softcapping=[15]),
        **maybe(0.3, attention_bias=[True], attention_output_bias=[None, False, True]),
        **maybe(0.2, mlp_bias=[True]),
        **maybe(0.2, norm_weight=[False]),
        **maybe(0.3, value_embedding_interval=[1, 2, 5], value_gate_channels=[1, 8, 12]),
        **maybe(0.3, smear=[True], smear_gate_channels=[1, 8, 24]),
        **maybe(0.3, residual_scalars=[True], backout=[True], embedding_norm=[True, False]),
        **maybe(0.3, rope_interleave=[True, False], rope_reverse=[True, False]),
    }
    if rng.random() < 0.4:
        fields |= {"attention_type": "latent"} | {
            name: rng.choice(sizes)
            for name, sizes in {
                "kv_lora_rank": [1, 8],
                "q_lora_rank": [None, 4],
                "qk_nope_head_dim": [1, 4, 14],
                "qk_rope_head_dim": [2, 4, 30],
                "v_head_dim": [1, 6, None] if rng.random() < 0.1 else [1, 6],
                "latent_attention_mode": ["auto", "naive", "absorb"],
            }.items()
        }
        for name in (
            "qk_norm",
            "qk_norm_scale",
            "value_embedding_interval",
            "num_key_value_heads",
            "head_dim",
        ):
            if rng.random() < 0.9:
                fields.pop(name, None)
    if rng.random() < 0.4:
        fields |= {
            name: rng.choice(values)
            for name, values in {
                "mlp_layer_types": ["S", "DS", "SD"],
                "n_routed_experts": [1, 4, 6],
                "n_shared_experts": [0, 1, 2],
                "num_experts_per_tok": [1, 2, 3],
                "moe_intermediate_size": [8, 8, 8, 16, 1],
                "scoring_func": ["softmax", "sigmoid"],
                "n_group": [1, 1, 2, 4],
                "topk_group": [1, 1, 2],
                "norm_topk_prob": [True, False],
                "router_correction_bias": [True, False],
                "routed_scaling_factor": [1.0, 2.5],
            }.items()
        }
    if rng.random() < 0.6:
        parameters = rng.choice([{}, LINEAR, YARN, LLAMA3, {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}])
        parameters = {**parameters, **maybe(0.3, partial_rotary_factor=[0.25, 0.5, 0.9, 1.0])}
        fields["rope_parameters"] = {**parameters, **maybe(0.3, rope_theta=[2, 1e5], factor=[1, 0, 40])}
    return fields


@torch.no_grad()
def test_random_tiles_are_refused_or_make_a_model_that_runs():
    rng = random.Random(2)
    refused = 0
    for _ in range(150):
        fields = draw_fields(rng)
        try:
            config = TesseraConfig(**fields)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error), fields
            continue
        torch.manual_seed(0)
        model = TesseraForCausalLM(config).eval()
        ids = torch.randint(0, config.vocab_size, (2, 9))
        whole = model(ids).logits
        assert whole.shape == (2, 9, config.vocab_size), fields
        assert whole.isfinite().all(), fields
        cache = model(ids[:, :6], use_cache=True).past_key_values
        rest = model(ids[:, 6:], past_key_values=cache).logits
        torch.testing.assert_close(
            rest, whole[:, 6:], atol=1e-4, rtol=1e-4, msg=lambda m, f=fields: f"{f} {m}"
        )
    assert 40 < refused < 120, "the draws should meet both outcomes"
