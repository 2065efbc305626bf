"""Every family of transformers comes in with equal logits, and goes out with equal bits and configuration."""

import json

import pytest
import torch
import transformers
from helpers.families import (
    LONGROPE,
    SAMPLES,
    change_config,
    change_state,
    family_of,
    loaded_config,
    logits,
    save_family,
    weight_files,
)
from helpers.models import tiny_config
from safetensors.torch import load_file

from tessera import TesseraConfig
from tessera.conversion.convert import convert
from tessera.conversion.families import FAMILIES
from tessera.modeling.loading import load_model

MIXTURES = ["qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3"]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within a tenth of what a conversion may differ by."""
    assert expected.std() > 0.05, "logits too flat to tell models apart"
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1, expected.abs().max()), rtol=0)


def test_every_family_has_a_sample():
    assert {family_of(sample) for sample in SAMPLES} == set(FAMILIES)


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_family_comes_in_with_equal_logits_and_goes_out_with_equal_bits(sample, tmp_path):
    theirs = save_family(sample, tmp_path / "theirs")
    done = convert(tmp_path / "theirs", tmp_path / "ours")
    family = family_of(sample)
    assert (done.source, done.target) == (family, "tessera")
    assert_close(logits(load_model(tmp_path / "ours")), logits(theirs))

    convert(tmp_path / "ours", tmp_path / "back", to=family)
    assert weight_files(tmp_path / "back") == weight_files(tmp_path / "theirs")
    assert loaded_config(tmp_path / "back") == loaded_config(tmp_path / "theirs")
    again, info = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@pytest.mark.parametrize("sample", ["llama", *MIXTURES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_bits(sample, dtype, tmp_path):
    save_family(sample, tmp_path / "theirs", dtype)
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to=family_of(sample))
    assert weight_files(tmp_path / "back") == weight_files(tmp_path / "theirs")
    assert loaded_config(tmp_path / "back") == loaded_config(tmp_path / "theirs")
    assert loaded_config(tmp_path / "back")["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("sample", MIXTURES)
def test_packed_experts_are_read_like_those_of_the_releases(sample, tmp_path):
    theirs = save_family(sample, tmp_path / "packed", save_original_format=False)
    assert any(
        name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / "packed/model.safetensors")
    )
    theirs.save_pretrained(tmp_path / "single")
    single = load_file(tmp_path / "single/model.safetensors")
    assert not any(name.endswith("experts.gate_up_proj") for name in single)
    for kind in ("packed", "single"):
        convert(tmp_path / kind, tmp_path / f"from-{kind}")
    assert weight_files(tmp_path / "from-packed") == weight_files(tmp_path / "from-single")
    convert(tmp_path / "from-packed", tmp_path / "back", to=sample)
    assert weight_files(tmp_path / "back") == weight_files(tmp_path / "single")


def test_mixtral_is_written_under_the_names_of_its_releases(tmp_path):
    save_family("mixtral", tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="mixtral")
    names = load_file(tmp_path / "back/model.safetensors").keys()
    experts = {name for name in names if name.startswith("model.layers.0.block_sparse_moe")}
    weights = {f"experts.{e}.w{i}.weight" for e in range(8) for i in (1, 2, 3)} | {"gate.weight"}
    assert experts == {f"model.layers.0.block_sparse_moe.{name}" for name in weights}


@pytest.mark.parametrize("sample", ["llama", "mixtral"])
def test_sharded_checkpoints_are_read_and_written(sample, tmp_path):
    save_family(sample, tmp_path / "one")
    save_family(sample, tmp_path / "many", max_shard_size="50KB")
    assert len(weight_files(tmp_path / "many")) > 3
    for kind in ("one", "many"):
        convert(tmp_path / kind, tmp_path / f"from-{kind}")
    assert weight_files(tmp_path / "from-one") == weight_files(tmp_path / "from-many")
    convert(tmp_path / "from-one", tmp_path / "split", to=sample, max_shard_size=50_000)
    assert len(weight_files(tmp_path / "split")) > 3
    auto = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(tmp_path / "split", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(model), logits(auto.from_pretrained(tmp_path / "one")))


def test_old_gpt2_files_without_prefix_and_with_masks_are_read(tmp_path):
    theirs = save_family("gpt2", tmp_path / "theirs")

    def make_old(state):
        old = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        old["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
        old["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        state.clear()
        state.update(old)

    change_state(tmp_path / "theirs", make_old)
    convert(tmp_path / "theirs", tmp_path / "ours")
    torch.testing.assert_close(logits(load_model(tmp_path / "ours")), logits(theirs), atol=1e-4, rtol=0)


# ---- what Tessera has no use for ----


def test_what_was_kept_is_not_said_of_another_model(tmp_path):
    """A window of no layer says nothing; of a model that has been given one, it would."""
    save_family("qwen2-window-tied", tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    kept = TesseraConfig.from_pretrained(tmp_path / "ours").converted_from
    assert kept == {"model_type": "qwen2", "fields": {"max_window_layers": 2}}
    save_family("deepseek_v2-groups-not-used", tmp_path / "groups")
    convert(tmp_path / "groups", tmp_path / "ours-of-groups")
    assert TesseraConfig.from_pretrained(tmp_path / "ours-of-groups").converted_from["fields"] == {
        "n_group": 4,
        "topk_group": 2,
    }
    # Experts in groups are another model: what was kept does not fit it any more.
    change_config(tmp_path / "ours-of-groups", n_group=2, topk_group=1)
    convert(tmp_path / "ours-of-groups", tmp_path / "back", to="deepseek_v2")
    back = loaded_config(tmp_path / "back")
    assert (back["n_group"], back["topk_group"], back["topk_method"]) == (2, 1, "group_limited_greedy")


def test_what_was_kept_is_for_its_own_family_and_what_has_changed_since_counts(tmp_path):
    save_family("qwen2", tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    change_config(tmp_path / "ours", eos_token_id=9, rms_norm_eps=0.5)
    convert(tmp_path / "ours", tmp_path / "back", to="qwen2")
    before, after = loaded_config(tmp_path / "theirs"), loaded_config(tmp_path / "back")
    assert {key for key in before if before[key] != after[key]} == {"eos_token_id", "rms_norm_eps"}
    assert (after["eos_token_id"], after["rms_norm_eps"]) == (9, 0.5)

    save_family("llama-settings", tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "ours-of-llama")
    assert load_model(tmp_path / "ours-of-llama").config.converted_from["model_type"] == "llama"
    convert(tmp_path / "ours-of-llama", tmp_path / "mistral", to="mistral")
    assert "pretraining_tp" not in loaded_config(tmp_path / "mistral")


def test_no_word_of_remote_code_comes_along(tmp_path):
    save_family("deepseek_v2", tmp_path / "theirs")
    change_config(tmp_path / "theirs", auto_map={"AutoConfig": "configuration_deepseek.DeepseekV2Config"})
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="deepseek_v2")
    assert "auto_map" not in json.loads((tmp_path / "back/config.json").read_text())


# ---- refusals ----


@pytest.mark.parametrize(
    ("sample", "changes", "sentence"),
    [
        ("llama", {"rope_scaling": {"type": "mrope"}}, "rope_type must be one of default, linear"),
        ("llama", {"rope_parameters": LONGROPE}, "rope_type must be one of .*; got 'longrope'"),
        ("llama", {"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ("llama", {"num_attention_heads": 0}, "a llama that Tessera cannot be"),
        ("qwen2", {"layer_types": ["wavy"] * 3}, "layer_types"),
        ("qwen2", {"hidden_act": "wibble"}, "hidden_act='wibble'"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1, got 0"),
        ("qwen3_moe", {"moe_intermediate_size": 12}, "moe_intermediate_size to be a multiple of 8, got 12"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok must lie between 1 and"),
        ("mixtral", {"intermediate_size": None}, "intermediate_size"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "by_inverse_layer_idx must be False, got True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights must be True, got False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention must be False, got True"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob must be False, got True"),
        (
            "deepseek_v2",
            {"topk_method": "noaux_tc"},
            "topk_method must be 'greedy' or 'group_limited_greedy'",
        ),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func must be 'softmax', got 'sigmoid'"),
        ("deepseek_v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps must be 1e-06, got 1e-05"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq must be 1, got 2"),
        ("deepseek_v2", {"n_shared_experts": 0}, "n_shared_experts must be at least 1"),
        ("deepseek_v2", {"num_key_value_heads": 2}, r"num_key_value_heads \(2\) must equal"),
        ("deepseek_v2-groups-yarn", {"topk_group": 5}, r"topk_group \(5\) is larger than n_group \(4\)"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method must be 'noaux_tc', got 'greedy'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func must be 'sigmoid', got 'softmax'"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "rotated width of a head must be even"),
        ("nanochat", {"dtype": "float99"}, "a nanochat that Tessera cannot be"),
    ],
)
def test_a_configuration_that_tessera_cannot_be_is_refused_by_its_field(sample, changes, sentence):
    values = SAMPLES[sample].to_dict()
    with pytest.raises(ValueError, match=sentence) as caught:
        FAMILIES[family_of(sample)].config_from({**values, **changes})
    assert "\n" not in str(caught.value)


EXPERTS = {
    "mlp_layer_types": "S",
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


@pytest.mark.parametrize(
    ("dialect", "tiles", "family", "sentences"),
    [
        ("llama-tiny", {}, "qwen2", ["attention_bias is False (there: True)"]),
        (
            "llama-tiny",
            {"attention_bias": True},
            "qwen2",
            ["attention_output_bias is True (there: False)"],
        ),
        ("llama-tiny", {}, "qwen3_moe", ["qk_norm is None (there: 'before_rope')"]),
        ("llama-tiny", {}, "mixtral", ["mlp_layer_types is all dense (there: all sparse)"]),
        ("llama-tiny", EXPERTS, "mixtral", ["norm_topk_prob is False (there: True)"]),
        ("llama-tiny", {**EXPERTS, "n_shared_experts": 1}, "mixtral", ["n_shared_experts is 1 (there: 0)"]),
        ("llama-tiny", {**EXPERTS, "scoring_func": "sigmoid"}, "mixtral", ["scoring_func is 'sigmoid'"]),
        ("llama-tiny", {}, "deepseek_v2", ["attention_type is 'multi_head' (there: 'latent')"]),
        ("bytegpt-tiny", {}, "deepseek_v2", ["mlp_layer_types is ['dense', 'sparse', 'dense', 'sparse']"]),
        (
            "bytegpt-tiny",
            {"mlp_layer_types": "DSSS", "rms_norm_eps": 1e-5},
            "deepseek_v2",
            ["rms_norm_eps must be 1e-06, got 1e-05"],
        ),
        (
            "bytegpt-tiny",
            {"mlp_layer_types": "DSSS", "norm_topk_prob": True},
            "deepseek_v2",
            ["norm_topk_prob is True (there: False)"],
        ),
        (
            "bytegpt-tiny",
            {"mlp_layer_types": "DSSS", "scoring_func": "sigmoid"},
            "deepseek_v3",
            ["router_correction_bias is False (there: True)"],
        ),
    ],
)
def test_what_stands_in_a_models_way_to_a_family_is_named(dialect, tiles, family, sentences):
    with pytest.raises(ValueError, match=f"the model cannot be a {family}: ") as caught:
        FAMILIES[family].config_for(tiny_config(dialect, **tiles))
    assert all(sentence in str(caught.value) for sentence in sentences), caught.value


def test_experts_of_several_dtypes_are_not_stacked(tmp_path):
    save_family("mixtral", tmp_path / "theirs")
    name = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    change_state(tmp_path / "theirs", lambda s: s.update({name: s[name].bfloat16()}))
    with pytest.raises(ValueError, match="belong together but are bfloat16 and float32"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
