"""How fast a run is said to go, and what is told of its gradients."""

import math

import pytest
import torch
from torch import nn

from tessera import TesseraConfig
from tessera.training.optimizers import build_optimizer
from tessera.training.records.gradient_statistics import SAMPLED_WEIGHTS, GradientStatistics
from tessera.training.records.meter import Meter, Smoothed, flops_per_token
from tessera.training.samples import for_a_terminal, on_one_line

CPU = torch.device("cpu")


def test_the_rate_is_that_of_the_last_half_minute():
    meter = Meter(flops_per_token=6.0, peak=1200.0, device=CPU)
    assert meter.values() == {}
    for second in range(101):
        meter.update(tokens=10 * second if second <= 60 else 600 + 100 * (second - 60), seconds=float(second))
    assert meter.values() == {"tokens_per_second": pytest.approx(100.0), "mfu": pytest.approx(0.5)}
    assert len(meter.points) <= 32


def test_one_step_longer_than_the_window_has_a_rate():
    meter = Meter(6.0, None, CPU)
    meter.update(0, 0.0)
    meter.update(500, 100.0)
    meter.update(1500, 200.0)
    assert meter.values() == {"tokens_per_second": pytest.approx(10.0)}


def test_a_rollback_starts_a_new_window():
    meter = Meter(6.0, None, CPU)
    for tokens, seconds in ((0, 0.0), (100, 1.0), (40, 1.5)):
        meter.update(tokens, seconds)
    assert meter.tokens_per_second is None
    meter.update(60, 2.0)
    assert meter.tokens_per_second == pytest.approx(40.0)


def test_operations_are_those_of_the_windows_trained_on():
    """Six for each weight that is multiplied with, and attention over half of the window."""
    config = TesseraConfig.from_preset("llama-tiny")
    layers, heads, size = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    length = config.max_position_embeddings // 2
    longest, shorter = (flops_per_token(config, n) for n in (2 * length, length))
    assert longest - shorter == pytest.approx(6 * layers * heads * 2 * size * length / 2, rel=1e-6)
    assert config.max_position_embeddings == 2 * length


def test_smoothing_weighs_the_first_values_fully():
    smoothed = Smoothed()
    assert math.isnan(smoothed.value)
    values = torch.rand(50, dtype=torch.float64)
    for value in values.tolist():
        smoothed.update(value)
    smoothed.update(math.nan)
    weights = 0.95 ** torch.arange(49, -1, -1, dtype=torch.float64)
    assert smoothed.value == pytest.approx(((weights * values).sum() / weights.sum()).item())


class TwoGroups(nn.Module):
    def __init__(self):
        super().__init__()
        self.large = nn.Parameter(torch.randn(30, 40))
        self.small = nn.Parameter(torch.randn(40))
        self.unused = nn.Parameter(torch.randn(3))


def test_norms_and_updates_of_groups_equal_float64():
    model = TwoGroups()
    groups = [
        {"name": "matrices", "params": [model.large, model.unused]},
        {"name": "vectors", "params": [model.small]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    statistics = GradientStatistics(optimizer)
    expected = {}
    for name, p in (("matrices", model.large), ("vectors", model.small)):
        p.grad = torch.randn_like(p)
        gradient, weights = p.grad.double(), p.detach().double()
        expected[f"grad_norm/{name}"] = gradient.norm().item()
        expected[f"update_ratio/{name}"] = 0.1 * gradient.norm().item() / weights.norm().item()
    statistics.take(False)
    optimizer.step()
    assert statistics.values() == {}
    with torch.no_grad():
        for p in (model.large, model.small):
            p += 0.1 * p.grad
    statistics.take(True)
    optimizer.step()
    assert statistics.values() == pytest.approx(expected, rel=1e-4)
    assert statistics.values() == {}


def test_updates_are_measured_on_a_part_of_a_large_group():
    table = nn.Parameter(torch.ones(2 * SAMPLED_WEIGHTS))
    optimizer = torch.optim.SGD([{"name": "table", "params": [table]}], lr=1.0)
    statistics = GradientStatistics(optimizer)
    table.grad = torch.cat([torch.full((SAMPLED_WEIGHTS,), 0.25), torch.full((SAMPLED_WEIGHTS,), 8.0)])
    statistics.take(True)
    optimizer.step()
    assert statistics.values()["update_ratio/table"] == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_optimizer_of_a_run_is_measured_and_steps_alike(kind):
    from tessera import TesseraForCausalLM

    config = TesseraConfig.from_preset("llama-tiny", num_hidden_layers=1)
    weights = []
    for measured in (False, True):
        torch.manual_seed(0)
        model = TesseraForCausalLM(config)
        optimizer = build_optimizer(model, kind)
        statistics = GradientStatistics(optimizer)
        statistics.take(measured)
        ids = torch.arange(16)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        found = statistics.values()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *weights))
    names = {group["name"] for group in optimizer.param_groups}
    assert {key.split("/")[1] for key in found} == names
    assert all(value > 0 for key, value in found.items() if key.startswith("grad_norm/"))


def test_a_sample_is_a_line_on_the_way():
    assert on_one_line("a\nb   c") == "a ⏎ b c"
    assert on_one_line("a\x1b[2Jb\x00") == "a\ufffd[2Jb\ufffd"
    assert for_a_terminal("a\x1b[2J\n\tb\r") == "a\ufffd[2J\n\tb\ufffd"
    assert len(on_one_line("x" * 500, 80)) == 80
