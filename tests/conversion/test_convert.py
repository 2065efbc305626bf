"""A conversion is the same model, out and back; what is not, is refused and leaves nothing."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers.families import LONGROPE, change_config, change_state, logits, save_family, weight_files
from helpers.models import EVERY_MODEL, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tessera import TesseraConfig, build_byte_tokenizer, cli
from tessera.conversion import convert as conversion
from tessera.conversion.convert import convert
from tessera.conversion.families import architecture
from tessera.conversion.sources import open_checkpoint
from tessera.conversion.targets import TARGETS
from tessera.conversion.verify import compare_logits
from tessera.modeling.loading import load_model


def save_tessera(name: str, folder, **overrides):
    model = tiny_model(name, **overrides)
    model.save_pretrained(folder)
    return model


# ---- families of transformers ----


def test_interleaved_rotation_and_padded_rows_leave_as_plain_llama(tmp_path):
    """Neither exists there; both can be undone without changing a logit."""
    ours = save_tessera(
        "llama-tiny", tmp_path / "ours", rope_interleave=True, vocab_size=250, padded_vocab_size=256
    )
    convert(tmp_path / "ours", tmp_path / "llama", to="llama")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    assert theirs.config.vocab_size == theirs.lm_head.weight.shape[0] == 250
    torch.testing.assert_close(logits(theirs, 250), logits(ours, 250), atol=1e-5, rtol=0)
    plain = transformers.LlamaForCausalLM(theirs.config)
    cut = ("model.embed_tokens.weight", "lm_head.weight")
    state = {name: tensor[:250] if name in cut else tensor for name, tensor in ours.state_dict().items()}
    plain.load_state_dict(state, strict=True)
    assert (logits(plain, 250) - logits(ours, 250)).abs().max() > 0.01, "the order of channels must matter"


@pytest.mark.parametrize(("layers", "target"), [("L", "llama"), ("S", "mistral")])
def test_a_tessera_model_runs_in_transformers_own_class(layers, target, tmp_path):
    ours = save_tessera("verse-tiny", tmp_path / "ours", layer_types=layers)
    convert(tmp_path / "ours", tmp_path / "out", to=target)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__module__ == f"transformers.models.{target}.modeling_{target}"
    vocab_size = ours.config.vocab_size
    torch.testing.assert_close(logits(theirs, vocab_size), logits(ours, vocab_size), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("dialect", "target", "fields"),
    [
        ("bytegpt-tiny", "llama", ["attention_type is 'latent'", "mlp_layer_types"]),
        ("bytegpt-tiny", "deepseek_v3", ["scoring_func is 'softmax' (there: 'sigmoid')"]),
        (
            "nanochat-tiny",
            "nanochat",
            ["smear is True", "backout", "value_embedding_interval", "layer_types"],
        ),
        ("gpt2-tiny", "qwen3", ["norm_type is 'layer_norm'", "position_embedding_type is 'learned'"]),
        ("llama-tiny", "gpt2", ["gated_mlp is True (there: False)", "num_key_value_heads is 2 (there: 4)"]),
        ("partial-rotary-interleaved-llama3", "llama", ["rope_parameters"]),
        ("verse-tiny", "mistral", ["layer_types is ['sliding_attention', 'full_attention'"]),
    ],
)
def test_what_a_family_has_no_place_for_is_named(dialect, target, fields, tmp_path):
    save_tessera(dialect, tmp_path / "ours")
    with pytest.raises(ValueError, match=f"the model cannot be a {target}") as caught:
        convert(tmp_path / "ours", tmp_path / "out", to=target)
    assert all(field in str(caught.value) for field in fields), caught.value
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_rounding_to_bfloat16_is_verified_against_rounded_weights(tmp_path):
    save_tessera("latent-sliding-lowrank-sigmoid", tmp_path / "ours")
    done = convert(tmp_path / "ours", tmp_path / "rounded", to="tessera", dtype="bfloat16")
    assert done.difference.largest < 1e-5
    state, before = (load_file(tmp_path / d / "model.safetensors") for d in ("rounded", "ours"))
    for name, tensor in state.items():
        if "e_score_correction_bias" in name:
            assert torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name].bfloat16()), name
    assert load_model(tmp_path / "rounded").dtype == torch.bfloat16


def test_tokenizer_template_and_generation_settings_travel_along(tmp_path):
    save_tessera("llama-tiny", tmp_path / "ours")
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours/tokenizer_meta.json").write_text("{}")
    settings = {"eos_token_id": 5, "temperature": 0.3, "do_sample": True}
    transformers.GenerationConfig(**settings).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "native", n_experts=0, mp=2, verify="weights")
    convert(tmp_path / "native", tmp_path / "back", verify="weights")
    convert(tmp_path / "back", tmp_path / "llama", to="llama", verify="weights")
    for folder in ("native", "back", "llama"):
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer_meta.json", "chat_template.jinja"):
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
        assert transformers.GenerationConfig.from_pretrained(tmp_path / folder).temperature == 0.3
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    text = "Grüße, 世界\n"
    assert theirs(text)["input_ids"] == tokenizer(text)["input_ids"] == list(text.encode())


# ---- native ----


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_native_and_back_gives_the_same_bytes(name, tmp_path):
    save_tessera(name, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "native", to="native")
    convert(tmp_path / "native", tmp_path / "back", verify="weights")
    assert weight_files(tmp_path / "back") == weight_files(tmp_path / "ours")
    before, after = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("ours", "back"))
    assert after == before


# ---- refusals ----


def test_a_result_with_other_logits_is_not_kept(tmp_path, translate_wrongly):
    """The weights arrive as they were written, but the translation means another model."""
    save_family("llama", tmp_path / "theirs")
    translate_wrongly()
    with pytest.raises(ValueError, match="not the same model: logits differ by up to .* nothing is kept"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_numbers_that_are_none_at_some_lengths_only_are_no_small_difference():
    config = tiny_config("llama-tiny")

    class Sometimes(torch.nn.Module):
        def __init__(self, broken: bool):
            super().__init__()
            self.broken = broken

        def forward(self, ids, use_cache):
            value = float("nan") if self.broken and ids.shape[1] > 1 else 1.0
            return SimpleNamespace(logits=torch.full((*ids.shape, 8), value))

    assert compare_logits(lambda: Sometimes(False), lambda: Sometimes(False), config).is_small
    assert not compare_logits(lambda: Sometimes(False), lambda: Sometimes(True), config).is_small
    assert not compare_logits(lambda: Sometimes(True), lambda: Sometimes(True), config).is_small


@pytest.mark.parametrize("target", ["tessera", "native"])
def test_a_result_that_was_written_wrongly_is_not_kept(target, tmp_path, monkeypatch):
    save_family("llama", tmp_path / "theirs")
    right = TARGETS[target]

    def wrong(folder, *arguments):
        right.write(folder, *arguments)
        file = next(folder.glob("*.safetensors"))
        state = load_file(file)
        name = next(name for name in state if "q_proj" in name or ".wq." in name)
        state[name] = state[name].roll(1, 0)
        save_file(state, file, metadata={"format": "pt"})

    monkeypatch.setitem(TARGETS, target, dataclasses.replace(right, write=wrong))
    with pytest.raises(ValueError, match="1 tensors read back are not what was written .*q_proj.weight"):
        convert(tmp_path / "theirs", tmp_path / "ours", to=target)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def write_index(folder, **values) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda d: change_config(d, model_type="mamba"),
            "model type 'mamba'; known are tessera, llama, mistral",
        ),
        (lambda d: change_config(d, model_type=None), "model type None; known are"),
        (lambda d: change_config(d, model_type=["llama"]), r"model type \['llama'\]; known are"),
        (lambda d: change_config(d, num_attention_heads=0), "a llama that Tessera cannot be: "),
        (lambda d: change_config(d, dtype="wibble"), "a llama that Tessera cannot be: .*wibble"),
        (lambda d: write_index(d, weight_map={"a": 3}), "has no weight_map, which says where"),
        (
            lambda d: write_index(d, weight_map={"a": "one.safetensors"}),
            "says that a is in one.safetensors, which does not hold it",
        ),
        (
            lambda d: change_state(d, lambda s: s.pop("model.norm.weight")),
            "does not fit its configuration: missing model.norm.weight",
        ),
        (
            lambda d: change_state(d, lambda s: s.update(wibble=torch.zeros(1))),
            "does not fit its configuration: unexpected wibble",
        ),
        (
            lambda d: change_state(d, lambda s: s.update({"model.norm.weight": torch.zeros(3)})),
            r"model.norm.weight gives a tensor of shape \(3,\), but the configuration says \(64,\)",
        ),
        (lambda d: change_config(d, num_hidden_layers=2), "9 unexpected tensors"),
        (lambda d: change_config(d, num_hidden_layers=10**9), "num_hidden_layers in config.json is 10000000"),
        (lambda d: change_config(d, hidden_act="wibble"), "no activation hidden_act='wibble'"),
        (lambda d: change_config(d, quantization_config={"quant_method": "fp8"}), "is quantized"),
        (lambda d: change_config(d, rope_parameters=LONGROPE), "rope_type"),
        (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 90), "cannot be read"),
        (
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            "is a pickle, which is not read",
        ),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_in_one_sentence(damage, sentence, tmp_path):
    save_family("llama", tmp_path / "theirs")
    damage(tmp_path / "theirs")
    with pytest.raises(ValueError, match=sentence) as caught:
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"to": "mamba"}, "--to mamba: known targets are tessera, native, llama"),
        ({}, "is a Tessera model already; say with --to"),
        ({"to": "llama", "mp": 2}, "ranks are for the native layout"),
        ({"mp": 0}, "mp must be at least 1"),
        ({"mp": 3}, r"mp 3 does not divide num_attention_heads \(4\), padded_vocab_size \(256\)"),
        ({"mp": 4}, r"mp 4 does not divide num_key_value_heads \(2\)"),
        ({"mp": 2, "n_experts": 4}, "n_experts is 4, but the model in .* has 0"),
        ({"to": "llama", "dtype": "int8"}, "--dtype int8: choose from"),
        ({"to": "llama", "device": "banana"}, "--device banana: "),
        ({"to": "llama", "device": "cuda:99"}, "--device cuda:99: "),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, sentence, tmp_path):
    save_tessera("llama-tiny", tmp_path / "ours")
    with pytest.raises(ValueError, match=sentence):
        convert(tmp_path / "ours", tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_numbers_that_no_tensors_stand_for_are_refused_before_they_are_counted_to(tmp_path):
    save_family("mixtral", tmp_path / "mixtral")
    save_tessera("llama-tiny", tmp_path / "tessera")
    convert(tmp_path / "tessera", tmp_path / "native", mp=1, verify="weights")
    for folder, field, sentence in (
        ("mixtral", "num_local_experts", "says 1000000000 experts in each layer that has some, but .* only"),
        (
            "mixtral",
            "num_hidden_layers",
            "num_hidden_layers in config.json is 1000000000, but there",
        ),
        (
            "tessera",
            "num_hidden_layers",
            "num_hidden_layers in config.json is 1000000000, but there",
        ),
        ("tessera", "num_mtp_layers", "num_mtp_layers in config.json is 1000000000, but there"),
        ("native", "num_hidden_layers", "num_hidden_layers in config.json is 1000000000, but there"),
    ):
        config = (tmp_path / folder / "config.json").read_text()
        change_config(tmp_path / folder, **{field: 10**9})
        with pytest.raises(ValueError, match=sentence):
            open_checkpoint(tmp_path / folder)
        (tmp_path / folder / "config.json").write_text(config)
    (tmp_path / "native/config.json").unlink()
    params = {"n_layers": 10**9}
    (tmp_path / "native/params.json").write_text(json.dumps(params))
    with pytest.raises(ValueError, match="n_layers in params.json is 1000000000"):
        open_checkpoint(tmp_path / "native")


def test_a_tessera_model_is_rounded_where_it_need_become_nothing_else(tmp_path):
    save_tessera("llama-tiny", tmp_path / "ours")
    done = convert(tmp_path / "ours", tmp_path / "half", dtype="bfloat16")
    assert done.target == "tessera"
    assert load_file(tmp_path / "half/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_what_is_in_the_way_is_left_alone(tmp_path):
    save_tessera("llama-tiny", tmp_path / "ours")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(ValueError, match="is there already and not empty"):
        convert(tmp_path / "ours", tmp_path / "full", to="llama")
    assert (tmp_path / "full/file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "ours", tmp_path / "empty", to="llama")
    assert (tmp_path / "empty/config.json").is_file()


def test_a_target_may_be_a_link_but_not_where_one_stands(tmp_path, monkeypatch):
    save_tessera("llama-tiny", tmp_path / "ours")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    convert(tmp_path / "ours", tmp_path / "link", to="llama")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/config.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="is the current directory"):
        convert(tmp_path / "ours", ".", to="llama")


def test_tied_heads_that_differ_are_refused_and_equal_ones_dropped(tmp_path):
    save_family("qwen3", tmp_path / "theirs")
    shutil.copytree(tmp_path / "theirs", tmp_path / "other")
    change_state(
        tmp_path / "theirs", lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()})
    )
    convert(tmp_path / "theirs", tmp_path / "ours")
    with safe_open(tmp_path / "ours/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in list(file.keys())
    change_state(
        tmp_path / "other", lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"] + 1})
    )
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
        convert(tmp_path / "other", tmp_path / "ours2")


def test_architecture_sees_what_changes_a_number_and_nothing_else():
    plain = architecture(tiny_config("llama-tiny"))
    assert architecture(tiny_config("llama-tiny", initializer_range=0.5, sliding_window=3)) == plain
    assert architecture(tiny_config("llama-tiny", rms_norm_eps=0.5)) != plain
    assert architecture(tiny_config("llama-tiny", rope_reverse=True)) != plain
    assert set(plain) < set(TesseraConfig.__annotations__)


def test_a_run_directory_means_its_model(tmp_path):
    save_tessera("llama-tiny", tmp_path / "run/final")
    assert open_checkpoint(tmp_path / "run").folder == tmp_path / "run/final"
    with pytest.raises(ValueError, match="there is no checkpoint"):
        open_checkpoint(tmp_path / "nowhere")


# ---- the command ----


def run_in_process(*arguments) -> int:
    with pytest.raises(SystemExit) as exit:
        cli.run([str(argument) for argument in arguments])
    return exit.value.code or 0


def test_the_command_takes_the_two_numbers_and_says_what_it_compared(tmp_path, capsys):
    save_tessera("bytegpt-tiny", tmp_path / "ours")
    assert run_in_process("convert", tmp_path / "ours", tmp_path / "native", 4, 2) == 0
    assert "tessera -> native: " in (out := capsys.readouterr().out) and "logits differ by at most 0 (" in out
    assert (tmp_path / "native/model1-mp2.safetensors").is_file()
    for words, sentence in (((8, 2), "n_experts is 8, but"), ((4,), "give both numbers or neither")):
        assert run_in_process("convert", tmp_path / "ours", tmp_path / "other", *words) == 2
        error = capsys.readouterr().err
        assert error.startswith("tessera: error: ") and sentence in error and error.count("\n") == 1


def test_the_module_takes_the_arguments_of_deepseeks_converter(tmp_path, capsys):
    save_tessera("bytegpt-tiny", tmp_path / "ours")
    with pytest.raises(SystemExit):
        conversion.main([str(tmp_path / "ours"), str(tmp_path / "native"), "4", "2"])
    assert sorted(path.name for path in (tmp_path / "native").glob("*mp2*")) == [
        "model0-mp2.safetensors",
        "model1-mp2.safetensors",
    ]
    with pytest.raises(SystemExit) as exit:
        conversion.main(["a", "b"])
    assert exit.value.code == 2 and "usage: python -m tessera.conversion.convert" in capsys.readouterr().err
