"""Which row comes when: permutations, shares of processes, and mixtures."""

from fractions import Fraction

import numpy as np
import pytest

from tessera.data.mixture import LONGEST, Schedule
from tessera.data.order import permute, share

# ---- the order of an epoch ----


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 17, 100, 1009, 65_537])
def test_an_epoch_is_every_row_once(size):
    for epoch in range(3):
        assert np.array_equal(np.sort(permute(np.arange(size), size, (5, epoch))), np.arange(size))


def test_a_place_gives_the_same_row_whatever_it_is_asked_with():
    whole = permute(np.arange(1000), 1000, (1, 2))
    assert [int(permute(np.array([i]), 1000, (1, 2))[0]) for i in (0, 999, 500)] == whole[
        [0, 999, 500]
    ].tolist()
    block = np.arange(1000).reshape(20, 50)[:, ::-1]
    np.testing.assert_array_equal(permute(block, 1000, (1, 2)), whole[block])


def test_orders_of_epochs_and_seeds_have_nothing_in_common():
    """A row stays in its place, or beside its neighbour, as often as by chance."""
    size, places = 4000, np.arange(4000)
    orders = [permute(places, size, key) for key in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 1))]
    for i, one in enumerate(orders):
        assert (one == places).sum() < 10
        assert (np.abs(np.diff(one)) == 1).sum() < 15  # 2 expected
        for other in orders[:i]:
            assert (one == other).sum() < 10  # 1 expected
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.08


@pytest.mark.parametrize("size", [5, 30])
def test_every_row_comes_as_early_as_every_other(size):
    """Chi-square over which row is at which place in 6000 epochs."""
    counts = np.zeros((size, size))
    for epoch in range(6000):
        counts[np.arange(size), permute(np.arange(size), size, (0, epoch))] += 1
    expected = 6000 / size
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


def test_a_row_among_billions_costs_no_more():
    size = 3 * 10**12
    some = permute(np.arange(0, size, size // 1000), size, (0, 0))
    assert len(np.unique(some)) == len(some) and some.min() >= 0 and some.max() < size
    assert some.min() < 0.02 * size and some.max() > 0.98 * size


def test_places_outside_an_epoch_are_refused():
    with pytest.raises(ValueError, match="places lie between 0 and 9, got 3 to 10"):
        permute(np.array([3, 10]), 10, (0,))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_processes_share_a_step_without_gap_or_overlap(parts):
    rows = range(40, 50)
    shares = [share(rows, part, parts) for part in range(parts)]
    assert [i for one in shares for i in one] == list(rows)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ---- mixtures ----


WEIGHTS = [
    [1],
    ["0.8", "0.2"],
    [0.7, 0.2, 0.1],
    [1, 1, 1],
    ["1/3", "2/3"],
    [5, 3, 2, 7, 11, 1],
    ["0.001", "0.999"],
    [0.15, 0.25, 0.7],
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_no_corpus_is_ever_a_row_from_its_share(weights):
    schedule = Schedule(weights)
    shares = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(shares) for weight in shares]
    rows = max(3 * schedule.period, 50)
    given = [0] * len(weights)
    corpora, numbers = schedule.locate(np.arange(rows))
    for row, (k, number) in enumerate(zip(corpora.tolist(), numbers.tolist(), strict=True), start=1):
        assert number == given[k], "a corpus skips or repeats a row"
        given[k] += 1
        assert all(abs(have - row * part) < 1 for have, part in zip(given, shares, strict=True))
        if row % 7 == 0:
            assert schedule.counts(row).tolist() == given


def test_random_weights_keep_their_shares_too():
    generator = np.random.default_rng(0)
    for _ in range(40):
        turns = generator.integers(1, 30, generator.integers(2, 9))
        schedule = Schedule(turns.tolist())
        counts = np.array([schedule.counts(row) for row in range(schedule.period + 1)])
        assert np.abs(counts - np.arange(len(counts))[:, None] * turns / turns.sum()).max() < 1
        assert (np.diff(counts, axis=0).sum(1) == 1).all()


def test_a_row_far_on_is_located_at_once():
    schedule = Schedule(["0.7", "0.3"])
    first, far = (schedule.locate(start + np.arange(10)) for start in (0, 10**15))
    assert far[0].tolist() == first[0].tolist() and set(first[0].tolist()) == {0, 1}
    expected = first[1] + np.array([7 * 10**14, 3 * 10**14])[first[0]]
    assert far[1].tolist() == expected.tolist()
    assert schedule.counts(10**15).tolist() == [7 * 10**14, 3 * 10**14]


def test_weights_that_are_too_fine_are_rounded_to_a_hundred_thousandth():
    schedule = Schedule([0.1234567, 0.7654321, 1e-9])
    total = 0.1234567 + 0.7654321
    assert schedule.period == LONGEST and schedule.turns.sum() == LONGEST and schedule.turns[2] == 1
    np.testing.assert_allclose(schedule.shares, [0.1234567 / total, 0.7654321 / total, 0], atol=1.1 / LONGEST)


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -2]])
def test_weights_that_are_not_positive_are_refused(weights):
    with pytest.raises(ValueError, match="weights must be positive"):
        Schedule(weights)
