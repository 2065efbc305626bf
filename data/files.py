"""Files of text and tables on this machine: finding them, unpacking them, and what is broken in them.

What belongs here: what a suffix means, the files of a folder, and bytes and characters out of a file with the
place where they stop being any. What a document or a row is, is not known here.
"""

import gzip
import io
import logging
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".csv", ".tsv", ".html", ".tex", ".log"}
ROW_SUFFIXES = {".jsonl", ".json", ".parquet", ".arrow"}
COMPRESSIONS = {".gz", ".xz", ".zst"}
UNREAD = {".bz2", ".zip"}  # what text also comes in
# The most bytes of a line that are read at once, or one block more.
PIECE = 2**20
_BLOCK = 2**16
_MARK = b"\xef\xbb\xbf"  # of the byte order
# zstd --long=31, as large dumps are packed, needs so much to be looked back at.
_LONGEST_WINDOW = 2**31

_logger = logging.getLogger(__name__)


def suffixes(path: Path) -> tuple[str, str]:
    """Suffix and compression: (".jsonl", ".gz")."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in COMPRESSIONS else (last, "")


def kind(path: Path) -> str | None:
    """`rows`, `json` (plain, which may be anything), `text`, or None for what a folder does not give."""
    suffix, compression = suffixes(path)
    if suffix in ROW_SUFFIXES:
        return "json" if (suffix, compression) == (".json", "") else "rows"
    return "text" if suffix in TEXT_SUFFIXES else None


def list_files(path: Path) -> list[Path]:
    """The files that a file or folder gives, in the order of their paths.

    Plain .json files count only where a folder holds nothing else, since they mostly describe what lies
    beside them; hidden files never do.

    Raises:
        ValueError: if there are none.
    """
    if path.is_file():
        return [path]
    found: dict[str | None, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not hidden and file.is_file():
            found.setdefault(kind(file), []).append(file)
    files = sorted(found.get("text", []) + found.get("rows", [])) or found.get("json", [])
    if not files:
        known = ", ".join(sorted(TEXT_SUFFIXES | ROW_SUFFIXES))
        raise ValueError(f"no text in {path} (looked for {known}; text and JSON also as .gz, .xz or .zst)")
    return files


@contextmanager
def open_bytes(file: Path) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked.

    Raises:
        ValueError: while it is read, if it is cut off or damaged; with the place in the packed file.
    """
    with file.open("rb") as packed:
        try:
            yield _unpack(file, packed)
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
            size = file.stat().st_size
            raise ValueError(
                f"{file} cannot be unpacked beyond byte {packed.tell():,} of {size:,}: {error}"
            ) from error


def _unpack(file: Path, packed: BinaryIO) -> BinaryIO:
    compression = suffixes(file)[1]
    if compression == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=packed), 2**18)
    if compression == ".xz":
        return io.BufferedReader(lzma.LZMAFile(packed), 2**18)
    if compression == ".zst":
        return io.BufferedReader(_ZstdFile(packed, file), 2**18)
    return packed


class _ZstdFile(io.RawIOBase):
    """Frames of zstd, one after the other; unlike the package's reader it tells if the last is cut off."""

    def __init__(self, packed: BinaryIO, file: Path):
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"{file} needs zstandard to be read: pip install 'tessera-lm[data]'") from error
        self._packed = packed
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW)
        self._error = zstandard.ZstdError
        self._frame = None
        self._rest = b""  # packed bytes beyond the last frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            data = self._rest or self._packed.read(2**16)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise EOFError(str(error)) from error
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


class Decoding:
    """Bytes of one file as characters; counts what is not UTF-8 and becomes U+FFFD.

    Args:
        file: which it is, for the announcement.
    """

    def __init__(self, file: Path):
        self.file = file
        self.replaced = 0
        self.first: int | None = None

    def decode(self, data: bytes, offset: int) -> str:
        """Characters of some bytes that begin at an offset of the (unpacked) file."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            text = data.decode("utf-8", "replace")
            self.replaced += text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
            if self.first is None:
                self.first = offset + error.start
            return text

    def announce(self) -> None:
        """Says how much was replaced, if anything was."""
        if self.replaced:
            _logger.warning(
                "%s is not UTF-8 in %s places, the first at byte %s%s: each becomes U+FFFD",
                self.file,
                f"{self.replaced:,}",
                f"{self.first:,}",
                " of what it unpacks to" if suffixes(self.file)[1] else "",
            )


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines of a file with their ends as they are, and the bytes before each.

    A byte order mark at the beginning is no text. What is not UTF-8 is announced once all is read.

    Raises:
        ValueError: if the file cannot be unpacked.
    """
    decoding, offset = Decoding(file), 0
    with open_bytes(file) as stream:
        try:
            while line := stream.readline():
                if offset == 0 and line.startswith(_MARK):
                    offset, line = len(_MARK), line[len(_MARK) :]
                yield offset, decoding.decode(line, offset)
                offset += len(line)
        finally:
            decoding.announce()


def read_blocks(file: Path, longest: int) -> Iterator[str]:
    """Whole lines of a file, many at a time; otherwise as `read_lines`.

    Args:
        file: any, packed or not.
        longest: bytes after which a line is cut, at the end of a character.

    Raises:
        ValueError: if the file cannot be unpacked.
    """
    decoding, offset, rest = Decoding(file), 0, b""
    with open_bytes(file) as stream:
        try:
            while data := stream.read(_BLOCK):
                end = data.rfind(b"\n") + 1
                block, rest = (rest + data[:end], data[end:]) if end else (b"", rest + data)
                if not end and len(rest) >= longest:
                    whole = _whole_characters(rest[:longest])
                    block, rest = rest[:whole], rest[whole:]
                if offset == 0 and block.startswith(_MARK):
                    offset, block = len(_MARK), block[len(_MARK) :]
                if block:
                    yield decoding.decode(block, offset)
                    offset += len(block)
            if offset == 0 and rest.startswith(_MARK):
                offset, rest = len(_MARK), rest[len(_MARK) :]
            if rest:
                yield decoding.decode(rest, offset)
        finally:
            decoding.announce()


def _whole_characters(data: bytes) -> int:
    """Bytes up to the last character, if that is not whole."""
    for back in range(1, min(3, len(data) - 1) + 1):
        byte = data[-back]
        if byte >= 0xC0:  # begins a character of 2, 3 or 4 bytes
            needed = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return len(data) - back if needed > back else len(data)
        if byte < 0x80:
            break
    return len(data)
