"""Rewards and problems: what counts as right."""

import json
import os
from fractions import Fraction
from pathlib import Path

import pytest

from tessera.training.rewards import arithmetic_problems, find_number, format_reward, number_reward

SHARED = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[2].parent / "shared"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 3 and so\n#### 42", 42),
        ("#### 1\n#### 2", 2),
        ("16 - 3 - 4 = 9 eggs, so $1,234.50.", Fraction("1234.5")),
        ("The answer is -7.", -7),
        ("= $-7", -7),
        ("-$7", -7),
        ("half: 1/2", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("1/0", None),
        ("#### none, though 5 came before", 5),
        ("12 34", 34),
        ("#### 12 34", 12),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_answers_with(text, number):
    assert find_number(text) == number


def test_the_number_is_compared_exactly():
    texts = ["so 18.0", "#### 18", "18 or 19", "19 or 18", "1 8", "eighteen"]
    assert number_reward(texts, answer=["work\n#### 18"] * 6) == [1, 1, 0, 1, 0, 0]


def test_thoughts_do_not_count():
    messages = [{"role": "assistant", "content": "5", "thinking": "18"}]
    assert number_reward(
        [messages, "<think>#### 18</think> 5", "<think>#### 5</think> 18"], answer=["18"] * 3
    ) == [
        0,
        0,
        1,
    ]
    assert number_reward([[{"role": "assistant"}], []], answer=["18"] * 2) == [0, 0]


def test_the_form_is_a_last_line_with_a_number():
    texts = ["work\n#### 18", "#### 1,000 ", "####18\nmore", "#### eighteen", "18", "so #### 18"]
    assert format_reward(texts) == [1, 1, 0, 0, 0, 0]


def test_arithmetic_is_right_and_follows_its_seed():
    problems = arithmetic_problems(300, seed=3, difficulty=3)
    assert problems == arithmetic_problems(300, seed=3, difficulty=3)
    assert problems != arithmetic_problems(300, seed=4, difficulty=3)
    words = {"plus": "+", "minus": "-", "times": "*"}
    questions = [problem["prompt"][0]["content"] for problem in problems]
    assert len(set(questions)) == 300
    for question, problem in zip(questions, problems, strict=True):
        expression = question.removeprefix("What is ").removesuffix("?")
        for word, sign in words.items():
            expression = expression.replace(word, sign)
        assert problem["answer"] == str(eval(expression))
    assert all(any(word in question for question in questions) for word in words)


def test_difficulty_is_the_number_of_digits():
    easy = [problem["prompt"][0]["content"] for problem in arithmetic_problems(100, difficulty=1)]
    assert len(set(easy)) == 100 and all("plus" in question for question in easy)
    assert max(len(problem["answer"]) for problem in arithmetic_problems(50, difficulty=4)) > 4
    assert len(arithmetic_problems(150, difficulty=1)) == 150
    with pytest.raises(ValueError, match="difficulty must be at least 1"):
        arithmetic_problems(5, difficulty=0)


@pytest.mark.shared
def test_the_references_of_gsm8k_earn_all_and_published_wrong_answers_nothing():
    folder = SHARED / "data" / "gsm8k"
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = [row["answer"] for row in rows]
    assert number_reward(answers, answer=answers) == [1.0] * 1319
    assert sum(format_reward(answers)) == 1319
    lines = (folder / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    agree = total = 0
    for row in map(json.loads, lines):
        for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            given = row[model]["solution"].replace("\nA:", "\n####")
            earned = number_reward([given], answer=[row["ground_truth"].replace("\nA:", "\n####")])[0]
            agree += bool(earned) == row[model]["is_correct"]
            total += 1
    assert agree / total > 0.995
