"""What a result has to pass: each comparison finds what it is there for."""

import json
import shutil

import psutil
import pytest
import torch
import transformers
from helpers.models import EVERY_MODEL, tiny_config, tiny_model
from helpers.weights import randomize
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tessera import TesseraConfig, build_byte_tokenizer
from tessera.conversion import acceptance, samples, verify
from tessera.conversion.checkpoints import Checkpoint
from tessera.conversion.convert import convert
from tessera.conversion.families import FAMILIES
from tessera.conversion.samples import (
    build_sample,
    choose_layers,
    cut_config,
    free_memory,
    layers_for_all_kinds,
    memory_needed,
)
from tessera.conversion.sound_weights import is_finite, require_one_dtype
from tessera.conversion.sources import open_checkpoint
from tessera.conversion.targets import Options, Written
from tessera.conversion.verify import Noise, random_ids, run_model


def save(folder, name: str = "llama-tiny", **overrides):
    model = tiny_model(name, **overrides)
    model.save_pretrained(folder)
    return model


def save_llama(folder, layers: int = 3, dtype: torch.dtype = torch.float32, **overrides):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "num_hidden_layers": layers}
    model = randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | overrides)))
    model.to(dtype).save_pretrained(folder)
    return model


def only(tmp_path, *names: str) -> None:
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


# ---- weights ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_none_is_found_anywhere(value, dtype):
    for at in (0, 777, 999):
        tensor = torch.linspace(-1, 1, 1000).to(dtype)
        assert is_finite(tensor)
        tensor[at] = value
        assert not is_finite(tensor)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    model = save(tmp_path / "ours")
    model.model.layers[2].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"^model.layers.2.mlp.up_proj.weight holds NaN or infinite numbers"):
        convert(tmp_path / "ours", tmp_path / "out", to="llama")
    model.model.layers[2].mlp.up_proj.weight.data[3, 5] = 1e5
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="up_proj.weight is not finite after rounding to torch.float16"):
        convert(tmp_path / "ours", tmp_path / "out", to="llama", dtype="float16")
    only(tmp_path, "ours")
    convert(tmp_path / "ours", tmp_path / "out", to="llama", dtype="bfloat16", verify="weights")


def test_a_few_tensors_in_half_precision_are_damage_and_wider_ones_are_not():
    weights = {"a": torch.ones(9), "b": torch.ones(9)}
    require_one_dtype(weights)
    require_one_dtype({name: tensor.bfloat16() for name, tensor in weights.items()} | {"norm": torch.ones(2)})
    odd = weights | {"norm": torch.ones(2).half()}
    with pytest.raises(ValueError, match="norm is float16 where most weights are float32; .*--dtype"):
        require_one_dtype(odd)
    require_one_dtype(odd, torch.bfloat16)
    with pytest.raises(ValueError, match="norm holds int32, which are no weights"):
        require_one_dtype(weights | {"norm": torch.ones(2).int()}, torch.bfloat16)


# ---- logits ----


def test_a_result_that_rounds_in_the_wrong_place_is_found_in_its_own_dtype(tmp_path, monkeypatch):
    """Equal in fp32, and three times as far from it as the source is in bf16."""
    save_llama(tmp_path / "theirs", dtype=torch.bfloat16)
    build = verify.build_model

    def careless(checkpoint, dtype=torch.float32):
        model = build(checkpoint, dtype)
        if checkpoint.kind == "tessera" and dtype == torch.bfloat16:
            for module in model.modules():  # what a cast of the whole model does
                if hasattr(module, "inv_freq"):
                    module.inv_freq = module.inv_freq.bfloat16().float() * 1.05
        return model

    monkeypatch.setattr(acceptance, "build_model", careless)
    with pytest.raises(
        ValueError, match="not the same model: logits in bfloat16, distance from float32: .*all"
    ):
        convert(tmp_path / "theirs", tmp_path / "ours")
    only(tmp_path, "theirs")


def test_noise_is_compared_with_the_sources_and_no_number_is_none():
    assert Noise(1.0, 1.9, 10.0).is_alike and not Noise(1.0, 2.1, 10.0).is_alike
    assert Noise(0.0, 0.0, 10.0).is_alike and not Noise(0.0, 0.1, 10.0).is_alike
    assert not Noise(1.0, float("nan"), 10.0).is_alike and not Noise(float("inf"), 1.0, 10.0).is_alike


def test_no_more_positions_are_kept_than_are_needed():
    class Positions(torch.nn.Module):
        def forward(self, ids, use_cache):
            return transformers.modeling_outputs.CausalLMOutput(
                logits=torch.arange(ids.shape[1])[None, :, None].expand(*ids.shape, 2)
            )

    short, long = run_model(Positions(), [torch.zeros(1, 5), torch.zeros(2, 640)])
    assert short[0, :, 0].tolist() == [0, 1, 2, 3, 4]
    assert long.shape == (2, 128, 2) and long[0, 0, 0] == 0 and long[0, -1, 0] == 639


# ---- a sample of layers ----


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_a_sample_has_the_first_and_the_last_layer_and_every_kind(name):
    config = tiny_config(name)
    layers = choose_layers(config, layers_for_all_kinds(config))
    assert layers[0] == 0 and len(set(layers)) == len(layers)
    kinds = {(config.attention_kind(i), config.feed_forward_kind(i)) for i in range(config.num_hidden_layers)}
    assert {(config.attention_kind(i), config.feed_forward_kind(i)) for i in layers} == kinds
    sample = cut_config(config, len(layers))
    for slot, layer in enumerate(layers):
        assert sample.attention_kind(slot) == config.attention_kind(layer)
        assert sample.feed_forward_kind(slot) == config.feed_forward_kind(layer)


def test_of_a_deep_model_the_layers_are_spread():
    assert choose_layers(tiny_config("llama-tiny", num_hidden_layers=9), 3) == [0, 4, 8]
    leading = TesseraConfig.from_preset("bytegpt-tiny", num_hidden_layers=9, mlp_layer_types="DDSSSSSSS")
    assert layers_for_all_kinds(leading) == 3
    assert choose_layers(leading, 3) == [0, 1, 8]


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt2", "mistral"])
def test_a_sample_of_a_family_runs_in_its_own_class_with_the_layers_that_are_named(name, tmp_path):
    kind = FAMILIES[name]
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 64, "intermediate_size": 48}
    if name == "mistral":
        sizes["num_key_value_heads"] = 1
    if name == "deepseek_v3":
        sizes |= {"moe_intermediate_size": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
        sizes |= {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8}
        sizes |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 2}
        sizes |= {"n_shared_experts": 1, "num_mtp_layers": 0}
    if name == "gpt2":
        sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 5, "n_head": 2, "n_positions": 64}
        sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.AutoConfig.for_model(name, **sizes)
    whole = randomize(getattr(transformers, kind.architecture)(config))
    whole.save_pretrained(tmp_path / "theirs")
    theirs = open_checkpoint(tmp_path / "theirs")
    layers = choose_layers(theirs.config, 3)
    assert layers == ([0, 1, 4] if name == "deepseek_v3" else [0, 2, 4])
    sample = build_sample(theirs, layers, torch.float32)
    assert type(sample) is type(whole)
    # The same by hand: the whole model without its other layers.
    stack = whole.transformer.h if name == "gpt2" else whole.model.layers
    for slot, layer in enumerate(layers):
        stack[slot] = stack[layer]
    del stack[3:]
    whole.config.num_hidden_layers = 3
    ids = random_ids(theirs.config)[1]
    torch.testing.assert_close(run_model(sample, [ids])[0], run_model(whole, [ids])[0])

    convert(tmp_path / "theirs", tmp_path / "ours", verify="sample")
    ours = build_sample(open_checkpoint(tmp_path / "ours"), layers, torch.float32)
    torch.testing.assert_close(run_model(ours, [ids])[0], run_model(sample, [ids])[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("by", ["choice", "memory"])
def test_a_sample_finds_another_model_too(by, tmp_path, translate_wrongly):
    save_llama(tmp_path / "theirs", layers=9)
    needed = memory_needed(open_checkpoint(tmp_path / "theirs").config, 3)
    how = {"verify": "sample"} if by == "choice" else {"verify_memory": needed}
    done = convert(tmp_path / "theirs", tmp_path / "right", **how)
    assert done.notes == ["logits are compared on a sample: layers 0, 4, 8 of 9"]
    translate_wrongly()
    with pytest.raises(ValueError, match="not the same model: logits differ by up to"):
        convert(tmp_path / "theirs", tmp_path / "ours", **how)
    only(tmp_path, "theirs", "right")


def test_memory_decides_and_is_said(tmp_path):
    save_llama(tmp_path / "theirs")
    config = open_checkpoint(tmp_path / "theirs").config
    assert memory_needed(config, 1) < memory_needed(config, 3) == memory_needed(config) < free_memory()
    whole = convert(tmp_path / "theirs", tmp_path / "whole", verify_memory=memory_needed(config))
    assert not whole.notes and whole.difference.is_small
    none = convert(tmp_path / "theirs", tmp_path / "none", verify_memory=1000)
    assert none.difference is None and "logits are not compared: " in none.notes[0]
    assert "1,000 may be taken" in (tmp_path / "none/conversion_report.md").read_text()
    weights = convert(tmp_path / "theirs", tmp_path / "weights", verify="weights")
    assert weights.difference is None and not any("logits" in check.name for check in weights.report.checks)


# ---- what lies beside the weights ----


def test_a_sample_that_was_asked_for_and_does_not_fit_is_an_error(tmp_path):
    save_llama(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"--verify sample is not possible: [\d,]+ bytes .* 1 may be taken"):
        convert(tmp_path / "theirs", tmp_path / "ours", verify="sample", verify_memory=1)
    only(tmp_path, "theirs")


def test_pages_of_files_count_as_free_memory(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    monkeypatch.setattr(samples, "_GROUP", tmp_path)
    assert free_memory() <= psutil.virtual_memory().total, "a group without these figures"
    (tmp_path / "memory.stat").write_text("anon 100\nfile 800\ninactive_file 700\nactive_file 100\n")
    assert free_memory() == 800


def test_memory_that_ends_while_fp8_is_compared_is_a_sentence(monkeypatch):
    def end(*arguments):
        raise MemoryError

    monkeypatch.setattr(acceptance, "_run_and_compare", end)
    monkeypatch.setattr(acceptance, "_choose", lambda *arguments: [])
    checkpoint = Checkpoint(None, "llama", tiny_config("llama-tiny"), {})
    written = Written(None, checkpoint, checkpoint.config, {}, Options(), "cpu")
    with pytest.raises(ValueError, match="memory is not enough to compare logits: .*MemoryError"):
        acceptance.compare_models(checkpoint, checkpoint, written, None, None)


def with_tokenizer(folder) -> None:
    build_byte_tokenizer().save_pretrained(folder)


def test_text_runs_through_the_tokenizer_and_both_give_its_ids(tmp_path):
    save_llama(tmp_path / "theirs")
    with_tokenizer(tmp_path / "theirs")
    checks = {check.name: check for check in convert(tmp_path / "theirs", tmp_path / "ours").report.checks}
    assert checks["tokenizer"].found.endswith("equal ids")
    assert checks["logits in float32, text"].passed
    assert float(checks["logits in float32, text"].found) <= float(checks["logits in float32, text"].allowed)


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path):
    save_llama(tmp_path / "theirs", vocab_size=100)
    with_tokenizer(tmp_path / "theirs")
    largest = len(build_byte_tokenizer()) - 1
    with pytest.raises(
        ValueError, match=rf"largest id is {largest} \('.*'\), but the model has rows for 100"
    ):
        convert(tmp_path / "theirs", tmp_path / "ours")
    only(tmp_path, "theirs")


def save_words(folder, vocabulary: dict[str, int], **settings) -> None:
    """A tokenizer of whole words, which has no token for what it does not know."""
    tokenizer = Tokenizer(WordLevel(vocabulary))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)


def test_ids_with_gaps_are_refused_by_the_largest_of_them(tmp_path):
    save_llama(tmp_path / "theirs", vocab_size=97)
    save_words(tmp_path / "theirs", {"a": 0, "<u>": 200})
    with pytest.raises(ValueError, match=r"largest id is 200 \('<u>'\), but the model has rows for 97"):
        convert(tmp_path / "theirs", tmp_path / "ours")


def test_a_tokenizer_that_encodes_only_what_it_knows_is_compared_by_its_vocabulary(tmp_path, monkeypatch):
    save_llama(tmp_path / "theirs")
    save_words(tmp_path / "theirs", {"a": 0, "b": 1}, unk_token=None)
    report = convert(tmp_path / "theirs", tmp_path / "ours").report
    checks = {check.name: check.found for check in report.checks}
    assert checks["tokenizer"] == "2 tokens, equal vocabulary"
    assert "does not encode the sample text" in report.notes[0] and "no ids" in report.notes[0]
    bring = Checkpoint.copy_side_files

    def other(checkpoint, folder):
        bring(checkpoint, folder)
        build_byte_tokenizer().save_pretrained(folder)

    monkeypatch.setattr(Checkpoint, "copy_side_files", other)
    monkeypatch.setattr(acceptance, "_side_files", lambda source, result: [])
    with pytest.raises(ValueError, match="not the same model: tokenizer: ids and vocabulary"):
        convert(tmp_path / "theirs", tmp_path / "again")


def test_code_that_comes_with_a_tokenizer_is_not_run_and_nobody_is_asked(tmp_path, monkeypatch):
    save_llama(tmp_path / "theirs")
    with_tokenizer(tmp_path / "theirs")
    settings = tmp_path / "theirs/tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | code))
    (tmp_path / "theirs/own.py").write_text("raise SystemExit('run')")

    def ask(*words):
        raise AssertionError("asked")

    monkeypatch.setattr("builtins.input", ask)
    report = convert(tmp_path / "theirs", tmp_path / "ours", verify="weights").report
    assert any("needs code of its own (auto_map in tokenizer_config.json)" in note for note in report.notes)


def test_all_chat_templates_travel_along(tmp_path, monkeypatch):
    save_llama(tmp_path / "theirs")
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", verify="weights")
    came = AutoTokenizer.from_pretrained(tmp_path / "ours").chat_template
    assert came == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    bring = Checkpoint.copy_side_files

    def other(checkpoint, folder):
        bring(checkpoint, folder)
        (folder / "additional_chat_templates/tool_use.jinja").write_text("another")

    monkeypatch.setattr(Checkpoint, "copy_side_files", other)
    with pytest.raises(
        ValueError, match="files beside the weights: additional_chat_templates/tool_use.jinja"
    ):
        convert(tmp_path / "theirs", tmp_path / "again", verify="weights")


def test_a_tokenizer_that_is_damaged_is_refused(tmp_path):
    save_llama(tmp_path / "theirs")
    with_tokenizer(tmp_path / "theirs")
    file = tmp_path / "theirs/tokenizer.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer: .*; restore it, or take it away"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    only(tmp_path, "theirs")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "files beside the weights: tokenizer.json"),
        (lambda d: (d / "generation_config.json").write_text("{}"), "weights: generation_config.json"),
    ],
)
def test_what_did_not_come_along_is_found(change, sentence, tmp_path, monkeypatch):
    save_llama(tmp_path / "theirs")
    with_tokenizer(tmp_path / "theirs")
    bring = Checkpoint.copy_side_files

    def careless(checkpoint, folder):
        bring(checkpoint, folder)
        change(folder)

    monkeypatch.setattr(Checkpoint, "copy_side_files", careless)
    with pytest.raises(ValueError, match=f"not the same model: .*{sentence}"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    only(tmp_path, "theirs")


def test_ids_are_compared_where_a_tokenizer_is_written_anew(tmp_path, monkeypatch):
    save_llama(tmp_path / "theirs")
    with_tokenizer(tmp_path / "theirs")
    bring = Checkpoint.copy_side_files

    def other(checkpoint, folder):
        bring(checkpoint, folder)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        vocab = tokenizer["model"]["vocab"]
        first, second = sorted(vocab)[40:42]
        vocab[first], vocab[second] = vocab[second], vocab[first]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    monkeypatch.setattr(Checkpoint, "copy_side_files", other)
    monkeypatch.setattr(acceptance, "_side_files", lambda source, result: [])
    with pytest.raises(ValueError, match="not the same model: tokenizer: .*vocabulary"):
        convert(tmp_path / "theirs", tmp_path / "ours")


def test_a_head_that_comes_untied_is_found(tmp_path, monkeypatch):
    save_llama(tmp_path / "theirs", tie_word_embeddings=True)
    done = convert(tmp_path / "theirs", tmp_path / "right")
    assert "tied in both" in [check.found for check in done.report.checks]
    build = verify.build_model

    def careless(checkpoint, dtype=torch.float32):
        model = build(checkpoint, dtype)
        if checkpoint.kind == "tessera":
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        return model

    monkeypatch.setattr(acceptance, "build_model", careless)
    with pytest.raises(ValueError, match="not the same model: tied head: untied in TesseraForCausalLM"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    shutil.rmtree(tmp_path / "right")
    only(tmp_path, "theirs")
