"""Documents from files, folders and the Hub: what one is, in which order they come, what is refused."""

import gzip
import json
import lzma
import os
import subprocess
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from local_hub import LocalHub

from tessera.data.sources import PIECE, read_documents, read_texts


def rows_file(folder, name: str, texts, column: str = "text"):
    """A table of texts beside another column, in the format that the name says."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": i, column: text} for i, text in enumerate(texts)]
    if ".parquet" in name:
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        return path
    content = json.dumps(rows) if "array" in name else "".join(json.dumps(row) + "\n" for row in rows)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(content)
    return path


def read(*sources, **given) -> list[str]:
    return list(read_texts([str(source) for source in sources], **given))


TEXTS = ["one", "zwei\nLänder", "<|endoftext|>", "四", "five " * 400]


# ---- formats ----


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.jsonl.gz",
        "a.jsonl.xz",
        "a.json",
        "a.json.gz",
        "array.json",
        "array.json.gz",
        "a.parquet",
    ],
)
def test_a_table_gives_a_document_a_row(tmp_path, name):
    assert read(rows_file(tmp_path, name, TEXTS)) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_the_column_can_be_named_and_nulls_and_blanks_are_left_out(tmp_path, name):
    path = rows_file(tmp_path, name, ["a", None, " \n", "", "b"], column="content")
    assert read(path, column="content") == ["a", "b"]


@pytest.mark.parametrize("name", ["a.txt", "a.md.gz", "a.txt.xz", "named.anything"])
def test_a_text_file_without_separators_is_one_document_as_it_is(tmp_path, name):
    text = "\n first line\r\n\r\nsecond <|endoftext|> line\n\n"
    opener = {"gz": gzip.open, "xz": lzma.open}.get(name.split(".")[-1], open)
    with opener(tmp_path / name, "wb") as file:
        file.write(text.encode())
    assert read(tmp_path / name) == [text]


def test_lines_of_end_of_text_stand_between_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n<|endoftext|>\n\n<|endoftext|>\r\ntwo\n\nmore\n<|endoftext|>\nlast <|endoftext|>")
    assert read(path) == ["one", "two\n\nmore", "last <|endoftext|>"]


def test_what_is_not_utf8_becomes_the_replacement_character(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfmany a\xffb characters")
    (tmp_path / "b.jsonl").write_text('{"text": "x\\ud800y"}\n')
    assert read(tmp_path / "a.txt", tmp_path / "b.jsonl") == ["many a\ufffdb characters", "x\ufffdy"]


@pytest.mark.parametrize("paragraph", ["word " * 200 + "\n\n", "word " * 200 + "\n", "word " * 200])
def test_a_large_file_comes_in_pieces_that_together_are_the_file(tmp_path, paragraph):
    text = paragraph * (7 * PIECE // len(paragraph))
    (tmp_path / "a.txt").write_text(text)
    pieces = read(tmp_path / "a.txt")
    assert "".join(pieces) == text
    assert 2 <= len(pieces) <= 7 and max(map(len, pieces)) <= 3 * PIECE
    if "\n" in paragraph:
        assert all(piece.endswith(paragraph[-2:]) for piece in pieces), "cut inside of a line"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    if name == "a.txt":
        (tmp_path / name).write_text(("x" * 1000 + "\n") * 16_000)
    else:
        rows_file(tmp_path, name, ["x" * 1000] * 16_000)
    tracemalloc.start()
    total = sum(len(text) for text in read_texts([str(tmp_path / name)]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total >= 16e6
    assert peak < 10 * PIECE


# ---- folders and several sources ----


def test_a_folder_is_its_texts_and_tables_at_any_depth_in_the_order_of_their_paths(tmp_path):
    rows_file(tmp_path, "b/x.jsonl.gz", ["2", "3"])
    rows_file(tmp_path, "c.parquet", ["4"])
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "d.bin").write_text("no")
    (tmp_path / "info.json").write_text('{"license": "x"}')
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.txt").write_text("no")
    assert read(tmp_path) == ["1", "2", "3", "4"]


def test_plain_json_is_read_from_a_folder_that_holds_nothing_else(tmp_path):
    rows_file(tmp_path, "b.json", ["2"])
    rows_file(tmp_path, "array.json", ["1"])
    assert read(tmp_path) == ["1", "2"]


def test_sources_follow_each_other_and_with_a_limit_take_turns(tmp_path):
    a = rows_file(tmp_path, "a.jsonl", ["a" * 10] * 50)
    b = rows_file(tmp_path, "b.jsonl", ["é" * 10] * 50)
    assert read(a, b) == ["a" * 10] * 50 + ["é" * 10] * 50
    limited = read(a, b, limit_bytes=400)
    assert limited.count("a" * 10) == 20 and limited.count("é" * 10) == 10, "not the same share of bytes"
    # One that ends leaves its part to the others.
    assert len(read(a, b, limit_bytes=1400)) == 50 + 45
    assert read(a, limit_bytes=11) == ["a" * 10] * 2


def write(folder, **files: bytes):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


# ---- plain text into memory ----


def test_a_plain_file_is_one_document_byte_for_byte(tmp_path):
    write(tmp_path, book_weird=b"\xff\x00raw")
    assert read_documents(tmp_path / "book.weird") == [b"\xff\x00raw"]


def test_a_folder_of_plain_text_is_its_files_at_any_depth_in_the_order_of_their_paths(tmp_path):
    write(
        tmp_path, b_txt=b"2", a__z_PY=b"1", c__d__e_md=b"3", image_png=b"no", info_json=b"no", empty_txt=b""
    )
    assert read_documents(tmp_path) == [b"1", b"2", b"3"]


@pytest.mark.parametrize(
    ("files", "given", "sentence"),
    [
        ({}, "missing.txt", "there is no file or folder"),
        ({"a_txt": b""}, "a.txt", "is empty"),
        ({"a_txt": b"", "b_txt": b""}, "", "is empty"),
        ({"a_png": b"x"}, "", "no text in .* .txt"),
        ({"a_jsonl": b"{}"}, "a.jsonl", r"a\.jsonl is no plain text; .* tessera data prepare"),
        ({"a_txt": b"x", "b__c_parquet": b"x"}, "", r"c\.parquet is no plain text"),
        ({"a_txt": b"x", "b_md_gz": b"x"}, "", r"b\.md\.gz is no plain text"),
        ({"a_anything_xz": b"x"}, "a.anything.xz", "is no plain text"),
        ({"a_zst": b"x"}, "a.zst", "is no plain text"),
    ],
)
def test_no_plain_text_is_refused(tmp_path, files, given, sentence):
    write(tmp_path, **files)
    with pytest.raises(ValueError, match=sentence):
        read_documents(tmp_path / given)


# ---- what is refused ----


ENCODINGS = {"utf16.txt": "utf-16", "cp1251.txt": "cp1251"}


def broken(folder, kind: str):
    path = folder / kind
    if kind == "cut.jsonl.gz":
        whole = rows_file(folder, "whole.jsonl.gz", [str(i) * 50 for i in range(500)]).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "flipped.txt.gz":
        with gzip.open(path, "wt") as file:
            file.writelines(f"{i * i}\n" for i in range(5000))
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 0xFF
        path.write_bytes(whole)
    elif kind in ENCODINGS:
        path.write_bytes("Кириллица, много строк.\n".encode(ENCODINGS[kind]) * 100)
    elif kind == "cut.parquet":
        whole = rows_file(folder, "whole.parquet", TEXTS).read_bytes()
        path.write_bytes(whole[:-9])
    else:
        path.write_text(
            {
                "line.jsonl": '{"text": "a"}\n\n{"text": "b"\n',
                "array.json": '[{"text": "a"},',
                "list.jsonl": '{"text": "a"}\n["b"]\n',
                "number.jsonl": '{"text": 1}\n',
                "deep.jsonl": '{"text":' * 100_000,
                "digits.jsonl": '{"text": "a", "id": ' + "9" * 5000 + "}",
                "packed.txt.bz2": "BZh9\0",
                "empty.txt": " \n\n",
                "folder": "",
            }[kind]
        )
    return path


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("line.jsonl", r"line\.jsonl, line 3, is not JSON"),
        ("array.json", r"array\.json, .*is not JSON"),
        ("list.jsonl", "line 2: expected an object with a column 'text', got list"),
        ("number.jsonl", "line 1: the column 'text' holds int, expected text"),
        ("deep.jsonl", r"deep\.jsonl, line 1, is not JSON"),
        ("digits.jsonl", r"digits\.jsonl, line 1, is not JSON"),
        ("cut.jsonl.gz", "cannot be unpacked"),
        ("flipped.txt.gz", "cannot be unpacked"),
        ("utf16.txt", r"utf16\.txt is no text in UTF-8"),
        ("cp1251.txt", r"cp1251\.txt is no text in UTF-8"),
        ("packed.txt.bz2", "is no text in UTF-8"),
        ("cut.parquet", "no whole parquet file"),
        ("empty.txt", "is empty: there is no text in it"),
    ],
)
def test_broken_files_are_refused_with_their_place(tmp_path, kind, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(broken(tmp_path, kind))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "array.json"])
def test_a_missing_column_is_refused_with_those_that_there_are(tmp_path, name):
    with pytest.raises(ValueError, match="no column 'text'; there are id, content"):
        read(rows_file(tmp_path, name, TEXTS, column="content"))


def test_sources_that_are_nowhere_are_refused_before_anything_is_read(tmp_path):
    here = rows_file(tmp_path, "a.jsonl", TEXTS)
    for source in ("nowhere.txt", "corpus/nowhere.txt", str(tmp_path / "nowhere"), "", "a/b/c"):
        with pytest.raises(ValueError, match="there is no file or folder .* org/name"):
            read_texts([str(here), source])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no text in .*looked for .*\.jsonl"):
        read_texts([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="nothing to read"):
        read_texts([])
    with pytest.raises(ValueError, match="must be positive"):
        read_texts([str(here)], limit_bytes=0)


# ---- the Hub ----

# Everything in one process, since it takes seconds to import what reads from the Hub.
HUB_SCRIPT = """
import json, sys
from huggingface_hub import HfApi
from tessera.data.sources import read_texts

for repo in ("someone/lines", "someone/tables"):
    HfApi().create_repo(repo, repo_type="dataset")
    HfApi().upload_folder(repo_id=repo, repo_type="dataset", folder_path=f"{sys.argv[1]}/{repo}")
for source, given in json.loads(sys.argv[2]):
    try:
        found = list(read_texts([source], **given))
    except ValueError as error:
        found = str(error)
    print(json.dumps(found))
"""

NUMBERS = [str(i) for i in range(30)]
# What is read, how -> documents, or what the refusal says.
FROM_HUB = [
    ("someone/lines", {"name": "en"}, ["first", "second", "third"]),
    ("someone/lines", {"name": "en", "streaming": False}, ["first", "second", "third"]),
    ("someone/lines", {"name": "de", "split": "test", "seed": 1}, ["vierter"]),
    ("someone/tables", {}, NUMBERS),
    ("someone/tables", {"seed": 1}, NUMBERS),
    ("someone/tables", {"seed": 1, "streaming": False}, NUMBERS),
    ("someone/lines", {"name": "de"}, "Bad split: train. Available splits: ['test']"),
    ("someone/lines", {"name": "fr"}, "'fr' not found"),
    ("someone/lines", {}, "Config name is missing"),
    ("someone/lines", {"name": "en", "column": "body"}, "there is no column 'body'; there are id, text"),
    ("someone/tables", {"column": "body"}, "there is no column 'body'; there are id, text"),
    ("someone/nothing", {}, "cannot be read"),
]


@pytest.fixture(scope="module")
def from_hub(tmp_path_factory) -> list:
    """What each case of `FROM_HUB` gives."""
    folder = tmp_path_factory.mktemp("upload")
    rows_file(folder, "someone/lines/en/train-0.jsonl.gz", ["first", "second"])
    rows_file(folder, "someone/lines/en/train-1.jsonl.gz", ["third"])
    rows_file(folder, "someone/lines/de/test.jsonl.gz", ["vierter"])
    rows_file(folder, "someone/tables/train.parquet", NUMBERS)
    configs = [
        {"config_name": "en", "data_files": [{"split": "train", "path": "en/*"}]},
        {"config_name": "de", "data_files": [{"split": "test", "path": "de/*"}]},
    ]
    (folder / "someone/lines/README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        cases = json.dumps([(source, given) for source, given, _ in FROM_HUB])
        done = subprocess.run(
            [sys.executable, "-c", HUB_SCRIPT, str(folder), cases],
            env={**os.environ, **hub.environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            encoding="utf-8",
        )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("case", range(len(FROM_HUB)))
def test_hub_datasets_are_read_or_refused_in_a_sentence(from_hub, case):
    (source, given, expected), found = FROM_HUB[case], from_hub[case]
    if "seed" in given and expected is NUMBERS:
        assert found != NUMBERS and sorted(found, key=int) == NUMBERS
    elif isinstance(expected, list):
        assert found == expected
    else:
        assert found.startswith(f"the Hub dataset {source}") and expected in found and "\n" not in found
