"""Rows of tables: JSON lines, JSON arrays, parquet, Arrow, and datasets on the Hub, one row at a time.

What belongs here: finding the table that a user named and reading it as dictionaries. What their columns mean
is the business of who reads them.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from .files import ROW_SUFFIXES, suffixes
from .tables import read_table


def read_rows(
    source: str, *, splits: tuple[str, ...] = ("train",), name: str | None = None, streaming: bool = True
) -> Iterator[dict]:
    """Reads a table.

    Args:
        source: file, folder of files, or Hub dataset (`org/name`).
        splits: of a Hub dataset, the first of them that there is; of a folder, the files whose names begin
            with it, or that lie in a folder of its name, or all where none does.
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


def _is_table(path: Path) -> bool:
    return suffixes(path)[0] in ROW_SUFFIXES


def _files_of(path: Path, splits: tuple[str, ...]) -> list[Path]:
    if path.is_file():
        return [path]
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_table(file)]
    # A plain .json beside tables mostly describes them.
    files = [file for file in files if suffixes(file)[0] != ".json"] or files
    for split in splits:
        of_split = [
            file
            for file in files
            if file.name.startswith(split) or split in file.relative_to(path).parts[:-1]
        ]
        if of_split:
            return of_split
    if not files:
        raise ValueError(
            f"{path} holds no table: expected .jsonl, .json (also .gz, .xz, .zst), .parquet or .arrow files"
        )
    return files


def _read_files(files: list[Path]) -> Iterator[dict]:
    for file in files:
        for where, row in read_table(file):
            if isinstance(row, list):
                row = {"messages": row}  # nanochat's form of a conversation
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
            yield row


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
