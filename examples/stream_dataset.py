"""Conversations of a Hub dataset, streamed: read, encoded and packed as they come, nothing downloaded first.

    python examples/stream_dataset.py HuggingFaceTB/smoltalk --name all --tokenizer runs/chat/final
    python examples/stream_dataset.py openthoughts

Without a name it streams the conversations about the stories from a Hub on this machine. Rows that are packed
like this are what `tessera sft --streaming` trains on, and what TRL's SFTTrainer takes with
`padding_free=True`.
"""

import argparse
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from local_hub import LocalHub
from small_corpus import conversations

LOCAL = "someone/stories"
PUSH = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo(sys.argv[2], repo_type="dataset")
HfApi().upload_file(
    path_or_fileobj=sys.argv[1], path_in_repo="train.jsonl", repo_id=sys.argv[2], repo_type="dataset"
)
"""


def stream(source: str, tokenizer: str, name: str | None, split: str | None, length: int, rows: int) -> None:
    """Prints the first packed rows of a dataset."""
    from tessera.data.chat_rows import load_rows
    from tessera.data.preview import mark_trained
    from tessera.tokenization import load_chat_tokenizer

    chat = load_chat_tokenizer(tokenizer)
    dataset = load_rows(source, chat, length, name=name, split=split, streaming=True)
    for number, row in enumerate(islice(dataset, rows), start=1):
        tokens, parts = len(row["input_ids"]), len(row["seq_lengths"])
        trained = sum(label != -100 for label in row["labels"])
        print(f"row {number}: {parts} conversations, {tokens} of {length} tokens, {trained} trained on")
        if number == 1:
            first = row["seq_lengths"][0]
            print(mark_trained(chat, row["input_ids"][:first], row["labels"][:first], color=False))


def stream_from_here(arguments: list[str]) -> None:
    """The same from a Hub on this machine, in a process that takes it for the real one."""
    with TemporaryDirectory() as folder, LocalHub(Path(folder) / "hub") as hub:
        path = Path(folder) / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in conversations(400)), encoding="utf-8")
        for command in (["-c", PUSH, str(path), LOCAL], [__file__, LOCAL, *arguments]):
            # What the Hub's libraries take for the Hub, they read at import.
            subprocess.run([sys.executable, *command], env={**os.environ, **hub.environment}, check=True)


def main() -> None:
    """Streams what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", help="dataset on the Hub (org/name), or a preset")
    parser.add_argument("--tokenizer", default="bytes", help="directory or Hub name; default: bytes")
    parser.add_argument("--name", help="configuration of the dataset")
    parser.add_argument("--split", help="split of the dataset")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=5, help="rows to print")
    args = parser.parse_args()
    if args.source is None:
        stream_from_here(sys.argv[1:])
    else:
        stream(args.source, args.tokenizer, args.name, args.split, args.length, args.rows)


if __name__ == "__main__":
    main()
