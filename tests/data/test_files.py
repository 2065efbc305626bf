"""Files as they come: every packing and table format, and what is said of those that are broken."""

import gzip
import json
import logging
import lzma
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard
from datasets import Dataset, DatasetDict

from tessera.data import files, sources
from tessera.data.files import read_blocks
from tessera.data.rows import read_rows
from tessera.data.sources import read_texts

ROWS = [{"id": i, "text": f"{i} {'word ' * (i % 7)}Länder 四"} for i in range(2500)]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(data: bytes) -> bytes:
    """Several frames, as parallel packers and concatenated files have."""
    pack = zstandard.ZstdCompressor(write_checksum=True).compress
    return b"".join(pack(data[i : i + 40_000]) for i in range(0, len(data), 40_000))


PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def arrow(rows: list[dict], *, footer: bool) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with (pa.ipc.new_file if footer else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=600)
    return sink.getvalue().to_pybytes()


def read(path: Path, **given) -> list[str]:
    return list(read_texts([str(path)], **given))


def whole(name: str) -> bytes:
    if name.endswith(".parquet"):
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=500)
        return sink.getvalue().to_pybytes()
    if name.endswith(".arrow"):
        return arrow(ROWS, footer=name.startswith("footer"))
    packing = Path(name).suffix
    data = LINES if ".jsonl" in name else "\n<|endoftext|>\n".join(TEXTS).encode()
    return PACK[packing](data) if packing in PACK else data


NAMES = ["a.jsonl", "a.txt", "a.parquet", "stream.arrow", "footer.arrow"]
PACKED = [f"{name}{packing}" for name in ("a.jsonl", "a.txt") for packing in PACK]


@pytest.mark.parametrize("name", [*NAMES, *PACKED])
def test_every_format_gives_the_same_texts(tmp_path, name):
    (tmp_path / name).write_bytes(whole(name))
    assert read(tmp_path / name) == TEXTS
    if ".txt" not in name:
        assert list(read_rows(str(tmp_path / name))) == ROWS
    assert read(tmp_path) == TEXTS, "not found in a folder"


@pytest.mark.parametrize("name", [*PACKED, "a.parquet", "stream.arrow", "footer.arrow", "a.jsonl"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.93])
def test_a_file_that_was_cut_off_gives_what_was_whole_and_then_a_sentence(tmp_path, name, share):
    data = whole(name)
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * share)])
    found = []
    with pytest.raises(ValueError, match=rf"{name}.*(cannot be unpacked|is no whole|is not JSON)") as error:
        found.extend(read_texts([str(path)]))
    assert found == TEXTS[: len(found)]
    sentence = str(error.value)
    assert "\n" not in sentence
    if name in PACKED:
        assert f"of {path.stat().st_size:,}" in sentence and "beyond byte" in sentence
    elif name == "a.jsonl":
        assert f"line {len(found) + 1}" in sentence and "may have been cut off" in sentence and found
    else:
        assert f"after row {len(found):,}, of {path.stat().st_size:,} bytes" in sentence


@pytest.mark.parametrize("packing", PACK)
def test_a_damaged_byte_in_the_middle_is_refused(tmp_path, packing):
    data = bytearray(PACK[packing](random.Random(0).randbytes(5000).hex().encode()))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / f"a.txt{packing}").write_bytes(data)
    with pytest.raises(ValueError, match="cannot be unpacked beyond byte"):
        read(tmp_path / f"a.txt{packing}")


def test_a_damaged_page_of_parquet_is_refused_with_the_row(tmp_path):
    data = bytearray(whole("a.parquet"))
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet is no whole parquet file: .* \(after row [\d,]+, of"):
        read(tmp_path / "a.parquet")


def test_an_arrow_stream_without_its_end_is_announced(tmp_path, caplog):
    data = whole("stream.arrow")
    (tmp_path / "a.arrow").write_bytes(data[:-8])
    assert read(tmp_path / "a.arrow") == TEXTS
    assert "may have been cut off" in caplog.text
    caplog.clear()
    (tmp_path / "a.arrow").write_bytes(data)
    assert read(tmp_path / "a.arrow") == TEXTS and not caplog.text


@pytest.mark.parametrize("name", ["stream.arrow", "footer.arrow", "a.parquet"])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path, name):
    (tmp_path / name).write_bytes(whole(name))
    with pytest.raises(ValueError, match=rf"{name}: there is no column 'body'; there are id, text"):
        read(tmp_path / name, column="body")


def test_folders_that_datasets_saved_are_read_split_by_split(tmp_path):
    parts = DatasetDict(train=Dataset.from_list(ROWS[:20]), test=Dataset.from_list(ROWS[20:30]))
    parts.save_to_disk(str(tmp_path / "saved"))
    parts["train"].save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "saved") == read(tmp_path / "one") == TEXTS[:20]
    assert read(tmp_path / "saved", split="test") == TEXTS[20:30]
    assert list(read_rows(str(tmp_path / "saved"), splits=("validation", "test"))) == ROWS[20:30]
    with pytest.raises(ValueError, match="no split 'dev'; there are test, train"):
        read(tmp_path / "saved", split="dev")


# ---- what is not UTF-8 ----


@pytest.mark.parametrize("name", ["a.txt", "a.txt.zst", "a.jsonl"])
def test_what_is_not_utf8_is_replaced_and_announced_with_its_place(tmp_path, caplog, name):
    good = "Länder und ein Zeichen: \ufffd\n" * 50
    data = good.encode() + b"a\xff b\xe2\x82 c\n" + good.encode() + b"\xed\xa0\x80"
    if name == "a.jsonl":
        data = b'{"text": "Good"}\n{"text": "b\xffd"}\n'
    (tmp_path / name).write_bytes(zstd(data) if name.endswith("zst") else data)
    with caplog.at_level(logging.WARNING):
        found = read(tmp_path / name)
    expected = data.decode("utf-8", "replace")
    assert found == ([expected] if name != "a.jsonl" else ["Good", "b\ufffdd"])
    first = next(i for i in range(len(data)) if not valid(data[: i + 1]) and not valid(data[: i + 5]))
    places = expected.count("\ufffd") - data.count("\ufffd".encode())
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert f"{name} is not UTF-8 in {places} places, the first at byte {first:,}" in message
    assert ("unpacks" in message) == name.endswith("zst")


def valid(data: bytes) -> bool:
    """Whether this is UTF-8, but for a last character that is not whole."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


@pytest.mark.parametrize("block", [1, 5, 64])
@pytest.mark.parametrize("longest", range(4, 12))
def test_lines_are_cut_between_characters_only(tmp_path, caplog, monkeypatch, longest, block):
    monkeypatch.setattr(files, "_BLOCK", block)
    text = "\ufeffaä東😀" * 9 + "\r\n\n" + "😀" * 5
    (tmp_path / "a").write_bytes(text.encode())
    blocks = list(read_blocks(tmp_path / "a", longest=longest))
    assert "".join(blocks) == text[1:] and not caplog.text
    assert all(b.endswith("\n") or len(b.encode()) <= longest + block for b in blocks)
    broken = b"ab\xf0\x9f" * 5
    (tmp_path / "b").write_bytes(broken)
    assert "".join(read_blocks(tmp_path / "b", longest=longest)) == broken.decode("utf-8", "replace")


def by_lines(text: str, piece: int) -> list[str]:
    """Documents as docs/data.md has them, line by line."""
    found, parts, separated = [], "", False
    for line in text.splitlines(keepends=True):
        if line.strip() == "<|endoftext|>" and not line[0].isspace():
            found, parts, separated = [*found, parts.strip("\r\n")], "", True
            continue
        parts += line
        blank_or_late = line.isspace() or len(parts) >= 2 * piece
        if len(parts) >= piece and (blank_or_late or len(parts) >= 3 * piece):
            found, parts = [*found, parts], ""
    found.append(parts.strip("\r\n") if separated else parts)
    return [document for document in found if document and not document.isspace()]


@pytest.mark.parametrize("block", [7, 40, 1000])
def test_documents_do_not_depend_on_the_blocks_that_are_read(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "_BLOCK", block)
    monkeypatch.setattr(sources, "PIECE", 30)
    generator = random.Random(block)
    pieces = [
        "a",
        "bc d",
        "<|endoftext|>",
        "\n<|endoftext|>\n",
        "\n<|endoftext|> \n",
        "\n",
        "\n\n",
        "東京 ",
        "x" * 9,
    ]
    for _ in range(300):
        text = "".join(generator.choices(pieces, k=generator.randrange(1, 60))) + "."
        text = "\n".join(line[:20] for line in text.split("\n"))  # shorter than what is cut by bytes
        (tmp_path / "a.txt").write_text(text)
        assert read(tmp_path / "a.txt") == by_lines(text, 30)


def test_text_without_any_white_space_between_is_no_document(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(b""))
    with pytest.raises(ValueError, match="is empty: there is no text in it"):
        read(tmp_path / "a.jsonl.zst")
