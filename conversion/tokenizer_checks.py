"""Tokenizers of source and result: the same ids, and none past the embedding.

What belongs here: what is asked of a tokenizer that travels with a model.
"""

from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tessera.modeling.loading import read_json

from .checkpoints import Checkpoint
from .report import Check

# Short, of several scripts, with what tokenizers treat in ways of their own: runs of spaces, digits, signs.
SAMPLE_TEXT = (
    "A mill by the brook ground 1,250 sacks of rye in 1887, and the miller's son counted them twice.\n"
    "    def area(width, height):  return width * height\n"
    "Größe und Maß; élève, naïve; мельница у ручья; 水车在小溪边; ミル; 🌾🌾 -- 3.14159!\n"
)
# Any of these sets is one.
_FILES = (("tokenizer.json",), ("tokenizer.model",), ("spiece.model",), ("vocab.json", "merges.txt"))
_SETTINGS = "tokenizer_config.json"


def require_fitting_tokenizer(checkpoint: Checkpoint) -> None:
    """Refuses a tokenizer that is damaged, or gives ids that the model has no embedding for.

    Raises:
        ValueError: naming the file, or both sizes.
    """
    file = checkpoint.folder / "tokenizer.json"
    if file.is_file():
        try:
            Tokenizer.from_file(str(file))
        except Exception as error:  # the library has no class of its own for this
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file} is no tokenizer: {reason}; restore it, or take it away") from error
    tokenizer, _ = _load_theirs(checkpoint)
    if tokenizer is not None:
        _require_size(tokenizer, checkpoint)


def compare_tokenizers(source: Checkpoint, result: Checkpoint) -> tuple[list[Check], list[str], list[int]]:
    """Compares the tokenizers beside two checkpoints.

    Returns:
        The checks, notes on what could not be compared, and the ids of the sample text where there are some.

    Raises:
        ValueError: if the result's has ids past the model's.
    """
    ours, why = load_tokenizer(result.folder)
    theirs, why_theirs = _load_theirs(source)
    if ours is not None:
        _require_size(ours, result)
    if theirs is None and ours is None:
        reason = why_theirs or why
        note = f"the tokenizer could not be loaded, so its ids are not compared: {reason}"
        return [], [note] if reason else [], []
    ids, refusal = _encode(ours)
    if theirs is None:  # it comes in another form, which only its own conversion reads
        return [], [f"{refusal}, so no text is run"] if refusal else [], ids
    expected, expected_refusal = _encode(theirs)
    if ours is None:
        return [Check("tokenizer", False, why or "the result has none")], [], expected
    # One that has no token for what it does not know is whole all the same.
    notes = [f"{refusal}, so its vocabulary is compared and no ids"] if refusal else []
    differing = [
        what
        for what, one, other in (
            ("ids", (expected, expected_refusal), (ids, refusal)),
            ("vocabulary", theirs.get_vocab(), ours.get_vocab()),
            ("special tokens", theirs.special_tokens_map, ours.special_tokens_map),
            ("chat template", theirs.chat_template, ours.chat_template),
        )
        if one != other
    ]
    equal = f"{len(ours):,} tokens, equal {'vocabulary' if refusal else 'ids'}"
    found = f"{' and '.join(differing)} differ" if differing else equal
    return [Check("tokenizer", not differing, found)], notes, ids


def _encode(tokenizer: PreTrainedTokenizerBase | None) -> tuple[list[int], str]:
    """The ids of the sample text, or why there are none."""
    if tokenizer is None:
        return [], ""
    try:
        return tokenizer(SAMPLE_TEXT)["input_ids"], ""
    except Exception as error:  # the library has no class of its own for this
        return [], f"the tokenizer does not encode the sample text: {' '.join(str(error).split())[:120]}"


def _load_theirs(source: Checkpoint) -> tuple[PreTrainedTokenizerBase | None, str]:
    """The tokenizer of a source, or why transformers does not load it: not in a form that is its own."""
    return (None, "") if source.write_tokenizer is not None else load_tokenizer(source.folder)


def load_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerBase | None, str]:
    """The tokenizer of a directory as transformers loads it, or why it does not."""
    if not any(all((folder / name).is_file() for name in names) for names in _FILES):
        return None, ""
    try:
        # Code that comes with a tokenizer is not run, and nobody is asked whether it shall be.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False), ""
    except Exception as error:  # whatever a tokenizer of any kind raises
        if (folder / _SETTINGS).is_file() and "auto_map" in read_json(folder / _SETTINGS):
            return None, f"it needs code of its own (auto_map in {_SETTINGS}), which is not run"
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _require_size(tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint) -> None:
    vocabulary = tokenizer.get_vocab()
    # Ids may have gaps, so the number of tokens says too little.
    token = max(vocabulary, key=vocabulary.__getitem__, default=None)
    if token is not None and vocabulary[token] >= checkpoint.config.vocab_size:
        raise ValueError(
            f"{checkpoint.folder}: the tokenizer's largest id is {vocabulary[token]:,} ({token!r}), but the "
            f"model has rows for {checkpoint.config.vocab_size:,} (vocab_size): one of them belongs to "
            "another model"
        )
