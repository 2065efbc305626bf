"""Auto classes know Tessera whoever is imported first. Each order of imports needs a process of its own."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from helpers.models import tiny_config
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
)

import tessera
from tessera import TesseraConfig

HEADS = {
    AutoModel: "TesseraModel",
    AutoModelForCausalLM: "TesseraForCausalLM",
    AutoModelForSequenceClassification: "TesseraForSequenceClassification",
    AutoModelForTokenClassification: "TesseraForTokenClassification",
}

IMPORTS = {
    "tessera alone": "import tessera",
    "tessera first": "import tessera, transformers",
    "transformers first": "import transformers, tessera",
    "auto classes first": "from transformers import AutoConfig, AutoModelForCausalLM; import tessera",
    "auto config first": "from transformers import AutoConfig; import tessera",
    "another model after": "import tessera; from transformers import LlamaForCausalLM",
    "another model before": "from transformers import LlamaForCausalLM; import tessera",
    "our model first": "from tessera import TesseraForCausalLM; import transformers",
    "our model module first": "import tessera.modeling.modeling_tessera",
    "imported again": "import tessera, importlib, transformers; importlib.reload(tessera)",
}

USE = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
config = AutoConfig.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
import tessera
assert type(config) is tessera.TesseraConfig, type(config)
assert type(model) is tessera.TesseraForCausalLM, type(model)
assert tessera.TesseraConfig in MODEL_FOR_CAUSAL_LM_MAPPING
assert MODEL_FOR_CAUSAL_LM_MAPPING[LlamaConfig].__name__ == "LlamaForCausalLM"
waiting = [finder.actions for finder in sys.meta_path if type(finder).__module__.startswith("tessera")]
assert [list(actions) for actions in waiting] == [["peft.utils.constants"]], waiting
import peft
assert not any(type(finder).__module__.startswith("tessera") for finder in sys.meta_path), sys.meta_path
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(tiny_config("llama-tiny", num_hidden_layers=1)).save_pretrained(folder)
    return folder


# Each starts a process of seconds; those that differ most are run daily.
DAILY = ("tessera alone", "transformers first", "our model first")


@pytest.mark.parametrize(
    "order",
    [order if order in DAILY else pytest.param(order, marks=pytest.mark.distributed) for order in IMPORTS],
)
def test_auto_classes_know_tessera_whatever_is_imported_first(order, saved):
    program = f"{IMPORTS[order]}\n{USE}"
    done = subprocess.run([sys.executable, "-c", program, saved], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
def test_every_auto_class_makes_saves_and_loads_its_head(auto, tmp_path):
    config = tiny_config("llama-tiny", num_hidden_layers=1, pad_token_id=0)
    model = auto.from_config(config)
    assert type(model) is getattr(tessera, HEADS[auto])
    model.save_pretrained(tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info.values()), info
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids)[0], model.eval()(ids)[0])


def test_auto_config_makes_and_loads_the_configuration(tmp_path):
    made = AutoConfig.for_model("tessera", hidden_size=96, num_attention_heads=4)
    assert type(made) is TesseraConfig and made.hidden_size == 96
    made.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is TesseraConfig
    assert loaded.to_diff_dict() == made.to_diff_dict()


def test_other_models_load_as_before(tmp_path):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_configuration_survives_copying(copied):
    config = tiny_config("nanochat-tiny")
    twin = copied(config)
    assert type(twin) is TesseraConfig
    assert twin.to_dict() == config.to_dict()


def test_the_package_names_what_it_exports():
    assert set(tessera.__all__) == set(dir(tessera))
    assert all(getattr(tessera, name) is not None for name in tessera.__all__)
    with pytest.raises(AttributeError, match="no attribute 'TesseraForEverything'"):
        tessera.TesseraForEverything  # noqa: B018
