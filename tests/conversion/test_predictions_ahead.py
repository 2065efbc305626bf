"""Layers for multi-token prediction come from DeepSeek-V3 and go there, with all that its releases have."""

import pytest
import torch
import transformers
from helpers.families import change_config, change_state, ids, loaded_config, save_family, weight_files
from helpers.weights import randomize
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

from tessera import TesseraForCausalLM
from tessera.conversion.convert import convert
from tessera.modeling.loading import load_model
from tessera.modeling.multi_token import hidden_ahead


def add_predictor(folder, layer: int = 3) -> None:
    """Layers that predict further ahead are the last layer again, and what joins it to the model."""

    def add(state):
        last = f"model.layers.{layer - 1}."
        again = {k.replace(last, f"model.layers.{layer}."): v + 0.01 for k, v in state.items() if last in k}
        names = ("enorm", "hnorm", "shared_head.norm")
        norms = {f"model.layers.{layer}.{name}.weight": torch.full((64,), 0.9) for name in names}
        joined = torch.randn(64, 128, generator=torch.Generator().manual_seed(2)) * 0.1
        state |= {**again, **norms, f"model.layers.{layer}.eh_proj.weight": joined}

    change_state(folder, add)


def add_copies(folder, of_head: float = 0.0, layer: int = 3) -> None:
    """The copies of embedding and head that DeepSeek's releases have in these layers."""

    def add(state):
        state[f"model.layers.{layer}.embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
        head = state.get("lm_head.weight", state["model.embed_tokens.weight"])
        state[f"model.layers.{layer}.shared_head.head.weight"] = head + of_head

    change_state(folder, add)


@pytest.mark.parametrize("sample", ["deepseek_v3", "deepseek_v3-tied"])
@pytest.mark.parametrize("copies", [True, False])
def test_layers_for_multi_token_prediction_go_round(sample, copies, tmp_path):
    save_family(sample, tmp_path / "theirs")
    add_predictor(tmp_path / "theirs")
    if copies:
        add_copies(tmp_path / "theirs")
    assert not convert(tmp_path / "theirs", tmp_path / "ours").notes
    assert load_model(tmp_path / "ours").config.num_mtp_layers == 1
    assert not convert(tmp_path / "ours", tmp_path / "back", to="deepseek_v3").notes
    assert weight_files(tmp_path / "back") == weight_files(tmp_path / "theirs")
    assert loaded_config(tmp_path / "back") == loaded_config(tmp_path / "theirs")


def test_a_copy_that_is_none_is_refused(tmp_path):
    save_family("deepseek_v3", tmp_path / "theirs")
    add_predictor(tmp_path / "theirs")
    add_copies(tmp_path / "theirs", of_head=0.1)
    sentence = "model.layers.3.shared_head.head.weight differs from lm_head.weight"
    with pytest.raises(ValueError, match=sentence):
        convert(tmp_path / "theirs", tmp_path / "ours")


def test_layers_for_multi_token_prediction_are_left_out_and_said(tmp_path):
    save_family("deepseek_v3-yarn", tmp_path / "theirs")
    change_state(
        tmp_path / "theirs", lambda s: s.update({"model.layers.3.eh_proj.weight": torch.zeros(64, 128)})
    )
    assert convert(tmp_path / "theirs", tmp_path / "ours").notes == [
        "1 tensors of multi-token prediction are left out"
    ]


def test_a_layer_too_many_is_not_taken_for_multi_token_prediction(tmp_path):
    save_family("deepseek_v3", tmp_path / "theirs")
    change_config(tmp_path / "theirs", num_hidden_layers=2)
    with pytest.raises(ValueError, match="unexpected tensors"):
        convert(tmp_path / "theirs", tmp_path / "ours")


def test_layers_for_multi_token_prediction_come_from_deepseek_and_go_there(tmp_path):
    save_family("deepseek_v3", tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "plain")
    ours = TesseraForCausalLM.from_pretrained(tmp_path / "plain", num_mtp_layers=1, train_mtp=True)
    randomize(ours).save_pretrained(tmp_path / "ours")
    done = convert(tmp_path / "ours", tmp_path / "deepseek", to="deepseek_v3")
    assert not done.notes
    # transformers' own classes predict as ours do.
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "deepseek")
    theirs._keys_to_ignore_on_load_unexpected = {r"model\.layers\.3\."}  # it knows those of 61 layers
    library = MtpModel.from_pretrained(theirs)
    with torch.no_grad():
        outputs = ours.model(ids(), keep_mtp_inputs=True, use_cache=False)
        (found,), _ = hidden_ahead(
            ours.mtp_layers, hidden_states=outputs.last_hidden_state, **outputs.mtp_inputs
        )
        positions = torch.arange(1, 40)[None]
        embeds = theirs.model.embed_tokens(ids()[:, 1:])
        expected = library.layers[0](
            embeds,
            theirs.model(ids(), use_cache=False).last_hidden_state[:, :-1],
            position_embeddings=theirs.model.rotary_emb(embeds, positions),
            attention_mask=torch.ones(39, 39).tril().bool()[None, None],
            position_ids=positions,
            past_key_values=None,
        )
    torch.testing.assert_close(found[:, :-1], expected, atol=1e-4, rtol=1e-4)

    # As in the releases, which repeat embedding and head.
    state = load_file(tmp_path / "deepseek/model.safetensors")
    assert torch.equal(state["model.layers.3.embed_tokens.weight"], state["model.embed_tokens.weight"])
    assert torch.equal(state["model.layers.3.shared_head.head.weight"], state["lm_head.weight"])
    assert not convert(tmp_path / "deepseek", tmp_path / "back").notes
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("ours", "back"))
    assert before.keys() == after.keys() and any("layers.3.eh_proj" in name for name in after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_model(tmp_path / "back").config.num_mtp_layers == 1

    assert convert(tmp_path / "ours", tmp_path / "native", mp=1).notes == [
        "native has no place for multi-token prediction: its layers are left out"
    ]
    # Many a release claims layers that it leaves out.
    claims = {name: tensor for name, tensor in state.items() if "layers.3." not in name}
    save_file(claims, tmp_path / "deepseek/model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "deepseek", tmp_path / "without")
    assert load_model(tmp_path / "without").config.num_mtp_layers == 0
