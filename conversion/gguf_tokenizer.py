"""A tokenizer as llama.cpp has it: the metadata `tokenizer.*` of a GGUF file.

What belongs here: which tokenizers llama.cpp gives the same ids as, and what of them the file states. Two
kinds come along. Byte-level BPE is `gpt2` there, and how it splits text is one of a fixed list of names, so a
pattern that is not in the table below is refused. BPE with byte fallback is `llama` there, which knows no
merges but a score for each token: it joins the neighbours that make the token with the highest score. That is
run here on hard texts, and must give the tokenizer's own ids.
"""

import heapq
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import first_sentence
from tessera.tokenization.byte_level import BYTE_NAMES, GPT2_PATTERN, GPT4_PATTERN
from tessera.tokenization.probes import adversarial_texts

from .checkpoints import Checkpoint

# LLAMA_TOKEN_TYPE_*
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_QWEN2_PATTERN = GPT4_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_DEEPSEEK_V3_PATTERNS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# What splits a text, one after the other; whether a word in the vocabulary is taken whole -> name. Two that
# split alike are told apart by what else the name means there.
_SPLITTERS = {
    ((GPT2_PATTERN,), False): "gpt-2",
    ((GPT4_PATTERN,), True): "llama-bpe",
    ((GPT4_PATTERN,), False): "smaug-bpe",
    ((_QWEN2_PATTERN,), False): "qwen2",
    (_DEEPSEEK_V3_PATTERNS, False): "deepseek-v3",
}
# A merge that no text needs: llama.cpp asks for the list, and the format has no empty one.
_NO_MERGE = "<no> <merge>"
# In no text, as UTF-8 has no such byte.
_IDLE_BYTE = 0xFF
# Characters of the texts that scores are tried on: the loop below is Python.
_LONGEST_PROBE = 600


@dataclass(frozen=True)
class TokenizerMetadata:
    """What a file states of a tokenizer.

    Attributes:
        values: key -> value or list.
        notes: what is not quite the same there, in sentences.
    """

    values: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint; None if it has none.

    Raises:
        ValueError: if it has one that does not load.
    """
    names = {path.name for path in checkpoint.side_files}
    if checkpoint.write_tokenizer is None and not any(name.startswith("tokenizer") for name in names):
        return None
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.copy_side_files(Path(folder))
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            raise ValueError(
                f"the tokenizer of {checkpoint.folder} does not load ({first_sentence(error)}); restore it, "
                "or write the file without, with --no-tokenizer"
            ) from error


def describe_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, config: TesseraConfig, try_joins: bool = True
) -> TokenizerMetadata:
    """The metadata of a tokenizer.

    Args:
        tokenizer: None for a file without, which llama.cpp runs on ids alone.
        config: of the model, for the length of its vocabulary.
        try_joins: whether joining by scores is tried, which takes seconds and comes out alike each time.

    Raises:
        ValueError: if llama.cpp would give other ids, or the vocabulary is longer than the model's.
    """
    if tokenizer is None:
        note = "the file has no tokenizer: llama.cpp runs it on ids alone"
        return TokenizerMetadata({"tokenizer.ggml.model": "none"}, (note,))
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise _refusal("it has no tokenizer.json")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = parts["model"], parts["added_tokens"]
    if model["type"] != "BPE":
        raise _refusal(f"it is of type {model['type']}, not BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _refusal(f"its BPE has {name} {model[name]!r}")
    for token in added:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _refusal(f"the token {token['content']!r} strips spaces or is a word of its own")
    texts, types = _vocabulary(model, added, config.vocab_size)
    values: dict[str, Any] = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": types}
    notes: list[str] = []
    if _steps(parts["pre_tokenizer"], "pretokenizers") and "ByteLevel" in json.dumps(parts["pre_tokenizer"]):
        values |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _splitter(parts)}
        values["tokenizer.ggml.merges"] = [_joined(merge) for merge in model["merges"]] or [_NO_MERGE]
        idle = BYTE_NAMES[_IDLE_BYTE]
        kinds = [step["type"] for step in _steps(parts["normalizer"], "normalizers")]
        if kinds == ["NFC"]:
            notes.append("llama.cpp does not compose characters (NFC) before it looks for tokens")
        elif kinds:
            raise _refusal(f"it normalises text ({', '.join(kinds)})")
    elif model.get("byte_fallback"):
        scores = _scores(model["merges"], texts, types)
        values |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": [scores[text] for text in texts],
        }
        idle = f"<0x{_IDLE_BYTE:02X}>"
        space = _puts_space_first(tokenizer, model["vocab"])
        values["tokenizer.ggml.add_space_prefix"] = space
        if try_joins:
            _require_same_joins(tokenizer, texts, types, scores, space)
        if space and any(kind == _CONTROL for kind in types):
            notes.append("llama.cpp puts a space after each special token, as it does before a text")
    else:
        raise _refusal("it is neither byte-level BPE nor BPE with byte fallback")
    for described, sentences in (_roles(tokenizer, config, texts, idle), _templates(tokenizer)):
        values |= described
        notes += sentences
    return TokenizerMetadata(values, tuple(notes))


def _refusal(reason: str) -> ValueError:
    return ValueError(
        f"llama.cpp has no tokenizer that gives the ids of this one: {reason}; with --no-tokenizer the file "
        "is written without, for ids alone"
    )


def _vocabulary(model: dict, added: list[dict], size: int) -> tuple[list[str], list[int]]:
    """Texts and types of all ids; an id without a token gets a name that no text has."""
    vocabulary = dict(model["vocab"])
    fallback = bool(model.get("byte_fallback"))
    types = dict.fromkeys(vocabulary, _NORMAL)
    if fallback:
        types |= {name: _BYTE for name in (f"<0x{byte:02X}>" for byte in range(256)) if name in vocabulary}
    for token in added:
        vocabulary[token["content"]] = token["id"]
        types[token["content"]] = _CONTROL if token["special"] else _USER_DEFINED
    if fallback and model.get("unk_token") in vocabulary:
        types[model["unk_token"]] = _UNKNOWN
    last = max(vocabulary.values(), default=-1)
    if last >= size:
        raise ValueError(
            f"the tokenizer has ids up to {last}, but the model a vocabulary of {size}; give the model rows "
            "for them, or the tokenizer that it was trained with"
        )
    texts = {index: text for text, index in vocabulary.items()}
    if len(texts) != len(vocabulary):
        raise _refusal("several of its tokens have the same id")
    names = [texts.get(index, f"[PAD{index}]") for index in range(size)]
    return names, [types[texts[index]] if index in texts else _UNUSED for index in range(size)]


def _steps(part: dict | None, members: str) -> list[dict]:
    """A step of `tokenizer.json` as a list of simple ones."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for member in part[members] for step in _steps(member, members)]
    return [part]


def _joined(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _splitter(parts: dict) -> str:
    """llama.cpp's name for how text is split before it is merged."""
    if not parts["model"]["merges"]:
        # Then a token is a byte, wherever text is split.
        return "gpt-2"
    patterns = []
    for step in _steps(parts["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel":
            if step["add_prefix_space"]:
                raise _refusal("it puts a space before a text")
            patterns += [GPT2_PATTERN] if step["use_regex"] else []
        elif step["type"] == "Split" and "Regex" in step["pattern"]:
            whole = (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))
            patterns.append(step["pattern"]["Regex"] if whole else f"{step['behavior']} split")
        else:
            patterns.append(step["type"])
    whole_words = bool(parts["model"].get("ignore_merges"))
    key = (tuple(patterns), whole_words)
    if whole_words and key not in _SPLITTERS and _merges_make_all(parts["model"]):
        key = (tuple(patterns), False)
    if key not in _SPLITTERS:
        raise _refusal(f"it splits text in a way that has no name there ({' then '.join(patterns) or 'not'})")
    return _SPLITTERS[key]


def _merges_make_all(model: dict) -> bool:
    """Whether merging makes each token from its own text; then it is the same to take words whole."""
    merging = Tokenizer(
        models.BPE(model["vocab"], [tuple(_joined(merge).split(" ")) for merge in model["merges"]])
    )
    texts = list(model["vocab"])
    encoded = merging.encode_batch(texts, add_special_tokens=False)
    return all(found.ids == [model["vocab"][text]] for text, found in zip(texts, encoded, strict=True))


def _roles(
    tokenizer: PreTrainedTokenizerBase, config: TesseraConfig, texts: list[str], idle: str
) -> tuple[dict[str, int | bool], list[str]]:
    """Ids of the tokens with a role, and whether a text gets a first and a last one; and what is left out.

    llama.cpp has a first and a last token in any case, and takes some id of its own where the file names
    none. Then the byte that is in no text stands for it.
    """
    with_special = tokenizer("a").input_ids
    plain = tokenizer("a", add_special_tokens=False).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    before, after = with_special[: -len(plain)], []
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            before, after = with_special[:start], with_special[start + len(plain) :]
            break
    if before not in ([], [bos]) or after not in ([], [eos]):
        raise _refusal(f"it puts the ids {before} before a text and {after} after it")
    ends = config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    eos = ends[0] if eos is None and ends else eos
    # It stops at any of three. The one that ends a message with a call has a name that it knows.
    further = sorted(
        (index for index in dict.fromkeys(ends) if index != eos),
        key=lambda i: texts[i : i + 1] == ["<|eom_id|>"],
    )
    free = texts.index(idle) if idle in texts else None
    ids = {
        "bos": config.bos_token_id if bos is None else bos,
        "eos": eos,
        "eot": further[0] if further else None,
        "eom": further[1] if len(further) > 1 else None,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    ids |= {name: free for name in ("bos", "eos") if ids[name] is None}
    values: dict[str, int | bool] = {
        f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items() if index is not None
    }
    values |= {
        "tokenizer.ggml.add_bos_token": before != [],
        "tokenizer.ggml.add_eos_token": after != [],
    }
    left = [f"{index} ({''.join(texts[index : index + 1])})" for index in further[2:]]
    if not left:
        return values, []
    return values, [f"the file states three tokens to stop at, so generation goes on after {', '.join(left)}"]


def _templates(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, str | list[str]], list[str]]:
    """Chat templates: the one without a name, and others under theirs; and what to say of those."""
    found = tokenizer.chat_template
    if not found:
        return {}, []
    if isinstance(found, str):
        return {"tokenizer.chat_template": found}, []
    named = {re.sub(r"[^A-Za-z0-9_]", "_", name): text for name, text in found.items()}
    if len(named) < len(found):
        raise ValueError(
            f"the chat templates {', '.join(sorted(found))} have names that are one and the same in a GGUF "
            "file; rename them, or write the file without a tokenizer, with --no-tokenizer"
        )
    values: dict[str, str | list[str]] = {}
    if "default" in named:
        values["tokenizer.chat_template"] = named.pop("default")
    if not named:
        return values, []
    values |= {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    values["tokenizer.chat_templates"] = sorted(named)
    how = "chosen by name alone"
    if "tokenizer.chat_template" not in values:
        how += ", as there is none called default"
    return values, [f"the chat templates {', '.join(sorted(named))} are in the file under their names: {how}"]


# ---- BPE with byte fallback ----


def _scores(merges: list, texts: list[str], types: list[int]) -> dict[str, float]:
    """A score for each token: the sooner merging makes it, the higher."""
    last = -float(len(merges) + 1)
    scores = {text: last if kind == _NORMAL else 0.0 for text, kind in zip(texts, types, strict=True)}
    for rank, merge in reversed(list(enumerate(merges))):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        scores[left + right] = -float(rank + 1)
    return scores


def _puts_space_first(tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, int]) -> bool:
    texts = {index: text for text, index in vocabulary.items()}
    first = tokenizer("a", add_special_tokens=False).input_ids[0]
    return texts.get(first, "").startswith("\u2581")


def _require_same_joins(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    types: list[int],
    scores: Mapping[str, float],
    space_first: bool,
) -> None:
    """Joins hard texts by scores, and compares the ids with the tokenizer's own."""
    ids = {text: index for index, text in enumerate(texts) if types[index] in (_NORMAL, _BYTE)}
    apart = [
        text for text, kind in zip(texts, types, strict=True) if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)
    ]
    probes = [
        probe
        for probe in adversarial_texts()
        if 0 < len(probe.text) <= _LONGEST_PROBE
        # What is found before anything is joined is not for this.
        and not any(text in probe.text for text in apart)
        # A mark that a text spells is a space to one of the two, in both tokenizers or in none.
        and "\u2581" not in probe.text
    ]
    found = tokenizer([probe.text for probe in probes], add_special_tokens=False).input_ids
    for probe, expected in zip(probes, found, strict=True):
        text = (" " if space_first else "") + probe.text
        if _join(text.replace(" ", "\u2581"), ids, scores) != expected:
            raise _refusal(f"joining by scores gives other ids for {probe.name}")


def _join(text: str, ids: Mapping[str, int], scores: Mapping[str, float]) -> list[int]:
    """The ids of a text: neighbours that make a token are joined, highest score first, then from the left."""
    pieces: list[str] = list(text)
    before = list(range(-1, len(pieces) - 1))
    after = list(range(1, len(pieces) + 1))
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left < 0 or right >= len(pieces):
            return
        joined = pieces[left] + pieces[right]
        if joined in ids:
            heapq.heappush(queue, (-scores[joined], left, right, joined))

    for place in range(len(pieces) - 1):
        offer(place, place + 1)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        if not pieces[left] or not pieces[right] or pieces[left] + pieces[right] != joined:
            continue
        pieces[left], pieces[right] = joined, ""
        after[left] = after[right]
        if after[right] < len(pieces):
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    result = []
    for piece in pieces:
        if piece in ids:
            result.append(ids[piece])
        else:
            result += [ids.get(f"<0x{byte:02X}>", -1) for byte in piece.encode("utf-8")]
    return result
