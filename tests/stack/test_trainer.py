"""transformers' Trainer as it comes: its step, accumulation and checkpoints, for each dialect."""

import pytest
import torch
from datasets import Dataset
from helpers.chats import chat_tokenizer
from helpers.models import DIALECTS
from helpers.trainers import (
    GRADIENT_STEP,
    QUIET,
    assert_reloads_equal,
    assert_step_is,
    balance,
    count,
    documents,
    gradients,
    nats,
    plain_chats,
    stack_model,
    weights_of,
)
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments


class Recording(DataCollatorForSeq2Seq):
    """Pads rows with their labels, and keeps the rows of each micro-batch."""

    seen = ()

    def __call__(self, features, return_tensors=None):
        self.seen += ([row["input_ids"] for row in features],)
        return super().__call__(features, return_tensors)


def trainer_of(folder, model, rows, **given) -> Trainer:
    table = Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows])
    args = TrainingArguments(output_dir=str(folder / "run"), **{**QUIET, **given})
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return Trainer(model, args, train_dataset=table, data_collator=Recording(chat_tokenizer()))


@pytest.mark.parametrize("split", [(4, 1), (2, 2), (1, 4)], ids=["4x1", "2x2", "1x4"])
@pytest.mark.parametrize("preset", DIALECTS)
def test_a_step_is_that_of_the_rows_alone_however_it_is_split(preset, split, tmp_path):
    folder, rows = stack_model(tmp_path / "model", preset), documents(plain_chats(4), assistant_only=True)
    size, accumulation = split
    trainer = trainer_of(
        tmp_path,
        folder,
        rows,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=True,
        **GRADIENT_STEP,
    )
    before = weights_of(trainer.model)
    trainer.train()

    clean = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loss = nats(clean, rows) / count(rows)
    # The balance of experts is a matter of each micro-batch, which weighs as much as the tokens in it.
    by_ids = {tuple(ids): (ids, labels) for ids, labels in rows}
    micro_batches = [[by_ids[tuple(ids)] for ids in batch] for batch in trainer.data_collator.seen]
    assert [len(batch) for batch in micro_batches] == [size] * accumulation
    for batch in micro_batches:
        loss = loss + count(batch) / count(rows) * balance(clean, [ids for ids, _ in batch])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_step_is(before, trainer.model, gradients(clean, loss))


@pytest.mark.parametrize("preset", [*DIALECTS, "latent-sliding-lowrank-sigmoid", "nanochat-moe-smear-gqa"])
def test_a_resumed_run_ends_with_the_same_bits_and_saves_them(preset, tmp_path):
    """Experts, correction biases and the random numbers of dropout included."""
    dropout = {"attention_dropout": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1} if "gpt2" in preset else {}
    folder, rows = stack_model(tmp_path / "model", preset, **dropout), documents(plain_chats(6))
    given = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "per_device_train_batch_size": 2}
    whole = trainer_of(tmp_path / "whole", folder, rows, **given)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", folder, rows, **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / "checkpoint-2"))

    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    resumed.save_model(tmp_path / "final")
    assert_reloads_equal(tmp_path / "final", whole.model, AutoModelForCausalLM)


def test_evaluation_reports_the_loss_without_the_balance_of_experts(tmp_path):
    folder, rows = (
        stack_model(tmp_path / "model", "bytegpt-tiny"),
        documents(plain_chats(4), assistant_only=True),
    )
    trainer = trainer_of(tmp_path, folder, rows, per_device_eval_batch_size=4)
    clean = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = nats(clean, rows).item() / count(rows)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(expected, rel=1e-5)
