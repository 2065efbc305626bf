"""Mixtures at training time: which of several prepared corpora gives row `g`.

A fixed schedule that repeats: as a function of `g` it needs no state, and no corpus is ever a whole row ahead
of its share or behind it. What belongs here: whose turn it is. Mixing text before it is encoded is
`mixing.py`.
"""

import math
from fractions import Fraction

import numpy as np

# The longest schedule: shares are then exact to a hundred-thousandth.
LONGEST = 100_000


class Schedule:
    """Whose turn it is at each row, in a pattern that repeats.

    Corpora take turns as in fair scheduling: the j-th row of a corpus with the share w is released at row
    j / w and due by row (j + 1) / w, and of the released the one that is due first comes next. With shares
    that add up to one all are in time, so that the count of a corpus stays within one row of its share at
    every moment (Baruah, Cohen, Plaxton and Varvel, "Proportionate Progress", 1996).

    Args:
        weights: of the corpora, in any unit; as text (`"0.7"`) or fractions they are taken exactly. Where
            their least pattern would be longer than `LONGEST`, they are rounded to parts of it.

    Raises:
        ValueError: if there is none, or one is not positive.
    """

    def __init__(self, weights: list[str | int | float | Fraction]):
        # 0.1 means a tenth, not the double beside it.
        exact = [Fraction(str(weight)) for weight in weights]
        if not exact or min(exact) <= 0:
            raise ValueError(f"weights must be positive, got {', '.join(map(str, weights)) or 'none'}")
        total = sum(exact)
        shares = [weight / total for weight in exact]
        period = math.lcm(*(share.denominator for share in shares))
        if period > LONGEST:
            period = LONGEST
            turns = _round_to(shares, period)
        else:
            turns = [int(share * period) for share in shares]
        self.turns = np.array(turns, dtype=np.int64)  # of each corpus in a period
        self.period = period
        self._owner, self._rank = _take_turns(turns, period)

    @property
    def shares(self) -> np.ndarray:
        """Of each corpus, adding up to one."""
        return self.turns / self.period

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which corpus gives each row, and how many rows it gave before.

        Args:
            rows: numbers [N].

        Returns:
            Numbers of corpora [N], and of rows within their corpus's own sequence [N].
        """
        periods, places = np.divmod(np.asarray(rows, dtype=np.int64), self.period)
        owner = self._owner[places]
        return owner, periods * self.turns[owner] + self._rank[places]

    def counts(self, rows: int) -> np.ndarray:
        """How many of the first `rows` rows come from each corpus [K]."""
        periods, place = divmod(rows, self.period)
        return periods * self.turns + np.bincount(self._owner[:place], minlength=len(self.turns))


def _round_to(shares: list[Fraction], parts: int) -> list[int]:
    """Whole numbers of parts, at least one each, that add up; the largest remainders are rounded up."""
    turns = [max(int(share * parts), 1) for share in shares]
    rest = sorted(range(len(shares)), key=lambda k: turns[k] - shares[k] * parts)
    for k in rest[: max(parts - sum(turns), 0)]:
        turns[k] += 1
    turns[turns.index(max(turns))] += parts - sum(turns)
    return turns


def _take_turns(turns: list[int], period: int) -> tuple[np.ndarray, np.ndarray]:
    """The corpus of each row of a period, and the number of its rows before that one."""
    owner = np.empty(period, dtype=np.int32)
    rank = np.empty(period, dtype=np.int64)
    given = [0] * len(turns)
    for row in range(period):
        released = (k for k, share in enumerate(turns) if given[k] * period < (row + 1) * share)
        k = min(released, key=lambda k: -(-(given[k] + 1) * period // turns[k]))
        owner[row], rank[row] = k, given[k]
        given[k] += 1
    return owner, rank
