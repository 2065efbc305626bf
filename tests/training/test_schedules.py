"""What changes over a run: rates, momentum, weight decay, and sizes by stages."""

import math

import pytest
import torch
from transformers import get_scheduler, get_wsd_schedule

from tessera.training.pretrain_arguments import PretrainArguments
from tessera.training.schedules import (
    SCHEDULES,
    learning_rate_factor,
    mean_size,
    momentum_at,
    read_stages,
    sizes_over_steps,
    weight_decay_factor,
)


def told(**given) -> PretrainArguments:
    return PretrainArguments(config="x", data_file="x", **given)


def library_factors(make, steps: int) -> list[float]:
    """The factors of a scheduler of transformers."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, factors = make(optimizer), []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_schedule_is_that_of_transformers_but_for_the_first_step(schedule):
    """Whose rate is zero there."""
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = library_factors(lambda one: get_scheduler(name, one, 20, 100), 100)
    args = told(schedule=schedule, warmup=0.2)
    ours = [learning_rate_factor(args, step / 100) for step in range(100)]
    assert ours[1:] == pytest.approx(theirs[1:]) and 0 < ours[0] < 0.05


def test_wsd_is_that_of_transformers():
    theirs = library_factors(
        lambda one: get_wsd_schedule(
            one, 10, 30, num_stable_steps=60, decay_type="linear", warmup_type="linear"
        ),
        100,
    )
    args = told(schedule="wsd", warmup=0.1, decay=0.3)
    ours = [learning_rate_factor(args, step / 100) for step in range(100)]
    assert ours[1:] == pytest.approx(theirs[1:])


def test_rates_momentum_and_decay_are_those_of_nanochat():
    """base_train.py of July 2026, for 2,520 iterations; its warm-up is a step ahead of ours."""
    total = 2520
    momentum = {"momentum_start": 0.85, "momentum": 0.97, "momentum_warmup_steps": 400, "momentum_end": 0.9}
    args = told(schedule="wsd", decay=0.65, floor=0.05, weight_decay_schedule="cosine", **momentum)
    fall = round(0.65 * total)
    for step in range(0, total, 7):
        left = (total - step) / fall
        rate = min((step + 1) / 40, 1.0) if left >= 1 else left + (1 - left) * 0.05
        assert learning_rate_factor(args, step / total, 40 / total) == pytest.approx(rate, abs=0.026)
        if step >= 40:
            assert learning_rate_factor(args, step / total, 40 / total) == pytest.approx(rate)
        momentum = 0.97 if left >= 1 else 0.97 * left + 0.90 * (1 - left)
        if step < 400:
            momentum = 0.85 + (0.97 - 0.85) * step / 400
        assert momentum_at(args, step, step / total, 40 / total) == pytest.approx(momentum)
        decay = 0.5 * (1 + math.cos(math.pi * step / total))
        assert weight_decay_factor(args, step / total) == pytest.approx(decay)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_ever_leaves_its_bounds(schedule):
    for warmup in (0.0, 0.02, 0.7, 1.0):
        for decay in {"wsd": (None, 0.01, 0.5, 1.0)}.get(schedule, (None,)):
            args = told(schedule=schedule, warmup=warmup, decay=decay, floor=0.1)
            factors = [learning_rate_factor(args, step / 50) for step in range(60)]
            assert all(0 < factor <= 1 for factor in factors)
            assert min(factors[50:]) == max(factors[50:])
            if schedule != "constant" and warmup < 1:
                assert factors[50] == pytest.approx(0.1), "past the end too"
    assert learning_rate_factor(told(schedule=schedule, warmup=0.0), 0.0) == 1.0


def test_what_is_not_given_stays_as_it_is():
    args = told(schedule="cosine")
    assert {momentum_at(args, step, step / 10) for step in range(10)} == {0.95}
    assert {weight_decay_factor(args, step / 10) for step in range(10)} == {1.0}
    line = told(weight_decay_schedule="linear")
    assert [weight_decay_factor(line, share) for share in (0, 0.25, 1, 1.2)] == [1, 0.75, 0, 0]
    late = told(momentum_end=0.5, schedule="linear", warmup=0.5)
    assert [momentum_at(late, 0, share) for share in (0, 0.5, 0.75, 1)] == pytest.approx(
        [0.95, 0.95, 0.725, 0.5]
    )


@pytest.mark.parametrize("total", [1, 2, 3, 7, 100])
def test_stages_are_counted_as_if_one_by_one(total):
    stages = read_stages(["0:4", "0.3:8", "0.55:16"], "batch_schedule")
    sizes = sizes_over_steps(stages, total)
    done = 0
    for step in range(2 * total):
        share = step / total
        expected = 16 if share >= 0.55 else 8 if share >= 0.3 else 4
        assert sizes.before(step) == done
        if total > 2:
            assert sizes.at(step) == expected
        done += sizes.at(step)
    assert sizes.before(total) == pytest.approx(total * mean_size(stages), abs=2 * 16)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["32"], "'32' is not a share of the run and a size"),
        (["0:1.5"], "is not a share of the run"),
        (["0.1:4"], "shares start at 0 and rise"),
        (["0:4", "0.5:8", "0.5:16"], "shares start at 0 and rise"),
        (["0:4", "1:8"], "below 1; got 0:4, 1:8"),
        (["0:0"], "sizes are at least 1"),
        ([], "an empty list"),
    ],
)
def test_stages_that_make_no_sense_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_stages(given, "batch_schedule")
