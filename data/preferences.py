"""Preferences: a prompt, the answer that was chosen, the one that was rejected.

What belongs here: the shapes that such rows come in, and what makes one unusable.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .chat import as_messages, find_problem, to_message
from .rows import read_rows

SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Preference:
    """Messages that end before an answer, and the two answers, a message each."""

    prompt: list[dict]
    chosen: dict
    rejected: dict


def read_transcript(text: str) -> list[dict]:
    """Messages of a transcript in hh-rlhf's form: `\\n\\nHuman: ...\\n\\nAssistant: ...`."""
    _, *pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    speakers, words = pieces[::2], pieces[1::2]
    return [
        {"role": SPEAKERS[speaker], "content": said.strip()}
        for speaker, said in zip(speakers, words, strict=True)
    ]


def to_preference(row: dict) -> Preference | str:
    """The preference in a row, or why it has none.

    A row has `chosen` and `rejected`: texts or messages of an answer beside a `prompt` (text or messages), or
    whole conversations (messages, or a transcript) that begin alike.

    Raises:
        ValueError: if its columns are others.
    """
    if not {"chosen", "rejected"} <= row.keys():
        raise ValueError(
            f"these rows are no preferences: their columns are {', '.join(row)}; expected chosen and "
            "rejected, with or without prompt"
        )
    prompt = [to_message(message) for message in as_messages(row.get("prompt") or [], "user")]
    answers = []
    for side in ("chosen", "rejected"):
        given = row[side]
        if isinstance(given, str) and not prompt:
            given = read_transcript(given) or given
        messages = [to_message(message) for message in as_messages(given, "assistant")]
        answers.append(messages[len(prompt) :] if prompt and messages[: len(prompt)] == prompt else messages)
    chosen, rejected = answers
    while chosen and rejected and chosen[0] == rejected[0]:
        prompt, chosen, rejected = [*prompt, chosen[0]], chosen[1:], rejected[1:]
    if not chosen and not rejected:
        return "with two answers that are the same"
    if not prompt:
        return "without a prompt"
    if len(chosen) != 1 or len(rejected) != 1:
        return "that differ in more than the last answer"
    for answer in (chosen[0], rejected[0]):
        if problem := find_problem({"messages": [*prompt, answer]}):
            return problem
    return Preference(prompt, chosen[0], rejected[0])


def load_preferences(
    source: str,
    *,
    split: str | None = None,
    name: str | None = None,
    held_out: bool = False,
    limit: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[Preference]:
    """Reads preferences one at a time; those that cannot be learnt from are left out and counted.

    Args:
        source: file or folder (JSON lines, JSON, parquet), or Hub dataset.
        split, name: of a Hub dataset; default: `train` or `train_prefs`, and its only configuration.
        held_out: they are to evaluate on, as for `read_rows`.
        limit: preferences to read at most.
        say: what is told how many were left out, at the end; default: prints to stderr.

    Raises:
        ValueError: if there is nothing there, rows have other columns, or no usable one remains.
    """
    say = say or (lambda text: print(text, file=sys.stderr))
    number, kept, dropped = 0, 0, Counter()
    rows = read_rows(source, split=split, splits=("train", "train_prefs"), held_out=held_out, name=name)
    for number, row in enumerate(rows, start=1):
        try:
            found = to_preference(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        if isinstance(found, str):
            dropped[found] += 1
            continue
        yield found
        kept += 1
        if kept == limit:
            break
    reasons = ", ".join(f"{count} {why}" for why, count in dropped.items())
    if not number:
        raise ValueError(f"{source} is empty: there are no preferences in it")
    if not kept:
        raise ValueError(f"{source}: none of its {number} preferences can be used: {reasons}")
    if dropped:
        say(f"{source}: left out {dropped.total()} of {number} preferences: {reasons}")
