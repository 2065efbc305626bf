"""The preview: what is trained on as the rows have it, in the terminal, with ids, and as a page."""

import html
import re
from html.parser import HTMLParser

import pytest
from helpers.chats import chat_tokenizer, turn, write_rows

from tessera import cli
from tessera.data.chat import load_conversations
from tessera.data.chat_rows import IGNORED, encode_conversation
from tessera.data.preview import show_conversation, to_page, to_terminal, totals
from tessera.tokenization import train_tokenizer

PARTS = [
    {"type": "python", "text": "2 + 2"},
    {"type": "python_output", "text": "4"},
    {"type": "text", "text": " is <it> 🙂"},
]
CHATS = [
    turn("Hi & 東?", "Ho\n"),
    [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": PARTS}],
]


@pytest.fixture
def source(tmp_path) -> str:
    return write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])


@pytest.fixture
def folder(tmp_path) -> str:
    chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def preview(capsys, *words: str) -> tuple[int, str, str]:
    code = 0
    try:
        cli.run(["data", "preview", *words])
    except SystemExit as end:
        code = end.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_pieces_are_the_text_and_the_labels(kind, source):
    tokenizer = chat_tokenizer() if kind == "bpe" else train_tokenizer(kind="bytes")
    for chat in load_conversations(source):
        row = encode_conversation(tokenizer, chat)
        shown = show_conversation(tokenizer, chat)
        assert [i for piece in shown.pieces for i in piece.ids] == row["input_ids"]
        labels = [i if piece.trained else IGNORED for piece in shown.pieces for i in piece.ids]
        assert labels == row["labels"]
        text = tokenizer.apply_chat_template(chat["messages"], tokenize=False)
        assert "".join(piece.text for piece in shown.pieces) == text
        assert "�" not in to_terminal([shown], color=False)
        assert {piece.text for piece in shown.pieces if piece.special} <= set(tokenizer.all_special_tokens)


def test_the_terminal_shows_what_is_trained_and_counts_it(capsys, source, folder):
    code, out, _ = preview(capsys, source, "--tokenizer", folder)
    assert code == 0
    assert "<|im_start|>user\nHi & 東?<|im_end|>\n<|im_start|>assistant\n⟦Ho\n<|im_end|>⟧\n" in out
    assert (
        "⟦<|python_start|>2 + 2<|python_end|>⟧<|output_start|>4<|output_end|>⟦ is <it> 🙂<|im_end|>⟧" in out
    )
    rows = [encode_conversation(chat_tokenizer(), chat) for chat in load_conversations(source)]
    sizes = [len(row["input_ids"]) for row in rows]
    trained = [sum(label != IGNORED for label in row["labels"]) for row in rows]
    share = f"{100 * trained[1] / sizes[1]:.1f} %"
    assert f"{source}, row 2: {sizes[1]} tokens, {trained[1]} trained on ({share})\n" in out
    assert f"\n2 conversations, {sum(sizes)} tokens, {sum(trained)} trained on (" in out
    assert "transformers' own mask" not in out
    # in green where there are colours
    shown = [show_conversation(chat_tokenizer(), chat) for chat in load_conversations(source)]
    plain = to_terminal(shown, color=False)
    green = to_terminal(shown, color=True)
    assert green == plain.replace("⟦", "\033[32m").replace("⟧", "\033[0m")


def test_ids_and_rows_and_length_are_as_asked(capsys, source, folder):
    code, out, _ = preview(capsys, source, "--tokenizer", folder, "--rows", "1", "--ids")
    end = chat_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert code == 0 and f"⟦<|im_end|>⟧({end})|" in out and "python" not in out
    ids = re.findall(r"\(([\d,]+)\)\|", out)
    row = encode_conversation(chat_tokenizer(), next(load_conversations(source)))
    assert [int(i) for group in ids for i in group.split(",")] == row["input_ids"]
    size = len(row["input_ids"])
    _, out, _ = preview(capsys, source, "--tokenizer", folder, "--rows", "1", "--max-seq-len", str(size - 1))
    assert f"{size - 1} tokens" in out and f", cut from {size}\n" in out


def test_a_template_that_trls_mask_gets_wrong_is_told(source):
    import copy

    tokenizer = copy.deepcopy(chat_tokenizer())
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endif %}\n{% endfor %}"
    )
    assert "\n" not in totals([show_conversation(tokenizer, {"messages": turn("x", "well")})])
    lines = totals([show_conversation(tokenizer, {"messages": turn("x", "well 🦊")})]).splitlines()
    assert lines[1].startswith("transformers' own mask, which TRL's assistant_only_loss uses, has 3 of these")


class Spans(HTMLParser):
    """Text of the tokens of a page, and whether each is shown as trained on."""

    def __init__(self):
        super().__init__()
        self.found, self.inside, self.mark = [], False, False

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe")
        given = dict(attrs)
        assert not {"src", "href", "onclick"} & given.keys()
        if tag == "span" and "title" in given:
            self.found.append(["", "t" in given.get("class", "").split(), given["title"]])
            self.inside = True
        self.mark = tag in ("i", "small")

    def handle_endtag(self, tag):
        self.inside &= tag != "span"
        self.mark &= tag not in ("i", "small")

    def handle_data(self, data):
        if self.inside and not self.mark:
            self.found[-1][0] += data


@pytest.mark.parametrize("ids", [False, True])
def test_the_page_holds_every_token_and_needs_nothing_else(ids, source):
    shown = [show_conversation(chat_tokenizer(), chat) for chat in load_conversations(source)]
    page = to_page(shown, "a <b>", "tok", ids)
    reader = Spans()
    reader.feed(page)
    pieces = [piece for one in shown for piece in one.pieces]
    assert [tuple(found) for found in reader.found] == [
        (
            # Above an id there are only marks where lines end.
            piece.text.replace("\n", "") if ids else piece.text,
            piece.trained,
            " ".join(map(str, piece.ids)),
        )
        for piece in pieces
    ]
    assert "<title>What is trained on: a &lt;b&gt;</title>" in page and "url(" not in page
    assert html.escape(shown[0].counts()) in page and ("<small>" in page) == ids


def test_the_page_is_written_where_it_is_asked(capsys, source, folder, tmp_path):
    output = tmp_path / "new" / "page.html"
    code, out, _ = preview(capsys, source, "--tokenizer", folder, "--output", str(output))
    assert code == 0 and f"page: {output}" in out and "</span></pre>" in output.read_text(encoding="utf-8")


def test_what_training_would_leave_out_is_told_and_the_others_are_shown(capsys, folder, tmp_path):
    chats = [turn("Hi <|endoftext|>", "Ho"), turn("Who?", "Ada.")]
    rows = write_rows(tmp_path / "odd.jsonl", [{"messages": chat} for chat in chats])
    code, out, err = preview(capsys, rows, "--tokenizer", folder)
    assert code == 0 and "Ada." in out and "1 conversations," in out, err
    assert "left out: " in out and "odd.jsonl, row 1" in out.split("left out: ")[1]
    write_rows(tmp_path / "odd.jsonl", [{"messages": chats[0]}])
    code, _, err = preview(capsys, rows, "--tokenizer", folder)
    assert code == 2 and "no conversation can be used: " in err


def test_a_preview_that_would_show_nothing_trained_ends_with_code_2(capsys, source, folder, tmp_path):
    code, out, err = preview(capsys, source, "--tokenizer", folder, "--max-seq-len", "3")
    assert (code, out) == (2, "") and "chats.jsonl, row 1: there is nothing to train on" in err
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{% for m in messages %}{{ m }}{% endfor %}")
    code, _, err = preview(capsys, source, "--tokenizer", folder)
    assert code == 2 and "does not mark what the assistant says" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tokenizer", "bytes"], "give either SOURCE or --preset"),
        (["x.jsonl", "--tokenizer", "bytes", "--preset", "alpaca"], "give either SOURCE or --preset"),
        (["--tokenizer", "bytes", "--preset", "x"], "there is no preset 'x'; there are openthoughts, "),
        (["x.jsonl", "--tokenizer", "bytes", "--rows", "0"], "--rows must be at least 1, got 0"),
        (["x", "--tokenizer", "bytes", "--max-seq-len", "0"], "--max-seq-len must be at least 1, got 0"),
        (["x", "--tokenizer", "./none", "--output", "/"], "--output / is a folder; give the file"),
        (["x", "--tokenizer", "./none", "--output", "/dev/null/a/b"], "--output /dev/null/a/b cannot be"),
        (["x.jsonl", "--tokenizer", "bytes"], "there is no file or folder x.jsonl"),
        (["x.jsonl", "--tokenizer", "./none"], "./none has no tokenizer that can be loaded"),
    ],
)
def test_what_is_given_wrongly_is_a_sentence(words, sentence, capsys):
    code, _, err = preview(capsys, *words)
    assert code == 2 and sentence in err and "Traceback" not in err
