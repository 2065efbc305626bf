"""Stock trainers of TRL lose no term of the model's own loss."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers.models import tiny_config
from helpers.weights import randomize
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from tessera import TesseraForCausalLM
from tessera.training.own_loss import OwnLoss

LENGTHS = [14, 6, 9, 20]  # two micro-batches of two rows, unevenly filled
MODELS = {
    "sigmoid experts with groups": (
        "latent-sliding-lowrank-sigmoid",
        {"router_aux_loss_coef": 0.5, "num_mtp_layers": 2, "train_mtp": True},
    ),
    "soft-cap, padded vocabulary": (
        "nanochat-moe-smear-gqa",
        {"num_mtp_layers": 1, "train_mtp": True},
    ),
}


def make_model(name: str) -> TesseraForCausalLM:
    preset, fields = MODELS[name]
    return randomize(TesseraForCausalLM(tiny_config(preset, **fields)), scale=2.0).train()


def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return made


class OwnSFTTrainer(OwnLoss, SFTTrainer):
    """As `own_loss.py` says to write it."""


def stock_trainer(model, tokenizer, folder, kind=SFTTrainer, adapters=None, **given) -> SFTTrainer:
    arguments = {
        "per_device_train_batch_size": 2,
        "learning_rate": 0.0,
        "max_steps": 1,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "shuffle_dataset": False,
        **given,
    }
    dataset = Dataset.from_list(rows())
    return kind(
        model,
        SFTConfig(str(folder), **arguments),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=adapters,
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(250)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w1", eos_token="w2", unk_token="w0")


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters())])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packing", [False, True])
def test_sft_has_the_loss_and_the_gradients_of_our_own_forward(name, packing, tokenizer, tmp_path):
    model = make_model(name)
    own = copy.deepcopy(model)
    given = {"packing": True, "max_length": 32} if packing else {}
    trainer = stock_trainer(model, tokenizer, tmp_path, **given)
    batch = next(iter(trainer.get_train_dataloader()))
    count = (batch["labels"][:, 1:] != -100).sum()
    trainer.current_gradient_accumulation_steps = 1  # as training sets it
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    loss.backward()
    expected = own(**batch, num_items_in_batch=count, use_cache=False).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model), gradients(own), rtol=1e-3, atol=1e-5)
    assert own.mtp_layers[0].eh_proj.weight.grad.abs().max() > 1e-4
    # Each term is worth something here.
    own.config.mtp_loss_coef = 0.0
    without = own(**batch, num_items_in_batch=count, use_cache=False).loss
    assert expected - without > 0.1


def test_sft_reports_the_terms_and_divides_them_by_the_tokens_of_the_whole_batch(tokenizer, tmp_path):
    model = make_model("soft-cap, padded vocabulary")
    own = copy.deepcopy(model)
    trainer = stock_trainer(model, tokenizer, tmp_path, gradient_accumulation_steps=2)
    batches = list(trainer.get_train_dataloader())
    count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    with torch.no_grad():
        expected = sum(own(**batch, num_items_in_batch=count, use_cache=False).loss for batch in batches)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-3)


def test_adapters_train_on_the_terms_too(tokenizer, tmp_path):
    model = make_model("soft-cap, padded vocabulary")
    own = copy.deepcopy(model)
    adapters = LoraConfig(r=2, target_modules=["o_proj", "eh_proj"])
    trainer = stock_trainer(model, tokenizer, tmp_path, adapters=adapters)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    # Adapters start as if they were not there.
    torch.testing.assert_close(loss, own(**batch, use_cache=False).loss)
    loss.backward()
    eh_proj = model.mtp_layers[0].eh_proj  # adapted in place
    assert eh_proj.lora_B["default"].weight.grad.abs().max() > 0


def test_the_own_loss_in_a_trainer_trains_as_the_stock_one(tokenizer, tmp_path):
    """Two accumulated micro-batches a step; the optimizer's steps make the same weights."""

    def train(kind):
        model = make_model("soft-cap, padded vocabulary")
        given = {"gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_steps": 2, "optim": "sgd"}
        trainer = stock_trainer(model, tokenizer, tmp_path, kind, **given)
        trainer.train()
        logs = trainer.state.log_history
        return model.state_dict(), [(log["loss"], log["num_tokens"]) for log in logs if "loss" in log], logs

    expected, losses, logs = train(SFTTrainer)
    found, own_losses, own_logs = train(OwnSFTTrainer)
    torch.testing.assert_close(torch.tensor(own_losses), torch.tensor(losses), rtol=1e-3, atol=0)
    assert "entropy" in logs[0] and "entropy" not in own_logs[0]
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_loss_that_weighs_tokens_by_probability_keeps_the_gradient_of_the_term(tokenizer, tmp_path):
    def gradient(**given):
        model = make_model("soft-cap, padded vocabulary")
        trainer = stock_trainer(model, tokenizer, tmp_path, **given)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.compute_loss(model, dict(batch)).backward()
        return model.mtp_layers[0].eh_proj.weight.grad

    torch.testing.assert_close(gradient(loss_type="dft"), gradient())


def test_preferences_are_scored_without_our_terms():
    model = make_model("sigmoid experts with groups")
    ids = torch.tensor([rows()[0]["input_ids"]])
    with torch.no_grad():
        log_probs = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    expected = log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    for outputs in (("log_probs", "entropy"), ("log_probs", "entropy", "mean_logits", "is_top1")):
        other = copy.deepcopy(model)
        add_fused_lm_head(other, outputs=outputs)
        found = other(ids, labels=ids, fused_lm_head=True).log_probs
        torch.testing.assert_close(found, expected)
    other.config.output_router_logits = True
    scored = other(ids, labels=ids, fused_lm_head=True)
    router_logits = other(ids, use_cache=False, output_router_logits=True).router_logits
    torch.testing.assert_close(scored.aux_loss, other.balance_loss(router_logits, None))
    # And where they are added, whoever slices from the end does not see them.
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    found = model(ids, labels=ids, fused_lm_head=True).log_probs
    assert found.shape[1] == expected.shape[1] + 2
    torch.testing.assert_close(found[:, -expected.shape[1] :], expected)


def test_without_the_fused_head_and_while_generating_the_model_is_as_before():
    model = make_model("soft-cap, padded vocabulary").eval()
    ids = torch.tensor([rows()[0]["input_ids"]])
    expected, text = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    add_fused_lm_head(model)
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), text)
    assert model.get_output_embeddings() is model.lm_head
