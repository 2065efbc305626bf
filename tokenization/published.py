"""Tokenizers that others have published, which figures of one's own are put beside.

What belongs here: which they are, and getting them without waiting: what is neither on this machine nor to be
had at once is left out, with a sentence.
"""

from collections.abc import Callable

from .byte_level import find_encoding
from .reference_codecs import Codec, huggingface_codec, open_codec

# By the names of tiktoken, and of the Hub.
PUBLISHED = ("gpt2", "cl100k_base", "o200k_base", "mistralai/Mistral-7B-v0.1")
_FILE = "tokenizer.json"
_SECONDS = 5  # for the Hub to answer, once


def open_published(beside: str, report: Callable[[str], object]) -> list[Codec]:
    """GPT-2's, cl100k, o200k and Mistral's tokenizer, as far as they are to be had.

    Args:
        beside: name of the tokenizer that they are put beside, which is not opened again.
        report: is told, in a sentence, of each that is not to be had.
    """
    codecs = []
    for name in PUBLISHED:
        own = find_encoding(name)
        if name == beside or (own is not None and find_encoding(beside) == own):
            continue
        try:
            codecs.append(_open_from_hub(name) if own is None else open_codec(name))
        except ValueError as error:
            report(f"without {name}: {error}")
    return codecs


def _open_from_hub(name: str) -> Codec:
    """A tokenizer of the Hub by its one file, from the cache or asked for once.

    Raises:
        ValueError: if it is not to be had.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from transformers import PreTrainedTokenizerFast

    path = try_to_load_from_cache(name, _FILE)
    if not isinstance(path, str):
        try:
            # hf_hub_download alone would try for half a minute where there is no network.
            get_hf_file_metadata(hf_hub_url(name, _FILE), timeout=_SECONDS)
            path = hf_hub_download(name, _FILE)
        except Exception as error:  # of the client, or of the one of two libraries that it sends with
            reason = next(iter(str(error).strip().splitlines()), "")
            raise ValueError(
                f"it is not in the Hub's cache here, and cannot be fetched ({type(error).__name__}: {reason})"
            ) from error
    try:
        return huggingface_codec(PreTrainedTokenizerFast(tokenizer_file=path), name)
    except Exception as error:  # tokenizers raises nothing narrower for a broken file
        raise ValueError(f"{path} cannot be read: {error}") from error
