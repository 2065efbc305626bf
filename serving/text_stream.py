"""Tokens one by one into text piece by piece.

What belongs here: which text may be shown now. A character of several tokens waits for its last one, and
text that may be the beginning of a stop string waits until it is known not to be.
"""

from collections.abc import Collection, Sequence

# what tokenizers decode a broken or unfinished character to
REPLACEMENT = "\ufffd"
# Tokens of the text before that are decoded with the first of this one; some of them may be hidden.
_CONTEXT = 8


class TextStream:
    """The text of one answer as its tokens come.

    Args:
        tokenizer: for decoding.
        stop: strings at whose first occurrence the text ends, without them.
        hidden: ids that are no part of the text, such as special tokens.
        after: ids of a text that this one goes on from, if it does: some decoders drop the space that a text
            begins with, which is a space between words there.
    """

    def __init__(
        self,
        tokenizer,
        stop: Sequence[str] = (),
        hidden: Collection[int] = frozenset(),
        after: Sequence[int] = (),
    ):
        self.stopped = False
        self._tokenizer, self._stop, self._hidden = tokenizer, stop, hidden
        # Decoding starts one step back: some decoders treat the first token of a text in their own way.
        self._ids = [token for token in after[-_CONTEXT:] if token not in hidden]
        if self._decode(self._ids).endswith(REPLACEMENT):
            # A character whose last bytes come here: there is no seam between two texts.
            self._ids = []
        self._decoded = len(self._ids)
        self._held = ""

    def push(self, token: int) -> str:
        """Takes a token, and gives the text that can be shown because of it (often some, at times none)."""
        if self.stopped or token in self._hidden:
            return ""
        self._ids.append(token)
        text, before = self._decode(self._ids), self._decode(self._ids[: self._decoded])
        if text.endswith(REPLACEMENT) or len(text) <= len(before):
            return ""
        self._ids = self._ids[self._decoded :]
        self._decoded = len(self._ids)
        return self._release(text[len(before) :])

    def end(self) -> str:
        """What was held back, when no token follows."""
        if self.stopped:
            return ""
        rest = self._decode(self._ids)[len(self._decode(self._ids[: self._decoded])) :]
        self._ids, self._decoded = [], 0
        released = self._release(rest)
        rest, self._held = self._held, ""
        return released + rest

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _release(self, text: str) -> str:
        """Passes text on up to a stop string, or to what may become one."""
        text = self._held + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
