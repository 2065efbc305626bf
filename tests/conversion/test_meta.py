"""Meta's consolidated layout in: Llama's and Mistral's releases, of one rank or several, with tokenizers."""

import base64
import json
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import torch
from helpers.llama_originals import meta_weights, tiny_llama, train_sentencepiece
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tessera.conversion.convert import convert
from tessera.conversion.sources import open_checkpoint
from tessera.modeling.loading import load_model
from tessera.tokenization.byte_level import GPT4_PATTERN

IDS = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(0))
PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 16, "norm_eps": 1e-5}
LLAMA_2 = {**PARAMS, "vocab_size": -1}
LLAMA_3 = {**PARAMS, "vocab_size": 96, "rope_theta": 500000.0, "use_scaled_rope": True}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MISTRAL = {
    **{name: PARAMS[name] for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps")},
    "hidden_dim": 176,
    "head_dim": 8,
    "vocab_size": 96,
    "rope_theta": 1000000.0,
}
COLUMNS = ("wq", "wk", "wv", "w1", "w3", "output")


def write_meta(
    folder: Path, weights: dict, params: dict, world: int = 1, embedding: int = 1, kv_heads: int = 4
) -> Path:
    """Writes ranks as fairscale's layers share tensors among them.

    Args:
        folder: made if it is not there.
        weights: of the whole model.
        params: content of params.json.
        world: ranks.
        embedding: dimension along which the embedding is shared: 1 until Llama 2, 0 since Llama 3.
        kv_heads: of the model; each is on several ranks where these are more.
    """
    folder.mkdir(exist_ok=True)
    for rank in range(world):
        part = {}
        for name, tensor in weights.items():
            kind, share, count = name.split(".")[-2], rank, world
            if kind in ("wk", "wv") and world > kv_heads:
                share, count = rank * kv_heads // world, kv_heads
            dimension = {**dict.fromkeys(COLUMNS, 0), "wo": 1, "w2": 1, "tok_embeddings": embedding}.get(kind)
            piece = tensor if dimension is None else tensor.chunk(count, dim=dimension)[share]
            part[name] = piece.clone()
        part["rope.freqs"] = torch.ones(4)
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def assert_same_model(folder: Path, model: torch.nn.Module) -> None:
    with torch.no_grad():
        found, expected = load_model(folder)(IDS).logits, model(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("params", "world", "embedding", "fields", "context"),
    [
        (LLAMA_2, 1, 1, {}, 4096),
        (LLAMA_2, 2, 1, {}, 4096),
        ({**LLAMA_2, "norm_eps": 1e-6}, 2, 1, {"rms_norm_eps": 1e-6}, 2048),
        (LLAMA_3, 4, 0, {"rope_parameters": SCALED, "max_position_embeddings": 131072}, 131072),
        (LLAMA_3, 8, 0, {"rope_parameters": SCALED, "max_position_embeddings": 131072}, 131072),
        ({**LLAMA_2, "max_seq_len": 77, "max_batch_size": 32}, 1, 1, {}, 77),
    ],
)
def test_ranks_are_joined_to_the_llama_with_permuted_weights(
    params, world, embedding, fields, context, tmp_path
):
    model = tiny_llama(**fields)
    source = write_meta(tmp_path / "meta", meta_weights(model), params, world, embedding)
    # Whole logits are compared below, with those of transformers' class.
    done = convert(source, tmp_path / "ours", verify="weights")
    assert done.source == "meta"
    assert any("how long the context is" in note for note in done.notes) == ("max_seq_len" not in params)
    assert_same_model(tmp_path / "ours", model)
    convert(tmp_path / "ours", tmp_path / "llama", to="llama", verify="weights")
    found = load_file(tmp_path / "llama" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    written = json.loads((tmp_path / "llama" / "config.json").read_text())
    expected = {**model.config.to_dict(), "max_position_embeddings": context}
    assert written["rope_parameters"] == expected["rope_parameters"]
    for name in ("hidden_size", "intermediate_size", "num_key_value_heads", "head_dim", "rms_norm_eps"):
        assert written[name] == expected[name], name
    assert written["max_position_embeddings"] == context


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_a_missing_head_is_tied(dtype, tmp_path):
    model = tiny_llama(tie_word_embeddings=True).to(dtype)
    convert(write_meta(tmp_path / "meta", meta_weights(model), LLAMA_2), tmp_path / "ours", verify="weights")
    convert(tmp_path / "ours", tmp_path / "llama", to="llama", verify="weights")
    found = load_file(tmp_path / "llama" / "model.safetensors")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) and found[name].dtype == dtype for name in state)


@pytest.mark.parametrize("window", [None, 9])
def test_mistrals_single_file_is_its_mistral(window, tmp_path):
    model = tiny_llama(
        "Mistral", sliding_window=window, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    params = {**MISTRAL, **({"sliding_window": window} if window else {})}
    (tmp_path / "mistral").mkdir()
    save_file(meta_weights(model), tmp_path / "mistral" / "consolidated.safetensors")
    (tmp_path / "mistral" / "params.json").write_text(json.dumps(params))
    convert(tmp_path / "mistral", tmp_path / "ours", verify="weights")
    assert_same_model(tmp_path / "ours", model)
    convert(tmp_path / "ours", tmp_path / "back", to="mistral", verify="weights")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_mixtrals_experts_are_its_mixtral(tmp_path):
    model = tiny_llama(
        "Mixtral",
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    weights = meta_weights(model)
    for i, layer in enumerate(model.model.layers):
        for e in range(4):
            gate, up = layer.mlp.experts.gate_up_proj[e].chunk(2)
            parts = {"w1": gate, "w3": up, "w2": layer.mlp.experts.down_proj[e]}
            for part, tensor in parts.items():
                weights[f"layers.{i}.feed_forward.experts.{e}.{part}.weight"] = tensor.detach().clone()
    params = {**MISTRAL, "moe": {"num_experts": 4, "num_experts_per_tok": 2}}
    convert(write_meta(tmp_path / "mixtral", weights, params), tmp_path / "ours")
    assert_same_model(tmp_path / "ours", model)


def test_a_directory_of_transformers_with_such_a_file_is_read_as_transformers(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "both")
    (tmp_path / "both" / "params.json").write_text(json.dumps(LLAMA_2))
    save_file({"wrong": torch.zeros(1)}, tmp_path / "both" / "consolidated.safetensors")
    assert convert(tmp_path / "both", tmp_path / "ours").source == "llama"


def _without(name: str):
    return lambda folder: (folder / name).unlink()


def _params(**change):
    def apply(folder: Path) -> None:
        (folder / "params.json").write_text(json.dumps({**LLAMA_2, **change}))

    return apply


def _tensors(change, file: str = "consolidated.01.pth"):
    def apply(folder: Path) -> None:
        tensors = torch.load(folder / file)
        change(tensors)
        torch.save(tensors, folder / file)

    return apply


class _Object:
    pass


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_without("consolidated.00.pth"), r"lacks consolidated\.00\.pth"),
        (
            _without("consolidated.01.pth"),
            r"has 32 of 64 rows of .*wq.*: there must be 2 files, but there are 1",
        ),
        (_without("params.json"), r"there is no file .*params\.json"),
        (_params(vocab_size=97), r"params\.json: vocab_size is 97, but tok_embeddings.weight has 96 rows"),
        (_params(dim=None), r"params\.json lacks a whole number for dim"),
        (
            _params(n_layers=10**9),
            r"n_layers in .*params\.json is 1000000000, but the tensors are of 2 layers",
        ),
        (_params(n_layers=1), r"n_layers in .* is 1, but the tensors are of 2 layers"),
        (_params(multiple_of=32), r"w1.*\(176, 64\), but the configuration says \(192, 64\)"),
        (_params(moe=3), r"params\.json says moe: 3, which must have num_experts"),
        (_params(moe={"num_experts": 4}), r"num_experts_per_tok: None, which must be a whole number"),
        (
            _params(head_dim="8"),
            r"params\.json says head_dim: '8', which must be a whole number of at least 1",
        ),
        (_params(head_dim=0), r"params\.json says head_dim: 0, which must be"),
        (_params(multiple_of=0), r"params\.json says multiple_of: 0, which must be"),
        (_params(hidden_dim=176.0), r"params\.json says hidden_dim: 176\.0, which must be"),
        (_params(sliding_window="9"), r"params\.json says sliding_window: '9', which must be a whole number"),
        (_params(rope_theta="1e4"), r"params\.json says rope_theta: '1e4', which must be a number above 0"),
        (
            _params(use_scaled_rope="no"),
            r"params\.json says use_scaled_rope: 'no', which must be true or false",
        ),
        (_params(norm_eps="small"), r"params\.json.*rms_norm_eps"),
        (_params(quantization_args={"scheme": "int4"}), "quantization_args.* no part of a Llama"),
        (_tensors(lambda t: t.pop("layers.1.attention.wo.weight")), r"differ in layers\.1\.attention\.wo"),
        (_tensors(lambda t: t["norm.weight"].add_(1)), "norm.weight differs between ranks"),
        (_tensors(lambda t: t.update(a=_Object())), r"consolidated\.01\.pth holds pickled objects beside"),
        (_tensors(lambda t: t.update({"layers.0.attention.wq.bias": torch.zeros(4)})), "differ in .*wq.bias"),
        (lambda f: (f / "consolidated.01.pth").write_bytes(b"PK"), r"consolidated\.01\.pth cannot be read"),
        (lambda f: save_file({}, f / "consolidated.safetensors"), r"\.pth and \.safetensors files; keep one"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(change, sentence, tmp_path):
    folder = write_meta(tmp_path / "meta", meta_weights(tiny_llama()), LLAMA_2, 2)
    change(folder)
    with pytest.raises(ValueError, match=sentence):
        convert(folder, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


# ---- tokenizers ----


@pytest.mark.parametrize("above", [False, True])
def test_a_sentencepiece_model_becomes_a_tokenizer_that_begins_each_text(above, tmp_path):
    folder = write_meta(tmp_path / "meta", meta_weights(tiny_llama(vocab_size=300)), LLAMA_2)
    data = train_sentencepiece((tmp_path if above else folder) / "tokenizer.model", 300)
    done = convert(folder, tmp_path / "ours", verify="weights")
    assert any("tokenizer.model, in the directory above, which" in note for note in done.notes) is above
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    for text in ("the little girl named Lily.", "  two  spaces\n é 🙂", ""):
        assert tokenizer(text)["input_ids"] == [1, *model.encode(text)]
    config = load_model(tmp_path / "ours").config
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert (tmp_path / "ours" / "tokenizer.model").read_bytes() == data


@pytest.mark.parametrize(
    ("scaled", "stops", "name_of_8"),
    [(True, (1, 8, 9), "eom_id"), (False, (1, 9), "reserved_special_token_4")],
)
def test_llama_3s_ranks_get_its_special_tokens(scaled, stops, name_of_8, tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"he": 256, b"ll": 257, b"hell": 258}
    special = {f"<|{name}|>": 259 + place for name, place in (("begin_of_text", 0), ("eot_id", 9))}
    encoding = tiktoken.Encoding("3", pat_str=GPT4_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    params = {**LLAMA_3, "vocab_size": -1, "use_scaled_rope": scaled}
    folder = write_meta(tmp_path / "meta", meta_weights(tiny_llama(vocab_size=259 + 256)), params)
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    convert(folder, tmp_path / "ours", verify="weights")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours" / "tokenizer.model").exists()
    text = "hello 1234, it's\n\n me"
    assert tokenizer(text)["input_ids"] == [259, *encoding.encode_ordinary(text)]
    assert tokenizer.convert_ids_to_tokens(259 + 8) == f"<|{name_of_8}|>"
    assert len(tokenizer) == 259 + 256
    config = load_model(tmp_path / "ours").config
    assert (config.bos_token_id, config.eos_token_id) == (
        259,
        [259 + stop for stop in sorted(stops, key=int)],
    )


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    folder = write_meta(tmp_path / "meta", meta_weights(tiny_llama()), LLAMA_2)
    train_sentencepiece(folder / "tokenizer.model", 300)
    with pytest.raises(ValueError, match=r"tokenizer\.model has 300 tokens, but the model has rows for 96"):
        convert(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(("vocab_size", "damaged"), [(96, False), (1000, False), (96, True)])
def test_a_tokenizer_above_that_does_not_fit_is_left_with_a_note(vocab_size, damaged, tmp_path):
    folder = write_meta(tmp_path / "meta", meta_weights(tiny_llama(vocab_size=vocab_size)), LLAMA_2)
    if damaged:
        (tmp_path / "tokenizer.model").write_bytes(b"something else")
    else:
        train_sentencepiece(tmp_path / "tokenizer.model", 300)
    done = convert(folder, tmp_path / "ours", verify="weights")
    sentence = "cannot be read" if damaged else f"has 300 tokens and the model {vocab_size}"
    (note,) = [note for note in done.notes if "tokenizer.model" in note]
    assert sentence in note and "the result has no tokenizer" in note
    assert not list((tmp_path / "ours").glob("tokenizer*"))


def test_what_is_no_model_is_told_with_what_would_be_one(tmp_path):
    folder = write_meta(tmp_path / "meta", meta_weights(tiny_llama()), LLAMA_2)
    (tmp_path / "hub").mkdir()
    for name in ("meta/a.gguf", "hub/model.safetensors", "notes.txt", "model_000000.pt"):
        (tmp_path / name).write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    for source, sentence in (
        (folder / "a.gguf", "is a GGUF file, which is written and not read"),
        (folder / "consolidated.00.pth", f"name the directory, {folder}"),
        (tmp_path / "hub/model.safetensors", f"name the directory, {tmp_path / 'hub'}"),
        (tmp_path / "model_000000.pt", f"name the directory, {tmp_path}"),
        (tmp_path / "empty", "holds no model.safetensors.*; what is read is a directory of transformers"),
        (tmp_path / "nothing", "there is no checkpoint"),
    ):
        with pytest.raises(ValueError, match=sentence):
            open_checkpoint(source)
    (tmp_path / "model_000000.pt").unlink()
    with pytest.raises(ValueError, match=r"notes\.txt is no model; what is read is"):
        open_checkpoint(tmp_path / "notes.txt")
