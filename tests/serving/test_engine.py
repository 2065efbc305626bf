"""Requests of all kinds on one model at once: each as if it were alone."""

import queue
import threading
import time

import pytest
import torch
from helpers.models import DIALECTS
from helpers.served import chat_model, chat_tokenizer, engine_of, greedy_reference, scripted

from tessera.serving.engine import (
    Engine,
    EngineClosed,
    Finished,
    GenerationFailed,
    QueueFull,
    Request,
)
from tessera.serving.sampling import RowSampler, draw_tokens

PROMPTS = [b"a", b"The quick brown fox", "hé 日本".encode(), b"0123456789 0123456789 0123456789"]


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def run_together(engine: Engine, requests: list[Request]) -> tuple[list[str], list[Finished]]:
    """Answers that were asked for at once; fails on an error or on silence."""
    events: queue.SimpleQueue = queue.SimpleQueue()
    engine.submit(requests, lambda place, event: events.put((place, event)))
    texts, ends = [""] * len(requests), [None] * len(requests)
    while not all(ends):
        place, event = events.get(timeout=60)
        assert ends[place] is None, "an event after the end"
        if isinstance(event, str):
            texts[place] += event
        else:
            assert isinstance(event, Finished), event
            ends[place] = event
    return texts, ends


def run(engine: Engine, request: Request) -> str:
    return run_together(engine, [request])[0][0]


@pytest.mark.parametrize("name", DIALECTS)
def test_rows_of_a_batch_say_what_transformers_says_to_each_alone(name, tokenizer):
    model = chat_model(name)
    lengths = [12, 5, 9, 12]
    expected = [greedy_reference(model, tokenizer, *pair) for pair in zip(PROMPTS, lengths, strict=True)]
    assert len(set(expected)) > 1, "a model that always says the same proves nothing"
    with engine_of(model, tokenizer) as engine:
        requests = [Request(list(p), n) for p, n in zip(PROMPTS, lengths, strict=True)]
        texts, ends = run_together(engine, requests)
    assert texts == expected
    assert [end.prompt_tokens for end in ends] == [len(prompt) for prompt in PROMPTS]
    assert all(
        end.reason == "stop" or end.completion_tokens == n for end, n in zip(ends, lengths, strict=True)
    )


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(tokenizer):
    with engine_of(chat_model(), tokenizer) as engine:
        request = Request(list(PROMPTS[1]), 20, temperature=1.0, seed=7)
        alone = run(engine, request)
        neighbours = [Request(list(p), 20, temperature=1.3, top_k=9, seed=i) for i, p in enumerate(PROMPTS)]
        assert run_together(engine, [*neighbours, request])[0][-1] == alone
        assert run(engine, Request(list(PROMPTS[1]), 20, temperature=1.0, seed=8)) != alone
        unseeded = Request(list(PROMPTS[1]), 20, temperature=1.0)
        assert run(engine, unseeded) != run(engine, unseeded)


@pytest.mark.parametrize("narrow", [{"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_narrow_sampling_is_greedy(narrow, tokenizer):
    with engine_of(chat_model(), tokenizer) as engine:
        prompt = list(PROMPTS[1])
        narrowed = Request(prompt, 12, **{"temperature": 1.0, **narrow})
        assert run(engine, narrowed) == run(engine, Request(prompt, 12))


@pytest.mark.parametrize(
    "how", [{}, {"top_k": 4}, {"top_k": 2**70}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.6}], ids=str
)
def test_drawn_frequencies_equal_the_probabilities_of_transformers(how):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    expected = TemperatureLogitsWarper(0.8)(None, scores)
    if "top_k" in how:
        expected = TopKLogitsWarper(how["top_k"])(None, expected)
    if "top_p" in how:
        expected = TopPLogitsWarper(how["top_p"])(None, expected)
    expected = expected.softmax(-1)[0]
    count = 20_000
    sampler = RowSampler(Request([1], 1, temperature=0.8, seed=5, **how))
    drawn = torch.cat([draw_tokens(scores.expand(500, -1), [sampler] * 500) for _ in range(count // 500)])
    frequencies = torch.bincount(drawn, minlength=12) / count
    torch.testing.assert_close(frequencies, expected, atol=0.015, rtol=0)
    assert not frequencies[expected == 0].any()


@pytest.mark.parametrize("how", [{}, {"top_k": 4}, {"top_p": 0.7}], ids=str)
def test_the_highest_draw_stays_among_the_allowed_tokens(how, monkeypatch):
    """Rounding may put the draw on the whole mass, behind which there are only excluded tokens."""
    scores = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    scores[0, 5] = -torch.inf
    sampler = RowSampler(Request([1], 1, temperature=1.0, **how))
    monkeypatch.setattr(sampler, "draw", lambda: 1.0)
    allowed = scores[0].argsort(descending=True)[: how.get("top_k", 11)].tolist()
    assert draw_tokens(scores, [sampler]).item() in allowed


def test_stop_strings_and_end_tokens_end_a_row_and_not_its_neighbours(tokenizer):
    with engine_of(scripted(b"one. two. three"), tokenizer) as engine:
        requests = [Request([65, 66], 40, stop=stop) for stop in [("two",), (), (".", "n")]]
        requests.append(Request([65, 66], 4))
        texts, ends = run_together(engine, requests)
    assert texts == ["one. ", "one. two. three", "o", "one."]
    assert [end.reason for end in ends] == ["stop", "stop", "stop", "length"]
    assert [end.completion_tokens for end in ends] == [8, 16, 2, 4]


def test_a_short_answer_does_not_wait_for_a_long_one(tokenizer):
    with engine_of(scripted(b"x" * 200, seconds=0.01), tokenizer) as engine:
        done: queue.SimpleQueue = queue.SimpleQueue()
        start = time.monotonic()

        def note(place, event):
            if isinstance(event, Finished):
                done.put((place, time.monotonic() - start))

        engine.submit([Request([65, 66], 100), Request([65, 66], 3)], note)
        first, second = done.get(timeout=30), done.get(timeout=30)
    assert (first[0], second[0]) == (1, 0)
    assert first[1] < second[1] / 4


def test_a_row_that_is_done_never_leaves_the_context(tokenizer):
    """Learned positions end with the context: rows computed past it would fail the whole batch."""
    model = chat_model("gpt2-tiny", max_position_embeddings=64)
    with engine_of(model, tokenizer) as engine:
        long, short = Request(list(b"x" * 60), 4), Request(list(b"xy"), 62)
        texts, _ = run_together(engine, [long, short, Request(list(b"ab"), 3)])
    assert texts[0] == greedy_reference(model, tokenizer, b"x" * 60, 4)
    assert texts[1] == greedy_reference(model, tokenizer, b"xy", 62)


def test_requests_that_are_cancelled_free_their_rows(tokenizer):
    with engine_of(scripted(b"x" * 400, seconds=0.02), tokenizer, max_batch_size=1) as engine:
        stream = engine.stream(Request([65, 66], 400))
        next(stream)
        waiting = engine.submit([Request([65, 66], 400)], lambda place, event: None)
        assert engine.load() == {"running": 1, "waiting": 1}
        waiting()
        stream.close()
        start = time.monotonic()
        assert run(engine, Request([65, 66], 2)) == "xx"
        assert time.monotonic() - start < 2, "a cancelled row went on for its 8 seconds"


def test_a_full_queue_refuses_and_loses_nobody(tokenizer):
    with engine_of(scripted(b"abc", seconds=0.05), tokenizer, max_batch_size=1, max_queue=3) as engine:
        results: list = []

        def ask():
            try:
                results.append("".join(p for p in engine.stream(Request([65, 66], 9)) if isinstance(p, str)))
            except QueueFull as error:
                results.append(error)

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    answered = [result for result in results if result == "abc"]
    refused = [result for result in results if isinstance(result, QueueFull)]
    assert len(answered) + len(refused) == 12 and len(answered) >= 3 and refused
    with (
        pytest.raises(ValueError, match="4 requests at once are more than the 3 that may wait"),
        engine_of(chat_model(), tokenizer, max_queue=3) as engine,
    ):
        engine.submit([Request([65], 1)] * 4, print)


def test_all_of_several_requests_are_queued_or_none(tokenizer):
    with engine_of(scripted(b"abc", seconds=0.1), tokenizer, max_batch_size=1, max_queue=2) as engine:
        running = engine.stream(Request([65, 66], 9))
        next(running)
        engine.submit([Request([65, 66], 9)], lambda place, event: None)
        with pytest.raises(QueueFull, match="1 requests are waiting, of at most 2"):
            engine.submit([Request([65, 66], 9)] * 2, lambda place, event: None)
        assert engine.load()["waiting"] == 1


def test_an_error_in_the_model_ends_its_requests_and_the_next_one_works(tokenizer):
    model = scripted(b"fine")
    broken = True

    def explode(module, args):
        if broken:
            raise RuntimeError("out of memory, say")

    model.register_forward_pre_hook(explode)
    with engine_of(model, tokenizer) as engine:
        with pytest.raises(GenerationFailed, match="the model failed: RuntimeError: out of memory, say"):
            list(engine.stream(Request([65, 66], 9)))
        broken = False
        assert run(engine, Request([65, 66], 9)) == "fine"


def test_closing_tells_everybody_and_takes_nobody(tokenizer):
    with engine_of(scripted(b"x" * 400, seconds=0.02), tokenizer, max_batch_size=1) as engine:
        stream = engine.stream(Request([65, 66], 400))
        next(stream)
        ends: queue.SimpleQueue = queue.SimpleQueue()
        engine.submit([Request([65, 66], 400)], lambda place, event: ends.put(event))
        engine.drain()
        with pytest.raises(EngineClosed, match="shutting down"):
            engine.submit([Request([65, 66], 4)], print)
        assert not engine.accepts()
        engine.close()
        assert isinstance(ends.get(timeout=5), EngineClosed)
        with pytest.raises(EngineClosed, match="stopped before the answer was complete"):
            list(stream)


def test_closing_can_wait_for_the_step_under_way(tokenizer):
    """Python aborts where it ends under a thread that computes."""
    with engine_of(scripted(b"x" * 40, seconds=0.3), tokenizer) as engine:
        next(engine.stream(Request([65, 66], 40)))
        engine.close(wait=10)
        assert not engine._worker.is_alive()


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request([], 4), "the prompt is empty"),
        (Request([65], 0), "max_tokens must be at least 1, got 0"),
        (Request([65] * 10, 503), "a prompt of 10 tokens and 503 new ones are more than .* context of 512"),
        (Request([65, 270], 4), "token ids outside the vocabulary of 270"),
        (Request([-1], 4), "token ids outside the vocabulary of 270"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(request_, sentence, tokenizer):
    with engine_of(chat_model(), tokenizer) as engine, pytest.raises(ValueError, match=sentence):
        engine.submit([request_], print)


@pytest.mark.parametrize("limits", [{"max_batch_size": 0}, {"max_queue": 0}], ids=str)
def test_limits_below_one_are_refused(limits, tokenizer):
    with pytest.raises(ValueError, match=f"{next(iter(limits))} must be at least 1, got 0"):
        Engine(chat_model(), tokenizer, **limits)


@pytest.mark.gpu
@pytest.mark.parametrize("name", DIALECTS)
def test_on_a_gpu_the_same_seeds_give_the_same_text(name, tokenizer):
    model = chat_model(name)
    requests = [
        Request(list(p), 12, temperature=t, seed=3) for p, t in zip(PROMPTS, [0, 0.7, 0, 1], strict=True)
    ]
    with engine_of(model, tokenizer) as engine:
        expected, _ = run_together(engine, requests)
    with engine_of(model.to("cuda"), tokenizer) as engine:
        assert run_together(engine, requests)[0] == expected
