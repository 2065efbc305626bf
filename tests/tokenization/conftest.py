"""Texts that are hard on tokenizers, and small tokenizers trained on some."""

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tessera.tokenization import train_tokenizer

# The three kinds with the vocabulary that they are trained to here.
SIZES = {"bpe": 700, "sentencepiece": 700, "bytes": 270}


def draw_corpus() -> list[str]:
    """Documents of made-up words with digits, punctuation, runs of spaces, repeats and some other scripts."""
    draw = random.Random(1)
    syllables = ["ka", "lo", "mi", "ren", "st", "a", "e", "th", "ing", "ü", "ñe", "да", "не", "東", "京"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(400)]
    ends = [
        ". ",
        ", ",
        " ",
        " ",
        " ",
        "\n",
        "\n\n    ",
        "  ",
        "'s ",
        " 12345 ",
        "!!! ",
        " aaaa ",
        "\t",
        "\r\n",
    ]
    return [
        "".join(word + draw.choice(ends) for word in draw.choices(words, k=600)) + "." * 8 for _ in range(60)
    ]


def draw_texts() -> list[str]:
    """Texts with what splits, merges and decoders may stumble over."""
    draw = random.Random(2)

    def character() -> str:
        return chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)]))

    pools = [
        lambda: draw.choice(" \t\n\r\x0b\x0c\x85\u00a0\u2028\u3000\u200b"),
        lambda: chr(draw.randrange(0x80)),
        lambda: draw.choice("aaab.. -=0"),
        lambda: draw.choice(
            ["'s", "'LL", "'ſ", "é", "e\u0301", "日本", "１２", "½", "ǅ", "İ", "K", "ka", "ren", "да"]
        ),
        character,
    ]
    texts = []
    for _ in range(1500):
        chosen = draw.sample(pools, draw.randint(1, 3))
        texts.append("".join(draw.choice(chosen)() for _ in range(draw.randint(1, 50))))
    texts += [c * n for c in "a .\n-0\t'é京" for n in (1, 2, 3, 4, 5, 7, 8, 9, 17, 64, 257)]
    texts += ["", "<|im_start|>user\n<think>", "<|endoftext|>", "half <|im_", "<0x41>", "<unk><s></s>"]
    return texts


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return draw_corpus()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return draw_texts()


@pytest.fixture(scope="session")
def trained(tmp_path_factory, corpus) -> dict[str, Path]:
    """A saved tokenizer directory of each kind."""
    folders = {}
    for kind, size in SIZES.items():
        folders[kind] = tmp_path_factory.mktemp("trained") / kind
        train_tokenizer(corpus, kind=kind, vocab_size=size, output=folders[kind], source=["made-up words"])
    return folders


@pytest.fixture(params=SIZES)
def kind(request) -> str:
    return request.param


@pytest.fixture
def folder(trained, kind) -> Path:
    return trained[kind]


@pytest.fixture
def tokenizer(folder) -> PreTrainedTokenizerBase:
    """As others load it."""
    return AutoTokenizer.from_pretrained(folder)
