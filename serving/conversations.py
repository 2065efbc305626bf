"""Conversations as a model reads and writes them: from messages to token ids, from an answer to its parts.

What belongs here: everything about chats that the tokenizer knows (its chat template and its response
template), for all that serve them. Messages are in the form of the OpenAI protocol.
"""

import json
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

from jinja2.exceptions import TemplateError

from tessera.tokenization.chat import find_end_of_turn

# names of the region with the model's thoughts
_REASONING = ("thinking", "reasoning", "reasoning_content")

# ("content" | "reasoning_content", text) or ("tool_call", call)
Part = tuple[str, Any]


class ChatFormat:
    """What a tokenizer says about conversations.

    Args:
        tokenizer: with or without a chat template.

    Attributes:
        available: whether there is a chat template.
        end_ids: the token that ends an assistant's turn, if it is a special one.
        shown: special tokens that the parts of an answer are told apart by.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.available = bool(tokenizer.chat_template)
        self.template = getattr(tokenizer, "response_template", None) if self.available else None
        end = find_end_of_turn(tokenizer) if self.available else None
        self.end_ids = frozenset() if end is None else frozenset({end})
        spelled = json.dumps(self.template, ensure_ascii=False) if self.template else ""
        self.shown = frozenset(
            id
            for token, id in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
            if token in spelled and id not in self.end_ids
        )

    def render(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """The prompt for the assistant's next turn.

        Spellings of special tokens inside messages stay text: nobody ends a turn from within one.

        Args:
            messages: with `role` and `content`; tool calls with arguments as JSON text or objects.
            tools: functions that the model may call, as JSON schemas.

        Returns:
            Token ids.

        Raises:
            ValueError: without a chat template, or if it refuses the messages.
        """
        if not self.available:
            raise ValueError("this model has no chat template: it continues text, use completions instead")
        messages = [_with_parsed_arguments(message) for message in messages]
        # Older versions of transformers would take it for a variable of the template.
        sanitize = "sanitize_control_tokens" in signature(self.tokenizer.apply_chat_template).parameters
        if not sanitize:
            spelled = json.dumps([messages, tools], ensure_ascii=False)
            if found := [token for token in self.tokenizer.all_special_tokens if token in spelled]:
                raise ValueError(f"messages cannot contain {found[0]} with this version of transformers")
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                add_generation_prompt=True,
                return_dict=True,
                **({"sanitize_control_tokens": True} if sanitize else {}),
            )["input_ids"]
        except (TemplateError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    def reader(self, prompt: list[int], tools: list[dict] | None = None) -> "AnswerReader":
        """For the answer to a prompt: tells its content from reasoning and tool calls."""
        if not self.template:
            return AnswerReader()
        start = self.tokenizer.decode(prompt, skip_special_tokens=False)
        return AnswerReader(self.tokenizer.get_response_parser(prefix=start, tools=tools))


class AnswerReader:
    """Splits an answer into its parts while it is written.

    Args:
        parser: of the response template; without one, everything is content.
    """

    def __init__(self, parser=None):
        self._parser = parser
        # What a tool call is written as, until it is known to be one.
        self._aside = ""
        # Templates put line breaks between the parts, which belong to none of them.
        self._space, self._fresh = "", False

    def feed(self, text: str) -> Iterator[Part]:
        """The parts that a piece of text completes."""
        if self._parser is not None:
            yield from self._read(lambda: self._parser.feed(text), text)
        elif text:
            yield "content", text

    def end(self) -> Iterator[Part]:
        """The parts that the end of the answer completes."""
        if self._parser is not None:
            yield from self._read(lambda: self._parser.finalize()[1], "")
        if self._space:
            yield "content", self._space

    def _read(self, step: Callable[[], list[dict]], text: str) -> Iterator[Part]:
        try:
            events = step()
        except Exception:
            # A tool call that is not JSON, for one: what the model wrote is shown as it is.
            self._parser = None
            if written := self._space + self._aside + text:
                yield "content", written
            self._space = ""
            return
        for event in events:
            name, kind = event["field"], event["type"]
            name = "reasoning_content" if name in _REASONING else name
            if kind == "region_open" and name == "reasoning_content":
                self._space, self._fresh = "", True
            elif kind == "region_chunk" and name in ("content", "reasoning_content"):
                if words := self._between_parts(event["text"]):
                    yield name, words
            elif kind == "region_chunk":
                self._aside += event["text"]
            elif kind == "region_close" and name != "content":
                self._space, self._fresh = "", True
                if name == "tool_calls":
                    yield from self._calls(event["value"])
                self._aside = ""

    def _between_parts(self, text: str) -> str:
        """Leaves out white space where a part begins, and holds it back where one may end."""
        text = self._space + (text.lstrip() if self._fresh else text)
        words = text.rstrip()
        self._space = text[len(words) :]
        self._fresh = self._fresh and not words
        return words

    def _calls(self, value: Any) -> Iterator[Part]:
        calls = [
            call.get("function", call) if isinstance(call, dict) else None
            for call in (value if isinstance(value, list) else [value])
        ]
        if all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
            yield from (("tool_call", call) for call in calls)
        else:
            # JSON, but no call
            yield "content", self._aside


def _with_parsed_arguments(message: dict) -> dict:
    """Arguments of tool calls as objects, which is what templates of many models expect."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    parsed = []
    for call in calls:
        function = dict(call["function"])
        if isinstance(function["arguments"], str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"the arguments of tool call {function['name']} are not JSON") from error
        parsed.append({**call, "function": function})
    return {**message, "tool_calls": parsed}
