"""GGUF files hold the model: read by the gguf package and by transformers' own loader, or refused."""

import importlib.util
import json

import numpy as np
import pytest
import torch
import transformers
from helpers.models import tiny_config, tiny_model
from helpers.weights import randomize
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tessera import TesseraConfig, build_byte_tokenizer, cli
from tessera.conversion import gguf_files, gguf_tokenizer
from tessera.conversion.convert import convert
from tessera.conversion.gguf_architectures import choose
from tessera.tokenization.byte_level import GPT2_PATTERN, GPT4_PATTERN
from tessera.tokenization.sentencepiece_models import Piece, SentencePieceModel, _backend

gguf = pytest.importorskip("gguf")

GROUPED = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
# Each in transformers' own class and in the one that its GGUF loader makes.
FAMILIES = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "llama-tied": transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**GROUPED, sliding_window=None),
    "qwen3": transformers.Qwen3Config(**GROUPED, head_dim=24),
    "gpt2": transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=128),
}
SPARSE = {"mlp_layer_types": "S", "n_routed_experts": 4, **EXPERTS}
# Preset, fields laid over it -> the architecture that it becomes.
TESSERA = {
    "qwen2": ("llama-tiny", {"attention_bias": True, "attention_output_bias": False}),
    "llama": ("llama-tiny", {"rope_interleave": True}),
    "qwen3moe": ("llama-tiny", {**SPARSE, "qk_norm": "before_rope"}),
    "qwen3": ("llama-tiny", {"qk_norm": "before_rope", "rope_interleave": True}),
    "gpt2": ("gpt2-tiny", {}),
    "deepseek2": ("bytegpt-tiny", {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}),
}
REFUSED = {
    "windows": ("verse-tiny", {}, "sliding_window is"),
    "nanochat": ("nanochat-tiny", {}, "value_embedding_interval is 2"),
    "norms after the rotation": ("llama-tiny", {"qk_norm": "after_rope"}, "qk_norm is 'after_rope'"),
    "dense after sparse": ("bytegpt-tiny", {}, "dense layers after sparse"),
    "another GELU": ("gpt2-tiny", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "dynamic scaling": (
        "llama-tiny",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rope_type is 'dynamic'",
    ),
    "half of a head rotated": (
        "llama-tiny",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "channels are rotated",
    ),
}


def save(name: str, folder, **fields):
    model = tiny_model(name, **fields)
    model.save_pretrained(folder)
    return model


def save_family(name: str, folder):
    model = randomize(AutoModelForCausalLM.from_config(FAMILIES[name]))
    model.save_pretrained(folder)
    return model


def logits(model, vocab_size: int = 97) -> torch.Tensor:
    ids = torch.randint(vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits.float()


def found(done, name: str) -> float:
    """The first figure of a check."""
    (check,) = [check for check in done.report.checks if check.name == name]
    return float(check.found.split(",")[0])


def written_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def nothing_at(folder) -> bool:
    return written_in(folder) == ["model"]


# ---- weights ----


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loader_of_transformers_gets_equal_logits(name, tmp_path):
    model = save_family(name, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out", to="gguf", verify="weights")
    # Its loader does not read every size (the heads of Qwen3, the vocabulary of GPT-2), so it is told; a
    # Mistral is a Llama there.
    told = {} if name == "mistral" else {"config": model.config}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model-F32.gguf", dtype=torch.float32, **told
    )
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)


@pytest.mark.parametrize("name", TESSERA)
def test_a_model_of_tessera_becomes_the_architecture_that_has_its_tiles(name, tmp_path):
    preset, fields = TESSERA[name]
    save(preset, tmp_path / "model", **fields)
    done = convert(tmp_path / "model", tmp_path / "file.gguf")
    assert done.target == "gguf" and found(done, "logits in float32") <= 1e-4
    reader = gguf.GGUFReader(tmp_path / "file.gguf")
    assert reader.fields["general.architecture"].contents() == name
    there = {tensor.name for tensor in reader.tensors}
    known = gguf.MODEL_TENSORS[{v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[name]]
    layers = reader.fields[f"{name}.block_count"].contents()
    stems = {gguf.TENSOR_NAMES[kind].format(bid=i) for kind in known for i in range(layers)}
    assert {tensor.rsplit(".", 1)[0] for tensor in there} <= stems


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_numbers_are_those_of_the_weights_in_the_type_that_was_asked_for(dtype, tmp_path):
    save_family("llama", tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "file.gguf", dtype=dtype, verify="weights")
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).state_dict()
    reader = gguf.GGUFReader(tmp_path / "file.gguf")
    read = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    wanted = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj.weight",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        # Rows of 80, which are no whole number of blocks of 32.
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    }
    for name, ours in names.items():
        expected, there = weights[ours].numpy(), read[name].reshape(weights[ours].shape)
        narrow = dtype == "q8_0" and name.endswith("ffn_down.weight")
        assert kinds[name] == ("F16" if narrow else wanted)
        if kinds[name] == "Q8_0":
            blocks = np.abs(expected).reshape(-1, 32).max(1).repeat(32).reshape(expected.shape)
            assert (np.abs(there - expected) <= blocks / 127 * 0.57).all()
            assert not np.array_equal(there, expected)
        else:
            rounded = weights[ours].to(
                {"F32": torch.float32, "F16": torch.float16}.get(kinds[name], torch.bfloat16)
            )
            assert np.array_equal(there, rounded.float().numpy())
    for name in ("output_norm.weight", "blk.0.attn_norm.weight"):
        assert kinds[name] == "F32"
    # The order of neighbours: what transformers pairs as (0, d/2), (1, d/2 + 1), ...
    query = (
        weights["model.layers.0.self_attn.q_proj.weight"].view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)
    )
    if dtype == "float32":
        assert np.array_equal(read["blk.0.attn_q.weight"], query.numpy())


def test_the_type_is_that_of_the_weights_unless_another_is_asked_for(tmp_path):
    save_family("llama", tmp_path / "whole").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    done = convert(tmp_path / "model", tmp_path / "out", to="gguf")
    assert "model-BF16.gguf" in written_in(tmp_path / "out")
    assert found(done, "logits in float32") <= 1e-4


def test_llama3_scaling_is_stated_as_what_frequencies_are_divided_by(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    save("llama-tiny", tmp_path / "model", rope_parameters=rope)
    convert(tmp_path / "model", tmp_path / "file.gguf", verify="weights")
    (factors,) = [t for t in gguf.GGUFReader(tmp_path / "file.gguf").tensors if t.name == "rope_freqs.weight"]
    size = tiny_config("llama-tiny").head_dim
    for i, factor in enumerate(factors.data):
        wavelength = 2 * np.pi * 10000.0 ** (2 * i / size)
        if wavelength < 32 / 4:
            assert factor == pytest.approx(1)
        elif wavelength > 32:
            assert factor == pytest.approx(8)
        else:
            smooth = (32 / wavelength - 1) / 3
            assert factor == pytest.approx(1 / ((1 - smooth) / 8 + smooth), rel=1e-5)


def test_a_window_as_long_as_the_context_is_none(tmp_path):
    save("llama-tiny", tmp_path / "model", layer_types="S", sliding_window=512, max_position_embeddings=512)
    convert(tmp_path / "model", tmp_path / "file.gguf", verify="weights")
    assert gguf.GGUFReader(tmp_path / "file.gguf").fields["general.architecture"].contents() == "llama"


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_does_not_have_is_named(case, tmp_path):
    preset, fields, reason = REFUSED[case]
    save(preset, tmp_path / "model", **fields)
    with pytest.raises(ValueError, match="llama.cpp has no architecture for this model") as error:
        convert(tmp_path / "model", tmp_path / "out", to="gguf")
    assert reason in str(error.value) and nothing_at(tmp_path)


def test_each_tile_of_tessera_is_stated_or_fixed():
    """A field that no architecture states has to be what a plain model has, and be named where it is not."""
    plain = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    assert choose(TesseraConfig(**plain)).name == "llama"
    for name, value in {
        "attn_logit_softcapping": 30.0,
        "final_logit_softcapping": 15.0,
        "smear": True,
        "backout": True,
        "residual_scalars": True,
        "embedding_norm": True,
        "rope_reverse": True,
        "norm_weight": False,
        "hidden_act": "gelu",
    }.items():
        with pytest.raises(ValueError, match=f"{name} is "):
            choose(TesseraConfig(**plain, **{name: value}))


@pytest.mark.parametrize(
    ("value", "dtype", "reason"), [(float("nan"), None, "holds NaN"), (1e5, "float16", "cannot hold")]
)
def test_weights_that_the_type_cannot_hold_are_refused(value, dtype, reason, tmp_path):
    model = tiny_model("llama-tiny")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"(blk.1.ffn_up|layers.1.mlp.up_proj).weight .*{reason}"):
        convert(tmp_path / "model", tmp_path / "file.gguf", dtype=dtype)
    assert nothing_at(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_a_file_that_was_damaged_on_the_way_is_not_kept(dtype, tmp_path, monkeypatch):
    save("llama-tiny", tmp_path / "model")
    write = gguf_files._encode

    def damaged(name, tensor, dtype):
        data = write(name, tensor, dtype).copy()
        if name == "blk.2.ffn_gate.weight":
            data.reshape(-1).view(np.uint8)[7] ^= 0x40
        return data

    monkeypatch.setattr(gguf_files, "_encode", damaged)
    with pytest.raises(ValueError, match="blk.2.ffn_gate.weight read back differs"):
        convert(tmp_path / "model", tmp_path / "file.gguf", dtype=dtype)
    assert nothing_at(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "q8_0"])
def test_a_tensor_is_rounded_and_compared_some_rows_at_a_time(dtype, tmp_path, monkeypatch):
    save("llama-tiny", tmp_path / "model", vocab_size=40, padded_vocab_size=40, num_hidden_layers=1)
    convert(tmp_path / "model", tmp_path / "whole.gguf", dtype=dtype, verify="weights")
    largest = 0
    encode, near = gguf_files._encode, gguf_files._rounding

    def told(change):
        def call(*arguments):
            nonlocal largest
            largest = max(largest, *(a.numel() for a in arguments if isinstance(a, torch.Tensor)))
            return change(*arguments)

        return call

    monkeypatch.setattr(gguf_files, "_AT_ONCE", 1000)
    monkeypatch.setattr(gguf_files, "_encode", told(encode))
    monkeypatch.setattr(gguf_files, "_rounding", told(near))
    done = convert(tmp_path / "model", tmp_path / "rows.gguf", dtype=dtype, verify="weights")
    assert 500 < largest <= 1000
    assert (tmp_path / "rows.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert done.report.checks[2].name == "weights, read back"
    # And a row that is not among the first is compared with itself.
    monkeypatch.setattr(gguf_files, "_encode", lambda name, rows, kind: encode(name, rows.flip(0), kind))
    with pytest.raises(ValueError, match="read back differs"):
        convert(tmp_path / "model", tmp_path / "turned.gguf", dtype=dtype, verify="weights")


# ---- the command ----


def test_the_command_writes_a_file_or_a_directory_and_refuses_what_is_there(tmp_path, capsys):
    save("llama-tiny", tmp_path / "model")
    assert run("convert", tmp_path / "model", tmp_path / "small.gguf", "--dtype", "q8_0") == 0
    assert "Q8_0" in capsys.readouterr().out
    assert run("convert", tmp_path / "model", tmp_path / "dir", "--to", "gguf", "--dtype", "float16") == 0
    assert written_in(tmp_path / "dir") == [
        "conversion_report.json",
        "conversion_report.md",
        "model-F16.gguf",
    ]
    assert (tmp_path / "small.gguf").stat().st_size < (tmp_path / "dir/model-F16.gguf").stat().st_size
    assert run("convert", tmp_path / "model", tmp_path / "small.gguf") == 2
    assert "is there already" in capsys.readouterr().err
    assert run("convert", tmp_path / "model", tmp_path / "shards.gguf", "--mp", "2") == 2
    assert "are for the native layout, not for --to gguf" in capsys.readouterr().err
    assert run("convert", tmp_path / "model", tmp_path / "llama", "--to", "llama", "--dtype", "q8_0") == 2
    assert (
        run("convert", tmp_path / "model", tmp_path / "llama", "--to", "llama", "--verify", "llama.cpp") == 2
    )
    assert "--verify llama.cpp: choose from full" in capsys.readouterr().err
    assert written_in(tmp_path) == ["dir", "model", "small.gguf"]


@pytest.mark.parametrize(("missing", "options"), [("gguf", []), ("llama_cpp", ["--verify", "llama.cpp"])])
def test_a_missing_library_is_named_before_anything_is_written(
    missing, options, tmp_path, monkeypatch, capsys
):
    save("llama-tiny", tmp_path / "model")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name)
    )
    assert run("convert", tmp_path / "model", tmp_path / "file.gguf", *options) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "not installed: pip install" in error
    assert nothing_at(tmp_path)


def run(*arguments) -> int:
    try:
        cli.run([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code or 0
    return 0


# ---- tokenizers ----


def written(ours, folder, vocab_size: int | None = None, **options):
    """What a file states of a tokenizer, and what the conversion noted."""
    size = len(ours) if vocab_size is None else vocab_size
    save("llama-tiny", folder / "model", vocab_size=size, padded_vocab_size=size, num_hidden_layers=1)
    ours.save_pretrained(folder / "model")
    done = convert(folder / "model", folder / "file.gguf", verify="weights", **options)
    fields = gguf.GGUFReader(folder / "file.gguf").fields
    return {
        key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")
    }, done.notes


def byte_level(pattern: str, merges=(("a", "b"), ("ab", "c")), **model) -> PreTrainedTokenizerFast:
    vocabulary = dict(json.loads(build_byte_tokenizer().backend_tokenizer.to_str())["model"]["vocab"])
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, list(merges), **model))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_the_byte_tokenizer_is_byte_level_bpe_without_merges_of_use(tmp_path):
    tokenizer = build_byte_tokenizer(eos_token="<|end|>", extra_special_tokens=["<|user|>"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    there, notes = written(tokenizer, tmp_path, vocab_size=260)
    assert there["tokenizer.ggml.model"] == "gpt2" and there["tokenizer.ggml.pre"] == "gpt-2"
    assert there["tokenizer.ggml.tokens"][ord("a")] == "a" and there["tokenizer.ggml.tokens"][ord(" ")] == "Ġ"
    assert there["tokenizer.ggml.tokens"][256:] == ["<|end|>", "<|user|>", "[PAD258]", "[PAD259]"]
    kinds = gguf.TokenType
    assert there["tokenizer.ggml.token_type"][255:] == [
        kinds.NORMAL,
        kinds.CONTROL,
        kinds.CONTROL,
        kinds.UNUSED,
        kinds.UNUSED,
    ]
    assert there["tokenizer.ggml.eos_token_id"] == 256 and there["tokenizer.ggml.add_bos_token"] is False
    # A beginning that it does not have: the byte that is in no text.
    assert there["tokenizer.ggml.bos_token_id"] == 0xFF
    assert there["tokenizer.chat_template"] == tokenizer.chat_template
    assert not any("tokenizer" in note for note in notes)


def with_stops(folder, stops: list[int]):
    """What a file states of a tokenizer whose model stops at several tokens, and what is noted."""
    names = ["<|end|>", "<|eom_id|>", "<|eot_id|>", "<|other|>"]
    tokenizer = build_byte_tokenizer(eos_token=names[0], extra_special_tokens=names[1:])
    save("llama-tiny", folder / "model", vocab_size=260, num_hidden_layers=1, eos_token_id=stops)
    tokenizer.save_pretrained(folder / "model")
    done = convert(folder / "model", folder / "file.gguf", verify="weights")
    there = gguf.GGUFReader(folder / "file.gguf").fields
    roles = {role: there.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")}
    return {role: field and field.contents() for role, field in roles.items()}, done.notes


def test_all_tokens_to_stop_at_are_stated_or_noted(tmp_path):
    roles, notes = with_stops(tmp_path / "three", [256, 257, 258])
    assert roles == {"eos": 256, "eot": 258, "eom": 257} and not any("stop" in note for note in notes)
    roles, notes = with_stops(tmp_path / "four", [256, 258, 259, 257])
    assert roles == {"eos": 256, "eot": 258, "eom": 259}
    assert any("goes on after 257 (<|eom_id|>)" in note for note in notes)


@pytest.mark.parametrize("default", [True, False])
def test_chat_templates_with_names_are_in_the_file_under_them(default, tmp_path):
    tokenizer = build_byte_tokenizer(eos_token="<|end|>")
    tokenizer.chat_template = {"tool-use": "{{ tools }}", "rag": "{{ documents }}"}
    if default:
        tokenizer.chat_template["default"] = "{{ messages }}"
    there, notes = written(tokenizer, tmp_path)
    prefix = "tokenizer.chat_template"
    assert there[f"{prefix}.tool_use"] == "{{ tools }}" and there[f"{prefix}.rag"] == "{{ documents }}"
    assert there[f"{prefix}s"] == ["rag", "tool_use"]
    assert there.get(prefix) == ("{{ messages }}" if default else None)
    (note,) = [note for note in notes if "chat templates" in note]
    assert "rag, tool_use" in note and ("none called default" in note) is not default


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("tokens", lambda value: value[::-1]),
        ("token_type", lambda value: value[:-1]),
        ("scores", lambda value: [*value[:-1], value[-1] + 1]),
        ("eos_token_id", lambda value: value + 1),
        ("add_bos_token", lambda value: not value),
    ],
)
def test_a_tokenizer_that_is_not_the_one_in_the_file_is_seen(key, change, tmp_path, monkeypatch):
    add = gguf_files._add

    def damaged(writer, name, value):
        add(writer, name, change(value) if name == f"tokenizer.ggml.{key}" else value)

    monkeypatch.setattr(gguf_files, "_add", damaged)
    monkeypatch.setattr(gguf_tokenizer, "_require_same_joins", lambda *arguments: None)
    with pytest.raises(ValueError, match=f"tokenizer.ggml.{key}"):
        written(sentencepiece(False), tmp_path)
    assert nothing_at(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "whole", "name"),
    [
        (GPT2_PATTERN, False, "gpt-2"),
        # Merging makes each of its tokens, so it is the same whether words are taken whole.
        (GPT2_PATTERN, True, "gpt-2"),
        (GPT4_PATTERN, True, "llama-bpe"),
        (GPT4_PATTERN, False, "smaug-bpe"),
        (GPT4_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"), False, "qwen2"),
    ],
)
def test_a_known_way_to_split_text_gets_its_name(pattern, whole, name, tmp_path):
    there, _ = written(byte_level(pattern, ignore_merges=whole), tmp_path)
    assert there["tokenizer.ggml.pre"] == name
    assert there["tokenizer.ggml.merges"] == ["a b", "ab c"]


def test_an_unknown_way_to_split_text_is_refused_and_can_be_left_out(tmp_path):
    nanochats = GPT4_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}{1,2}")
    with pytest.raises(ValueError, match="splits text in a way that has no name there.*--no-tokenizer"):
        written(byte_level(nanochats), tmp_path)
    assert nothing_at(tmp_path)
    there, notes = written(byte_level(nanochats), tmp_path, tokenizer=False)
    assert there == {"tokenizer.ggml.model": "none"}
    assert any("no tokenizer" in note for note in notes)


def test_words_taken_whole_that_merging_does_not_make_are_refused(tmp_path):
    tokenizer = byte_level(GPT2_PATTERN, merges=(("a", "b"), ("b", "c"), ("a", "bc")), ignore_merges=True)
    with pytest.raises(ValueError, match="no name there"):
        written(tokenizer, tmp_path)


def test_composed_characters_are_noted_and_other_normalisation_refused(tmp_path):
    tokenizer = byte_level(GPT2_PATTERN)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    _, notes = written(tokenizer, tmp_path / "composes")
    assert any("NFC" in note for note in notes)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="normalises text"):
        written(tokenizer, tmp_path / "lower")


def test_more_tokens_than_the_model_has_are_refused(tmp_path):
    with pytest.raises(ValueError, match="largest id is 256 .* rows for 200"):
        written(build_byte_tokenizer(eos_token="<|end|>"), tmp_path, vocab_size=200)
    assert nothing_at(tmp_path)


def test_a_tokenizer_that_does_not_load_is_named(tmp_path):
    save("llama-tiny", tmp_path / "model")
    settings = json.dumps({"tokenizer_class": "LlamaTokenizer"})
    (tmp_path / "model/tokenizer_config.json").write_text(settings, encoding="utf-8")
    (tmp_path / "model/tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="tokenizer of .* does not load .*--no-tokenizer"):
        convert(tmp_path / "model", tmp_path / "file.gguf")
    assert nothing_at(tmp_path)


def sentencepiece(space: bool) -> PreTrainedTokenizerFast:
    pieces = [Piece("<unk>", 0.0, 2), Piece("<s>", 0.0, 3), Piece("</s>", 0.0, 3)]
    pieces += [Piece(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    joined = ["in", "\u2581t", "er", "he", "on", "\u2581the", "\u2581\u2581", "ing"]
    pieces += [Piece(text, -float(rank), 1) for rank, text in enumerate(joined)]
    pieces += [Piece(c, -100.0 - rank, 1) for rank, c in enumerate("\u2581etaoinshrdlug.é")]
    roles = {"unk": 0, "bos": 1, "eos": 2}
    backend = _backend(SentencePieceModel(pieces, roles, space, remove_extra_whitespaces=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("space", [False, True])
def test_byte_fallback_becomes_scores_in_the_order_of_merges(space, tmp_path):
    there, notes = written(sentencepiece(space), tmp_path)
    assert there["tokenizer.ggml.model"] == "llama"
    tokens, scores = there["tokenizer.ggml.tokens"], there["tokenizer.ggml.scores"]
    assert scores[tokens.index("in")] > scores[tokens.index("er")] > scores[tokens.index("ing")]
    kinds = dict(zip(tokens, there["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x0A>"], kinds["in"]) == (2, 3, 6, 1)
    assert there["tokenizer.ggml.add_space_prefix"] is space
    assert any("space after each special token" in note for note in notes) is space


def test_byte_fallback_that_joins_in_another_order_is_refused(tmp_path):
    tokenizer = sentencepiece(False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("n", "isolated")
    with pytest.raises(ValueError, match="joining by scores gives other ids"):
        written(tokenizer, tmp_path)
    assert nothing_at(tmp_path)
