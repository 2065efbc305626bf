"""Direct preference optimization: of two answers, prefer the better one. After finetune_chat.py.

    python examples/prefer_answers.py

The same on the command line: `tessera dpo --model DIR --data preferences.jsonl --save-path DIR`.
"""

from finetune_chat import CHAT, FOLDER

from tessera.training.dpo import DPOArguments, dpo


def main() -> None:
    """Runs DPO for a few steps."""
    preferences = str(FOLDER / "corpus" / "preferences.jsonl")
    result = dpo(
        DPOArguments(
            model=str(CHAT), data=preferences, save_path=str(FOLDER / "dpo"), max_seq_len=512, steps=20
        )
    )
    print(f"before: {result.before}\nafter:  {result.after}")


if __name__ == "__main__":
    main()
