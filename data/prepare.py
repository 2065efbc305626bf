"""From text to tokens on disk: read, mix, filter, encode, split, write.

Notable:
- nothing is held but a few megabytes that are on their way through the processes, and 8 bytes a document;
- what is written depends on the sources, the tokenizer, the filters and the seed, not on the number of
processes;
- sources with weights give tokens in that proportion at every moment, not only in the end: the next batch
comes from the one that is furthest behind;
- the folder has its name only when everything in it is written; until then it is `<name>.partial`.

What belongs here: the order of these steps and the account of them in `data_meta.json`.
"""

import json
import shutil
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

from tqdm import tqdm

from .deduplication import DUPLICATE, NEAR_DUPLICATE, SeenSignatures, SeenTexts, fingerprint, minhash
from .dropped import DroppedExamples
from .encoding import Encoded, Encoder, EncodingPool, build_encoder, load_tokenizer
from .filters import Dropped, Filters
from .hashing import file_sha256
from .mixing import Source, Stream, next_batch, open_streams
from .sources import read_source
from .text import MANY_DOCUMENTS
from .token_files import FORMAT, META, SPLITS, TokenWriter

# Batches on their way. The same for any number of processes, since the mixing sees results only after them.
IN_FLIGHT = 64
# Where the hashes leave nothing for validation, at most so many documents are moved there.
RECENT = 64
SECONDS_BETWEEN_LINES = 10.0  # where there is no progress bar

# What `AutoTokenizer` reads, and what the tokenizer room writes beside it.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer_meta.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "response_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def prepare(
    sources: list[Source],
    output: str | Path,
    *,
    tokenizer: str | None = None,
    tokens: int | None = None,
    val_fraction: float = 0.005,
    val_data: list[str] | None = None,
    filters: Filters | None = None,
    workers: int = 1,
    seed: int = 0,
    explain: int = 0,
) -> dict:
    """Writes a folder of tokens.

    Each document is followed by the tokenizer's end-of-text token; bytes, and tokenizers without such a
    token, have a line break between documents.

    Which documents are held out is drawn from their own hashes. Of fewer than twenty it is the end of the
    text, and where the draw leaves none it is the last documents.

    Args:
        sources: what to read. With weights, all of them need one, and the mixture ends with the first source
            that does; without, they take turns and each is read to its end.
        output: folder to write; it must not exist, or be empty.
        tokenizer: directory or Hub name; bytes if not given.
        tokens: end with the document that reaches so many tokens, training and held-out ones together.
        val_fraction: share of the documents to hold out.
        val_data: hold out these sources instead, unfiltered. Documents of them are not trained on.
        filters: which documents to leave out; default: none.
        workers: processes that filter and encode.
        seed: of the order in which Hub datasets are read.
        explain: keep so many examples of the documents that each filter drops, in `dropped_examples.jsonl`.

    Returns:
        What was written as `data_meta.json`.

    Raises:
        ValueError: for what cannot work; nothing is left behind then.
    """
    output = Path(output)
    if tokens is not None and tokens <= 0:
        raise ValueError(f"the number of tokens must be positive, got {tokens}")
    if not 0 < val_fraction < 1:
        raise ValueError(f"the share to hold out must be between 0 and 1, got {val_fraction}")
    if workers < 1:
        raise ValueError(f"the number of workers must be at least 1, got {workers}")
    if explain < 0:
        raise ValueError(f"the number of examples for each filter cannot be {explain}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; give another, or remove it first")
    streams = open_streams(sources, seed)
    output = output.resolve()
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an earlier call that was killed
    partial.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            kept_tokenizer = _keep_tokenizer(tokenizer, partial / "tokenizer") if tokenizer else None
            filters = filters or Filters()
            encoder = build_encoder(kept_tokenizer, filters, Path(scratch))
            job = _Job(partial, encoder, streams, tokens, val_fraction, DroppedExamples(explain))
            if val_data:
                job.hold_out(val_data, sources[0])
            with EncodingPool(encoder, workers) as pool:
                job.run(pool)
            splits = job.finish()
        job.examples.write(partial)
        meta = {
            "format": FORMAT,
            "dtype": encoder.dtype,
            "vocab_size": encoder.vocab_size,
            "eos_token_id": encoder.eos,
            "tokenizer_sha256": file_sha256(kept_tokenizer / "tokenizer.json") if kept_tokenizer else None,
            **splits,
            "sha256": {
                f"{split}.{suffix}": file_sha256(partial / f"{split}.{suffix}")
                for split in SPLITS
                for suffix in ("bin", "idx")
            },
            "sources": [stream.account() for stream in streams],
            "filters": {
                "names": list(filters.names),
                "min_chars": filters.min_chars,
                "dropped": dict(job.dropped),
                "lines_dropped": dict(job.lines_dropped),
            },
            "val_fraction": None if val_data else val_fraction,
            "val_data": val_data or None,
            "token_budget": tokens,
            "seed": seed,
        }
        (partial / META).write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def _keep_tokenizer(given: str, folder: Path) -> Path:
    """Puts the tokenizer beside its tokens; it is this copy that they are made with."""
    if (Path(given) / "tokenizer.json").is_file():
        folder.mkdir()
        for name in TOKENIZER_FILES:
            if (Path(given) / name).is_file():
                shutil.copyfile(Path(given) / name, folder / name)
    else:
        load_tokenizer(given).save_pretrained(folder)
    return folder


@dataclass
class _Job:
    """One pass over the streams."""

    folder: Path
    encoder: Encoder
    streams: list[Stream]
    budget: int | None
    val_fraction: float
    examples: DroppedExamples
    dropped: Counter = field(default_factory=Counter)
    lines_dropped: Counter = field(default_factory=Counter)

    def __post_init__(self):
        writer = (self.encoder.dtype, list(self.encoder.separator), self.encoder.eos is not None)
        self.writers = {split: TokenWriter(self.folder, split, *writer) for split in SPLITS}
        self.seen = SeenTexts()
        self.near = SeenSignatures()
        self.held_out = False  # whether validation has text of its own
        # The first documents wait until it is known whether there are many.
        self.waiting: list[tuple[Stream, str, Encoded]] | None = []
        self.recent: deque[tuple[Stream, int]] = deque(
            maxlen=RECENT
        )  # last ones of training, with their bytes

    def hold_out(self, sources: list[str], like: Source) -> None:
        """Takes text of its own for validation."""
        self.held_out, self.waiting = True, None
        where = {"column": like.column, "split": like.split, "name": like.name}
        for text in chain.from_iterable(read_source(source, **where) for source in sources):
            self.seen.add(fingerprint(text))
            if NEAR_DUPLICATE in self.encoder.filters.names:
                self.near.seen(minhash(text))
            self.writers["val"].add(self.encoder.encode([text])[0], len(text.encode("utf-8")))

    def run(self, pool: EncodingPool) -> None:
        """Reads until the sources end or the tokens are enough."""
        with _Progress(self.budget) as progress:
            for stream, text, result in self._encoded(pool):
                stream.read += 1
                stream.read_chars += len(text)
                stream.chars_in_flight -= len(text)
                self.lines_dropped.update(result.lines)
                if dropped := self._dropped(result):
                    self.dropped[dropped.reason] += 1
                    self.examples.add(text, dropped, stream.source.source)
                else:
                    self._keep(stream, text if result.changed is None else result.changed, result)
                progress.show(self.streams, self._tokens(), self.dropped)
                if self.budget is not None and self._tokens() >= self.budget:
                    return

    def _dropped(self, result: Encoded) -> Dropped | None:
        """Why a document goes, with what only those before it can tell."""
        if result.dropped:
            return result.dropped
        if result.digest in self.seen:
            return Dropped(DUPLICATE)
        if result.signature is not None and self.near.seen(result.signature):
            return Dropped(NEAR_DUPLICATE)
        if DUPLICATE in self.encoder.filters.names:
            self.seen.add(result.digest)
        return None

    def finish(self) -> dict[str, dict]:
        """Sees to it that both splits have text, and ends the files."""
        train, val = self.writers["train"], self.writers["val"]
        if not self.waiting and not any(stream.documents for stream in self.streams):
            read = sum(stream.read for stream in self.streams)
            reasons = ", ".join(f"{name} dropped {count}" for name, count in self.dropped.most_common())
            raise ValueError(f"nothing is left of {read} documents: {reasons}; choose other --filters")
        if self.waiting:
            self._hold_out_tail()
        elif not val.documents:
            # A last document that is all there is stays.
            wanted = max(int(train.documents * self.val_fraction), 1)
            moved = []
            for _ in range(min(wanted, len(self.recent), train.documents - 1)):
                stream, num_bytes = self.recent.pop()
                before = train.tokens
                moved.append((stream, train.pop(num_bytes), num_bytes))
                stream.tokens -= before - train.tokens
            for stream, ids, num_bytes in reversed(moved):
                stream.tokens += val.add(ids, num_bytes)
        for split, writer in self.writers.items():
            if writer.tokens < 2:
                raise ValueError(
                    f"too little text for a split of its own: {writer.tokens} tokens for {split}; give more "
                    "text, another --val-fraction, or held-out text with --val-data"
                )
        return {split: writer.close() for split, writer in self.writers.items()}

    def _encoded(self, pool: EncodingPool) -> Iterator[tuple[Stream, str, Encoded]]:
        """Documents and what became of them, in the order of reading."""
        pending: deque = deque()
        # Few at first, until it is known how many tokens a source gives.
        for limit in count(2):
            while len(pending) < min(limit, IN_FLIGHT) and (chosen := next_batch(self.streams)):
                stream, texts = chosen
                pending.append((stream, texts, pool.submit(texts)))
            if not pending:
                return
            stream, texts, wait = pending.popleft()
            for text, result in zip(texts, wait(), strict=True):
                yield stream, text, result

    def _keep(self, stream: Stream, text: str, result: Encoded) -> None:
        if self.waiting is None:
            self._write(stream, result)
            return
        self.waiting.append((stream, text, result))
        if len(self.waiting) == MANY_DOCUMENTS:
            self._write_waiting()

    def _tokens(self) -> int:
        waiting = sum(len(result.ids) for _, _, result in self.waiting or ())
        return sum(stream.tokens for stream in self.streams) + waiting

    def _write(self, stream: Stream, result: Encoded) -> None:
        is_val = not self.held_out and result.draw < self.val_fraction
        self._put("val" if is_val else "train", stream, result.ids, result.num_bytes)

    def _put(self, split: str, stream: Stream, ids, num_bytes: int) -> None:
        stream.tokens += self.writers[split].add(ids, num_bytes)
        stream.documents += 1
        stream.text_bytes += num_bytes
        if split == "train":
            self.recent.append((stream, num_bytes))

    def _write_waiting(self) -> None:
        waiting, self.waiting = self.waiting, None
        for stream, _, result in waiting:
            self._write(stream, result)

    def _hold_out_tail(self) -> None:
        """Of few documents: the last bytes, which may cut one in two."""
        sizes = [result.num_bytes for _, _, result in self.waiting]
        room = sum(sizes) - int(sum(sizes) * self.val_fraction)  # for training
        for stream, text, result in self.waiting:
            encoded = text.encode("utf-8")
            cut = min(max(room, 0), len(encoded))
            while 0 < cut < len(encoded) and encoded[cut] & 0xC0 == 0x80:  # within a character
                cut -= 1
            room -= len(encoded)
            for split, part in zip(SPLITS, (encoded[:cut], encoded[cut:]), strict=True):
                if part:
                    ids = (
                        self.encoder.encode([part.decode("utf-8")])[0]
                        if len(part) < len(encoded)
                        else result.ids
                    )
                    self._put(split, stream, ids, len(part))
        self.waiting = None


class _Progress:
    """A bar, or a line now and then where nobody would see it move."""

    def __init__(self, budget: int | None):
        self._bar = tqdm(total=budget, unit="tok", unit_scale=True, disable=None, desc="encoding")
        self._start = self._last = time.perf_counter()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def show(self, streams: list[Stream], tokens: int, dropped: Counter) -> None:
        """Shows the counts, twice a second or every ten."""
        now = time.perf_counter()
        if now - self._last < (SECONDS_BETWEEN_LINES if self._bar.disable else 0.5):
            return
        self._last = now
        megabytes = sum(stream.text_bytes for stream in streams) / 1e6
        kept = sum(stream.documents for stream in streams)
        status = f"{kept:,} documents, {megabytes:,.0f} MB, {dropped.total():,} dropped"
        if self._bar.disable:
            rate = tokens / (now - self._start)
            print(f"{tokens:,} tokens, {rate:,.0f} a second, {status}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(status, refresh=False)
            self._bar.update(tokens - self._bar.n)
