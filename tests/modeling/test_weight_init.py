"""Starting weights have the published spread of each scheme, and leave nothing to chance."""

import math

import pytest
import torch
from helpers.models import EVERY_MODEL, tiny_config
from safetensors.torch import load_file, save_file
from torch.utils import deterministic

from tessera import TesseraConfig, TesseraForCausalLM

WIDE = {"hidden_size": 256, "num_hidden_layers": 3}


def build(name: str, seed: int = 0, **overrides) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return TesseraForCausalLM(tiny_config(name, **overrides)).state_dict()


def is_uniform(tensor: torch.Tensor, low: float, high: float) -> bool:
    """Reaches both bounds, passes neither, and spreads as a uniform distribution does."""
    reach = (high - low) * 10 / tensor.numel()
    return (
        low <= tensor.min() < low + max(reach, 0.02 * (high - low))
        and high - max(reach, 0.02 * (high - low)) < tensor.max() <= high
        and abs(tensor.std().item() * math.sqrt(12) / (high - low) - 1) < 0.08
    )


def is_normal(tensor: torch.Tensor, std: float) -> bool:
    """Has the spread, no mean, and tails that a uniform distribution of that spread has not."""
    return (
        abs(tensor.std().item() / std - 1) < 0.04
        and abs(tensor.mean().item()) < 0.1 * std
        and tensor.abs().max().item() > 2.5 * std
    )


def test_nanochat_starts_like_the_original():
    """Numbers of `GPT.init_weights` (nanochat/gpt.py, July 2026); its docstring is older than its code."""
    state = build("nanochat-tiny", **WIDE, vocab_size=512, num_key_value_heads=2)
    bound = 3**0.5 * 256**-0.5
    expected = {
        "self_attn.q_proj.weight": lambda t: is_uniform(t, -bound, bound),
        "self_attn.k_proj.weight": lambda t: is_uniform(t, -bound, bound),
        "self_attn.v_proj.weight": lambda t: is_uniform(t, -bound, bound),
        "self_attn.o_proj.weight": lambda t: not t.any(),
        "self_attn.value_gate.weight": lambda t: t.min() >= 0 and 0.015 < t.max() <= 0.02,
        "self_attn.value_embed.weight": lambda t: is_uniform(t, -bound, bound),
        "mlp.up_proj.weight": lambda t: is_uniform(t, -0.4 * bound, 0.4 * bound),
        "mlp.down_proj.weight": lambda t: not t.any(),
        "model.embed_tokens.weight": lambda t: is_normal(t, 0.8),
        "lm_head.weight": lambda t: is_normal(t, 0.001),
        "model.smear.gate.weight": lambda t: t.min() >= 0 and 0.01 < t.max() <= 0.02,
        "model.smear.strength": lambda t: not t.any(),
        "model.backout_scale": lambda t: t.item() == pytest.approx(0.2),
    }
    scalars = {
        "residual_scale": [1.15 - 0.10 * i / 2 for i in range(3)],
        "embedding_scale": [0.20 - 0.15 * i / 2 for i in range(3)],
    }
    for name, tensor in state.items():
        layer, field = name.split(".")[2:4] if ".layers." in name else (None, None)
        if field in scalars:
            assert tensor.item() == pytest.approx(scalars[field][int(layer)]), name
            continue
        role = name if layer is None else name.split(".", 3)[3]
        assert expected[role](tensor), name


def test_a_single_layer_starts_at_the_first_scalars():
    state = build("nanochat-tiny", num_hidden_layers=1)
    assert state["model.layers.0.residual_scale"].item() == pytest.approx(1.15)
    assert state["model.layers.0.embedding_scale"].item() == pytest.approx(0.20)


def test_bytegpt_matrices_are_xavier_uniform_and_embeddings_uniform_within_two_thirds():
    state = build("bytegpt-tiny", hidden_size=128, num_hidden_layers=2, q_lora_rank=64)
    checked = 0
    for name, tensor in state.items():
        if tensor.ndim == 1:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
            continue
        checked += 1
        if name == "model.embed_tokens.weight":
            assert is_uniform(tensor, -0.666, 0.666)
            continue
        # An expert is a matrix of its own, and its gate and up are two, however they are stacked.
        matrices = tensor.unbind() if tensor.ndim == 3 else [tensor]
        if name.endswith("gate_up_proj"):
            matrices = [half for matrix in matrices for half in matrix.chunk(2)]
        for matrix in matrices:
            reference = torch.nn.init.xavier_uniform_(torch.empty_like(matrix))
            bound = math.sqrt(6 / sum(matrix.shape))
            assert is_uniform(matrix, -bound, bound), name
            assert matrix.std().item() == pytest.approx(reference.std().item(), rel=0.1), name
    assert checked > 20


@pytest.mark.parametrize("depth", [2, 8])
def test_gpt2_scales_what_joins_the_residual_stream_by_depth(depth):
    state = build("gpt2-tiny", hidden_size=128, num_hidden_layers=depth, intermediate_size=512)
    for name, tensor in state.items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif tensor.ndim == 1:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            joins = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert is_normal(tensor, 0.02 / math.sqrt(2 * depth) if joins else 0.02), name


@pytest.mark.parametrize("name", ["llama-tiny", "moe-qknorm-softcap"])
def test_normal_draws_every_matrix_with_the_initializer_range(name):
    state = build(name, hidden_size=128, initializer_range=0.05)
    matrices = {key: tensor for key, tensor in state.items() if tensor.ndim > 1}
    assert len(matrices) > 20
    for key, tensor in matrices.items():
        if tensor.numel() > 4096:
            assert is_normal(tensor, 0.05), key
        else:
            assert tensor.std().item() == pytest.approx(0.05, rel=0.2), key


def test_experts_of_other_dialects_keep_their_scheme():
    state = build("nanochat-moe-smear-gqa", hidden_size=128)
    experts = "model.layers.0.mlp.experts"
    bound = 0.4 * math.sqrt(3 / 128)
    assert is_uniform(state[f"{experts}.up_proj"], -bound, bound)
    assert not state[f"{experts}.down_proj"].any()
    assert is_uniform(state["model.layers.0.mlp.gate.weight"], -math.sqrt(3 / 128), math.sqrt(3 / 128))
    state = build("latent-sliding-lowrank-sigmoid")
    assert not state["model.layers.1.mlp.gate.e_score_correction_bias"].any()


@pytest.mark.parametrize("scheme", ["normal", "gpt2", "bytegpt", "nanochat"])
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_nothing_is_left_uninitialised(name, scheme, monkeypatch):
    """Memory that torch hands out unwritten is filled with NaN here."""
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        states = [build(name, seed, initializer=scheme) for seed in (0, 0, 1)]
    finally:
        torch.use_deterministic_algorithms(False)
    for key, tensor in states[0].items():
        assert tensor.isfinite().all(), key
        assert torch.equal(tensor, states[1][key]), f"{key} depends on more than the seed"
    assert any(not torch.equal(tensor, states[2][key]) for key, tensor in states[0].items())


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_loading_fills_what_is_missing_and_leaves_the_rest_alone(name, tmp_path):
    torch.manual_seed(0)
    model = TesseraForCausalLM(tiny_config(name))
    for tensor in model.state_dict().values():
        tensor.fill_(0.123)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    # A head, smear and backout are missing, and the second layer: initialised anew, by the same scheme.
    prefixes = ("model.layers.1.", "lm_head.", "model.smear.", "model.backout")
    gone = [key for key in state if key.startswith(prefixes)]
    save_file({key: state[key] for key in state if key not in gone}, file, metadata={"format": "pt"})
    loaded, info = TesseraForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(gone)
    fresh = build(name, seed=5)
    for key, tensor in loaded.state_dict().items():
        if key not in gone and not (key == "lm_head.weight" and model.config.tie_word_embeddings):
            assert torch.equal(tensor, torch.full_like(tensor, 0.123)), key
        elif key in gone:
            assert tensor.isfinite().all(), key
            assert tensor.mean().item() == pytest.approx(fresh[key].mean().item(), abs=0.06), key
            if tensor.numel() > 1000:
                assert tensor.std().item() == pytest.approx(fresh[key].std().item(), rel=0.15), key


def test_presets_name_the_scheme_of_their_dialect():
    schemes = {"bytegpt": "bytegpt", "llama-100m": "normal", "nanochat-d12": "nanochat", "gpt2-124m": "gpt2"}
    assert {name: TesseraConfig.from_preset(name).initializer for name in schemes} == schemes
