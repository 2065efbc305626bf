"""A text coloured by token: as a page of one file, and for a terminal.

What belongs here: cutting a text into what each token stands for, and drawing that. A token that is no whole
character is shown as its bytes; white space is marked where it would not be seen.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from .reference_codecs import Codec, show_bytes

# Neighbours differ, and a colour comes back after five: enough to see where a token ends.
COLOURS = 5
# Longer texts make pages that no browser likes.
MAX_TOKENS = 100_000
_TERMINAL = (
    "\x1b[48;5;153;30m",
    "\x1b[48;5;223;30m",
    "\x1b[48;5;157;30m",
    "\x1b[48;5;225;30m",
    "\x1b[48;5;229;30m",
)
_RESET = "\x1b[0m"
_BAR = "|"
_MARKS = {"\n": "↵", "\r": "␍", "\t": "→"}


@dataclass(frozen=True)
class Shown:
    """One token of a text.

    Attributes:
        index: its id.
        text: what to draw, without line breaks; white space is marked.
        piece: its bytes.
        broken: whether it is no whole characters, and `text` therefore its bytes.
        breaks: line ends in it, which are drawn after it.
    """

    index: int
    text: str
    piece: bytes
    broken: bool
    breaks: int


def show_tokens(codec: Codec, text: str) -> Iterator[Shown]:
    """The tokens of a text.

    Raises:
        ValueError: if the tokens of this tokenizer stand for no fixed bytes.
    """
    if codec.table is None:
        raise ValueError(
            f"the tokens of {codec.name} stand for no fixed bytes, so that they cannot be shown in a text"
        )
    for index in codec.encode(text):
        piece = codec.table.pieces[index]
        try:
            drawn, broken = piece.decode("utf-8"), False
        except UnicodeDecodeError:
            drawn, broken = " ".join(f"{byte:02X}" for byte in piece), True
        marked = "".join(_mark(c) for c in drawn)
        yield Shown(index, marked or "∅", piece, broken, drawn.count("\n") if not broken else 0)


def _mark(c: str) -> str:
    if c in _MARKS:
        return _MARKS[c]
    if c == " " or c.isprintable():
        return c
    return f"⟨{ord(c):X}⟩"


def terminal_text(codec: Codec, text: str, color: bool = True) -> str:
    """The text with each token on a coloured ground, and a line on how many there are.

    Args:
        codec: the tokenizer.
        text: the text.
        color: without it, a bar stands between tokens.
    """
    parts = []
    tokens = list(show_tokens(codec, text))
    for number, token in enumerate(tokens):
        between = "" if number == 0 or tokens[number - 1].breaks else _BAR
        drawn = f"{_TERMINAL[number % COLOURS]}{token.text}{_RESET}" if color else between + token.text
        parts.append(drawn + "\n" * token.breaks)
    return "".join(parts).rstrip("\n") + "\n" + _summary(codec, text, len(tokens))


def _summary(codec: Codec, text: str, count: int) -> str:
    num_bytes = len(text.encode("utf-8"))
    rate = f", {num_bytes / count:.2f} bytes per token" if count else ""
    return f"{num_bytes:,} bytes, {count:,} tokens{rate}"


def page(codec: Codec, text: str, title: str) -> str:
    """A page that needs no other file: the text, ids on hover, counts, and the most frequent tokens.

    Args:
        codec: the tokenizer.
        text: the text; after so many tokens as a browser takes, the rest is left out and that is said.
        title: of the page, such as the name of the file.
    """
    tokens = list(show_tokens(codec, text))
    drawn = [_span(number, token) for number, token in enumerate(tokens[:MAX_TOKENS])]
    left_out = f"<p>Shown are the first {MAX_TOKENS:,} tokens.</p>" if len(tokens) > MAX_TOKENS else ""
    frequent = Counter(token.index for token in tokens).most_common(12)
    rows = "".join(
        f"<tr><td><code>{escape(show_bytes(codec.table.pieces[index]))}</code></td><td>{index}</td><td>{n:,}</td></tr>"
        for index, n in frequent
    )
    broken = sum(token.broken for token in tokens)
    return _PAGE.format(
        title=escape(title),
        summary=escape(_summary(codec, text, len(tokens))),
        tokenizer=escape(f"{codec.name} ({codec.library})"),
        different=f"{len({token.index for token in tokens}):,}",
        broken=f"{broken:,}",
        left_out=left_out,
        text="".join(drawn),
        rows=rows,
    )


def _span(number: int, token: Shown) -> str:
    size = f"{len(token.piece)} byte" + ("s" if len(token.piece) != 1 else "")
    hover = escape(f"id {token.index} · {size} · {show_bytes(token.piece)}", quote=True)
    broken = " b" if token.broken else ""
    return (
        f'<span class="c{number % COLOURS}{broken}" title="{hover}">{escape(token.text)}</span>'
        + "\n" * token.breaks
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: tokens</title>
<style>
:root {{ color-scheme: light dark; --ground: #fff; --ink: #1c1f24; --quiet: #626a75; --line: #d9dde3;
  --c0: #cfe3ff; --c1: #ffe2b8; --c2: #cdf0d0; --c3: #f3d7f5; --c4: #fbf3a9; --b: #b3261e; }}
@media (prefers-color-scheme: dark) {{ :root {{
  --ground: #16181c; --ink: #e8eaee; --quiet: #9aa3af; --line: #343941;
  --c0: #1f3d66; --c1: #5c4014; --c2: #1f4d2a; --c3: #532a57; --c4: #504a10; --b: #ff9d94; }} }}
body {{ background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; margin: 0; overflow-wrap: anywhere; }}
p {{ color: var(--quiet); margin: .25rem 0; }}
pre {{ border: solid var(--line); border-width: 1px 0; font: 15px/1.75 ui-monospace, monospace;
  margin: 1rem 0; overflow-wrap: anywhere; padding: 1rem 0; tab-size: 4; white-space: pre-wrap; }}
pre span {{ border-radius: 3px; padding: 2px 0; }}
pre span:hover {{ outline: 2px solid var(--ink); }}
.c0 {{ background: var(--c0); }} .c1 {{ background: var(--c1); }} .c2 {{ background: var(--c2); }}
.c3 {{ background: var(--c3); }} .c4 {{ background: var(--c4); }}
.b {{ color: var(--b); font-size: .8em; padding: 2px 3px; }}
table {{ border-collapse: collapse; }}
th, td {{ border-bottom: 1px solid var(--line); padding: .2rem .9rem .2rem 0; text-align: left; }}
td:nth-child(n+2), th:nth-child(n+2) {{ text-align: right; font-variant-numeric: tabular-nums; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}; {different} different ones, <span class="b">{broken}</span> that are no whole characters (their
bytes are shown). Point at a token for its id.</p>
<p>Tokenizer: {tokenizer}</p>
{left_out}
<pre>{text}</pre>
<table><tr><th>most frequent</th><th>id</th><th>times</th></tr>{rows}</table>
</body>
</html>
"""
