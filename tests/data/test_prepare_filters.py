"""Filters inside of prepare: near duplicates, lines that go, and examples of what was dropped."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tessera import cli
from tessera.data.filters import choose_filters
from tessera.data.mixing import Source
from tessera.data.prepare import prepare


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def texts_of(folder: Path) -> list[str]:
    """All documents of both splits; bytes, with a line break between documents."""
    found = []
    for split in ("train", "val"):
        data = (folder / f"{split}.bin").read_bytes()
        starts = np.fromfile(folder / f"{split}.idx", dtype="<u8").astype(int)
        found += [data[a:b].decode().removesuffix("\n") for a, b in zip(starts, starts[1:], strict=False)]
    return found


def test_near_duplicates_and_lines_that_go_are_the_same_for_any_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("tessera.data.mixing.BATCH", 2000)
    draw = random.Random(0)
    words = [f"{a}{b}" for a in "bcdfgh" for b in ("ale", "ore", "int", "ust")]
    originals = [" ".join(draw.choices(words, k=80)) + ".\nMenu" for _ in range(60)]
    texts = originals + [text.replace(" ", "  ", 3) for text in originals[::2]] + ["x [1].\n{"]
    source = write(tmp_path / "texts.jsonl", texts)
    chosen = choose_filters("code,citations,open_lines,near_duplicate")
    metas = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        metas.append(prepare([Source(source)], out, filters=chosen, workers=workers, val_fraction=0.1))
    assert metas[0] == metas[1]
    assert metas[0]["filters"]["dropped"] == {"near_duplicate": 30, "code": 1}
    assert metas[0]["filters"]["lines_dropped"] == {"open_lines": 90}
    found = texts_of(tmp_path / "out2")
    assert sorted(found) == sorted(text.removesuffix("\nMenu") for text in originals)


def test_held_out_text_has_no_near_duplicate_in_training(tmp_path):
    draw = random.Random(1)
    texts = [" ".join(draw.choices([str(i) for i in range(99)], k=60)) for _ in range(40)]
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(texts[7].replace(" ", ", "))
    meta = prepare(
        [Source(write(tmp_path / "texts.jsonl", texts))],
        tmp_path / "out",
        val_data=[str(held_out)],
        filters=choose_filters("near_duplicate"),
    )
    assert meta["filters"]["dropped"] == {"near_duplicate": 1} and meta["train"]["documents"] == 39


def test_examples_of_what_was_dropped_are_kept_by_reason_with_what_was_measured(tmp_path):
    texts = (
        [f"{i} " + "word " * 60 for i in range(30)]
        + ["few words {", "few"]
        + ["{ " * 60 + str(i) for i in range(9)]
    )
    texts.append(texts[0])
    source = write(tmp_path / "texts.jsonl", texts)
    chosen = choose_filters("few_words,code,duplicate")
    prepare([Source(source)], tmp_path / "out", filters=chosen, val_fraction=0.1, explain=2)
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "dropped_examples.jsonl").read_text().splitlines()
    ]
    assert [(row["reason"], row["value"], row["limit"]) for row in rows] == [
        ("few_words", 3, 50),
        ("few_words", 1, 50),
        ("code", 60, 0),
        ("code", 60, 0),
        ("duplicate", None, None),
    ]
    assert rows[0]["text"] == "few words {" and rows[0]["source"] == source
    assert len(rows[4]["text"]) == 300 and rows[4]["chars"] == len(texts[0])
    prepare([Source(source)], tmp_path / "plain", filters=chosen, val_fraction=0.1)
    assert not (tmp_path / "plain" / "dropped_examples.jsonl").exists()
    with pytest.raises(ValueError, match="cannot be -1"):
        prepare([Source(source)], tmp_path / "other", explain=-1)


def test_the_command_shows_what_was_dropped_and_why(tmp_path):
    source = write(tmp_path / "texts.jsonl", [f"{i} " + "word " * 60 for i in range(30)] + ["few\nwords"])
    arguments = [
        "--data",
        source,
        "--output",
        str(tmp_path / "out"),
        "--filters",
        "few_words",
        "--explain",
        "3",
    ]
    result = CliRunner().invoke(cli.app, ["data", "prepare", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"few_words: 2, limit 50 (9 characters of {source})\n    few words\n" in result.output
