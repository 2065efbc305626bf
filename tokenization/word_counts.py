"""Words of a text and how often each is there: all that a BPE trainer needs to know of a corpus.

What belongs here: how text is cut and split into words, counting them in several processes, and the bound
on memory. How words become tokens is none of this file's business.

Each process counts what it is given. When its words take more than their share of memory it writes them to
a temporary file (a shard), in order, and begins anew; shards are merged at the end. The words that are left
must fit into the memory of whoever merges them: should they not, the rarest are dropped, and it is said
which. Counts are sums, so that neither the number of processes nor chance in what each gets changes them.

This file is also the program of those processes. They are started from the file, not forked (a copy of a
process that has threads may wait forever for a lock) and not by `multiprocessing`, which would run the
user's own script again in each of them.
"""

import heapq
import marshal
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import IO, Any

# SentencePiece's words: what stands between spaces, with the spaces before it; line ends are none of its.
SPACES_PATTERN = r" *[^ \n]+| +"
# Those go on where no piece does: pieces have no letter beside a sign, nor a digit beside anything. Told by
# ASCII alone; the rest may belong to either side. Words with < are left whole, as the trainer looks for
# special tokens in them.
_LETTERS, _SIGNS, _OTHERS = "[A-Za-z]+", r"[!-/:-@\[-`{-~]+", r"[^ -~]+"
_MORE = f"(?:{_OTHERS}(?:{_LETTERS}|{_SIGNS})?)"
SPACES_PARTS = rf"^.*<.*$| *(?:{_LETTERS}|{_SIGNS}){_MORE}*| *{_MORE}+| +|[0-9]"

# Characters that are split at a time. Cuts are where words end, so longer pieces give the same words.
PIECE_LENGTH = 4096
# Texts of fewer characters than this are counted here: starting processes would take longer.
SMALL = 4_000_000
# Characters that go to a process at a time.
BATCH = 1_000_000
MAX_WORKERS = 8

# What a word is reckoned to take, in bytes of memory, until it is merged: for each of its bytes in the arrays
# of bpe_merges.py (the trainer of SentencePiece takes less), and for itself in a dictionary.
COST_OF_BYTE, COST_OF_WORD = 64, 160
# The words that are kept; about two million of English.
MEMORY = 1_250_000_000
# While they are counted only the dictionary is there, a quarter of the cost of an ordinary word.
COUNTED_MEMORY = 2 * MEMORY
# The last shard of a process is in no order, which takes time and is of no use where there are no others.
LAST = ".last"
# Shards that are open at the same time, each with so many words in memory.
OPEN_SHARDS, SHARD_BLOCK = 64, 4096

# Starts this file as a program. Given to Python itself, its folder (or, with -c, the one that the user is in)
# would be looked in first for modules, and a file there may be called as one of the standard library.
_START = (
    "import sys; sys.path[:] = filter(None, sys.path); sys.argv.pop(0); "
    "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
)


@dataclass(frozen=True)
class WordCounts:
    """Words of a corpus.

    Attributes:
        counts: how often each is there.
        dropped: how many different words were left out to keep within memory.
        dropped_count: how often those were there, at most.
    """

    counts: dict[str, int]
    dropped: int = 0
    dropped_count: int = 0


def cut_text(text: str, length: int = PIECE_LENGTH) -> Iterator[str]:
    """Cuts a text where neither a GPT-4-style pattern nor SentencePiece has a word go on.

    That is before a space that follows something else, and at the beginning of a line that does not begin
    with space. Where a piece has neither, it ends after a letter or digit that none follows, which is between
    words for the pattern, and failing that at its full length.

    Args:
        text: any text.
        length: of a piece, in characters, at most.
    """
    import regex

    at_space = regex.compile(r"(?r)(?<=\S)(?= )|(?<=\n)(?=\S)")
    at_sign = regex.compile(r"(?r)(?<=[\p{L}\p{N}])(?=[^\p{L}\p{N}])")
    start = 0
    while len(text) - start > length:
        stop = start + length
        found = at_space.search(text, start + 1, stop) or at_sign.search(text, start + 1, stop)
        end = found.start() if found else stop
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def count_words(
    pieces: Iterable[str],
    pattern: str,
    parts: str = "",
    *,
    workers: int | None = None,
    memory: int = MEMORY,
) -> WordCounts:
    """Counts the words of a text.

    Args:
        pieces: the text, cut between words.
        pattern: a word, as a regular expression; what it leaves out between words is not counted.
        parts: what words are split into once they are counted, as another; none for words as they are.
        workers: processes; by default one for each core, at most 8. A short text is counted in this one.
        memory: bytes that the words may take in training, at most (by the costs in this file).

    Raises:
        ValueError: if a process dies, or there is no room for the shards.
        Exception: whatever reading the pieces raises.
    """
    pieces = iter(pieces)
    beginning = _take(pieces, SMALL)
    following = next(pieces, None)
    if following is None:
        counts: Counter[str] = Counter()
        find_words = _splitter(pattern)
        for piece in beginning:
            counts.update(find_words(piece))
        counts = _split(counts, parts)
        return _keep(lambda: counts.items(), memory)
    beginning.append(following)
    workers = workers or min(len(_cores()), MAX_WORKERS)
    with tempfile.TemporaryDirectory(prefix="tessera-words-") as folder:
        command = [sys.executable, "-c", _START, __file__, folder, str(2 * memory // workers), pattern, parts]
        _run_processes(_batches(beginning, pieces), workers, command)
        shards = sorted(Path(folder).iterdir())
        if sum(map(_cost_of_shard, shards)) <= 2 * memory:
            counts = Counter()
            for shard in shards:
                counts.update(dict(_read_shard(shard)))
            return _keep(lambda: counts.items(), memory)
        for shard in shards:
            if shard.suffix == LAST:
                _write_shard(sorted(_read_shard(shard)), 0, shard)
        for number in count():
            if len(shards) <= OPEN_SHARDS:
                break
            merged = Path(folder) / f"merged-{number}"
            _write_shard(_merge(shards[:OPEN_SHARDS]), 0, merged)
            for shard in shards[:OPEN_SHARDS]:
                shard.unlink()
            shards = [*shards[OPEN_SHARDS:], merged]
        return _keep(lambda: _merge(shards), memory)


def _keep(words: Callable[[], Iterable[tuple[str, int]]], memory: int) -> WordCounts:
    """The words that fit into memory, the frequent ones first. They are gone through twice."""
    cost_of: Counter[int] = Counter()
    number_of: Counter[int] = Counter()
    for word, times in words():
        cost_of[times] += _cost(word)
        number_of[times] += 1
    if sum(cost_of.values()) <= memory:
        return WordCounts(dict(words()))
    left = memory
    for level in sorted(cost_of, reverse=True):
        if cost_of[level] > left:
            break
        left -= cost_of[level]
    # Of the words at the level that fits in part, those that chance would take, the same each time.
    share = left / cost_of[level] * 2**32
    kept = {
        word: times
        for word, times in words()
        if times > level or (times == level and zlib.crc32(word.encode("utf-8")) < share)
    }
    return WordCounts(kept, sum(number_of.values()) - len(kept), level)


# ---- the processes ----


def _run_processes(batches: Iterator[list[str]], workers: int, command: list[str]) -> None:
    """Have processes count batches; each leaves shards."""
    waiting: queue.Queue[list[str] | None] = queue.Queue(maxsize=workers)
    processes = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE) for number in range(workers)
    ]
    feeders = [threading.Thread(target=_feed, args=(process, waiting)) for process in processes]
    for feeder in feeders:
        feeder.start()
    complete = False
    try:
        for batch in batches:
            if any(process.poll() is not None for process in processes):
                break
            waiting.put(batch)
        complete = True
    finally:
        for _ in processes:
            # An empty batch says that the text is complete; without it, a process leaves with nothing done.
            waiting.put([] if complete else None)
        for feeder in feeders:
            feeder.join()
        codes = [process.wait() for process in processes]
    if any(codes):
        raise ValueError(
            "a process that counts words has died, for want of memory or of room for temporary files in "
            f"{tempfile.gettempdir()}"
        )


def _feed(process: subprocess.Popen, waiting: "queue.Queue[list[str] | None]") -> None:
    """Hand batches to a process as it takes them; throw them away once it is dead, so that no one waits."""
    while True:
        batch = waiting.get()
        try:
            if batch is not None:
                _write_block(batch, process.stdin)
            if not batch:
                process.stdin.close()
        except OSError:
            pass  # its exit code says it
        if not batch:
            return


def _work(folder: str, memory: str, pattern: str, parts: str, number: str) -> None:
    """What a process does: read batches, count, leave shards."""
    # Ctrl-C is the parent's affair; without a parent the input ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    find_words = _splitter(pattern)
    counts: Counter[str] = Counter()
    cost = shards = 0
    while (batch := _read_block(sys.stdin.buffer)) is not None:
        if not batch:
            words = _split(counts, parts)
            _write_shard(words.items(), sum(map(_cost, words)), Path(folder) / f"{number}{LAST}")
            return
        before = len(counts)
        for piece in batch:
            counts.update(find_words(piece))
        cost += sum(map(_cost, islice(reversed(counts), len(counts) - before)))
        if cost > int(memory):
            words = _split(counts, parts)
            _write_shard(sorted(words.items()), cost, Path(folder) / f"{number}-{shards:06}")
            counts.clear()
            cost, shards = 0, shards + 1


def _splitter(pattern: str) -> Callable[[str], Iterable[str]]:
    import regex

    find_words = regex.compile(pattern).findall
    if pattern != SPACES_PATTERN:
        return find_words

    def split(text: str) -> Iterable[str]:
        if "  " in text:
            return find_words(text)
        # The same where no spaces follow each other, several times as fast.
        return filter(None, text.replace(" ", "\n ").split("\n"))

    return split


def _split(counts: "Counter[str]", parts: str) -> "Counter[str]":
    """Parts of the words, counted."""
    if not parts:
        return counts
    find_parts = re.compile(parts, re.DOTALL).findall
    split: Counter[str] = Counter()
    for word, times in counts.items():
        for part in find_parts(word):
            split[part] += times
    return split


def _cost(word: str) -> int:
    return COST_OF_WORD + COST_OF_BYTE * len(word.encode("utf-8"))


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return list(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _take(pieces: Iterator[str], length: int) -> list[str]:
    """Pieces of that many characters or a little more; fewer if there are no more."""
    taken: list[str] = []
    while length > 0 and (piece := next(pieces, None)) is not None:
        taken.append(piece)
        length -= len(piece)
    return taken


def _batches(beginning: list[str], pieces: Iterator[str]) -> Iterator[list[str]]:
    first = iter(beginning)
    while batch := _take(first, BATCH):
        yield batch
    while batch := _take(pieces, BATCH):
        yield batch


# ---- shards ----


def _write_shard(words: Iterable[tuple[str, int]], cost: int, path: Path) -> None:
    """Words in order, in blocks; before them, what all of them cost."""
    words = iter(words)
    with open(path, "wb") as file:
        _write_block(cost, file)
        while block := list(islice(words, SHARD_BLOCK)):
            _write_block(block, file)


def _cost_of_shard(path: Path) -> int:
    with open(path, "rb") as file:
        return _read_block(file)


def _read_shard(path: Path) -> Iterator[tuple[str, int]]:
    with open(path, "rb") as file:
        _read_block(file)
        while block := _read_block(file):
            yield from block


def _write_block(value: Any, file: IO[bytes]) -> None:
    data = marshal.dumps(value)
    file.write(len(data).to_bytes(8, "little") + data)


def _read_block(file: IO[bytes]) -> Any:
    """The next one; None at the end."""
    size = file.read(8)
    return marshal.loads(file.read(int.from_bytes(size, "little"))) if size else None


def _merge(shards: list[Path]) -> Iterator[tuple[str, int]]:
    """The words of all shards, in order, each once."""
    word, total = None, 0
    for next_word, number in heapq.merge(*map(_read_shard, shards)):
        if next_word == word:
            total += number
            continue
        if word is not None:
            yield word, total
        word, total = next_word, number
    if word is not None:
        yield word, total


if __name__ == "__main__":
    _work(*sys.argv[1:])
