"""Tokenizers: text to ids and back, each saved as a `tokenizer.json` that plain `AutoTokenizer` loads.

Names are imported on first use, so that `import tessera.tokenization` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .byte_tokenizer import ByteTokenizer, build_byte_tokenizer
    from .chat import SPECIAL_TOKENS, add_chat, chat_template, find_end_of_turn, load_chat_tokenizer
    from .importing import import_tokenizer
    from .save import save_tokenizer
    from .train import train_tokenizer
    from .verify import verify_tokenizers

_ROOM_OF = {
    "ByteTokenizer": "byte_tokenizer",
    "SPECIAL_TOKENS": "chat",
    "add_chat": "chat",
    "build_byte_tokenizer": "byte_tokenizer",
    "chat_template": "chat",
    "find_end_of_turn": "chat",
    "import_tokenizer": "importing",
    "load_chat_tokenizer": "chat",
    "save_tokenizer": "save",
    "train_tokenizer": "train",
    "verify_tokenizers": "verify",
}

__all__ = [
    "SPECIAL_TOKENS",
    "ByteTokenizer",
    "add_chat",
    "build_byte_tokenizer",
    "chat_template",
    "find_end_of_turn",
    "import_tokenizer",
    "load_chat_tokenizer",
    "save_tokenizer",
    "train_tokenizer",
    "verify_tokenizers",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
