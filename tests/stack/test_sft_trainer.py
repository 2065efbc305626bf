"""TRL's SFTTrainer as it comes: a step is that of the documents alone, however they are put into rows."""

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
    log_probs,
    nats,
    plain_chats,
    reference,
    stack_model,
    weights_of,
)
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from tessera import TesseraForCausalLM

WAYS = {
    "rows": {"max_length": 256},
    "padding-free": {"max_length": None, "padding_free": True},
    "packed": {"max_length": 256, "packing": True},
    "packed, assistant only": {"max_length": 256, "packing": True, "assistant_only_loss": True},
    "wrapped": {"max_length": 64, "packing": True, "packing_strategy": "wrapped"},
}


def trained(folder, model, rows, **given) -> SFTTrainer:
    args = SFTConfig(output_dir=str(folder / "run"), per_device_train_batch_size=16, **{**QUIET, **given})
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(rows))
    trainer.before = weights_of(trainer.model)
    trainer.train()
    return trainer


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("preset", DIALECTS)
def test_a_step_is_that_of_the_documents_alone(preset, way, tmp_path):
    folder, rows = stack_model(tmp_path / "model", preset), plain_chats(7)
    trainer = trained(tmp_path, folder, rows, bf16=False, **GRADIENT_STEP, **WAYS[way])

    clean = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    docs = documents(rows, assistant_only="assistant" in way)
    if way == "wrapped":
        stream = [i for ids, _ in docs for i in ids]
        docs = [(stream[i : i + 64], stream[i : i + 64]) for i in range(0, len(stream), 64)]
    loss = nats(clean, docs) / count(docs) + balance(clean, [ids for ids, _ in docs])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_step_is(trainer.before, trainer.model, gradients(clean, loss))


@pytest.mark.parametrize("preset", DIALECTS)
def test_the_defaults_train_save_and_reload_equal(preset, tmp_path):
    """bf16 autocast and gradient checkpointing are TRL's defaults."""
    folder = stack_model(tmp_path / "model", preset)
    trainer = trained(tmp_path, folder, plain_chats(8), max_steps=3, learning_rate=3e-3, packing=True)
    assert trainer.args.bf16 and trainer.args.gradient_checkpointing
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] - 0.05
    moved = {
        name for name, tensor in trainer.model.named_parameters() if not tensor.equal(trainer.before[name])
    }
    assert moved == trainer.before.keys()
    trainer.save_model(tmp_path / "final")
    assert_reloads_equal(tmp_path / "final", trainer.model, AutoModelForCausalLM)
    assert (tmp_path / "final" / "chat_template.jinja").is_file()


def test_a_model_that_was_made_here_trains_as_one_from_a_directory(tmp_path):
    folder = stack_model(tmp_path / "model", "nanochat-tiny")
    given = {"bf16": False, "max_steps": 2, "assistant_only_loss": True}
    by_path = trained(tmp_path, folder, plain_chats(4), **given)
    model = TesseraForCausalLM.from_pretrained(folder)
    args = SFTConfig(output_dir=str(tmp_path / "run"), per_device_train_batch_size=16, **QUIET, **given)
    by_object = SFTTrainer(
        model, args, train_dataset=Dataset.from_list(plain_chats(4)), processing_class=chat_tokenizer()
    )
    by_object.train()
    expected = by_path.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in by_object.model.state_dict().items())


def test_the_head_is_whole_again_after_a_step(tmp_path):
    folder = stack_model(tmp_path / "model", "nanochat-tiny")
    trainer = trained(tmp_path, folder, plain_chats(2), bf16=False, max_steps=1)
    assert trainer.model.get_output_embeddings() is trainer.model.lm_head
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        expected = log_probs(reference(trainer.model), ids[0].tolist())
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
