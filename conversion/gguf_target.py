"""The way out to llama.cpp: a model becomes one GGUF file, which is then compared with its source.

What belongs here: what `targets.py` lists as `gguf`, in the order in which it happens. Architectures,
tokenizers, the file and llama.cpp itself have rooms of their own.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tessera.modeling.configuration_tessera import TesseraConfig

from . import gguf_architectures
from .gguf_files import (
    ROPE_FACTORS,
    TYPES,
    GGUFTensors,
    compare_file,
    require_gguf,
    tensors_size,
    write_gguf,
)
from .gguf_tokenizer import TokenizerMetadata, describe_tokenizer, load_tokenizer
from .llama_cpp import compare_with_llama_cpp, require_llama_cpp
from .report import Check
from .rules import Renamed, to_ours
from .samples import free_memory, memory_needed
from .verify import assemble, build_model, compare_logits

if TYPE_CHECKING:
    from .targets import Options, Written

Tensors = Mapping[str, torch.Tensor]


LLAMA_CPP = "llama.cpp"
SUFFIX = ".gguf"


def prepare(config: TesseraConfig, tensors: Tensors) -> tuple[TesseraConfig, Tensors]:
    """The model as llama.cpp can have it.

    Raises:
        ValueError: if llama.cpp has no architecture for it, or the `gguf` package is missing.
    """
    require_gguf()
    return gguf_architectures.prepare(config, tensors)


def size(config: TesseraConfig, tensors: Tensors, options: "Options") -> int:
    """Bytes of the tensors.

    Raises:
        ValueError: if llama.cpp has no tokenizer like the source's, or is to be run and not installed.
    """
    if options.verify == LLAMA_CPP:
        require_llama_cpp()
    _describe(config, options, try_joins=True)
    return tensors_size(gguf_architectures.choose(config), config, _dtype(config, options))


def write(folder: Path, config: TesseraConfig, tensors: Tensors, options: "Options") -> None:
    """Writes the file into a directory.

    Raises:
        ValueError: if llama.cpp has no tokenizer like the source's, or a weight does not fit its type.
    """
    dtype = _dtype(config, options)
    described = _describe(config, options)
    on_bytes = None if options.journal is None else options.journal.on_bytes
    architecture = gguf_architectures.choose(config)
    write_gguf(folder / _file_name(dtype), architecture, config, tensors, described, dtype, on_bytes)
    options.source.notes.extend(described.notes)


def verify(written: "Written") -> list[Check]:
    """Compares all that a file states, every number, the logits, and on request what llama.cpp makes of it.

    Raises:
        ValueError: if a number is farther from the source's than its rounding, or llama.cpp computes
            something else.
    """
    config, options, source = written.config, written.options, written.source
    dtype = _dtype(config, options)
    file = written.folder / _file_name(dtype)
    architecture = gguf_architectures.choose(config)
    described = _describe(config, options)
    rounding = compare_file(file, architecture, config, written.tensors, described, dtype)
    checks = [
        Check("metadata and shapes", True, f"{architecture.name}, {sum(rounding.counts.values())} tensors"),
        Check("tokenizer, read back", True, _told(described)),
        Check("weights, read back", True, str(rounding)),
    ]
    found = GGUFTensors(file)
    weights = Renamed(found, {name: name for name in found if name != ROPE_FACTORS})
    ours = to_ours(weights, config, architecture.names(config))
    if options.verify == "weights" or (options.verify is None and memory_needed(config) > free_memory()):
        source.notes.append("logits are not compared: --verify full does it where memory allows it")
        return checks
    apart = compare_logits(
        lambda: build_model(source), lambda: assemble(config, ours), config, written.device
    )
    # Where weights are rounded on purpose, logits move with them: told, and every weight is near enough.
    bound = "" if rounding.largest else f"{apart.allowed:.3g}"
    passed = apart.is_small if bound else math.isfinite(apart.largest)
    figure = f"{apart.largest:.3g}, the largest is {apart.scale:.3g}"
    checks.append(Check("logits in float32", passed, figure, bound))
    if options.verify == LLAMA_CPP and passed:
        tokenizer = load_tokenizer(source) if options.tokenizer else None
        checks += compare_with_llama_cpp(file, assemble(config, ours), config, tokenizer, dtype)
    return checks


def _describe(config: TesseraConfig, options: "Options", try_joins: bool = False) -> TokenizerMetadata:
    tokenizer = load_tokenizer(options.source) if options.tokenizer else None
    return describe_tokenizer(tokenizer, config, try_joins)


def _told(described: TokenizerMetadata) -> str:
    tokens = described.values.get("tokenizer.ggml.tokens")
    if tokens is None:
        return "none"
    return f"{len(tokens):,} tokens, {len(described.values)} values; equal"


def _dtype(config: TesseraConfig, options: "Options") -> str:
    """What was asked for, or what leaves weights as they are."""
    name = options.dtype or str(config.dtype).removeprefix("torch.")
    return name if name in TYPES else "float32"


def _file_name(dtype: str) -> str:
    return f"model-{TYPES[dtype][0]}{SUFFIX}"
