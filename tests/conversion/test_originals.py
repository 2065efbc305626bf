"""Native weights as DeepSeek's inference code has them, against its logits."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tessera.conversion.convert import convert
from tessera.modeling.loading import load_model

SHARED = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[2].parent / "shared"))
TOLERANCE = 2e-4


def read_golden(name: str) -> tuple[dict, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    with safe_open(SHARED / "golden" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        args = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    return args, weights, tensors["io.input_ids"], tensors["io.logits"]


@pytest.mark.shared
@pytest.mark.parametrize("name", ["deepseek_sigmoid_yarn", "bytegpt_softmax_yarn"])
def test_native_weights_of_the_release_have_its_logits_over_any_ranks(name, tmp_path):
    args, weights, ids, expected = read_golden(name)
    source = tmp_path / "release"
    source.mkdir()
    save_file(weights, source / "model0-mp1.safetensors", metadata={"format": "pt"})
    (source / "params.json").write_text(json.dumps(args))
    convert(source, tmp_path / "two", n_experts=args["n_routed_experts"], mp=2)
    convert(tmp_path / "two", tmp_path / "ours")
    with torch.no_grad():
        found = load_model(tmp_path / "ours")(ids).logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    convert(tmp_path / "ours", tmp_path / "one", to="native")
    file = "model0-mp1.safetensors"
    assert (tmp_path / "one" / file).read_bytes() == (source / file).read_bytes()
