"""nanochat's tokenizer: its ranks as tiktoken writes them, from and to a plain `tokenizer.json`.

nanochat keeps a pickled `tiktoken.Encoding`, `tokenizer.pkl`. Reading it would run what is in it, so it is
neither read nor written; `docs/conversion.md` has the lines that make `tokenizer.tiktoken` of it and it of
that, to be run where nanochat is installed. What belongs here: finding and reading that file, the split
pattern and the special tokens around it, and writing it.
"""

import base64
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tessera.tokenization.byte_level import Encoding, backend_from_ranks, read_ranks
from tessera.tokenization.chat import NANOCHAT_TOKENS, add_chat, find_end_of_turn
from tessera.tokenization.reference_codecs import huggingface_codec
from tessera.tokenization.save import wrap
from tessera.tokenization.token_bytes import bytes_of_name
from tessera.tokenization.verify import require_same

from .checkpoints import FoundTokenizer

RANKS = "tokenizer.tiktoken"
PICKLE = "tokenizer.pkl"

# As GPT-4's, with numbers of two digits and single line breaks. Its possessive quantifiers are left out:
# nothing that they give up could match otherwise, and not every engine has them.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def find_tokenizer(folder: Path, vocab_size: int) -> FoundTokenizer:
    """Finds the tokenizer of a checkpoint.

    Args:
        folder: of the checkpoint; looked into are this, its `tokenizer/`, and the `tokenizer/` of nanochat's
            own directory, two levels up.
        vocab_size: of the model.

    Raises:
        ValueError: if the rank file is damaged, or of another vocabulary than the model.
    """
    if (folder / "tokenizer.json").is_file():
        return FoundTokenizer()
    places = [folder, folder / "tokenizer"]
    if folder.resolve().parent.name.endswith("_checkpoints"):
        places.append(folder.resolve().parents[1] / "tokenizer")
    for file in (place / RANKS for place in places):
        if file.is_file():
            tokenizer = read_tokenizer(file)
            if len(tokenizer) != vocab_size:
                raise ValueError(
                    f"{file} and nanochat's special tokens make {len(tokenizer)} tokens, but the model has "
                    f"vocab_size {vocab_size}: the file belongs to another model"
                )

            def write(target: Path, tokenizer: PreTrainedTokenizerBase = tokenizer) -> None:
                tokenizer.save_pretrained(target)

            # As nanochat's engine: at the end of an answer, or where another document begins.
            stops = [find_end_of_turn(tokenizer), tokenizer.bos_token_id]
            return FoundTokenizer(write, tokenizer.bos_token_id, stops)
    if any((place / PICKLE).is_file() for place in places):
        note = (
            f"{PICKLE} is a pickle, which is not read, so the result has no tokenizer: where nanochat is "
            f"installed write its ranks to {RANKS} beside it (two lines, in docs/conversion.md) and convert "
            "again"
        )
        return FoundTokenizer(notes=[note])
    return FoundTokenizer()


def read_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """nanochat's tokenizer of a rank file: its ranks, then its special tokens, with its chat template.

    Raises:
        ValueError: if the file is damaged.
    """
    ranks = read_ranks(file.read_bytes(), str(file))
    special = {token: len(ranks) + place for place, token in enumerate(NANOCHAT_TOKENS)}
    encoding = Encoding("nanochat", PATTERN, len(ranks), special)
    return add_chat(wrap(backend_from_ranks(ranks, encoding, chat=False)), "nanochat")


def write_ranks(folder: Path) -> list[str]:
    """Writes `tokenizer.tiktoken` beside a `tokenizer.json` that nanochat's tokenizer can be.

    Args:
        folder: with the `tokenizer.json`; without one there is nothing to write.

    Returns:
        What to say, in sentences: why there is no such file, if there is none.
    """
    if not (folder / "tokenizer.json").is_file():
        return []
    reason = _write_ranks(folder)
    return [] if reason is None else [f"{RANKS}, which nanochat needs, is not written: {reason}"]


def _write_ranks(folder: Path) -> str | None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    backend = tokenizer.backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or backend.decoder is None:
        return "the tokenizer is not a byte-level BPE"
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    ranks = {bytes_of_name(name): index for name, index in model["vocab"].items() if name not in special}
    first = len(ranks)
    expected = {token: first + place for place, token in enumerate(NANOCHAT_TOKENS)}
    if special != expected:
        return "its special tokens are not nanochat's, right after the others"
    file = folder / RANKS
    lines = (
        base64.b64encode(token) + b" %d\n" % rank
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    )
    file.write_bytes(b"".join(lines))
    given, written = huggingface_codec(tokenizer), huggingface_codec(read_tokenizer(file), RANKS)
    try:
        require_same(given, written, RANKS)
    except ValueError as error:
        file.unlink()
        return f"with nanochat's rules it would be another tokenizer ({str(error).splitlines()[0]})"
    return None
