"""TRL's DPO, KTO and Reward trainers as they come, given a directory: what their first step is, by hand."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers.chats import COLOURS
from helpers.models import DIALECTS
from helpers.trainers import (
    GRADIENT_STEP,
    QUIET,
    assert_reloads_equal,
    assert_step_is,
    balance,
    gradients,
    log_probs,
    reference,
    stack_model,
    weights_of,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

BETA = 0.1


def preferences() -> Dataset:
    rows = []
    for thing, colour in COLOURS.items():
        wrong = "It has none." if colour != "blue" else "I never saw one, to be honest."
        answers = ([{"role": "assistant", "content": text}] for text in (f"{colour}.", wrong))
        question = [{"role": "user", "content": f"Which colour has {thing}?"}]
        rows.append(dict(zip(("prompt", "chosen", "rejected"), (question, *answers), strict=True)))
    return Dataset.from_list(rows)


@pytest.mark.parametrize("preset", DIALECTS)
def test_dpo_starts_without_margin_and_steps_towards_the_chosen(preset, tmp_path):
    """Also for a model that was trained with dropout, which TRL turns off."""
    dropout = {"attention_dropout": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1} if "gpt2" in preset else {}
    folder = stack_model(tmp_path / "model", preset, **dropout)
    args = DPOConfig(output_dir=str(tmp_path / "run"), beta=BETA, bf16=False, **QUIET, **GRADIENT_STEP)
    trainer = DPOTrainer(folder, args=args, train_dataset=preferences())
    before = weights_of(trainer.model)
    trainer.train()

    clean = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses, rows = [], []
    for row in trainer.train_dataset:
        scores = []
        for side in ("chosen_ids", "rejected_ids"):
            rows.append(row["prompt_ids"] + row[side])
            scores.append(log_probs(clean, rows[-1])[-len(row[side]) :].sum())
        margin = scores[0] - scores[1]
        losses.append(-F.logsigmoid(BETA * (margin - margin.detach())))
    loss = torch.stack(losses).mean() + balance(clean, rows)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_step_is(before, trainer.model, gradients(clean, loss))
    trainer.save_model(tmp_path / "final")
    assert_reloads_equal(tmp_path / "final", trainer.model, AutoModelForCausalLM)


@pytest.mark.parametrize("preset", DIALECTS)
def test_a_reward_model_steps_as_its_pairs_alone(preset, tmp_path):
    folder = stack_model(tmp_path / "model", preset, router_aux_loss_coef=0.0)
    args = RewardConfig(output_dir=str(tmp_path / "run"), bf16=False, **QUIET, **GRADIENT_STEP)
    trainer = RewardTrainer(folder, args=args, train_dataset=preferences())
    clean, before = reference(trainer.model), weights_of(trainer.model)
    trainer.train()

    def reward(ids: list[int]) -> torch.Tensor:
        return clean.score(clean.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1])[0]

    losses = [
        -F.logsigmoid(reward(row["chosen_ids"]) - reward(row["rejected_ids"]))
        for row in trainer.train_dataset
    ]
    loss = torch.stack(losses).mean()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    # What is added to all hidden states alike cancels in the difference.
    flat = ("model.norm.bias",) if clean.config.norm_type == "layer_norm" else ()
    assert_step_is(before, trainer.model, gradients(clean, loss), flat)
    trainer.save_model(tmp_path / "final")
    assert_reloads_equal(tmp_path / "final", trainer.model, AutoModelForSequenceClassification)


@pytest.mark.parametrize("preset", DIALECTS)
def test_kto_raises_what_is_liked_over_what_is_not(preset, tmp_path):
    folder = stack_model(tmp_path / "model", preset, router_aux_loss_coef=0.0)
    args = KTOConfig(output_dir=str(tmp_path / "run"), bf16=False, max_steps=4, learning_rate=1e-3, **QUIET)
    trainer = KTOTrainer(folder, args=args, train_dataset=preferences())
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(0.5, abs=1e-5) and losses[-1] < 0.49
