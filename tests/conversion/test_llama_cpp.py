"""llama.cpp runs what is written for it: the same tokens, the same logits, the same text."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import transformers
from helpers.models import tiny_model
from helpers.weights import randomize
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tessera import build_byte_tokenizer
from tessera.conversion import gguf_architectures, gguf_tokenizer, llama_cpp
from tessera.conversion.convert import convert
from tessera.tokenization.sentencepiece_models import Piece, SentencePieceModel, _backend
from tessera.tokenization.train import train_tokenizer

runner = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("gguf")

STORIES = Path(os.environ.get("TESSERA_SHARED", "../shared")) / "data/stories260k"
ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", **ROPE}
LLAMA3 = {"rope_type": "llama3", **ROPE, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SPARSE = {
    "mlp_layer_types": "S",
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
GROUPS = {
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "scoring_func": "sigmoid",
    "router_correction_bias": True,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 16,
}
MODELS = {
    "llama": ("llama-tiny", {}),
    "llama-interleaved-llama3-tied": (
        "llama-tiny",
        {"rope_interleave": True, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    ),
    "llama-yarn-biases": (
        "llama-tiny",
        {
            "rope_parameters": {**YARN, "attention_factor": 1.3},
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "llama-padded": ("llama-tiny", {"vocab_size": 250, "padded_vocab_size": 256}),
    "llama-experts": ("llama-tiny", SPARSE),
    "qwen2": ("llama-tiny", {"attention_bias": True, "attention_output_bias": False}),
    "qwen3-yarn": ("llama-tiny", {"qk_norm": "before_rope", "rope_parameters": YARN}),
    "qwen3moe": ("llama-tiny", {**SPARSE, "qk_norm": "before_rope"}),
    "gpt2": ("gpt2-tiny", {}),
    "deepseek2-yarn": ("bytegpt-tiny", {"mlp_layer_types": GROUPS["mlp_layer_types"]}),
    "deepseek2-groups-halves": ("bytegpt-tiny", {**GROUPS, "rope_interleave": False}),
    "deepseek2-dense": (
        "bytegpt-tiny",
        {
            "mlp_layer_types": "D",
            "q_lora_rank": 16,
            **dict.fromkeys(("n_routed_experts", "n_shared_experts", "num_experts_per_tok"), 0),
        },
    ),
}


def found(done, name: str) -> str:
    (check,) = [check for check in done.report.checks if check.name == name]
    return check.found


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_generated_tokens_are_those_of_llama_cpp(name, tmp_path):
    preset, fields = MODELS[name]
    tiny_model(preset, **fields).save_pretrained(tmp_path / "model")
    done = convert(tmp_path / "model", tmp_path / "file.gguf", verify="llama.cpp")
    assert found(done, "llama.cpp, generated") == "32 of 32 tokens equal"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_rounded_files_run_and_are_close(dtype, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=128,
    )
    randomize(transformers.LlamaForCausalLM(config)).save_pretrained(tmp_path / "model")
    done = convert(tmp_path / "model", tmp_path / "file.gguf", dtype=dtype, verify="llama.cpp")
    for name in ("logits in float32", "llama.cpp, logits"):
        apart, largest = re.findall(r"^[\d.e-]+|[\d.]+$", found(done, name))
        assert 0 < float(apart) < 0.1 * float(largest)


def test_a_model_that_llama_cpp_computes_otherwise_is_refused(tmp_path, monkeypatch):
    # Rotary pairs left in the order of halves.
    monkeypatch.setattr(gguf_architectures, "_pair_neighbours", lambda config, tensors: (config, tensors))
    tiny_model("llama-tiny").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="llama.cpp computes other logits"):
        convert(tmp_path / "model", tmp_path / "file.gguf", verify="llama.cpp")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


TEXT = "It was the best of times, it was the worst of times; 1859, 12345. Don't we'll!\n" * 40


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece"])
def test_hard_texts_become_the_same_tokens(kind, tmp_path):
    if kind == "sentencepiece":
        pytest.importorskip("sentencepiece")
    size = {"bytes": {}, "bpe": {"vocab_size": 300}, "sentencepiece": {"vocab_size": 310}}[kind]
    tokenizer = train_tokenizer([TEXT], kind=kind, **size)
    with_end = tiny_model("llama-tiny", vocab_size=len(tokenizer) + 3, num_hidden_layers=1)
    with_end.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = convert(tmp_path / "model", tmp_path / "file.gguf", verify="llama.cpp")
    texts = re.fullmatch(r"[\d,]+ of ([\d,]+) texts, equal", found(done, "llama.cpp, tokens"))[1]
    assert int(texts.replace(",", "")) > 1000


@pytest.mark.parametrize("key", list(gguf_tokenizer._SPLITTERS), ids=gguf_tokenizer._SPLITTERS.values())
def test_each_named_way_to_split_is_that_of_llama_cpp(key, tmp_path):
    patterns, whole = key
    trained = train_tokenizer([TEXT], kind="bpe", vocab_size=300)
    parts = json.loads(trained.backend_tokenizer.to_str())
    parts["model"]["ignore_merges"] = whole
    parts["normalizer"] = {"type": "NFC"} if len(patterns) == 1 and not whole else None
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, bytes_only]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)))
    tiny_model("llama-tiny", vocab_size=300, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = convert(tmp_path / "model", tmp_path / "file.gguf", verify="llama.cpp")
    assert found(done, "llama.cpp, tokens").endswith(" texts, equal")


def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "_SAMPLE", "12345")
    monkeypatch.setattr("tessera.conversion.gguf_tokenizer._splitter", lambda parts: "smollm")
    tokenizer = train_tokenizer(["12345 " * 100], kind="bpe", vocab_size=273)
    tiny_model("llama-tiny", vocab_size=len(tokenizer), num_hidden_layers=1).save_pretrained(
        tmp_path / "model"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="llama.cpp encodes the sample to other ids"):
        convert(tmp_path / "model", tmp_path / "file.gguf", verify="llama.cpp")


def test_a_beginning_and_an_end_are_added_as_the_tokenizer_does(tmp_path):
    tokenizer = build_byte_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.add_bos_token = True
    tiny_model("llama-tiny", vocab_size=258, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "file.gguf", verify="llama.cpp")
    model = runner.Llama(str(tmp_path / "file.gguf"), vocab_only=True, verbose=False)
    assert model.tokenize(b"a</s>", special=True) == [256, 97, 257]
    assert (model.token_bos(), model.token_eos()) == (256, 257)
    model.close()


@pytest.mark.shared
def test_the_story_is_the_published_one(tmp_path):
    golden = json.loads((STORIES / "hf_llama/golden.json").read_text())
    shutil.copytree(STORIES / "hf_llama", tmp_path / "model")
    story_tokenizer().save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "ours")
    done = convert(tmp_path / "ours", tmp_path / "story.gguf", to="gguf", verify="llama.cpp")
    assert found(done, "llama.cpp, generated") == "32 of 32 tokens equal"
    model = runner.Llama(str(tmp_path / "story.gguf"), n_ctx=512, verbose=False)
    ids = []
    for token in model.generate([model.token_bos()], temp=0.0, repeat_penalty=1.0):
        ids.append(token)
        if len(ids) == len(golden["greedy_ids"]):
            break
    assert ids == golden["greedy_ids"]
    assert (
        model.detokenize([model.token_bos(), *ids]).decode() == golden["text"] and len(golden["text"]) == 565
    )
    model.close()


def story_tokenizer() -> PreTrainedTokenizerFast:
    """That of llama2.c's file: SentencePiece's pieces with their spaces, and with line breaks about <s>."""
    pieces = []
    for index, (text, score) in enumerate(json.loads((STORIES / "hf_llama/vocab.json").read_text())):
        text = bytes.fromhex(text).decode()
        kind = {0: 2, 1: 3, 2: 3}.get(index, 6 if index < 259 else 1)
        pieces.append(Piece(text.strip() if index < 3 else text.replace(" ", "\u2581"), score, kind))
    backend = _backend(SentencePieceModel(pieces, {"unk": 0, "bos": 1, "eos": 2}, True, False))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
