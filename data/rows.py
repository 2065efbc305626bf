"""Rows of tables: JSON lines, JSON arrays, parquet, Arrow, and datasets on the Hub, one row at a time.

What belongs here: finding the table that a user named and reading it as dictionaries. What their columns mean
is the business of who reads them.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import ROW_SUFFIXES, suffixes
from .tables import read_table

# Names of what is not trained on unless it is asked for.
HELD_OUT = ("validation", "val", "valid", "dev", "test")
# Those of the Hub that have a name more.
_HELD_OUT_ON_HUB = (*HELD_OUT, "test_sft", "test_prefs")
_NAMED = 8  # files in a sentence


def read_rows(
    source: str,
    *,
    split: str | None = None,
    splits: tuple[str, ...] = ("train",),
    held_out: bool = False,
    name: str | None = None,
    streaming: bool = True,
) -> Iterator[dict]:
    """Reads a table.

    Args:
        source: file, folder of files, or Hub dataset (`org/name`).
        split: the one to read: of a Hub dataset; of a folder, the files whose names begin or end with it, or
            that lie in a folder of its name.
        splits: where no split is given, the first of these that there is. A folder in which nothing has any
            of their names is read whole, without what is named as one of `HELD_OUT`.
        held_out: the rows are to evaluate on: where no split is given, those of `HELD_OUT` come before
            `splits`, and a folder without any of these names is read whole.
        name: configuration of a Hub dataset.
        streaming: read a Hub dataset as it comes, instead of downloading it first.

    Yields:
        Rows; those of parquet, Arrow and the Hub without the nulls inside of their columns' structs.

    Raises:
        ValueError: if there is no such table or split, or it cannot be read.
    """
    if held_out:
        splits = (*_HELD_OUT_ON_HUB, *splits)
    path = Path(source).expanduser()
    if path.exists():
        return _read_files(_files_of(path, splits, split))
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not _is_table(path):
        return _read_hub(source, (split,) if split else splits, name, streaming)
    raise ValueError(f"there is no file or folder {source}, and a Hub dataset is written org/name")


# ---- files ----


def _is_table(path: Path) -> bool:
    return suffixes(path)[0] in ROW_SUFFIXES


def _files_of(path: Path, splits: tuple[str, ...], split: str | None) -> list[Path]:
    if path.is_file():
        if split is not None and not _is_of(path, path.parent, split):
            raise ValueError(
                f"there is no split {split!r}: {path} is one file; leave the split out to read it"
            )
        return [path]
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_table(file)]
    # A plain .json beside tables mostly describes them.
    files = [file for file in files if suffixes(file)[0] != ".json"] or files
    if not files:
        raise ValueError(
            f"{path} holds no table: expected .jsonl, .json (also .gz, .xz, .zst), .parquet or .arrow files"
        )
    for wanted in (split,) if split is not None else splits:
        if of_split := [file for file in files if _is_of(file, path, wanted)]:
            return of_split
    there = ", ".join(str(file.relative_to(path)) for file in files[:_NAMED])
    there += f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    if split is not None:
        raise ValueError(
            f"{path} has no split {split!r}: no file or folder in it is named so; there are {there}"
        )
    if set(HELD_OUT) & set(splits):
        return files
    rest = [file for file in files if not any(_is_of(file, path, name, whole=True) for name in HELD_OUT)]
    if not rest:
        raise ValueError(
            f"{path} has nothing but held-out splits: {there}; name one as the split, or give its file"
        )
    return rest


def _is_of(file: Path, folder: Path, split: str, whole: bool = False) -> bool:
    """Whether a file in a folder is named after a split, or a folder between them is.

    Args:
        whole: the name must be the first or last word of the file's; else it may also begin with it.
    """
    words = re.split(r"[-_.]", file.name.partition(".")[0])
    named = split in (words[0], words[-1]) or (file.name.startswith(split) and not whole)
    return named or split in file.relative_to(folder).parts[:-1]


def _read_files(files: list[Path]) -> Iterator[dict]:
    for file in files:
        columnar = suffixes(file)[0] in {".parquet", ".arrow"}
        for where, row in read_table(file):
            if isinstance(row, list):
                row = {"messages": row}  # nanochat's form of a conversation
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
            yield _without_filling(row) if columnar else row


def _without_filling(row: dict) -> dict:
    """A row without the nulls that Arrow fills its structs with.

    All structs of a column have the fields that any of them has: a call of one tool would get the arguments
    of every other. A null that was meant cannot be told from those, so it goes too. Columns stay.
    """
    return {column: _prune(value) for column, value in row.items()}


def _prune(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _prune(inner) for key, inner in value.items() if inner is not None}
    return [_prune(inner) for inner in value] if isinstance(value, list) else value


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
        yield from map(_without_filling, load_dataset(dataset, name, split=split, streaming=streaming))
    except Exception as error:  # of the network, of the files, of any library in between
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{title} cannot be read: {reason}") from error
