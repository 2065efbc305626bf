"""A saved directory is all that others need: transformers loads the same model from it without Tessera."""

import json

import pytest
import torch
import transformers
from helpers.models import DIALECTS, tiny_config, tiny_model
from helpers.remote_code import FOLDER, travelling, without_tessera
from helpers.weights import randomize
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tessera import (
    TesseraConfig,
    TesseraForCausalLM,
    TesseraForSequenceClassification,
    TesseraForTokenClassification,
    build_byte_tokenizer,
)
from tessera.modeling import auto_map

HEADS = {
    "causal": TesseraForCausalLM,
    "sequence": TesseraForSequenceClassification,
    "token": TesseraForTokenClassification,
}

# name -> preset, fields laid over it
MODELS = {name: (name, {}) for name in DIALECTS}
MODELS["drafting"] = ("bytegpt-tiny", {"num_mtp_layers": 1, "train_mtp": True})

# Everything under the folder argv[1], without Tessera and without a network; what comes out goes to argv[2].
STRANGER = """
from pathlib import Path
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

models, out, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
heads = {"causal": "CausalLM", "sequence": "SequenceClassification", "token": "TokenClassification"}
for folder in sorted(models.iterdir()):
    answers = {}
    config = AutoConfig.from_pretrained(folder / "causal", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "causal", trust_remote_code=True)
    ids = torch.tensor([tokenizer("Hello, stranger!").input_ids])
    for name, head in heads.items():
        auto = getattr(transformers, "AutoModelFor" + head)
        model, info = auto.from_pretrained(folder / name, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), info
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        with torch.no_grad():
            answers[name] = model(ids).logits
        if name == "causal":
            drafts = {"use_mtp": True} if config.num_mtp_layers else {}
            generated = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **drafts)
            answers["generated"] = generated
            model.save_pretrained(out / folder.name / "again")
            tokenizer.save_pretrained(out / folder.name / "again")
    base = transformers.AutoModel.from_pretrained(folder / "causal", trust_remote_code=True)
    with torch.no_grad():
        answers["hidden"] = base(ids).last_hidden_state
    config.save_pretrained(out / folder.name / "config")
    save_file({k: v.contiguous() for k, v in answers.items()}, out / folder.name / "answers.safetensors")
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The models of every dialect, and the folder of what a stranger made of them."""
    root = tmp_path_factory.mktemp("remote")
    models = {}
    for dialect, (preset, fields) in MODELS.items():
        for name, kind in HEADS.items():
            model = randomize(kind(tiny_config(preset, num_labels=3, pad_token_id=0, **fields)), 0)
            model.save_pretrained(root / "models" / dialect / name)
            models[dialect, name] = model
        build_byte_tokenizer().save_pretrained(root / "models" / dialect / "causal")
    without_tessera(STRANGER, root / "models", root / "out", torch.get_num_threads(), home=root / "home")
    return models, root


@pytest.mark.parametrize("dialect", MODELS)
def test_a_stranger_gets_the_same_from_every_head(dialect, loaded):
    models, root = loaded
    answers = load_file(root / "out" / dialect / "answers.safetensors")
    ids = torch.tensor([list(b"Hello, stranger!")])
    with torch.no_grad():
        for name in HEADS:
            assert torch.equal(answers[name], models[dialect, name](ids).logits), name
        causal = models[dialect, "causal"]
        assert torch.equal(answers["hidden"], causal.model(ids).last_hidden_state)
        generated = causal.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(answers["generated"], generated)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_a_stranger_saves_is_complete_again(dialect, loaded):
    _, root = loaded
    ours = root / "models" / dialect / "causal"
    again = root / "out" / dialect / "again"
    assert {path.name for path in again.iterdir()} == {path.name for path in ours.iterdir()}
    for path in ours.iterdir():
        if path.name == "tokenizer_config.json":  # says also how the tokenizer was loaded
            continue
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    config = root / "out" / dialect / "config"
    assert {path.name for path in config.iterdir()} == {"config.json", *(p.name for p in ours.glob("*.py"))}


def test_the_code_beside_a_model_is_what_it_imports_and_no_more(tmp_path):
    tiny_model("bytegpt-tiny").save_pretrained(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.py")} == travelling()
    for path in tmp_path.glob("*.py"):
        assert path.read_bytes() == (FOLDER / path.name).read_bytes()


def test_every_head_is_in_the_auto_map_whatever_is_saved(tmp_path):
    model = tiny_model("llama-tiny")
    model.save_pretrained(tmp_path / "model")
    model.config.save_pretrained(tmp_path / "config")
    model.model.save_pretrained(tmp_path / "base")
    for name in ("model", "config", "base"):
        found = json.loads((tmp_path / name / "config.json").read_text())["auto_map"]
        assert found.keys() == auto_map.AUTO_CLASSES.keys()
        for auto, place in found.items():
            file, kind = place.split(".")
            assert auto_map.AUTO_CLASSES[auto].__name__ == kind
            assert f"class {kind}(" in (tmp_path / name / f"{file}.py").read_text()
    assert (tmp_path / "model/generation_config.json").is_file()


def test_where_tessera_is_installed_no_flag_is_needed_and_no_file_is_run(tmp_path):
    model = tiny_model("llama-tiny")
    model.save_pretrained(tmp_path)
    build_byte_tokenizer().save_pretrained(tmp_path)
    for path in tmp_path.glob("*.py"):
        path.write_text("raise SystemExit('the copy was run')")
    for trust in ({}, {"trust_remote_code": True}):
        assert type(AutoConfig.from_pretrained(tmp_path, **trust)) is type(model.config)
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path, **trust)) is TesseraForCausalLM
        assert AutoTokenizer.from_pretrained(tmp_path, **trust)("A").input_ids == [65]


def test_the_package_registers_what_the_auto_map_names(tmp_path):
    for auto, kind in auto_map.AUTO_CLASSES.items():
        if auto != "AutoConfig":
            assert getattr(transformers, auto)._model_mapping[TesseraConfig] is kind
    assert transformers.AutoConfig.for_model("tessera").__class__ is auto_map.AUTO_CLASSES["AutoConfig"]


def test_a_class_of_ones_own_stays_in_the_auto_map():
    entries = {
        "AutoModelForCausalLM": "my_model.MyCausalLM",
        "AutoModel": "someone/model--modeling_tessera.TesseraModel",
        "AutoModelForQuestionAnswering": "someone/model--my_model.MyAnswers",
    }
    found = auto_map.complete(entries)
    assert found["AutoModelForCausalLM"] == "my_model.MyCausalLM"
    assert found["AutoModel"] == "modeling_tessera.TesseraModel"
    assert found["AutoModelForQuestionAnswering"] == "someone/model--my_model.MyAnswers"
