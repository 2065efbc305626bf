"""Loss of a text under a model, against a loop over single tokens."""

import math
import os
import subprocess
import sys
from pathlib import Path

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


def test_standard_error_of_equal_windows_is_that_of_their_mean():
    model, ids = tiny_model("llama-tiny"), random_ids(6 * 16 + 1)
    loss = text_loss(model, ids, num_bytes=2 * len(ids), length=16, batch_size=4)
    each = [nats_one_by_one(model, ids[i : i + 17], 16) for i in range(0, len(ids) - 1, 16)]
    assert loss.stderr == pytest.approx(np.std(each, ddof=1) / math.sqrt(6), rel=1e-3)
    assert loss.bits_per_byte_stderr / loss.bits_per_byte == pytest.approx(loss.stderr / loss.nats)


def test_standard_error_is_that_of_many_such_texts():
    """Windows drawn anew a thousand times, the short one at the end among them."""
    model, ids = tiny_model("llama-tiny"), random_ids(40 * 8 + 4)
    loss = text_loss(model, ids, num_bytes=len(ids), length=8)
    rows = [ids[i : i + 9] for i in range(0, len(ids) - 1, 8)]
    targets = np.array([len(row) - 1 for row in rows])
    nats = np.array([text_loss(model, row, len(row), 8).nats for row in rows]) * targets
    draws = np.random.default_rng(0).integers(0, len(rows), (1000, len(rows)))
    means = nats[draws].sum(1) / targets[draws].sum(1)
    assert loss.stderr == pytest.approx(means.std(), rel=0.1)


def test_one_window_has_no_standard_error():
    loss = text_loss(tiny_model("llama-tiny"), random_ids(9), num_bytes=9, length=16)
    assert loss.stderr is None and loss.bits_per_byte_stderr is None


@pytest.mark.distributed
def test_processes_share_the_windows(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import numpy as np\n"
        "from helpers.models import tiny_model\n"
        "from tessera.evaluation.bits_per_byte import text_loss\n"
        "ids = np.arange(5 * 16 + 9, dtype=np.uint8)\n"
        "loss = text_loss(tiny_model('llama-tiny'), ids, len(ids), 16, batch_size=2)\n"
        # One write a process: lines of two would run into each other.
        "sys.stdout.write(f'loss {loss.nats} {loss.stderr} {loss.tokens}\\n')\n"
    )
    printed = []
    for launch in (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], []):
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launch, str(program)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = [line for line in done.stdout.splitlines() if line.startswith("loss ")]
        printed += [[float(word) for word in line.split()[1:]] for line in lines]
    assert len(printed) == 3
    for values in printed:
        assert values == pytest.approx(printed[-1], rel=1e-5)
