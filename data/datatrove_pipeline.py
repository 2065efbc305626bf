"""The same preparation for corpora that outgrow one machine: datatrove's pipelines and executors.

Notable:
- a list of stages, each a list of datatrove's `PipelineStep`s and a number of tasks. `run_local` runs them
here; examples/prepare_with_datatrove.py gives the same list to its executor for Slurm. Tasks share nothing
but a folder that all of them can write to;
- ours are the readers, the filters, the signatures and the encoder, which are those of `data prepare`; taken
are datatrove's executors (which repeat only the tasks that failed), JSON lines between stages, and MinHash
matching, which sorts on disk instead of holding every key in memory;
- its own filters and signatures are not taken: they need spaCy for words, and are slower by an order of
magnitude (benchmarks/filters.py).

What belongs here: those steps, and their order. The result is a prepared folder as data/token_files.py has
it. It holds the documents that `data prepare` would keep, but in the order of tasks, and of near duplicates
it keeps one that need not be the first.
"""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import file_states, require_same
from .deduplication import BANDS, DUPLICATE, NEAR_DUPLICATE, fingerprint, minhash
from .dropped import DroppedExamples
from .encoding import build_encoder
from .filters import Filters
from .hashing import file_sha256
from .journal import Journal
from .merging import merge_shards
from .mixing import BATCH, Source
from .prepare import _keep_tokenizer
from .sources import document_of, read_file, source_files
from .token_files import DTYPES, META, SPLITS

try:
    from datatrove.data import Document
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from datatrove.pipeline.readers.huggingface import HuggingFaceDatasetReader
    from datatrove.pipeline.readers.jsonl import JsonlReader
    from datatrove.pipeline.writers.jsonl import JsonlWriter
    from datatrove.utils.hashing import HashConfig
except ImportError as error:
    raise ImportError("this needs datatrove: pip install 'tessera-lm[datatrove]'") from error

# What a work folder was begun with, and what tasks leave there; another number is not gone on from.
ARGUMENTS = "arguments.json"
LEFT = ("logs", "kept", "counts", "signatures", "tokens")
WORK_FORMAT = 1


@dataclass(frozen=True)
class Stage:
    """What runs once all tasks of the stage before are through.

    Attributes:
        name: for logs.
        steps: datatrove's pipeline.
        tasks: into how many parts it is divided.
    """

    name: str
    steps: list[PipelineStep]
    tasks: int


def build_stages(
    sources: list[Source],
    work: str | Path,
    output: str | Path,
    *,
    tokenizer: str | None = None,
    filters: Filters | None = None,
    val_fraction: float = 0.005,
    tasks: int = 1,
    bucket_tasks: int = 1,
    explain: int = 0,
) -> list[Stage]:
    """The stages from sources to a prepared folder.

    Args:
        sources: files, folders, Hub datasets; without weights. Files are what tasks divide among each other.
        work: folder on a file system that all machines share, for what stands between stages. It belongs to
            the arguments of its first call.
        output: folder to write; it must not exist, or be empty.
        tokenizer: directory or Hub name; bytes if not given.
        filters: which documents to leave out; default: none.
        val_fraction: share of the documents to hold out, drawn by their hashes.
        tasks: parts that reading, filtering and encoding are divided into.
        bucket_tasks: parts that matching is divided into for each of the 14 bands; each task needs a document
            for each.
        explain: examples of dropped documents for each reason and task, in `<work>/dropped`.

    Raises:
        ValueError: for what cannot work; if `work` was begun with other arguments or other files.
    """
    work, output, filters = Path(work).resolve(), Path(output).resolve(), filters or Filters()
    if not sources:
        raise ValueError("there is nothing to read: give a file, a folder, or a Hub dataset (org/name)")
    if weighted := [source.source for source in sources if source.weight is not None]:
        raise ValueError(
            f"{weighted[0]} has a weight, but tasks that know nothing of each other keep no share"
        )
    if tasks < 1 or bucket_tasks < 1:
        raise ValueError(f"there must be at least one task, got {min(tasks, bucket_tasks)}")
    if not 0 < val_fraction < 1:
        raise ValueError(f"the share to hold out must be between 0 and 1, got {val_fraction}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; give another, or remove it first")
    files = [file for source in sources for file in source_files(source.source, source.split)]
    arguments = {
        "format": WORK_FORMAT,
        "data": [asdict(source) for source in sources],
        "filters": json.loads(json.dumps(asdict(filters))),
        "val_fraction": val_fraction,
        "tasks": tasks,
        "bucket_tasks": bucket_tasks,
        "explain": explain,
        "output": str(output),
        "files": file_states(files),
    }
    kept_tokenizer = _begin(work, tokenizer, arguments)
    _repeat_merge(work, output)
    kept = str(work / "kept")
    filtering = [ReadSources(sources), AskFilters(filters, work, explain), JsonlWriter(kept)]
    stages = [Stage("filter", filtering, tasks)]
    encoding: list[PipelineStep] = [JsonlReader(kept)]
    near = NEAR_DUPLICATE in filters.names
    if near or DUPLICATE in filters.names:
        bands = BANDS if near else 1
        # One hash of a band's eight minima: they match when all of the eight do.
        config = MinhashConfig(num_buckets=bands, hashes_per_bucket=1, hash_config=HashConfig(hash_fc="sha1"))
        signatures, buckets, remove = (str(work / name) for name in ("signatures", "buckets", "remove"))
        stages += [
            Stage("signatures", [JsonlReader(kept), WriteSignatures(signatures, near)], tasks),
            Stage(
                "match",
                [MinhashDedupBuckets(signatures, buckets, config=config)],
                bands * bucket_tasks,
            ),
            Stage("cluster", [MinhashDedupCluster(buckets, remove, config=config)], 1),
        ]
        encoding.append(MinhashDedupFilter(remove))
    encoding.append(WriteShards(work, kept_tokenizer, val_fraction))
    account = {
        "sources": [_given(source) for source in sources],
        "filters": {
            "names": list(filters.names),
            "min_chars": filters.min_chars,
            "language": filters.language,
        },
        "val_fraction": val_fraction,
    }
    return [
        *stages,
        Stage("encode", encoding, tasks),
        Stage("merge", [MergeShards(work, output, kept_tokenizer, account)], 1),
    ]


def run_local(stages: list[Stage], work: str | Path, *, workers: int = 1) -> None:
    """Runs all stages on this machine; tasks that were through in an earlier call are not repeated.

    But for the merge: if the output is gone, it is made again.

    Args:
        stages: what `build_stages` returned.
        work: the folder that it was given.
        workers: tasks at a time, in processes of their own.
    """
    work = Path(work).resolve()
    for stage in stages:
        if isinstance(stage.steps[-1], MergeShards):
            _repeat_merge(work, stage.steps[-1].output)
        LocalPipelineExecutor(
            stage.steps,
            tasks=stage.tasks,
            workers=min(workers, stage.tasks),
            logging_dir=str(work / "logs" / stage.name),
        ).run()


def _begin(work: Path, tokenizer: str | None, arguments: dict[str, Any]) -> Path | None:
    """Makes a folder the one of these arguments, unless it is that of others.

    Returns:
        The copy of the tokenizer in it.
    """
    anew = "give another folder to work in, or remove it first"
    journal, kept, given = Journal(work / ARGUMENTS, anew), work / "tokenizer", work / "tokenizer.new"
    before = journal.read()
    if before is None and (left := [name for name in LEFT if (work / name).exists()]):
        raise ValueError(f"{work} holds {left[0]} but no {ARGUMENTS} that tells of what; {anew}")
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(given, ignore_errors=True)
    try:
        if tokenizer:
            _keep_tokenizer(tokenizer, given)
        arguments["tokenizer"] = file_sha256(given / "tokenizer.json") if tokenizer else None
        if before is None:
            shutil.rmtree(kept, ignore_errors=True)
        else:
            require_same(before, arguments, work, f"or {anew}")
        if tokenizer and not kept.exists():
            given.rename(kept)
        journal.write(arguments)
    finally:
        shutil.rmtree(given, ignore_errors=True)
    return kept if tokenizer else None


def _repeat_merge(work: Path, output: Path) -> None:
    """Has the merge run again if the folder that it wrote is gone."""
    if not (output / META).is_file():
        shutil.rmtree(work / "logs" / "merge" / "completions", ignore_errors=True)


def _given(source: Source) -> dict[str, Any]:
    return {key: value for key, value in asdict(source).items() if value is not None}


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


class ReadSources(PipelineStep):
    """Documents of this task's files, and its part of each Hub dataset."""

    name = "Sources"
    type = "READER"

    def __init__(self, sources: list[Source]):
        super().__init__()
        self.sources = sources

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields documents with the number of their source as metadata."""
        files = []
        for number, source in enumerate(self.sources):
            here = source_files(source.source, source.split)
            files += [(number, file) for file in here]
            if not here:
                options = {"split": source.split} | ({"name": source.name} if source.name else {})
                reader = HuggingFaceDatasetReader(
                    source.source, options, streaming=True, text_key=source.column
                )
                for document in reader.run(None, rank, world_size):
                    if text := document_of(document.text):
                        yield Document(text=text, id=document.id, metadata={"source": number})
        for number, file in files[rank::world_size]:
            for i, text in enumerate(read_file(file, self.sources[number].column)):
                yield Document(text=text, id=f"{file}/{i}", metadata={"source": number})


class AskFilters(PipelineStep):
    """Our filters; what they drop is counted in `<work>/counts`, with examples in `<work>/dropped`."""

    name = "Filters"
    type = "FILTER"

    def __init__(self, filters: Filters, work: Path, explain: int):
        super().__init__()
        self.filters, self.work, self.explain = filters, str(work), explain

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields the documents that stay, without the lines that go."""
        dropped, lines, read, kept = Counter(), Counter(), Counter(), 0
        examples = DroppedExamples(self.explain)
        for document in data:
            read[str(document.metadata["source"])] += 1
            with self.track_time():
                examined = self.filters.examine(document.text)
            lines.update(examined.lines)
            if examined.dropped:
                dropped[examined.dropped.reason] += 1
                self.stat_update("dropped", f"dropped_{examined.dropped.reason}")
                examples.add(document.text, examined.dropped, document.id)
                continue
            self.stat_update("forwarded")
            kept += 1
            document.text = examined.text
            yield document
        counts = {"read": read, "dropped": dropped, "lines_dropped": lines, "kept": kept}
        _write_json(Path(self.work) / "counts" / f"{rank:05d}.json", counts)
        if self.explain:
            folder = Path(self.work) / "dropped" / f"{rank:05d}"
            folder.mkdir(parents=True, exist_ok=True)
            examples.write(folder)


class WriteSignatures(PipelineStep):
    """Signatures in the files that datatrove's matching reads: a sorted one for each band and task."""

    name = "Signatures"
    type = "DEDUP"

    def __init__(self, folder: str, near: bool):
        super().__init__()
        self.folder, self.near = folder, near

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        """Writes `bucket_<band>/<rank>.minhash.sig`: 8 bytes of key and 4 of the document's number."""
        rows = []
        for document in data:
            with self.track_time():
                rows.append(minhash(document.text) if self.near else _exact_key(document.text))
        bands = BANDS if self.near else 1
        keys = np.array(rows, dtype=np.uint64).reshape(-1, bands)
        for band in range(bands):
            records = np.empty(len(keys), dtype=[("key", "<u8"), ("document", "<u4")])
            # Matching leaves out what is not below 2^61 - 1.
            records["key"] = keys[:, band] >> np.uint64(4)
            records["document"] = np.arange(len(keys))
            path = Path(self.folder) / f"bucket_{band:03d}" / f"{rank:05d}.minhash.sig"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.sort(records, order=("key", "document")).tofile(path)


def _exact_key(text: str) -> list[int]:
    return [int.from_bytes(fingerprint(text)[8:16], "little")]


class WriteShards(PipelineStep):
    """Token ids of one task, by split, in `<work>/tokens/<rank>`."""

    name = "Encoder"
    type = "TOKENIZER"

    def __init__(self, work: Path, tokenizer: Path | None, val_fraction: float):
        super().__init__()
        self.work, self.tokenizer, self.val_fraction = str(work), tokenizer, val_fraction

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        """Writes ids, a separator after each document, and their numbers."""
        folder = Path(self.work) / "tokens" / f"{rank:05d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as scratch:
            encoder = build_encoder(self.tokenizer, Filters(), Path(scratch))
            files = {split: (folder / f"{split}.bin").open("wb") for split in SPLITS}
            lengths: dict[str, list[np.ndarray]] = {split: [np.zeros(0, "<u8")] for split in SPLITS}
            account = {split: {"bytes": 0, "max_id": 0, "last_source": None} for split in SPLITS}
            of_sources: dict[str, Counter] = {}
            for batch in _batches(data):
                with self.track_time():
                    encoded = encoder.encode_batch([document.text for document in batch])
                sizes, counts = encoded.num_bytes, encoded.lengths_of(np.arange(len(batch)))
                for number, document in enumerate(batch):
                    of_source = of_sources.setdefault(str(document.metadata["source"]), Counter())
                    of_source.update(documents=1, tokens=int(counts[number]), bytes=int(sizes[number]))
                is_val = encoded.draws < self.val_fraction
                for split, chosen in zip(
                    SPLITS, (np.flatnonzero(~is_val), np.flatnonzero(is_val)), strict=True
                ):
                    if len(chosen):
                        ids, _ = encoded.select(chosen)
                        files[split].write(ids.astype(DTYPES[encoder.dtype], copy=False).tobytes())
                        lengths[split].append(counts[chosen].astype("<u8"))
                        known = account[split]
                        known["bytes"] += int(sizes[chosen].sum())
                        known["max_id"] = max(known["max_id"], int(ids.max()))
                        known["last_source"] = batch[chosen[-1]].metadata["source"]
            for split, file in files.items():
                file.close()
                np.concatenate(lengths[split]).tofile(folder / f"{split}.lengths")
            known = {"dtype": encoder.dtype, "vocab_size": encoder.vocab_size, "eos_token_id": encoder.eos}
            known["separator"] = list(encoder.separator)
            _write_json(folder / "account.json", {"splits": account, "sources": of_sources, "encoder": known})


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, chars = [], 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= BATCH:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class MergeShards(PipelineStep):
    """All tasks' ids in one prepared folder, in the order of the tasks (data/merging.py)."""

    name = "Merge"
    type = "WRITER"

    def __init__(self, work: Path, output: Path, tokenizer: Path | None, given: dict):
        super().__init__()
        self.work, self.output, self.tokenizer, self.given = work, output, tokenizer, given

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Writes the folder."""
        merge_shards(self.work, self.output, self.tokenizer, self.given)
