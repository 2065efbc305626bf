"""Preferences: the shapes they come in, and what makes one unusable."""

import os
from pathlib import Path

import pytest
from helpers.chats import turn, write_rows

from tessera.data.preferences import Preference, load_preferences, read_transcript, to_preference

SHARED = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[2].parent / "shared"))
PROMPT = [*turn("Hi", "Hello\n\nthere"), {"role": "user", "content": "2 + 2?"}]
RIGHT, WRONG = ({"role": "assistant", "content": text} for text in ("4", "5"))
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nthere\n\nHuman: 2 + 2?\n\nAssistant: "

SHAPES = {
    "messages": {"prompt": PROMPT, "chosen": [RIGHT], "rejected": [WRONG]},
    "messages and texts": {"prompt": PROMPT, "chosen": "4", "rejected": "5"},
    "whole conversations": {"chosen": [*PROMPT, RIGHT], "rejected": [*PROMPT, WRONG]},
    "prompt and whole conversations": {
        "prompt": PROMPT,
        "chosen": [*PROMPT, RIGHT],
        "rejected": [*PROMPT, WRONG],
    },
    "transcripts": {"chosen": TRANSCRIPT + "4", "rejected": TRANSCRIPT + "5"},
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_every_shape_becomes_the_same_preference(row):
    assert to_preference(row) == Preference(PROMPT, RIGHT, WRONG)


def test_a_text_is_a_prompt_of_one_turn():
    found = to_preference({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})
    assert found == Preference([{"role": "user", "content": "2 + 2?"}], RIGHT, WRONG)


def test_transcripts_split_at_speakers_only():
    assert read_transcript(TRANSCRIPT + "4") == [*PROMPT, RIGHT]
    assert read_transcript("\n\nHuman: say Human: x\n\nAssistant: x")[0]["content"] == "say Human: x"


def test_unusable_preferences_are_counted_and_left_out(tmp_path):
    good = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
    rows = [
        good,
        {**good, "rejected": "4"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        {"chosen": [*PROMPT, RIGHT, *turn("a", "b")], "rejected": [*PROMPT, WRONG, *turn("a", "b")]},
        {**good, "chosen": ""},
        {"chosen": [*turn("a", "b"), RIGHT], "rejected": [*turn("a", "b"), WRONG]},
    ]
    said = []
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert len(list(load_preferences(path, say=said.append))) == 1
    assert said == [
        f"{path}: left out 5 of 6 preferences: 1 with two answers that are the same, 1 without a prompt, "
        "1 that differ in more than the last answer, 1 with an empty answer, 1 with roles out of order"
    ]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "a", "good": "b"}, "their columns are prompt, good; expected chosen and rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "none of its 1 preferences can be used"),
        ({"chosen": "b", "rejected": "c"}, "can be used: 1 without a prompt"),
        (
            {"prompt": "a", "chosen": None, "rejected": "b"},
            "row 1: a message of the assistant has no content",
        ),
    ],
)
def test_what_is_no_preference_is_refused_in_a_sentence(row, sentence, tmp_path):
    with pytest.raises(ValueError, match="a.jsonl") as refused:
        list(load_preferences(write_rows(tmp_path / "a.jsonl", [row])))
    assert sentence in str(refused.value)


@pytest.mark.shared
def test_nearly_all_of_hh_rlhf_can_be_used():
    said = []
    source = SHARED / "data" / "hh_rlhf" / "test.jsonl.gz"
    found = list(load_preferences(str(source), say=said.append))
    assert len(found) > 2200, said
    for pair in found:
        assert pair.prompt[-1]["role"] == "user" and pair.chosen != pair.rejected
        assert "\n\nHuman:" not in pair.chosen["content"] + pair.rejected["content"]
