"""Conversations: rows of known datasets as `{"messages": [...], "tools": [...]}`, and these as token ids.

Messages are OpenAI's: `role` system, user, assistant or tool, `content`, and where there are any
`reasoning_content` and `tool_calls`. What belongs here: the shapes that conversations come in (`ROW_SHAPES`,
`HUB_DATASETS`), what makes one unusable, and which of its tokens are the assistant's. How a conversation is
written out as text is the tokenizer's chat template's business alone.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .rows import read_rows

# What the chat format begins and ends a turn with (`tokenization/chat.py`).
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"

IGNORED = -100  # label of a token that is not trained on

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
    """Where in a dataset on the Hub its conversations are."""

    name: str | None
    splits: tuple[str, ...]


HUB_DATASETS = {
    "open-thoughts/OpenThoughts-114k": HubDataset(None, ("train",)),
    "nvidia/OpenCodeReasoning": HubDataset("split_0", ("split_0", "train")),
    "HuggingFaceH4/ultrachat_200k": HubDataset(None, ("train_sft",)),
    "HuggingFaceTB/smoltalk": HubDataset("all", ("train",)),
}


def _from_messages(row: dict) -> list[dict]:
    return list(row["messages"])


def _from_conversations(row: dict) -> list[dict]:
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return system + list(row["conversations"])


def _from_pair(question: str, answer: str) -> Callable[[dict], list[dict]]:
    """Two columns, each a text or itself a list of messages."""

    def messages(row: dict) -> list[dict]:
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        return system + as_messages(row[question], "user") + as_messages(row[answer], "assistant")

    return messages


def _from_instruction(row: dict) -> list[dict]:
    more = row.get("input") or row.get("context")
    question = f"{row['instruction']}\n\n{more}" if more else row["instruction"]
    answer = row["output"] if "output" in row else row["response"]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# Columns that a row has -> its messages. The first that fits is taken.
ROW_SHAPES: tuple[tuple[set[str], Callable[[dict], list[dict]]], ...] = (
    ({"messages"}, _from_messages),
    ({"conversations"}, _from_conversations),
    ({"prompt", "completion"}, _from_pair("prompt", "completion")),
    ({"prompt", "response"}, _from_pair("prompt", "response")),
    ({"prompt", "answer"}, _from_pair("prompt", "answer")),
    ({"question", "answer"}, _from_pair("question", "answer")),
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
    content = given.get("content", given.get("value"))
    calls = given.get("tool_calls") or ([given["tool_call"]] if given.get("tool_call") else [])
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
        if any(token in text for text in _texts(message) for token in (TURN_START, TURN_END)):
            return f"that spell {TURN_START} or {TURN_END}"
        before = role
    return None


def _texts(value: Any) -> Iterator[str]:
    """Every string inside of a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


# ---- reading ----


def load_conversations(
    source: str,
    *,
    split: str | None = None,
    name: str | None = None,
    limit: int | None = None,
    streaming: bool = True,
    say: Callable[[str], None] | None = None,
) -> Iterator[dict]:
    """Reads conversations one at a time; those that cannot be learnt from are left out and counted.

    Args:
        source: file or folder (JSON lines, JSON, parquet), or Hub dataset; see `HUB_DATASETS` for those whose
            places are known.
        split, name: of another Hub dataset; default: `train`, and its only configuration.
        limit: conversations to read at most.
        streaming: read a Hub dataset as it comes.
        say: what is told how many were left out, at the end; default: prints to stderr.

    Raises:
        ValueError: if there is nothing there, rows have no shape that is known, or no usable one remains.
    """
    known = HUB_DATASETS.get(source, HubDataset(None, ("train",)))
    splits = (split,) if split else known.splits
    rows = read_rows(source, splits=splits, name=name or known.name, streaming=streaming)
    say = say or (lambda text: print(text, file=sys.stderr))
    number, kept, dropped, example = 0, 0, Counter(), {}
    for number, row in enumerate(rows, start=1):
        try:
            conversation = to_conversation(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        problem = find_problem(conversation)
        if problem is not None:
            dropped[problem] += 1
            example.setdefault(problem, number)
            continue
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


# ---- tokens ----


def check_template(tokenizer) -> None:
    """Refuses a tokenizer whose chat template does not tell what the assistant said.

    Raises:
        ValueError: if there is no template, or no generation mark in it.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError("the tokenizer has no chat template, so conversations cannot be written out with it")
    if not re.search(r"\{%-?\s*generation\b", template):
        raise ValueError(
            "the tokenizer's chat template does not mark what the assistant says, so everything would be "
            "masked; put {% generation %} and {% endgeneration %} around it, end-of-turn token included"
        )


def encode_conversation(tokenizer, conversation: dict) -> dict[str, list[int]]:
    """Token ids of a conversation, and labels that are the same for the assistant's tokens, else `IGNORED`.

    Raises:
        ValueError: if the chat template refuses it.
    """
    try:
        encoded = tokenizer.apply_chat_template(
            conversation["messages"],
            tools=conversation.get("tools"),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
    except Exception as error:  # jinja2's, which need not be imported here for its name
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise ValueError(f"the chat template refuses a conversation: {error}") from error
    ids, spans, trained = encoded["input_ids"], encoded["offset_mapping"], list(encoded["assistant_masks"])
    for i in range(1, len(ids)):
        # Of a character in several tokens that ends a generation block the library marks only the first.
        if trained[i - 1] and spans[i][0] < spans[i - 1][1]:
            trained[i] = 1
    return {
        "input_ids": ids,
        "labels": [i if ours else IGNORED for i, ours in zip(ids, trained, strict=True)],
    }


def mark_trained(tokenizer, ids: list[int], labels: list[int], color: bool, characters: int = 1500) -> str:
    """A conversation as text with what is trained in green, or between ⟦ and ⟧ where there are no colours."""
    start, end = ("\033[32m", "\033[0m") if color else ("⟦", "⟧")
    parts, written, first = [], 0, 0
    while first < len(ids) and written < characters:
        trained, last = labels[first] != IGNORED, first
        while last < len(ids) and (labels[last] != IGNORED) == trained:
            last += 1
        text = tokenizer.decode(ids[first:last])
        if written + len(text) > characters:
            text = text[: characters - written] + " ..."
        parts.append(f"{start}{text}{end}" if trained else text)
        written, first = written + len(text), last
    return "".join(parts)
