"""Multi-token prediction: its loss against transformers' own layers; drafting equal to greedy decoding."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers.models import DIALECTS, EVERY_MODEL, tiny_config
from helpers.weights import randomize
from safetensors.torch import load_file
from transformers.modeling_layers import MtpModel

from tessera import TesseraConfig, TesseraForCausalLM
from tessera.modeling.modeling_tessera import TesseraForSequenceClassification, TesseraModel

MOE = "latent-sliding-lowrank-sigmoid"
GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}


def with_layers(name: str, layers: int = 2, **overrides) -> TesseraForCausalLM:
    """A model with random weights that holds layers for multi-token prediction."""
    fields = {"num_mtp_layers": layers, "train_mtp": True, "router_aux_loss_coef": 0.0, **overrides}
    return randomize(TesseraForCausalLM(tiny_config(name, **fields)), seed=layers)


def saved(model: TesseraForCausalLM, folder) -> str:
    model.save_pretrained(folder)
    return str(folder)


def count_forwards(model: TesseraForCausalLM) -> list:
    forwards = []
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    return forwards


def loss_alone(model: TesseraForCausalLM, library: MtpModel, ids: torch.Tensor, labels: torch.Tensor):
    """Summed multi-token losses of one document [n], by the library's layers and masks written out."""
    hidden, summed = model.model(ids[None], use_cache=False).last_hidden_state, 0.0
    for depth in range(min(model.config.num_mtp_layers, len(ids) - 2)):
        hidden = hidden[:, :-1]
        positions = torch.arange(depth + 1, len(ids))
        embeds = model.model.embed_tokens(ids[None, depth + 1 :])
        behind = positions[:, None] - positions[None, :]
        mask = behind >= 0
        if library.config.layer_types[depth] == "sliding_attention":
            mask &= behind < model.config.sliding_window
        rotary = model.model.rotary_emb
        hidden = library.layers[depth](
            embeds,
            hidden,
            position_embeddings=None if rotary is None else rotary(embeds, positions[None]),
            attention_mask=mask[None, None],
            position_ids=positions[None],
            past_key_values=None,
        )
        logits = model.lm_head(hidden[0, :-1])[:, : model.config.vocab_size].float()
        if cap := model.config.final_logit_softcapping:
            logits = cap * torch.tanh(logits / cap)
        summed = summed + F.cross_entropy(logits, labels[depth + 2 :], reduction="sum")
    return summed


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_loss_is_that_of_each_document_alone_by_transformers_layers(name, tmp_path):
    model = with_layers(name)
    reloaded = TesseraForCausalLM.from_pretrained(saved(model, tmp_path))
    library = MtpModel.from_pretrained(reloaded)
    generator = torch.Generator().manual_seed(1)
    lengths = [[11, 2, 9], [17]]  # the second row ends in padding
    ids = torch.randint(model.config.vocab_size, (2, 22), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    labels[1, 17:] = -100
    positions = torch.zeros_like(ids)
    summed, weights = 0.0, 0
    for row, documents in enumerate(lengths):
        start = 0
        for n in documents:
            part = slice(start, start + n)
            positions[row, part] = torch.arange(n)
            labels[row, start] = -100
            with torch.no_grad():
                summed = summed + loss_alone(model, library, ids[row, part], labels[row, part])
            start += n
    mask = (torch.arange(22) < torch.tensor([[22], [17]])).long()
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
    main = model(**batch, use_cache=False).loss
    weights = (labels[:, 1:] != -100).sum()
    model.train()
    with torch.no_grad():
        extra = model(**batch, use_cache=False).loss - main
        divided = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(100)).loss
    assert extra > 0.01
    torch.testing.assert_close(extra, 0.3 / 2 * summed / weights, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(divided, (main + extra) * weights / 100)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_drafts_that_are_mostly_wrong_leave_greedy_decoding_as_it_is(name, tmp_path):
    model = with_layers(name, layers=3)
    reloaded = TesseraForCausalLM.from_pretrained(saved(model, tmp_path))
    prompt = torch.randint(model.config.vocab_size, (1, 19), generator=torch.Generator().manual_seed(0))
    expected = model.generate(prompt, **GREEDY)
    assert model.generate(prompt, use_mtp=True, **GREEDY).tolist() == expected.tolist()
    assert reloaded.generate(prompt, use_mtp=True, **GREEDY).tolist() == expected.tolist()


@pytest.mark.parametrize("name", [*DIALECTS, MOE])
def test_drafts_of_a_trained_model_save_most_forward_passes(name, tmp_path):
    torch.manual_seed(0)
    model = TesseraForCausalLM(tiny_config(name, num_mtp_layers=2, train_mtp=True)).train()
    ids = torch.tensor([[5, 9, 17, 3, 44, 21, 8] * 4])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    expected = model.generate(ids[:, :9], **GREEDY)
    reloaded = TesseraForCausalLM.from_pretrained(saved(model, tmp_path))
    for drafting in (model, reloaded):
        forwards = count_forwards(drafting)
        assert drafting.generate(ids[:, :9], use_mtp=True, **GREEDY).tolist() == expected.tolist()
        assert len(forwards) <= 12  # 20 without drafts, 7 and the prompt when all are right
    assert drafting is reloaded and len(reloaded.mtp_layers) == 0


def test_sampled_drafts_leave_the_distribution_as_it_is():
    # A model of one decided next token: what is sampled must be that token, whatever was drafted.
    model = with_layers("llama-tiny")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    expected = model.generate(prompt, **GREEDY)
    sampled = model.generate(prompt, use_mtp=True, **{**GREEDY, "do_sample": True})
    assert sampled.tolist() == expected.tolist()


def test_micro_batches_add_up_to_the_whole():
    model = with_layers("llama-tiny").train()
    ids = torch.randint(model.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 4:] = -100
    count = (labels[:, 1:] != -100).sum()

    def gradient(*parts):
        model.zero_grad()
        losses = [
            model(ids[part], labels=labels[part], num_items_in_batch=count, use_cache=False).loss
            for part in parts
        ]
        torch.stack(losses).sum().backward()
        return model.mtp_layers[1].eh_proj.weight.grad

    whole = gradient(slice(0, 3))
    assert whole.abs().max() > 0
    torch.testing.assert_close(gradient(slice(0, 1), slice(1, 3)), whole)


def test_targets_given_beside_the_inputs_are_those_of_labels_one_token_on():
    model = with_layers("llama-tiny").train()
    ids = torch.randint(model.config.vocab_size, (2, 13), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1], ids[:, 1:].contiguous()
    given = model(inputs, labels=inputs, shift_labels=targets, use_cache=False).loss
    # The same row with its last token as an input that predicts nothing, and so one position more.
    count = torch.tensor(targets.numel())
    whole = model(ids, labels=ids, num_items_in_batch=count, use_cache=False).loss
    # Depth k has no input for the k + 1 last targets that are given alone, and one more in the whole row.
    assert given.item() == pytest.approx(whole.item(), rel=0.05)
    model.eval()
    assert model(inputs, labels=inputs, shift_labels=targets, use_cache=False).loss < given


@pytest.mark.parametrize("length", [1, 2, 3])
def test_rows_too_short_to_predict_ahead_have_no_further_loss(length):
    model = with_layers("llama-tiny", layers=4)
    ids = torch.arange(length)[None]
    count = torch.tensor(7)
    plain = model(ids, labels=ids, num_items_in_batch=count, use_cache=False).loss
    model.train()
    ahead = model(ids, labels=ids, num_items_in_batch=count, use_cache=False).loss
    assert (ahead > plain) == (length > 2)


def test_checkpointed_and_compiled_steps_have_the_same_gradients_and_counts():
    depth = {"num_hidden_layers": 2, "layer_types": "SL", "mlp_layer_types": "DS"}
    model = with_layers(MOE, layers=1, router_aux_loss_coef=0.01, **depth).train()
    model.set_experts_implementation("batched_mm")  # older versions cannot compile the other in fp32
    routers = [layer.mlp.gate for layer in model.model.layers if layer.is_sparse]
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))

    def step(run):
        model.zero_grad()
        for router in routers:
            router.tally.zero_()
        run(ids, labels=ids, use_cache=False).loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        return gradients, torch.stack([router.tally.clone() for router in routers])

    expected, counted = step(model)
    assert counted[:, :-2].sum(1).tolist() == [64, 64]  # 32 tokens, 2 experts each, in both sparse layers
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        gradients, again = step(model)
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(again, counted)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.compiler.reset()
    gradients, again = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(again, counted)


def test_on_disk_the_layers_have_deepseeks_names_and_nobody_is_asked_to_train_them(tmp_path):
    model = with_layers(MOE, layers=1)
    saved(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_mtp_layers"] == 1 and config["train_mtp"] is False
    assert model.config.train_mtp
    names = {name.partition("model.layers.4.")[2] for name in load_file(tmp_path / "model.safetensors")}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} < names
    assert {"self_attn.kv_b_proj.weight", "mlp.gate.e_score_correction_bias"} < names


@pytest.mark.parametrize("kind", [TesseraForCausalLM, TesseraModel, TesseraForSequenceClassification])
def test_models_without_the_layers_load_and_save_without_a_word_of_them(kind, tmp_path):
    whole = saved(with_layers("llama-tiny"), tmp_path / "whole")
    model, info = kind.from_pretrained(whole, output_loading_info=True)
    assert set(info["unexpected_keys"]) <= {"lm_head.weight"} and not info["mismatched_keys"]
    assert set(info["missing_keys"]) <= {"score.weight"}
    saved(model, tmp_path / "without")
    config = TesseraConfig.from_pretrained(tmp_path / "without")
    assert config.num_mtp_layers == 0 and not config.train_mtp
    assert not [name for name in load_file(tmp_path / "without" / "model.safetensors") if ".4." in name]
    # The model itself still knows where its layers are.
    assert model.config.num_mtp_layers == 2


def test_training_goes_on_with_the_saved_layers(tmp_path):
    model = with_layers("nanochat-tiny")
    again = TesseraForCausalLM.from_pretrained(saved(model, tmp_path), train_mtp=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_layers_can_be_added_to_a_model_that_has_none(tmp_path):
    plain = saved(randomize(TesseraForCausalLM(tiny_config("gpt2-tiny"))), tmp_path)
    model, info = TesseraForCausalLM.from_pretrained(
        plain, num_mtp_layers=1, train_mtp=True, output_loading_info=True
    )
    new = len(model.config.layer_types)
    assert info["missing_keys"] and all(f"layers.{new}." in name for name in info["missing_keys"])
    layer = model.mtp_layers[0]
    assert layer.enorm.weight.eq(1).all() and layer.eh_proj.weight.detach().std() == pytest.approx(
        0.02, rel=0.1
    )
    model.train()(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    assert layer.eh_proj.weight.grad.abs().max() > 0


def test_drafting_without_layers_is_refused():
    model = TesseraForCausalLM(tiny_config("llama-tiny"))
    with pytest.raises(ValueError, match="num_mtp_layers is 0"):
        model.generate(torch.tensor([[1, 2]]), use_mtp=True, max_new_tokens=2)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"train_mtp": True}, "needs num_mtp_layers"),
        ({"num_mtp_layers": 2, "mtp_layer_types": ["full_attention"]}, "must list num_mtp_layers=2"),
        ({"num_mtp_layers": 1, "mtp_layer_types": "S"}, "which no layer of layer_types is"),
        ({"num_mtp_layers": 1, "mtp_mlp_layer_types": "S"}, "which no layer of mlp_layer_types is"),
        ({"num_mtp_layers": -1}, "at least 0"),
        ({"mtp_loss_coef": -0.5}, "at least 0"),
        ({"router_bias_update_speed": 0.001}, "router_correction_bias=True"),
    ],
)
def test_what_cannot_work_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_config("llama-tiny", **fields)


def test_deepseeks_name_for_the_number_of_layers_is_understood():
    config = tiny_config(MOE, num_nextn_predict_layers=2, mtp_layer_types="SL", mtp_mlp_layer_types="D")
    assert config.num_mtp_layers == 2
    assert config.get_mtp_config().layer_types == ["sliding_attention", "full_attention"]
    model = TesseraForCausalLM(TesseraConfig.from_dict({**config.to_dict(), "train_mtp": True}))
    assert [layer.is_sparse for layer in model.mtp_layers] == [False, False]
    assert [layer.self_attn.sliding_window for layer in model.mtp_layers] == [7, None]
