"""Merges against those of the trainer of the `tokenizers` library, on words that are hard to merge."""

import json
import random
from collections import Counter

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from tessera.tokenization.bpe_merges import train_merges
from tessera.tokenization.byte_level import BYTE_NAMES, GPT4_PATTERN, byte_level_backend
from tessera.tokenization.word_counts import count_words

NAMES = sorted(BYTE_NAMES.values())
BYTE_IDS = [NAMES.index(BYTE_NAMES[byte]) for byte in range(256)]


def ours(counts: dict[str, int], num_merges: int, **options) -> list[tuple[str, str]]:
    tokens, merges = list(NAMES), []
    words = [word.encode() for word in counts]
    for left, right in train_merges(words, list(counts.values()), num_merges, byte_ids=BYTE_IDS, **options):
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
    return merges


def theirs(tokenizer: Tokenizer, texts: list[str], num_merges: int) -> list[tuple[str, str]]:
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merges,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def theirs_of_words(counts: dict[str, int], num_merges: int) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\0"), behavior="removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return theirs(tokenizer, ["\0".join([word] * count) for word, count in counts.items()], num_merges)


def draw_words(seed: int, alphabet: str, longest: int, number: int) -> dict[str, int]:
    draw = random.Random(seed)
    words = ("".join(draw.choices(alphabet, k=draw.randint(1, longest))) for _ in range(number))
    return {word: min(int(draw.paretovariate(0.7)), 300) for word in words}


@pytest.mark.parametrize(
    ("alphabet", "longest", "number"),
    [
        ("a", 60, 40),  # nothing but runs
        ("ab", 40, 300),  # runs of runs
        ("aab", 12, 400),
        ("abcdefgh", 9, 500),  # many ties
        ("".join(map(chr, range(1, 0x180))) + "東京🙂\U0010ffff", 12, 800),  # all bytes of UTF-8's first half
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_merges_are_those_of_the_library(alphabet, longest, number, seed):
    counts = draw_words(seed, alphabet, longest, number)
    expected = theirs_of_words(counts, 100_000)
    assert len(expected) > 8
    assert ours(counts, 100_000) == expected
    # any number of them is the beginning of all
    assert ours(counts, len(expected) // 2) == expected[: len(expected) // 2]


def test_merges_of_a_text_are_those_of_the_library(corpus):
    expected = theirs(byte_level_backend({}, []), corpus, 900)
    assert len(expected) == 900
    assert ours(count_words(corpus, GPT4_PATTERN).counts, 900) == expected


def test_the_order_of_words_makes_no_difference():
    counts = draw_words(1, "abc", 8, 300)
    backwards = dict(reversed(counts.items()))
    assert ours(counts, 500) == ours(backwards, 500)


def test_pairs_that_are_too_rare_are_not_merged():
    assert ours({"ab": 3, "cd": 2, "ef": 1}, 9) == [("a", "b"), ("c", "d")]
    assert ours({"ab": 3, "cd": 2}, 9, min_count=3) == [("a", "b")]
    assert ours({"ab": 1}, 9, min_count=1) == [("a", "b")]
    assert ours({}, 9) == [] and ours({"a": 5}, 9) == [] and ours({"ab": 5}, 0) == []


def test_equal_pairs_are_merged_in_the_order_of_their_ids():
    # by the library's names of bytes "!" is the first and "\n" (Ċ) is after all printable ones
    assert ours(Counter({"\nx": 5, "zz": 5, "!!": 5, "ab": 5}), 4) == [
        ("!", "!"),
        ("a", "b"),
        ("z", "z"),
        ("Ċ", "x"),
    ]
