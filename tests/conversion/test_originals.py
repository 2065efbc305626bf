"""Weights of the releases: DeepSeek's native files, and Llama's."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from tessera.conversion.convert import convert
from tessera.modeling.loading import load_model

SHARED = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[2].parent / "shared"))
TOLERANCE = 2e-4


# ---- golden files ----


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


@pytest.mark.shared
def test_stories260k_tells_its_published_story_after_each_step(tmp_path):
    """Llama -> Tessera -> two ranks -> Tessera -> Llama, greedy from the beginning-of-text token."""
    source = SHARED / "data/stories260k/hf_llama"
    golden = json.loads((source / "golden.json").read_text())
    pieces = [bytes.fromhex(piece) for piece, _ in json.loads((source / "vocab.json").read_text())]

    def story(model) -> tuple[list[int], str]:
        prompt, count = torch.tensor([golden["prompt_ids"]]), len(golden["greedy_ids"])
        out = model.generate(prompt, do_sample=False, min_new_tokens=count, max_new_tokens=count)
        ids = out[0, prompt.shape[1] :].tolist()
        return ids, b"".join(pieces[i] for i in ids).decode().replace("<0x0A>", "\n").strip()

    published = (golden["greedy_ids"], golden["text"].strip())
    shutil.copytree(source, tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "ours")
    assert story(load_model(tmp_path / "ours")) == published
    convert(tmp_path / "ours", tmp_path / "native", n_experts=0, mp=2)
    convert(tmp_path / "native", tmp_path / "again")
    assert story(load_model(tmp_path / "again")) == published
    convert(tmp_path / "again", tmp_path / "back", to="llama")
    assert story(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back")) == published
    file = "model.safetensors"
    assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
