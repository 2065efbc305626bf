"""Documents of text from where they are: files and folders on this machine, datasets on the Hub.

What belongs here: finding what a user named and reading it one document at a time, so that memory does not
grow with the size of the data. What is done with the text (filters, tokens) is none of this file's business.

- Text files (.txt, .md, ...; any other file that is named itself) hold several documents if they have lines
  `<|endoftext|>`, which stand between documents; otherwise a file is one document. One of more than a
  megabyte is cut after the next blank line (failing that, line end), so that no file is held in memory.
- Tables hold a document a row: JSON lines, one JSON array, parquet, Arrow.
- Text and JSON may be compressed: .gz, .xz, .zst.
- A folder is every such file below it (files.py); where `datasets` saved splits, those of one split.
- `org/name` that is no file is a dataset on the Hub.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import (
    COMPRESSIONS,
    PIECE,
    ROW_SUFFIXES,
    UNREAD,
    kind,
    list_files,
    open_bytes,
    read_blocks,
    suffixes,
)
from .tables import read_table, require_column

SEPARATOR = "<|endoftext|>"
# A text of which more than this share is not UTF-8 is in another encoding, or no text.
UNDECODED = 0.1
# Rows of a Hub dataset that are held and drawn from in random order: 20 MB or so of web pages.
SHUFFLE_ROWS = 10_000


def read_texts(
    sources: list[str],
    *,
    column: str = "text",
    split: str = "train",
    name: str | None = None,
    streaming: bool = True,
    limit_bytes: int | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Reads documents one at a time; empty ones are left out.

    Args:
        sources: files, folders, or datasets on the Hub (`org/name`).
        column: column of JSON lines, parquet and Hub datasets that holds the text.
        split: split of Hub datasets, and of folders that `DatasetDict.save_to_disk` wrote.
        name: configuration of Hub datasets, such as `en`.
        streaming: read Hub datasets as they come, instead of downloading them first.
        limit_bytes: stop with the document that reaches so many UTF-8 bytes. The sources then take turns, so
            that each gives an equal part; without a limit each is read to its end before the next.
        seed: shuffle the files of Hub datasets, and within a buffer their rows; None for their own order.

    Yields:
        Documents that can be encoded as UTF-8: what was not UTF-8 is U+FFFD, and a warning tells where.

    Raises:
        ValueError: if there is no such source, nothing in it to read, no such column, or a broken file. What
            can be told without reading is told before the first document.
    """
    if not sources:
        raise ValueError("there is nothing to read: give a file, a folder, or a Hub dataset (org/name)")
    if limit_bytes is not None and limit_bytes <= 0:
        raise ValueError(f"the limit of text to read must be positive, got {limit_bytes} bytes")
    streams = [
        read_source(source, column=column, split=split, name=name, streaming=streaming, seed=seed)
        for source in sources
    ]
    return _read_all(streams, limit_bytes)


def read_source(
    source: str,
    *,
    column: str = "text",
    split: str = "train",
    name: str | None = None,
    streaming: bool = True,
    seed: int | None = None,
) -> Iterator[str]:
    """Reads one source; arguments and errors are those of `read_texts`."""
    files = source_files(source, split)
    texts = _read_files(files, column) if files else _read_hub(source, column, split, name, streaming, seed)
    return _without_empty(texts, source)


def source_files(source: str, split: str = "train") -> list[Path]:
    """The files that a source is read from, in their order; none of a dataset on the Hub.

    Raises:
        ValueError: if it is neither here nor written as a Hub dataset, if nothing in it can be read, or where
            `datasets` saved several splits, if that one is not among them.
    """
    path = Path(source).expanduser()
    if source and path.exists():  # an empty one would be the current folder
        return list_files(_of_split(path, split))
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and kind(path) is None:
        return []
    raise ValueError(f"there is no file or folder {source}, and a Hub dataset is written org/name")


def read_documents(path: str | Path) -> list[bytes]:
    """Reads plain text byte for byte into memory: a file, or every text file below a folder.

    Raises:
        ValueError: if nothing is there, nothing but empty files, or text inside something else (tables,
            compressed files): its wrapping would be learnt with it.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}")
    files = list_files(path)
    for file in files:
        if {*suffixes(file)} & {*ROW_SUFFIXES, *COMPRESSIONS, *UNREAD}:
            raise ValueError(
                f"{file} is no plain text; take the text out of it with tessera data prepare --data {path} "
                "--output TOKENS, and use TOKENS"
            )
    documents = [document for file in files if (document := file.read_bytes())]
    if not documents:
        raise ValueError(f"{path} is empty: there is nothing to train on")
    return documents


def read_file(file: Path, column: str = "text") -> Iterator[str]:
    """Reads one file of a source; it may be empty. Documents and errors are those of `read_texts`."""
    return filter(None, map(document_of, _read_files([file], column)))


def document_of(text: str) -> str:
    """What a text gives as a document: nothing if it is white space, else itself as UTF-8 can hold it.

    Lone surrogates, which JSON can spell and UTF-8 cannot, become U+FFFD.
    """
    if text.isspace():
        return ""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_all(streams: list[Iterator[str]], limit_bytes: int | None) -> Iterator[str]:
    if limit_bytes is None:
        for stream in streams:
            yield from stream
        return
    read = dict.fromkeys(range(len(streams)), 0)
    total = 0
    while read and total < limit_bytes:
        turn = min(read, key=read.__getitem__)
        text = next(streams[turn], None)
        if text is None:
            del read[turn]
            continue
        size = len(text.encode("utf-8"))
        read[turn] += size
        total += size
        yield text


def _without_empty(texts: Iterator[str], source: str) -> Iterator[str]:
    found = False
    for document in filter(None, map(document_of, texts)):
        found = True
        yield document
    if not found:
        raise ValueError(f"{source} is empty: there is no text in it")


# ---- files ----


def _of_split(path: Path, split: str) -> Path:
    """The folder of one split where `datasets` saved several."""
    if not (path / "dataset_dict.json").is_file():
        return path
    there = sorted(folder.name for folder in path.iterdir() if (folder / "dataset_info.json").is_file())
    if split not in there:
        raise ValueError(f"{path} has no split {split!r}; there are {', '.join(there)}")
    return path / split


def _read_files(files: list[Path], column: str) -> Iterator[str]:
    for file in files:
        if suffixes(file)[0] in ROW_SUFFIXES:
            for where, row in read_table(file, column):
                yield _text_of(row, column, where)
        else:
            yield from _read_text(file)


def _read_text(file: Path) -> Iterator[str]:
    with open_bytes(file) as stream:
        _require_text(stream.read(PIECE).decode("utf-8", "replace"), file)
    parts: list[str] = []
    length = 0
    separated = False
    for block in read_blocks(file, longest=PIECE):
        for text, is_separator in _parted(block):
            if is_separator:
                separated = True
                yield "".join(parts).strip("\r\n")
                parts, length = [], 0
                continue
            # Line by line only where a document may have to be cut.
            near = length + len(text) >= PIECE
            for line in _lines(text) if near else [text]:
                parts.append(line)
                length += len(line)
                cut_here = near and (line.isspace() or (length >= 2 * PIECE and line.endswith("\n")))
                if length >= PIECE and (cut_here or length >= 3 * PIECE):
                    yield "".join(parts)
                    parts, length = [], 0
    text = "".join(parts)
    yield text.strip("\r\n") if separated else text


def _parted(block: str) -> Iterator[tuple[str, bool]]:
    """Lines that are the separator, and the text between them."""
    done = at = 0
    while (at := block.find(SEPARATOR, at)) >= 0:
        end = block.find("\n", at) + 1 or len(block)
        if (at == 0 or block[at - 1] == "\n") and block[at:end].strip() == SEPARATOR:
            if at > done:
                yield block[done:at], False
            yield block[at:end], True
            done = end
        at = end
    if done < len(block):
        yield block[done:], False


def _lines(text: str) -> list[str]:
    """Lines with their ends, which are line feeds and nothing else."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _require_text(beginning: str, file: Path) -> None:
    if "\0" in beginning or beginning.count("\ufffd") > UNDECODED * len(beginning):
        raise ValueError(f"{file} is no text in UTF-8: convert it, unpack it, or leave it out")


def _text_of(row: Any, column: str, where: str) -> str:
    """The text of a row; none for a null."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with a column {column!r}, got {type(row).__name__}")
    require_column(column, list(row), where)
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: the column {column!r} holds {type(text).__name__}, expected text")
    return text or ""


# ---- the Hub ----


def _read_hub(
    dataset: str, column: str, split: str, name: str | None, streaming: bool, seed: int | None
) -> Iterator[str]:
    try:
        from datasets import load_dataset
        from datasets.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ValueError(f"the Hub dataset {dataset} needs: pip install 'tessera-lm[data]'") from error
    disable_progress_bar()
    title = f"the Hub dataset {dataset}" + (f" ({name})" if name else "")
    try:
        rows = load_dataset(dataset, name, split=split, streaming=streaming)
        columns = rows.column_names  # None where only the data tell
        if columns is not None:
            require_column(column, columns, title)
            rows = rows.select_columns([column])
        if seed is not None:
            rows = rows.shuffle(seed=seed, **({"buffer_size": SHUFFLE_ROWS} if streaming else {}))
        rows = iter(rows)
    except ValueError as error:
        # Also how `datasets` says that there is no such split or configuration, and which there are.
        message = " ".join(str(error).split())
        raise ValueError(message if message.startswith(title) else f"{title}: {message}") from error
    except Exception as error:
        raise _unreachable(title, error) from error
    return _read_rows(rows, column, title)


def _read_rows(rows: Iterator[dict], column: str, title: str) -> Iterator[str]:
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # of the network, of the files, of any library in between
            raise _unreachable(title, error) from error
        if row is None:
            return
        yield _text_of(row, column, title)


def _unreachable(title: str, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"{title} cannot be read: {reason}")
