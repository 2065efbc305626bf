"""Encoding and decoding megabytes: the byte tokenizer's fast path against transformers' fast tokenizer class.

    python benchmarks/byte_tokenizer.py [--megabytes 5]

Both load from one directory and give the same ids. The text is Python's own standard library. Medians of
three.
"""

import argparse
import platform
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import transformers

from tessera.tokenization import ByteTokenizer, build_byte_tokenizer


def median_seconds(call: Callable[[], object]) -> float:
    """Median of three calls."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Prints seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=5.0)
    args = parser.parse_args()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
    text = ""
    for source in sources:
        if len(text) >= args.megabytes * 1e6:
            break
        text += source.read_text(encoding="utf-8", errors="ignore")
    text = text[: int(args.megabytes * 1e6)]
    with tempfile.TemporaryDirectory() as folder:
        build_byte_tokenizer().save_pretrained(folder)
        ours = ByteTokenizer.from_pretrained(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = ours(text)["input_ids"]
    assert ids == theirs(text)["input_ids"]
    print(f"{platform.machine()} CPU, transformers {transformers.__version__}, {len(text) / 1e6:.1f} MB")
    for what, fast, slow in (
        ("encode", lambda: ours(text), lambda: theirs(text)),
        ("decode", lambda: ours.decode(ids), lambda: theirs.decode(ids)),
    ):
        a, b = median_seconds(fast), median_seconds(slow)
        print(f"{what}: {a:.3f} s, {type(theirs).__name__} {b:.3f} s, {b / a:.0f}x")


if __name__ == "__main__":
    main()
