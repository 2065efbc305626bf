"""Conversations as rows to train on: token ids, labels, and several conversations in a row.

What belongs here: which tokens of a conversation are trained on, what becomes of one that is longer than a
row, and how they are packed. The text of a conversation and its generation marks are the chat template's
business. A row in which nothing, or everything, would be trained on never leaves this file.
"""

import random
import re
import sys
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from .chat import Conversation, control_tokens, load_conversations, spells
from .packing import best_fit

IGNORED = -100  # label of a token that is not trained on

TOO_LONG = ("truncate", "split", "drop")
BUFFER = 1000  # conversations that a stream is shuffled among, and that are packed together
ROWS_SHUFFLED = 64  # packed rows of a stream that are drawn from in random order

Row = dict[str, list[int]]


# ---- one conversation ----


class Unusable(ValueError):
    """A conversation that a tokenizer or its template does not take, others apart.

    Attributes:
        problem: in words that follow a count of conversations.
    """

    def __init__(self, conversation: dict, problem: str, sentence: str):
        place = getattr(conversation, "place", "")
        super().__init__(f"{place}: {sentence}" if place else sentence)
        self.problem = problem


def refuse_spelled(conversation: dict, tokens: set[str]) -> None:
    """Refuses a conversation whose texts would become control tokens.

    Args:
        tokens: of `control_tokens`.

    Raises:
        Unusable: if a text of it spells one.
    """
    if spells(conversation, tokens):
        spelled = next(token for token in sorted(tokens) if spells(conversation, {token}))
        problem = "that spell a special token of the tokenizer"
        raise Unusable(conversation, problem, f"a text spells {spelled}, a special token of the tokenizer")


def check_template(tokenizer) -> None:
    """Refuses a tokenizer whose chat template does not tell what the assistant said.

    Raises:
        ValueError: if there is no template, or no generation mark in it.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError("the tokenizer has no chat template, so conversations cannot be written out with it")
    if not re.search(r"\{%-?\s*generation\b", template):
        raise ValueError(
            "the tokenizer's chat template does not mark what the assistant says, so everything would be "
            "masked; put {% generation %} and {% endgeneration %} around it, end-of-turn token included"
        )


@dataclass
class Marked:
    """A conversation token by token.

    Attributes:
        text: as the chat template writes it.
        ids: of the tokens [T].
        spans: first and last character, plus one, of each token in the text [T].
        trained: whether each is trained on [T].
    """

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    trained: list[bool]


def mark_conversation(tokenizer, conversation: dict) -> Marked:
    """Writes a conversation out with the tokenizer's chat template and finds what the assistant says in it.

    A token is the assistant's if a character of it is inside of a generation block. transformers' own
    mask, which TRL's `assistant_only_loss` uses, goes from the first token of the block's first character
    to the first token of its last, so that it loses the rest of a character in several tokens, and runs
    on to the end of the conversation where the last character has no token.

    Raises:
        ValueError: if the template refuses it, or its marks leave nothing to train on, or everything.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    place = f"{conversation.place}: " if getattr(conversation, "place", "") else ""
    tools = conversation.get("tools")
    messages = [
        {key: value for key, value in message.items() if value is not None}
        for message in conversation["messages"]
    ]
    try:
        (text,), (blocks,) = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=tokenizer.get_chat_template(None, tools),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # jinja2's, which need not be imported here for its name
        if type(error).__module__.partition(".")[0] != "jinja2" and not isinstance(error, TypeError):
            raise
        sentence = f"the chat template refuses a conversation: {error}"
        raise Unusable(conversation, "that the chat template refuses", sentence) from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, spans = encoded["input_ids"], [tuple(span) for span in encoded["offset_mapping"]]
    blocks = [block for block in blocks if block[0] < block[1]]
    ends, trained = [end for _, end in blocks], []
    for start, end in spans:
        block = bisect_right(ends, start)
        trained.append(block < len(blocks) and blocks[block][0] < max(end, start + 1))
    if not any(trained):
        if all(message.get("role") != "assistant" for message in conversation["messages"]):
            raise ValueError(
                f"{place}there is nothing to train on, for the conversation has no assistant turn"
            )
        check_template(tokenizer)
        raise ValueError(
            f"{place}the chat template marks nothing of a conversation as the assistant's: check its "
            "{% generation %} marks"
        )
    if all(trained):
        raise ValueError(
            f"{place}the chat template marks all of a conversation as the assistant's, what others say too: "
            "put its {% generation %} marks around the assistant's words alone"
        )
    return Marked(text, ids, spans, trained)


def encode_conversation(tokenizer, conversation: dict, max_length: int | None = None) -> Row:
    """Token ids of a conversation, and labels that are the same for the assistant's tokens, else `IGNORED`.

    Args:
        tokenizer: with a chat template that has generation marks.
        conversation: `messages`, and `tools` where there are any.
        max_length: cut it there.

    Raises:
        ValueError: as `mark_conversation`, or if the cut leaves nothing to train on.
    """
    marked = mark_conversation(tokenizer, conversation)
    pairs = zip(marked.ids, marked.trained, strict=True)
    row = {"input_ids": marked.ids, "labels": [i if trained else IGNORED for i, trained in pairs]}
    cut = {key: values[:max_length] for key, values in row.items()}
    if max_length is not None and not count_trained(cut):
        place = f"{conversation.place}: " if getattr(conversation, "place", "") else ""
        first = marked.trained.index(True)
        raise ValueError(
            f"{place}there is nothing to train on, for the conversation is cut at {max_length} tokens and "
            f"the assistant's words begin at token {first + 1}"
        )
    return cut


def _cut(row: Row, start: int, length: int) -> Row:
    return {key: values[start : start + length] for key, values in row.items()}


def _split(row: Row, length: int) -> Iterator[Row]:
    """Pieces of at most `length` tokens, each from the last token of the one before, to predict from it."""
    size, step = len(row["input_ids"]), max(length - 1, 1)
    for start in range(0, max(size - 1, 1), step):
        piece = _cut(row, start, length)
        if start:
            piece["labels"][0] = IGNORED  # predicted in the piece before
        yield piece


def count_trained(row: Row) -> int:
    """Tokens of a row that have a loss: nothing predicts the first."""
    return sum(label != IGNORED for label in row["labels"][1:])


# ---- many ----


class RowEncoder:
    """Encodes conversations as rows of at most `length` tokens, and counts what became of them.

    Args:
        tokenizer: with a chat template that has generation marks.
        length: tokens of a row.
        too_long: what becomes of a longer conversation: "truncate" cuts it, "split" goes on with the rest of
            it as rows of their own, each from the last token of the one before; "drop" leaves it out.

    Attributes:
        long: conversations that were too long.
        left_out: rows left out, for nothing in them would be trained on, and where the first was.
        refused: conversations left out, for the tokenizer does not take them, by problem; the first sentence.
        tokens, trained: of the rows.

    Raises:
        ValueError: if there is no such way.
    """

    def __init__(self, tokenizer, length: int, too_long: str = "truncate"):
        if too_long not in TOO_LONG:
            raise ValueError(f"too long conversations can be {', '.join(TOO_LONG)}; got {too_long!r}")
        self.tokenizer, self.length, self.too_long = tokenizer, length, too_long
        self.long = self.left_out = self.tokens = self.trained = 0
        self.first_left_out = ""
        self.refused: Counter[str] = Counter()
        self.first_refused = ""
        self._control = control_tokens(tokenizer)

    def encode(self, conversations: Iterable[dict]) -> Iterator[Row]:
        """Rows in the order of the conversations.

        Raises:
            ValueError: as `mark_conversation`, or if the tokenizer takes none of them. Single ones that it
                does not take, and what is left without an answer by a cut, are counted instead.
        """
        number, before = 0, self.refused.total()
        for conversation in conversations:
            number += 1
            yield from self.encode_one(conversation)
        if number and self.refused.total() - before == number:
            raise ValueError(f"no conversation can be used: {self._refusals()}")

    def encode_one(self, conversation: dict) -> list[Row]:
        """Rows of a conversation; none if it is not taken, or nothing of it is left to train on.

        Raises:
            ValueError: as `mark_conversation`, for what is the template's fault in any conversation.
        """
        try:
            return self._rows(conversation)
        except Unusable as error:
            self.refused[error.problem] += 1
            self.first_refused = self.first_refused or str(error)
            return []

    def _rows(self, conversation: dict) -> list[Row]:
        refuse_spelled(conversation, self._control)
        row, rows = encode_conversation(self.tokenizer, conversation), []
        size, length = len(row["input_ids"]), self.length
        self.long += size > length
        if size > length and self.too_long == "drop":
            return []
        for piece in _split(row, length) if self.too_long == "split" else [_cut(row, 0, length)]:
            trained = count_trained(piece)
            if not trained:
                self.left_out += 1
                self.first_left_out = self.first_left_out or getattr(conversation, "place", "")
                continue
            self.tokens += len(piece["input_ids"])
            self.trained += trained
            rows.append(piece)
        return rows

    def _refusals(self) -> str:
        counts = ", ".join(f"{count} {problem}" for problem, count in self.refused.items())
        return f"{counts} (first: {self.first_refused})"

    def summary(self) -> str:
        """One line on all that was encoded."""
        share = 100 * self.trained / max(self.tokens, 1)
        line = f"{self.tokens:,} tokens, of which {self.trained:,} ({share:.1f} %) are the assistant's"
        if self.long:
            done = {"truncate": "cut", "split": "split", "drop": "left out"}[self.too_long]
            line += f"; {self.long} conversations of over {self.length} tokens {done}"
        if self.left_out:
            what = "pieces" if self.too_long == "split" else "of them"
            where = f" (first: {self.first_left_out})" if self.first_left_out else ""
            line += f", {self.left_out} {what} left out, with nothing of the assistant's{where}"
        if self.refused:
            line += f"; left out {self._refusals()}"
        return line


@dataclass
class Packed:
    """What was packed so far: rows of `length`, and what is in them."""

    length: int
    rows: int = 0
    conversations: int = 0
    tokens: int = 0

    @property
    def utilisation(self) -> float:
        """Share of the rows that holds tokens."""
        return self.tokens / max(self.rows * self.length, 1)

    def summary(self) -> str:
        """One line."""
        return (
            f"packed into {self.rows:,} rows of {self.length:,} tokens, {100 * self.utilisation:.2f} % full, "
            f"{self.conversations / max(self.rows, 1):.1f} conversations in a row"
        )


def pack_best_fit(
    rows: Iterable[Row], length: int, *, buffer: int | None = BUFFER, packed: Packed | None = None
) -> Iterator[Row]:
    """Joins rows to longer ones, whole, none cut: best-fit decreasing, see `packing.best_fit`.

    Of a stream, those that wait are packed together; the fullest half of what comes of it goes out, the rest
    waits with those that come next. What comes out is what TRL's own packing gives: `seq_lengths` has the
    length of each part, from which its padding-free collator makes positions that begin anew with each.

    Args:
        rows: of at most `length` tokens, as they come.
        length: tokens of a joined row.
        buffer: how many wait at most; None for all, which fills best and needs their memory.
        packed: counts, brought up to date.

    Yields:
        `input_ids`, `labels`, `seq_lengths`; the fullest first of those that are packed together.

    Raises:
        ValueError: for a row that is longer than `length`.
    """
    packed = Packed(length) if packed is None else packed
    source, waiting, count, more = iter(rows), defaultdict(deque), 0, True
    while more or count:
        while more and (buffer is None or count < buffer):
            row = next(source, None)
            if row is None:
                more = False
                break
            size = len(row["input_ids"])
            if size > length:
                raise ValueError(f"a row has {size} tokens, more than the {length} of a row")
            waiting[size].append(row)
            count += 1
        counts = {size: len(waiting[size]) for size in sorted(waiting, reverse=True) if waiting[size]}
        groups = best_fit(counts, length)
        groups.sort(key=lambda group: -sum(size * each for size, each in group[1]))
        keep = count // 2 if more else 0
        for copies, contents in groups:
            for _ in range(copies):
                if count <= keep:
                    break
                parts = [waiting[size].popleft() for size, each in contents for _ in range(each)]
                count -= len(parts)
                yield _join(parts, packed)


def _join(parts: list[Row], packed: Packed) -> Row:
    sizes = [len(part["input_ids"]) for part in parts]
    packed.rows += 1
    packed.conversations += len(parts)
    packed.tokens += sum(sizes)
    ids = [i for part in parts for i in part["input_ids"]]
    # Nothing of its own conversation predicts the first token of a part.
    labels = [label for part in parts for label in (IGNORED, *part["labels"][1:])]
    return {"input_ids": ids, "labels": labels, "seq_lengths": sizes}


def add_positions(row: Row, length: int | None = None, padding: int = 0) -> Row:
    """A packed row with `position_ids` that begin anew with each conversation, for collators that stack rows.

    Args:
        row: of `pack_best_fit`.
        length: fill it up to so many tokens with `padding`, as one more part that is not trained on.
        padding: token id.
    """
    spare = 0 if length is None else length - len(row["input_ids"])
    lengths = [*row["seq_lengths"], *([spare] if spare else [])]
    return {
        "input_ids": [*row["input_ids"], *[padding] * spare],
        "labels": [*row["labels"], *[IGNORED] * spare],
        "position_ids": [position for size in lengths for position in range(size)],
        "seq_lengths": lengths,
    }


def shuffled(rows: Iterable[Any], seed: int, buffer: int = BUFFER) -> Iterator[Any]:
    """Draws from the next `buffer` of a stream at random."""
    draw, waiting = random.Random(seed), []
    for row in rows:
        if len(waiting) < buffer:
            waiting.append(row)
            continue
        place = draw.randrange(buffer)
        yield waiting[place]
        waiting[place] = row
    draw.shuffle(waiting)
    yield from waiting


# ---- datasets ----


def row_dataset(rows: Callable[[], Iterable[Row]], *, packed: bool, streaming: bool, seed: int = 0):
    """Rows as a dataset that trainers take.

    Args:
        rows: makes them, from the beginning each time.
        packed: whether they have `seq_lengths`.
        streaming: make them as they are asked for; of such, some are drawn from in random order.
        seed: of that.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset` where they are streamed.
    """
    from datasets import Dataset, Features, IterableDataset, Sequence, Value

    columns = ("input_ids", "labels", "seq_lengths") if packed else ("input_ids", "labels")
    features = Features({column: Sequence(Value("int32")) for column in columns})
    if not streaming:
        return Dataset.from_list(list(rows()), features=features)
    dataset = IterableDataset.from_generator(rows, features=features)
    return dataset.shuffle(seed=seed, buffer_size=ROWS_SHUFFLED)


def load_rows(
    source: str,
    tokenizer,
    length: int,
    *,
    split: str | None = None,
    name: str | None = None,
    limit: int | None = None,
    packing: bool = True,
    too_long: str = "truncate",
    streaming: bool = False,
    seed: int = 0,
    buffer: int | None = None,
    say: Callable[[str], None] | None = None,
):
    """Conversations of a source as a dataset of rows, for `tessera sft` or TRL's SFTTrainer as they are.

    Args:
        source, split, name, limit: as for `chat.load_conversations`.
        tokenizer: with a chat template that has generation marks.
        length: tokens of a row.
        packing: several conversations in a row, see `pack_best_fit`; else each has one of its own.
        too_long: see `RowEncoder`.
        streaming: read, encode and pack as rows are asked for, shuffled in a buffer.
        seed: of the order in which a stream is read.
        buffer: conversations that are packed together; default: all, of a stream `BUFFER`.
        say: what is told the counts, of a stream nothing; default: prints to stderr.

    Returns:
        A `datasets.Dataset` of `input_ids`, `labels` and, packed, `seq_lengths`; streamed, an
        `IterableDataset`.

    Raises:
        ValueError: as `load_conversations` and `mark_conversation`; if no row is left.
    """
    check_template(tokenizer)
    say = say or (lambda text: print(text, file=sys.stderr))
    read = partial(
        load_conversations, source, split=split, name=name, limit=limit, streaming=streaming, say=say
    )
    encoder, counts = RowEncoder(tokenizer, length, too_long), Packed(length)
    if streaming:
        make = partial(_stream, read, tokenizer, length, too_long, packing, seed, buffer or BUFFER)
        return row_dataset(make, packed=packing, streaming=True, seed=seed)
    rows = list(encoder.encode(read()))
    if not rows:
        raise ValueError(f"{source}: no conversation has an answer within {length} tokens")
    say(encoder.summary())
    if packing:
        rows = list(pack_best_fit(rows, length, buffer=buffer, packed=counts))
        say(counts.summary())
    return row_dataset(lambda: rows, packed=packing, streaming=False)


def _stream(
    read: Callable[[], Iterator[Conversation]],
    tokenizer,
    length: int,
    too_long: str,
    packing: bool,
    seed: int,
    buffer: int,
) -> Iterator[Row]:
    rows = shuffled(RowEncoder(tokenizer, length, too_long).encode(read()), seed)
    return pack_best_fit(rows, length, buffer=buffer) if packing else rows
