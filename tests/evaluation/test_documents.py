"""Held-out text as documents and as the stream that training makes of it."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from tessera import build_byte_tokenizer, cli
from tessera.evaluation.documents import read_held_out, start_token
from tessera.training.inputs import encode

from .conftest import TEXT, bpe_tokenizer

# The last ends with the line break that is the separator of bytes.
DOCUMENTS = [f"{i}. {TEXT}" for i in range(8)] + ["8. The end.\n"]
TOKENIZERS = {
    "bpe": bpe_tokenizer,
    "bytes": build_byte_tokenizer,
    "bytes with eos": lambda: build_byte_tokenizer(eos_token="<|endoftext|>"),
}


def write_documents(folder) -> str:
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_stream_is_the_one_that_training_makes(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    found = read_held_out(write_documents(tmp_path), tokenizer)
    expected = encode(tokenizer, [text.encode() for text in DOCUMENTS])
    assert np.array_equal(found.stream.ids, expected.ids)
    assert found.stream.num_bytes == expected.num_bytes
    assert [tokenizer.decode(document.ids) for document in found.documents] == DOCUMENTS
    assert [document.num_bytes for document in found.documents] == [len(t.encode()) for t in DOCUMENTS]


# Without starts and end-of-text nobody knows where a document of bytes ends.
@pytest.mark.parametrize(
    ("name", "with_starts"),
    [("bpe", True), ("bpe", False), ("bytes", True), ("bytes with eos", True), ("bytes with eos", False)],
)
def test_a_prepared_folder_gives_the_documents_that_it_was_made_of(name, with_starts, tmp_path):
    tokenizer = TOKENIZERS[name]()
    (tmp_path / "val").mkdir()
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "x.txt").write_text(TEXT * 40, encoding="utf-8")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = ["--data", tmp_path / "train", "--val-data", write_documents(tmp_path / "val")]
    arguments += ["--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "out", "--filters", "none"]
    result = CliRunner().invoke(cli.app, ["data", "prepare", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    if not with_starts:
        (tmp_path / "out" / "val.idx").unlink()
        meta = json.loads((tmp_path / "out" / "data_meta.json").read_text())
        del meta["val"]["documents"]
        (tmp_path / "out" / "data_meta.json").write_text(json.dumps(meta))
    found = read_held_out(str(tmp_path / "out"), tokenizer)
    expected = read_held_out(str(tmp_path / "val"), tokenizer)
    assert np.array_equal(found.stream.ids, expected.stream.ids)
    assert found.stream.num_bytes == expected.stream.num_bytes
    for ours, theirs in zip(found.documents, expected.documents, strict=True):
        assert np.array_equal(ours.ids, theirs.ids)
        assert (ours.words, ours.num_bytes) == (theirs.words, theirs.num_bytes)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("bpe", "bytes"), ("bytes", "bpe"), ("bytes", "bytes with eos")]
)
def test_a_folder_prepared_with_another_tokenizer_is_refused(theirs, ours, tmp_path):
    np.arange(9, dtype="<u2").tofile(tmp_path / "train.bin")
    np.arange(9, dtype="<u2").tofile(tmp_path / "val.bin")
    (tmp_path / "data_meta.json").write_text('{"dtype": "uint16", "val": {"bytes": 9}}')
    TOKENIZERS[theirs]().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="was prepared with another tokenizer than the model's"):
        read_held_out(str(tmp_path), TOKENIZERS[ours]())


def test_what_stands_before_a_text_is_bos_or_eos_or_a_line_break():
    assert start_token(build_byte_tokenizer(bos_token="<s>", eos_token="</s>")) == 256
    assert start_token(build_byte_tokenizer(eos_token="</s>")) == 256
    assert start_token(build_byte_tokenizer()) == ord("\n")


def test_text_that_spells_a_control_token_is_text(tmp_path):
    tokenizer = bpe_tokenizer()
    (tmp_path / "x.txt").write_text("what <|endoftext|> says\n", encoding="utf-8")
    [document] = read_held_out(str(tmp_path / "x.txt"), tokenizer).documents
    assert tokenizer.eos_token_id not in document.ids
    assert tokenizer.decode(document.ids) == "what <|endoftext|> says\n"
