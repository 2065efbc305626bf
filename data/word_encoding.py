"""Byte-level BPE of many texts at once, where its words can be found and looked up by arrays.

Notable:
- it gives the ids that the tokenizer's backend gives, or is not used: what the backend does is read from its
own description, and anything that is not known here (another pattern, a normalizer, tokens that text may
spell) leaves the work to the backend;
- a word that was not seen before goes to the backend's own model.

What belongs here: whether a backend is one of these, and texts to ids through words.
"""

import json
from functools import lru_cache

import numpy as np

from .word_splits import BOUNDARY, character_classes, starts_of_words
from .word_table import PADDING, WordTable


def known_pattern(backend: str) -> str | None:
    """Name of the pattern that a backend splits text with, if it does nothing that is not known here.

    Args:
        backend: `tokenizer.json`.
    """
    from tessera.tokenization.byte_level import GPT2_PATTERN, GPT4_PATTERN

    content = json.loads(backend)
    model = content["model"]
    plain = (
        model.get("type") == "BPE"
        and not content.get("normalizer")
        and not any(
            model.get(name)
            for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
        )
        and not model.get("byte_fallback")
        # Those that are not special would be found in text.
        and all(token["special"] for token in content.get("added_tokens", []))
    )
    splitter = content.get("pre_tokenizer") or {}
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    if not plain or steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1 and steps[0]["use_regex"]:
        return "gpt2"
    if len(steps) != 2 or steps[1]["use_regex"] or steps[0].get("type") != "Split":
        return None
    split = steps[0]
    if split["behavior"] != "Isolated" or split["invert"]:
        return None
    return {GPT2_PATTERN: "gpt2", GPT4_PATTERN: "gpt4"}.get(split["pattern"].get("Regex"))


class WordEncoder:
    """Texts to ids.

    Args:
        backend: the tokenizer's.
        pattern: what `known_pattern` says of it.
        dtype: type of ids.
    """

    def __init__(self, backend, pattern: str, dtype: str):
        model = backend.model
        names = _byte_names()

        def encode(words: list[bytes]) -> list[list[int]]:
            named = [word.decode("latin-1").translate(names) for word in words]
            return [[token.id for token in model.tokenize(word)] for word in named]

        self._pattern = pattern
        self._classes = _classes()
        self._table = WordTable(encode, dtype)

    def encode(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts.

        Args:
            texts: as UTF-8.

        Returns:
            The ids of all, one after the other, and how many each has [texts].
        """
        lengths = np.zeros(len(texts), dtype=np.int64)
        some = np.flatnonzero([bool(text) for text in texts])
        if not len(some):
            return self._table.no_ids, lengths
        # Any character may stand between texts: it has a class of its own.
        data = b"\n".join([texts[i] for i in some]) + b"\n"
        sizes = np.fromiter((len(texts[i]) for i in some), dtype=np.int64, count=len(some))
        between = np.cumsum(sizes + 1) - 1  # in bytes
        if data.isascii():
            codes, offsets = np.frombuffer(data, dtype=np.uint8), None
            classes = self._classes[codes]
            classes[between] = BOUNDARY
        else:
            codes = np.frombuffer(data.decode("utf-8").encode("utf-32-le"), dtype="<u4")
            classes = self._classes[codes]
            num_bytes = np.ones(len(codes), dtype=np.uint8)
            for first in (0x80, 0x800, 0x10000):
                num_bytes += codes >= first
            offsets = np.cumsum(num_bytes, dtype=np.int64) - num_bytes  # in bytes, of each character
            classes[np.searchsorted(offsets, between)] = BOUNDARY
        starts = starts_of_words(codes, classes, self._pattern)
        if offsets is not None:
            starts = offsets[starts]
        ends = np.append(starts[1:], len(data))
        is_text = np.ones(len(starts), dtype=bool)
        last = np.searchsorted(starts, between)
        is_text[last] = False
        ids, counts = self._table.look_up(data + PADDING, starts[is_text], ends[is_text])
        words_until = last - np.arange(len(last))
        total = np.concatenate([[0], np.cumsum(counts)])
        lengths[some] = np.diff(total[words_until], prepend=0)
        return ids, lengths


def _byte_names() -> dict[int, str]:
    """What a byte-level backend calls each byte: printable ones as they are, the others from U+0100 on.

    The same as `BYTE_NAMES` of the tokenizers' room, which takes seconds of imports in every process.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@lru_cache(maxsize=1)
def _classes() -> np.ndarray:
    return character_classes()
