"""llama2.c's `.bin` files, in: a header of sizes, then the tensors of a Llama one kind after the other.

Three versions: the first has no magic number, and tells by a negative vocabulary that the head is not tied;
version 1 has a header of 256 bytes; version 2 holds matrices as int8 with a scale for each group of numbers
(Q8_0), which are multiplied out. What belongs here: what is where in the file. The names that the tensors get
are Meta's, from which llama2.c has them; the tokenizer has a room of its own, `llama2c_tokenizer.py`.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tessera.modeling.configuration_tessera import TesseraConfig

from .checkpoints import Checkpoint
from .llama2c_tokenizer import find_tokenizer
from .meta_original import META_RULES
from .rules import to_ours

_MAGIC = 0x616B3432  # "ak42"
_SIZES = struct.Struct("<7i")
_HEADER_BYTES = 256
# No model is larger, and text or an archive read as sizes is.
_LARGEST = 2**24
_DEEPEST = 2**12


@dataclass(frozen=True)
class Header:
    """The beginning of a file.

    Attributes:
        version: 0 for files without magic number.
        dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len: sizes.
        tied: whether the head is the embedding.
        group: numbers that share a scale, in version 2.
        start: where the tensors begin.
    """

    version: int
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    tied: bool
    group: int
    start: int

    @property
    def is_plausible(self) -> bool:
        """Whether these can be the sizes of a model."""
        sizes = (
            *(self.dim, self.hidden_dim, self.n_layers, self.n_heads, self.n_kv_heads),
            *(self.vocab_size, self.seq_len),
        )
        if not all(0 < size < _LARGEST for size in sizes):
            return False
        if self.n_layers > _DEEPEST:
            return False
        return not (self.dim % (2 * self.n_heads) or self.n_heads % self.n_kv_heads)


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: a byte in the file, its shape, and whether it is quantized."""

    offset: int
    shape: tuple[int, ...]
    quantized: bool


def recognises(path: Path) -> bool:
    """Whether this is a `.bin` file, or a directory with one that begins as llama2.c's do.

    Other files of this name are pickles and tokenizers; directories that transformers loads have config.json.
    """
    if path.is_file():
        return path.suffix == ".bin"
    return path.is_dir() and not (path / "config.json").is_file() and bool(_find_models(path))


def open_source(path: Path) -> Checkpoint:
    """Opens a file, or the one in a directory.

    Raises:
        ValueError: if there are several, or the file is none of llama2.c's, or not a whole one.
    """
    files = [path] if path.is_file() else _find_models(path)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path} holds several models; name the one that is meant: {names}")
    (file,) = files
    header = read_header(file)
    if header is None or not header.is_plausible:
        raise ValueError(
            f"{file} is not a model of llama2.c: it begins neither with the magic number ak42 nor with the "
            "seven sizes of a model"
        )
    tensors = BinTensors(file, header)
    config = _config(header)
    tokenizer = find_tokenizer(file.parent, header.vocab_size)
    ours = to_ours(tensors, config, META_RULES)
    return Checkpoint(path, "llama2.c", config, ours, notes=tokenizer.notes, write_tokenizer=tokenizer.write)


def read_header(file: Path) -> Header | None:
    """Reads the beginning of a file; None if it is too short for one.

    Raises:
        ValueError: for a version that is not known.
    """
    with file.open("rb") as stream:
        data = stream.read(_HEADER_BYTES)
    if len(data) < _SIZES.size:
        return None
    if struct.unpack_from("<I", data)[0] != _MAGIC:
        sizes = list(_SIZES.unpack_from(data))
        tied, sizes[5] = sizes[5] > 0, abs(sizes[5])
        return Header(0, *sizes, tied=tied, group=0, start=_SIZES.size)
    if len(data) < _HEADER_BYTES:
        return None
    version = struct.unpack_from("<i", data, 4)[0]
    if version not in (1, 2):
        raise ValueError(f"{file} is of version {version} of llama2.c's format; known are 0, 1 and 2")
    tied, group = struct.unpack_from("<Bi", data, 8 + _SIZES.size)
    if version == 2 and group < 1:
        raise ValueError(
            f"{file} is of version 2 and has groups of {group} numbers, which must be at least 1"
        )
    sizes = _SIZES.unpack_from(data, 8)
    return Header(version, *sizes, tied=bool(tied), group=group, start=_HEADER_BYTES)


def _find_models(folder: Path) -> list[Path]:
    def is_model(file: Path) -> bool:
        try:
            header = read_header(file)
        except ValueError:
            # The magic number is there.
            return True
        return header is not None and header.is_plausible

    return [file for file in sorted(folder.glob("*.bin")) if file.is_file() and is_model(file)]


def _config(header: Header) -> TesseraConfig:
    """A Llama; the epsilon, the base of the rotation and the ids are constants of llama2.c."""
    return TesseraConfig(
        vocab_size=header.vocab_size,
        hidden_size=header.dim,
        num_hidden_layers=header.n_layers,
        num_attention_heads=header.n_heads,
        num_key_value_heads=header.n_kv_heads,
        intermediate_size=header.hidden_dim,
        max_position_embeddings=header.seq_len,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rope_interleave=True,
        tie_word_embeddings=header.tied,
        bos_token_id=1,
        eos_token_id=2,
        dtype=torch.float32,
    )


class BinTensors(Mapping):
    """The tensors of a file under Meta's names, in fp32, read when asked for.

    Args:
        file: the file.
        header: what it begins with.

    Raises:
        ValueError: if the file is shorter or longer than its sizes say.
    """

    def __init__(self, file: Path, header: Header):
        self._file, self._group = file, header.group
        self._places, expected = _lay_out(header)
        found = file.stat().st_size
        if found != expected:
            state = "cut short" if found < expected else "too long"
            raise ValueError(
                f"{file} is {state}: its sizes make {expected:,} bytes (version {header.version}), "
                f"but it has {found:,}"
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        place = self._places[name]
        count = int(np.prod(place.shape))
        if not place.quantized:
            return torch.from_numpy(self._read("<f4", count, place.offset)).view(place.shape)
        numbers = torch.from_numpy(self._read("i1", count, place.offset)).view(-1, self._group)
        scales = torch.from_numpy(self._read("<f4", count // self._group, place.offset + count))
        return (numbers.float() * scales[:, None]).view(place.shape)

    def outline(self, name: str) -> torch.Tensor:
        """A tensor without its numbers, on the meta device."""
        return torch.empty(self._places[name].shape, dtype=torch.float32, device="meta")

    def _read(self, kind: str, count: int, offset: int) -> np.ndarray:
        return np.fromfile(self._file, kind, count, offset=offset)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _lay_out(header: Header) -> tuple[dict[str, _Place], int]:
    """Where each tensor is, and how long the file must be."""
    dim, hidden, vocabulary = header.dim, header.hidden_dim, header.vocab_size
    head = dim // header.n_heads
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (dim,),
        "attention.wq": (dim, dim),
        "attention.wk": (header.n_kv_heads * head, dim),
        "attention.wv": (header.n_kv_heads * head, dim),
        "attention.wo": (dim, dim),
        "ffn_norm": (dim,),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
        "norm": (dim,),
        "tok_embeddings": (vocabulary, dim),
        "output": (vocabulary, dim),
    }
    attention = [name for name in shapes if name.startswith("attention.")]
    forward = [name for name in shapes if name.startswith("feed_forward.")]
    if header.version == 0:
        order = ["tok_embeddings", "attention_norm", *attention, "ffn_norm", *forward, "norm", "rope"]
    else:
        order = ["attention_norm", "ffn_norm", "norm", "tok_embeddings", *attention, *forward]
    if not header.tied:
        order.append("output")
    places, offset = {}, header.start
    for kind in order:
        if kind == "rope":
            # Cosines and sines, which are computed.
            offset += 4 * header.seq_len * (head // 2) * 2
            continue
        shape = shapes[kind]
        count = int(np.prod(shape))
        quantized = header.version == 2 and len(shape) == 2
        if quantized and count % header.group:
            raise ValueError(f"groups of {header.group} do not divide the {count} numbers of {kind}")
        size = count + 4 * (count // header.group) if quantized else 4 * count
        by_layer = kind in attention or kind in forward or kind.endswith("_norm")
        for i in range(header.n_layers if by_layer else 1):
            name = f"layers.{i}.{kind}.weight" if by_layer else f"{kind}.weight"
            places[name] = _Place(offset, shape, quantized)
            offset += size
    return places, offset
