"""Logits of the original implementations (DeepSeek-V3 inference, ByteGPT, nanochat) in ../shared/golden."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers.weights import NANOCHAT, NATIVE, load_all, rename, split_layer_scalars, stack_experts
from safetensors import safe_open

from tessera import TesseraConfig, TesseraForCausalLM
from tessera.conversion.model_args import config_from_model_args

pytestmark = pytest.mark.shared

SHARED = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[2].parent / "shared"))
NATIVE_FILES = ["bytegpt_softmax_yarn", "deepseek_sigmoid_yarn"]
NANOCHAT_FILES = ["nanochat_2026_07_a", "nanochat_2026_07_b"]
TOLERANCE = 2e-4


def read(name: str):
    with safe_open(SHARED / "golden" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        args = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    return args, weights, tensors


def nanochat_config(args: dict) -> TesseraConfig:
    width = args["n_embd"]
    window = -(-args["sequence_len"] // 4 // 128) * 128
    return TesseraConfig.from_preset(
        "nanochat-d12",
        vocab_size=args["vocab_size"],
        padded_vocab_size=-(-args["vocab_size"] // 64) * 64,
        hidden_size=width,
        num_hidden_layers=args["n_layer"],
        num_attention_heads=args["n_head"],
        num_key_value_heads=args["n_kv_head"],
        head_dim=width // args["n_head"],
        intermediate_size=4 * width,
        layer_types=args["window_pattern"],
        # Theirs counts the tokens to the left, ours the current one too.
        sliding_window=window + 1,
        max_position_embeddings=args["sequence_len"],
    )


def load(name: str):
    args, weights, tensors = read(name)
    if name in NATIVE_FILES:
        model = TesseraForCausalLM(config_from_model_args(args))
        state = stack_experts(rename(weights, NATIVE))
    else:
        model = TesseraForCausalLM(nanochat_config(args))
        state = split_layer_scalars(rename(weights, NANOCHAT))
    return load_all(model, state), tensors


@pytest.mark.parametrize("mode", ["auto", "naive", "absorb"])
@pytest.mark.parametrize("name", NATIVE_FILES + NANOCHAT_FILES)
def test_whole_sequence_equals_the_original(name, mode):
    model, tensors = load(name)
    model.config.latent_attention_mode = mode
    with torch.no_grad():
        logits = model(tensors["io.input_ids"]).logits
    torch.testing.assert_close(logits, tensors["io.logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NATIVE_FILES + NANOCHAT_FILES)
def test_token_by_token_through_the_cache_equals_the_original(name):
    model, tensors = load(name)
    cache, logits = None, []
    with torch.no_grad():
        for t in range(tensors["io.input_ids"].shape[1]):
            out = model(tensors["io.input_ids"][:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), tensors["io.logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NANOCHAT_FILES)
def test_loss_equals_the_original(name):
    model, tensors = load(name)
    with torch.no_grad():
        loss = model(tensors["io.input_ids"], labels=tensors["io.input_ids"]).loss
    torch.testing.assert_close(loss, tensors["io.loss"].squeeze(), atol=1e-4, rtol=0)


def test_stories260k_gives_its_published_text():
    """A real trained Llama-architecture model, greedy from the beginning-of-text token."""
    from safetensors.torch import load_file

    folder = SHARED / "data" / "stories260k" / "hf_llama"
    theirs = json.loads((folder / "config.json").read_text())
    kept = {
        name: theirs[name]
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_parameters",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
        )
    }
    model = load_all(TesseraForCausalLM(TesseraConfig(**kept)), load_file(folder / "model.safetensors"))
    golden = json.loads((folder / "golden.json").read_text())
    prompt = torch.tensor([golden["prompt_ids"]])
    count = len(golden["greedy_ids"])
    ids = model.generate(prompt, do_sample=False, min_new_tokens=count, max_new_tokens=count)[0, 1:].tolist()
    assert ids == golden["greedy_ids"]

    pieces = [bytes.fromhex(piece) for piece, _ in json.loads((folder / "vocab.json").read_text())]
    text = b"".join(pieces[i] for i in ids).decode().replace("<0x0A>", "\n").strip()
    assert text == golden["text"].strip()
