"""Prepared tokens for Trainer and Accelerate, and the program in docs/rows.md."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import write_prepared, write_words
from torch.utils.data import DataLoader

from tessera.data.row_dataset import RowDataset

LENGTH = 16
DOC = Path(__file__).parents[2] / "docs" / "rows.md"


def write_documents(folder: Path, tokenizer: Path, documents: int, seed: int) -> str:
    """Documents of random words, each ended by `<eos>`, which is 1."""
    generator = np.random.default_rng(seed)
    ends = generator.integers(1, 40, documents).cumsum()
    ids = generator.integers(2, 10, ends[-1])
    ids[ends - 1] = 1
    path = write_prepared(folder, ids.tolist(), [2, 3, 4, 1], 20, tokenizer)
    np.concatenate([[0], ends]).astype("<u8").tofile(Path(path, "train.idx"))
    meta = json.loads(Path(path, "data_meta.json").read_text())
    meta["train"]["documents"] = documents
    Path(path, "data_meta.json").write_text(json.dumps(meta))
    return path


@pytest.fixture
def tokens(tmp_path) -> list[str]:
    words = write_words(tmp_path / "words")
    return [write_documents(tmp_path / f"tokens{k or ''}", words, 60 + k, k) for k in range(2)]


def items(rows) -> list[dict[str, list]]:
    return [{name: value.tolist() for name, value in row.items()} for row in rows]


def test_a_dataset_is_an_epoch_of_rows_and_has_labels_that_models_shift(tokens):
    rows = RowDataset(tokens[0], LENGTH)
    stream = np.fromfile(Path(tokens[0], "train.bin"), dtype="<u2")
    found = items(rows[i] for i in range(len(rows)))
    assert len(found) == len(rows) and set(found[0]) == {"input_ids", "labels", "position_ids"}
    labels = np.array([row["labels"] for row in found])
    inputs = np.array([row["input_ids"] for row in found])
    # all but the last target of each row, which the model has no place for
    assert len(stream) - len(rows) <= (labels != -100).sum() <= len(stream)
    within = np.array([row["position_ids"] for row in found])[:, 1:] > 0
    assert (
        labels[:, 1:][within & (labels[:, 1:] != -100)] == inputs[:, 1:][within & (labels[:, 1:] != -100)]
    ).all()
    assert set(items([RowDataset(tokens[0], LENGTH, isolate_documents=False)[0]])[0]) == {
        "input_ids",
        "labels",
    }


def test_more_epochs_go_on_in_another_order_and_a_mixture_has_its_shares(tokens):
    one = RowDataset(tokens[0], LENGTH)
    two = RowDataset(tokens[0], LENGTH, epochs=2)
    assert len(two) == 2 * len(one)
    first, second = items(two[i] for i in range(len(one))), items(two[i] for i in range(len(one), len(two)))
    assert first == items(one[i] for i in range(len(one))) and first != second
    assert sorted(map(str, first)) == sorted(map(str, second))
    mixed = RowDataset([f"{tokens[0]}:0.5", f"{tokens[1]}:0.5"], LENGTH, rows=20)
    assert len(mixed) == 20 and mixed.sequence.schedule.counts(20).tolist() == [10, 10]
    with pytest.raises(IndexError):
        mixed[20]
    with pytest.raises(ValueError, match="has no weight"):
        RowDataset(tokens, LENGTH)
    with pytest.raises(ValueError, match="must be a row or more"):
        RowDataset(tokens[0], LENGTH, rows=0)


def test_workers_read_the_same_rows_and_are_not_sent_the_tokens(tokens):
    rows = RowDataset(tokens[0], LENGTH, rows=8)
    expected = torch.stack([rows[i]["input_ids"] for i in range(8)])
    sent = pickle.dumps(rows)
    assert len(sent) < 1000
    for dataset in (rows, pickle.loads(sent)):
        found = [batch["input_ids"] for batch in DataLoader(dataset, batch_size=4, num_workers=2)]
        assert torch.equal(torch.cat(found), expected)


PROCESS = """
import sys, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tessera.data.row_dataset import RowDataset
folder, first, last, per_process = sys.argv[1], *map(int, sys.argv[2:])
accelerator = Accelerator(cpu=True)
rows = torch.utils.data.Subset(RowDataset(folder, 16, rows=last), range(first, last))
loader = accelerator.prepare(DataLoader(rows, batch_size=per_process))
seen = torch.cat([accelerator.gather(batch["input_ids"]) for batch in loader])
if accelerator.is_main_process:
    print("SEEN", seen.tolist())
"""


@pytest.mark.distributed
def test_accelerate_on_two_processes_reads_what_one_does_also_after_a_stop(tokens, tmp_path):
    def read(first: int, last: int, processes: int) -> list[list[int]]:
        (script := tmp_path / "read.py").write_text(PROCESS)
        launch = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
        command = [sys.executable, *(launch if processes > 1 else []), str(script), tokens[0]]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(first), str(last), str(4 // processes)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("SEEN"))
        return json.loads(line.removeprefix("SEEN"))

    rows = RowDataset(tokens[0], LENGTH, rows=24)
    expected = [rows[i]["input_ids"].tolist() for i in range(24)]
    assert read(0, 8, 1) + read(8, 24, 2) == expected


def test_the_program_in_the_docs_trains(tokens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = DOC.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(compile(program, str(DOC), "exec"), names)
    history = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(names["rows"]) == 4 * names["trainer"].state.global_step and history
    assert (tmp_path / "runs" / "rows" / "model.safetensors").is_file()
