"""Filtering and signatures, megabytes a second on one core, against datatrove's steps of the same name.

    python benchmarks/filters.py TEXT [TEXT ...] [--megabytes 4]

TEXT is whatever `data prepare` reads, in English. datatrove's steps get words by white space from us, which
takes nothing, since its own splitting needs spaCy and would take most of the time; sentences, which it would
count with spaCy as well, are ours too. So what is compared is the rules. Best of three; both keep every
document, so that each rule is asked, or tell how many they keep. Prints peer, ours, ratio, peak memory.
"""

import argparse
import platform
import resource
import time
from collections.abc import Callable

from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer
from loguru import logger

from tessera.data.deduplication import BANDS, ROWS, minhash
from tessera.data.filters import Filters, choose_filters
from tessera.data.line_rules import LINE_RULES
from tessera.data.sources import read_texts


class WhiteSpace(WordTokenizer):
    """Words by white space and sentences by end marks: what our rules take for them."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[a:b] for a, b in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        ends = [i + 1 for i, character in enumerate(text) if character in ".!?"] or [len(text)]
        return list(zip([0, *ends[:-1]], ends, strict=True))


def best_rate(call: Callable[[str], object], texts: list[str], megabytes: float) -> tuple[float, int]:
    """Megabytes a second, best of three, and how many texts it does not return False for."""
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        kept = sum(call(text) is not False for text in texts)
        best = max(best, megabytes / (time.perf_counter() - start))
    return best, kept


def ours(names: str | tuple[str, ...]) -> Callable[[str], bool]:
    """Whether our rules keep a text."""
    filters = choose_filters(names) if isinstance(names, str) else Filters(names)
    return lambda text: filters.examine(text).dropped is None


def theirs(step) -> Callable[[str], bool]:
    """Whether a step of datatrove keeps a text."""

    def keep(text: str) -> bool:
        result = step.filter(Document(text=text, id="0"))
        return result if isinstance(result, bool) else result[0]

    return keep


def main() -> None:
    """Prints one line for each pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="+")
    parser.add_argument("--megabytes", type=float, default=4.0)
    args = parser.parse_args()
    logger.disable("datatrove")
    texts = list(read_texts(args.text, limit_bytes=int(args.megabytes * 1e6)))
    megabytes = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    print(f"{platform.machine()} CPU, one core, {len(texts)} texts, {megabytes:.1f} MB")
    split = WhiteSpace()
    # Its xxhash wants release 3; what hashes a shingle is a small part of its time.
    config = MinhashConfig(num_buckets=BANDS, hashes_per_bucket=ROWS, hash_config=HashConfig(hash_fc="sha1"))
    signature = MinhashDedupSignature("memory://signatures", config=config, language=split)
    quality = ("few_words", "many_words", "word_length", "symbols", "bullets", "cut_off_lines")
    repetition = ("repeated_lines", "repeated_paragraphs", "repeated_ngrams")
    web = ("unfinished", "short_lines", "repeated_line_chars", "line_breaks")
    c4 = ("placeholder", "code", "citations", *LINE_RULES, "few_sentences")
    pairs = [
        (
            "Gopher, quality",
            ours((*quality, "few_letters", "not_english")),
            theirs(GopherQualityFilter(language=split)),
        ),
        ("Gopher, repetition", ours(repetition), theirs(GopherRepetitionFilter(language=split))),
        ("C4", ours(c4), theirs(C4QualityFilter(language=split, min_num_sentences=3, min_words_per_line=5))),
        ("FineWeb", ours(web), theirs(FineWebQualityFilter(language=split))),
        ("MinHash", minhash, lambda text: signature.get_signature(signature.get_shingles(text))),
    ]
    for name, our, their in pairs:
        (fast, kept), (slow, their_kept) = (
            best_rate(our, texts, megabytes),
            best_rate(their, texts, megabytes),
        )
        print(
            f"{name}: datatrove {slow:.1f} MB/s ({their_kept} kept), ours {fast:.1f} MB/s ({kept} kept), "
            f"{fast / slow:.1f}x"
        )
    for preset in ("basic", "c4", "gopher", "fineweb"):
        rate, kept = best_rate(ours(preset), texts, megabytes)
        print(f"preset {preset}: {rate:.1f} MB/s ({kept} kept)")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")


if __name__ == "__main__":
    main()
