"""From what a run is told to what it reads: a tokenizer that fits the model, text as one stream of tokens."""

from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from tessera.data.text import Tokens
from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.tokenization import build_byte_tokenizer


def load_tokenizer(given: str | None, config: TesseraConfig):
    """The tokenizer of a run, and the configuration with a vocabulary that it fits.

    Raises:
        ValueError: if it cannot be loaded, or has more tokens than the model.
    """
    if given is None:
        if config.vocab_size != 256:
            values = {**config.to_dict(), "vocab_size": 256, "padded_vocab_size": None}
            values.update(bos_token_id=None, eos_token_id=None, pad_token_id=None)
            config = TesseraConfig.from_dict(values)
        return build_byte_tokenizer(), config
    try:
        tokenizer = AutoTokenizer.from_pretrained(given)
    except Exception as error:  # tokenizers raises nothing narrower for a broken file
        reason = str(error).splitlines()[0]
        if Path(given).is_dir():
            reason = "that directory holds no tokenizer that transformers can read"
        raise ValueError(f"tokenizer {given} cannot be loaded: {reason}") from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"tokenizer {given} has {len(tokenizer)} tokens, the model's vocabulary only {config.vocab_size}"
        )
    return tokenizer, config


def encode(tokenizer, documents: list[bytes]) -> Tokens:
    """All documents as one stream; an end-of-text token, or a line break for bytes, stands between them."""
    num_bytes = sum(map(len, documents)) + len(documents) - 1
    eos = tokenizer.eos_token_id
    # Bytes are their own ids, whatever they say; for other tokenizers a text that spells a control token is
    # text.
    encode_one = getattr(tokenizer, "encode_bytes", None) or (
        lambda document: tokenizer(
            document.decode("utf-8", errors="replace"),
            add_special_tokens=False,
            split_special_tokens=True,
            verbose=False,
        )["input_ids"]
    )
    between = np.asarray(encode_one(b"\n") if eos is None else [eos], dtype=np.uint32)
    parts = []
    for document in documents:
        parts += [np.asarray(encode_one(document), dtype=np.uint32), between]
    ids = np.concatenate(parts[:-1] if eos is None else parts)
    return Tokens(ids.astype(np.uint8) if len(tokenizer) <= 256 else ids, num_bytes)
