"""Rows that a trainer reads: what is in them, in which order they come, and that nobody reads them twice."""

from collections import Counter

import numpy as np
import pytest

from tessera.data import training_rows
from tessera.data.order import share
from tessera.data.text import Tokens
from tessera.data.training_rows import IGNORED, ContiguousRows, PackedRows, RowSequence, make_rows

LENGTH = 10
END = 0


def numbered(count: int, dtype=np.uint32) -> Tokens:
    """Ids that are their own positions, so that a row says where it comes from."""
    return Tokens(np.arange(count).astype(dtype), count)


def corpus(sizes: list[int]) -> Tokens:
    """Documents whose tokens are all different, each but for the `END` that ends it."""
    ids = np.arange(1, sum(sizes) + 1)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    ids[starts[1:] - 1] = END
    return Tokens(ids.astype(np.uint16), len(ids), starts.astype(np.uint64))


def sizes_of(seed: int, most: int = 3 * LENGTH) -> list[int]:
    generator = np.random.default_rng(seed)
    return generator.integers(1, most, int(generator.integers(3, 60))).tolist()


def read_epoch(rows, epoch: int = 0) -> training_rows.Batch:
    """The rows of an epoch as they lie, not shuffled."""
    arrays = np.empty((3, rows.per_epoch, rows.length), dtype=np.int64)
    for i in range(rows.per_epoch):
        rows.fill(epoch, i, arrays[0, i], arrays[1, i], arrays[2, i])
    return training_rows.Batch(*arrays)


def documents_in(batch: training_rows.Batch) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of each stretch between two restarts of the positions."""
    found = []
    for inputs, targets, positions in zip(batch.input_ids, batch.targets, batch.position_ids, strict=True):
        edges = [*np.flatnonzero(positions == 0).tolist(), len(positions)]
        assert edges[0] == 0
        for start, end in zip(edges, edges[1:], strict=False):
            assert positions[start:end].tolist() == list(range(end - start))
            found.append((inputs[start:end].tolist(), targets[start:end].tolist()))
    return found


# ---- contiguous ----


def starts_of_rows(rows: ContiguousRows, epoch: int) -> list[int]:
    sequence = RowSequence([rows], seed=rows.seed)
    batch = sequence.batch(range(epoch * rows.per_epoch, (epoch + 1) * rows.per_epoch))
    stretch = batch.input_ids[:, :1] + np.arange(LENGTH)
    assert np.array_equal(batch.input_ids, stretch) and np.array_equal(batch.targets, stretch + 1)
    return batch.input_ids[:, 0].tolist()


@pytest.mark.parametrize("count", [11, 20, 21, 30, 31, 32, 39, 40, 41, 257, 1000])
def test_an_epoch_is_windows_that_do_not_overlap_and_leave_less_than_two_out(count):
    rows = ContiguousRows(numbered(count), LENGTH)
    for epoch in range(20):
        first = sorted(starts_of_rows(rows, epoch))
        assert all(b - a == LENGTH for a, b in zip(first, first[1:], strict=False))
        assert first[0] >= 0 and first[-1] + LENGTH < count
        assert count - 1 - len(first) * LENGTH < 2 * LENGTH


def test_epochs_have_their_own_start_and_order():
    rows = ContiguousRows(numbered(1000), LENGTH)
    epochs = [starts_of_rows(rows, epoch) for epoch in range(6)]
    assert len({min(epoch) for epoch in epochs}) > 1, "every epoch cuts the stream at the same places"
    orders = [tuple(np.argsort(epoch)) for epoch in epochs]
    assert len(set(orders)) == len(orders)
    assert orders[0] != tuple(range(len(orders[0]))), "the first epoch is not shuffled"


def test_a_stream_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="has 10 tokens, but a window of 10 needs 11"):
        ContiguousRows(numbered(LENGTH), LENGTH)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_rows_are_int64_whatever_the_stream_is_stored_as(dtype):
    top = np.iinfo(dtype).max
    rows = ContiguousRows(Tokens(np.full(LENGTH + 1, top, dtype=dtype), 1), LENGTH)
    batch = RowSequence([rows]).batch([0, 1])
    assert batch.input_ids.dtype == batch.targets.dtype == np.int64
    assert (batch.input_ids == top).all() and (batch.targets == top).all() and batch.position_ids is None


@pytest.mark.parametrize("seed", range(5))
def test_isolated_windows_restart_at_the_separator_before_each_document(seed):
    tokens = corpus(sizes_of(seed))
    rows = ContiguousRows(tokens, LENGTH, seed, isolate=True)
    stream = tokens.ids.tolist()
    for epoch in range(3):
        for inputs, targets in documents_in(read_epoch(rows, epoch)):
            first = stream.index(targets[0]) if targets[0] != END else None
            assert END not in inputs[1:] and END not in targets[:-1], "two documents in one"
            if first is not None:
                assert stream[first : first + len(targets)] == targets
            assert inputs[1:] == targets[:-1]


# ---- packed ----


@pytest.mark.parametrize("seed", range(6))
def test_every_token_is_a_target_once_an_epoch_and_follows_what_it_followed_in_its_document(seed):
    tokens = corpus(sizes_of(seed))
    rows = PackedRows(tokens, LENGTH)
    batch = read_epoch(rows)
    counted = batch.targets != IGNORED
    assert Counter(batch.targets[counted].tolist()) == Counter(tokens.ids.tolist())
    stream = [END, *tokens.ids.tolist()]
    followed = Counter(zip(stream, stream[1:], strict=False))
    pairs = zip(batch.input_ids[counted].tolist(), batch.targets[counted].tolist(), strict=True)
    assert Counter(pairs) == followed
    assert [rows.counted(i) for i in range(rows.per_epoch)] == counted.sum(1).tolist()


@pytest.mark.parametrize("seed", range(6))
def test_a_row_is_pieces_of_documents_one_after_the_other_and_padding_at_its_end(seed):
    tokens = corpus(sizes_of(seed))
    starts = set(tokens.ids[tokens.starts[:-1].astype(int)].tolist())
    heads = 0
    for inputs, targets in documents_in(read_epoch(PackedRows(tokens, LENGTH))):
        if targets[0] == IGNORED:
            assert set(targets) == {IGNORED}
            continue
        assert IGNORED not in targets and END not in targets[:-1]
        assert inputs[1:] == targets[:-1]
        # a document's own beginning is read after a separator, a tail after the token that it followed
        heads += inputs[0] == END
        if targets[0] != END:
            assert (inputs[0] == END) == (targets[0] in starts)
    assert heads == len(tokens.starts) - 1


def test_rows_by_hand():
    """Documents 1 2 0 | 4 0 | 6 7 8 9 10 0 in rows of four: one of the third's head, the rest in two."""
    rows = PackedRows(corpus([3, 2, 6]), 4)
    batch = read_epoch(rows)
    found = sorted(zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True))
    # the first token of a document follows an end; its tail follows what it followed
    assert ([0, 6, 7, 8], [6, 7, 8, 9]) in found
    padded = [pair for pair in found if IGNORED in pair[1]]
    assert len(found) == 3 and len(padded) == 1 and padded[0][1].count(IGNORED) == 1
    pieces = {tuple(targets) for _, targets in documents_in(batch)}
    assert {(6, 7, 8, 9), (10, 0)} <= pieces and (IGNORED,) in pieces


def test_one_document_alone_has_no_separator_to_begin_with():
    ids = np.arange(1, 26)
    rows = PackedRows(Tokens(ids, 25, np.array([0, 25])), LENGTH)
    batch = read_epoch(rows)
    counted = batch.targets != IGNORED
    assert sorted(batch.targets[counted].tolist()) == list(range(2, 26))
    assert (batch.input_ids[counted] + 1 == batch.targets[counted]).all()


def test_targets_do_not_depend_on_isolation_and_labels_are_the_targets_shifted_back():
    rows = PackedRows(corpus(sizes_of(1)), LENGTH)
    isolated, joined = (RowSequence([rows], isolate=isolate).batch(range(5)) for isolate in (True, False))
    np.testing.assert_array_equal(isolated.targets, joined.targets)
    np.testing.assert_array_equal(isolated.input_ids, joined.input_ids)
    assert joined.position_ids is None and isolated.position_ids is not None
    np.testing.assert_array_equal(joined.labels[:, 1:], joined.targets[:, :-1])
    assert (joined.labels[:, 0] == IGNORED).all()


def test_documents_that_nobody_knows_are_refused_where_they_are_needed():
    tokens = numbered(100)
    for given in ({"packing": "best-fit"}, {"isolate": True}):
        with pytest.raises(ValueError, match="nobody knows where the documents"):
            make_rows(tokens, LENGTH, **given)
    assert make_rows(tokens, LENGTH).per_epoch == 8


def test_a_large_plan_is_kept_beside_the_tokens_or_in_memory_where_they_may_only_be_read(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(training_rows, "DOCUMENTS_IN_MEMORY", 7)
    tokens = corpus([4] * 30)
    expected = read_epoch(PackedRows(tokens, LENGTH))
    kept = PackedRows(tokens, LENGTH, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("rows-best-fit-10-") and isinstance(kept.plan.starts, np.memmap)
    monkeypatch.setattr(training_rows, "write_plan", lambda *_: pytest.fail("it is there"))
    np.testing.assert_array_equal(read_epoch(PackedRows(tokens, LENGTH, tmp_path)).targets, expected.targets)

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(training_rows, "write_plan", refuse)
    PackedRows(corpus([5] * 30), LENGTH, tmp_path)
    assert list(tmp_path.iterdir()) == [folder]


# ---- the sequence of a run ----


def make_sequence(packing: str, corpora: int, seed: int = 0) -> RowSequence:
    made = [make_rows(corpus(sizes_of(k, 40)), LENGTH, packing, seed=seed) for k in range(corpora)]
    return RowSequence(made, [0.5, 0.3, 0.2][:corpora], seed)


BATCH = 7
STEPS = 40


@pytest.mark.parametrize("corpora", [1, 3])
@pytest.mark.parametrize("packing", ["contiguous", "best-fit"])
def test_any_number_of_processes_reads_the_same_rows_also_after_stops_between(packing, corpora):
    """Each step's tokens, over 1 to 4 processes that share 7 rows unevenly, and with changes under way."""

    def read(step: int, processes: int) -> list:
        sequence = make_sequence(packing, corpora)  # as after a restart
        rows = range(step * BATCH, (step + 1) * BATCH)
        parts = [sequence.batch(share(rows, rank, processes)) for rank in range(processes)]
        return [
            row for part in parts for row in zip(part.input_ids.tolist(), part.targets.tolist(), strict=True)
        ]

    expected = make_sequence(packing, corpora).batch(range(STEPS * BATCH))
    expected = list(zip(expected.input_ids.tolist(), expected.targets.tolist(), strict=True))
    for step in range(STEPS):
        whole = expected[step * BATCH : (step + 1) * BATCH]
        assert read(step, 1 + step % 4) == whole
    assert all(read(3, processes) == expected[3 * BATCH : 4 * BATCH] for processes in (1, 2, 3, 4))


@pytest.mark.parametrize("packing", ["contiguous", "best-fit"])
def test_every_corpus_of_a_mixture_has_each_row_once_an_epoch_in_another_order(packing):
    sequence = make_sequence(packing, 3)
    places = sequence.locate(range(1200))
    for k, rows in enumerate(sequence.corpora):
        mine = [(epoch, i) for of, epoch, i in places if of == k]
        epochs = {epoch: [i for e, i in mine if e == epoch] for epoch in {epoch for epoch, _ in mine}}
        *whole, last = (epochs[epoch] for epoch in sorted(epochs))
        assert len(whole) >= 2 and sorted(epochs) == list(range(len(epochs)))
        assert all(sorted(order) == list(range(rows.per_epoch)) for order in whole)
        assert len(set(last)) == len(last)
        assert whole[0] != whole[1]
    seen = sequence.epochs(1200)
    counts = Counter(of for of, _, _ in places)
    assert seen == [counts[k] / rows.per_epoch for k, rows in enumerate(sequence.corpora)]


def test_an_epoch_of_a_mixture_is_that_of_the_first_corpus_that_is_through():
    sequence = make_sequence("best-fit", 3)
    seen = sequence.epochs(round(sequence.rows_in(2)))
    assert max(seen) == pytest.approx(2, abs=1 / min(rows.per_epoch for rows in sequence.corpora))


def test_a_seed_of_its_own_gives_an_order_of_its_own():
    orders = [make_sequence("best-fit", 1, seed).locate(range(20)) for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
