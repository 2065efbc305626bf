"""FP8 in blocks: the arithmetic against DeepSeek's, and checkpoints that come in and go out with it."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.models import tiny_model
from helpers.weights import randomize
from safetensors.torch import load_file, save_file

from tessera.conversion.convert import FP8_REPORT, convert
from tessera.conversion.fp8 import (
    FP8,
    block_grid,
    dequantize_blocks,
    measure_error,
    quantize_blocks,
    summarize_errors,
)
from tessera.conversion.resharding import shard
from tessera.conversion.sharded_loading import load_sharded
from tessera.conversion.sources import open_checkpoint
from tessera.modeling.loading import load_model

# The second has the proportions of DeepSeek-V3's `kv_a_proj_with_mqa`, 576 rows; none divides by 128.
SHAPES = [(256, 384), (576, 200), (1, 1), (130, 5), (100, 300)]
# No size is a multiple of 128, and most are of more than one block.
ODD = {
    "vocab_size": 97,
    "hidden_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "intermediate_size": 300,
    "moe_intermediate_size": 136,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 140,
    "kv_lora_rank": 150,
    "qk_nope_head_dim": 36,
    "qk_rope_head_dim": 8,
    "v_head_dim": 36,
    "num_mtp_layers": 0,
}
# All sizes are multiples of 128, as transformers' own decoding wants them.
EVEN = ODD | {
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}


def matrix(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Rows and columns of very different size, so that a factor in the wrong place is seen."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.logspace(-3, 3, shape[0])[:, None]
    columns = torch.logspace(2, -2, shape[1])[None]
    return torch.randn(shape, generator=generator) * rows * columns


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


# What the format says of each of its 128 codes without sign: four bits of exponent, three behind the point.
MAGNITUDES = np.array(
    [
        (code & 7) / 8 * 2.0**-6 if code < 8 else (1 + (code & 7) / 8) * 2.0 ** ((code >> 3) - 7)
        for code in range(127)
    ]
)


def decode(codes: torch.Tensor) -> np.ndarray:
    """FP8 numbers in fp64, by the definition of the format."""
    codes = bits(codes).numpy()
    return np.where(codes & 128, -1.0, 1.0) * MAGNITUDES[codes & 127]


def encode(values: np.ndarray) -> np.ndarray:
    """The codes of the nearest FP8 numbers; of two that are as near, the even one."""
    size = np.abs(values.astype(np.float64))
    high = np.clip(np.searchsorted(MAGNITUDES, size), 1, len(MAGNITUDES) - 1)
    below, above = size - MAGNITUDES[high - 1], MAGNITUDES[high] - size
    up = (above < below) | ((above == below) & (high % 2 == 0))
    return (np.where(up, high, high - 1) | np.where(np.signbit(values), 128, 0)).astype(np.uint8)


def deepseeks_product(weight: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """The release's `weight_dequant`, block by block in fp32: a tile times its one factor."""
    numbers = decode(weight).astype(np.float32)
    result = np.zeros_like(numbers)
    for i in range(math.ceil(numbers.shape[0] / 128)):
        for j in range(math.ceil(numbers.shape[1] / 128)):
            tile = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            result[tile] = numbers[tile] * np.float32(scale[i, j].item())
    return result


# ---- arithmetic ----


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_and_factors_are_those_of_the_definition(shape):
    weight = matrix(shape)
    numbers, scale = quantize_blocks(weight)
    assert numbers.dtype == FP8 and scale.dtype == torch.float32
    assert scale.shape == block_grid(shape) == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    for i, j in np.ndindex(*scale.shape):
        tile = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
        block = weight[tile].numpy()
        expected = np.abs(block).max() / np.float32(448)
        assert scale[i, j].item() == expected
        assert np.array_equal(bits(numbers[tile]).numpy(), encode(block / expected))
        assert np.abs(decode(numbers[tile])).max() == 448


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_deepseeks(shape, dtype):
    numbers, scale = quantize_blocks(matrix(shape))
    expected = torch.from_numpy(deepseeks_product(numbers, scale)).to(dtype)
    assert torch.equal(bits(dequantize_blocks(numbers, scale, dtype)), bits(expected))


def test_a_part_of_a_matrix_has_the_factors_of_its_place():
    numbers, scale = quantize_blocks(matrix((576, 300)))
    whole = dequantize_blocks(numbers, scale)
    part = dequantize_blocks(numbers[100:400, 130:290], scale[0:4, 1:3], first=(100, 130))
    assert torch.equal(part, whole[100:400, 130:290])


def every_number() -> torch.Tensor:
    """All 254 FP8 numbers that are numbers, in each row of a block."""
    codes = torch.arange(256, dtype=torch.uint8)
    return codes[(codes & 127) != 127].repeat(128, 1).view(FP8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_comes_back_bit_for_bit_with_the_factors_it_had(dtype):
    numbers = every_number()
    for exponent in range(-30, 30):
        scale = torch.tensor([[1.37, 1.99]]) * 10.0**exponent
        again, factors = quantize_blocks(dequantize_blocks(numbers, scale, dtype), scale)
        assert torch.equal(bits(again), bits(numbers)) and torch.equal(factors, scale)


def test_without_factors_numbers_come_back_and_factors_to_within_rounding():
    numbers, scale = quantize_blocks(matrix((576, 200)))
    again, factors = quantize_blocks(dequantize_blocks(numbers, scale, torch.bfloat16))
    assert torch.equal(bits(again), bits(numbers))
    assert not torch.equal(factors, scale)
    torch.testing.assert_close(factors, scale, rtol=2**-8, atol=0)
    # Factors that are powers of two, as later releases have them, lose nothing: the product fits bf16.
    power = torch.exp2(torch.ceil(torch.log2(scale)))
    numbers, _ = quantize_blocks(matrix((576, 200)), power)
    plain = dequantize_blocks(numbers, power, torch.bfloat16)
    assert torch.equal(plain.float(), dequantize_blocks(numbers, power, torch.float32))


def test_zeros_have_the_factor_one_and_what_is_too_large_stays_finite():
    weight = torch.zeros(200, 130)
    weight[150, 0] = -3.0
    numbers, scale = quantize_blocks(weight)
    assert scale.tolist() == [[1.0, 1.0], [np.float32(3) / np.float32(448), 1.0]]
    assert torch.equal(dequantize_blocks(numbers, scale, torch.float32)[150, :1], torch.tensor([-3.0]))
    numbers, _ = quantize_blocks(torch.full((2, 2), 1e6), torch.ones(1, 1))
    assert numbers.float().tolist() == [[448.0, 448.0]] * 2
    tiny, scale = quantize_blocks(torch.full((2, 2), 1e-44))
    assert torch.isfinite(dequantize_blocks(tiny, scale)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    weight = torch.ones(130, 3)
    weight[129, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize_blocks(weight)


def test_factors_of_another_shape_are_refused():
    numbers, scale = quantize_blocks(matrix((576, 200)))
    for wrong in (scale[:4], scale.T, scale[:, :1]):
        with pytest.raises(ValueError, match=r"factors of shape \(5, 2\)"):
            dequantize_blocks(numbers, wrong)
        with pytest.raises(ValueError, match=r"factors of shape \(5, 2\)"):
            quantize_blocks(numbers.float(), wrong)
    with pytest.raises(ValueError, match="blocks are of matrices"):
        quantize_blocks(torch.ones(3))


def test_the_error_is_that_of_its_definition():
    weight = matrix((300, 200)).double()
    numbers, scale = quantize_blocks(weight)
    restored = dequantize_blocks(numbers, scale, torch.float32)
    error = measure_error("w", weight, restored)
    difference = restored.double() - weight
    assert error.largest == difference.abs().max().item()
    assert error.relative_rms == pytest.approx((difference.norm() / weight.norm()).item())
    assert error.sqnr == pytest.approx(-20 * math.log10(error.relative_rms))
    # Three bits behind the point: half a step is 1/16 of a number at most.
    assert 0.01 < error.relative_rms < 1 / 16
    both = summarize_errors([error, measure_error("zero", torch.ones(5), torch.ones(5))])
    assert both.numbers == 300 * 200 + 5 and both.noise == error.noise
    assert both.signal == pytest.approx(error.signal + 5)
    assert measure_error("same", weight, weight).sqnr == math.inf


# ---- DeepSeek's directories ----


def write_deepseek(folder: Path, sizes: dict, **settings) -> transformers.PreTrainedModel:
    """A DeepSeek-V3 in FP8, written by this file's own arithmetic; gives the model with its numbers."""
    config = transformers.DeepseekV3Config(**sizes)
    model = randomize(transformers.DeepseekV3ForCausalLM(config)).bfloat16()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = dict(tensors)
    for name in list(tensors):
        if name.endswith(("_proj.weight", "_with_mqa.weight")):
            weight = tensors[name].float().numpy()
            grid = [math.ceil(size / 128) for size in weight.shape]
            scale = np.zeros(grid, np.float32)
            codes = np.zeros(weight.shape, np.uint8)
            for i, j in np.ndindex(*grid):
                tile = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
                scale[i, j] = np.abs(weight[tile]).max() / 448 * (1 + 0.1 * (i + j))
                codes[tile] = encode(weight[tile] / scale[i, j])
            tensors[name] = torch.from_numpy(codes).view(FP8)
            tensors[name.replace(".weight", ".weight_scale_inv")] = torch.from_numpy(scale)
            plain[name] = torch.from_numpy(
                deepseeks_product(tensors[name], torch.from_numpy(scale))
            ).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(values))
    save_file(plain, folder.with_name("plain.safetensors"))
    return transformers.DeepseekV3ForCausalLM.from_pretrained(
        None, config=config, state_dict=plain, dtype=torch.float32
    )


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """Copies one release of the odd sizes into a directory, with its plain weights; gives the model."""
    made = tmp_path_factory.mktemp("release")
    model = write_deepseek(made / "fp8", ODD)

    def copy(folder: Path) -> transformers.PreTrainedModel:
        shutil.copytree(made, folder, dirs_exist_ok=True)
        return model

    return copy


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    return model.eval().float()(ids, use_cache=False).logits


def test_a_release_in_fp8_comes_in_with_deepseeks_numbers(deepseek, tmp_path):
    model = deepseek(tmp_path)
    done = convert(tmp_path / "fp8", tmp_path / "ours")
    assert done.source == "deepseek_v3"
    ours = load_model(tmp_path / "ours")
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(logits(ours), logits(model), atol=2e-5, rtol=0)
    convert(tmp_path / "ours", tmp_path / "plain", to="deepseek_v3", verify="weights")
    expected, found = (
        load_file(tmp_path / name) for name in ("plain.safetensors", "plain/model.safetensors")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(bits(expected[name]), bits(found[name])) for name in expected)
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_fp8_goes_through_every_layout_bit_for_bit(deepseek, tmp_path):
    """DeepSeek's directory -> native -> DeepSeek's directory: numbers and factors, not their products."""
    deepseek(tmp_path)
    convert(tmp_path / "fp8", tmp_path / "native", to="native", dtype="fp8", verify="weights")
    params = json.loads((tmp_path / "native/params.json").read_text())
    assert params["dtype"] == "fp8"
    stored, native = (
        load_file(tmp_path / "fp8/model.safetensors"),
        load_file(tmp_path / "native/model0-mp1.safetensors"),
    )
    for theirs, ours in (
        ("model.layers.0.self_attn.kv_a_proj_with_mqa", "layers.0.attn.wkv_a"),
        ("model.layers.1.mlp.experts.3.gate_proj", "layers.1.ffn.experts.3.w1"),
        ("model.layers.1.mlp.experts.2.up_proj", "layers.1.ffn.experts.2.w3"),
    ):
        assert native[f"{ours}.weight"].dtype == FP8
        assert torch.equal(bits(native[f"{ours}.weight"]), bits(stored[f"{theirs}.weight"]))
        assert torch.equal(native[f"{ours}.scale"], stored[f"{theirs}.weight_scale_inv"])
    done = convert(tmp_path / "native", tmp_path / "back", to="deepseek_v3", dtype="fp8", verify="weights")
    assert done.source == "native"
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "fp8" / name).read_bytes()
    report = json.loads((tmp_path / "back" / FP8_REPORT).read_text())
    assert report["kept"] == sum(name.endswith("_scale_inv") for name in stored) and not report["tensors"]
    assert f"{report['kept']} tensors keep the source's numbers in FP8" in done.notes


def test_settings_of_the_source_stay_with_its_factors_and_a_head_in_fp8_is_rounded(tmp_path):
    said = {"scale_fmt": "ue8m0", "modules_to_not_convert": ["model.embed_tokens"]}
    write_deepseek(tmp_path / "fp8", ODD, **said)
    file = tmp_path / "fp8/model.safetensors"
    tensors = load_file(file)
    head, scale = quantize_blocks(tensors["lm_head.weight"])
    tensors |= {"lm_head.weight": head, "lm_head.weight_scale_inv": scale}
    save_file(tensors, file, metadata={"format": "pt"})
    done = convert(tmp_path / "fp8", tmp_path / "same", to="deepseek_v3", dtype="fp8", verify="weights")
    found = load_file(tmp_path / "same/model.safetensors")
    assert "lm_head.weight_scale_inv" not in found
    assert torch.equal(found["lm_head.weight"], dequantize_blocks(head, scale, torch.bfloat16))
    kept = sum(name.endswith("_scale_inv") for name in found)
    assert kept == sum(tensor.dtype == FP8 for tensor in found.values())
    assert f"{kept} tensors keep the source's numbers in FP8" in done.notes
    settings = json.loads((tmp_path / "same/config.json").read_text())["quantization_config"]
    assert settings.items() >= said.items() and settings["weight_block_size"] == [128, 128]

    # A matrix that comes into FP8 here has a factor that is no power of two.
    tensors[NAME] = dequantize_blocks(tensors[NAME], tensors.pop(NAME + "_scale_inv"))
    save_file(tensors, file, metadata={"format": "pt"})
    done = convert(tmp_path / "fp8", tmp_path / "other", to="deepseek_v3", dtype="fp8", verify="weights")
    assert f"{kept - 1} tensors keep the source's numbers in FP8" in done.notes
    settings = json.loads((tmp_path / "other/config.json").read_text())["quantization_config"]
    assert not settings.keys() & said.keys()


def test_plain_weights_are_not_called_fp8(deepseek, tmp_path):
    deepseek(tmp_path)
    convert(tmp_path / "fp8", tmp_path / "ours", verify="weights")
    values = json.loads((tmp_path / "fp8/config.json").read_text())
    config = json.loads((tmp_path / "ours/config.json").read_text())
    origin = config.get("converted_from") or {"model_type": "deepseek_v3", "fields": {}}
    origin["fields"]["quantization_config"] = values["quantization_config"]
    (tmp_path / "ours/config.json").write_text(json.dumps(config | {"converted_from": origin}))
    convert(tmp_path / "ours", tmp_path / "plain", to="deepseek_v3", verify="weights")
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert "quantization_config" not in config
    config["quantization_config"] = values["quantization_config"]
    (tmp_path / "plain/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"says that the weights are in FP8, but none has factors"):
        convert(tmp_path / "plain", tmp_path / "out")


def test_fp32_of_fp8_is_the_unrounded_product(deepseek, tmp_path):
    deepseek(tmp_path)
    convert(tmp_path / "fp8", tmp_path / "plain", to="deepseek_v3", dtype="float32", verify="weights")
    stored, plain = (
        load_file(tmp_path / "fp8/model.safetensors"),
        load_file(tmp_path / "plain/model.safetensors"),
    )
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    expected = deepseeks_product(stored[name], stored[name + "_scale_inv"])
    assert torch.equal(plain[name], torch.from_numpy(expected))
    assert not torch.equal(plain[name], plain[name].bfloat16().float())


@pytest.mark.filterwarnings("ignore")
def test_what_is_written_in_fp8_transformers_decodes_alike(tmp_path):
    model = randomize(transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**EVEN)))
    model.save_pretrained(tmp_path / "plain")
    done = convert(tmp_path / "plain", tmp_path / "fp8", to="deepseek_v3", dtype="fp8")
    assert any("SQNR" in note for note in done.notes)
    stored = load_file(tmp_path / "fp8/model.safetensors")
    in_fp8 = {name for name, tensor in stored.items() if tensor.dtype == FP8}
    assert in_fp8 == {n.removesuffix("_scale_inv") for n in stored if n.endswith("_scale_inv")}
    kept = {"embed_tokens", "lm_head", "norm", "layernorm", "gate"}
    assert all(name.split(".")[-2] not in kept for name in in_fp8)
    assert all(name in in_fp8 for name in stored if name.endswith("_proj.weight"))
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    # No GPU here: transformers takes FP8 apart as it loads, by its own code.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    assert theirs.dtype == torch.bfloat16
    convert(tmp_path / "fp8", tmp_path / "ours")
    ours = load_model(tmp_path / "ours")
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    # In FP8 it is a neighbour of the model that it was; a few tokens go to other experts.
    assert torch.nn.functional.cosine_similarity(logits(ours), logits(model), dim=-1).median() > 0.98


# ---- native ----


@pytest.fixture(scope="module")
def native_in_fp8(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    tiny_model("bytegpt-tiny").save_pretrained(folder / "ours")
    convert(folder / "ours", folder / "native", to="native", dtype="fp8")
    return folder / "native"


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("bytegpt-tiny", {}),
        ("latent-sliding-lowrank-sigmoid", {"moe_intermediate_size": 256}),
        ("llama-tiny", {"intermediate_size": 512, "num_attention_heads": 8, "head_dim": 64}),
        ("gpt2-tiny", {"intermediate_size": 256}),
    ],
)
def test_native_fp8_is_read_back_and_cut_for_ranks_and_back(name, sizes, tmp_path):
    """Shares of whole blocks, of parts of one block, and matrices that have one block to a side."""
    model = tiny_model(name, **sizes)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "one", to="native", dtype="fp8", verify="weights")
    convert(tmp_path / "ours", tmp_path / "both", mp=2, dtype="fp8", verify="weights")
    shard(tmp_path / "one", tmp_path / "two", 2)
    for rank in range(2):
        file = f"model{rank}-mp2.safetensors"
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "both" / file).read_bytes()
    shard(tmp_path / "two", tmp_path / "again", 1)
    file = "model0-mp1.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    convert(tmp_path / "two", tmp_path / "back", verify="weights")
    back = load_model(tmp_path / "back")
    for key, tensor in model.state_dict().items():
        found = back.state_dict()[key]
        rms = float((found.float() - tensor).norm() / tensor.norm())
        matrix = tensor.dim() > 1 and not any(part in key for part in ("embed", "lm_head", "gate.weight"))
        # Rounded to bf16, or to FP8 besides.
        assert (0.01 < rms < 0.04) if matrix else rms < 2**-8, (key, rms)


def test_blocks_that_two_ranks_would_tear_apart_are_refused_by_name(tmp_path):
    tiny_model("llama-tiny", intermediate_size=384).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "one", to="native", dtype="fp8", verify="weights")
    sentence = r"layers\.0\.ffn\.w[123]\.weight cannot be shared by 2 ranks in FP8: 192 rows or columns"
    with pytest.raises(ValueError, match=sentence):
        shard(tmp_path / "one", tmp_path / "two", 2)
    with pytest.raises(ValueError, match=sentence):
        convert(tmp_path / "ours", tmp_path / "two", mp=2, dtype="fp8", verify="weights")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "ours"]


# ---- bad input ----


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quant_method": "gptq"}, "is quantized with 'gptq'"),
        ({"weight_block_size": [64, 128]}, r"weight_block_size is \[64, 128\]"),
        ({"weight_block_size": None}, "weight_block_size is None"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
    ],
)
def test_another_quantization_is_refused_by_name(settings, sentence, tmp_path):
    write_deepseek(tmp_path / "fp8", ODD, **settings)
    with pytest.raises(ValueError, match=sentence):
        convert(tmp_path / "fp8", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


NAME = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


def _lose(tensors):
    del tensors[NAME + "_scale_inv"]


def _cut(tensors):
    tensors[NAME + "_scale_inv"] = tensors[NAME + "_scale_inv"][:1].clone()


def _spoil(tensors):
    tensors[NAME + "_scale_inv"][0, 0] = float("nan")


def _round(tensors):
    tensors[NAME + "_scale_inv"] = tensors[NAME + "_scale_inv"].bfloat16()


def _widen(tensors):
    tensors[NAME] = tensors[NAME].float()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_lose, "is torch.float8_e4m3fn without factors"),
        (_cut, r"needs factors of shape \(2, 2\) in torch.float32, not \(1, 2\)"),
        (_round, r"needs factors of shape \(2, 2\) in torch.float32, not \(2, 2\) in torch.bfloat16"),
        (_spoil, "a factor of .* is negative or not finite"),
        (_widen, "has factors beside it, but is torch.float32"),
    ],
)
def test_damaged_fp8_is_refused_with_the_tensor(damage, sentence, deepseek, tmp_path):
    deepseek(tmp_path)
    tensors = load_file(tmp_path / "fp8/model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "fp8/model.safetensors")
    with pytest.raises(ValueError, match=sentence) as caught:
        convert(tmp_path / "fp8", tmp_path / "ours")
    assert NAME in str(caught.value)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("layers.1.ffn.experts.3.w1.scale", lambda t: torch.cat([t, t]), r"needs factors of shape \(1, 1\)"),
        (
            "layers.1.ffn.experts.3.w1.weight",
            lambda t: t.to(torch.float8_e5m2),
            "is torch.float8_e5m2 and not",
        ),
        ("layers.0.attn.wq.scale", lambda t: t.double(), "in torch.float32, not .* in torch.float64"),
        ("layers.0.attn_norm.weight", lambda t: t[:0].clone(), "attn_norm.weight"),
        ("layers.0.ffn.w2.weight", lambda t: t.float(), "is torch.float32 and not torch.float8_e4m3fn"),
    ],
)
def test_damaged_native_fp8_is_refused_however_it_is_read(name, change, sentence, native_in_fp8, tmp_path):
    shutil.copytree(native_in_fp8, tmp_path / "native")
    tensors = load_file(tmp_path / "native/model0-mp1.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, tmp_path / "native/model0-mp1.safetensors", metadata={"format": "pt"})
    for read in (
        lambda: shard(tmp_path / "native", tmp_path / "out", 2),
        lambda: load_sharded(tmp_path / "native"),
        lambda: convert(tmp_path / "native", tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=sentence) as caught:
            read()
        assert name.removesuffix(".scale") in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda factors: -factors, "a factor of {} is negative or not finite"),
        (lambda factors: torch.full_like(factors, 3e38), "{} holds NaN or infinite numbers"),
    ],
)
def test_factors_of_no_numbers_are_not_cut(change, sentence, native_in_fp8, tmp_path):
    shutil.copytree(native_in_fp8, tmp_path / "native")
    (tmp_path / "native/conversion_report.json").unlink()
    tensors = load_file(tmp_path / "native/model0-mp1.safetensors")
    tensors["layers.0.attn.wo.scale"] = change(tensors["layers.0.attn.wo.scale"])
    save_file(tensors, tmp_path / "native/model0-mp1.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=sentence.format("layers.0.attn.wo.weight")):
        shard(tmp_path / "native", tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_fp8_is_refused_where_it_cannot_be(tmp_path):
    tiny_model("llama-tiny").save_pretrained(tmp_path / "ours")
    for to in ("llama", "tessera"):
        with pytest.raises(ValueError, match=f"{to} has no FP8 in blocks|is a Tessera model already"):
            convert(tmp_path / "ours", tmp_path / "out", to=to, dtype="fp8")
    assert not (tmp_path / "out").exists()


def test_factors_are_not_read_before_they_are_asked_for(deepseek, tmp_path):
    deepseek(tmp_path)
    checkpoint = open_checkpoint(tmp_path / "fp8")
    assert set(checkpoint.fp8.scales) < set(checkpoint.tensors)
    assert checkpoint.fp8.scales["model.layers.1.mlp.experts.gate_up_proj"].shape == (4, 4, 2)
