"""The HTTP server: the OpenAI protocol and the chat page, over one engine.

What belongs here: routes, limits, statuses and headers. What a request may hold is in `protocol`, what an
answer looks like in `responses`, what a conversation is to the model in `conversations`, how text comes about
in `engine`.
"""

import asyncio
import base64
import hashlib
import hmac
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from tessera.serving import engine as engines
from tessera.serving.conversations import AnswerReader, ChatFormat
from tessera.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Message,
    error_body,
)
from tessera.serving.responses import Answers, ChatShape, TextShape, respond

# What a client may send beyond the limit and still read our answer, as a multiple of the limit.
DRAINED = 8
# How long answers under way may take when the server is asked to stop.
GRACE_SECONDS = 10.0

PAGE = Path(__file__).with_name("chat_page.html")


@dataclass
class ServerSettings:
    """What the server allows.

    Attributes:
        name: the model's name in the protocol.
        max_new_tokens: length of an answer where a request gives none.
        api_key: what clients must send as bearer token; None for no key.
        max_body_kb: size of a request's body.
    """

    name: str
    max_new_tokens: int = 512
    api_key: str | None = None
    max_body_kb: int = 1024

    def __post_init__(self):
        for field in ("max_new_tokens", "max_body_kb"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")


def build_app(engine: engines.Engine, settings: ServerSettings) -> FastAPI:
    """The application, ready for uvicorn.

    Args:
        engine: answers the requests.
        settings: limits and the key.
    """
    # No documentation pages: theirs load scripts from another host.
    app = FastAPI(title="tessera", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Gate, settings=settings)
    app.add_exception_handler(ApiError, _as_json)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _unexpected)
    chats = ChatFormat(engine.tokenizer)
    created = int(time.time())
    page = PAGE.read_text(encoding="utf-8")
    page_headers = {
        "Content-Security-Policy": _content_security_policy(page),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    encoding = asyncio.Lock()

    async def encode(to_ids: Callable[..., list[int]], *given) -> list[int]:
        # A prompt of a megabyte takes a second, in which all others get their answers on. One at a time:
        # tokenizers have settings that a call changes.
        async with encoding:
            return await asyncio.to_thread(to_ids, *given)

    def as_ids(prompt: str) -> list[int]:
        return engine.tokenizer(prompt)["input_ids"]

    def check_model(name: str | None) -> None:
        if name is not None and name != settings.name:
            message = f"there is no model {name!r} here, only {settings.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def plan(body: GenerationRequest, prompt: list[int], limit: int | None, **given) -> list:
        """The engine's requests for the choices of one prompt."""
        room = engine.context - len(prompt)
        asked = limit or max(1, min(settings.max_new_tokens, room))
        if asked > room:
            answer = f" and the answer up to {limit}" if limit else ""
            message = f"the prompt has {len(prompt)} tokens{answer}; the model's context is {engine.context}"
            raise ApiError(400, message, code="context_length_exceeded")
        return [
            engines.Request(
                prompt=prompt,
                max_tokens=asked,
                temperature=body.temperature,
                top_k=body.top_k,
                top_p=body.top_p,
                seed=None if body.seed is None else (body.seed + i + 2**63) % 2**64 - 2**63,
                stop=body.stop_strings,
                **given,
            )
            for i in range(body.n)
        ]

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=page_headers)

    @app.get("/health")
    async def health() -> Response:
        if not engine.accepts():
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok", **engine.load()})

    card = {
        "id": settings.name,
        "object": "model",
        "created": created,
        "owned_by": "tessera",
        "context_length": engine.context,
        "max_new_tokens": settings.max_new_tokens,
        "chat": chats.available,
    }

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        check_model(name)
        return card

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        check_model(body.model)
        planned = []
        for prompt in body.prompts:
            ids = await encode(as_ids, prompt) if isinstance(prompt, str) else prompt
            planned += plan(body, ids, body.max_tokens, continues=True)
        answers = Answers(engine, planned, body.n, AnswerReader)
        return await respond(TextShape(settings.name), body, answers, http)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        check_model(body.model)
        tools = body.offered_tools
        try:
            prompt = await encode(chats.render, [message.for_template() for message in body.messages], tools)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error
        planned = plan(body, prompt, body.max_completion_tokens or body.max_tokens, shown=chats.shown)
        answers = Answers(engine, planned, body.n, lambda: chats.reader(prompt, tools))
        return await respond(ChatShape(settings.name), body, answers, http)

    return app


class _Gate:
    """Asks for the key, and stops bodies that are too large while they come in."""

    def __init__(self, app, settings: ServerSettings):
        self.app, self.settings = app, settings

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"].startswith("/v1") and not self._has_key(scope):
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            headers = {"WWW-Authenticate": "Bearer"}
            body = error_body(message, "invalid_request_error", code="invalid_api_key")
            return await JSONResponse(body, 401, headers=headers)(scope, receive, send)
        limit, size = self.settings.max_body_kb * 1024, 0

        async def limited() -> dict:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                # Most clients read no answer before they have sent everything.
                while message.get("more_body") and size <= limit * DRAINED:
                    message = await receive()
                    size += len(message.get("body", b""))
                sentence = f"the body is larger than {self.settings.max_body_kb} KB"
                raise HTTPException(413, sentence, headers={"Connection": "close"})
            return message

        await self.app(scope, limited, send)

    def _has_key(self, scope) -> bool:
        if self.settings.api_key is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        expected = b"Bearer " + self.settings.api_key.encode()
        return hmac.compare_digest(given, expected)


# ---- errors ----


async def _as_json(http: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _http_error(http: Request, error: HTTPException) -> Response:
    sentences = {
        404: f"there is nothing at {http.url.path}",
        405: f"{http.url.path} does not take {http.method}",
    }
    codes = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
    message = sentences.get(error.status_code, str(error.detail))
    body = error_body(message, "invalid_request_error", code=codes.get(error.status_code))
    return JSONResponse(body, error.status_code, headers=error.headers)


async def _invalid(http: Request, error: RequestValidationError) -> Response:
    # Where several forms are allowed, the one that got furthest is what was meant.
    first = max(error.errors(), key=lambda entry: len(entry["loc"]))
    # Names of such forms ("str", "list[...]") mean nothing to who sent the body.
    fields = (CompletionRequest.model_fields, ChatRequest.model_fields, Message.model_fields)
    known = {"function", "arguments", *(name for names in fields for name in names)}
    place = [str(part) for part in first["loc"][1:] if isinstance(part, int) or part in known]
    param = ".".join(place) or None
    if first["type"] == "json_invalid":
        message, param = f"the body is not JSON: {first['ctx']['error']}", None
    elif param is None and first["type"] in ("model_attributes_type", "missing", "dict_type"):
        message = "the body must be a JSON object, sent as application/json"
    else:
        reason = first["msg"].removeprefix("Value error, ")
        message = f"{param}: {reason}" if param else reason
    code = "invalid_json" if first["type"] == "json_invalid" else "invalid_value"
    return JSONResponse(error_body(message, "invalid_request_error", param, code), 400)


async def _unexpected(http: Request, error: Exception) -> Response:
    return JSONResponse(error_body("the server failed; its log says why", "server_error"), 500)


def _content_security_policy(page: str) -> str:
    """Nothing but the page's own script and style runs, and it talks to this server only."""

    def hashes(tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'self'; script-src {hashes('script')}; style-src {hashes('style')}; img-src data:; "
        "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


# ---- running ----


def listen(host: str, port: int) -> socket.socket:
    """Takes an address, before a model is loaded for it.

    Args:
        host: name or address.
        port: 0 for any that is free.

    Raises:
        ValueError: if it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{host}:{port} cannot be served: {reason}; choose another --host or --port"
        ) from error
    return taken


class Server(uvicorn.Server):
    """Uvicorn that says where it is, and leaves nobody without an answer when it stops.

    Args:
        app: from `build_app`.
        engine: behind it.
        on_ready: called with the address once requests are taken.
    """

    def __init__(self, app: FastAPI, engine: engines.Engine, on_ready: Callable[[str], None] = print):
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="off",
                # Who sends half a request and no more is not waited for either.
                timeout_graceful_shutdown=round(GRACE_SECONDS) + 2,
            )
        )
        self._engine, self._on_ready = engine, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tells the address when it is open."""
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self._on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers who is waiting, as far as the time allows; the others get an error."""
        self._engine.drain()
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self._engine.close)
        await super().shutdown(sockets)
        self._engine.close()
