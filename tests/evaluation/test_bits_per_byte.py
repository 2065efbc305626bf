"""Loss of a text under a model, against a loop over single tokens."""

import math

import numpy as np
import pytest
import torch
from helpers.models import tiny_model
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from tessera.evaluation.bits_per_byte import text_loss

VOCABULARY = 256


class Fixed(nn.Module):
    """A model whose logits are the same at every position."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(logits=self.logits.expand(*input_ids.shape, -1))


def random_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count, dtype=np.uint8)


@torch.no_grad()
def nats_one_by_one(model: nn.Module, ids: np.ndarray, length: int) -> float:
    """Each target alone, given what its window has before it."""
    total = 0.0
    for i in range(1, len(ids)):
        begin = (i - 1) // length * length
        context = torch.tensor(ids[begin:i].astype(np.int64))[None]
        likelihoods = model(input_ids=context).logits[0, -1].double().log_softmax(-1)
        total -= likelihoods[int(ids[i])].item()
    return total / (len(ids) - 1)


@pytest.mark.parametrize("count", [2, 9, 17, 18, 65, 70])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_loss_equals_a_loop_over_single_tokens(count, batch_size):
    model, ids = tiny_model("llama-tiny"), random_ids(count, seed=count)
    loss = text_loss(model, ids, num_bytes=count, length=16, batch_size=batch_size)
    assert loss.tokens == count - 1
    assert loss.nats == pytest.approx(nats_one_by_one(model, ids, 16), abs=1e-4)


@pytest.mark.parametrize("count", [100, 97, 10])
def test_a_sample_is_every_nth_window_of_the_whole_text(count):
    model, ids = tiny_model("llama-tiny"), random_ids(count)
    loss = text_loss(model, ids, num_bytes=2 * count, length=16, batch_size=2, every=3)
    starts = list(range(0, (count - 1) // 16, 3)) or [0]
    windows = [ids[16 * i : 16 * i + 17] for i in starts]
    targets = [len(window) - 1 for window in windows]
    expected = sum(n * nats_one_by_one(model, w, 16) for n, w in zip(targets, windows, strict=True)) / sum(
        targets
    )
    assert loss.tokens == sum(targets)
    assert loss.nats == pytest.approx(expected, abs=1e-4)
    assert loss.num_bytes == pytest.approx(2 * sum(targets))


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary():
    loss = text_loss(Fixed(torch.zeros(VOCABULARY)), random_ids(100), num_bytes=100, length=16)
    assert loss.nats == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert loss.bits_per_byte == pytest.approx(8, rel=1e-6)


def test_bits_per_byte_of_bytes_are_nats_over_ln_2():
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0))
    loss = text_loss(Fixed(logits), random_ids(100), num_bytes=100, length=16)
    assert loss.bits_per_byte == pytest.approx(loss.nats / math.log(2))


def test_bits_per_byte_do_not_depend_on_how_many_bytes_a_token_has():
    """256 equally likely tokens of four bytes each: a byte takes a quarter of eight bits."""
    loss = text_loss(Fixed(torch.zeros(VOCABULARY)), random_ids(100), num_bytes=400, length=16)
    assert loss.nats == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert loss.bits_per_byte == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(training):
    model, ids = tiny_model("gpt2-tiny", resid_pdrop=0.5), random_ids(40)
    expected = text_loss(model.eval(), ids, 40, 16).nats
    model.train(training)
    assert text_loss(model, ids, 40, 16).nats == expected
    assert model.training is training


def test_a_single_token_has_no_loss():
    with pytest.raises(ValueError, match="two tokens or more, got 1"):
        text_loss(tiny_model("llama-tiny"), random_ids(1), num_bytes=1, length=16)
