"""The chat format: its special tokens, the template that writes a conversation, the one that reads an answer.

What belongs here is what a model learns to converse in. Nobody else joins these tokens to text: all render
with `tokenizer.apply_chat_template` and take answers apart with `tokenizer.parse_response`, which follow what
is saved with the tokenizer, so that both are the same for readers without this package. Tokens are appended
to the list, never moved: their order is that of the ids in trained tokenizers.
"""

from functools import cache
from importlib.resources import files
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

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


@cache
def chat_template() -> str:
    """The Jinja template of a conversation; what it takes and gives is told at its top."""
    return files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8")


def add_chat(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Gives a tokenizer the chat format, in place.

    Special tokens that it lacks get the ids after its last one. Roles that it has filled (which token ends a
    document, which one pads) stay. Padding goes to the left, which batched generation needs.

    Args:
        tokenizer: any tokenizer of the `tokenizers` library.

    Returns:
        The tokenizer. One that has a chat template comes back unchanged, for its model was trained on that.
    """
    if tokenizer.chat_template:
        return tokenizer
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
    if tokenizer.eos_token is None:
        tokenizer.eos_token = END_OF_TEXT
    if tokenizer.pad_token is None:
        tokenizer.pad_token = PAD
    roles = set(tokenizer.special_tokens_map.values())
    own = [str(token) for token in tokenizer.extra_special_tokens if str(token) not in roles]
    new = [token for token in SPECIAL_TOKENS if token not in roles and token not in own]
    tokenizer.extra_special_tokens = own + new
    tokenizer.chat_template = chat_template()
    tokenizer.response_template = RESPONSE_TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer
