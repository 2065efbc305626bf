"""Trained tokenizers against SentencePiece, tiktoken and the text itself; what is on disk; refusals."""

import hashlib
import io
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import sentencepiece
import tiktoken
from tokenizers import pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tessera import cli
from tessera.tokenization import SPECIAL_TOKENS, save_tokenizer, train_tokenizer
from tessera.tokenization.byte_level import byte_level_backend
from tessera.tokenization.sentencepiece_models import read_model
from tessera.tokenization.word_counts import count_words

# cl100k_base's, as tiktoken has it: the possessive form of the pattern that is trained with
TIKTOKEN_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)

SIZE = 700


def encode(tokenizer, text: str) -> list[int]:
    """Ids of a text in which special tokens are words like others."""
    return tokenizer(text, split_special_tokens=True)["input_ids"]


# ---- ids and text ----


def test_every_text_comes_back(tokenizer, kind, texts):
    for text in texts:
        expected = text.replace("\u2581", " ") if kind == "sentencepiece" else text
        assert tokenizer.decode(encode(tokenizer, text)) == expected
        # special tokens that are spelled out come back as well
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == expected


def test_every_character_comes_back(tokenizer):
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    for start in range(0, len(points), 4096):
        text = "".join(map(chr, points[start : start + 4096])).replace("\u2581", "")
        assert tokenizer.decode(encode(tokenizer, text)) == text


def test_sentencepiece_takes_its_mark_of_a_space_for_a_space(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained["sentencepiece"])
    assert encode(tokenizer, "a\u2581b") == encode(tokenizer, "a b")


def test_ids_that_are_no_whole_characters_decode_to_replacement_characters(tokenizer, kind):
    ids = encode(tokenizer, "a\U000f31bbk")
    assert tokenizer.decode(ids) == "a\U000f31bbk"
    # without the first byte: one for each byte that is left, as Python has it
    assert tokenizer.decode([ids[0], *ids[2:]]) == "a\ufffd\ufffd\ufffdk"
    # x has no piece, so that it is a byte among broken ones to the decoder for SentencePiece's
    ids = encode(tokenizer, "\U000f31bbx")
    assert tokenizer.decode(ids[1:]) == "\ufffd" * 3 + ("\ufffd" if kind == "sentencepiece" else "x")


def test_sentencepiece_ids_are_those_of_sentencepiece(trained, texts, corpus):
    tokenizer = AutoTokenizer.from_pretrained(trained["sentencepiece"])
    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(trained["sentencepiece"] / "tokenizer.model")
    )
    for text in [*texts, *corpus]:
        assert encode(tokenizer, text) == reference.encode(text), text
    pieces = [reference.id_to_piece(index) for index in range(len(tokenizer))]
    assert pieces == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))


def test_bpe_ids_are_those_of_tiktoken_with_the_same_ranks(trained, texts, corpus):
    tokenizer = AutoTokenizer.from_pretrained(trained["bpe"])
    byte_of = {name: byte for byte, name in bytes_to_unicode().items()}
    ranks = {
        bytes(byte_of[character] for character in token): index
        for token, index in tokenizer.get_vocab().items()
        if index < SIZE - len(SPECIAL_TOKENS)
    }
    reference = tiktoken.Encoding(
        "trained", pat_str=TIKTOKEN_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    for text in [*texts, *corpus]:
        assert encode(tokenizer, text) == reference.encode_ordinary(text), text


def test_words_become_few_tokens_and_digits_of_sentencepiece_stay_apart(trained, corpus):
    text = corpus[0]
    counts = {kind: len(encode(AutoTokenizer.from_pretrained(path), text)) for kind, path in trained.items()}
    assert counts["bytes"] == len(text.encode())
    assert counts["bpe"] < counts["bytes"] / 2 and counts["sentencepiece"] < counts["bytes"] / 2
    split = AutoTokenizer.from_pretrained(trained["sentencepiece"])
    assert split.convert_ids_to_tokens(encode(split, "12345")) == list("12345")


def test_training_again_gives_the_same_tokenizer(tmp_path, trained, kind, corpus):
    size = SIZE if kind != "bytes" else None
    train_tokenizer(iter(corpus), kind=kind, vocab_size=size, output=tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (trained[kind] / name).read_bytes()


def test_bpe_is_what_the_trainer_of_tokenizers_makes_of_the_text(corpus):
    texts = corpus[:20]  # too few pieces to hold any out
    tokenizer = train_tokenizer(texts, vocab_size=SIZE).backend_tokenizer
    expected = byte_level_backend({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    expected.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    assert model == json.loads(expected.to_str())["model"]


def test_sentencepiece_finds_in_words_what_it_finds_in_the_text(monkeypatch, corpus):
    # without tabs and carriage returns: it leaves out lines that have the one, and the other at their ends
    texts = [
        text.replace("\t", " ").replace("\r", "") + "a <|im_end|>b x<s>y, 12-b  naïve–ü!"
        for text in corpus[:20]
    ]
    train = sentencepiece.SentencePieceTrainer.train
    models = []

    def train_twice(sentence_iterator, model_writer, input_format, **options):
        train(sentence_iterator=sentence_iterator, model_writer=model_writer, input_format="tsv", **options)
        models.append(model_writer.getvalue())
        model = io.BytesIO()
        lines = (line for text in texts for line in text.split("\n") if line)
        train(sentence_iterator=lines, model_writer=model, **options)
        models.append(model.getvalue())

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", train_twice)
    train_tokenizer(texts, kind="sentencepiece", vocab_size=SIZE)
    ours, theirs = (read_model(model, "").pieces for model in models)
    assert ours == theirs and len(ours) == SIZE


def test_words_that_are_left_out_for_want_of_memory_are_reported(monkeypatch, tmp_path, corpus):
    monkeypatch.setattr("tessera.tokenization.train.count_words", partial(count_words, memory=300_000))
    lines: list[str] = []
    train_tokenizer(corpus, vocab_size=400, output=tmp_path / "out", report=lines.append)
    meta = json.loads((tmp_path / "out" / "tokenizer_meta.json").read_text())
    assert meta["words"] > 300 and meta["words_dropped"]["number"] > 300
    sentence = (
        f"{meta['words_dropped']['number']} more are left out, for which there is no memory; each was seen "
        f"{meta['words_dropped']['seen_at_most']} times at most"
    )
    assert sentence in lines


# ---- special tokens ----


def test_special_tokens_have_consecutive_ids_in_their_order(tokenizer, kind):
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    first = 2 if kind == "sentencepiece" else len(tokenizer) - len(SPECIAL_TOKENS)
    assert ids == list(range(first, first + len(SPECIAL_TOKENS)))
    for token, index in zip(SPECIAL_TOKENS, ids, strict=True):
        assert tokenizer(token)["input_ids"] == [index]
        assert index not in encode(tokenizer, f"a{token}b")
        assert tokenizer.decode([index], skip_special_tokens=True) == ""


def test_roles(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|endoftext|>",
        "<|pad|>",
        None,
    )
    batch = tokenizer(["a", "a a a a"], padding=True)
    assert batch["attention_mask"][0][0] == 0 and batch["input_ids"][0][0] == tokenizer.pad_token_id


# ---- on disk ----


def test_the_directory_says_what_it_is(folder, kind, corpus):
    meta = json.loads((folder / "tokenizer_meta.json").read_text())
    assert meta["vocab_size"] == {"bytes": 270}.get(kind, SIZE) and meta["type"] == kind
    assert meta["sha256"] == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert meta["special_tokens"]["<|im_end|>"] == AutoTokenizer.from_pretrained(
        folder
    ).convert_tokens_to_ids("<|im_end|>")
    if kind != "bytes":
        total = sum(len(text.encode()) for text in corpus)
        # all but what was held out, which is a fiftieth of the pieces
        assert 0.9 * total < meta["text_bytes"] < total
        assert meta["source"] == ["made-up words"] and 1.5 < meta["bytes_per_token"] < 10
    assert (folder / "tokenizer.model").is_file() == (kind == "sentencepiece")


def test_loads_without_this_package(folder, tokenizer):
    script = (
        "import json, sys\n"
        "sys.modules['tessera'] = None\n"
        "from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "chat = [{'role': 'user', 'content': 'ka 東'}]\n"
        "print(json.dumps([tokenizer('ka ren\\n  東 🙂<|im_end|>')['input_ids'],\n"
        "    tokenizer.apply_chat_template(chat, add_generation_prompt=True)['input_ids']]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    ids, chat = json.loads(done.stdout)
    assert ids == tokenizer("ka ren\n  東 🙂<|im_end|>")["input_ids"]
    assert tokenizer.decode(chat) == "<|im_start|>user\nka 東<|im_end|>\n<|im_start|>assistant\n"


def test_what_loads_as_something_else_is_not_written(tmp_path, tokenizer, monkeypatch):
    other = train_tokenizer(kind="bytes")
    other.add_tokens(["one more"])
    monkeypatch.setattr("tessera.tokenization.save.AutoTokenizer.from_pretrained", lambda folder: other)
    with pytest.raises(ValueError, match="not the same after saving"):
        save_tokenizer(tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- the command ----


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        cli.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return exit.value.code or 0, out, err


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_the_command_trains_on_files_and_reports(tmp_path, capsys, corpus, kind):
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("".join(corpus[number::2]), encoding="utf-8")
    data = ["--data", tmp_path / "0.txt", "--data", tmp_path / "1.txt", "--limit-mb", "1"]
    size = ["--type", kind, "--vocab-size", "500"]
    code, out, err = run(capsys, "tokenizer", "train", *data, *size, "--output", tmp_path / "new" / "tok")
    assert (code, err) == (0, "")
    assert "bytes per token on held-out text" in out and "500 tokens" in out
    assert len(AutoTokenizer.from_pretrained(tmp_path / "new" / "tok")) == 500
    assert json.loads((tmp_path / "new/tok/tokenizer_meta.json").read_text())["source"] == ["0.txt", "1.txt"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--type", "wordpiece"], "no tokenizer type 'wordpiece'; choose one of bpe, sentencepiece, bytes"),
        (["--vocab-size", "269"], "269 is too small: 256 bytes and the special tokens are 270"),
        (["--type", "sentencepiece", "--vocab-size", "271"], "too small: 256 bytes"),
        (["--type", "sentencepiece", "--vocab-size", "273"], "too small: the bytes, the special tokens"),
        (["--vocab-size", "9000"], "too large for 3000 bytes of text, which gives 2"),
        (
            ["--type", "sentencepiece", "--vocab-size", "9000"],
            "too large for 3000 bytes of text, which gives",
        ),
        (["--type", "bytes", "--vocab-size", "300"], "a byte tokenizer has 270 tokens, not 300"),
        (["--limit-mb", "-1"], "--limit-mb must be 0 (all) or more, got -1"),
        (["--column", "words"], "words"),
        (["--type", "sentencepiece", "--column", "words"], "words"),
    ],
)
def test_mistakes_end_with_one_sentence_and_write_nothing(tmp_path, capsys, arguments, sentence):
    (tmp_path / "a.jsonl").write_text('{"text": "' + "abc def ghi jk " * 200 + '"}\n')
    folder = tmp_path / "out"
    code, _, err = run(
        capsys, "tokenizer", "train", "--data", tmp_path / "a.jsonl", "--output", folder, *arguments
    )
    assert code == 2 and err.startswith("tessera: error: ") and err.count("\n") == 1
    assert sentence in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    code, _, err = run(capsys, "tokenizer", "train", "--type", "bytes", "--output", tmp_path)
    assert code == 2 and "exists already" in err
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_no_text_is_refused(kind):
    with pytest.raises(ValueError, match="no text to train"):
        train_tokenizer([], kind=kind)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_an_error_of_the_reader_is_the_error_of_training(kind):
    def broken():
        yield "some text " * 100
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="^the disk is gone$"):
        train_tokenizer(broken(), kind=kind, vocab_size=300)


def test_what_is_there_is_seen_before_the_text_is_read_and_before_saving(tmp_path, tokenizer):
    (tmp_path / "notes").write_text("mine")

    def unread():
        raise AssertionError("the text was read")
        yield

    with pytest.raises(ValueError, match="exists already"):
        train_tokenizer(unread(), output=tmp_path)
    with pytest.raises(ValueError, match="exists already"):
        save_tokenizer(tokenizer, tmp_path)
