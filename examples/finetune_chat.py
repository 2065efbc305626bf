"""A base model to one that answers: fine-tuning with loss on the answers only. After pretrain_small.py.

    python examples/finetune_chat.py

The same on the command line: `tessera sft --model DIR --data chats.jsonl --save-path DIR`.
"""

from pretrain_small import BASE, FOLDER

from tessera.training.sft import SFTArguments, sft

CHAT = FOLDER / "chat"


def main() -> None:
    """Fine-tunes on the conversations about the stories."""
    result = sft(
        SFTArguments(
            model=str(BASE),
            data=str(FOLDER / "corpus" / "chats.jsonl"),
            eval_data=str(FOLDER / "corpus" / "held_out_chats.jsonl"),
            save_path=str(CHAT),
            max_seq_len=512,
            steps=80,
        )
    )
    before, after = result.before["val_loss"], result.after["val_loss"]
    print(f"loss of held-out answers: {before:.3f} -> {after:.3f} nats a token")


if __name__ == "__main__":
    main()
