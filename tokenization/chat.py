"""Chat formats: their special tokens, the template that writes a conversation, the one that reads an answer.

Two of them: ChatML, with thoughts and tools, which every tokenizer gets that is made here; and nanochat's,
which one with nanochat's special tokens gets. What belongs here is what a model learns to converse in. Nobody
else joins these tokens to text: all render with `tokenizer.apply_chat_template` and take answers apart with
`tokenizer.parse_response`, which follow what is saved with the tokenizer, so that both are the same for
readers without this package. Tokens are appended to a list, never moved: their order is that of the ids in
trained tokenizers.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .byte_tokenizer import build_byte_tokenizer

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"

SPECIAL_TOKENS = (
    END_OF_TEXT,  # ends a document
    "<|im_start|>",  # ChatML: role, newline, content, end of turn
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<|python_start|>",  # a calculator or interpreter that runs inside of an answer
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
    # A token of its own, because collators that find padding by its id (transformers' own for language models
    # does) would hide each end of a document from the loss if both were one token, and the model never stop.
    PAD,
)

# White space around thoughts, calls and the end belongs to them, or it would count as content of its own.
RESPONSE_TEMPLATE: dict[str, Any] = {
    "version": 1,
    "start_anchor": "<|im_start|>assistant\n",
    "defaults": {"role": "assistant"},
    "fields": {
        "thinking": {"open": "<think>", "close_pattern": r"</think>\s*"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "repeats": True, "join": "\n"},
    },
}

# nanochat's, in the order of their ids there.
NANOCHAT_TOKENS = (
    "<|bos|>",  # stands before a document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)

# What an answer may hold of itself: thoughts, calls and code that a dataset has written out in its texts.
CONTENT_MARKS = tuple(
    token for token in SPECIAL_TOKENS if token not in (END_OF_TEXT, "<|im_start|>", "<|im_end|>", PAD)
)
# What begins and ends turns in either format.
TURN_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    *(token for token in NANOCHAT_TOKENS if token not in CONTENT_MARKS),
)

NANOCHAT_RESPONSE_TEMPLATE: dict[str, Any] = {
    "version": 1,
    "start_anchor": "<|assistant_start|>",
    "defaults": {"role": "assistant"},
    "fields": {
        "thinking": {"open": "<think>", "close_pattern": r"</think>\s*"},
        "content": {"close_pattern": r"<\|assistant_end\|>\s*", "repeats": True, "join": "\n"},
    },
}


@dataclass(frozen=True)
class ChatStyle:
    """A format: its tokens, its template's file, the template of answers, and which tokens have which role.

    Attributes:
        tokens: special tokens, in the order in which a tokenizer that lacks them gets them.
        roles: of `tokens`, given where a tokenizer has none in that role.
    """

    tokens: tuple[str, ...]
    template: str
    response_template: dict[str, Any]
    roles: dict[str, str]


STYLES = {
    "chatml": ChatStyle(
        SPECIAL_TOKENS,
        "chat_template.jinja",
        RESPONSE_TEMPLATE,
        {"eos_token": END_OF_TEXT, "pad_token": PAD},
    ),
    # What stands before each document stands after it as well. It pads too, rather than a token of its own:
    # nanochat's models have no row for one more.
    "nanochat": ChatStyle(
        NANOCHAT_TOKENS,
        "nanochat_template.jinja",
        NANOCHAT_RESPONSE_TEMPLATE,
        {"bos_token": "<|bos|>", "eos_token": "<|bos|>", "pad_token": "<|bos|>"},
    ),
}


@cache
def chat_template(style: str = "chatml") -> str:
    """The Jinja template of a conversation; what it takes and gives is told at its top."""
    return files(__package__).joinpath(STYLES[style].template).read_text(encoding="utf-8")


def add_chat(
    tokenizer: PreTrainedTokenizerBase, style: str | None = None, *, replace: bool = False
) -> PreTrainedTokenizerBase:
    """Gives a tokenizer a chat format, in place.

    Special tokens that it lacks get the ids after its last one. Roles that it has filled (which token ends a
    document, which one pads) stay. Padding goes to the left, which batched generation needs.

    Args:
        tokenizer: any tokenizer of the `tokenizers` library.
        style: "chatml" or "nanochat"; default: nanochat's for a tokenizer that has its special tokens, else
            ChatML.
        replace: put the template in the place of one that is there, such as one without generation marks.

    Returns:
        The tokenizer. One that has a chat template comes back unchanged, for its model was trained on that,
        unless it is to be replaced.

    Raises:
        ValueError: if there is no such style.
    """
    if style is not None and style not in STYLES:
        raise ValueError(f"there is no chat style {style!r}; there are {', '.join(STYLES)}")
    if tokenizer.chat_template and not replace:
        return tokenizer
    vocabulary = tokenizer.get_vocab()
    if style is None:
        style = "nanochat" if set(NANOCHAT_TOKENS) <= vocabulary.keys() else "chatml"
    chosen = STYLES[style]
    missing = [token for token in chosen.tokens if token not in vocabulary]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
    for role, token in chosen.roles.items():
        if getattr(tokenizer, role) is None:
            setattr(tokenizer, role, token)
    roles = set(tokenizer.special_tokens_map.values())
    own = [str(token) for token in tokenizer.extra_special_tokens if str(token) not in roles]
    new = [token for token in chosen.tokens if token not in roles and token not in own]
    tokenizer.extra_special_tokens = own + new
    tokenizer.chat_template = chat_template(style)
    tokenizer.response_template = chosen.response_template
    # The second is what is saved.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return tokenizer


def load_chat_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer that can chat: one that lacks a chat template gets one, as fine-tuning gives it.

    Args:
        source: directory of a tokenizer, model or run, name on the Hub, or `bytes`.

    Raises:
        ValueError: if there is none that can be loaded.
    """
    if str(source) == "bytes":
        return add_chat(build_byte_tokenizer())
    final = Path(source) / "final"
    try:
        tokenizer = AutoTokenizer.from_pretrained(final if final.is_dir() else source)
    except Exception as error:  # of the network, of the files, of any library in between
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{source} has no tokenizer that can be loaded: {reason}") from error
    return add_chat(tokenizer)


# A word that no template writes itself.
_PROBE = "tesseraprobe"


def find_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template writes behind an assistant's words, if it is a special one."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # what a template raises is jinja2's, or comes from what it calls
        if type(error).__module__.partition(".")[0] != "jinja2" and not isinstance(
            error, TypeError | KeyError | ValueError
        ):
            raise
        return None
    ids = tokenizer(text.rpartition(_PROBE)[2], add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None
