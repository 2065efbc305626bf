"""TRL's GRPO and RLOO trainers as they come, given a directory: their first step, by hand."""

import pytest
import torch
from datasets import Dataset
from helpers.chats import COLOURS, chat_tokenizer
from helpers.models import DIALECTS
from helpers.trainers import (
    GRADIENT_STEP,
    QUIET,
    assert_step_is,
    balance,
    gradients,
    log_probs,
    stack_model,
    weights_of,
)
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

COMMON = {"num_generations": 4, "max_completion_length": 12, "per_device_train_batch_size": 8, "bf16": False}


class Judge:
    """A reward that differs between answers, and remembers what it was asked."""

    __name__ = "judge"

    def __call__(self, prompts, completion_ids, **_):
        self.prompts, self.answers = prompts, completion_ids
        self.rewards = torch.tensor([len(set(ids)) + 0.1 * (ids[0] % 7) for ids in completion_ids])
        return self.rewards.tolist()


def questions() -> Dataset:
    return Dataset.from_list([{"prompt": [{"role": "user", "content": f"Colour of {k}?"}]} for k in COLOURS])


def rows_of(judge: Judge) -> list[list[int]]:
    prompts = [
        chat_tokenizer().apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        for prompt in judge.prompts
    ]
    return [prompt + list(answer) for prompt, answer in zip(prompts, judge.answers, strict=True)]


def answer_log_probs(model, judge: Judge) -> list[torch.Tensor]:
    rows = zip(rows_of(judge), judge.answers, strict=True)
    return [log_probs(model, ids)[-len(answer) :].sum() for ids, answer in rows]


@pytest.mark.parametrize("preset", DIALECTS)
def test_grpo_steps_along_the_advantages_of_its_samples(preset, tmp_path):
    folder, judge = stack_model(tmp_path / "model", preset), Judge()
    # beta: with a reference model, which TRL loads from the path again.
    args = GRPOConfig(output_dir=str(tmp_path / "run"), beta=0.1, **COMMON, **QUIET, **GRADIENT_STEP)
    trainer = GRPOTrainer(folder, args=args, reward_funcs=judge, train_dataset=questions())
    before = weights_of(trainer.model)
    trainer.train()

    clean = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    groups = judge.rewards.view(-1, COMMON["num_generations"])
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    tokens = sum(len(answer) for answer in judge.answers)
    # At the start nothing has left the reference, whose penalty is flat there.
    scored = zip(advantages.flatten(), answer_log_probs(clean, judge), strict=True)
    loss = -sum(advantage * score for advantage, score in scored) / tokens + balance(clean, rows_of(judge))
    assert_step_is(before, trainer.model, gradients(clean, loss))


@pytest.mark.parametrize("preset", DIALECTS)
def test_rloo_steps_along_what_beats_the_other_samples(preset, tmp_path):
    folder, judge = stack_model(tmp_path / "model", preset), Judge()
    args = RLOOConfig(output_dir=str(tmp_path / "run"), **COMMON, **QUIET, **GRADIENT_STEP)
    trainer = RLOOTrainer(folder, args=args, reward_funcs=judge, train_dataset=questions())
    before = weights_of(trainer.model)
    trainer.train()

    clean = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    groups = judge.rewards.view(-1, COMMON["num_generations"])
    others = (groups.sum(1, keepdim=True) - groups) / (groups.shape[1] - 1)
    scored = zip((groups - others).flatten(), answer_log_probs(clean, judge), strict=True)
    loss = -sum(advantage * score for advantage, score in scored) / len(judge.answers)
    loss = loss + balance(clean, rows_of(judge))
    assert_step_is(before, trainer.model, gradients(clean, loss))
