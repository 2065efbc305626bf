"""The engine: many requests, one model, one thread that runs it.

Requests wait in a bounded queue; those that wait together run as one left-padded batch through
`generate`, and each gets its text in pieces as the tokens come. What belongs here: who runs with whom, when
an answer ends, and what becomes of requests when something fails. It knows neither HTTP nor chats: a request
is token ids and settings, an answer is a series of events.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tessera.serving.sampling import RowSampler, draw_tokens
from tessera.serving.text_stream import TextStream

# Requests that are sent at once arrive some milliseconds apart; waiting for them costs a token's time.
GATHER_SECONDS = 0.01

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """There are as many requests waiting as may."""


class EngineClosed(Exception):
    """The engine takes no requests any more, or was stopped before it could answer."""


class GenerationFailed(Exception):
    """The model failed on a batch; the requests in it have no answer."""


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
        prompt: token ids.
        max_tokens: the answer ends after so many.
        temperature: 0 takes the likeliest token.
        top_k, top_p: sample only from the likeliest; None for all.
        seed: the same one draws the same answer again; None for any.
        stop: the text ends before the first of these.
        shown: special tokens whose spelling is part of the text; all others are left out.
        continues: whether the answer is more of the prompt's text, and not a text of its own.
    """

    prompt: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    shown: frozenset[int] = frozenset()
    continues: bool = False


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes:
        reason: "stop" at an end token or stop string, "length" at `max_tokens`.
        prompt_tokens, completion_tokens: how many; an end token counts.
    """

    reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


# A piece of text, the end, or why there is none. Nothing follows the last two.
Event = str | Finished | Exception


class Engine:
    """Runs requests on a model in a thread of its own.

    Args:
        model: anything with `generate` as transformers has it.
        tokenizer: decodes the answers.
        end_ids: tokens that end an answer, beside those that model and tokenizer name themselves.
        max_batch_size: rows that run together.
        max_queue: requests that may wait, beside those that run.
    """

    def __init__(
        self, model, tokenizer, *, end_ids: Iterable[int] = (), max_batch_size: int = 8, max_queue: int = 64
    ):
        for name, value in (("max_batch_size", max_batch_size), ("max_queue", max_queue)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model, self.tokenizer = model, tokenizer
        self.max_batch_size, self.max_queue = max_batch_size, max_queue
        self.context: int = model.config.max_position_embeddings
        configured = model.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        self.end_ids = frozenset({*end_ids, *configured, tokenizer.eos_token_id} - {None})
        self._special = frozenset(tokenizer.all_special_ids)
        self._queue: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._changed = threading.Condition()
        self._draining = self._closed = False
        self._worker = threading.Thread(target=self._work, name="tessera-engine", daemon=True)
        self._worker.start()

    def submit(
        self, requests: Sequence[Request], deliver: Callable[[int, Event], None]
    ) -> Callable[[], None]:
        """Queues requests: all of them, or none.

        Args:
            requests: what to answer.
            deliver: called in the engine's thread with the place of a request in `requests` and its next
                event; it must not wait.

        Returns:
            A function that cancels those that are not answered yet: their rows end, no event follows.

        Raises:
            ValueError: for a request that cannot be answered.
            QueueFull: if there is no room for all of them.
            EngineClosed: after `drain` or `close`.
        """
        if len(requests) > self.max_queue:
            raise ValueError(
                f"{len(requests)} requests at once are more than the {self.max_queue} that may wait"
            )
        for request in requests:
            self._check(request)
        rows = [_Row(self, request, i, deliver) for i, request in enumerate(requests)]
        with self._changed:
            if self._draining:
                raise EngineClosed("the server is shutting down")
            waiting = sum(not row.done for row in self._queue)
            if waiting + len(rows) > self.max_queue:
                raise QueueFull(f"{waiting} requests are waiting, of at most {self.max_queue}")
            self._queue.extend(rows)
            self._changed.notify_all()

        def cancel() -> None:
            for row in rows:
                row.done = True

        return cancel

    def stream(self, request: Request) -> Iterator[str | Finished]:
        """Queues one request, and gives its pieces and its end; leaving the loop cancels it.

        Raises:
            ValueError, QueueFull, EngineClosed: as `submit`.
            GenerationFailed: if the model fails.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        cancel = self.submit([request], lambda _, event: events.put(event))
        try:
            while True:
                event = events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            cancel()

    def load(self) -> dict[str, int]:
        """How many requests run and wait."""
        with self._changed:
            return {
                "running": sum(not row.done for row in self._running),
                "waiting": sum(not row.done for row in self._queue),
            }

    def accepts(self) -> bool:
        """Whether new requests are taken."""
        return not self._draining and self._worker.is_alive()

    def drain(self) -> None:
        """Takes no new requests; those that are here are answered."""
        self._draining = True

    def close(self, wait: float = 0.0) -> None:
        """Ends everything: whoever has no answer yet gets `EngineClosed`.

        Args:
            wait: seconds that the step under way may take to end; a process that ends before it aborts.
        """
        with self._changed:
            self._draining = self._closed = True
            rows = [*self._running, *self._queue]
            self._queue.clear()
            self._changed.notify_all()
        for row in rows:
            row.fail(EngineClosed("the server was stopped before the answer was complete"))
        self._worker.join(wait)

    def _check(self, request: Request) -> None:
        length = len(request.prompt)
        if not length:
            raise ValueError("the prompt is empty: give at least one token to continue")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {request.max_tokens}")
        if length + request.max_tokens > self.context:
            raise ValueError(
                f"a prompt of {length} tokens and {request.max_tokens} new ones are more than the model's "
                f"context of {self.context}"
            )
        largest, vocabulary = max(request.prompt), self.model.config.vocab_size
        if largest >= vocabulary or min(request.prompt) < 0:
            raise ValueError(f"the prompt has token ids outside the vocabulary of {vocabulary}")

    # ---- the worker ----

    def _work(self) -> None:
        while batch := self._next_batch():
            try:
                self._generate(batch)
                failure = "generation ended early"
            except Exception as error:
                logger.exception("a batch of %d failed", len(batch))
                # The words only: the traceback would keep the batch's tensors alive.
                failure = f"the model failed: {type(error).__name__}: {error}"
            for row in batch:
                row.fail(GenerationFailed(failure))
            with self._changed:
                self._running = []

    def _next_batch(self) -> list["_Row"]:
        """Waits for requests and takes those that run next; none when the engine is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
            time.sleep(GATHER_SECONDS)
            with self._changed:
                if self._closed:
                    return []
                batch, longest, new, left = [], 0, 0, deque()
                for row in self._queue:
                    if row.done:
                        continue
                    padded = max(longest, len(row.request.prompt))
                    steps = max(new, row.request.max_tokens)
                    # A row that is done is computed on until the last one is, and must stay in the context.
                    if len(batch) < self.max_batch_size and padded + steps <= self.context:
                        batch.append(row)
                        longest, new = padded, steps
                    else:
                        left.append(row)
                self._queue, self._running = left, batch
            if batch:
                return batch

    def _generate(self, batch: list["_Row"]) -> None:
        longest = max(len(row.request.prompt) for row in batch)
        # Masked positions may hold any id, so no padding token is needed.
        padding = self.tokenizer.pad_token_id or 0
        gaps = [longest - len(row.request.prompt) for row in batch]
        ids = [[padding] * gap + list(row.request.prompt) for gap, row in zip(gaps, batch, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
        device = self.model.device
        self.model.generate(
            torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max(row.request.max_tokens for row in batch),
            do_sample=False,
            num_beams=1,
            pad_token_id=padding,
            logits_processor=LogitsProcessorList([_DrawEachRow(batch)]),
            stopping_criteria=StoppingCriteriaList([_HandOut(batch)]),
        )


class _Row:
    """A request on its way."""

    def __init__(self, engine: Engine, request: Request, place: int, deliver: Callable[[int, Event], None]):
        self.request, self.done = request, False
        self.sampler = RowSampler(request)
        self._end_ids, self._place, self._deliver = engine.end_ids, place, deliver
        before = request.prompt if request.continues else ()
        self._text = TextStream(engine.tokenizer, request.stop, engine._special - request.shown, before)
        self._count = 0

    def take(self, token: int) -> None:
        """Shows what a token adds, and ends the answer where it ends."""
        self._count += 1
        ended = token in self._end_ids
        piece = "" if ended else self._text.push(token)
        full = self._count >= self.request.max_tokens
        if ended or full:
            piece += self._text.end()
        if piece:
            self._tell(piece)
        if ended or full or self._text.stopped:
            reason = "stop" if ended or self._text.stopped else "length"
            self._tell(Finished(reason, len(self.request.prompt), self._count))
            self.done = True

    def fail(self, error: Exception) -> None:
        """Ends the answer with an error, if it has not ended."""
        if not self.done:
            self._tell(error)
            self.done = True

    def _tell(self, event: Event) -> None:
        if self.done:
            return
        try:
            self._deliver(self._place, event)
        except Exception:
            # Whoever asked is gone, a closed event loop for one.
            self.done = True


class _DrawEachRow(LogitsProcessor):
    """Leaves each row only the token that it draws, so that greedy decoding takes it."""

    def __init__(self, batch: list[_Row]):
        self.samplers = [row.sampler for row in batch]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        tokens = draw_tokens(scores, self.samplers)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.unsqueeze(1), 0)


class _HandOut(StoppingCriteria):
    """Gives each row its new token, and says which rows are done."""

    # Not a streamer: that cannot end a row, and on some devices it hears of a token a step late.

    def __init__(self, batch: list[_Row]):
        self.batch = batch

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        for row, token in zip(self.batch, input_ids[:, -1].tolist(), strict=True):
            if not row.done:
                row.take(token)
        return torch.tensor([row.done for row in self.batch], device=input_ids.device)
