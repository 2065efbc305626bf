"""Text to a tokenizer that plain `AutoTokenizer` loads.

    python examples/train_tokenizer.py

The same on the command line: `tessera tokenizer train --data stories.txt --vocab-size 512 --output DIR`.
"""

from pathlib import Path

from small_corpus import write_corpus
from transformers import AutoTokenizer

from tessera.data.sources import read_texts
from tessera.tokenization import train_tokenizer

FOLDER = Path("runs/examples")
TOKENIZER = FOLDER / "tokenizer"


def main() -> None:
    """Trains a byte-level BPE and shows what it makes of a sentence and of a conversation."""
    corpus = write_corpus(FOLDER / "corpus")
    texts = read_texts([str(corpus / "stories.txt")])
    train_tokenizer(texts, kind="bpe", vocab_size=512, output=TOKENIZER, report=print)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    print(tokenizer.tokenize("Ada the fox found a lantern — and a ключ."))
    messages = [
        {"role": "user", "content": "Where was the lantern?"},
        {"role": "assistant", "content": "It was on the hill."},
    ]
    print(tokenizer.apply_chat_template(messages, tokenize=False))


if __name__ == "__main__":
    main()
