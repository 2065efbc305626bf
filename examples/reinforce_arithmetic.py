"""Reinforcement learning with answers that a program checks: sums of two numbers. After finetune_chat.py.

    python examples/reinforce_arithmetic.py

The same on the command line, with the rewards that GSM8K has: `tessera grpo --model DIR --task arithmetic`.
"""

import re

from finetune_chat import CHAT, FOLDER

from tessera.training.grpo import GRPOArguments, grpo
from tessera.training.rewards import number_reward, text_of


def sentence_reward(completions: list, **_) -> list[float]:
    """1 where an answer is a sum in words, right or wrong: something to begin with for a small model."""
    return [float(re.fullmatch(r"\d+ plus \d+ is \d+\.", text_of(said)) is not None) for said in completions]


def main() -> None:
    """Runs GRPO for a few steps with a reward of our own beside that for the number."""
    args = GRPOArguments(
        model=str(CHAT),
        task="arithmetic",
        save_path=str(FOLDER / "grpo"),
        max_seq_len=128,
        max_completion_len=32,
        steps=30,
        learning_rate=3e-4,
    )
    result = grpo(args, rewards=[(number_reward, 1.0), (sentence_reward, 0.5)])
    print(f"before: {result.before}\nafter:  {result.after}")


if __name__ == "__main__":
    main()
