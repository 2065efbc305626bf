"""Packing and reading rows: tokens kept, padding, documents cut, time and memory, against cropping best-fit.

    tessera data prepare --data enwiki.txt --tokenizer gpt2 --output tokens
    python benchmarks/packing.py tokens --length 1024 2048

The peer is the rule of nanochat's loader (best-fit with cropping), written anew: of a buffer of 1000
documents the longest that fits goes into the row; where none does, the shortest is cropped to fill it, and
what was cropped is gone. It is given the same documents, each with one separator. `--documents 10000000`
draws that many lengths from those of the corpus and packs them into files, to see time and memory grow.
"""

import argparse
import bisect
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from tessera.data.corpora import open_folders
from tessera.data.order import permute
from tessera.data.packing import plan_rows, write_plan
from tessera.data.training_rows import RowSequence, make_rows

BUFFER = 1000


def crop_best_fit(sizes: list[int], length: int) -> tuple[int, int, int]:
    """Rows, tokens that are in them, and documents that were cropped, by the peer's rule."""
    buffer = sorted(sizes[:BUFFER])
    coming = iter(sizes[BUFFER:])
    rows = used = cropped = 0
    while buffer:
        room = length
        while room and buffer:
            place = bisect.bisect_right(buffer, room)
            if place:
                size = buffer.pop(place - 1)
            else:
                size = room
                buffer.pop(0)
                cropped += 1
            room -= size
            used += size
            if (after := next(coming, None)) is not None:
                bisect.insort(buffer, after)
        rows += 1
    return rows, used, cropped


def peak_mib() -> float:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def line(name: str, rows: int, used: int, total: int, cut: int, length: int, seconds: float) -> str:
    """A result as text."""
    return (
        f"  {name:22} {rows:>9,} rows  {100 * used / total:7.3f} % of tokens used  "
        f"{100 * (1 - used / (rows * length)):6.3f} % padding  {cut:>8,} documents cut  {seconds:6.2f} s"
    )


def compare(bounds: np.ndarray, length: int) -> None:
    """Both rules on one corpus."""
    sizes = np.diff(bounds.astype(np.int64))
    sizes = sizes[sizes > 0]
    total = int(sizes.sum())
    print(f"rows of {length}:")
    began = time.perf_counter()
    rows, used, cropped = crop_best_fit(sizes.tolist(), length)
    print(line("best-fit with cropping", rows, used, total, cropped, length, time.perf_counter() - began))
    began = time.perf_counter()
    plan = plan_rows(bounds, length)
    seconds = time.perf_counter() - began
    ours = int(plan.lengths.sum(dtype=np.int64))
    # Beyond the rows that a document longer than one gives anyway.
    cut = int(len(plan.starts) - (-(-sizes // length)).sum())
    print(line("here", len(plan), ours, total, cut, length, seconds))
    print(
        f"  tokens from the same corpus: {ours / used:.3f}x; {(sizes > length).mean():.1%} of the documents "
        f"are longer than a row and hold {sizes[sizes > length].sum() / total:.1%} of the tokens"
    )


def read(folder: str, length: int, batch: int = 16) -> None:
    """How fast batches come, from pages that are in memory."""
    (corpus,) = open_folders([folder], documents=True)
    for packing, isolate in (("contiguous", False), ("contiguous", True), ("best-fit", True)):
        made = make_rows(corpus.train, length, packing, isolate=isolate)
        sequence = RowSequence([made], isolate=isolate)
        count = min(made.per_epoch // batch, 300)
        for first in range(count):
            sequence.batch(range(first * batch, (first + 1) * batch))
        began = time.perf_counter()
        for first in range(count):
            sequence.batch(range(first * batch, (first + 1) * batch))
        rate = count * batch * length / (time.perf_counter() - began)
        print(f"reading {batch} x {length}, {packing}{', isolated' if isolate else ''}: {rate:,.0f} tokens/s")


def scale(bounds: np.ndarray, documents: int, length: int) -> None:
    """A plan of many documents, written as files."""
    generator, sizes = np.random.default_rng(0), np.diff(bounds.astype(np.int64))
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "train.idx").open("wb") as file:
            end = np.zeros(1, dtype="<u8")
            end.tofile(file)
            for first in range(0, documents, 2**16):
                some = generator.choice(sizes, min(2**16, documents - first))
                ends = (end + some.cumsum().astype("<u8")).astype("<u8")
                ends.tofile(file)
                end = ends[-1:]
        many = np.memmap(Path(folder) / "train.idx", dtype="<u8", mode="r")
        before, began = peak_mib(), time.perf_counter()
        plan = write_plan(many, length, Path(folder) / "rows")
        seconds = time.perf_counter() - began
        total, size = int(many[-1]), sum(file.stat().st_size for file in (Path(folder) / "rows").iterdir())
        print(
            f"{documents:,} documents, {total:,} tokens, rows of {length}: {seconds:.1f} s, "
            f"{len(plan):,} rows, {100 * (1 - total / len(plan) / length):.3f} % padding, files of "
            f"{size / 2**20:,.0f} MiB; peak memory {peak_mib():,.0f} MiB, {before:,.0f} MiB before it"
        )


def order(size: int, batch: int = 256) -> None:
    """Rows of a step in an epoch of many, against a shuffled array of all."""
    began = time.perf_counter()
    for step in range(100):
        permute(np.arange(step * batch, (step + 1) * batch), size, (0, 0))
    ours = (time.perf_counter() - began) / 100
    began = time.perf_counter()
    shuffled = np.random.default_rng(0).permutation(size)
    theirs = time.perf_counter() - began
    print(
        f"order of {size:,} rows: numpy.permutation {theirs:.2f} s and {shuffled.nbytes / 2**20:,.0f} MiB an "
        f"epoch; here {1e6 * ours:.0f} us for the {batch} rows of a step, and nothing to keep"
    )


def main() -> None:
    """Prints every comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", help="folder that tessera data prepare wrote")
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=10_000_000)
    args = parser.parse_args()
    (corpus,) = open_folders([args.tokens], documents=True)
    bounds = np.asarray(corpus.train.starts)
    print(
        f"{platform.machine()}, numpy {np.__version__}; {len(bounds) - 1:,} documents, {int(bounds[-1]):,} "
        f"tokens, {bounds[-1] / (len(bounds) - 1):,.0f} a document"
    )
    scale(bounds, args.documents, args.length[-1])
    for length in args.length:
        compare(bounds, length)
    for length in args.length:
        read(args.tokens, length)
    order(args.rows)


if __name__ == "__main__":
    main()
