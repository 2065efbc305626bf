"""From documents to rows of tokens: what is held out, and in which order rows come."""

import numpy as np
import pytest

from tessera.data.text import MANY_DOCUMENTS, Windows, split_documents

LENGTH = 10


def stream(count: int, dtype=np.uint32) -> np.ndarray:
    """Ids that are their own positions, so that a row says where it comes from."""
    return np.arange(count).astype(dtype)


# ---- the split ----


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_of_few_documents_the_tail_of_the_text_is_held_out(fraction):
    documents = [b"a" * 500, b"b" * 499]
    (train,), (val,) = split_documents(documents, fraction)
    assert train + val == b"\n".join(documents)
    assert len(val) == 1000 * fraction


def test_of_many_documents_whole_ones_are_held_out_in_proportion():
    documents = [f"document {i}".encode() for i in range(3000)]
    train, val = split_documents(documents, 0.2)
    assert sorted(train + val) == sorted(documents)
    assert not set(train) & set(val)
    assert abs(len(val) / len(documents) - 0.2) < 0.03


def test_one_document_more_does_not_move_the_others():
    documents = [f"document {i}".encode() for i in range(200)]
    train, val = split_documents(documents)
    more_train, more_val = split_documents([b"new", *documents])
    assert [d for d in more_train if d != b"new"] == train
    assert [d for d in more_val if d != b"new"] == val


def test_documents_that_would_all_train_leave_the_tail_for_validation():
    """With hardly more than twenty this happens to one corpus in ten."""
    train, val = split_documents([b"one and the same document"] * MANY_DOCUMENTS)
    assert all(train) and all(val)


# ---- windows ----


def starts(windows: Windows, epoch: int) -> list[int]:
    rows = windows.rows(epoch * windows.per_epoch, windows.per_epoch)
    assert np.array_equal(rows, rows[:, :1] + np.arange(LENGTH + 1)), "a row is not a stretch of the stream"
    return rows[:, 0].tolist()


@pytest.mark.parametrize("count", [11, 20, 21, 30, 31, 32, 39, 40, 41, 257, 1000])
def test_an_epoch_is_windows_that_do_not_overlap_and_leave_less_than_two_out(count):
    windows = Windows(stream(count), LENGTH)
    for epoch in range(20):
        first = sorted(starts(windows, epoch))
        assert all(b - a == LENGTH for a, b in zip(first, first[1:], strict=False))
        assert first[0] >= 0 and first[-1] + LENGTH < count
        targets = len(first) * LENGTH
        assert count - 1 - targets < 2 * LENGTH


def test_epochs_have_their_own_start_and_order():
    windows = Windows(stream(1000), LENGTH)
    epochs = [starts(windows, epoch) for epoch in range(6)]
    assert len({min(epoch) for epoch in epochs}) > 1, "every epoch cuts the stream at the same places"
    orders = [tuple(np.argsort(epoch)) for epoch in epochs]
    assert len(set(orders)) == len(orders)
    assert orders[0] != tuple(range(len(orders[0]))), "the first epoch is not shuffled"


def test_a_row_depends_on_its_number_and_the_seed_only():
    ids = stream(500)
    reference = Windows(ids, LENGTH, seed=3)
    expected = [reference.row(i) for i in range(130)]
    for size in (1, 7, 13):
        windows = Windows(ids, LENGTH, seed=3)
        rows = [row for first in range(0, 130, size) for row in windows.rows(first, size)][:130]
        np.testing.assert_array_equal(rows, expected)
    backwards = Windows(ids, LENGTH, seed=3)
    np.testing.assert_array_equal([backwards.row(i) for i in reversed(range(130))], expected[::-1])
    other = Windows(ids, LENGTH, seed=4)
    assert not np.array_equal([other.row(i) for i in range(130)], expected)


def test_a_stream_of_exactly_one_window_is_that_window_in_every_epoch():
    windows = Windows(stream(LENGTH + 1), LENGTH)
    assert windows.per_epoch == 1
    np.testing.assert_array_equal(windows.rows(0, 3), [np.arange(LENGTH + 1)] * 3)


def test_a_stream_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="has 10 tokens, but a window of 10 needs 11"):
        Windows(stream(LENGTH), LENGTH)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_rows_are_int64_whatever_the_stream_is_stored_as(dtype):
    top = np.iinfo(dtype).max
    row = Windows(np.full(LENGTH + 1, top, dtype=dtype), LENGTH).row(0)
    assert row.dtype == np.int64
    assert (row == top).all()
