"""Folders of prepared tokens that are read together.

What belongs here: opening one or several of them, finding where their documents start, and whether they go
together. How rows of them alternate is `mixture.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .mixing import parse_source
from .text import Tokens, find_starts
from .token_files import PreparedData, is_prepared, open_prepared, read_starts


@dataclass(frozen=True)
class PreparedCorpus:
    """A folder of tokens, opened.

    Attributes:
        name: of the folder; its path where another has the same name.
        folder: where it is.
        weight: share of the rows, relative to the others; None where it is alone.
        data: what is in it.
        train: its training tokens, with where their documents start if that was asked for and can be known.
    """

    name: str
    folder: str
    weight: float | None
    data: PreparedData
    train: Tokens


def open_folders(given: Sequence[str | Path], documents: bool = False) -> list[PreparedCorpus]:
    """Opens folders as they are written: one alone, or several as `folder:weight`.

    Args:
        given: the folders.
        documents: whether to find where documents start, for which all tokens are read where no `train.idx`
            says it.

    Raises:
        ValueError: if there is none, one of several has no weight or is not prepared, one is broken, or two
            were encoded with different tokenizers.
    """
    if not given:
        raise ValueError("there is nothing to read: give a folder of prepared tokens")
    several = len(given) > 1
    sources = [parse_source(str(one)) for one in given]
    for source in sources if several else []:
        if source.weight is None:
            raise ValueError(
                f"{source.source} has no weight; of several folders each needs one, as {source.source}:0.5"
            )
        if not is_prepared(source.source):
            raise ValueError(
                f"{source.source} is no folder of prepared tokens, and only those are mixed while training; "
                "write it with tessera data prepare"
            )
    names = [Path(source.source).resolve().name for source in sources]
    paths = [Path(source.source).resolve() for source in sources]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise ValueError(f"{twice} is given twice; give it once, with the sum of its weights")
    opened = []
    for source, name in zip(sources, names, strict=True):
        data = open_prepared(source.source)
        corpus = PreparedCorpus(
            name if names.count(name) == 1 else source.source,
            source.source,
            source.weight if several else None,
            data,
            _with_starts(data, Path(source.source)) if documents else data.train,
        )
        if opened and _meaning(opened[0].data) != _meaning(data):
            raise ValueError(
                f"{opened[0].folder} and {corpus.folder} were encoded with different tokenizers; prepare one "
                "of them with the tokenizer of the other"
            )
        opened.append(corpus)
    return opened


def meaning_of(tokenizer) -> str:
    """What text becomes which ids by; chat templates and the like are not in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))


def _with_starts(data: PreparedData, folder: Path) -> Tokens:
    if (folder / "train.idx").is_file():
        starts = read_starts(folder, "train")
    else:
        starts = find_starts(data.train.ids, _end_of_text(data))
    return Tokens(data.train.ids, data.train.num_bytes, starts)


def _end_of_text(data: PreparedData) -> int | None:
    if data.meta.get("eos_token_id") is not None or data.tokenizer is None:
        return data.meta.get("eos_token_id")
    return _load(data.tokenizer).eos_token_id


def _meaning(data: PreparedData) -> str | None:
    return None if data.tokenizer is None else meaning_of(_load(data.tokenizer))


def _load(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
