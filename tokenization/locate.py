"""Where a tokenizer is, and of what sort: what a user names, from directories to single files and names.

What belongs here: telling the sorts apart and saying what is wrong with a name. Nothing is converted here.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .byte_level import ENCODINGS, find_encoding

# vocabulary and merges, by the names that OpenAI and Hugging Face give them
_GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
# SentencePiece models (tokenizer.model, spm.model, those of Mistral with a version), and rank files
_SINGLE_FILES = ("tokenizer.model", "*.model", "*.model.v*", "*.tiktoken")


@dataclass(frozen=True)
class Located:
    """A tokenizer that was found.

    Attributes:
        kind: "huggingface" (what AutoTokenizer loads), "gpt2" (vocabulary and merges), "tiktoken" (a rank
            file), "sentencepiece" (a model file), or "encoding" (a name of tiktoken's).
        name: what AutoTokenizer is given, or the name of the encoding.
        paths: its files, where it is files of its own.
    """

    kind: str
    name: str
    paths: tuple[Path, ...] = ()


def locate(source: str | Path, encoding: str | None = None) -> Located:
    """Finds what a user named.

    Args:
        source: a directory, a file, the name of an encoding or of a tokenizer on the Hub.
        encoding: said of rank files only.

    Raises:
        ValueError: if there is no such tokenizer.
    """
    path = Path(source)
    if path.is_file() and path.name != "tokenizer.json":
        return _file(path, encoding)
    if encoding is not None:
        raise ValueError(f"the encoding is said of a rank file only, and {source} is none")
    if path.exists():
        return _folder(path if path.is_dir() else path.parent)
    if known := find_encoding(str(source)):
        return Located("encoding", known.name)
    return _on_the_hub(str(source))


def _file(path: Path, encoding: str | None) -> Located:
    with path.open("rb") as file:
        beginning = file.read(1000)
    # the first line tells: base64, space, number
    if path.suffix == ".tiktoken" or encoding or re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", beginning):
        return Located("tiktoken", str(path), (path,))
    if path.suffix in (".json", ".bpe", ".txt"):
        raise ValueError(f"{path} alone is no tokenizer; give the folder that it is in")
    return Located("sentencepiece", str(path), (path,))


def _folder(folder: Path) -> Located:
    if (folder / "tokenizer.json").is_file():
        return Located("huggingface", str(folder))
    for names in _GPT2_FILES:
        paths = tuple(folder / name for name in names)
        if all(path.is_file() for path in paths):
            return Located("gpt2", str(folder), paths)
    for pattern in _SINGLE_FILES:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{folder} holds several tokenizers; name the one that is meant: {names}")
        if found:
            return _file(found[0], None)
    raise ValueError(
        f"{folder} holds no tokenizer: looked for tokenizer.json, encoder.json with vocab.bpe, vocab.json "
        "with merges.txt, a SentencePiece .model, and a .tiktoken rank file"
    )


def _on_the_hub(name: str) -> Located:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError(
            f"{name} is no file or directory, no encoding (known are gpt2, {', '.join(ENCODINGS)}), and no "
            "tokenizer on the Hub, whose name is written org/name"
        )
    # A SentencePiece model alone is read here: what transformers makes of one depends on the model's class.
    try:
        hf_hub_download(name, "tokenizer.json")
    except LocalEntryNotFoundError:
        pass
    except EntryNotFoundError:
        try:
            return _file(Path(hf_hub_download(name, "tokenizer.model")), None)
        except EntryNotFoundError:
            pass
    except Exception:  # whatever it is, AutoTokenizer meets it again
        pass
    return Located("huggingface", name)


def load_huggingface(source: str) -> PreTrainedTokenizerFast:
    """What AutoTokenizer loads from a directory or the Hub.

    Raises:
        ValueError: if it loads none, or one that is not of the `tokenizers` library.
    """
    try:
        loaded = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # tokenizers raises nothing narrower for a broken file
        if Path(source).exists():
            raise ValueError(f"the tokenizer.json in {source} cannot be read: {error}") from error
        raise ValueError(
            f"{source} is no file or directory, and no tokenizer on the Hub that could be loaded: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise ValueError(
            f"{source} is a {type(loaded).__name__}, not of the tokenizers library: it cannot be imported"
        )
    for name in ("is_local", "local_files_only", "name_or_path"):
        loaded.init_kwargs.pop(name, None)  # how it was loaded here, which would be saved with it
    return loaded
