"""From text to tokens on disk: read, mix, filter, encode, split, write.

Notable:
- nothing is held but a few megabytes that are on their way through the processes, and 8 bytes a document
where duplicates are looked for;
- what is written depends on the sources, the tokenizer, the filters and the seed, not on the number of
processes, nor on how often it was killed and went on;
- sources with weights give tokens in that proportion at every moment, not only in the end: the next batch
comes from the one that is furthest behind;
- the folder has its name only when everything in it is written; until then it is `<name>.partial/tokens`,
and what a later call goes on from is beside it.

What belongs here: the order of these steps, whether an earlier call can be gone on with, and the account of
it all in `data_meta.json`.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from .arguments import file_states, require_same
from .encoding import EncodingPool, build_encoder, load_tokenizer
from .encoding_pass import IN_FLIGHT, EncodingPass, NothingToKeep
from .filters import Filters
from .hashing import file_sha256
from .journal import Journal, sync_folder, write_durably
from .mixing import BATCH, Source, open_streams
from .sources import source_files
from .token_files import FORMAT, META, SPLITS

# Of what a call leaves for a later one; another number is not gone on from.
JOURNAL_FORMAT = 2

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
    restart: bool = False,
) -> dict:
    """Writes a folder of tokens, or goes on where an earlier call with the same arguments was ended.

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
        restart: begin anew, whatever an earlier call has left.

    Returns:
        What was written as `data_meta.json`.

    Raises:
        ValueError: for what cannot work; if an earlier call had other arguments or other files; if the disk
            is full. What was there to go on from stays.
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
    partial = output.resolve().with_name(output.resolve().name + ".partial")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if partial.is_dir() and not (partial / "tokens").exists():
            shutil.rmtree(partial)  # of a call that was killed when all was done but this
        raise ValueError(f"{output} exists and is not an empty folder; give another, or remove it first")
    streams = open_streams(sources, seed)
    filters = filters or Filters()
    output = output.resolve()
    arguments = {
        "format": JOURNAL_FORMAT,
        "data": [asdict(source) for source in sources],
        "tokens": tokens,
        "val_fraction": None if val_data else val_fraction,
        "val_data": val_data or None,
        "filters": json.loads(json.dumps(asdict(filters))),
        "seed": seed,
        "explain": explain,
        "files": file_states(
            file
            for source, split in [
                *((source.source, source.split) for source in sources),
                *((source, sources[0].split) for source in val_data or []),
            ]
            for file in source_files(source, split)
        ),
        "batches": [BATCH, IN_FLIGHT],
    }
    with _claimed(partial):
        journal, folder = Journal(partial / "progress.json"), partial / "tokens"
        try:
            if restart:
                _clear(partial)
            given = partial / "tokenizer"
            shutil.rmtree(given, ignore_errors=True)
            if tokenizer:
                _keep_tokenizer(tokenizer, given)
            arguments["tokenizer"] = file_sha256(given / "tokenizer.json") if tokenizer else None
            mark = journal.read()
            if mark is None:
                _clear(folder)
                if tokenizer:
                    given.rename(folder / "tokenizer")
            else:
                shutil.rmtree(given, ignore_errors=True)
                require_same(mark["arguments"], arguments, partial, "or begin anew with --restart")
                read = sum(stream["read"] for stream in mark["streams"])
                print(f"going on after {read:,} documents, from {partial}", file=sys.stderr, flush=True)
            encoder = build_encoder(folder / "tokenizer" if tokenizer else None, filters, partial)
            job = EncodingPass(
                folder, partial, encoder, streams, tokens, val_fraction, explain, journal, arguments, mark
            )
            try:
                if val_data and mark is None:
                    job.hold_out(val_data, sources[0])
                with EncodingPool(encoder, workers) as pool:
                    job.run(pool)
                splits = job.finish()
            finally:
                job.close()
            meta = {
                "format": FORMAT,
                "dtype": encoder.dtype,
                "vocab_size": encoder.vocab_size,
                "eos_token_id": encoder.eos,
                "tokenizer_sha256": arguments["tokenizer"],
                **splits,
                "sha256": {
                    f"{split}.{suffix}": file_sha256(folder / f"{split}.{suffix}")
                    for split in SPLITS
                    for suffix in ("bin", "idx")
                },
                "sources": [stream.account() for stream in streams],
                "filters": {
                    "names": list(filters.names),
                    "min_chars": filters.min_chars,
                    "language": filters.language,
                    "dropped": dict(job.dropped),
                    "lines_dropped": dict(job.lines_dropped),
                },
                "val_fraction": arguments["val_fraction"],
                "val_data": arguments["val_data"],
                "val_drawn_by": job.drawn_by,
                "token_budget": tokens,
                "seed": seed,
            }
            job.examples.write(folder)
            write_durably(folder / META, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
            folder.rename(output)
            sync_folder(output.parent)
        except NothingToKeep:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            # Without a mark there is nothing to go on from.
            if output.exists() and any(output.iterdir()) or not journal.path.is_file():
                shutil.rmtree(partial, ignore_errors=True)
    return meta


@contextmanager
def _claimed(partial: Path) -> Iterator[None]:
    """Keeps other processes out of the folder that this one writes until it ends, however that comes."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = (partial / "lock").open("w")
    except OSError as error:
        raise ValueError(f"{partial} cannot be written: {error.strerror}") from error
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # not on this system; then nobody watches
            pass
        except OSError as error:
            raise ValueError(f"another process is writing {partial}; wait for it, or end it") from error
        yield


def _clear(folder: Path) -> None:
    """Leaves a folder with nothing in it but the lock."""
    folder.mkdir(exist_ok=True)
    # The journal first: what is left of the rest after a kill is then nothing to go on from.
    for path in sorted(folder.iterdir(), key=lambda path: path.name != "progress.json"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


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
