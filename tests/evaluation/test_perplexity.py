"""Perplexity with a sliding window, against single tokens one by one and against lm-evaluation-harness."""

import math
import re

import numpy as np
import pytest
import torch
from helpers.models import EVERY_MODEL, tiny_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows

from tessera import build_byte_tokenizer
from tessera.evaluation.bits_per_byte import text_loss
from tessera.evaluation.documents import Document
from tessera.evaluation.perplexity import perplexity, sliding_windows

from .conftest import CONTEXT, TEXT

CUTS = [(n, c, s) for n in (1, 2, 7, 8, 9, 16, 17, 40) for c in (1, 4, 8) for s in (1, 3, 4, 8) if s <= c]


def documents_of(tokenizer, texts: list[str]) -> list[Document]:
    return [
        Document(
            np.array(tokenizer.encode(t, add_special_tokens=False)), len(re.split(r"\s+", t)), len(t.encode())
        )
        for t in texts
    ]


@torch.no_grad()
def nats_one_by_one(model, ids: list[int], start: int, context: int, stride: int) -> float:
    """Each token alone, from a context that is computed anew."""
    stream, total = [start, *ids], 0.0
    for i, target in enumerate(ids):
        if i < context:
            begin = 0
        else:  # the window of this token ends with the stride that it is in
            end = min(context + ((i - context) // stride + 1) * stride, len(ids))
            begin = end - context
        inputs = torch.tensor([stream[begin : i + 1]])
        total -= model(input_ids=inputs).logits[0, -1].double().log_softmax(-1)[target].item()
    return total


@pytest.mark.parametrize(("count", "context", "stride"), CUTS)
def test_every_token_is_scored_once_with_enough_before_it(count, context, stride):
    ids = np.arange(1, count + 1)
    scored = []
    for row, targets in sliding_windows(ids, 0, context, stride):
        assert len(row) <= context + 1
        assert np.array_equal(row, np.arange(row[0], row[-1] + 1)), "a window is a piece of the document"
        for place in range(len(row) - targets, len(row)):
            scored.append(row[place])
            assert place >= min(row[place], context - stride + 1), "tokens before it"
    assert scored == list(ids)


@pytest.mark.parametrize(("count", "context", "stride"), CUTS)
def test_windows_are_those_of_the_harness(count, context, stride):
    ids = list(range(1, count + 1))
    theirs = get_rolling_token_windows(ids, 0, max_seq_len=context, context_len=context - stride + 1)
    ours = sliding_windows(np.array(ids), 0, context, stride)
    for (inputs, targets), (row, scored) in zip(theirs, ours, strict=True):
        assert list(row[:-1]) == inputs
        assert list(row[len(row) - scored :]) == targets


@pytest.mark.parametrize("stride", [5, 16, CONTEXT])
def test_loss_equals_a_loop_over_single_tokens(loaded, stride):
    model, tokenizer = loaded
    texts = [TEXT * 2, "A short one.", TEXT[:70]]
    found = perplexity(model, tokenizer, documents_of(tokenizer, texts), CONTEXT, stride, batch_size=3)
    rows = [tokenizer.encode(text) for text in texts]
    expected = sum(nats_one_by_one(model, row, tokenizer.eos_token_id, CONTEXT, stride) for row in rows)
    assert found.tokens == sum(map(len, rows))
    assert found.nats == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_every_kind_of_model_is_scored_like_single_tokens(name):
    model = tiny_model(name)
    ids = np.random.default_rng(0).integers(0, 200, 50)
    tokenizer = build_byte_tokenizer()
    documents = [Document(ids, 9, 50), Document(ids[:7], 9, 7)]
    found = perplexity(model, tokenizer, documents, 24, 10)
    expected = sum(nats_one_by_one(model, [*map(int, d.ids)], ord("\n"), 24, 10) for d in documents)
    assert found.nats == pytest.approx(expected, rel=1e-5)


def test_a_whole_stride_is_the_rolling_likelihood_of_the_harness(folder, loaded):
    texts = [TEXT * 3, "A short one.", TEXT]
    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=2, backend="causal")
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    model, tokenizer = loaded
    for text, likelihood in zip(texts, expected, strict=True):
        found = perplexity(model, tokenizer, documents_of(tokenizer, [text]), CONTEXT, CONTEXT)
        assert found.nats == pytest.approx(-likelihood, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batch_size_does_not_change_the_figure(loaded, batch_size):
    model, tokenizer = loaded
    documents = documents_of(tokenizer, [TEXT * 2, "Short.", TEXT[:90]])
    whole = perplexity(model, tokenizer, documents, CONTEXT, 20, batch_size=5)
    again = perplexity(model, tokenizer, documents, CONTEXT, 20, batch_size=batch_size)
    assert again.nats == pytest.approx(whole.nats, rel=1e-6)
    assert again.stderr == pytest.approx(whole.stderr, rel=1e-4)


@pytest.mark.parametrize("windows", [1, 3])
def test_without_overlap_bits_per_byte_are_those_of_the_stream(byte_model, windows):
    """Where windows fill the text both metrics cut it alike, if the stream begins with what begins a text."""
    model, tokenizer = byte_model
    text = (TEXT * 3)[: windows * 32]
    found = perplexity(model, tokenizer, documents_of(tokenizer, [text]), 32, 32)
    stream = np.frombuffer(("\n" + text).encode(), np.uint8)
    loss = text_loss(model, stream, len(stream), 32)
    assert found.nats == pytest.approx(loss.nats * loss.tokens, rel=1e-6)
    assert math.log2(found.per("num_bytes")[0]) == pytest.approx(found.bits_per_byte[0])


def test_bits_per_byte_do_not_have_the_precision_of_what_was_trained_before(byte_model):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model, _ = byte_model
    stream = np.frombuffer(TEXT.encode(), np.uint8)
    AcceleratorState._reset_state(reset_partial_state=True)
    wanted = text_loss(model, stream, len(stream), 32)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        Accelerator(mixed_precision="bf16")
        assert text_loss(model, stream, len(stream), 32) == wanted
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_perplexities_of_words_bytes_and_tokens_are_one_loss(loaded):
    model, tokenizer = loaded
    found = perplexity(model, tokenizer, documents_of(tokenizer, [TEXT]), CONTEXT, 16)
    words, size = len(re.split(r"\s+", TEXT)), len(TEXT.encode())
    for unit, count in (("tokens", found.tokens), ("words", words), ("num_bytes", size)):
        value, stderr = found.per(unit)
        assert math.log(value) * count == pytest.approx(found.nats)
        # by the delta method, from the error of the whole loss
        assert stderr / value * count == pytest.approx(found.stderr)


def test_standard_error_of_equal_windows_is_that_of_their_mean(byte_model):
    model, tokenizer = byte_model
    text = (TEXT * 3)[: 6 * 32]
    found = perplexity(model, tokenizer, documents_of(tokenizer, [text]), 32, 32)
    stream = [ord("\n"), *text.encode()]
    each = [
        nats_one_by_one(model, stream[i + 1 : i + 33], stream[i], 32, 32) for i in range(0, len(text), 32)
    ]
    assert found.stderr == pytest.approx(np.std(each, ddof=1) * math.sqrt(len(each)), rel=1e-4)


def test_a_loss_beyond_all_numbers_is_infinite(byte_model):
    model, tokenizer = byte_model
    one_word = [Document(np.frombuffer(b"x" * 900, np.uint8), 1, 900)]
    assert perplexity(model, tokenizer, one_word, 16, 16).per("words")[0] == math.inf


@pytest.mark.parametrize(
    ("text", "stride", "sentence"),
    [
        ("x", 8, "a perplexity needs two tokens or more, got 1"),
        ("two words", 17, "stride must be between 1 and the context of 16 tokens, got 17"),
        ("two words", 0, "stride must be between 1 and the context of 16 tokens, got 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(byte_model, text, stride, sentence):
    model, tokenizer = byte_model
    with pytest.raises(ValueError, match=re.escape(sentence)):
        perplexity(model, tokenizer, documents_of(tokenizer, [text]), 16, stride)
