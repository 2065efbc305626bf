"""The learning rate over a run."""

import math

import pytest

from tessera.training.schedules import cosine_with_warmup


def test_the_rate_rises_in_a_line_and_is_never_zero_at_the_start():
    assert 0 < cosine_with_warmup(0.0, warmup=0.2) < 0.05
    for share in (0.1, 0.5, 0.9):
        assert cosine_with_warmup(0.2 * share, warmup=0.2) == pytest.approx(share)


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_after_the_warmup_the_rate_is_half_a_cosine_down_to_the_floor(floor):
    factors = [cosine_with_warmup(0.2 + 0.8 * share, 0.2, floor) for share in (0, 0.25, 0.5, 1)]
    expected = [floor + (1 - floor) * height for height in (1, (2 + math.sqrt(2)) / 4, 0.5, 0)]
    assert factors == pytest.approx(expected)


def test_past_the_end_the_rate_stays_at_the_floor():
    assert cosine_with_warmup(1.5, floor=0.3) == pytest.approx(0.3)


def test_without_warmup_the_rate_starts_at_its_peak():
    assert cosine_with_warmup(0.0, warmup=0.0) == 1.0
