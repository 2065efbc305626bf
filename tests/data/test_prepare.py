"""From text to tokens on disk: read again with numpy and encoded again with the tokenizer, one by one."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from helpers.corpora import EOS, WORDS, train_bpe
from helpers.corpora import write_texts as write
from local_hub import LocalHub
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tessera import build_byte_tokenizer, cli
from tessera.data.encoding_pass import IN_FLIGHT
from tessera.data.filters import Filters, choose_filters
from tessera.data.mixing import MIXTURES, Source, parse_source
from tessera.data.prepare import prepare
from tessera.data.text import MANY_DOCUMENTS
from tessera.training.inputs import load_tokenizer


def documents(count: int, seed: int = 0) -> list[str]:
    """Different texts, some of several lines, some beyond ASCII, some that spell control tokens."""
    draw = random.Random(seed)
    ends = [".", ".\nä ö ü 東京\n\nend", f" {EOS} <|im_start|>.", "!\r\n"]
    return [
        " ".join([f"{seed}-{i}", *draw.choices(WORDS, k=draw.randint(5, 60))]) + draw.choice(ends)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> str:
    """A tokenizer of 400 tokens with control tokens."""
    backend = train_bpe(documents(300, seed=99), 400, (EOS, "<|im_start|>"))
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS).save_pretrained(folder)
    (folder / "tokenizer_meta.json").write_text("{}")
    (folder / "model.safetensors").write_text("not of the tokenizer")
    return str(folder)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def read_back(folder: Path, split: str) -> list[list[int]]:
    """Documents as the format says, with numpy alone."""
    meta = json.loads((folder / "data_meta.json").read_text())
    code = {"uint8": "u1", "uint16": "<u2", "uint32": "<u4"}[meta["dtype"]]
    ids = np.frombuffer((folder / f"{split}.bin").read_bytes(), dtype=code)
    starts = np.frombuffer((folder / f"{split}.idx").read_bytes(), dtype="<u8").astype(int)
    assert starts[0] == 0 and starts[-1] == len(ids) == meta[split]["tokens"]
    assert len(starts) - 1 == meta[split]["documents"]
    return [ids[a:b].tolist() for a, b in zip(starts, starts[1:], strict=False)]


def is_held_out(text: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64 < fraction


# ---- what is written ----


def test_each_document_is_there_in_order_and_ends_with_end_of_text(tmp_path, bpe):
    texts = documents(500)
    source = write(tmp_path / "a.jsonl", texts)
    meta = prepare([Source(source)], tmp_path / "out", tokenizer=bpe, val_fraction=0.1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    eos = tokenizer.convert_tokens_to_ids(EOS)
    assert sum(encode(tokenizer, text).count(eos) for text in texts) == 0, "control tokens spelled in text"
    for split, wanted in (("train", False), ("val", True)):
        expected = [text for text in texts if is_held_out(text, 0.1) == wanted]
        assert read_back(tmp_path / "out", split) == [[*encode(tokenizer, text), eos] for text in expected]
        # As plain text is counted in training: one byte for each separator between two documents.
        assert meta[split]["bytes"] == len("\n".join(expected).encode())
    assert 30 < meta["val"]["documents"] < 70


def test_what_is_written_is_described(tmp_path, bpe):
    source = write(tmp_path / "a.jsonl", documents(200) + ["short"] * 3)
    meta = prepare(
        [Source(source)], tmp_path / "out", tokenizer=bpe, filters=Filters(("duplicate",), 8), seed=5
    )
    out = tmp_path / "out"
    assert meta == json.loads((out / "data_meta.json").read_text())
    for name in ("train.bin", "train.idx", "val.bin", "val.idx"):
        assert meta["sha256"][name] == hashlib.sha256((out / name).read_bytes()).hexdigest()
    tokenizer_file = (out / "tokenizer" / "tokenizer.json").read_bytes()
    assert tokenizer_file == (Path(bpe) / "tokenizer.json").read_bytes()
    assert meta["tokenizer_sha256"] == hashlib.sha256(tokenizer_file).hexdigest()
    assert (out / "tokenizer" / "tokenizer_meta.json").exists()
    assert not (out / "tokenizer" / "model.safetensors").exists()
    assert (meta["dtype"], meta["vocab_size"], meta["eos_token_id"]) == ("uint16", 400, 0)
    assert meta["filters"] == {
        "names": ["duplicate"],
        "min_chars": 8,
        "language": None,
        "dropped": {"too_short": 3},
        "lines_dropped": {},
    }
    (account,) = meta["sources"]
    assert account["source"] == source and account["read"] == 203 and account["documents"] == 200
    assert account["tokens"] == meta["train"]["tokens"] + meta["val"]["tokens"]
    top = max(max(ids) for split in ("train", "val") for ids in read_back(out, split))
    assert top == max(meta["train"]["max_id"], meta["val"]["max_id"]) < 400
    assert sorted(path.name for path in out.iterdir()) == [
        "data_meta.json", "tokenizer", "train.bin", "train.idx", "val.bin", "val.idx",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_bytes_are_their_own_ids_with_a_line_break_between_documents(tmp_path):
    texts = documents(100)
    meta = prepare([Source(write(tmp_path / "a.jsonl", texts))], tmp_path / "out", val_fraction=0.2)
    for split, wanted in (("train", False), ("val", True)):
        expected = [text for text in texts if is_held_out(text, 0.2) == wanted]
        assert (tmp_path / "out" / f"{split}.bin").read_bytes() == "\n".join(expected).encode()
        assert b"".join(map(bytes, read_back(tmp_path / "out", split))) == "\n".join(expected).encode()
        assert meta[split]["bytes"] == meta[split]["tokens"]
    assert (meta["dtype"], meta["vocab_size"], meta["eos_token_id"]) == ("uint8", 256, None)
    assert not (tmp_path / "out" / "tokenizer").exists()


def test_a_byte_tokenizer_with_end_of_text_is_as_its_backend(tmp_path):
    build_byte_tokenizer(eos_token=EOS).save_pretrained(tmp_path / "bytes")
    texts = documents(60)
    source = Source(write(tmp_path / "a.jsonl", texts))
    meta = prepare([source], tmp_path / "out", tokenizer=str(tmp_path / "bytes"), val_fraction=0.2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bytes")
    assert meta["dtype"] == "uint16"
    train = [[*encode(tokenizer, text), 256] for text in texts if not is_held_out(text, 0.2)]
    assert read_back(tmp_path / "out", "train") == train


@pytest.mark.parametrize(
    ("extra", "dtype"), [(70_000, "uint32"), (65_536 - 400, "uint16"), (65_537 - 400, "uint32")]
)
def test_the_type_follows_the_vocabulary(tmp_path, bpe, extra, dtype):
    content = json.loads((Path(bpe) / "tokenizer.json").read_text())
    content["model"]["vocab"].update({f"unused{i}": 400 + i for i in range(extra)})
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "big" / "tokenizer_config.json").write_bytes(
        (Path(bpe) / "tokenizer_config.json").read_bytes()
    )
    source = write(tmp_path / "a.jsonl", documents(40))
    meta = prepare([Source(source)], tmp_path / "out", tokenizer=str(tmp_path / "big"), val_fraction=0.2)
    assert (meta["dtype"], meta["vocab_size"]) == (dtype, 400 + extra)
    small = prepare([Source(source)], tmp_path / "small", tokenizer=bpe, val_fraction=0.2)
    assert read_back(tmp_path / "out", "train") == read_back(tmp_path / "small", "train")
    assert small["train"] == meta["train"]


def test_the_number_of_processes_changes_nothing(tmp_path, bpe, monkeypatch):
    """Batches are so small that there are more than can be on their way, and the mixing waits for results."""
    monkeypatch.setattr("tessera.data.mixing.BATCH", 2**11)
    sources = [
        Source(write(tmp_path / "a.jsonl", documents(3000, 1)), weight=0.7),
        Source(write(tmp_path / "b.jsonl", documents(1500, 2) * 2), weight=0.3),
    ]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.jsonl")) > 4 * IN_FLIGHT * 2**11
    given = {"tokenizer": bpe, "tokens": 100_000, "filters": Filters(("duplicate", "symbols"), 60)}
    metas = [prepare(sources, tmp_path / f"out{workers}", workers=workers, **given) for workers in (1, 2)]
    assert metas[0] == metas[1], "the account, or the hashes of the files"
    assert metas[0]["filters"]["dropped"]["too_short"] > 100
    assert not any(account["ended"] for account in metas[0]["sources"])


# ---- mixing and budget ----


@pytest.mark.parametrize("weights", [(0.8, 0.2), (1, 3)])
def test_weights_are_shares_of_tokens_even_where_much_is_dropped(tmp_path, bpe, weights):
    """Nine in ten documents of the first source are too short; the mixture must not follow what was read."""
    mostly_short = [text if i % 10 == 0 else text[:20] for i, text in enumerate(documents(60_000, 1))]
    sources = [
        Source(write(tmp_path / "a.jsonl", mostly_short), weight=weights[0]),
        Source(write(tmp_path / "b.jsonl", documents(12_000, 2)), weight=weights[1]),
    ]
    meta = prepare(sources, tmp_path / "out", tokens=800_000, filters=Filters((), 21))
    first, second = (account["tokens"] for account in meta["sources"])
    assert first / (first + second) == pytest.approx(weights[0] / sum(weights), abs=0.06)
    # at every quarter of the file, not only in the end
    ours = [bytes(ids).startswith(b"1-") for ids in read_back(tmp_path / "out", "train")]
    sizes = list(map(len, read_back(tmp_path / "out", "train")))
    for i in range(4):
        part = slice(len(ours) * i // 4, len(ours) * (i + 1) // 4)
        share = sum(n for n, mine in zip(sizes[part], ours[part], strict=True) if mine) / sum(sizes[part])
        assert share == pytest.approx(weights[0] / sum(weights), abs=0.25)


def test_the_budget_ends_with_the_document_that_reaches_it(tmp_path, bpe):
    texts = documents(1000)
    source = Source(write(tmp_path / "a.jsonl", texts))
    meta = prepare([source], tmp_path / "out", tokenizer=bpe, tokens=5000, val_fraction=0.1)
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    total = expected = 0
    while total < 5000:
        total += len(encode(tokenizer, texts[expected])) + 1
        expected += 1
    assert meta["sources"][0]["documents"] == meta["sources"][0]["read"] == expected
    assert meta["train"]["tokens"] + meta["val"]["tokens"] == total
    assert meta["sources"][0]["ended"] is False


def test_without_weights_every_source_is_read_to_its_end(tmp_path):
    sources = [
        Source(write(tmp_path / "a.jsonl", documents(3000, 1))),
        Source(write(tmp_path / "b.jsonl", documents(30, 2))),
    ]
    meta = prepare(sources, tmp_path / "out")
    assert [account["documents"] for account in meta["sources"]] == [3000, 30]


def test_with_weights_the_first_source_that_ends_ends_the_mixture(tmp_path):
    sources = [
        Source(write(tmp_path / "a.jsonl", documents(20_000, 1)), weight=1),
        Source(write(tmp_path / "b.jsonl", documents(5000, 2)), weight=1),
    ]
    meta = prepare(sources, tmp_path / "out", tokens=10**9)
    assert meta["sources"][1]["documents"] == 5000 and meta["sources"][1]["ended"]
    assert 4000 < meta["sources"][0]["documents"] < 6000


def test_a_source_may_have_a_weight_behind_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_source("org/name:0.25", column="body") == Source("org/name", 0.25, "body")
    assert parse_source("a.txt") == Source("a.txt")
    assert parse_source("c:\\texts\\a.txt") == Source("c:\\texts\\a.txt")
    (tmp_path / "odd:3").touch()
    assert parse_source("odd:3") == Source("odd:3")
    for given in ("a.txt:0", "a.txt:-1"):
        with pytest.raises(ValueError, match=r"weight of a\.txt must be positive"):
            parse_source(given)


def test_the_mixture_of_c4_and_wikipedia_is_four_to_one():
    web, encyclopedia = MIXTURES["c4-wikipedia"].sources
    assert (web.source, web.name) == ("allenai/c4", "en")
    assert (encyclopedia.source, encyclopedia.name) == ("wikimedia/wikipedia", "20231101.en")
    assert web.weight == 4 * encyclopedia.weight


UPLOAD_AND_PREPARE = """
import json, sys
from huggingface_hub import HfApi
from tessera import cli

sources, output = sys.argv[1:]
for repo in ("allenai/c4", "wikimedia/wikipedia"):
    HfApi().create_repo(repo, repo_type="dataset")
    HfApi().upload_folder(repo_id=repo, repo_type="dataset", folder_path=f"{sources}/{repo}")
for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
    try:
        cli.run(
            ["data", "prepare", "--preset", "c4-wikipedia", "--output", f"{output}/{name}", "--seed", seed]
            + ["--tokens", "6e5", "--workers", "1"]
        )
    except SystemExit as exit:
        assert not exit.code
"""


def test_the_mixture_of_c4_and_wikipedia_is_streamed_from_the_hub(tmp_path):
    """A stand-in for the Hub, with the layouts and configurations of the two real data sets."""
    draw = random.Random(0)

    def article(kind: str, i: int) -> str:
        if i % 40 == 0:
            return f"{kind} {i} function() {{ return lorem }} " * 9
        made_up = ["".join(draw.choices("abcdefgh", k=7)) for _ in range(30)]
        pairs = (f"was {a} with {b}," for a, b in zip(made_up[::2], made_up[1::2], strict=True))
        return f"The {kind} number {i} of that list " + " ".join(pairs)

    layouts = [("allenai/c4", "en", "page", 1500), ("wikimedia/wikipedia", "20231101.en", "article", 600)]
    for repo, folder, kind, rows in layouts:
        (tmp_path / repo / folder).mkdir(parents=True)
        table = [{"url": "x", "text": article(kind, i)} for i in range(rows)]
        if repo == "allenai/c4":
            with gzip.open(tmp_path / repo / folder / "c4-train.00000-of-01024.json.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in table)
            data_files = "en/c4-train.*.json.gz"
        else:
            file = tmp_path / repo / folder / "train-00000-of-00041.parquet"
            parquet.write_table(pa.Table.from_pylist(table), file)
            data_files = f"{folder}/*"
        configs = [{"config_name": folder, "data_files": [{"split": "train", "path": data_files}]}]
        (tmp_path / repo / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    with LocalHub(tmp_path / "hub") as hub:
        done = subprocess.run(
            [sys.executable, "-c", UPLOAD_AND_PREPARE, str(tmp_path), str(tmp_path / "out")],
            env={**os.environ, **hub.environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            encoding="utf-8",
        )
    assert done.returncode == 0, done.stderr
    files = [tmp_path / "out" / name / "data_meta.json" for name in "abc"]
    first, second, third = (json.loads(file.read_text()) for file in files)
    assert first == second and first["sha256"] != third["sha256"], "the order is not that of the seed"
    assert [account["tokens"] for account in first["sources"]] == pytest.approx([4.8e5, 1.2e5], rel=0.2)
    assert sum(account["tokens"] for account in first["sources"]) == pytest.approx(6e5, rel=0.01)
    assert set(first["filters"]["dropped"]) == {"code"}


# ---- filters ----


def test_filters_count_what_they_drop_and_duplicates_are_those_of_all_sources(tmp_path):
    good = documents(100, 1)
    sources = [
        Source(write(tmp_path / "a.jsonl", [*good, "x" * 10, good[3], "{ code } " * 9])),
        Source(write(tmp_path / "b.jsonl", [*good[:7], *documents(50, 2)])),
    ]
    meta = prepare(sources, tmp_path / "out", filters=choose_filters("code,duplicate", 20), val_fraction=0.1)
    assert meta["filters"]["dropped"] == {"too_short": 1, "duplicate": 8, "code": 1}
    written = Counter(
        bytes(ids).removesuffix(b"\n")
        for split in ("train", "val")
        for ids in read_back(tmp_path / "out", split)
    )
    assert set(written.values()) == {1} and len(written) == 150


def test_nothing_left_is_refused_with_what_dropped_how_many(tmp_path):
    source = Source(write(tmp_path / "a.jsonl", ["kurz", *documents(30)]))
    with pytest.raises(
        ValueError, match="nothing is left of 31 documents: not_english dropped 30, too_short dropped 1;"
    ):
        prepare([source], tmp_path / "out", filters=choose_filters("not_english", 10))
    assert not list(tmp_path.glob("out*"))


# ---- validation ----


def test_of_one_document_the_end_is_held_out_between_characters(tmp_path):
    text = "aä東🙂" * 500
    (tmp_path / "a.txt").write_text(text)
    for fraction in (0.1, 0.1003, 0.1007, 0.1009):
        out = tmp_path / f"out{fraction}"
        meta = prepare([Source(str(tmp_path / "a.txt"))], out, val_fraction=fraction)
        train, val = ((out / f"{split}.bin").read_bytes() for split in ("train", "val"))
        assert (train.decode() + val.decode()) == text, "cut inside of a character"
        assert len(val) / len(text.encode()) == pytest.approx(fraction, abs=0.001)
        assert (meta["train"]["bytes"], meta["val"]["bytes"]) == (len(train), len(val))


def test_of_few_documents_the_last_are_held_out(tmp_path, bpe):
    texts = documents(MANY_DOCUMENTS - 1)
    source = Source(write(tmp_path / "a.jsonl", texts))
    meta = prepare([source], tmp_path / "out", tokenizer=bpe, val_fraction=0.3)
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    train, val = (read_back(tmp_path / "out", split) for split in ("train", "val"))
    whole = len(train) - 1
    assert train[:-1] == [[*encode(tokenizer, text), 0] for text in texts[:whole]]
    assert val[1:] == [[*encode(tokenizer, text), 0] for text in texts[whole + 1 :]]
    assert tokenizer.decode(train[-1][:-1] + val[0][:-1]) == texts[whole]
    assert meta["sources"][0]["tokens"] == meta["train"]["tokens"] + meta["val"]["tokens"]


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_where_the_draw_holds_nothing_out_the_last_documents_are(tmp_path, bpe, with_tokenizer):
    texts = [text for text in documents(300) if not is_held_out(text, 0.01)]
    source = Source(write(tmp_path / "a.jsonl", texts))
    tokenizer = AutoTokenizer.from_pretrained(bpe) if with_tokenizer else build_byte_tokenizer()
    meta = prepare([source], tmp_path / "out", tokenizer=bpe if with_tokenizer else None, val_fraction=0.01)
    kept = int(len(texts) * 0.01)
    ends = [0] if with_tokenizer else [10]
    for split, expected in (("train", texts[:-kept]), ("val", texts[-kept:])):
        rows = [[*encode(tokenizer, text), *ends] for text in expected]
        if not with_tokenizer:
            rows[-1] = rows[-1][:-1]
        assert read_back(tmp_path / "out", split) == rows
        assert meta[split]["bytes"] == len("\n".join(expected).encode())
    assert meta["sources"][0]["tokens"] == meta["train"]["tokens"] + meta["val"]["tokens"]


@pytest.mark.parametrize("count", [MANY_DOCUMENTS, 60, 300])
def test_more_documents_before_among_and_after_move_none_between_the_splits(tmp_path, count):
    """From twenty on, and where the draw holds out some: those of before stay where they were."""
    first, others = documents(count, 7), documents(200, 8)
    draw = random.Random(0)
    splits = []
    for name, texts in (("a", first), ("b", draw.sample([*first, *others], count + 200))):
        meta = prepare([Source(write(tmp_path / f"{name}.jsonl", texts))], tmp_path / name, val_fraction=0.2)
        assert meta["val_drawn_by"] == "hash"
        ids = {split: read_back(tmp_path / name, split) for split in ("train", "val")}
        splits.append({split: {bytes(row).strip() for row in rows} for split, rows in ids.items()})
    for split in ("train", "val"):
        assert splits[0][split] and splits[0][split] < splits[1][split]


def test_few_documents_are_said_to_move(tmp_path):
    drawn = {}
    for name, texts in (("few", documents(5)), ("many", documents(300))):
        source = Source(write(tmp_path / f"{name}.jsonl", texts))
        drawn[name] = prepare([source], tmp_path / name, val_fraction=1e-9 if name == "many" else 0.2)
    assert drawn["few"]["val_drawn_by"] == "end of the text"
    assert drawn["many"]["val_drawn_by"] == "last documents"


def test_text_of_its_own_for_validation_is_taken_whole_and_never_trained_on(tmp_path):
    texts = documents(100)
    texts.append(texts[3])  # nobody asked for duplicates to go
    held_out = [*documents(5, 2), texts[7], "short"]
    meta = prepare(
        [Source(write(tmp_path / "a.jsonl", texts))],
        tmp_path / "out",
        val_data=[write(tmp_path / "val.jsonl", held_out)],
        filters=Filters((), 10),
    )
    assert (tmp_path / "out" / "val.bin").read_bytes() == "\n".join(held_out).encode()
    expected = [text for text in texts if text != texts[7]]
    assert (tmp_path / "out" / "train.bin").read_bytes() == "\n".join(expected).encode()
    assert meta["filters"]["dropped"] == {"duplicate": 1}
    assert meta["val_fraction"] is None and len(meta["val_data"]) == 1


def test_held_out_text_is_known_again_in_what_the_rules_for_lines_leave_of_it(tmp_path):
    good = "This is a whole sentence, and it ends as one does."
    texts = [f"Menu\n{good} It has the number {i}." for i in range(40)]
    meta = prepare(
        [Source(write(tmp_path / "a.jsonl", texts))],
        tmp_path / "out",
        val_data=[write(tmp_path / "val.jsonl", texts[:5])],
        filters=Filters(("open_lines",)),
    )
    assert (meta["train"]["documents"], meta["val"]["documents"]) == (35, 5)
    assert meta["filters"]["dropped"] == {"duplicate": 5}
    assert b"Menu" not in (tmp_path / "out" / "train.bin").read_bytes()


@pytest.mark.parametrize(("text", "fraction"), [("a", 0.5), ("abcdef", 0.1), ("abcdef", 0.9)])
def test_too_little_text_for_two_splits_is_refused(tmp_path, text, fraction):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=r"too little text .* --val-data"):
        prepare([Source(str(tmp_path / "a.txt"))], tmp_path / "out", val_fraction=fraction)
    assert not list(tmp_path.glob("out*"))


# ---- what is refused, and what is left behind ----


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tokens": 0}, "number of tokens must be positive, got 0"),
        ({"tokens": -5}, "number of tokens must be positive"),
        ({"val_fraction": 0}, "share to hold out must be between 0 and 1, got 0"),
        ({"val_fraction": 1.0}, "share to hold out"),
        ({"workers": 0}, "number of workers must be at least 1"),
        ({"tokenizer": "missing"}, "there is no tokenizer directory missing; make one"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(tmp_path, given, sentence):
    source = Source(write(tmp_path / "a.jsonl", documents(30)))
    with pytest.raises(ValueError, match=sentence):
        prepare([source], tmp_path / "out", **given)
    assert not list(tmp_path.glob("out*"))


def test_weights_for_some_sources_only_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", documents(30))
    with pytest.raises(ValueError, match="has no weight; give one to all, or to none"):
        prepare([Source(path, 0.5), Source(path)], tmp_path / "out")
    with pytest.raises(ValueError, match="nothing to read"):
        prepare([], tmp_path / "out")


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path):
    source = Source(write(tmp_path / "a.jsonl", documents(30)))
    (tmp_path / "broken").mkdir()
    for content in (None, "{", "{}"):
        if content:
            (tmp_path / "broken" / "tokenizer.json").write_text(content)
        with pytest.raises(
            ValueError, match="tokenizer .* cannot be loaded: that directory holds no tokenizer"
        ):
            prepare([source], tmp_path / "out", tokenizer=str(tmp_path / "broken"))
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("./none/tokenizer", "there is no directory ./none/tokenizer$"),
        (
            "someone/tokenizr",
            "no directory someone/tokenizr, and the Hub at http://127.0.0.1:9 cannot be reach",
        ),
    ],
)
def test_a_tokenizer_that_is_nowhere_is_refused_at_once(given, reason, tmp_path, monkeypatch):
    """The Hub's own client would try for a minute."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    source, started = Source(write(tmp_path / "a.jsonl", documents(30))), time.monotonic()
    for load in (lambda: prepare([source], tmp_path / "out", tokenizer=given), lambda: load_tokenizer(given)):
        with pytest.raises(ValueError, match=f"tokenizer {given} cannot be loaded: .*{reason}"):
            load()
    assert time.monotonic() - started < 5


def test_a_broken_source_leaves_nothing_and_an_earlier_result_is_never_touched(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, documents(500))
    prepare([Source(str(path))], tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="out exists and is not an empty folder"):
        prepare([Source(str(path))], tmp_path / "out")
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    path.write_text(path.read_text() + "broken\n")
    with pytest.raises(ValueError, match="line 501, is not JSON"):
        prepare([Source(str(path))], tmp_path / "new")
    assert not list(tmp_path.glob("new*"))
    (tmp_path / "empty").mkdir()
    write(path, documents(500))
    prepare([Source(str(path))], tmp_path / "empty")
    assert before.keys() == {file.name for file in (tmp_path / "empty").iterdir()}


def test_memory_does_not_grow_with_the_text(tmp_path):
    texts = [text * 20 for text in documents(1500)]
    peaks = []
    for copies in (1, 4):
        source = Source(write(tmp_path / "a.jsonl", texts * copies))
        tracemalloc.start()
        prepare([source], tmp_path / f"out{copies}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "out4" / "train.bin").stat().st_size > 2e7
    assert peaks[1] < 1.2 * peaks[0] < 2e7


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "text.txt", "--workers", "0"], "the number of workers must be at least 1, got 0"),
        (["--data", "text.txt", "--workers", "-2"], "the number of workers must be at least 1, got -2"),
        (["--preset", "c4-wikipedia", "--column", "text"], "--column is for --data"),
        (["--preset", "c4-wikipedia", "--split", "train"], "--split is for --data"),
        (["--preset", "c4-wikipedia", "--name", "en"], "--name is for --data"),
    ],
)
def test_options_that_would_go_unheard_are_refused(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("One.\n<|endoftext|>\nTwo.\n" * 9)
    with pytest.raises(SystemExit) as exit:
        cli.run(["data", "prepare", *arguments, "--output", "out"])
    assert exit.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
