"""Rewards that a program can give, and problems that it can pose: GSM8K, arithmetic.

A reward takes completions and the columns of their problems, a list each, and gives a number for each
completion: TRL's form. What belongs here: what counts as right.
"""

import random
import re
from fractions import Fraction
from typing import Any

NUMBER = re.compile(r"-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|-?\$?\.\d+")
ANSWER_MARK = "####"
OPERATIONS = {"+": "plus", "-": "minus", "*": "times"}


def text_of(completion: str | list[dict]) -> str:
    """The words of a completion, a text or a list with one message, after its thoughts."""
    text = (
        completion if isinstance(completion, str) else (completion[-1] if completion else {}).get("content")
    )
    return text.rpartition("</think>")[2] if isinstance(text, str) else ""


def find_number(text: str) -> Fraction | None:
    """The number that a text answers with: the first after its last `####`, else the last in it."""
    _, mark, answer = text.rpartition(ANSWER_MARK)
    found = NUMBER.findall(answer)
    if not found:
        return None
    number = (found[0] if mark else found[-1]).replace(",", "").replace("$", "")
    try:
        # Fraction knows no decimals above a bar, and no bar over nothing.
        above, _, below = number.partition("/")
        return Fraction(above) / Fraction(below or 1)
    except ZeroDivisionError:
        return None


def number_reward(completions: list[str | list[dict]], answer: list[str], **_: Any) -> list[float]:
    """1 where a completion answers with exactly the number that the reference does, else 0 (GSM8K's rule)."""
    rewards = []
    for completion, reference in zip(completions, answer, strict=True):
        number = find_number(text_of(completion))
        rewards.append(float(number is not None and number == find_number(reference)))
    return rewards


def format_reward(completions: list[str | list[dict]], **_: Any) -> list[float]:
    """1 where a completion ends with a line `#### <number>`, as GSM8K's solutions do, else 0."""
    pattern = re.compile(rf"(?:.*\n)?{ANSWER_MARK} ?(?:{NUMBER.pattern})\s*", re.DOTALL)
    return [float(pattern.fullmatch(text_of(completion)) is not None) for completion in completions]


def arithmetic_problems(count: int, seed: int = 0, difficulty: int = 1) -> list[dict]:
    """Problems of one operation on two numbers.

    Args:
        count: how many; they differ as far as there are as many.
        seed: of the draw.
        difficulty: digits of the numbers; from 2 on there are differences beside sums, from 3 on products.

    Returns:
        Rows with `prompt` (messages) and `answer`.
    """
    if difficulty < 1:
        raise ValueError(f"difficulty must be at least 1, got {difficulty}")
    draw = random.Random(f"{seed} {difficulty}")
    operations = list(OPERATIONS)[: min(difficulty, len(OPERATIONS))]
    rows, seen = [], set()
    for _ in range(100 * count):
        a, b, sign = draw.randrange(10**difficulty), draw.randrange(10**difficulty), draw.choice(operations)
        if (a, b, sign) in seen and len(seen) < len(operations) * 100**difficulty:
            continue
        seen.add((a, b, sign))
        result = {"+": a + b, "-": a - b, "*": a * b}[sign]
        question = f"What is {a} {OPERATIONS[sign]} {b}?"
        rows.append({"prompt": [{"role": "user", "content": question}], "answer": str(result)})
        if len(rows) == count:
            break
    return rows
