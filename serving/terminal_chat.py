"""A chat in the terminal: lines in, answers streamed out.

What belongs here: what a person types and sees, and what is remembered. Prompts come from the chat template
and text from the engine, as for the server.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from tessera.serving.conversations import ChatFormat
from tessera.serving.engine import Engine, Finished, GenerationFailed, Request

HELP = "Type a message; /clear forgets the conversation, /system TEXT sets the instructions, /exit leaves."


@dataclass
class TerminalChat:
    """A conversation with a model.

    Attributes:
        engine: answers.
        format: how the model reads conversations.
        settings: of each answer; its prompt is filled in.
        system: instructions that come first; "" for none.
    """

    engine: Engine
    format: ChatFormat
    settings: Request
    system: str = ""

    def __post_init__(self):
        if not self.format.available:
            raise ValueError(
                "this model has no chat template: continue texts with 'tessera generate --interactive'"
            )
        if self.settings.max_tokens >= self.engine.context:
            raise ValueError(
                f"answers of {self.settings.max_tokens} tokens leave no room for messages in the model's "
                f"context of {self.engine.context}"
            )
        self.turns: list[dict] = []

    def run(self, read: Callable[[str], str] = input) -> None:
        """Reads messages and prints answers until `/exit` or the end of input.

        Args:
            read: gives a line for a prompt; raises EOFError at the end.
        """
        seen = sys.stdin.isatty()
        if seen:
            print(HELP, file=sys.stderr)
        while True:
            try:
                line = read("> " if seen else "").strip()
            except (EOFError, KeyboardInterrupt):
                if seen:
                    print()
                return
            command, _, rest = line.partition(" ")
            if command == "/exit":
                return
            if command == "/clear":
                self.turns.clear()
            elif command == "/system":
                self.system = rest.strip()
            elif command.startswith("/") and command[1:].isalpha():
                print(HELP, file=sys.stderr)
            elif line:
                self.say(line)

    def say(self, message: str) -> None:
        """Answers one message, and remembers both; Ctrl-C ends the answer and keeps what there is of it."""
        self.turns.append({"role": "user", "content": message})
        try:
            prompt = self._prompt()
        except ValueError as error:
            self.turns.pop()
            print(f"error: {error}", file=sys.stderr)
            return
        reader, written, calls, thinking = self.format.reader(prompt), [], [], False
        try:
            for event in self.engine.stream(replace(self.settings, prompt=prompt, shown=self.format.shown)):
                for kind, value in reader.end() if isinstance(event, Finished) else reader.feed(event):
                    if thinking != (kind == "reasoning_content"):
                        thinking = not thinking
                        print("[thinking] " if thinking else "\n\n", end="", flush=True)
                    if kind == "tool_call":
                        calls.append({"type": "function", "function": value})
                        value = f"[calls] {json.dumps(value, ensure_ascii=False)}\n"
                    elif kind == "content":
                        written.append(value)
                    print(value, end="", flush=True)
        except KeyboardInterrupt:
            pass
        except GenerationFailed as error:
            print(f"error: {error}", file=sys.stderr)
        print()
        if written or calls:
            called = {"tool_calls": calls} if calls else {}
            self.turns.append({"role": "assistant", "content": "".join(written), **called})
        else:
            self.turns.pop()

    def _prompt(self) -> list[int]:
        """The conversation as far back as it fits beside the answer."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        while True:
            prompt = self.format.render(start + self.turns)
            if len(prompt) + self.settings.max_tokens <= self.engine.context:
                return prompt
            if len(self.turns) == 1:
                raise ValueError(
                    f"the prompt has {len(prompt)} tokens and the answer up to {self.settings.max_tokens}: "
                    f"more than the model's context of {self.engine.context}"
                )
            # An answer goes with its question: some templates refuse one without the other.
            following = (i for i, turn in enumerate(self.turns[1:], 1) if turn["role"] == "user")
            del self.turns[: next(following)]
