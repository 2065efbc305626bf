"""A checkpoint is loaded whole, or refused in one sentence that names the file or tensor."""

import json

import pytest
import torch
from helpers.models import tiny_model
from safetensors.torch import load_file, save_file

from tessera import TesseraForCausalLM
from tessera.modeling.loading import load_model, read_config

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama-tiny", num_hidden_layers=2).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def with_tensors(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def with_bytes(change, name=WEIGHTS):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def with_field(**fields):
    def damage(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **fields}))

    return damage


def sharded(change):
    def damage(folder):
        (folder / WEIGHTS).unlink()
        tiny_model("llama-tiny", num_hidden_layers=2).save_pretrained(folder, max_shard_size="100KB")
        change(folder)

    return damage


def many_missing(tensors):
    for name in [name for name in tensors if "layers.1" in name]:
        del tensors[name]


REFUSED = {
    "missing tensor": (with_tensors(lambda t: t.pop(UP)), rf"does not fit the model: 1 missing \({UP}\)"),
    "missing norm": (with_tensors(lambda t: t.pop("model.norm.weight")), r"1 missing \(model.norm.weight\)"),
    "many missing": (with_tensors(many_missing), r"9 missing \(model.layers.1.* and 6 more\)"),
    "extra tensor": (
        with_tensors(lambda t: t.update({"model.layers.2.x": torch.zeros(1)})),
        r"1 unexpected \(model.layers.2.x\)",
    ),
    "misshapen tensor": (
        with_tensors(lambda t: t.update({UP: torch.zeros(96, 256)})),
        rf"1 misshapen \({UP}\)",
    ),
    "renamed tensor": (
        with_tensors(lambda t: t.update({"model.layers.1.mlp.w3.weight": t.pop(UP)})),
        rf"1 missing \({UP}\); 1 unexpected \(model.layers.1.mlp.w3.weight\)",
    ),
    "truncated": (with_bytes(lambda b: b[:-100]), "checkpoint cannot be read: .*not fully covered"),
    "empty file": (with_bytes(lambda b: b""), "checkpoint cannot be read: .*header too small"),
    "corrupt header": (
        with_bytes(lambda b: b[:8] + b"\xff" * 20 + b[28:]),
        "checkpoint cannot be read: .*invalid",
    ),
    "wrong header size": (with_bytes(lambda b: b"\xff" * 8 + b[8:]), "cannot be read: .*header too large"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "checkpoint has no model.safetensors"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "there is no file .*config.json"),
    "config not JSON": (with_bytes(lambda b: b[:50], CONFIG), "config.json is not JSON"),
    "config not text": (with_bytes(lambda b: b"\xff\xfe", CONFIG), "config.json is not JSON"),
    "config no object": (
        with_bytes(lambda b: b"[1]", CONFIG),
        "config.json must hold a JSON object, not list",
    ),
    "other model type": (
        with_field(model_type="llama"),
        "is of model type 'llama', not 'tessera'",
    ),
    "wrong type": (with_field(hidden_size="96"), "config.json: Field 'hidden_size' expected int, got str"),
    "wrong type of several": (
        with_field(layer_types=[1]),
        r"config.json: Field 'layer_types' with value \[1\] .* \(list\[str\], str, NoneType\)$",
    ),
    "wrong value": (
        with_field(num_attention_heads=7),
        r"config.json: num_attention_heads \(7\) must be a mult",
    ),
    "unknown field": (with_field(n_heads=7), "config.json: TesseraConfig has no field 'n_heads'"),
    "other width": (with_field(intermediate_size=128), r"6 misshapen \(model.layers.0.mlp.down_proj.weight"),
    "missing shard": (
        sharded(lambda folder: (folder / "model-00002-of-00012.safetensors").unlink()),
        "cannot be read: .*model-00002-of-00012.safetensors",
    ),
    "no index": (sharded(lambda folder: (folder / INDEX).unlink()), "checkpoint cannot be read: .*no file"),
    "index not JSON": (sharded(with_bytes(lambda b: b[:20], INDEX)), "index.json is not JSON"),
    "index empty": (sharded(with_bytes(lambda b: b"{}", INDEX)), "index.json has no weight_map"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(name, folder):
    damage, sentence = REFUSED[name]
    damage(folder)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint directory .*nowhere"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="there is no checkpoint directory .*file"):
        load_model(tmp_path / "file")


@torch.no_grad()
def test_a_sharded_checkpoint_loads_like_a_whole_one(folder):
    ids = torch.arange(16)[None]
    whole = load_model(folder)(ids).logits
    sharded(lambda folder: None)(folder)
    assert len(list(folder.glob("model-*.safetensors"))) == 12
    model = load_model(str(folder))
    assert not model.training
    assert torch.equal(model(ids).logits, whole)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", ["auto", torch.float32, torch.bfloat16])
def test_weights_keep_their_dtype_or_take_the_one_asked_for(stored, asked, tmp_path):
    model = tiny_model("bytegpt-tiny").to(stored)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=asked)
    expected = stored if asked == "auto" else asked
    theirs = dict(model.named_parameters())
    for name, tensor in loaded.named_parameters():
        assert tensor.dtype == expected, name
        assert torch.equal(tensor, theirs[name].to(expected)), name


def test_a_given_configuration_replaces_the_stored_one(folder):
    config = read_config(folder / CONFIG)
    config.attn_logit_softcapping = 5.0
    (folder / CONFIG).write_text("{}")
    assert load_model(folder, config=config).config.attn_logit_softcapping == 5.0
    config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
        load_model(folder, config=config)


def test_a_tied_head_is_not_missing(tmp_path):
    model = tiny_model("gpt2-tiny")
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert isinstance(loaded, TesseraForCausalLM)
