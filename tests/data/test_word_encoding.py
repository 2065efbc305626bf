"""Finding and looking up words by arrays gives what the tokenizers library gives, on anything."""

import json
import random

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tessera.data import word_table
from tessera.data.word_encoding import WordEncoder, _byte_names, known_pattern
from tessera.tokenization.byte_level import BYTE_NAMES, GPT2_PATTERN, GPT4_PATTERN, GPT4O_PATTERN

# What the patterns tell apart, and what is near it: the long s, marks, other scripts' digits, odd spaces.
SIGNS = [*"aABsStTlLdDmMrReEvVx''''  \n\r\t.,\"!19", *"\u017fßé東\u00a0\u2003٣²\u0301🙂\x0b\x1c\x85\u2028ﬆ"]


def byte_level(pattern: str | None) -> Tokenizer:
    """A tokenizer of 1,000 tokens that splits by a pattern; None for the one that ByteLevel has itself."""
    backend = Tokenizer(models.BPE())
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    steps = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, own]) if steps else own
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    draw = random.Random(0)
    texts = ["".join(draw.choices(SIGNS, k=50)) for _ in range(300)]
    backend.train_from_iterator(
        [*texts, "the quick brown foxes don't jump over 1234 lazy dogs. " * 9], trainer
    )
    backend.encode_special_tokens = True
    return backend


@pytest.fixture(scope="module", params=["gpt2", "gpt4", "byte level's own"])
def pair(request) -> tuple[Tokenizer, WordEncoder]:
    pattern = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN}.get(request.param)
    backend = byte_level(pattern)
    known = known_pattern(backend.to_str())
    assert known == ("gpt4" if request.param == "gpt4" else "gpt2")
    return backend, WordEncoder(backend, known, "uint16")


def check(pair, texts: list[str]) -> None:
    backend, words = pair
    ids, lengths = words.encode([text.encode() for text in texts])
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    expected = backend.encode_batch_fast(texts, add_special_tokens=False)
    for text, ours, theirs in zip(texts, parts, expected, strict=True):
        assert ours.tolist() == theirs.ids, text[:200]


def test_every_character_in_every_place_of_a_word(pair):
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    # All of the first plane's scripts, and of the rest one in 23.
    chosen = characters[:0x3000] + characters[0x3000::23]
    texts = [
        "".join(f"a{c}b {c}'{c}e\n{c} 1{c}" for c in chosen[i : i + 500]) for i in range(0, len(chosen), 500)
    ]
    check(pair, texts)


def test_any_sequence_of_what_the_patterns_tell_apart(pair):
    draw = random.Random(1)
    check(pair, ["".join(draw.choices(SIGNS, k=draw.randint(0, 14))) for _ in range(20_000)])


def test_bytes_have_the_names_that_the_tokenizers_have_for_them():
    assert _byte_names() == BYTE_NAMES


def test_long_runs_special_tokens_and_texts_of_nothing(pair):
    runs = [sign * count for sign in SIGNS for count in (1, 2, 3, 7, 8, 9, 15, 16, 17, 4000)]
    check(pair, ["", "<|endoftext|>", "a<|endoftext|>'s", *runs, "", " ".join(runs), "\0", "\0\0 \0", ""])


def test_a_table_that_is_full_gives_the_same(pair, monkeypatch):
    monkeypatch.setattr(word_table, "SLOTS", 2**6)
    monkeypatch.setattr(word_table, "MOST_LONG", 5)
    backend, _ = pair
    small = WordEncoder(backend, known_pattern(backend.to_str()), "uint16")
    draw = random.Random(2)
    texts = ["".join(draw.choices("abcde ", k=300)) + "z" * draw.randint(10, 20) for _ in range(200)]
    for i in range(0, 200, 10):
        check((backend, small), texts[i : i + 10])


def change(**values):
    def apply(content):
        for path, value in values.items():
            *parents, last = path.split("__")
            at = content
            for name in parents:
                at = at[int(name)] if isinstance(at, list) else at[name]
            at[last] = value

    return apply


@pytest.mark.parametrize(
    "apply",
    [
        change(normalizer={"type": "NFC"}),
        change(model__dropout=0.1),
        change(model__byte_fallback=True),
        change(model__unk_token="a"),
        change(pre_tokenizer__pretokenizers__0__behavior="MergedWithNext"),
        change(pre_tokenizer__pretokenizers__1__add_prefix_space=True),
        change(pre_tokenizer__pretokenizers__0__pattern={"Regex": GPT4O_PATTERN}),
        change(pre_tokenizer=None),
    ],
)
def test_what_is_not_known_is_left_to_the_backend(apply):
    content = json.loads(byte_level(GPT4_PATTERN).to_str())
    assert known_pattern(json.dumps(content)) == "gpt4"
    apply(content)
    assert known_pattern(json.dumps(content)) is None


def test_tokens_that_text_may_spell_are_left_to_the_backend():
    backend = byte_level(GPT4_PATTERN)
    backend.add_tokens([AddedToken("fox", special=False)])
    assert known_pattern(backend.to_str()) is None
