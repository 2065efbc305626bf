"""The tokenizers of Meta's and Mistral's releases, in: `tokenizer.model`, which is one of two things.

Until Llama 2, and of Mistral, it is a SentencePiece model; since Llama 3 it holds ranks in tiktoken's format,
whose split pattern and special tokens are in Meta's code. What belongs here: telling which it is, those
tokens, and the beginning-of-text token that these models expect before each text.
"""

import shutil
from pathlib import Path

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tessera.tokenization.byte_level import GPT4_PATTERN, Encoding, backend_from_ranks, read_ranks
from tessera.tokenization.locate import locate
from tessera.tokenization.save import wrap
from tessera.tokenization.sentencepiece_models import sentencepiece_tokenizer

from .checkpoints import FoundTokenizer

_PATTERNS = ("tokenizer.model", "tokenizer.model.v*", "*.model.v*")
_NUM_SPECIAL = 256
# By place after the ranks. Llama 3 calls those that 3.1 gave a use by the names of reserved ones.
_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    2: "<|reserved_special_token_0|>",
    3: "<|reserved_special_token_1|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
_NAMED_SINCE_3_1 = {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}


def find_tokenizer(folder: Path, vocab_size: int, since_3_1: bool) -> FoundTokenizer:
    """Finds `tokenizer.model` in a directory, or in the one above, where the first releases have it.

    Args:
        folder: of the checkpoint.
        vocab_size: of the model.
        since_3_1: whether it is of Llama 3.1 or later, if its tokenizer is of Llama 3.

    Raises:
        ValueError: if it is damaged, or has more tokens than the model. One in the directory above may belong
            to something else: it is taken only if it has as many tokens as the model, and left with a note
            otherwise.
    """
    files = [path for pattern in _PATTERNS for path in sorted(folder.glob(pattern))]
    above = folder.resolve().parent / _PATTERNS[0]
    if files:
        file, notes = files[0], [f"of several tokenizers {files[0].name} is read"] if len(files) > 1 else []
        tokenizer, stops = _read(file, since_3_1)
        if len(tokenizer) > vocab_size:
            raise ValueError(
                f"{file} has {len(tokenizer)} tokens, but the model has rows for {vocab_size}: it belongs to "
                "another model"
            )
    elif (folder / "tekken.json").is_file():
        return FoundTokenizer(notes=["tekken.json is not read: the result has no tokenizer.json"])
    elif above.is_file():
        where = f"{above.parent.name}/{above.name}, in the directory above,"
        try:
            tokenizer, stops = _read(above, since_3_1)
        except ValueError:
            return FoundTokenizer(notes=[f"{where} cannot be read: the result has no tokenizer"])
        if len(tokenizer) != vocab_size:
            found = (
                f"{where} has {len(tokenizer)} tokens and the model {vocab_size}: the result has no tokenizer"
            )
            return FoundTokenizer(notes=[found])
        file, notes = above, [f"the tokenizer is {where} which has as many tokens as the model"]
    else:
        return FoundTokenizer()
    put_bos_first(tokenizer)
    eos = tokenizer.convert_tokens_to_ids(stops)

    def write(target: Path) -> None:
        tokenizer.save_pretrained(target)
        if len(stops) == 1:
            # For readers of this form, such as llama.cpp's converter; ranks by this name mislead them.
            shutil.copyfile(file, target / _PATTERNS[0])

    return FoundTokenizer(write, tokenizer.bos_token_id, eos if len(eos) > 1 else eos[0], notes)


def _read(file: Path, since_3_1: bool) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """The tokenizer, and the tokens at which generation stops."""
    data = file.read_bytes()
    if locate(file).kind == "sentencepiece":
        tokenizer = sentencepiece_tokenizer(data, str(file))
        if tokenizer.bos_token is None or tokenizer.eos_token is None:
            raise ValueError(f"{file} has no tokens that begin and end a text")
        return tokenizer, [tokenizer.eos_token]
    ranks = read_ranks(data, str(file))
    special = _special_tokens(_NAMED | _NAMED_SINCE_3_1 if since_3_1 else _NAMED)
    encoding = Encoding(
        "llama3", GPT4_PATTERN, len(ranks), {token: len(ranks) + i for i, token in enumerate(special)}
    )
    backend = backend_from_ranks(ranks, encoding, chat=False)
    stops = [special[1], *(token for token in ("<|eom_id|>", "<|eot_id|>") if token in special)]
    return wrap(backend, bos_token=special[0], eos_token=special[1]), stops


def _special_tokens(named: dict[int, str]) -> list[str]:
    """All tokens after the ranks; the places without a name of their own are numbered on."""
    tokens, reserved = [], 2
    for place in range(_NUM_SPECIAL):
        if place in named:
            tokens.append(named[place])
        else:
            tokens.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return tokens


def put_bos_first(tokenizer: PreTrainedTokenizerFast) -> None:
    """Has a tokenizer put its beginning-of-text token before each text, where special tokens are added."""
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )
