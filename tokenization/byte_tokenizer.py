"""The byte tokenizer: 256 tokens, the id of a token is its byte, and special tokens come after them.

Two views of one tokenizer. The file, `tokenizer.json` (byte-level BPE without merges), is what everybody
loads with `AutoTokenizer`, with or without this package. `ByteTokenizer` reads the same file and handles
megabytes at the speed of `bytes`; the backend takes about a second and over 100 MB of memory for each.

What may change here is speed. Ids may not, because models are trained on them: a fast path gives what the
backend gives, and whatever it cannot do goes to the backend.
"""

import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer, decoders, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy, is_torch_tensor

from .token_bytes import CHARACTER_TO_BYTE, bytes_of_name

if TYPE_CHECKING:
    import torch

BYTE_VOCAB_SIZE = 256

# arguments that an encoding without padding and truncation does not depend on
_PADDING_AND_TRUNCATION_DETAILS = {"stride", "pad_to_multiple_of", "padding_side"}


def build_byte_tokenizer(
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
    extra_special_tokens: Sequence[str] = (),
    padding_side: str = "left",
    model_max_length: int | None = None,
) -> "ByteTokenizer":
    """Make a byte tokenizer.

    Special tokens get the ids from 256 on in the order bos, eos, pad, extra; those not given take no id.
    Encoding adds none of them, unless `tokenizer.add_bos_token` or `tokenizer.add_eos_token` is set to True.

    Args:
        bos_token: Text of the token that begins a document.
        eos_token: Text of the token that ends a document.
        pad_token: Text of the token that fills up a batch.
        extra_special_tokens: Texts of further special tokens, such as those of a chat template.
        padding_side: "left", which batched generation needs, or "right".
        model_max_length: Longest sequence that the model takes, in tokens; None for no limit.

    Returns:
        The tokenizer. Its `vocab_size` is 256, and `len(tokenizer)` counts the special tokens too.

    Raises:
        ValueError: If a special token is not a string, is empty, is given twice, is a single byte or the name
            of one in the vocabulary, or would not be decoded to its own text; or if `padding_side` or
            `model_max_length` is out of range.
    """
    if isinstance(extra_special_tokens, str):
        raise ValueError(
            f"extra_special_tokens must be a list of strings, got the string {extra_special_tokens!r}; "
            f"write [{extra_special_tokens!r}]"
        )
    if model_max_length is not None and model_max_length < 1:
        raise ValueError(f"model_max_length must be at least 1, or None for no limit; got {model_max_length}")

    roles: dict[str, Any] = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
    roles = {role: token for role, token in roles.items() if token is not None}
    tokens = [*roles.values(), *extra_special_tokens]
    for index, token in enumerate(tokens):
        _check_special_token(token, before=tokens[:index])
    if extra_special_tokens:
        roles["extra_special_tokens"] = list(extra_special_tokens)

    backend = _build_backend()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return ByteTokenizer(
        tokenizer_object=backend,
        padding_side=padding_side,
        model_max_length=model_max_length,
        # the default of transformers 5, written into the file for readers whose default has token_type_ids
        model_input_names=["input_ids", "attention_mask"],
        **roles,
    )


def _check_special_token(token: str, before: Sequence[str]) -> None:
    """Raise ValueError unless `token` can be a special token next to the bytes and the tokens `before` it."""
    if not isinstance(token, str) or not token:
        raise ValueError(f"a special token must be a string of at least one character, got {token!r}")
    if token in before:
        raise ValueError(
            f"the special token {token!r} is given twice; for one token in two roles, give it once and "
            "assign the other role afterwards, as in `tokenizer.pad_token = tokenizer.eos_token`"
        )
    if token in CHARACTER_TO_BYTE or len(token.encode("utf-8")) == 1:
        raise ValueError(
            f"the special token {token!r} is a single byte, or the name of one in the vocabulary, so that "
            "text with it would no longer be encoded as bytes; choose a longer one, such as '<|end|>'"
        )
    if bytes_of_name(token) != token.encode("utf-8"):
        raise ValueError(
            f"the special token {token!r} would not be decoded to its own text, because byte-level decoders "
            "take characters from U+00A1 to U+0143 for names of bytes; choose one without, such as '<|end|>'"
        )


def _build_backend() -> Tokenizer:
    """Byte-level BPE over the 256 bytes, without merges."""
    backend = Tokenizer(models.BPE(vocab=CHARACTER_TO_BYTE, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _id_array(token_ids: "Sequence[int] | np.ndarray | torch.Tensor") -> np.ndarray:
    """One sequence of ids as an integer array (T,)."""
    ids = np.asarray(token_ids.detach().cpu() if is_torch_tensor(token_ids) else token_ids)
    if ids.ndim != 1 or (ids.size > 0 and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"expected one sequence of integer ids, got {type(token_ids).__name__} "
            f"of shape {ids.shape} and type {ids.dtype}"
        )
    return ids


class _LazyBatchEncoding(BatchEncoding):
    """A `BatchEncoding` that has the ids, and runs the backend if anything else is asked of it.

    So `tokens()`, `word_ids()`, `char_to_token()` (which assistant masks are made with) and the like answer
    as after the backend, and only who calls them pays for it.
    """

    _make_encodings: Callable[[], BatchEncoding] | None = None
    _made_encodings: list[Encoding] | None = None

    @property
    def _encodings(self) -> list[Encoding] | None:
        if self._make_encodings is not None:
            self._made_encodings = self._make_encodings().encodings
            self._make_encodings = None
        return self._made_encodings

    @_encodings.setter
    def _encodings(self, encodings: list[Encoding] | None) -> None:
        self._made_encodings = encodings


class ByteTokenizer(PreTrainedTokenizerFast):
    """A byte tokenizer that encodes and decodes at the speed of `bytes`.

    Make one with `build_byte_tokenizer`, or load a saved one with `ByteTokenizer.from_pretrained`. It gives
    what the `AutoTokenizer` of the same directory gives. These calls are fast:

    - encoding a text or a list of texts without padding, truncation, pairs or offsets, to lists or to "np" or
      "pt" tensors, if no added token occurs in the text (or `split_special_tokens` is set);
    - decoding;
    - `encode_bytes` and `decode_bytes`, which are for corpora: arrays and bytes, and nothing between.

    Tokens may be added, but the parts of `backend_tokenizer` are not to be replaced. There is no `__init__`
    here, because transformers would then not read tokenizer.json.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "ByteTokenizer":
        """Load a byte tokenizer.

        Args:
            *args: The directory, or the name on the Hub.
            **kwargs: Those of `PreTrainedTokenizerFast.from_pretrained`.

        Returns:
            The tokenizer.

        Raises:
            ValueError: If what was loaded is not a byte tokenizer.
        """
        tokenizer = super().from_pretrained(*args, **kwargs)
        tokenizer._require_byte_backend()
        return tokenizer

    def encode_bytes(self, data: bytes | bytearray | memoryview | str) -> np.ndarray:
        """Encode a corpus. The text of special tokens is encoded as bytes like all else, and none is added.

        Args:
            data: Bytes, or a text, which is encoded as UTF-8.

        Returns:
            The ids, uint8 (T,). The array is read-only: it shares the memory of bytes, without a copy.

        Raises:
            ValueError: If `data` is neither bytes nor a text, or is a text with a lone surrogate, which has
                no UTF-8 form.
        """
        self._require_byte_backend()
        if isinstance(data, str):
            data = data.encode("utf-8")
        elif not isinstance(data, (bytes, bytearray, memoryview)):
            raise ValueError(f"expected bytes or a string, got {type(data).__name__}")
        return np.frombuffer(bytes(data), dtype=np.uint8)

    def decode_bytes(
        self, token_ids: "Sequence[int] | np.ndarray | torch.Tensor", skip_special_tokens: bool = False
    ) -> bytes:
        """Decode to the bytes that the ids stand for, be they UTF-8 or not.

        Args:
            token_ids: One sequence of ids (T,): integers, an array or a tensor.
            skip_special_tokens: Whether to leave out special tokens; if not, they are decoded to their text.

        Returns:
            The bytes. (`decode` gives a text, with U+FFFD in place of what is not UTF-8.)

        Raises:
            ValueError: If this is not one sequence of integers, or one of them is not in the vocabulary.
        """
        self._require_byte_backend()
        added_tokens = self.added_tokens_decoder
        skipped = [index for index, token in added_tokens.items() if skip_special_tokens and token.special]
        if isinstance(token_ids, (list, tuple)) and all(index >= BYTE_VOCAB_SIZE for index in skipped):
            try:  # a third of the time that making an array takes
                return bytes(token_ids)
            except (TypeError, ValueError):
                pass  # ids beyond the bytes, or no ids

        ids = _id_array(token_ids)
        if skipped:
            ids = ids[~np.isin(ids, skipped)]
        as_bytes = ids.astype(np.uint8)
        pieces, start = [], 0
        for position in np.flatnonzero((ids < 0) | (ids >= BYTE_VOCAB_SIZE)).tolist():
            token = added_tokens.get(int(ids[position]))
            if token is None:
                raise ValueError(f"id {ids[position]} is not in the vocabulary of {len(self)} tokens")
            pieces += [as_bytes[start:position].tobytes(), bytes_of_name(token.content)]
            start = position + 1
        return b"".join([*pieces, as_bytes[start:].tobytes()])

    def decode(
        self,
        token_ids: "int | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | torch.Tensor",
        skip_special_tokens: bool = False,
        **kwargs: Any,
    ) -> str | list[str]:
        """Decode to text as `bytes.decode("utf-8", errors="replace")` does: U+FFFD for what is not UTF-8.

        Args:
            token_ids: One id, one sequence of ids (T,), or a batch of sequences (B, T).
            skip_special_tokens: Whether to leave out special tokens; if not, they are decoded to their text.
            **kwargs: Those of `PreTrainedTokenizerFast.decode`.

        Returns:
            The text, or for a batch the list of texts. Ids that are not in the vocabulary give nothing.
        """
        # the parent begins by making a list of Python integers, which costs more than all the rest
        text = self._decode_fast(token_ids, skip_special_tokens, **kwargs)
        return super().decode(token_ids, skip_special_tokens, **kwargs) if text is None else text

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        text = self._decode_fast(token_ids, skip_special_tokens, **kwargs)
        return super()._decode(token_ids, skip_special_tokens, **kwargs) if text is None else text

    def _decode_fast(
        self,
        token_ids: Any,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str | None:
        """The text of one sequence, or None for what the backend is to decode or to refuse."""
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        if clean_up_tokenization_spaces:
            return None
        if isinstance(token_ids, (list, tuple)) and token_ids and isinstance(token_ids[0], (list, tuple)):
            return None  # a batch
        try:
            return self.decode_bytes(token_ids, skip_special_tokens).decode("utf-8", errors="replace")
        except (TypeError, ValueError):
            return None

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        self._require_byte_backend()
        encoded = self._encode_fast(text, **kwargs) if text_pair is None else None
        return super()._encode_plus(text, text_pair=text_pair, **kwargs) if encoded is None else encoded

    def _encode_fast(
        self,
        text: Any,
        *,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        verbose: bool = True,
        split_special_tokens: bool | None = None,
        **kwargs: Any,
    ) -> BatchEncoding | None:
        """The encoding of a text or a list of texts, or None for what the backend is to encode or refuse."""
        if return_token_type_ids is None:
            return_token_type_ids = "token_type_ids" in self.model_input_names
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens

        pads = padding_strategy != PaddingStrategy.DO_NOT_PAD
        truncates = truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE
        # offsets, lengths, words, sanitized chats, ..., and what later versions may add
        wants_more = any(kwargs[name] for name in kwargs.keys() - _PADDING_AND_TRUNCATION_DETAILS)
        if pads or truncates or wants_more or return_token_type_ids:
            return None

        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts:
            return None
        if not all(isinstance(one, str) for one in texts):
            return None
        for token in self.added_tokens_decoder.values():
            is_split = split_special_tokens and token.special
            if not is_split and any(token.content in one for one in texts):
                return None
        try:
            rows = [one.encode("utf-8") for one in texts]
        except UnicodeEncodeError:
            return None

        before, after = self._tokens_around_text() if add_special_tokens else ([], [])
        if return_tensors not in ("np", "pt"):
            input_ids = [[*before, *row, *after] for row in rows]
            attention_mask = [[1] * len(ids) for ids in input_ids]
        else:
            ends = np.array(before, dtype=np.int64), np.array(after, dtype=np.int64)
            input_ids = [np.concatenate([ends[0], np.frombuffer(row, np.uint8), ends[1]]) for row in rows]
            attention_mask = [np.ones_like(ids) for ids in input_ids]
        for ids in input_ids:
            self._eventual_warn_about_too_long_sequence(ids, max_length, verbose)

        data = {"input_ids": input_ids}
        if return_attention_mask:
            data["attention_mask"] = attention_mask
        if isinstance(text, str) and return_tensors is None:
            data = {name: batch[0] for name, batch in data.items()}
        encoded = _LazyBatchEncoding(data, tensor_type=return_tensors, n_sequences=1)
        encoded._make_encodings = partial(
            super()._encode_plus,
            text,
            add_special_tokens=add_special_tokens,
            split_special_tokens=split_special_tokens,
            verbose=False,
        )
        return encoded

    def _tokens_around_text(self) -> tuple[list[int], list[int]]:
        """The ids that the backend puts before and after a text."""
        if self._tokenizer.num_special_tokens_to_add(False) == 0:
            return [], []
        # Asked of the backend: after loading, `add_bos_token` and `add_eos_token` are False whatever the file
        # does. It first has to forget the padding and truncation of the last call.
        self.set_truncation_and_padding(
            PaddingStrategy.DO_NOT_PAD, TruncationStrategy.DO_NOT_TRUNCATE, None, 0, None, None
        )
        probe = self._tokenizer.encode("a")
        middle = probe.special_tokens_mask.index(0)
        return probe.ids[:middle], probe.ids[middle + 1 :]

    def _save_pretrained(
        self,
        save_directory: str | PathLike[str],
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        # The parent has just written tokenizer_config.json, with the name of a class that only this package
        # has. This alias is known to transformers 4 and 5, "TokenizersBackend" to 5 alone.
        config_file = Path(file_names[0])
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        config_file.write_text(text + "\n", encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)

    def _require_byte_backend(self) -> None:
        """Raise ValueError unless the backend is, special tokens aside, the one that this room builds."""
        if not self._has_byte_backend:
            raise ValueError(
                "this is not a byte tokenizer: expected byte-level BPE without merges over the 256 bytes, "
                f"each with its byte as id, got another tokenizer, of {self.vocab_size} tokens; load it with "
                "transformers.AutoTokenizer"
            )

    @cached_property
    def _has_byte_backend(self) -> bool:
        ours, theirs = (json.loads(backend.to_str()) for backend in (_build_backend(), self._tokenizer))
        return all(ours[part] == theirs[part] for part in ("normalizer", "pre_tokenizer", "model", "decoder"))
