"""Group relative policy optimization: that answers which earn more become likelier, and how it refuses."""

import json
from pathlib import Path

import pytest
import torch
from helpers.chats import chat_model, chat_tokenizer, write_rows
from transformers import AutoModelForCausalLM

from tessera.training import grpo as module
from tessera.training.grpo import GRPOArguments, grpo, load_problems
from tessera.training.rewards import number_reward


def vowels(completions, **_) -> list[float]:
    """Share of an answer that is vowels: plain chance gives a random model a seventh or so."""
    texts = [completion[0].get("content") or "" for completion in completions]
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in texts]


def arguments(folder: Path, model: str, **given) -> GRPOArguments:
    if "data" not in given and "task" not in given:
        given["task"] = "arithmetic"
    defaults = {"steps": 3, "batch_size": 8, "num_generations": 4, "max_completion_len": 8, "limit": 40}
    defaults |= {"learning_rate": 3e-3, "evaluations": 0, "sample_tokens": 4}
    return GRPOArguments(**{"model": model, "save_path": str(folder / "run"), **defaults, **given})


def sampled(folder: Path | str) -> list[str]:
    """64 answers to a question that is not of the data."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), chat_tokenizer()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 55 plus 44?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    torch.manual_seed(1)
    out = model.generate(prompt.repeat(64, 1), do_sample=True, top_k=0, max_new_tokens=8)
    return tokenizer.batch_decode(out[:, prompt.shape[1] :], skip_special_tokens=True)


def mean_reward(texts: list[str]) -> float:
    return sum(vowels([[{"content": text}] for text in texts])) / len(texts)


@pytest.mark.parametrize("preset", ["llama-tiny", "bytegpt-tiny"])
def test_what_earns_more_becomes_likelier(preset, tmp_path):
    base = chat_model(tmp_path / "base", preset)
    steps = 40 if preset == "llama-tiny" else 2
    given = {"steps": steps, "batch_size": 16, "num_generations": 8, "evaluations": 1, "limit": 400}
    args = arguments(tmp_path, base, learning_rate=1e-2, **given)
    result = grpo(args, rewards=[(vowels, 1.0)])
    assert result.before.keys() == result.after.keys() == {"mean_reward", "vowels"}
    assert (result.folder / "loss.png").is_file()
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("reward" in line for line in lines) == steps
    if preset == "llama-tiny":
        before, after = mean_reward(sampled(base)), mean_reward(sampled(result.final))
        assert after > before + 0.25
        assert result.after["mean_reward"] > result.before["mean_reward"] + 0.25


def test_rewards_are_weighed_and_told_apart(tmp_path):
    def always(completions, **_):
        return [1.0] * len(completions)

    def sometimes(completions, answer, **_):
        assert all(text.isdigit() for text in answer)
        return [0.5] * len(completions)

    args = arguments(tmp_path, chat_model(tmp_path / "base"), steps=1)
    result = grpo(args, rewards=[(always, 0.25), (sometimes, 2.0)])
    assert result.before == {"mean_reward": 1.25, "always": 1.0, "sometimes": 0.5}
    line = next(
        line for line in (result.folder / "metrics.jsonl").read_text().splitlines() if '"reward"' in line
    )
    assert json.loads(line)["reward"] == 1.25


def test_answers_end_with_the_turn_and_thoughts_are_kept_apart(tmp_path, monkeypatch):
    """What TRL gives to rewards and what is measured on held-out problems are taken apart alike."""
    tokenizer = chat_tokenizer()
    ids = tokenizer("<think>\n7\n</think>\n8<|im_end|>\n<|im_start|>user\n9", return_tensors="pt")[
        "input_ids"
    ]

    def generate(self, input_ids=None, **kwargs):
        return torch.cat([input_ids, ids.expand(len(input_ids), -1)], 1)

    monkeypatch.setattr(module._Trainer, "training_step", _give_up)
    base = chat_model(tmp_path / "base")
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        from tessera import TesseraForCausalLM

        patched.setattr(TesseraForCausalLM, "generate", generate)
        data = write_rows(tmp_path / "p.jsonl", [{"question": "7 + 1?", "answer": "#### 8"}] * 9)
        grpo(arguments(tmp_path, base, data=data, max_completion_len=64))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["number_reward"] == 1


def _give_up(self, *args, **kwargs):
    raise ZeroDivisionError


def test_problems_are_questions_with_answers(tmp_path):
    rows = [
        {"question": "1 + 1?", "answer": "#### 2"},
        {"prompt": "1 + 1?", "answer": 2},
        {"prompt": [{"role": "user", "content": "1 + 1?"}], "answer": "2"},
    ]
    problems = load_problems(write_rows(tmp_path / "a.jsonl", rows))
    assert [problem["prompt"] for problem in problems] == [[{"role": "user", "content": "1 + 1?"}]] * 3
    assert number_reward(["2"] * 3, answer=[problem["answer"] for problem in problems]) == [1, 1, 1]
    assert len(load_problems(str(tmp_path / "a.jsonl"), limit=2)) == 2
    write_rows(tmp_path / "test-0.jsonl", rows[:1])
    assert len(load_problems(str(tmp_path), split="test")) == 1
    for content, sentence in (
        ("", "is empty"),
        ('{"q": 1}', "row 1: no problem: its columns are q; expected"),
    ):
        (tmp_path / "b.jsonl").write_text(content)
        with pytest.raises(ValueError, match=sentence):
            load_problems(str(tmp_path / "b.jsonl"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"data": "none.jsonl"}, "there is no file or folder none.jsonl"),
        ({"task": "poetry"}, "there is no task 'poetry'; there is arithmetic"),
        ({"data": "a", "task": "arithmetic"}, "give --data with problems or --task arithmetic, one of them"),
        ({"task": None}, "give --data with problems or --task arithmetic, one of them"),
        ({"batch_size": 9}, "--batch-size 9 is no multiple of --num-generations 4"),
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"max_completion_len": 250}, "no problem leaves room for --max-completion-len 250"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(given, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        grpo(arguments(tmp_path, chat_model(tmp_path / "base"), **given))
    assert not (tmp_path / "run").exists()


def test_an_exhausted_gpu_ends_with_advice(tmp_path, monkeypatch):
    def training_step(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module._Trainer, "training_step", training_step)
    with pytest.raises(ValueError, match="a shorter --max-completion-len; a smaller --batch-size"):
        grpo(arguments(tmp_path, chat_model(tmp_path / "base")))
