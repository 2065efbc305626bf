"""Text to tokens on disk, filtered and encoded in parallel. After train_tokenizer.py.

    python examples/prepare_data.py

The same on the command line: `tessera data prepare --data stories.txt --tokenizer DIR --output DIR
--filters basic --val-fraction 0.02`.
"""

from train_tokenizer import FOLDER, TOKENIZER

from tessera.data.filters import choose_filters
from tessera.data.prepare import Source, prepare
from tessera.data.token_files import open_prepared

TOKENS = FOLDER / "tokens"


def main() -> None:
    """Encodes the stories and shows what is on disk."""
    source = Source(str(FOLDER / "corpus" / "stories.txt"))
    prepare(
        [source],
        TOKENS,
        tokenizer=str(TOKENIZER),
        filters=choose_filters("basic"),
        val_fraction=0.02,
        workers=2,
    )
    data = open_prepared(TOKENS)
    train, val = data.train.ids, data.val.ids
    print(f"{len(train):,} tokens to train on, {len(val):,} held out, as {train.dtype}")


if __name__ == "__main__":
    main()
