"""Loading quantised by bitsandbytes, torchao and transformers' FP8: what is quantised, how far off, how used.

What a quantised layer holds is read by giving it the identity matrix, so no library is asked about itself.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers.models import DIALECTS
from helpers.trainers import stack_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, TorchAoConfig

IDS = torch.arange(40).view(2, 20)
# Sizes that blocks of 64 divide; the packed kernels for CPUs want rows in steps of 32.
SIZES = {"hidden_size": 64, "head_dim": None}
LATENT = {"hidden_size": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32}


def rows_of(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().amax(1, keepdim=True).expand_as(weight)


def blocks_of(weight: torch.Tensor, size: int) -> torch.Tensor:
    return weight.abs().view(-1, size).amax(1, keepdim=True).expand(-1, size).reshape(weight.shape)


# How far a weight may be off: half of the widest step between two values, of the largest in its row or block.
BOUNDS = {
    "bitsandbytes int8": lambda w: rows_of(w) / 127,
    "bitsandbytes nf4": lambda w: 0.16 * blocks_of(w, 64),
    "torchao int8": lambda w: rows_of(w) / 127,
    "torchao int4": lambda w: blocks_of(w, 32) / 7,
    "torchao float8": lambda w: w.abs() / 16 + rows_of(w) / 448,
}


EXACT = ("torchao int8", "torchao int4")


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def quantization(kind: str):
    if kind.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
        if "int8" in kind:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    quantize = pytest.importorskip("torchao.quantization")
    if "int8" in kind:
        return TorchAoConfig(quantize.Int8WeightOnlyConfig())
    if "float8" in kind:
        return TorchAoConfig(quantize.Float8WeightOnlyConfig())
    per_group = quantize.PerGroup(32)
    return TorchAoConfig(quantize.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=per_group))


def load(folder: Path | str, kind: str | None = None, **given) -> nn.Module:
    if kind is not None:
        given["quantization_config"] = quantization(kind)
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **given}).eval()


def saved(folder: Path, preset: str, **given) -> str:
    return stack_model(folder, preset, **(LATENT if preset == "bytegpt-tiny" else SIZES), **given)


@torch.no_grad()
def held(layer: nn.Linear) -> torch.Tensor:
    """The weight [out, in] that a layer multiplies by."""
    zero = torch.zeros(1, layer.in_features)
    return (layer(torch.eye(layer.in_features)) - layer(zero)).float().T


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids, use_cache=False).logits.float()


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("preset", DIALECTS)
def test_projections_are_quantised_within_their_steps_and_all_else_is_not(preset, kind, tmp_path):
    folder = saved(tmp_path, preset)
    model, plain = load(folder, kind), load(folder)
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert {name.rsplit(".", 1)[-1] for name in linear} >= {"o_proj", "up_proj", "down_proj"}
    for name, parameter in plain.named_parameters():
        layer = name.removesuffix(".weight")
        if layer not in linear:
            assert torch.equal(model.get_parameter(name).float(), parameter), name
            continue
        error, bound = (held(model.get_submodule(layer)) - parameter).abs(), BOUNDS[kind](parameter)
        assert error.max() > 1e-5 and (error <= 1.01 * bound + 1e-6).all(), name
        with torch.no_grad():
            parameter.copy_(held(model.get_submodule(layer)))
    # A plain model of the weights that the layers hold. Some round what they are given, or compute in bf16.
    assert distance(logits(model), logits(plain)) < (1e-5 if kind in EXACT else 0.1)


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("mode", ["absorb", "auto"])
def test_latent_attention_decodes_with_a_quantised_expansion(kind, mode, tmp_path):
    """Its absorbed form would take the weight of `kv_b_proj` as it lies in memory."""
    model = load(saved(tmp_path, "bytegpt-tiny", latent_attention_mode=mode), kind)
    whole = logits(model)
    with torch.no_grad():
        start = model(IDS[:, :19], use_cache=True)
        last = model(IDS[:, 19:], past_key_values=start.past_key_values).logits.float()
    assert distance(last, whole[:, 19:]) < (1e-5 if kind in EXACT else 0.1)


@pytest.mark.parametrize("kind", BOUNDS)
def test_a_quantised_model_generates_saves_and_reloads_equal(kind, tmp_path):
    model = load(saved(tmp_path / "model", "bytegpt-tiny"), kind)
    out = model.generate(IDS[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    greedy = IDS[:1]
    for _ in range(6):
        greedy = torch.cat([greedy, logits(model, greedy)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, greedy)
    model.save_pretrained(tmp_path / "quantised")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised").eval()
    assert again.config.quantization_config.quant_method == model.config.quantization_config.quant_method
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["bitsandbytes int8", "bitsandbytes nf4", "torchao int8"])
def test_adapters_learn_on_top_of_a_quantised_model(kind, tmp_path):
    model = load(saved(tmp_path, "bytegpt-tiny"), kind)
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).train()
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bitsandbytes int8", "bitsandbytes nf4", "torchao int8"])
@pytest.mark.parametrize("preset", DIALECTS)
def test_quantised_models_generate_on_a_gpu(preset, kind, tmp_path):
    folder = saved(tmp_path, preset)
    model = load(folder, kind, device_map="cuda", dtype=torch.bfloat16)
    out = model.generate(IDS[:1].cuda(), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert out.shape == (1, 28) and out.device.type == "cuda"
    expected = logits(load(folder))
    assert distance(logits(model, IDS.cuda()).cpu(), expected) < (0.6 if "nf4" in kind else 0.2)


# ---- FP8 in blocks of 128 x 128 ----

WIDE = {"hidden_size": 128, "intermediate_size": 256}
WIDE_LATENT = {
    "num_attention_heads": 1,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 128,
    "v_head_dim": 128,
    "mlp_layer_types": "D",
    "n_routed_experts": 0,
    "n_shared_experts": 0,
    "num_experts_per_tok": 0,
    "moe_intermediate_size": None,
}


@pytest.mark.parametrize("preset", ["bytegpt-tiny", "llama-tiny", "nanochat-tiny"])
def test_an_fp8_checkpoint_loads_as_what_its_blocks_say(preset, tmp_path):
    """In the layout of DeepSeek-V3's release, which transformers decodes where there is no GPU for it."""
    sizes = {**WIDE, **WIDE_LATENT} if preset == "bytegpt-tiny" else {**WIDE, "num_key_value_heads": 4}
    folder = Path(stack_model(tmp_path, preset, **sizes))
    plain = load(folder)
    state, expected = load_file(folder / "model.safetensors"), {}
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    plain.load_state_dict(state)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            out, blocks = module.weight.shape[0] // 128, module.weight.detach().unflatten(1, (-1, 128))
            blocks = blocks.unflatten(0, (out, 128)).transpose(1, 2)  # [out / 128, in / 128, 128, 128]
            scale = blocks.abs().amax((2, 3)) / torch.finfo(torch.float8_e4m3fn).max
            stored = (blocks / scale[..., None, None]).to(torch.float8_e4m3fn)
            state[f"{name}.weight"] = stored.transpose(1, 2).reshape(module.weight.shape).contiguous()
            state[f"{name}.weight_scale_inv"] = scale
            expected[name] = (
                (stored.float() * scale[..., None, None]).transpose(1, 2).reshape_as(module.weight)
            )
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = FineGrainedFP8Config(weight_block_size=(128, 128)).to_dict()
    (folder / "config.json").write_text(json.dumps(config))

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert len(expected) >= 10
    with torch.no_grad():
        for name, weight in expected.items():
            found = model.get_submodule(name).weight
            assert (found.float() - weight).abs().max() <= weight.abs().max() / 128, name
            plain.get_submodule(name).weight.copy_(weight)
    out = model.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4)
    assert out.shape == (1, 24)
    assert distance(logits(model), logits(plain)) < 0.03  # bf16
    # Saved, it is the bf16 model that it has become.
    model.save_pretrained(tmp_path / "decoded")
    assert torch.equal(logits(load(tmp_path / "decoded", dtype="auto")), logits(model))
