"""Training a tokenizer: byte-level BPE, SentencePiece BPE, or the bytes themselves, which need none.

What belongs here: what text the trainers see, their settings, and what is said when the text is not enough.
Trainers see words with their counts instead of text (word_counts.py), so that memory does not grow with it:
the merges of byte-level BPE are found by bpe_merges.py and are those of the `tokenizers` library, whose own
trainer takes text only; SentencePiece's trainer takes words.

The special tokens of the chat format are part of each vocabulary size: BPE has them as its last ids,
SentencePiece right after unk and bos (its trainer numbers them first).
"""

import io
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .bpe_merges import train_merges
from .byte_level import BYTE_NAMES, GPT4_PATTERN, byte_level_backend
from .byte_tokenizer import BYTE_VOCAB_SIZE, build_byte_tokenizer
from .chat import END_OF_TEXT, PAD, SPECIAL_TOKENS, add_chat
from .save import check_output, save_tokenizer, wrap
from .sentencepiece_models import sentencepiece_tokenizer
from .word_counts import PIECE_LENGTH, SPACES_PARTS, SPACES_PATTERN, WordCounts, count_words, cut_text

KINDS = ("bpe", "sentencepiece", "bytes")
DEFAULT_VOCAB_SIZE = 32_000

# Each so-many-th piece is kept from the trainer, up to so many characters, to see what the tokenizer makes of
# text that it was not trained on.
HELD_OUT_EVERY = 50
HELD_OUT_LENGTH = 1_000_000
SECONDS_BETWEEN_REPORTS = 5.0
SENTENCEPIECE_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    # Text is taken as it is, so that it comes back as it was.
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "eos_piece": END_OF_TEXT,
    # Control symbols, not user-defined ones: text that spells one is no such token to SentencePiece.
    "control_symbols": [token for token in SPECIAL_TOKENS if token != END_OF_TEXT],
    "max_sentence_length": 4 * PIECE_LENGTH,  # in bytes
    "minloglevel": 2,
}


def train_tokenizer(
    texts: Iterable[str] = (),
    *,
    kind: str = "bpe",
    vocab_size: int | None = None,
    output: str | Path | None = None,
    source: list[str] | None = None,
    report: Callable[[str], None] | None = None,
    workers: int | None = None,
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer with the special tokens and the template of the chat format.

    Args:
        texts: documents; none for bytes.
        kind: "bpe" (byte-level, text split as for GPT-4), "sentencepiece" (BPE with byte fallback, digits
            apart, nothing normalised; needs the sentencepiece package) or "bytes" (a token for each).
        vocab_size: tokens in all, special ones included; 32000 if not given. Bytes have one size.
        output: directory to save it in; None for nowhere. SentencePiece's own model is kept there too.
        source: where the texts are from, to be written beside the tokenizer.
        report: called with a line on how far it is.
        workers: processes that count words; one for each core if not given, at most 8. The result is the
            same with any number.

    Returns:
        The tokenizer.

    Raises:
        ValueError: if the kind is unknown, the vocabulary too small for the bytes and special tokens or too
            large for the text, there is no text, or something is at `output` already.
    """
    report = report or (lambda line: None)
    if kind not in KINDS:
        raise ValueError(f"there is no tokenizer type {kind!r}; choose one of {', '.join(KINDS)}")
    if output is not None:
        check_output(output)
    # A path on this machine says nothing to others.
    origins = [Path(name).name if Path(name).exists() else name for name in source or []]
    meta: dict[str, Any] = {"type": kind}
    files: dict[str, bytes] = {}
    if kind == "bytes":
        size = BYTE_VOCAB_SIZE + len(SPECIAL_TOKENS)
        if vocab_size not in (None, size):
            raise ValueError(f"a byte tokenizer has {size} tokens, not {vocab_size}; leave the size out")
        extra = [token for token in SPECIAL_TOKENS if token not in (END_OF_TEXT, PAD)]
        tokenizer: PreTrainedTokenizerFast = build_byte_tokenizer(
            eos_token=END_OF_TEXT, extra_special_tokens=[*extra, PAD]
        )
    else:
        vocab_size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
        smallest = BYTE_VOCAB_SIZE + len(SPECIAL_TOKENS) + (2 if kind == "sentencepiece" else 0)
        if vocab_size < smallest:
            raise ValueError(
                f"a vocabulary of {vocab_size} is too small: 256 bytes and the special tokens are {smallest}"
            )
        reader = _Reader(texts, report, workers)
        start = time.monotonic()
        if kind == "bpe":
            tokenizer = wrap(_train_bpe(reader, vocab_size))
        else:
            files["tokenizer.model"] = _train_sentencepiece(reader, vocab_size)
            tokenizer = sentencepiece_tokenizer(files["tokenizer.model"])
            # No text is encoded with a beginning, so nothing should be generated from one.
            tokenizer.bos_token = None
        report(f"trained on {_megabytes(reader.num_bytes)} in {time.monotonic() - start:.0f} s")
        meta |= {
            "source": origins,
            "text_bytes": reader.num_bytes,
            "bytes_per_token": reader.bytes_per_token(tokenizer),
            "words": reader.num_words,
        }
        if reader.dropped:
            meta["words_dropped"] = reader.dropped
    add_chat(tokenizer)
    if output is not None:
        save_tokenizer(tokenizer, output, meta, files)
    if "bytes_per_token" in meta:
        measured = (
            "held-out text" if reader.held_out else "the training text, which is too short to hold any out"
        )
        report(f"{len(tokenizer)} tokens; {meta['bytes_per_token']:.2f} bytes per token on {measured}")
    return tokenizer


class _Reader:
    """Counts the words of texts for a trainer, and keeps some of the text apart."""

    def __init__(self, texts: Iterable[str], report: Callable[[str], None], workers: int | None):
        self.num_bytes = 0
        self.num_words = 0
        self.dropped: dict[str, int] = {}
        self.held_out: list[str] = []
        self.report = report
        self._first = ""
        self._texts = texts
        self._workers = workers

    def count_words(self, pattern: str, parts: str = "") -> WordCounts:
        """Reads the texts.

        Raises:
            ValueError: if there is nothing in them.
            Exception: what reading them ended with.
        """
        words = count_words(self._pieces(), pattern, parts, workers=self._workers)
        if self.num_bytes == 0:
            raise ValueError("there is no text to train a tokenizer on: all of it is empty")
        self.num_words = len(words.counts)
        self.report(f"{self.num_words} different words")
        if words.dropped:
            self.dropped = {"number": words.dropped, "seen_at_most": words.dropped_count}
            self.report(
                f"{words.dropped} more are left out, for which there is no memory; each was seen "
                f"{words.dropped_count} times at most"
            )
        return words

    def bytes_per_token(self, tokenizer: PreTrainedTokenizerBase) -> float:
        """Of the text that was held out, or the first piece if none was."""
        sample = self.held_out or [self._first]
        ids = tokenizer(sample, split_special_tokens=True)["input_ids"]
        return sum(len(text.encode("utf-8")) for text in sample) / sum(map(len, ids))

    def _pieces(self) -> Iterator[str]:
        start = reported = time.monotonic()
        held = 0
        for number, piece in enumerate(piece for text in self._texts for piece in cut_text(text)):
            if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 and held < HELD_OUT_LENGTH:
                self.held_out.append(piece)
                held += len(piece)
                continue
            self._first = self._first or piece
            self.num_bytes += len(piece.encode("utf-8"))
            now = time.monotonic()
            if now - reported >= SECONDS_BETWEEN_REPORTS:
                self.report(f"read {_megabytes(self.num_bytes)} in {now - start:.0f} s")
                reported = now
            yield piece
        self.report(f"read {_megabytes(self.num_bytes)} in {time.monotonic() - start:.0f} s")


def _train_bpe(reader: _Reader, vocab_size: int) -> Tokenizer:
    num_merges = vocab_size - len(SPECIAL_TOKENS) - BYTE_VOCAB_SIZE
    # Bytes have the first ids, in the order of their names.
    tokens = sorted(BYTE_NAMES.values())
    index_of = {name: index for index, name in enumerate(tokens)}
    counts = reader.count_words(GPT4_PATTERN).counts
    pairs = train_merges(
        map(str.encode, counts),
        list(counts.values()),
        num_merges,
        byte_ids=[index_of[BYTE_NAMES[byte]] for byte in range(BYTE_VOCAB_SIZE)],
        report=lambda number: reader.report(f"merged {number} of {num_merges}"),
    )
    if len(pairs) < num_merges:
        reached = BYTE_VOCAB_SIZE + len(pairs) + len(SPECIAL_TOKENS)
        raise ValueError(_too_large(vocab_size, reached, reader.num_bytes))
    merges = []
    for left, right in pairs:
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
    backend = byte_level_backend({token: index for index, token in enumerate(tokens)}, merges)
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return backend


def _train_sentencepiece(reader: _Reader, vocab_size: int) -> bytes:
    try:
        import sentencepiece
    except ImportError:
        raise ValueError(
            "training with SentencePiece needs the sentencepiece package: pip install 'tessera-lm[tokenizer]'"
        ) from None
    counts = reader.count_words(SPACES_PATTERN, SPACES_PARTS).counts
    reader.report("merging, which SentencePiece does in one go")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # It splits text at tabs anyhow, leaving out the lines that have any.
            sentence_iterator=(
                f"{part}\t{times}" for word, times in counts.items() for part in word.split("\t") if part
            ),
            input_format="tsv",
            model_writer=model,
            vocab_size=vocab_size,
            **SENTENCEPIECE_SETTINGS,
        )
    except RuntimeError as error:
        if largest := re.search(r"too high .*<= (\d+)", str(error)):
            raise ValueError(_too_large(vocab_size, int(largest[1]), reader.num_bytes)) from error
        if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise ValueError(
                f"a vocabulary of {vocab_size} is too small: the bytes, the special tokens and the "
                f"characters of this text are {smallest[1]}"
            ) from error
        raise ValueError(f"SentencePiece cannot train on this text: {error}") from error
    return model.getvalue()


def _too_large(vocab_size: int, reached: int, num_bytes: int) -> str:
    return (
        f"a vocabulary of {vocab_size} is too large for {_megabytes(num_bytes)} of text, which gives "
        f"{reached}; give more text, or --vocab-size {reached} at most"
    )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes} bytes"
