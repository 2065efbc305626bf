"""Rows of tables: JSON lines, JSON arrays, parquet, and datasets on the Hub, one row at a time.

What belongs here: finding the table that a user named and reading it as dictionaries. What their columns mean
is the business of who reads them.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from .sources import COMPRESSIONS, UNPACKING_ERRORS


def read_rows(
    source: str, *, splits: tuple[str, ...] = ("train",), name: str | None = None, streaming: bool = True
) -> Iterator[dict]:
    """Reads a table.

    Args:
        source: file, folder of files, or Hub dataset (`org/name`).
        splits: of a Hub dataset, the first of them that there is; of a folder, the files whose names begin
            with it, or all where none does.
        name: configuration of a Hub dataset.
        streaming: read a Hub dataset as it comes, instead of downloading it first.

    Raises:
        ValueError: if there is no such table, or it cannot be read.
    """
    path = Path(source).expanduser()
    if path.exists():
        return _read_files(_files_of(path, splits))
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not _is_table(path):
        return _read_hub(source, splits, name, streaming)
    raise ValueError(f"there is no file or folder {source}, and a Hub dataset is written org/name")


# ---- files ----


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSIONS else path.suffix.lower()


def _is_table(path: Path) -> bool:
    return _suffix(path) in {".jsonl", ".json", ".parquet"}


def _files_of(path: Path, splits: tuple[str, ...]) -> list[Path]:
    if path.is_file():
        return [path]
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_table(file)]
    # A plain .json beside tables mostly describes them.
    files = [file for file in files if _suffix(file) != ".json"] or files
    for split in splits:
        if of_split := [file for file in files if file.name.startswith(split)]:
            return of_split
    if not files:
        raise ValueError(f"{path} holds no table: expected .jsonl, .json (also .gz, .xz) or .parquet files")
    return files


def _read_files(files: list[Path]) -> Iterator[dict]:
    for file in files:
        read = _read_parquet if _suffix(file) == ".parquet" else _read_json
        for number, row in enumerate(read(file), start=1):
            if not isinstance(row, dict):
                raise ValueError(f"{file}, row {number}: expected an object, got {type(row).__name__}")
            yield row


def _read_json(file: Path) -> Iterator[dict]:
    number = 0
    try:
        opener = COMPRESSIONS.get(file.suffix.lower(), open)
        with opener(file, "rt", encoding="utf-8-sig") as stream:
            if stream.read(4096).lstrip().startswith("["):
                stream.seek(0)
                yield from json.load(stream)
                return
            stream.seek(0)
            for line in stream:
                number += 1
                if line.strip():
                    yield json.loads(line)
    except (ValueError, RecursionError) as error:
        place = f", line {number}," if number else ""
        raise ValueError(f"{file}{place} is not JSON: {error}") from error
    except UNPACKING_ERRORS as error:
        raise ValueError(f"{file} cannot be unpacked: {error}") from error


def _read_parquet(file: Path) -> Iterator[dict]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(f"{file} needs pyarrow to be read: pip install 'tessera-lm[data]'") from error
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{file} is no whole parquet file: {str(error).splitlines()[0]}") from error


# ---- the Hub ----


def _read_hub(dataset: str, splits: tuple[str, ...], name: str | None, streaming: bool) -> Iterator[dict]:
    try:
        from datasets import get_dataset_split_names, load_dataset
        from datasets.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ValueError(f"the Hub dataset {dataset} needs: pip install 'tessera-lm[data]'") from error
    disable_progress_bar()
    title = f"the Hub dataset {dataset}" + (f" ({name})" if name else "")
    try:
        there = get_dataset_split_names(dataset, name)
        split = next((split for split in splits if split in there), None)
        if split is None:
            raise ValueError(f"no split {' or '.join(splits)}; there are {', '.join(there)}")
        yield from load_dataset(dataset, name, split=split, streaming=streaming)
    except Exception as error:  # of the network, of the files, of any library in between
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{title} cannot be read: {reason}") from error
