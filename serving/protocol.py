"""The OpenAI protocol as far as the server speaks it: what a request may hold, and what an error looks like.

What belongs here: names, types and ranges of fields. A field that would change the answer and is not
supported is refused by name; one that changes nothing is taken and ignored.
"""

import difflib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

MAX_CHOICES = 4

# Fields that are not supported, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "top_logprobs": (0,),
    "verbosity": (),
    "audio": (),
    "web_search_options": (),
}
# Fields about the caller, not the answer.
_IGNORED = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}

StopString = Annotated[str, StringConstraints(min_length=1)]
Stop = StopString | Annotated[list[StopString], Field(max_length=16)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: a sentence.
        kind: OpenAI's `type`.
        param: the field at fault.
        code: OpenAI's `code`.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = error_body(message, kind, param, code)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    """What a stream holds beside the text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None  # taken and ignored


class GenerationRequest(_Strict):
    """What completions and chats have in common."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1)
    seed: Seed | None = None
    stop: Stop | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("the body holds half a surrogate pair, which is no character") from error
        except RecursionError as error:
            raise ValueError("the body is nested too deeply") from error
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                # null is the same as leaving a field out
                if value is not None:
                    kept[name] = value
            elif name in _NEUTRAL:
                # 0 is False to Python, but logprobs=0 asks for something.
                neutral = any(
                    value == other and isinstance(value, bool) == isinstance(other, bool)
                    for other in _NEUTRAL[name]
                )
                if value is not None and not neutral:
                    raise ValueError(f"{name} is not supported by this server")
            elif name not in _IGNORED:
                close = difflib.get_close_matches(name, cls.model_fields, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"unknown field {name!r}{hint}")
        return kept

    @model_validator(mode="after")
    def _options_of_a_stream(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for requests with stream=true")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """Body of `/v1/completions`."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(_Strict):
    """A part of a message; images and sound are refused."""

    type: Literal["text"]
    text: str


class FunctionCall(_Strict):
    """A call of a function with its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(_Strict):
    """What an assistant's message says it called."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """A turn of a conversation."""

    # What clients send back of an answer (refusal, annotations, ...) is left out of the prompt.
    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_something_to_say(self):
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of role {self.role!r} needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} cannot have tool_calls")
        return self

    def for_template(self) -> dict:
        """As chat templates take it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        values = self.model_dump(exclude_none=True)
        values.update(role="system" if self.role == "developer" else self.role, content=content or "")
        return values


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1)


class Tool(BaseModel):
    """A tool; only functions are known."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: Function


class ChatRequest(GenerationRequest):
    """Body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[Tool] | None = None
    tool_choice: Any = "auto"

    @field_validator("tool_choice")
    @classmethod
    def _a_choice_that_works(cls, value: Any) -> Any:
        if value not in ("auto", "none"):
            raise ValueError("only 'auto' and 'none' are supported")
        return value

    @property
    def offered_tools(self) -> list[dict] | None:
        """The tools that the template shows, if any."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]
