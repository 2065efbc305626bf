"""Items of real benchmarks in ../shared, through task files on this machine and without a network."""

import csv
import io
import json
import os
import re
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_model

from tessera import build_byte_tokenizer
from tessera.evaluation.harness import TesseraLM, load_tasks, run_tasks

pytestmark = [pytest.mark.shared, pytest.mark.usefixtures("offline")]

DATA = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[2].parent / "shared")) / "data"
LETTERS = ["A", "B", "C", "D"]


def mmlu_items(count: int) -> list[dict]:
    with zipfile.ZipFile(DATA / "mmlu" / "mmlu.zip") as archive:
        text = archive.read("data/test/abstract_algebra_test.csv").decode("utf-8")
    rows = list(csv.reader(io.StringIO(text)))[:count]
    return [{"question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5])} for row in rows]


def arc_items(count: int) -> list[dict]:
    rows = json.loads((DATA / "commonsense_mc" / "ARC-Easy.test.json").read_text())[:count]
    items = []
    for row in rows:
        question, answers = row["instruction"].split("\n\nAnswer1: ")
        choices = [part.strip() for part in re.split(r"Answer\d: ", answers.split("\n\n")[0])]
        question = question.removeprefix("Please choose the correct answer to the question: ")
        items.append({"question": question, "choices": choices, "answer": int(row["answer"][-1]) - 1})
    return items


def gsm8k_items(count: int) -> list[dict]:
    lines = (DATA / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line) for line in lines]


@torch.no_grad()
def likelihood(model, context: bytes, answer: bytes) -> float:
    """Of an answer, from as much of what is before it as the context holds."""
    ids = list(context + answer)[-model.config.max_position_embeddings - 1 :]
    logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(len(ids) - len(answer), len(ids)))


def test_mmlu_and_arc_give_the_share_of_the_likeliest_answers(write_task):
    common = {"output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:"}
    common |= {"doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}
    mmlu, arc = mmlu_items(6), arc_items(6)
    write_task("mmlu_here", mmlu, **common, doc_to_choice=LETTERS)
    folder = write_task("arc_here", arc, **common, doc_to_choice="{{choices}}")
    # Shorter than some questions, longer than every answer.
    model = tiny_model("llama-tiny", vocab_size=256, max_position_embeddings=160)
    tasks = load_tasks(["mmlu_here", "arc_here"], folder)
    entries, truncated = run_tasks(model, build_byte_tokenizer(), tasks)
    cut = 0
    for name, items in (("mmlu_here", mmlu), ("arc_here", arc)):
        right = 0
        for item in items:
            context = f"Question: {item['question']}\nAnswer:".encode()
            answers = [f" {c}".encode() for c in (LETTERS if name == "mmlu_here" else item["choices"])]
            scores = [likelihood(model, context, answer) for answer in answers]
            right += scores.index(max(scores)) == item["answer"]
            cut += sum(len(context + answer) > 161 for answer in answers)
        assert entries[name]["metrics"]["acc"]["value"] == pytest.approx(right / len(items))
        assert entries[name]["items"] == 6
    assert truncated == cut > 0


def test_gsm8k_finds_the_number_after_the_last_mark(byte_model, write_task, monkeypatch):
    """The answers of the data set itself, in place of the model's, are all right; others are all wrong."""
    items = gsm8k_items(4)
    task = {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer.split('####')[-1].strip()}}",
        "generation_kwargs": {"until": ["Question:"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [
            {
                "name": "strict-match",
                "filter": [
                    {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
                    {"function": "take_first"},
                ],
            }
        ],
    }
    folder = write_task("gsm8k_here", items, **task)
    entries, _ = run_tasks(*byte_model, load_tasks(["gsm8k_here"], folder))
    assert entries["gsm8k_here"]["metrics"]["exact_match (strict-match)"]["value"] == 0
    answers = {f"Question: {item['question']}\nAnswer:": item["answer"] for item in items}
    monkeypatch.setattr(
        TesseraLM, "generate_until", lambda _, requests: [answers[r.args[0]] for r in requests]
    )
    entries, _ = run_tasks(*byte_model, load_tasks(["gsm8k_here"], folder))
    assert entries["gsm8k_here"]["metrics"]["exact_match (strict-match)"]["value"] == 1
