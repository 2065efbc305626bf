"""The same preparation by datatrove's executors: what `data prepare` keeps, whatever the number of tasks."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tessera.data.filters import choose_filters
from tessera.data.mixing import Source
from tessera.data.prepare import prepare
from tessera.data.sources import read_source
from tessera.data.token_files import open_prepared

pytest.importorskip("datatrove", reason="an optional extra")
from tessera.data.datatrove_pipeline import ReadSources, build_stages, run_local  # noqa: E402

WORDS = [f"{a}{b}" for a in "bcdfgh" for b in ("ale", "ore", "int", "ust")]


@pytest.fixture(autouse=True)
def quiet():
    """Its logs go to stderr, hundreds of lines a run."""
    from loguru import logger

    logger.disable("datatrove")


@pytest.fixture
def corpus(tmp_path) -> str:
    """Four files of 30 texts; one has a twin in another file and one a near twin. Below each is a menu."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=60)) + ".\nMenu" for _ in range(120)]
    texts[40] = texts[0]
    texts[100] = texts[70].replace(" ", " -- ", 3)
    texts[5] = "too few words."
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(4):
        rows = [json.dumps({"text": text}) + "\n" for text in texts[30 * i : 30 * i + 30]]
        (folder / f"{i}.jsonl").write_text("".join(rows))
    return str(folder)


@pytest.fixture
def words(tmp_path) -> str:
    """A tokenizer of whole words with an end-of-text token."""
    vocabulary = {word: i for i, word in enumerate(["<eos>", "?", ".", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


def documents(folder: Path) -> dict[str, Counter]:
    """Ids of each document, by split, as the format says."""
    meta = json.loads((folder / "data_meta.json").read_text())
    code = {"uint8": "u1", "uint16": "<u2"}[meta["dtype"]]
    found = {}
    for split in ("train", "val"):
        ids = np.fromfile(folder / f"{split}.bin", dtype=code)
        starts = np.fromfile(folder / f"{split}.idx", dtype="<u8").astype(int)
        parts = (tuple(ids[a:b].tolist()) for a, b in zip(starts, starts[1:], strict=False))
        # Of bytes, the last document has no separator.
        found[split] = Counter(part if meta["eos_token_id"] is not None else part[:50] for part in parts)
    return found


@pytest.mark.parametrize(
    ("tasks", "workers", "with_tokenizer"),
    [(1, 1, True), (3, 1, False), pytest.param(3, 2, True, marks=pytest.mark.distributed)],
)
def test_tasks_keep_what_one_process_keeps(tmp_path, corpus, words, with_tokenizer, tasks, workers):
    chosen = choose_filters("few_words,open_lines,duplicate,near_duplicate")
    tokenizer = words if with_tokenizer else None
    given = {"tokenizer": tokenizer, "filters": chosen, "val_fraction": 0.2}
    ours = prepare([Source(corpus)], tmp_path / "ours", **given)
    work, out = tmp_path / "work", tmp_path / "out"
    stages = build_stages([Source(corpus)], work, out, tasks=tasks, explain=2, **given)
    run_local(stages, work, workers=workers)
    meta = open_prepared(out, verify=True).meta
    twins = sum(ours["filters"]["dropped"][name] for name in ("duplicate", "near_duplicate"))
    assert twins == 2 and meta["filters"]["dropped"] == {"few_words": 1, "near_duplicate": 2}
    assert meta["filters"]["lines_dropped"] == ours["filters"]["lines_dropped"]
    # The pair that is only nearly the same has one member here, and perhaps the other one there.
    for split, found in documents(out).items():
        difference = (found - documents(tmp_path / "ours")[split]) + (
            documents(tmp_path / "ours")[split] - found
        )
        assert difference.total() <= 2
        assert found.total() > 10
    assert meta["train"]["documents"] + meta["val"]["documents"] == 117
    same = ("format", "dtype", "vocab_size", "eos_token_id", "tokenizer_sha256", "val_fraction")
    assert [meta[key] for key in same] == [ours[key] for key in same] and set(meta) == set(ours)
    assert meta["val_drawn_by"] == ours["val_drawn_by"] == "hash"
    assert meta["sources"][0]["read"] == 120 and meta["sources"][0]["documents"] == 117
    assert meta["sources"][0]["tokens"] == meta["train"]["tokens"] + meta["val"]["tokens"]
    examples = [json.loads(line) for file in work.glob("dropped/*/*") for line in file.open()]
    assert [example["text"] for example in examples] == ["too few words."]


def test_exact_duplicates_alone_leave_near_ones(tmp_path, corpus):
    work, out = tmp_path / "work", tmp_path / "out"
    stages = build_stages(
        [Source(corpus)], work, out, tasks=2, filters=choose_filters("duplicate"), val_fraction=0.2
    )
    assert [stage.name for stage in stages] == ["filter", "signatures", "match", "cluster", "encode", "merge"]
    run_local(stages, work)
    meta = open_prepared(out, verify=True).meta
    assert meta["filters"]["dropped"] == {"duplicate": 1}
    written = (out / "train.bin").stat().st_mtime_ns
    run_local(stages, work)  # nothing is left to do
    assert (out / "train.bin").stat().st_mtime_ns == written


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def times(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(file), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file())


def test_a_work_folder_that_is_complete_makes_an_output_that_is_gone_again(tmp_path, corpus, words):
    work, out = tmp_path / "work", tmp_path / "out"
    given = {"tokenizer": words, "val_fraction": 0.2, "tasks": 2}
    stages = build_stages([Source(corpus)], work, out, **given)
    run_local(stages, work)
    first, through = contents(out), times(work / "kept") + times(work / "tokens")
    assert len(through) == 2 + 2 * 5
    with pytest.raises(ValueError, match="out exists and is not an empty folder"):
        build_stages([Source(corpus)], work, out, **given)
    shutil.rmtree(out)
    run_local(stages, work)
    assert contents(out) == first
    shutil.rmtree(out)
    run_local(build_stages([Source(corpus)], work, out, **given), work)
    assert contents(out) == first
    assert times(work / "kept") + times(work / "tokens") == through  # nothing else ran again


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"val_fraction": 0.3}, r"another value of val_fraction \(val_fraction: 0.2, now 0.3\)"),
        ({"tasks": 1}, r"another value of tasks \(tasks: 2, now 1\)"),
        ({"bucket_tasks": 2}, "another value of bucket_tasks"),
        ({"filters": choose_filters("basic")}, "another value of filters"),
        ({"tokenizer": None}, "another value of tokenizer"),
        ({"tokenizer": "changed"}, "another value of tokenizer"),
        ({"output": "elsewhere"}, "another value of output"),
        ({"sources": ["corpus/0.jsonl"]}, "another value of data"),
        ({"append": "1.jsonl"}, r"1\.jsonl has changed since .*work was begun"),
        ({"append": "new.jsonl"}, r"new\.jsonl is new since .*work was begun"),
    ],
)
def test_a_work_folder_belongs_to_the_arguments_of_its_first_call(tmp_path, corpus, words, other, sentence):
    given = {"sources": ["corpus"], "output": "out", "tokenizer": "words", "val_fraction": 0.2, "tasks": 2}

    def build(sources, output, tokenizer, **rest):
        tokenizer = tokenizer and str(tmp_path / tokenizer)
        found = [Source(str(tmp_path / source)) for source in sources]
        return build_stages(found, tmp_path / "work", tmp_path / output, tokenizer=tokenizer, **rest)

    build(**given)
    shutil.copytree(words, tmp_path / "changed")
    changed = tmp_path / "changed" / "tokenizer.json"
    changed.write_text(changed.read_text().replace("bale", "bail"))
    before = contents(tmp_path / "work")
    if "append" in other:
        with (tmp_path / "corpus" / other["append"]).open("a") as file:
            file.write(json.dumps({"text": "more"}) + "\n")
        other = {}
    with pytest.raises(ValueError, match=sentence):
        build(**{**given, **other})
    assert contents(tmp_path / "work") == before


def test_a_work_folder_of_which_nothing_is_known_is_refused(tmp_path, corpus):
    work, out = tmp_path / "work", tmp_path / "out"
    (work / "tokens" / "00000").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"work holds tokens but no arguments\.json"):
        build_stages([Source(corpus)], work, out)
    shutil.rmtree(work)
    build_stages([Source(corpus)], work, out)
    (work / "arguments.json").write_text("{")
    with pytest.raises(ValueError, match=r"arguments\.json is damaged: .*; give another folder to work in"):
        build_stages([Source(corpus)], work, out)


def test_tasks_read_what_one_process_reads(tmp_path, monkeypatch):
    """Of saved splits the one that is named; of the Hub no white space and no lone surrogates."""
    texts = ["a b", " \n", "c \ud800 d", "e", "f"]
    saved = tmp_path / "saved"
    DatasetDict(
        train=Dataset.from_list([{"text": "of train"}, {"text": "\t"}]),
        test=Dataset.from_list([{"text": "of test"}]),
    ).save_to_disk(str(saved))

    def rows():
        yield from ({"text": text} for text in texts)

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: IterableDataset.from_generator(rows))
    sources = [Source(str(saved)), Source(str(saved), split="test"), Source("org/name")]
    read = [
        (document.metadata["source"], document.text)
        for rank in range(2)
        for document in ReadSources(sources).run(None, rank, 2)
    ]
    alone = [
        (number, text)
        for number, source in enumerate(sources)
        for text in read_source(source.source, split=source.split)
    ]
    assert sorted(read) == alone
    assert alone == [(0, "of train"), (1, "of test")] + [
        (2, text) for text in ("a b", "c \ufffd d", "e", "f")
    ]


def test_the_list_goes_to_the_executor_for_slurm_as_it_is(tmp_path, corpus):
    from prepare_with_datatrove import slurm_executors

    stages = build_stages([Source(corpus)], tmp_path / "work", tmp_path / "out", tasks=4)
    last = slurm_executors(stages, tmp_path / "work", partition="cpu", time="1:00:00")
    assert [stage.name for stage in stages] == ["filter", "encode", "merge"]
    assert last.pipeline is stages[2].steps and last.depends.pipeline is stages[1].steps
    assert (last.tasks, last.depends.tasks, last.depends.depends.tasks) == (1, 4, 4)
    assert last.depends.depends.depends is None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"sources": []}, "nothing to read"),
        ({"sources": [Source("x", weight=1.0)]}, "x has a weight"),
        ({"tasks": 0}, "at least one task"),
        ({"val_fraction": 1.0}, "between 0 and 1"),
        ({"sources": [Source("nowhere")]}, "no file or folder nowhere"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, given, sentence):
    arguments = {
        "sources": [Source(str(tmp_path))],
        "work": tmp_path / "w",
        "output": tmp_path / "o",
        **given,
    }
    with pytest.raises(ValueError, match=sentence):
        build_stages(**arguments)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "x").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        build_stages([Source(str(tmp_path))], tmp_path / "w", tmp_path / "o")
