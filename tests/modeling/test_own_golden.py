"""Logits that each dialect gave when its equality with the original was seen; see tests/golden/make.py."""

import json
from pathlib import Path

import pytest
import torch
from helpers.models import DIALECTS
from helpers.weights import load_all
from safetensors import safe_open

from tessera import TesseraConfig, TesseraForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden"


@torch.no_grad()
@pytest.mark.parametrize("name", DIALECTS)
def test_weights_of_an_earlier_version_give_the_same_logits(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = TesseraConfig.from_dict(json.loads(file.metadata()["config"]))
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    model = load_all(TesseraForCausalLM(config), weights)
    out = model(tensors["ids"], labels=tensors["ids"], use_cache=False)
    torch.testing.assert_close(out.logits, tensors["logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss.reshape(1), tensors["loss"], atol=1e-5, rtol=1e-5)
