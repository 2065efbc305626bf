"""Which text may be shown now: whole characters, and nothing of a stop string."""

import random

import pytest
from helpers.served import chat_tokenizer

from tessera.serving.text_stream import TextStream


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def pieces_of(tokenizer, ids, **given) -> list[str]:
    stream = TextStream(tokenizer, **given)
    return [piece for piece in [*(stream.push(token) for token in ids), stream.end()] if piece]


def test_a_character_comes_whole_with_its_last_byte(tokenizer):
    stream = TextStream(tokenizer)
    assert [stream.push(byte) for byte in "é日😀".encode()] == ["", "é", "", "", "日", "", "", "", "😀"]


@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_of_any_bytes_are_their_text(seed, tokenizer):
    """Valid and broken sequences, as an untrained model writes them; the reference is Python's decoder."""
    draw = random.Random(seed)
    whole = "".join(chr(draw.choice([65, 0xE9, 0x65E5, 0x1F600, 0xFFFD])) for _ in range(60)).encode()
    ids = [byte if draw.random() > 0.1 else draw.randrange(256) for byte in whole]
    assert "".join(pieces_of(tokenizer, ids)) == bytes(ids).decode(errors="replace")


def test_an_unfinished_character_is_shown_as_broken_at_the_end(tokenizer):
    assert pieces_of(tokenizer, "a日".encode()[:-1]) == ["a", "\ufffd"]


def test_hidden_tokens_are_no_text(tokenizer):
    ids = tokenizer("a<think>b<|im_end|>c")["input_ids"]
    assert "".join(pieces_of(tokenizer, ids, hidden=tokenizer.all_special_ids)) == "abc"
    assert "".join(pieces_of(tokenizer, ids)) == "a<think>b<|im_end|>c"


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one. two. three", ["two"], "one. "),
        ("one. two. three", ["three", "two"], "one. "),
        ("one. two. three", ["four"], "one. two. three"),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("wort日本語", ["日本"], "wort"),
        ("ends with tw", ["two"], "ends with tw"),
        ("stop", ["stop"], ""),
    ],
)
def test_text_ends_before_the_first_stop_string(text, stop, shown, tokenizer):
    stream = TextStream(tokenizer, stop=stop)
    out = ""
    for token in tokenizer(text)["input_ids"]:
        out += stream.push(token)
        assert text.startswith(out) and len(out) <= len(shown), "part of a stop string was shown"
    assert out + stream.end() == shown
    assert stream.stopped == (shown != text)


def test_what_may_become_a_stop_string_waits_until_it_does_not(tokenizer):
    stream = TextStream(tokenizer, stop=["END"])
    shown = [stream.push(byte) for byte in b"xEENx"]
    assert shown == ["x", "", "E", "", "ENx"]


def test_a_tokenizer_that_strips_the_first_space_keeps_all_others():
    """Sentencepiece decoders with a dummy prefix drop the first space of whatever they decode."""

    class Stripping:
        words = ["▁the", "▁quick", "▁", "fox", "▁日", "本"]

        def decode(self, ids, **kwargs):
            return "".join(self.words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert "".join(pieces_of(Stripping(), range(6))) == "the quick fox 日本"
    assert "".join(pieces_of(Stripping(), [1, 2, 3], after=[0])) == " quick fox"


def test_a_character_that_the_text_before_begins_is_shown(tokenizer):
    assert "".join(pieces_of(tokenizer, [0xA9, 65], after=[66, 0xC3])) == "\ufffdA"
