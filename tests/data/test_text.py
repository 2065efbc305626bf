"""From documents to streams: what is held out, and where documents start."""

import numpy as np
import pytest

from tessera.data.text import MANY_DOCUMENTS, find_starts, split_documents

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


# ---- where documents start ----


def test_documents_start_after_the_token_that_ends_them():
    ids = np.array([5, 6, 0, 7, 0, 0, 8], dtype=np.uint16)
    assert find_starts(ids, 0).tolist() == [0, 3, 5, 6, 7]
    assert find_starts(ids[:-1], 0).tolist() == [0, 3, 5, 6]
    assert find_starts(ids, 9) is None and find_starts(ids, None) is None and find_starts(ids, 2**20) is None
