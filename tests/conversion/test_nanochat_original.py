"""nanochat's own checkpoints of July 2026 and of October 2025, in and out, with their tokenizer."""

import base64
import json
import os
from pathlib import Path

import pytest
import tiktoken
import torch
import transformers
from helpers.models import tiny_model
from helpers.weights import randomize
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tessera import cli
from tessera.conversion.convert import convert
from tessera.conversion.nanochat_original import RULES
from tessera.conversion.nanochat_tokenizer import find_tokenizer, read_tokenizer
from tessera.conversion.rules import to_theirs
from tessera.modeling.loading import load_model

SHARED = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[2].parent / "shared"))
TOLERANCE = 2e-4
IDS = torch.randint(250, (1, 160), generator=torch.Generator().manual_seed(0))

# As nanochat has it, with possessive quantifiers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [
    "<|bos|>",
    *(
        f"<|{who}_{where}|>"
        for who in ("user", "assistant", "python", "output")
        for where in ("start", "end")
    ),
]
MERGES = [b"th", b"the", b" the", b"in", b"ing", b"er", b" a", b"12", b"\n\n", b"ll", b"\xc3\xa9"]


def write_nanochat(folder: Path, weights: dict[str, torch.Tensor], args: dict, step: int = 700) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / f"model_{step:06d}.pt")
    meta = {"step": step, "model_config": args}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    return folder


def read_written(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and `model_config` of what was written, as nanochat's loader finds them."""
    meta = json.loads((folder / "meta_000000.json").read_text())
    assert meta["step"] == 0
    return torch.load(folder / "model_000000.pt", weights_only=True), meta["model_config"]


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def nanochat_model(**overrides) -> torch.nn.Module:
    """A tiny model whose window is the one that nanochat has for its context."""
    return tiny_model("nanochat-tiny", **{"sliding_window": 129, "max_position_embeddings": 512, **overrides})


def july(rounded: bool = True) -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict]:
    """A model, its weights in nanochat's words with embeddings in bf16, and its `model_config`."""
    model = nanochat_model(vocab_size=250, padded_vocab_size=256)
    config = model.config
    embeddings = [model.model.embed_tokens] + [
        layer.self_attn.value_embed for layer in model.model.layers if layer.self_attn.value_embed
    ]
    for embedding in embeddings if rounded else []:
        embedding.weight.data = embedding.weight.data.bfloat16().float()
    weights = {name: tensor.clone() for name, tensor in to_theirs(model.state_dict(), config, RULES).items()}
    for name in weights if rounded else []:
        if "wte" in name or "value_embeds" in name:
            weights[name] = weights[name].bfloat16()
    args = {
        "sequence_len": 512,
        "vocab_size": 250,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_kv_head": config.num_key_value_heads,
        "n_embd": config.hidden_size,
        "window_pattern": "SSSL",
    }
    return model, weights, args


def october() -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict]:
    """The same of the older architecture, as the model that transformers has of it."""
    config = transformers.NanoChatConfig(
        vocab_size=250,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=192,
        rms_norm_eps=torch.finfo(torch.float32).eps,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = randomize(transformers.NanoChatForCausalLM(config)).eval()
    words = {"model.embed_tokens": "transformer.wte", "model.layers": "transformer.h", "self_attn": "attn"}
    words |= {f"{kind}_proj": f"c_{kind}" for kind in "qkv"}
    words |= {"o_proj": "c_proj", "fc1": "c_fc", "fc2": "c_proj"}
    weights = {}
    for name, tensor in model.state_dict().items():
        for theirs, original in words.items():
            name = name.replace(theirs, original)
        weights[name] = tensor.clone()
    args = {"sequence_len": 192, "vocab_size": 250, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
    return model, weights, args


def test_newest_step_of_a_compiled_model_has_its_logits_and_goes_back_bit_for_bit(tmp_path):
    model, weights, args = july()
    write_nanochat(tmp_path / "nanochat", {"wrong": torch.zeros(1)}, args, step=600)
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    done = convert(write_nanochat(tmp_path / "nanochat", compiled, args), tmp_path / "ours")
    assert done.source == "nanochat-original" and not done.notes
    ours = load_model(tmp_path / "ours")
    assert ours.config.sliding_window == 129 and ours.config.padded_vocab_size == 256
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=0)
    convert(tmp_path / "ours", tmp_path / "back", to="nanochat-original")
    found, found_args = read_written(tmp_path / "back")
    assert_same_bits(found, weights)
    assert found_args == args


def test_october_is_known_by_its_names_and_is_what_transformers_has(tmp_path, capsys):
    model, weights, args = october()
    write_nanochat(tmp_path / "nanochat", weights, args)
    with pytest.raises(SystemExit) as ended:
        cli.run(["convert", str(tmp_path / "nanochat"), str(tmp_path / "ours")])
    assert not ended.value.code and "nanochat-2025 -> tessera" in capsys.readouterr().out
    torch.testing.assert_close(logits(load_model(tmp_path / "ours")), logits(model), atol=1e-5, rtol=0)
    convert(tmp_path / "ours", tmp_path / "back", to="nanochat-2025")
    found, found_args = read_written(tmp_path / "back")
    assert_same_bits(found, weights)
    assert found_args == args
    convert(tmp_path / "nanochat", tmp_path / "transformers", to="nanochat")
    assert_same_bits(load_file(tmp_path / "transformers" / "model.safetensors"), dict(model.state_dict()))


@pytest.mark.parametrize(
    ("dtype", "embeddings"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
)
def test_every_dtype_of_a_file_comes_back(dtype, embeddings, tmp_path):
    _, weights, args = july(rounded=False)
    weights = {
        name: tensor.to(embeddings if "wte" in name or "value_embeds" in name else dtype)
        for name, tensor in weights.items()
    }
    convert(write_nanochat(tmp_path / "nanochat", weights, args), tmp_path / "ours", verify="weights")
    convert(tmp_path / "ours", tmp_path / "back", to="nanochat-original", verify="weights")
    assert_same_bits(read_written(tmp_path / "back")[0], weights)


def test_what_older_files_lack_is_what_nanochat_puts_there(tmp_path):
    _, weights, args = july()
    depth = args["n_layer"]
    whole = {**weights, "resid_lambdas": torch.ones(depth), "x0_lambdas": torch.zeros(depth)}
    convert(
        write_nanochat(tmp_path / "whole", whole, {**args, "window_pattern": "L"}),
        tmp_path / "a",
        verify="weights",
    )
    for name in ("resid_lambdas", "x0_lambdas"):
        del weights[name]
    del args["window_pattern"]
    convert(write_nanochat(tmp_path / "old", weights, args), tmp_path / "b", verify="weights")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("pattern", "letters"), [("S", "SSSL"), ("sl", "SLSL"), ("SSLL", "SSLL"), ("L", "LLLL")]
)
def test_the_last_layer_is_full_whatever_the_pattern_says(pattern, letters, tmp_path):
    _, weights, args = july()
    write_nanochat(tmp_path / "nanochat", weights, {**args, "window_pattern": pattern})
    convert(tmp_path / "nanochat", tmp_path / "ours", verify="weights")
    kinds = load_model(tmp_path / "ours").config.layer_types
    assert "".join("L" if kind.startswith("full") else "S" for kind in kinds) == letters
    convert(tmp_path / "ours", tmp_path / "back", to="nanochat-original", verify="weights")
    written = read_written(tmp_path / "back")[1]["window_pattern"]
    assert "".join(written[i % len(written)] for i in range(3)) == letters[:3]


@pytest.mark.parametrize("rows", [250, 320])
def test_rows_past_the_vocabulary_become_as_many_as_nanochat_makes(rows, tmp_path):
    model = nanochat_model(vocab_size=250, padded_vocab_size=rows)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "nanochat", to="nanochat-original", verify="weights")
    found, _ = read_written(tmp_path / "nanochat")
    assert len(found["lm_head.weight"]) == len(found["value_embeds.1.weight"]) == 256
    convert(tmp_path / "nanochat", tmp_path / "again", verify="weights")
    torch.testing.assert_close(logits(load_model(tmp_path / "again")), logits(model), atol=1e-6, rtol=0)


class _Object:
    pass


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"a": _Object()}, "holds pickled objects beside tensors"),
        ([torch.zeros(1)], "is not a dictionary of tensors"),
        ({"a": torch.zeros(1)}, "is not a nanochat model: it has no transformer.wte.weight"),
        (
            dict.fromkeys(
                ["transformer.wte.weight", "smear_lambda", "transformer.h.3.mlp.c_fc.weight"],
                torch.zeros(256, 8),
            ),
            "missing tensors .*backout_lambda",
        ),
        (
            {"transformer.wte.weight": torch.zeros(256, 8), "resid_lambdas": torch.ones(4)},
            "between the two that are read: it has resid_lambdas.* and no smear_lambda",
        ),
    ],
)
def test_a_pt_file_with_anything_else_is_refused(content, sentence, tmp_path):
    _, weights, args = july()
    folder = write_nanochat(tmp_path / "nanochat", weights, args)
    torch.save(content, folder / "model_000700.pt")
    with pytest.raises(ValueError, match=sentence):
        convert(folder, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nanochat"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"n_layer": None}, "meta_000700.json: model_config lacks n_layer"),
        ({"n_experts": 8}, "model_config has n_experts, which neither architecture knows"),
        ({"n_head": 0}, "the sizes of model_config must be at least 1"),
        ({"n_head": 5}, r"n_embd \(96\) must be a multiple of n_head \(5\)"),
        ({"window_pattern": "SX"}, "window_pattern must consist of S and L, got 'SX'"),
        ({"vocab_size": 300}, "padded_vocab_size"),
        ({"n_layer": 10**9}, "is 1000000000, but the tensors are of 4 layers"),
        ({"n_embd": 128}, "gives a tensor of shape"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(change, sentence, tmp_path):
    _, weights, args = july()
    write_nanochat(tmp_path / "nanochat", weights, {**args, **change})
    with pytest.raises(ValueError, match=sentence):
        convert(tmp_path / "nanochat", tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nanochat"]


def test_a_damaged_truncated_or_missing_file_is_refused(tmp_path):
    _, weights, args = july()
    folder = write_nanochat(tmp_path / "nanochat", weights, args)
    data = (folder / "model_000700.pt").read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    (folder / "model_000700.pt").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"model_000700\.pt cannot be read: .* is damaged"):
        convert(folder, tmp_path / "ours")
    (folder / "model_000700.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model_000700\.pt cannot be read"):
        convert(folder, tmp_path / "ours")
    (folder / "meta_000700.json").unlink()
    with pytest.raises(ValueError, match=r"meta_000700\.json"):
        convert(folder, tmp_path / "ours")


@pytest.mark.parametrize(
    ("preset", "to", "sentence"),
    [
        ("llama-tiny", "nanochat-original", r"backout is False \(there: True\)"),
        ("nanochat-tiny", "nanochat-2025", r"qk_norm_scale is 1.2 \(there: 1.0\)"),
        ("bytegpt-tiny", "nanochat-original", "cannot be a nanochat-original"),
    ],
)
def test_fields_that_the_architecture_has_no_place_for_are_named(preset, to, sentence, tmp_path):
    tiny_model(preset).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=sentence):
        convert(tmp_path / "ours", tmp_path / "nanochat", to=to)
    assert not (tmp_path / "nanochat").exists()


# ---- tokenizer ----


def nanochat_encoding(size: int = 256 + len(MERGES)) -> tiktoken.Encoding:
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token: 256 + place for place, token in enumerate(MERGES)}
    special = {token: size + place for place, token in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def write_rank_file(file: Path) -> bytes:
    ranks = nanochat_encoding()._mergeable_ranks
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return file.read_bytes()


@pytest.fixture
def with_vocabulary(tmp_path):
    """A checkpoint with as many tokens as the rank file makes, in nanochat's own directory."""
    model = nanochat_model(vocab_size=nanochat_encoding().n_vocab)
    model.save_pretrained(tmp_path / "model")
    folder = tmp_path / "nanochat" / "base_checkpoints" / "d4"
    folder.parent.mkdir(parents=True)
    convert(tmp_path / "model", folder, to="nanochat-original", verify="weights")
    return folder


def test_a_pickled_tokenizer_is_not_read_and_the_way_out_is_told(with_vocabulary, tmp_path):
    # Reading it would raise.
    (with_vocabulary / "tokenizer.pkl").write_bytes(b"")
    done = convert(with_vocabulary, tmp_path / "ours", verify="weights")
    assert len(done.notes) == 1 and "tokenizer.pkl is a pickle, which is not read" in done.notes[0]
    assert not (tmp_path / "ours" / "tokenizer.json").exists()


@pytest.mark.parametrize("place", [".", "tokenizer", "../../tokenizer"])
def test_ranks_are_found_beside_a_checkpoint_and_above_it(place, tmp_path):
    folder = tmp_path / "nanochat" / "base_checkpoints" / "d4"
    folder.mkdir(parents=True)
    size = nanochat_encoding().n_vocab
    assert find_tokenizer(folder, size).write is None
    write_rank_file(folder / place / "tokenizer.tiktoken")
    assert find_tokenizer(folder, size).bos_token_id == size - len(SPECIAL_TOKENS)


def test_ranks_become_a_tokenizer_with_tiktokens_ids_and_go_back(with_vocabulary, tmp_path):
    data = write_rank_file(with_vocabulary / "tokenizer.tiktoken")
    assert not convert(with_vocabulary, tmp_path / "ours").notes
    tokenizer, encoding = AutoTokenizer.from_pretrained(tmp_path / "ours"), nanochat_encoding()
    for text in ("the thing 12345 isn't\n\nall\r\n é <|bos|>", "  \n x\t\n\n\n12", "I'LL we've 'S é́", ""):
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == encoding.encode_ordinary(text)
    turn = [{"role": "user", "content": "the"}]
    rendered = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    special = encoding._special_tokens
    assert rendered == [
        special["<|bos|>"],
        special["<|user_start|>"],
        *encoding.encode_ordinary("the"),
        special["<|user_end|>"],
        special["<|assistant_start|>"],
    ]
    config = load_model(tmp_path / "ours").config
    assert config.bos_token_id == special["<|bos|>"]
    assert config.eos_token_id == [special["<|assistant_end|>"], special["<|bos|>"]]
    done = convert(tmp_path / "ours", tmp_path / "back", to="nanochat-original")
    assert not done.notes
    assert (tmp_path / "back" / "tokenizer.tiktoken").read_bytes() == data


def test_a_rank_file_of_another_model_or_a_damaged_one_is_refused(with_vocabulary, tmp_path):
    file = with_vocabulary / "tokenizer.tiktoken"
    data = write_rank_file(file)
    file.write_bytes(b"".join(data.splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"make 275 tokens, but the model has vocab_size 276"):
        convert(with_vocabulary, tmp_path / "ours")
    file.write_bytes(data[:-7])
    with pytest.raises(ValueError, match="is not a whole tiktoken rank file|the file is damaged"):
        convert(with_vocabulary, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_tokenizer_that_nanochat_cannot_have_is_named_and_kept(with_vocabulary, tmp_path):
    file = with_vocabulary / "tokenizer.tiktoken"
    write_rank_file(file)
    convert(with_vocabulary, tmp_path / "ours", verify="weights")
    # Another split, which no probe but the last shows the ranks to be right for.
    state = json.loads((tmp_path / "ours" / "tokenizer.json").read_text())
    state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\p{N}|[^\p{L}\p{N}]+"
    (tmp_path / "ours" / "tokenizer.json").write_text(json.dumps(state))
    done = convert(tmp_path / "ours", tmp_path / "back", to="nanochat-original", verify="weights")
    assert "tokenizer.tiktoken, which nanochat needs, is not written: with nanochat's rules" in done.notes[0]
    assert not (tmp_path / "back" / "tokenizer.tiktoken").exists()
    state["added_tokens"] = state["added_tokens"][:-1]
    (tmp_path / "ours" / "tokenizer.json").write_text(json.dumps(state))
    done = convert(tmp_path / "ours", tmp_path / "again", to="nanochat-original", verify="weights")
    assert "its special tokens are not nanochat's" in done.notes[0]


def test_the_split_pattern_is_nanochats_on_every_probe(tmp_path):
    from tessera.tokenization.reference_codecs import huggingface_codec, tiktoken_codec
    from tessera.tokenization.verify import require_same

    write_rank_file(tmp_path / "tokenizer.tiktoken")
    tokenizer = read_tokenizer(tmp_path / "tokenizer.tiktoken")
    original = tiktoken_codec(nanochat_encoding(), "nanochat's")
    assert require_same(original, huggingface_codec(tokenizer), "ours").documents > 10


# ---- golden files ----


@pytest.mark.shared
@pytest.mark.parametrize("name", ["nanochat_2026_07_a", "nanochat_2026_07_b"])
def test_golden_weights_have_their_logits_and_come_back(name, tmp_path):
    with safe_open(SHARED / "golden" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        args = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    convert(write_nanochat(tmp_path / "nanochat", weights, args), tmp_path / "ours")
    found = logits(load_model(tmp_path / "ours"), tensors["io.input_ids"])
    torch.testing.assert_close(found, tensors["io.logits"], atol=TOLERANCE, rtol=0)
    convert(tmp_path / "ours", tmp_path / "back", to="nanochat-original")
    written, written_args = read_written(tmp_path / "back")
    assert_same_bits(written, weights)
    assert written_args == args
