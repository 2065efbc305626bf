"""What `--config` may be: a preset, a file, a directory; and what each mistake gets."""

import json

import pytest

from tessera import TesseraConfig
from tessera.configs.resolve import resolve_config

MODEL_ARGS = {"dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 300}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty directory to stand in, so that relative names mean something."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, values):
    path.parent.mkdir(exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["bytegpt-tiny", "nanochat-d24", "nanochat-d7"])
def test_a_name_is_a_preset(name, folder):
    expected = TesseraConfig.from_preset(name, vocab_size=100, padded_vocab_size=128)
    assert resolve_config(name, vocab_size=100, padded_vocab_size=128).to_dict() == expected.to_dict()


@pytest.mark.parametrize("name", ["verse-tiny", "bytegpt-tiny", "gpt2-tiny"])
def test_a_saved_configuration_is_found_by_its_file_and_its_directory(name, folder):
    saved = TesseraConfig.from_preset(name)
    saved.save_pretrained(folder / "saved")
    for given in ("saved", "saved/config.json", str(folder / "saved")):
        assert resolve_config(given).to_dict() == saved.to_dict()
        assert resolve_config(given, rms_norm_eps=0.5).rms_norm_eps == 0.5


def test_a_directory_goes_before_a_preset_of_its_name(folder):
    TesseraConfig.from_preset("verse-tiny").save_pretrained(folder / "llama-tiny")
    found = resolve_config("llama-tiny")
    # What is saved names the code beside it.
    assert found.auto_map
    found.auto_map = {}
    assert found.to_dict() == TesseraConfig.from_preset("verse-tiny").to_dict()


def test_a_copy_of_a_preset_file_means_the_preset(folder):
    given = write(folder / "mine.json", {"base": "nanochat-d12", "depth": 6, "vocab_size": 100})
    expected = TesseraConfig.from_preset("nanochat-d6", vocab_size=100)
    assert resolve_config(given).to_dict() == expected.to_dict()


def test_a_file_of_model_args_is_understood(folder):
    config = resolve_config(write(folder / "params.json", MODEL_ARGS), max_position_embeddings=99)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 2, 300)
    assert config.max_position_embeddings == 99
    assert config.attention_type == "latent"


REFUSED = {
    "unknown preset": ("gpt2-tinny", None, "no preset 'gpt2-tinny'; did you mean 'gpt2-tiny'"),
    "missing file": ("nothing.json", None, "there is no file nothing.json"),
    "pasted JSON": (json.dumps(MODEL_ARGS) * 20, None, "there is no preset"),
    "null byte": ("a\0b", None, "there is no preset"),
    "directory without config": ("empty", ("empty/notes.txt", "x"), "there is no file empty.config.json"),
    "not JSON": ("c.json", ("c.json", "{oops"), "c.json is not JSON"),
    "not an object": ("c.json", ("c.json", [1]), "c.json must hold a JSON object, not list"),
    "other model": (
        "c.json",
        ("c.json", {"model_type": "llama"}),
        "is of model type 'llama'",
    ),
    "unknown field": ("c.json", ("c.json", {"hiden_size": 4}), "'hiden_size'; did you mean 'hidden_size'"),
    "wrong type": (
        "c.json",
        ("c.json", {"hidden_size": "4"}),
        "--config c.json: Field 'hidden_size' expected int",
    ),
    "unknown args": ("c.json", ("c.json", {"dim": 8, "n_head": 2}), "no 'n_head'; did you mean 'n_heads'"),
    "wrong args": ("c.json", ("c.json", {"dim": "8"}), "dim must be a whole number, got '8'"),
    "wrong scoring": (
        "c.json",
        ("c.json", {"dim": 64, "score_func": "tanh"}),
        "--config c.json: .*'scoring_func'",
    ),
    "unknown base": ("c.json", ("c.json", {"base": "nano"}), "no preset 'nano'"),
    "base and unknown": ("c.json", ("c.json", {"base": "llama-tiny", "deph": 3}), "no field 'deph'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_said_in_one_sentence(name, folder):
    given, file, sentence = REFUSED[name]
    if file is not None:
        write(folder / file[0], file[1])
    with pytest.raises(ValueError, match=sentence) as caught:
        resolve_config(given)
    assert "\n" not in str(caught.value)


def test_a_wrong_override_is_refused_too(folder):
    with pytest.raises(ValueError, match="--config llama-tiny: Field 'hidden_size' expected int, got str"):
        resolve_config("llama-tiny", hidden_size="64")
    with pytest.raises(ValueError, match="no field 'n_heads'"):
        resolve_config("llama-tiny", n_heads=3)
