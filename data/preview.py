"""Conversations as they are trained on, for eyes: in the terminal, and as a page that needs nothing else.

What belongs here: how tokens are shown. Which of them are trained on, `chat_rows.py` finds.
"""

import html
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from .chat import control_tokens
from .chat_rows import IGNORED, count_trained, encode_conversation, mark_conversation, refuse_spelled

GREEN, DIM, END = "\033[32m", "\033[2m", "\033[0m"


@dataclass(frozen=True)
class Piece:
    """The tokens of some whole characters: one, or several that share a character."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool


@dataclass(frozen=True)
class Shown:
    """A conversation to show.

    Attributes:
        place: where it was read.
        pieces: of the tokens that are kept.
        tokens, trained: how many are kept, and how many of them have a loss.
        whole: tokens before it was cut.
        otherwise: tokens that transformers' own mask, which TRL's `assistant_only_loss` uses, has otherwise.
    """

    place: str
    pieces: tuple[Piece, ...]
    tokens: int
    trained: int
    whole: int
    otherwise: int

    def counts(self) -> str:
        """One line."""
        line = (
            f"{self.tokens:,} tokens, {self.trained:,} trained on ({100 * self.trained / self.tokens:.1f} %)"
        )
        return line + (f", cut from {self.whole:,}" if self.whole > self.tokens else "")


def show_conversation(tokenizer, conversation: dict, max_length: int | None = None) -> Shown:
    """Takes a conversation apart.

    Args:
        tokenizer: with a chat template that has generation marks.
        conversation: `messages`, and `tools` where there are any.
        max_length: cut it there, as a row would be.

    Raises:
        ValueError: as `encode_conversation`: if nothing of it would be trained on, or everything; as
            `refuse_spelled`.
    """
    refuse_spelled(conversation, control_tokens(tokenizer))
    row = encode_conversation(tokenizer, conversation, max_length)
    marked = mark_conversation(tokenizer, conversation)
    theirs = tokenizer.apply_chat_template(
        conversation["messages"],
        tools=conversation.get("tools"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )["assistant_masks"]
    kept, special = len(row["input_ids"]), set(tokenizer.all_special_ids)
    pieces, first, written = [], 0, 0
    while first < kept:
        last, end = first + 1, marked.spans[first][1]
        while last < kept and marked.spans[last][0] < end:
            end = max(end, marked.spans[last][1])
            last += 1
        ids = tuple(marked.ids[first:last])
        # From where the piece before ended, so that what a tokenizer drops is shown too.
        pieces.append(Piece(marked.text[written:end], ids, marked.trained[first], ids[0] in special))
        first, written = last, max(written, end)
    place = getattr(conversation, "place", "")
    otherwise = sum(bool(one) != other for one, other in zip(theirs, marked.trained, strict=True))
    return Shown(place, tuple(pieces), kept, count_trained(row), len(marked.ids), otherwise)


def totals(shown: list[Shown]) -> str:
    """One line on all of them, and one on what a mask without care would lose."""
    tokens, trained = sum(one.tokens for one in shown), sum(one.trained for one in shown)
    share = 100 * trained / tokens
    line = f"{len(shown)} conversations, {tokens:,} tokens, {trained:,} trained on ({share:.1f} %)"
    if otherwise := sum(one.otherwise for one in shown):
        line += (
            f"\ntransformers' own mask, which TRL's assistant_only_loss uses, has {otherwise} of these "
            "tokens otherwise: of a character in several tokens that ends a generation block it has the first"
        )
    return line


# ---- terminal ----


def to_terminal(shown: Iterable[Shown], color: bool, ids: bool = False) -> str:
    """Conversations as text: what is trained on in green, or between ⟦ and ⟧ where there are no colours.

    Args:
        shown: the conversations.
        color: whether the terminal has colours.
        ids: write the token ids behind each piece.
    """
    start, end = (GREEN, END) if color else ("⟦", "⟧")
    dim = (DIM, END) if color else ("", "")
    blocks = []
    for number, one in enumerate(shown, start=1):
        parts = []
        for trained, pieces in groupby(one.pieces, key=lambda piece: piece.trained):
            before, after = (start, end) if trained else ("", "")
            if ids:
                told = [(piece.text, f"({','.join(map(str, piece.ids))})|") for piece in pieces]
                # A number has its own colour, after which that of the text begins again.
                parts += [f"{before}{text}{after}{dim[0]}{number}{dim[1]}" for text, number in told]
            else:
                parts.append(f"{before}{''.join(piece.text for piece in pieces)}{after}")
        blocks.append(f"{one.place or f'conversation {number}'}: {one.counts()}\n{''.join(parts)}")
    return "\n\n".join(blocks)


def mark_trained(tokenizer, ids: list[int], labels: list[int], color: bool, characters: int = 1500) -> str:
    """A row as text with what is trained in green, or between ⟦ and ⟧ where there are no colours."""
    start, end = (GREEN, END) if color else ("⟦", "⟧")
    parts, written, first = [], 0, 0
    while first < len(ids) and written < characters:
        trained, last = labels[first] != IGNORED, first
        while last < len(ids) and (labels[last] != IGNORED) == trained:
            last += 1
        text = tokenizer.decode(ids[first:last])
        if written + len(text) > characters:
            text = text[: characters - written] + " ..."
        parts.append(f"{start}{text}{end}" if trained else text)
        written, first = written + len(text), last
    return "".join(parts)


# ---- page ----

_STYLE = """
:root { --ink: #1d2327; --faint: #6b7680; --paper: #f6f7f8; --card: #fff; --line: #dfe3e6;
        --said: #b9ebc6; --said2: #98dfab; --other: #eceff1; --other2: #dfe4e7; --bar: #2e9e4f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ea; --faint: #93a0a9; --paper: #14181b; --card: #1c2226; --line: #323a40;
          --said: #1f5a32; --said2: #2a7342; --other: #2a3237; --other2: #343d43; --bar: #4cc473; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; color: var(--ink);
       background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; } h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .25rem 0; color: var(--faint); }
.key { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; margin: .8rem 0 1.4rem; color: var(--faint); }
.key b { font-weight: 400; color: var(--ink); padding: .05rem .45rem; border-radius: 3px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 0 0 1.2rem;
          padding: 1rem 1.1rem; }
.bar { height: 6px; border-radius: 3px; background: var(--other2); overflow: hidden; margin: .5rem 0 .8rem; }
.bar i { display: block; height: 100%; background: var(--bar); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
      font: 14px/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre.ids { line-height: 2.9; }
pre span { background: var(--other); border-radius: 2px; } pre span.b { background: var(--other2); }
.said, pre span.t { background: var(--said); } pre span.t.b { background: var(--said2); }
.other { background: var(--other); }
pre span.s { font-weight: 700; } .n { color: var(--faint); user-select: none; }
pre.ids span { display: inline-block; line-height: 1.3; text-align: center; vertical-align: top;
               padding: 0 2px; margin: 0 1px 6px 0; white-space: pre-wrap; }
pre.ids small { display: block; font-size: 10px; color: var(--faint); }
"""


def to_page(shown: list[Shown], source: str, tokenizer_name: str, ids: bool = False) -> str:
    """Conversations as an HTML page without anything from elsewhere; a token's ids show under the pointer.

    Args:
        shown: the conversations.
        source, tokenizer_name: told at the top.
        ids: write the ids below each token as well.
    """
    opening, sections = '<pre class="ids">' if ids else "<pre>", []
    for number, one in enumerate(shown, start=1):
        share = 100 * one.trained / one.tokens
        tokens = "".join(_token(piece, place % 2 == 1, ids) for place, piece in enumerate(one.pieces))
        sections.append(
            f"<section><h2>{html.escape(one.place or f'conversation {number}')}</h2>"
            f"<p>{html.escape(one.counts())}</p>"
            f'<div class="bar"><i style="width: {share:.2f}%"></i></div>'
            f"{opening}{tokens}</pre></section>"
        )
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in totals(shown).splitlines())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>What is trained on: {html.escape(source)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>What is trained on: {html.escape(source)}</h1>"
        f"<p>tokenizer {html.escape(tokenizer_name)}</p>{lines}"
        '<div class="key"><span><b class="said">trained on</b></span>'
        '<span><b class="other">read only</b></span>'
        "<span>shades tell tokens apart; <strong>bold</strong> ones are special</span></div>"
        f"{''.join(sections)}</body></html>\n"
    )


def _token(piece: Piece, second: bool, ids: bool) -> str:
    classes = " ".join(
        name for name, given in (("t", piece.trained), ("s", piece.special), ("b", second)) if given
    )
    told = f' class="{classes}"' if classes else ""
    numbers = " ".join(map(str, piece.ids))
    # Without the mark, a break alone would be a token without a shade.
    mark = '<i class="n">↵</i>'
    text = html.escape(piece.text)
    if not ids:
        text = text.replace("\n", f"{mark}\n")
        return f'<span{told} title="{numbers}">{text}</span>'
    text = text.replace("\n", mark)
    end = "\n" if "\n" in piece.text else ""
    return f'<span{told} title="{numbers}">{text}<small>{numbers}</small></span>{end}'
