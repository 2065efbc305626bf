"""Checkpoints that the original implementations wrote: nanochat's `.pt`, DeepSeek's native files, Llama's."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers.models import tiny_model
from safetensors import safe_open
from safetensors.torch import save_file

from tessera.conversion.convert import convert
from tessera.conversion.nanochat_original import RULES
from tessera.conversion.rules import to_theirs
from tessera.modeling.loading import load_model

SHARED = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[2].parent / "shared"))
TOLERANCE = 2e-4


def write_nanochat(folder: Path, weights: dict[str, torch.Tensor], args: dict, step: int = 700) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / f"model_{step:06d}.pt")
    meta = {"step": step, "model_config": args}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def nanochat(tmp_path) -> tuple[Path, torch.nn.Module]:
    """A checkpoint as nanochat writes it, compiled and with embeddings in bf16; and the model in it."""
    model = tiny_model("nanochat-tiny", vocab_size=250, padded_vocab_size=256)
    config = model.config
    config.sliding_window = 129
    weights = dict(to_theirs(model.state_dict(), config, RULES))
    for name in weights:
        if "wte" in name or "value_embeds" in name:
            weights[name] = weights[name].bfloat16()
    for parameter in [model.model.embed_tokens.weight] + [
        layer.self_attn.value_embed.weight for layer in model.model.layers if layer.self_attn.value_embed
    ]:
        parameter.data = parameter.data.bfloat16().float()
    args = {
        "sequence_len": 512,
        "vocab_size": 250,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_kv_head": config.num_key_value_heads,
        "n_embd": config.hidden_size,
        "window_pattern": "".join("S" if kind.startswith("s") else "L" for kind in config.layer_types),
    }
    compiled = {f"_orig_mod.{name}": tensor.clone() for name, tensor in weights.items()}
    write_nanochat(tmp_path / "nanochat", {"wrong": torch.zeros(1)}, args, step=600)
    return write_nanochat(tmp_path / "nanochat", compiled, args), model


def test_nanochat_newest_step_becomes_a_model_with_the_same_logits(nanochat, tmp_path):
    folder, model = nanochat
    (folder / "tokenizer.pkl").write_bytes(b"")
    done = convert(folder, tmp_path / "ours")
    assert done.source == "nanochat-original"
    assert done.notes == ["its tokenizer is a pickle, which is not read: the result has none"]
    ours = load_model(tmp_path / "ours")
    assert ours.config.sliding_window == 129 and ours.config.padded_vocab_size == 256
    ids = torch.randint(250, (1, 160), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


class _Object:
    pass


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"a": _Object()}, "holds pickled objects beside tensors"),
        ([torch.zeros(1)], "is not a dictionary of tensors"),
        ({"a": torch.zeros(1)}, "is not a nanochat model: it has no transformer.wte.weight"),
        ({"transformer.wte.weight": torch.zeros(256, 8)}, "missing tensors .*backout_lambda"),
    ],
)
def test_a_pt_file_with_anything_else_is_refused(content, sentence, nanochat, tmp_path):
    folder, _ = nanochat
    torch.save(content, folder / "model_000700.pt")
    with pytest.raises(ValueError, match=sentence):
        convert(folder, tmp_path / "ours")
    (folder / "meta_000700.json").write_text('{"model_config": {"n_layer": 2}}')
    with pytest.raises(ValueError, match="model_config lacks sequence_len, vocab_size, n_head"):
        convert(folder, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nanochat"]


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
@pytest.mark.parametrize("name", ["nanochat_2026_07_a", "nanochat_2026_07_b"])
def test_nanochat_checkpoints_have_its_logits(name, tmp_path):
    args, weights, ids, expected = read_golden(name)
    convert(write_nanochat(tmp_path / "nanochat", weights, args), tmp_path / "ours")
    with torch.no_grad():
        found = load_model(tmp_path / "ours")(ids).logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


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
