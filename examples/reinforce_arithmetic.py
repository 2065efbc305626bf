"""Reinforcement learning with answers that a program checks: sums of two numbers. After finetune_chat.py.

    python examples/reinforce_arithmetic.py

The same on the command line: `tessera grpo --model DIR --task arithmetic --save-path DIR`.
"""

from finetune_chat import CHAT, FOLDER

from tessera.training.grpo import GRPOArguments, grpo


def main() -> None:
    """Runs GRPO for a few steps."""
    result = grpo(
        GRPOArguments(
            model=str(CHAT), task="arithmetic", save_path=str(FOLDER / "grpo"), max_seq_len=128, steps=20
        )
    )
    print(f"before: {result.before}\nafter:  {result.after}")


if __name__ == "__main__":
    main()
