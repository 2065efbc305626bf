"""The native layout: names, what each rank holds, and any number of ranks to any other."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_config, tiny_model
from helpers.native import SHARED_BY_FOUR, native
from safetensors.torch import load_file, save_file

from tessera.conversion.convert import convert
from tessera.conversion.families import architecture
from tessera.conversion.model_args import config_from_model_args, model_args_from_config
from tessera.conversion.native import check_world
from tessera.conversion.rank_files import split_dimension
from tessera.modeling.loading import load_model


def save(name: str, folder: Path):
    preset, overrides = SHARED_BY_FOUR[name]
    model = tiny_model(preset, **overrides)
    model.save_pretrained(folder)
    return model


def weight_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def ranks(folder: Path, world: int) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"model{rank}-mp{world}.safetensors") for rank in range(world)]


@pytest.mark.parametrize("name", SHARED_BY_FOUR)
def test_any_number_of_ranks_to_any_other_and_back_gives_the_same_bytes(name, tmp_path):
    experts = save(name, tmp_path / "ours").config.n_routed_experts
    convert(tmp_path / "ours", tmp_path / "4", n_experts=experts, mp=4)
    convert(tmp_path / "4", tmp_path / "2", to="native", mp=2, verify="weights")
    convert(tmp_path / "2", tmp_path / "1", to="native", mp=1, verify="weights")
    for world in (4, 2, 1):
        # What is written does not depend on how many ranks it comes from.
        direct = native(name, tmp_path / f"direct-{world}", world)
        assert weight_files(tmp_path / str(world)) == weight_files(direct)
        assert len(weight_files(direct)) == world
    convert(tmp_path / "1", tmp_path / "back", verify="weights")
    assert weight_files(tmp_path / "back") == weight_files(tmp_path / "ours")


def test_each_rank_computes_its_share_of_the_whole(tmp_path):
    """What the dimensions of the split are for: shares are concatenated (columns) or summed (rows)."""
    model = save("dense", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "native", mp=2, verify="weights")
    parts = ranks(tmp_path / "native", 2)
    x = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    layer = model.model.layers[1]

    def share(part, name):
        return part[f"layers.1.{name}.weight"]

    hidden = [torch.nn.functional.silu(x @ share(p, "ffn.w1").T) * (x @ share(p, "ffn.w3").T) for p in parts]
    summed = sum(h @ share(p, "ffn.w2").T for h, p in zip(hidden, parts, strict=True))
    torch.testing.assert_close(summed, layer.mlp(x))

    # A whole number of heads on each rank, in order: its part of the values meets its columns of `wo`.
    values = layer.self_attn.v_proj(x)
    torch.testing.assert_close(torch.cat([x @ share(p, "attn.wv").T for p in parts], dim=1), values)
    summed = sum((x @ share(p, "attn.wv").T) @ share(p, "attn.wo").T for p in parts)
    torch.testing.assert_close(summed, layer.self_attn.o_proj(values))

    logits = torch.cat([x @ p["head.weight"].T for p in parts], dim=1)
    torch.testing.assert_close(logits, model.lm_head(x))
    # The embedding by rows of the vocabulary: a rank without the token gives zero, and the sum is the row.
    half = model.config.vocab_size // 2
    ids = torch.tensor([3, half - 1, half, 255])
    looked_up = sum(
        torch.where(
            ((ids >= rank * half) & (ids < (rank + 1) * half))[:, None],
            p["embed.weight"][(ids - rank * half).clamp(0, half - 1)],
            0.0,
        )
        for rank, p in enumerate(parts)
    )
    torch.testing.assert_close(looked_up, model.model.embed_tokens(ids))


def test_latent_attention_gives_each_rank_whole_heads(tmp_path):
    model = save("latent-lowrank-sigmoid", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "native", mp=2, verify="weights")
    parts, attention = ranks(tmp_path / "native", 2), model.model.layers[0].self_attn
    latent = torch.randn(3, model.config.kv_lora_rank, generator=torch.Generator().manual_seed(0))
    heads = attention.kv_b_proj(latent).unflatten(-1, (model.config.num_attention_heads, -1))
    for rank, part in enumerate(parts):
        ours = (latent @ part["layers.0.attn.wkv_b.weight"].T).unflatten(-1, (-1, heads.shape[-1]))
        torch.testing.assert_close(ours, heads.chunk(2, dim=1)[rank])
        # Before the heads, every rank has all of it.
        assert torch.equal(part["layers.0.attn.wkv_a.weight"], attention.kv_a_proj_with_mqa.weight)
        assert torch.equal(part["layers.0.attn.wq_a.weight"], attention.q_a_proj.weight)


def test_experts_go_whole_in_contiguous_ranges(tmp_path):
    model = save("latent-moe", tmp_path / "ours")
    count = model.config.n_routed_experts
    convert(tmp_path / "ours", tmp_path / "native", n_experts=count, mp=2, verify="weights")
    layer = model.config.mlp_layer_types.index("sparse")
    moe, width = model.model.layers[layer].mlp, model.config.moe_intermediate_size
    found = []
    for part in ranks(tmp_path / "native", 2):
        pattern = re.compile(rf"layers\.{layer}\.ffn\.experts\.(\d+)\.w1\.weight")
        held = sorted(int(match[1]) for name in part if (match := pattern.fullmatch(name)))
        found.append(held)
        for e in held:
            prefix = f"layers.{layer}.ffn.experts.{e}"
            gate_up = moe.experts.gate_up_proj[e]
            assert torch.equal(part[f"{prefix}.w1.weight"], gate_up[:width])
            assert torch.equal(part[f"{prefix}.w3.weight"], gate_up[width:])
            assert torch.equal(part[f"{prefix}.w2.weight"], moe.experts.down_proj[e])
        assert torch.equal(part[f"layers.{layer}.ffn.gate.weight"], moe.gate.weight)
        shared = part[f"layers.{layer}.ffn.shared_experts.w2.weight"]
        assert shared.shape[1] * 2 == moe.shared_experts.down_proj.weight.shape[1]
    assert found == [list(range(count // 2)), list(range(count // 2, count))]


def test_the_names_are_those_of_the_release(tmp_path):
    """As in DeepSeek-V3's inference code, for a model with everything that it has."""
    save("latent-lowrank-sigmoid", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "native", mp=1, verify="weights")
    names = {
        re.sub(r"\.\d+\.", ".N.", re.sub(r"\.\d+\.", ".N.", n)) for n in ranks(tmp_path / "native", 1)[0]
    }
    attention = {f"attn.{n}" for n in ("wq_a", "q_norm", "wq_b", "wkv_a", "kv_norm", "wkv_b", "wo")}
    feed_forward = {
        f"ffn.{where}{w}" for where in ("", "experts.N.", "shared_experts.") for w in ("w1", "w2", "w3")
    }
    layer = attention | feed_forward | {"attn_norm", "ffn_norm", "ffn.gate"}
    expected = {f"layers.N.{name}.weight" for name in layer} | {"layers.N.ffn.gate.bias"}
    assert names == expected | {"embed.weight", "norm.weight", "head.weight"}


def test_params_json_alone_means_the_same_model(tmp_path):
    model = save("latent-moe", tmp_path / "ours")
    leading = model.config.mlp_layer_types
    if leading != sorted(leading):  # ModelArgs has the dense layers first
        model = tiny_model("bytegpt-tiny", mlp_layer_types=sorted(leading))
        model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "native", mp=2, verify="weights")
    (tmp_path / "native/config.json").unlink()
    convert(tmp_path / "native", tmp_path / "back")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "back")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("rope", [{}, {"factor": 40.0}])
def test_model_args_there_and_back(rope):
    parameters = {"rope_type": "default", "rope_theta": 5e4}
    if rope:
        parameters = {"rope_type": "yarn", "rope_theta": 5e4, **rope, "original_max_position_embeddings": 64}
        parameters |= {"beta_fast": 16, "beta_slow": 2, "mscale": 0.5, "mscale_all_dim": 0.5}
    config = tiny_config("bytegpt-tiny", mlp_layer_types="DSSS", rope_parameters=parameters, q_lora_rank=8)
    args = json.loads(json.dumps(model_args_from_config(config)))
    assert architecture(config_from_model_args(args)) == architecture(config)


def test_incomplete_or_contradicting_ranks_are_refused(tmp_path):
    save("dense", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "native", mp=2, verify="weights")
    file = tmp_path / "native/model1-mp2.safetensors"
    state = load_file(file)
    save_file({**state, "norm.weight": state["norm.weight"] + 1}, file)
    with pytest.raises(ValueError, match="norm.weight differs between ranks"):
        convert(tmp_path / "native", tmp_path / "back")
    save_file({name: t for name, t in state.items() if name != "embed.weight"}, file)
    with pytest.raises(ValueError, match="only 1 of 2 ranks hold embed.weight"):
        convert(tmp_path / "native", tmp_path / "back")
    (tmp_path / "native/model0-mp1.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="files of 1 and of 2 ranks"):
        convert(tmp_path / "native", tmp_path / "back")
    (tmp_path / "native/model0-mp1.safetensors").unlink()
    file.unlink()
    with pytest.raises(ValueError, match=r"lacks the files of ranks \[1\] of 2"):
        convert(tmp_path / "native", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("name", "overrides", "world", "sentence"),
    [
        ("bytegpt-tiny", {}, 3, r"n_routed_experts \(4\)"),
        ("bytegpt-tiny", {"moe_intermediate_size": 8, "num_attention_heads": 16}, 16, "n_routed_experts"),
        ("llama-tiny", {"intermediate_size": 97, "num_key_value_heads": 4}, 4, r"intermediate_size \(97\)"),
        ("gpt2-tiny", {"vocab_size": 255}, 4, r"padded_vocab_size \(255\)"),
    ],
)
def test_ranks_that_do_not_divide_are_refused_by_name(name, overrides, world, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_world(tiny_config(name, **overrides), world)


@pytest.mark.parametrize(
    ("name", "dimension"),
    [("layers.3.attn.wq.bias", 0), ("layers.3.attn.wo.bias", None), ("layers.0.attn.q_norm.weight", None)],
)
def test_biases_are_split_with_the_rows_that_they_belong_to(name, dimension):
    assert split_dimension(name) == dimension
