"""Answers of the server: from the engine's events to the JSON and the streams of the OpenAI protocol.

What belongs here: the shape of what is sent back. It is the counterpart of `protocol`, which has the shape of
what comes in.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tessera.serving import engine as engines
from tessera.serving.conversations import AnswerReader
from tessera.serving.protocol import ApiError, GenerationRequest


class Answers:
    """What the engine says to some requests, as the event loop sees it. Making it submits them.

    Args:
        engine: answers.
        requests: those of one HTTP request, the choices of a prompt side by side.
        choices: how many each prompt has.
        reader: makes what tells the parts of an answer apart.

    Raises:
        ApiError: if the engine refuses.
    """

    def __init__(
        self,
        engine: engines.Engine,
        requests: Sequence[engines.Request],
        choices: int,
        reader: Callable[[], AnswerReader],
    ):
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue = asyncio.Queue()
        self._readers = [reader() for _ in requests]
        self.count = len(requests)
        prompts = sum(len(request.prompt) for request in requests[::choices])
        self.usage = {"prompt_tokens": prompts, "completion_tokens": 0, "total_tokens": prompts}

        def deliver(place: int, event: engines.Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (place, event))

        try:
            self.cancel = engine.submit(requests, deliver)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        except engines.QueueFull as error:
            headers = {"Retry-After": "1"}
            raise ApiError(
                429, f"{error}; try again later", kind="rate_limit_error", code="queue_full", headers=headers
            ) from error
        except engines.EngineClosed as error:
            raise ApiError(503, str(error), kind="server_error", code="shutting_down") from error

    async def parts(self) -> AsyncIterator[tuple[int, str, object]]:
        """(choice, kind, value): the parts of `AnswerReader`, and one of kind "end" with the reason.

        Raises:
            ApiError: if there is no answer.
        """
        open_choices = self.count
        called = [False] * self.count
        while open_choices:
            place, event = await self._events.get()
            if isinstance(event, Exception):
                stopped = isinstance(event, engines.EngineClosed)
                code = "shutting_down" if stopped else "generation_failed"
                raise ApiError(503 if stopped else 500, str(event), kind="server_error", code=code)
            finished = isinstance(event, engines.Finished)
            reader = self._readers[place]
            for kind, value in reader.end() if finished else reader.feed(event):
                called[place] |= kind == "tool_call"
                yield place, kind, value
            if finished:
                open_choices -= 1
                self.usage["completion_tokens"] += event.completion_tokens
                self.usage["total_tokens"] += event.completion_tokens
                calls = called[place] and event.reason == "stop"
                yield place, "end", "tool_calls" if calls else event.reason


class TextShape:
    """Answers of `/v1/completions`."""

    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str):
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def opening(self, index: int) -> dict | None:
        """What a stream of a choice begins with, if anything."""
        return None

    def chunk(self, index: int, kind: str, value) -> dict:
        """A part as an event of a stream."""
        ended = kind == "end"
        return {
            "index": index,
            "text": "" if ended else value,
            "logprobs": None,
            "finish_reason": value if ended else None,
        }

    def choice(self, index: int, parts: list[tuple[str, object]]) -> dict:
        """All parts as one choice."""
        text = "".join(value for kind, value in parts if kind == "content")
        return {"index": index, "text": text, "logprobs": None, "finish_reason": parts[-1][1]}


class ChatShape(TextShape):
    """Answers of `/v1/chat/completions`."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: str):
        super().__init__(model)
        self._calls: dict[int, int] = {}

    def opening(self, index: int) -> dict:
        """The role, which comes before any text."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, kind: str, value) -> dict:
        """A part as an event of a stream; a tool call comes whole."""
        delta: dict = {}
        if kind == "tool_call":
            number = self._calls[index] = self._calls.get(index, -1) + 1
            delta = {"tool_calls": [{"index": number, **_call(value)}]}
        elif kind != "end":
            delta = {kind: value}
        reason = value if kind == "end" else None
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def choice(self, index: int, parts: list[tuple[str, object]]) -> dict:
        """All parts as one choice with its message."""

        def text(wanted: str) -> str:
            return "".join(value for kind, value in parts if kind == wanted)

        calls = [_call(value) for kind, value in parts if kind == "tool_call"]
        content = text("content")
        message: dict = {"role": "assistant", "content": content if content or not calls else None}
        if reasoning := text("reasoning_content"):
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return {"index": index, "message": message, "logprobs": None, "finish_reason": parts[-1][1]}


def _call(call: dict) -> dict:
    arguments = call.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": str(call.get("name", "")), "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


async def respond(shape: TextShape, body: GenerationRequest, answers: Answers, http: Request) -> Response:
    """One JSON object, or a stream of them; a client that goes away cancels its requests."""
    if body.stream:
        return _EventStream(_events(shape, body, answers), answers.cancel)
    collect = asyncio.ensure_future(_collect(answers))
    gone = asyncio.ensure_future(_until_gone(http))
    try:
        await asyncio.wait((collect, gone), return_when=asyncio.FIRST_COMPLETED)
        if not collect.done():
            return Response(status_code=499)  # nobody reads it
        choices = [shape.choice(index, parts) for index, parts in enumerate(collect.result())]
    finally:
        answers.cancel()
        collect.cancel()
        gone.cancel()
    return JSONResponse({**shape.head, "object": shape.object, "choices": choices, "usage": answers.usage})


async def _collect(answers: Answers) -> list[list[tuple[str, object]]]:
    choices: list[list] = [[] for _ in range(answers.count)]
    async for place, kind, value in answers.parts():
        choices[place].append((kind, value))
    return choices


async def _until_gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(shape: TextShape, body: GenerationRequest, answers: Answers) -> AsyncIterator[str]:
    head = {**shape.head, "object": shape.chunk_object}
    # In a stream with usage, every event has the field.
    rest = {"usage": None} if body.wants_usage else {}
    try:
        for index in range(answers.count):
            if opening := shape.opening(index):
                yield _event({**head, "choices": [opening], **rest})
        async for place, kind, value in answers.parts():
            yield _event({**head, "choices": [shape.chunk(place, kind, value)], **rest})
    except ApiError as error:
        # The status is sent already; this is where OpenAI's own clients look for an error, too.
        yield _event(error.body)
        return
    if body.wants_usage:
        yield _event({**head, "choices": [], "usage": answers.usage})
    yield "data: [DONE]\n\n"


def _event(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class _EventStream(StreamingResponse):
    """Server-sent events; however it ends, the rows behind it are freed."""

    def __init__(self, events: AsyncIterator[str], cancel: Callable[[], None]):
        # Proxies that collect answers would hold the stream back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._cancel = cancel

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._cancel()
