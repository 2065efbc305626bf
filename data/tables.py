"""Rows of one table on this machine: JSON lines, a JSON array, parquet, Arrow.

What belongs here: reading a file a row at a time, so that memory does not grow with it, and saying where it
is broken. What the columns mean is the business of who reads them.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import open_bytes, read_lines, suffixes

_logger = logging.getLogger(__name__)
_ROWS = 1024  # of parquet and Arrow at once
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_table(file: Path, column: str | None = None) -> Iterator[tuple[str, Any]]:
    """Rows and where each is: `x.jsonl, line 3`.

    Args:
        file: .jsonl, .json (one array, or lines), .parquet or .arrow; the first two packed or not.
        column: the only one that is needed; all if not given. JSON rows have all anyway.

    Yields:
        Place and row: of JSON whatever stands there, else a dictionary.

    Raises:
        ValueError: if the file is broken or cut off, or has no such column. What came before was whole.
    """
    suffix = suffixes(file)[0]
    if suffix in {".parquet", ".arrow"}:
        yield from _read_columns(file, suffix, column)
    else:
        yield from _read_json(file)


def require_column(column: str, columns: list[str], where: str) -> None:
    """Raises a ValueError with the columns that there are."""
    if column not in columns:
        raise ValueError(f"{where}: there is no column {column!r}; there are {', '.join(columns)}")


def _read_json(file: Path) -> Iterator[tuple[str, Any]]:
    if _begins_as_array(file) and not _has_lists_of_messages(file):
        with open_bytes(file) as stream:
            content = stream.read().decode("utf-8-sig", "replace")
        rows = _parse(content, f"{file}, which begins as a JSON array")
        yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, (offset, line) in enumerate(read_lines(file), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, _parse(line, where, offset)


def _begins_as_array(file: Path) -> bool:
    with open_bytes(file) as stream:
        while block := stream.read(4096):
            if beginning := block.removeprefix(b"\xef\xbb\xbf").lstrip():
                return beginning.startswith(b"[")
    return False


def _has_lists_of_messages(file: Path) -> bool:
    """Whether the first line is a whole list of messages: nanochat's conversations, not an array of rows."""
    first = next((line for _, line in read_lines(file) if line.strip()), "")
    try:
        messages = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return bool(messages) and all(isinstance(message, dict) and "role" in message for message in messages)


def _parse(text: str, where: str, offset: int | None = None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers and nesting beyond what Python reads
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} at its character {error.pos + 1:,}"
        else:
            reason = str(error)
        if offset is not None:
            reason += f" (it begins at byte {offset:,})"
            if not text.endswith("\n"):
                reason += "; the file ends there, and may have been cut off"
        raise ValueError(f"{where}, is not JSON: {reason}") from error


def _read_columns(file: Path, suffix: str, column: str | None) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ValueError(f"{file} needs pyarrow to be read: pip install 'tessera-lm[data]'") from error
    number = 0
    try:
        for batch in (_parquet_batches if suffix == ".parquet" else _arrow_batches)(file, column):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        size = f"{file.stat().st_size:,} bytes"
        raise ValueError(
            f"{file} is no whole {suffix[1:]} file: {reason} (after row {number:,}, of {size})"
        ) from error


def _parquet_batches(file: Path, column: str | None) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(file) as table:
        if column is not None:
            require_column(column, table.schema_arrow.names, str(file))
        yield from table.iter_batches(batch_size=_ROWS, columns=None if column is None else [column])


def _arrow_batches(file: Path, column: str | None) -> Iterator[Any]:
    """Of both formats: the stream, which `datasets` writes, and the file with a footer."""
    import pyarrow as pa

    with pa.OSFile(str(file)) as source:
        has_footer = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if has_footer else pa.ipc.open_stream(source)
        if column is not None:
            require_column(column, reader.schema.names, str(file))
        whole = (reader.get_batch(i) for i in range(reader.num_record_batches)) if has_footer else reader
        for batch in whole:
            chosen = batch if column is None else batch.select([column])
            for start in range(0, len(chosen), _ROWS):
                yield chosen.slice(start, _ROWS)
        # Without it a stream that was cut off between two batches looks whole.
        source.seek(max(source.size() - len(_END_OF_STREAM), 0))
        marked = source.read(len(_END_OF_STREAM)) == _END_OF_STREAM
    if not has_footer and not marked:
        _logger.warning("%s ends without the mark of a stream's end: it may have been cut off", file)
