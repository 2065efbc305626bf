"""Conversations: rows of known datasets as `{"messages": [...], "tools": [...]}`.

Messages are OpenAI's: `role` system, user, assistant or tool, `content`, and where there are any
`reasoning_content` and `tool_calls`. What belongs here: the shapes that conversations come in (`ROW_SHAPES`,
`PRESETS`) and what makes one unusable. How a conversation is written out as text is the tokenizer's chat
template's business alone; `chat_rows.py` makes token ids of it.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.tokenization.chat import CONTENT_MARKS, TURN_TOKENS

from .rows import read_rows

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# What may stand before each role. A system turn is only ever the first.
BEFORE = {
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}

THOUGHTS = (
    # OpenThoughts
    re.compile(
        r"\s*<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>\s*"
        r"(?:<\|begin_of_solution\|>)?(.*?)(?:<\|end_of_solution\|>)?\s*",
        re.DOTALL,
    ),
    # DeepSeek-R1 and whoever learnt from it
    re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL),
)


# ---- shapes ----


@dataclass(frozen=True)
class HubDataset:
    """Where on the Hub conversations are.

    Attributes:
        path: of the dataset.
        name: of its configuration; None for its only one.
        splits: to train on, the first of them that there is.
    """

    path: str
    name: str | None = None
    splits: tuple[str, ...] = ("train",)


PRESETS = {
    "openthoughts": HubDataset("open-thoughts/OpenThoughts-114k"),
    # The one split of this configuration has been called both.
    "opencodereasoning": HubDataset("nvidia/OpenCodeReasoning", "split_0", ("split_0", "train")),
    "ultrachat": HubDataset("HuggingFaceH4/ultrachat_200k", None, ("train_sft",)),
    "smoltalk": HubDataset("HuggingFaceTB/smoltalk", "all"),
    "tulu3": HubDataset("allenai/tulu-3-sft-mixture"),
    "no-robots": HubDataset("HuggingFaceH4/no_robots", None, ("train", "train_sft")),
    "openhermes": HubDataset("teknium/OpenHermes-2.5"),
    "dolly": HubDataset("databricks/databricks-dolly-15k"),
    "alpaca": HubDataset("tatsu-lab/alpaca"),
    "gsm8k": HubDataset("openai/gsm8k", "main"),
}


def find_dataset(source: str) -> HubDataset:
    """The preset of this name or path, where no file has it; else the source as it is."""
    if not Path(source).expanduser().exists():
        if source in PRESETS:
            return PRESETS[source]
        for known in PRESETS.values():
            if known.path == source:
                return known
    return HubDataset(source)


def preset_path(preset: str) -> str:
    """Where on the Hub a preset is.

    Raises:
        ValueError: if there is none of this name.
    """
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    return PRESETS[preset].path


class Conversation(dict):
    """A conversation that knows where it was read.

    Attributes:
        place: source and number of the row, for sentences about it.
    """

    place = ""


def _from_messages(row: dict) -> list[dict]:
    return list(row["messages"])


def _system(row: dict) -> list[dict]:
    """What stands in a column of its own before the first turn."""
    text = row.get("system") or row.get("system_prompt")
    return [{"role": "system", "content": text}] if text else []


def _from_conversations(row: dict) -> list[dict]:
    messages = list(row["conversations"])
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    named = first.get("role") or first.get("from")
    return messages if named == "system" else _system(row) + messages


def _from_pair(question: str, answer: str) -> Callable[[dict], list[dict]]:
    """Two columns, each a text or itself a list of messages."""

    def messages(row: dict) -> list[dict]:
        if row[question] == "-":
            raise ValueError(f"the {question} is '-': this part of the dataset does not hold its questions")
        return _system(row) + as_messages(row[question], "user") + as_messages(row[answer], "assistant")

    return messages


def _from_instruction(row: dict) -> list[dict]:
    more = row.get("input") or row.get("context")
    question = f"{row['instruction']}\n\n{more}" if more else row["instruction"]
    answer = row["output"] if "output" in row else row["response"]
    return _system(row) + [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# Columns that a row has -> its messages. The first that fits is taken.
ROW_SHAPES: tuple[tuple[set[str], Callable[[dict], list[dict]]], ...] = (
    ({"messages"}, _from_messages),
    ({"conversations"}, _from_conversations),
    ({"prompt", "completion"}, _from_pair("prompt", "completion")),
    ({"prompt", "response"}, _from_pair("prompt", "response")),
    ({"prompt", "answer"}, _from_pair("prompt", "answer")),
    ({"question", "answer"}, _from_pair("question", "answer")),
    ({"question", "response"}, _from_pair("question", "response")),
    ({"query", "response"}, _from_pair("query", "response")),
    ({"problem", "solution"}, _from_pair("problem", "solution")),
    ({"instruction", "output"}, _from_instruction),
    ({"instruction", "response"}, _from_instruction),
    ({"input", "output"}, _from_pair("input", "output")),
)


def as_messages(value: Any, role: str) -> list[dict]:
    """A text as one message of `role`; a list of messages as it is."""
    return list(value) if isinstance(value, list) else [{"role": role, "content": value}]


def to_conversation(row: dict) -> dict:
    """The conversation of a row.

    Returns:
        `messages` as described above, and `tools` where the row has any.

    Raises:
        ValueError: if no shape fits its columns, or a message is none.
    """
    for columns, read in ROW_SHAPES:
        if columns <= row.keys():
            conversation = {"messages": [to_message(message) for message in read(row)]}
            tools = row.get("tools")
            tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
            return {**conversation, "tools": tools} if tools else conversation
    known = "; ".join(" + ".join(sorted(columns, key=list(row).count)) for columns, _ in ROW_SHAPES)
    raise ValueError(
        f"these rows are no conversations: their columns are {', '.join(row)}; expected one of: {known}"
    )


def to_message(given: dict) -> dict:
    """A message in OpenAI's form from that, ShareGPT's (`from`, `value`), or one with a single `tool_call`.

    Raises:
        ValueError: if it has no role that is known, or nothing in it.
    """
    if not isinstance(given, dict):
        raise ValueError(f"a message is an object with role and content, got {type(given).__name__}")
    role = ROLES.get(given.get("role") or given.get("from"))
    if role is None:
        named = given.get("role") or given.get("from")
        raise ValueError(f"a message has the role {named!r}; expected system, user, assistant or tool")
    content = given.get("value") if given.get("content") is None else given["content"]
    calls = given.get("tool_calls") or ([given["tool_call"]] if given.get("tool_call") else [])
    calls = json.loads(calls) if isinstance(calls, str) and calls.strip() else calls
    if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError(f"tool_calls of a message are {type(calls).__name__}, expected a list of objects")
    if content is None and not calls:
        raise ValueError(f"a message of the {role} has no content; it has {', '.join(given)}")
    if content is not None and not isinstance(content, str | list):
        raise ValueError(
            f"the content of a message of the {role} is {type(content).__name__}, expected a text or parts"
        )
    message = {"role": role, "content": "" if content is None else content}
    reasoning = next((given[k] for k in ("reasoning_content", "thinking", "reasoning") if given.get(k)), None)
    if role == "assistant" and reasoning is None and isinstance(content, str):
        for pattern in THOUGHTS:
            if match := pattern.fullmatch(content):
                reasoning, message["content"] = match[1].strip(), match[2].strip()
                break
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [_tool_call(call) for call in calls]
    message.update({key: given[key] for key in ("name", "tool_call_id") if given.get(key)})
    return message


def _tool_call(call: dict) -> dict:
    function = call.get("function") or call
    if not isinstance(function, dict) or not function.get("name"):
        raise ValueError("a tool call has no name")
    arguments = function.get("arguments") or {}
    function = {"name": function["name"], "arguments": arguments}
    return {**({"id": call["id"]} if call.get("id") else {}), "type": "function", "function": function}


def find_problem(conversation: dict) -> str | None:
    """Why a conversation cannot be learnt from, or None."""
    before = None
    roles = [message["role"] for message in conversation["messages"]]
    if "assistant" not in roles:
        return "without an assistant turn"
    for role, message in zip(roles, conversation["messages"], strict=True):
        if before not in BEFORE[role]:
            return "with roles out of order"
        if role == "assistant" and not any(map(message.get, ("content", "tool_calls", "reasoning_content"))):
            return "with an empty answer"
        # In the text of a turn these would end it and begin another, which nobody said.
        if any(token in text for text in _texts(message) for token in TURN_TOKENS):
            return "that spell a token which begins or ends turns"
        before = role
    return None


def control_tokens(tokenizer) -> set[str]:
    """Special tokens of a tokenizer that no text of a message may spell.

    All but `CONTENT_MARKS` that its chat template writes: those cannot be told from a text's own.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    template = str(tokenizer.chat_template)
    return (special | set(tokenizer.all_special_tokens)) - {
        mark for mark in CONTENT_MARKS if mark in template
    }


def spells(conversation: dict, tokens: set[str]) -> bool:
    """Whether a text in a conversation, or in its tools, spells one of the tokens."""
    return any(token in text for text in _texts(dict(conversation)) for token in tokens)


def _texts(value: Any) -> Iterator[str]:
    """Every string inside of a message, names of fields among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield str(name)
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


# ---- reading ----


def load_conversations(
    source: str,
    *,
    split: str | None = None,
    name: str | None = None,
    held_out: bool = False,
    limit: int | None = None,
    streaming: bool = True,
    say: Callable[[str], None] | None = None,
) -> Iterator[Conversation]:
    """Reads conversations one at a time; those that cannot be learnt from are left out and counted.

    Args:
        source: file or folder (JSON lines, JSON, parquet), Hub dataset, or name in `PRESETS`.
        split: of a Hub dataset or folder; default: that of its preset, or `train`, see `read_rows`.
        name: of a Hub dataset's configuration; default: that of its preset, or the only one.
        held_out: they are to evaluate on, as for `read_rows`.
        limit: conversations to read at most.
        streaming: read a Hub dataset as it comes.
        say: what is told how many were left out, at the end; default: prints to stderr.

    Raises:
        ValueError: if there is nothing there, rows have no shape that is known, or no usable one remains.
    """
    known = find_dataset(source)
    source = known.path
    where = {"split": split, "splits": known.splits, "name": name or known.name, "held_out": held_out}
    rows = read_rows(source, streaming=streaming, **where)
    say = say or (lambda text: print(text, file=sys.stderr))
    number, kept, dropped, example = 0, 0, Counter(), {}
    for number, row in enumerate(rows, start=1):
        try:
            conversation = Conversation(to_conversation(row))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        problem = find_problem(conversation)
        if problem is not None:
            dropped[problem] += 1
            example.setdefault(problem, number)
            continue
        conversation.place = f"{source}, row {number}"
        yield conversation
        kept += 1
        if kept == limit:
            break
    reasons = ", ".join(f"{count} {why} (first: row {example[why]})" for why, count in dropped.items())
    if not number:
        raise ValueError(f"{source} is empty: there are no conversations in it")
    if not kept:
        raise ValueError(f"{source}: none of its {number} conversations can be used: {reasons}")
    if dropped:
        say(f"{source}: left out {dropped.total()} of {number} conversations: {reasons}")
