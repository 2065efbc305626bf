"""The byte tokenizer against Python's own `bytes`, and its fast path against what AutoTokenizer loads."""

import copy
import inspect
import json
import pickle
import random
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tessera.tokenization import ByteTokenizer, build_byte_tokenizer

SPECIALS = {
    "bos_token": "<|begin|>",
    "eos_token": "<|end|>",
    "pad_token": "<|pad|>",
    "extra_special_tokens": ["<|user|>", "<｜two words｜>"],
}
BOS, EOS, PAD, USER, TWO_WORDS = range(256, 261)

TEXTS = {
    "empty": "",
    "ascii": "The quick brown fox.",
    "spaces": "  leading, trailing  \n\n\t ",
    "multibyte": "naïve Straße — 東京 🙂 e\u0301",
    "control": "\x00\x01\x1f\x7f\x85\ufeff\u2028\uffff",
    "byte names": "Ġ Ċ Ā ń ¡ÿ",
    "special tokens": "<|begin|>hello <|user|>é<|end|> <｜two words｜>",
    "half a special token": "<|begin",
}

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}|{% endgeneration %}{% else %}{{ m.content }}>{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "née?"},
    {"role": "assistant", "content": "oui 🙂"},
    {"role": "user", "content": "bon"},
    {"role": "assistant", "content": "là"},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("byte_tokenizer")
    build_byte_tokenizer(**SPECIALS, model_max_length=1_000_000).save_pretrained(directory)
    return directory


@pytest.fixture
def fast(directory: Path) -> ByteTokenizer:
    return ByteTokenizer.from_pretrained(directory)


@pytest.fixture
def plain(directory: Path) -> PreTrainedTokenizerBase:
    """What the world loads from the directory: the backend without our class."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert type(tokenizer) is PreTrainedTokenizerFast
    return tokenizer


@pytest.fixture
def without_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes whatever falls back to the backend fail."""

    def fail(self: PreTrainedTokenizerFast, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the backend was called")

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", fail)
    monkeypatch.setattr(PreTrainedTokenizerFast, "_decode", fail)


def random_byte_sequences(count: int) -> list[bytes]:
    """Random bytes, and valid UTF-8 that was cut or damaged: the hard cases of replacement."""
    rng = random.Random(20240229)
    valid = "aé€🙂\u07ff\u0800\uffff\U0010ffff".encode()
    leads = [
        0x7F,
        0x80,
        0xBF,
        0xC0,
        0xC1,
        0xC2,
        0xE0,
        0xED,
        0xEF,
        0xF0,
        0xF4,
        0xF5,
        0xFF,
        0x9F,
        0xA0,
        0x8F,
        0x90,
    ]
    sequences = []
    for index in range(count):
        length = rng.randrange(1, 24)
        if index % 3 == 0:
            sequences.append(rng.randbytes(length))
        elif index % 3 == 1:
            sequences.append(bytes(rng.choices(leads, k=length)))
        else:
            start = rng.randrange(len(valid))
            damaged = bytearray((valid * 2)[start : start + length])
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            sequences.append(bytes(damaged))
    return sequences


def outcome(tokenizer: PreTrainedTokenizerBase, method: str, *args: Any, **kwargs: Any) -> Any:
    """What a method gives, in comparable form, or the type of what it raises."""
    try:
        result = getattr(tokenizer, method)(*args, **kwargs)
    except Exception as error:
        return type(error)
    if isinstance(result, BatchEncoding):
        return {name: comparable(values) for name, values in result.items()}
    return comparable(result)


def comparable(values: Any) -> Any:
    if isinstance(values, (np.ndarray, torch.Tensor)):
        rows = [comparable(row) for row in values] if values.dtype == object else values.tolist()
        return type(values).__name__, str(values.dtype), rows
    return values


def best_time(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of several runs: other work on the machine can only add to it."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


# ---- vocabulary ----


def test_vocabulary_is_exactly_the_256_bytes() -> None:
    tokenizer = build_byte_tokenizer()
    assert tokenizer.vocab_size == len(tokenizer) == len(tokenizer.get_vocab()) == 256
    assert sorted(tokenizer.get_vocab().values()) == list(range(256))
    assert tokenizer.all_special_tokens == []


def test_each_id_is_its_byte(fast: ByteTokenizer, plain: PreTrainedTokenizerBase) -> None:
    for byte in range(256):
        assert fast.decode_bytes([byte]) == bytes([byte])
        text = bytes([byte]).decode(errors="replace")
        assert fast.decode([byte]) == plain.decode([byte]) == text
    for byte in range(128):
        assert fast.encode(chr(byte)) == plain.encode(chr(byte)) == [byte]
    # the upper half occurs only inside characters
    points = [*range(0x80, 0x800), *range(0x800, 0x110000, 64)]
    text = "".join(chr(point) for point in points if not 0xD800 <= point <= 0xDFFF)
    impossible = {0xC0, 0xC1, *range(0xF5, 0x100)}  # never in UTF-8
    assert set(text.encode()) == set(range(0x80, 0x100)) - impossible
    assert fast.encode(text) == plain.encode(text) == list(text.encode())


def test_every_character_of_unicode_makes_the_round_trip(fast: ByteTokenizer) -> None:
    text = "".join(chr(point) for point in range(0x110000) if not 0xD800 <= point <= 0xDFFF)
    ids = fast.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert fast.decode(ids) == text


def test_the_saved_file_round_trips_characters_of_all_planes(plain: PreTrainedTokenizerBase) -> None:
    points = [*range(0x300), *range(0x300, 0x110000, 61), *range(0xFFFF, 0x110000, 0x10000)]
    text = "".join(chr(point) for point in points if not 0xD800 <= point <= 0xDFFF)
    assert {ord(character) >> 16 for character in text} == set(range(17))
    assert {"Cc", "Cf", "Mn", "Zs", "So", "Co", "Cn"} <= {
        unicodedata.category(character) for character in text
    }
    ids = plain.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert plain.decode(ids) == text


# ---- invalid UTF-8 ----


@pytest.mark.parametrize("kind", ["fast", "plain"])
def test_decoding_replaces_invalid_utf8_as_python_does(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    sequences = random_byte_sequences(6000)
    expected = [data.decode("utf-8", errors="replace") for data in sequences]
    assert sum("\ufffd" in text for text in expected) > 3000
    assert [tokenizer.decode(list(data)) for data in sequences] == expected
    assert tokenizer.batch_decode([list(data) for data in sequences]) == expected


def test_bytes_make_the_round_trip_even_if_they_are_no_text(fast: ByteTokenizer) -> None:
    for data in [b"", bytes(range(256)), *random_byte_sequences(3000)]:
        ids = fast.encode_bytes(data)
        assert ids.dtype == np.uint8
        assert ids.tolist() == list(data)
        for form in (
            ids,
            ids.tolist(),
            tuple(ids.tolist()),
            ids.astype(np.int64),
            torch.tensor(ids.tolist()).long(),
        ):
            assert fast.decode_bytes(form) == data


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_corpus_is_encoded_without_looking_for_special_tokens(kind: type, fast: ByteTokenizer) -> None:
    text = TEXTS["special tokens"]
    assert fast.encode_bytes(text).tolist() == list(text.encode())
    assert fast.encode_bytes(kind(text.encode())).tolist() == list(text.encode())


# ---- special tokens ----


def test_special_tokens_come_after_the_bytes_in_the_documented_order(fast: ByteTokenizer) -> None:
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (BOS, EOS, PAD)
    assert fast.convert_tokens_to_ids(["<|user|>", "<｜two words｜>"]) == [USER, TWO_WORDS]
    assert fast.all_special_ids == [BOS, EOS, PAD, USER, TWO_WORDS]
    assert (fast.vocab_size, len(fast)) == (256, 261)


def test_special_tokens_that_are_not_given_take_no_id() -> None:
    tokenizer = build_byte_tokenizer(extra_special_tokens=["<x>"], pad_token="<pad>")
    assert (tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<x>"), len(tokenizer)) == (256, 257, 258)
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token is None


def test_special_tokens_in_a_text_become_their_ids_and_back(fast: ByteTokenizer) -> None:
    ids = fast.encode("<|begin|>é<|user|><｜two words｜>")
    assert ids == [BOS, 0xC3, 0xA9, USER, TWO_WORDS]
    assert fast.decode(ids) == "<|begin|>é<|user|><｜two words｜>"
    assert fast.decode_bytes(ids) == "<|begin|>é<|user|><｜two words｜>".encode()


def test_split_special_tokens_encodes_their_text_as_bytes(
    fast: ByteTokenizer, plain: PreTrainedTokenizerBase
) -> None:
    text = TEXTS["special tokens"]
    for tokenizer in (fast, plain):
        assert tokenizer.encode(text, split_special_tokens=True) == list(text.encode())
        assert tokenizer.encode(text)[0] == BOS
        tokenizer.split_special_tokens = True
        assert tokenizer(text)["input_ids"] == tokenizer.encode(text) == list(text.encode())


def test_skipping_special_tokens_joins_the_bytes_around_them(
    fast: ByteTokenizer, plain: PreTrainedTokenizerBase
) -> None:
    ids = [BOS, 0xC3, USER, 0xA9, EOS]  # é, with a token between its two bytes
    for tokenizer in (fast, plain):
        assert tokenizer.decode(ids, skip_special_tokens=True) == "é"
        assert tokenizer.decode(ids) == "<|begin|>\ufffd<|user|>\ufffd<|end|>"
    assert fast.decode_bytes(ids, skip_special_tokens=True) == "é".encode()
    assert fast.decode_bytes(ids) == b"<|begin|>\xc3<|user|>\xa9<|end|>"


def test_added_tokens_are_seen_by_the_fast_path(fast: ByteTokenizer, plain: PreTrainedTokenizerBase) -> None:
    for tokenizer in (fast, plain):
        tokenizer.add_tokens(["fox", "né"])  # not special: kept whole with split_special_tokens too
        tokenizer.add_special_tokens({"cls_token": "<cls>"})
        tokenizer.pad_token_id = 0
    texts = ["a fox<cls>", "né", "no such thing"]
    for options in ({}, {"split_special_tokens": True}):
        assert dict(fast(texts, **options)) == dict(plain(texts, **options))
    ids = [261, 0, 262, 99, 263]
    for options in ({}, {"skip_special_tokens": True}):
        assert fast.decode(ids, **options) == plain.decode(ids, **options)


def test_a_byte_that_became_a_special_token_is_skipped_as_by_the_backend(
    fast: ByteTokenizer, plain: PreTrainedTokenizerBase
) -> None:
    for tokenizer in (fast, plain):
        tokenizer.add_special_tokens({"pad_token": "Ā"})  # the vocabulary's name of byte 0
        assert tokenizer.pad_token_id == 0
        assert tokenizer.decode([0, 97, 0], skip_special_tokens=True) == "a"
        assert tokenizer.decode([0, 97, 0]) == "\0a\0"
        assert tokenizer.encode("Āb") == [0, 98]


# ---- batches ----


def test_a_batch_is_padded_on_the_left(fast: ByteTokenizer, plain: PreTrainedTokenizerBase) -> None:
    for tokenizer in (fast, plain):
        batch = tokenizer(["abc", "é", ""], padding=True, return_tensors="pt")
        assert batch["input_ids"].tolist() == [[97, 98, 99], [PAD, 0xC3, 0xA9], [PAD, PAD, PAD]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 0]]
        assert batch["input_ids"].dtype == torch.int64
        assert set(batch) == {"input_ids", "attention_mask"}


def test_padding_side_is_what_was_asked_for(tmp_path: Path) -> None:
    build_byte_tokenizer(pad_token="<pad>", padding_side="right").save_pretrained(tmp_path)
    batch = AutoTokenizer.from_pretrained(tmp_path)(["abc", "d"], padding=True)
    assert batch["input_ids"] == [[97, 98, 99], [100, 256, 256]]


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_tensors_come_from_the_fast_path(kind: str, fast: ByteTokenizer, without_backend: None) -> None:
    batch = fast(["abc", "né"], return_tensors=kind)
    assert batch["input_ids"].tolist() == [[97, 98, 99], [110, 0xC3, 0xA9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1]] * 2
    assert str(batch["input_ids"].dtype).endswith("int64")
    assert isinstance(batch["input_ids"], {"pt": torch.Tensor, "np": np.ndarray}[kind])


# ---- fast path and backend ----


def test_the_fast_path_does_without_the_backend(fast: ByteTokenizer, without_backend: None) -> None:
    text = TEXTS["multibyte"]
    ids = list(text.encode())
    assert dict(fast(text)) == {"input_ids": ids, "attention_mask": [1] * len(ids)}
    assert fast([text, "b"])["input_ids"] == [ids, [98]]
    assert fast.encode(TEXTS["special tokens"], split_special_tokens=True) == list(
        TEXTS["special tokens"].encode()
    )
    for form in (ids, tuple(ids), np.array(ids), np.array(ids, np.uint8), torch.tensor(ids)):
        assert fast.decode(form) == text
    assert fast.decode([ids, [98, EOS]]) == [text, "b<|end|>"]
    assert fast.decode([*ids, EOS], skip_special_tokens=True) == text


OPTIONS = [
    {},
    {"add_special_tokens": False},
    {"split_special_tokens": True},
    {"return_attention_mask": False},
    {"return_token_type_ids": True},
    {"return_tensors": "np"},
    {"return_tensors": "pt"},
    {"return_tensors": "pt", "padding": True},
    {"padding": "max_length", "max_length": 40},
    {"padding": True, "pad_to_multiple_of": 8, "padding_side": "right"},
    {"truncation": True, "max_length": 5},
    {"max_length": 5},
    {"truncation": True},
    {"truncation": True, "max_length": 7, "stride": 1, "return_overflowing_tokens": True},
    {"return_offsets_mapping": True},
    {"return_special_tokens_mask": True},
    {"return_length": True},
    {"is_split_into_words": True},
    {"pad_to_multiple_of": 8, "verbose": False},
    {"text_pair": "pair"},
    {"text_pair": ["a", "b"]},
    {"return_tensors": "no such kind"},
    {"padding": "no such kind"},
]
INPUTS: list[Any] = [
    *TEXTS.values(),
    list(TEXTS.values()),
    ["plain", "texts"],
    ("same", "size"),
    ["", ""],
    [],
    (),
    [[]],
    [["pre", "tokenized"], ["words"]],
    [("a", "pair"), ("b", "pair")],
    "lone surrogate \ud800",
    ["good", "bad \udfff"],
    None,
    7,
    [7],
    b"bytes",
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("around", ["nothing", "bos", "bos and eos"])
def test_encoding_equals_the_backend(
    around: str, options: dict[str, Any], fast: ByteTokenizer, plain: PreTrainedTokenizerBase
) -> None:
    for tokenizer in (fast, plain):
        tokenizer.add_bos_token = "bos" in around
        tokenizer.add_eos_token = "eos" in around
    for text in INPUTS:
        for method in ("__call__", "encode"):
            assert outcome(fast, method, text, **options) == outcome(plain, method, text, **options), text


DECODABLE: list[Any] = [
    [],
    [[]],
    65,
    [65, 66],
    (0xC3, 0xA9),
    [BOS, 0xC3, USER, 0xA9, TWO_WORDS, PAD, EOS],
    [[65, EOS], [0xF0, 0x9F]],
    [261, 65, 5000],  # beyond the vocabulary, as a padded embedding can give
    [-1],
    [2**40],
    [1.5],
    ["a"],
    "text",
    b"bytes",
    None,
    [True, 66],
    {"input_ids": [65]},
    BatchEncoding({"input_ids": [65]}),
    np.array([65, 256, 300]),
    np.array([65, 66], dtype=np.uint8),
    np.array([[65, 66], [67, 256]]),
    np.array([65.0]),
    np.array(65),
    np.array([], dtype=np.int64),
    [np.int64(65), np.int64(256)],
    torch.tensor([65, 256]),
    torch.tensor([[65, 66], [67, 256]]),
    torch.tensor([65.0], dtype=torch.bfloat16),
    torch.tensor(65),
    [torch.tensor(65), torch.tensor(66)],
    [torch.tensor([65, 66]), torch.tensor([67])],
]


@pytest.mark.parametrize(
    "options", [{}, {"skip_special_tokens": True}, {"clean_up_tokenization_spaces": True}], ids=str
)
@pytest.mark.parametrize("method", ["decode", "batch_decode"])
def test_decoding_equals_the_backend(
    method: str, options: dict[str, Any], fast: ByteTokenizer, plain: PreTrainedTokenizerBase
) -> None:
    for token_ids in [*DECODABLE, fast("a text"), fast(["two", "texts"])]:
        ours, theirs = (outcome(tokenizer, method, token_ids, **options) for tokenizer in (fast, plain))
        assert ours == theirs, token_ids


def test_cleaning_up_spaces_is_left_to_the_backend(
    fast: ByteTokenizer, plain: PreTrainedTokenizerBase
) -> None:
    ids = list(b"Well , it is n't .")
    for tokenizer in (fast, plain):
        tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
        assert tokenizer.decode(ids) == "Well , it is n't ."
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == "Well, it isn't."
        tokenizer.clean_up_tokenization_spaces = True
        assert tokenizer.decode(ids) == "Well, it isn't."


def test_the_fast_path_forgets_the_padding_of_the_call_before(fast: ByteTokenizer) -> None:
    fast.add_bos_token = True
    fast.add_eos_token = True
    assert fast("a", padding="max_length", max_length=6)["input_ids"] == [PAD, PAD, PAD, BOS, 97, EOS]
    assert fast("abc", max_length=2)["input_ids"] == [BOS, EOS]
    assert fast("abc")["input_ids"] == [BOS, 97, 98, 99, EOS]
    assert fast("abc", add_special_tokens=False)["input_ids"] == [97, 98, 99]


def test_tokens_words_and_offsets_are_those_of_the_backend(
    fast: ByteTokenizer, plain: PreTrainedTokenizerBase
) -> None:
    fast.add_bos_token = plain.add_bos_token = True
    texts = ["né <3", "東京"]
    for ours, theirs in ((fast(texts), plain(texts)), (fast(texts[0]), plain(texts[0]))):
        assert ours.n_sequences == theirs.n_sequences
        for one in (ours, copy.copy(ours), pickle.loads(pickle.dumps(ours))):
            assert one.tokens() == theirs.tokens()
            assert one.word_ids() == theirs.word_ids()
            assert one.sequence_ids() == theirs.sequence_ids()
            assert one.char_to_token(2) == theirs.char_to_token(2)
            assert one.token_to_chars(2) == theirs.token_to_chars(2)
            assert one[0].offsets == theirs[0].offsets
            assert len(one.encodings) == len(theirs.encodings)
            assert one.is_fast
    assert fast.tokenize(texts[0]) == plain.tokenize(texts[0])
    for options in ({"split_special_tokens": True}, {"add_special_tokens": False}):
        ours, theirs = (tokenizer("<|end|>", **options) for tokenizer in (fast, plain))
        assert ours.tokens() == theirs.tokens()


def test_a_text_longer_than_the_model_takes_is_warned_of(without_backend: None) -> None:
    tokenizer = build_byte_tokenizer(model_max_length=4)
    tokenizer("abcd")
    assert tokenizer.deprecation_warnings == {}
    tokenizer("abcde")
    assert tokenizer.deprecation_warnings == {"sequence-length-is-longer-than-the-specified-maximum": True}


# ---- chats ----


@pytest.mark.parametrize("options", [{}, {"return_tensors": "np"}], ids=str)
def test_assistant_masks_cover_just_the_assistant(
    options: dict[str, Any], fast: ByteTokenizer, plain: PreTrainedTokenizerBase
) -> None:
    template = {"chat_template": CHAT_TEMPLATE, "return_assistant_tokens_mask": True}
    encoded = fast.apply_chat_template(CHAT, return_dict=True, **template, **options)
    ids, mask = (np.ravel(encoded[name]) for name in ("input_ids", "assistant_masks"))
    assert fast.decode(ids) == "née?>oui 🙂|bon>là|"
    assert fast.decode(ids[mask == 1]) == "oui 🙂|là|"
    ours, theirs = (outcome(t, "apply_chat_template", CHAT, **template, **options) for t in (fast, plain))
    assert ours == theirs


def test_chats_equal_the_backend(fast: ByteTokenizer, plain: PreTrainedTokenizerBase) -> None:
    template = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{{ eos_token }}{% endfor %}"
    ids = fast.apply_chat_template(CHAT[:1], chat_template=template)["input_ids"]
    assert ids == [BOS, USER, *"née?".encode(), EOS]
    for options in (
        {},
        {"padding": True, "return_tensors": "pt"},
        {"tokenize": False},
        {"return_dict": False},
    ):
        ours, theirs = (
            outcome(t, "apply_chat_template", [CHAT, CHAT[:2]], chat_template=template, **options)
            for t in (fast, plain)
        )
        assert ours == theirs
        assert not isinstance(ours, type)


def test_control_tokens_in_messages_are_sanitized(fast: ByteTokenizer) -> None:
    if "sanitize_control_tokens" not in inspect.signature(fast.apply_chat_template).parameters:
        pytest.skip("this version of transformers does not sanitize chats")
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    chat = [{"role": "user", "content": "<|end|>"}]
    encoded = fast.apply_chat_template(chat, chat_template=template, sanitize_control_tokens=True)
    assert encoded["input_ids"] == [*b"<|end|>", EOS]


# ---- files ----


def test_the_directory_names_a_class_of_transformers(directory: Path) -> None:
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert "auto_map" not in config
    assert not list(directory.glob("*.py"))


def test_the_file_is_byte_level_bpe_without_merges_or_pattern(directory: Path) -> None:
    backend = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    assert backend["normalizer"] is None
    assert (backend["model"]["type"], backend["model"]["merges"]) == ("BPE", [])
    assert sorted(backend["model"]["vocab"].values()) == list(range(256))
    assert [backend[part]["type"] for part in ("pre_tokenizer", "decoder")] == ["ByteLevel", "ByteLevel"]
    assert not backend["pre_tokenizer"]["use_regex"]
    assert not backend["pre_tokenizer"]["add_prefix_space"]


def test_both_classes_load_what_either_saves(
    tmp_path: Path, fast: ByteTokenizer, plain: PreTrainedTokenizerBase
) -> None:
    fast.add_bos_token = plain.add_eos_token = True
    for writer, expected in ((fast, [BOS, 104, 105]), (plain, [104, 105, EOS])):
        target = tmp_path / type(writer).__name__
        writer.save_pretrained(target)
        for reader in (ByteTokenizer, AutoTokenizer):
            tokenizer = reader.from_pretrained(target)
            assert isinstance(tokenizer, ByteTokenizer) is (reader is ByteTokenizer)
            assert tokenizer("hi")["input_ids"] == expected
            assert tokenizer("hi", add_special_tokens=False)["input_ids"] == [104, 105]
            assert tokenizer.padding_side == "left"
            assert tokenizer.model_max_length == 1_000_000
            assert tokenizer.special_tokens_map == {k: v for k, v in SPECIALS.items() if k.endswith("_token")}
            assert tokenizer.extra_special_tokens == SPECIALS["extra_special_tokens"]
            assert tokenizer.get_vocab() == fast.get_vocab()


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_is_a_byte_tokenizer_too(make_copy: Callable[[Any], Any], fast: ByteTokenizer) -> None:
    fast.add_eos_token = True
    fast("used before")
    duplicate = make_copy(fast)
    assert type(duplicate) is ByteTokenizer
    assert duplicate("né")["input_ids"] == [110, 0xC3, 0xA9, EOS]
    assert duplicate.decode([110, 0xFF, EOS]) == "n\ufffd<|end|>"


def test_a_process_without_this_package_loads_the_directory(directory: Path, tmp_path: Path) -> None:
    cases = random_byte_sequences(2000)
    texts = [text for text in TEXTS.values() if text]
    (tmp_path / "cases.json").write_text(json.dumps({"ids": [list(data) for data in cases], "texts": texts}))
    program = """
import json, sys
sys.modules["tessera"] = None  # whoever imports it gets an ImportError
from transformers import AutoTokenizer, __version__
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
cases = json.load(open(sys.argv[2]))
print(json.dumps({
    "class": type(tokenizer).__module__.split(".")[0] + " " + type(tokenizer).__name__,
    "ids": [tokenizer.encode(text, split_special_tokens=True) for text in cases["texts"]],
    "specials": tokenizer.encode("<|begin|>a<|pad|>"),
    "decoded": [tokenizer.decode(ids) for ids in cases["ids"]],
    "skipped": tokenizer.decode([256, 97, 257], skip_special_tokens=True),
    "padded": tokenizer(["abc", "d"], padding=True)["input_ids"],
    "len": len(tokenizer),
}))
"""
    process = subprocess.run(
        [sys.executable, "-I", "-c", program, str(directory), str(tmp_path / "cases.json")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)},
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["class"].startswith("transformers ")
    assert result["ids"] == [list(text.encode()) for text in texts]
    assert result["specials"] == [BOS, 97, PAD]
    assert result["decoded"] == [data.decode("utf-8", errors="replace") for data in cases]
    assert result["skipped"] == "a"
    assert result["padded"] == [[97, 98, 99], [PAD, PAD, 100]]
    assert result["len"] == 261


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bos_token": ""}, "at least one character"),
        ({"extra_special_tokens": ["<x>", ""]}, "at least one character"),
        ({"extra_special_tokens": [3]}, "must be a string"),
        ({"bos_token": "<s>", "eos_token": "<s>"}, "'<s>' is given twice"),
        ({"pad_token": "<s>", "extra_special_tokens": ["<s>"]}, "'<s>' is given twice"),
        ({"extra_special_tokens": ["<x>", "<x>"]}, "'<x>' is given twice"),
        ({"eos_token": "a"}, "'a' is a single byte"),
        ({"eos_token": "\n"}, "is a single byte"),
        ({"eos_token": " "}, "is a single byte"),
        ({"eos_token": "Ġ"}, "name of one in the vocabulary"),
        ({"eos_token": "é"}, "name of one in the vocabulary"),
        ({"eos_token": "<fermé>"}, "would not be decoded to its own text"),
        ({"extra_special_tokens": "<x>"}, "list of strings"),
        ({"padding_side": "top"}, "top"),
        ({"model_max_length": 0}, "model_max_length must be at least 1"),
    ],
    ids=str,
)
def test_impossible_tokenizers_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_byte_tokenizer(**arguments)


def test_every_name_of_a_byte_is_refused_as_a_special_token() -> None:
    for token in build_byte_tokenizer().get_vocab():
        with pytest.raises(ValueError, match="name of one in the vocabulary"):
            build_byte_tokenizer(pad_token=token)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([65, 300], "id 300 is not in the vocabulary of 261 tokens"),
        ([-1], "id -1 is not in the vocabulary"),
        (np.array([65, -1]), "id -1 is not in the vocabulary"),
        ([65.0], "integer ids"),
        (65, "integer ids"),
        ("65", "integer ids"),
        (np.zeros((2, 2), dtype=int), "one sequence of integer ids"),
    ],
    ids=str,
)
def test_decode_bytes_refuses_what_stands_for_no_bytes(
    token_ids: Any, message: str, fast: ByteTokenizer
) -> None:
    with pytest.raises(ValueError, match=message):
        fast.decode_bytes(token_ids)


@pytest.mark.parametrize("data", [5, None, ["a"], "\ud800"], ids=repr)
def test_encode_bytes_refuses_what_has_no_bytes(data: Any, fast: ByteTokenizer) -> None:
    with pytest.raises(ValueError):
        fast.encode_bytes(data)


def test_other_tokenizers_are_refused(tmp_path: Path, fast: ByteTokenizer) -> None:
    backend = Tokenizer.from_str(fast.backend_tokenizer.to_str())
    names = pre_tokenizers.ByteLevel.alphabet()
    # 256 single bytes as well, but in the order of the alphabet, as a BPE trainer numbers them
    backend.model = models.BPE(vocab={name: index for index, name in enumerate(sorted(names))}, merges=[])
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "shuffled")
    with pytest.raises(ValueError, match="not a byte tokenizer"):
        ByteTokenizer.from_pretrained(tmp_path / "shuffled")

    trained = fast.train_new_from_iterator([["the cat sat on the mat"] * 9], vocab_size=300)
    for call in (
        lambda: trained("the cat"),
        lambda: trained.encode_bytes(b"a"),
        lambda: trained.decode_bytes([1]),
    ):
        with pytest.raises(ValueError, match="not a byte tokenizer"):
            call()

    prefixing = Tokenizer.from_str(fast.backend_tokenizer.to_str())
    prefixing.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    prefixing.decoder = decoders.ByteLevel()
    with pytest.raises(ValueError, match="not a byte tokenizer"):
        ByteTokenizer(tokenizer_object=prefixing)("a")


# ---- speed ----


def test_the_fast_path_is_many_times_faster_than_the_backend(
    fast: ByteTokenizer, plain: PreTrainedTokenizerBase
) -> None:
    text = "The quick brown fox — naïve 東京 🙂.\n" * 22_000
    assert len(text.encode()) > 950_000
    ids = fast.encode(text)
    array = np.array(ids)

    # measured: 75 times for encoding; 20 and 40 for decoding a list and an array
    assert best_time(lambda: plain(text), 1) > 20 * best_time(lambda: fast(text), 5)
    assert best_time(lambda: plain.decode(ids), 2) > 5 * best_time(lambda: fast.decode(ids), 5)
    assert best_time(lambda: plain.decode(array), 2) > 5 * best_time(lambda: fast.decode(array), 5)
