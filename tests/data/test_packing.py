"""Best-fit plans: every token once, rows that begin at pieces, bounded padding; and rows of them."""

import tracemalloc

import numpy as np
import pytest

from tessera.data import packing
from tessera.data.packing import PADDING, Plan, plan_rows, read_plan, write_plan


def bounds_of(sizes) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint64)


def rows_of(plan: Plan) -> list[list[tuple[int, int]]]:
    """For each row (first target, last target + 1) of its pieces."""
    return [
        [(start, start + size) for start, size in zip(*(part.tolist() for part in plan.row(i)), strict=True)]
        for i in range(len(plan))
    ]


def draw_sizes(generator: np.random.Generator, length: int) -> np.ndarray:
    """Documents of one of several kinds: short, long, alike, empty ones among them."""
    count = int(generator.integers(1, 150))
    kind = generator.integers(4)
    if kind == 0:
        return generator.integers(0, 3 * length, count)
    if kind == 1:
        return np.full(count, int(generator.integers(1, 2 * length)))
    if kind == 2:
        return generator.integers(1, length // 3 + 2, count)
    return np.exp(generator.normal(np.log(length), 1.5, count)).astype(int)


@pytest.mark.parametrize("seed", range(8))
def test_random_documents_are_packed_whole_once_and_tightly(seed):
    generator = np.random.default_rng(seed)
    for _ in range(25):
        length = int(generator.integers(1, 700))
        bounds = bounds_of(draw_sizes(generator, length))
        if bounds[-1] == 0:
            continue
        window = int(generator.integers(1, 200))
        rows = rows_of(plan_rows(bounds, length, window))
        pieces = sorted(piece for row in rows for piece in row)
        assert pieces[0][0] == 0 and pieces[-1][1] == bounds[-1]
        assert all(one[1] == other[0] for one, other in zip(pieces, pieces[1:], strict=False)), (
            "lost, doubled"
        )
        assert all(start < end for start, end in pieces)
        edges = bounds.tolist()
        assert not any(
            np.searchsorted(bounds, start, "right") != np.searchsorted(bounds, end - 1, "right")
            for start, end in pieces
        ), "a piece of two documents"
        used = [sum(end - start for start, end in row) for row in rows]
        assert max(used) <= length
        padding = length * len(rows) - edges[-1]
        assert padding <= length * len(rows) / PADDING + length


def test_documents_that_fit_are_never_cut_and_longer_ones_leave_whole_rows_and_a_tail():
    """Web-like lengths, whose rows fill up without cutting."""
    generator = np.random.default_rng(0)
    sizes = np.exp(generator.normal(6, 1.2, 20_000)).astype(int) + 1
    bounds = bounds_of(sizes)
    plan = plan_rows(bounds, 2048)
    edges = set(bounds.tolist())
    cut = 0
    for start, size in zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True):
        document = int(np.searchsorted(bounds, start, "right")) - 1
        inside = start - int(bounds[document])
        if sizes[document] <= 2048:
            cut += not (start in edges and start + size in edges)
        else:
            assert inside % 2048 == 0 and (size == 2048 or start + size in edges)
    assert cut == 0
    assert 1 - bounds[-1] / (2048 * len(plan)) < 0.001


def test_a_row_takes_the_piece_that_leaves_the_least_room():
    """Best-fit decreasing by hand: 60 opens a row, 50 another, 40 goes beside 60, 30 and 20 beside 50."""
    sizes = [30, 60, 20, 50, 40]
    bounds = bounds_of(sizes)
    names = {int(start): size for start, size in zip(bounds[:-1], sizes, strict=True)}
    rows = [sorted(names[start] for start, _ in row) for row in rows_of(plan_rows(bounds, 100))]
    assert sorted(rows) == [[20, 30, 50], [40, 60]]


def one_by_one(sizes: list[int], length: int) -> list[list[int]]:
    """Best-fit decreasing as in a textbook."""
    rows: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        rooms = [(length - sum(row), i) for i, row in enumerate(rows) if sum(row) + size <= length]
        if rooms:
            rows[min(rooms)[1]].append(size)
        else:
            rows.append([size])
    return rows


@pytest.mark.parametrize("seed", range(6))
def test_counting_gives_the_rows_of_best_fit_piece_by_piece(seed):
    generator = np.random.default_rng(seed)
    length = int(generator.integers(10, 60))
    sizes = generator.integers(1, length, 300).tolist()
    counts = {size: sizes.count(size) for size in sorted(set(sizes), reverse=True)}
    packed = packing.best_fit(counts, length)
    ours = [
        sorted(size for size, each in row for _ in range(each)) for count, row in packed for _ in range(count)
    ]
    theirs = [sorted(row) for row in one_by_one(sizes, length)]
    assert sorted(map(sum, ours)) == sorted(map(sum, theirs))
    assert sorted(size for row in ours for size in row) == sorted(sizes)


def test_a_plan_is_the_same_every_time_and_from_its_files(tmp_path):
    sizes = np.random.default_rng(3).integers(0, 500, 5000)
    plan = plan_rows(bounds_of(sizes), 256, window=700)
    written = write_plan(bounds_of(sizes), 256, tmp_path / "rows", window=700)
    for again in (plan_rows(bounds_of(sizes), 256, window=700), written, read_plan(tmp_path / "rows")):
        assert rows_of(again) == rows_of(plan)
    assert isinstance(written.starts, np.memmap)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows"]


@pytest.mark.parametrize("notes", ["{}", '{"rule": 1}', "[]", "7", "null"])
def test_notes_of_something_else_are_no_plan(notes, tmp_path):
    bounds = bounds_of([5] * 100)
    plan = rows_of(write_plan(bounds, 16, tmp_path / "rows"))
    (tmp_path / "rows" / "plan.json").write_text(notes)
    assert read_plan(tmp_path / "rows") is None
    assert rows_of(write_plan(bounds, 16, tmp_path / "rows")) == plan


def test_a_process_of_the_same_number_elsewhere_does_not_disturb(monkeypatch, tmp_path):
    bounds = bounds_of([5] * 100)
    windows = packing._plan_windows

    def overtaken(*arguments):
        monkeypatch.setattr(packing, "_plan_windows", windows)
        write_plan(bounds, 16, tmp_path / "rows")  # with the same process id, since it is this one
        return windows(*arguments)

    monkeypatch.setattr(packing, "_plan_windows", overtaken)
    assert rows_of(write_plan(bounds, 16, tmp_path / "rows")) == rows_of(plan_rows(bounds, 16))
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "rows").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("damage", ["plan.json", "starts.bin", "ends.bin"])
def test_a_plan_that_is_not_whole_is_made_again(damage, tmp_path):
    bounds = bounds_of([5] * 100)
    plan = rows_of(write_plan(bounds, 16, tmp_path / "rows"))
    (tmp_path / "rows" / damage).write_bytes((tmp_path / "rows" / damage).read_bytes()[:16])
    assert read_plan(tmp_path / "rows") is None
    assert rows_of(write_plan(bounds, 16, tmp_path / "rows")) == plan


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    sizes = np.random.default_rng(0).integers(1, 300, 400_000)
    bounds = bounds_of(sizes)
    peaks = []
    for documents in (100_000, 400_000):
        tracemalloc.start()
        try:
            write_plan(bounds[: documents + 1], 512, tmp_path / str(documents), window=20_000)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_nothing_to_pack_is_refused(tmp_path):
    for plan in (lambda b: plan_rows(b, 8), lambda b: write_plan(b, 8, tmp_path / "rows")):
        with pytest.raises(ValueError, match="there are no tokens to make rows of"):
            plan(bounds_of([0, 0]))
    assert not list(tmp_path.iterdir())
