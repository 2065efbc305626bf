"""Looking at tokenizers: the bytes of each token, figures and tables, a text coloured by token."""

import base64
import io
import re
import shutil
import sys
import time
from html.parser import HTMLParser

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tessera import cli
from tessera.tokenization import import_tokenizer, published
from tessera.tokenization.page import page, show_tokens
from tessera.tokenization.probes import adversarial_texts
from tessera.tokenization.reference_codecs import open_codec
from tessera.tokenization.token_bytes import token_bytes
from tessera.tokenization.token_statistics import KINDS, bytes_per_token, describe, sample

TEXT = "ka ren\n\n\tдане 東京 <b>&amp;</b> \x00 ü🙂"


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        cli.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return exit.value.code or 0, out, err


# ---- bytes ----


@pytest.fixture(scope="session")
def prefixed(tmp_path_factory, corpus):
    """A directory of a SentencePiece model that puts a space before a text, as Mistral's do."""
    folder = tmp_path_factory.mktemp("prefixed")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(corpus[:20]).split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "x.model").write_bytes(model.getvalue())
    import_tokenizer(folder / "x.model", output=folder / "out")
    return folder / "out"


def test_the_bytes_of_a_text_are_those_of_its_tokens(tokenizer, kind, texts):
    table = token_bytes(tokenizer)
    assert len(table.pieces) == len(tokenizer) and table.lengths.dtype == np.int32
    for text in texts:
        text = text.replace("\u2581", "") if kind == "sentencepiece" else text
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert table.join(ids) == text.encode("utf-8")
        assert table.count(ids) == table.lengths[ids].sum() == len(text.encode("utf-8"))


def test_a_space_put_before_a_text_does_not_count(prefixed, texts):
    tokenizer = AutoTokenizer.from_pretrained(prefixed)
    table = token_bytes(tokenizer)
    for text in ["ka ren", " ka", *texts]:
        text = text.replace("\u2581", "")
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert table.join(ids) == text.encode("utf-8") and table.count(ids) == len(text.encode("utf-8"))


def test_special_tokens_are_no_bytes(tokenizer):
    table = token_bytes(tokenizer)
    special = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|pad|>"])
    assert table.lengths[special].tolist() == [0, 0]
    assert table.count([special[0], *tokenizer("ka")["input_ids"], special[1]]) == 2


def test_a_tokenizer_without_fixed_bytes_is_refused():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(
        ValueError, match="stand for no fixed bytes: its decoder has a step of type WordPiece"
    ):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_the_table_of_an_original_is_that_of_the_directory(trained):
    model = open_codec(trained["sentencepiece"] / "tokenizer.model").table
    assert model.pieces == token_bytes(AutoTokenizer.from_pretrained(trained["sentencepiece"])).pieces


# ---- figures ----


def test_bytes_per_token_is_bytes_over_tokens(trained):
    codec = open_codec(trained["bpe"])
    tokenizer = AutoTokenizer.from_pretrained(trained["bpe"])
    texts = ["ka ren mi", "東京"]
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert bytes_per_token(codec, texts) == (9 + 6) / tokens
    with pytest.raises(ValueError, match="no text"):
        bytes_per_token(codec, [""])


def test_samples_are_of_their_kind():
    assert set(sample("scripts")) & set("привет") and sum(map(str.isdigit, sample("digits"))) > 300
    assert sample("english").isascii() and "def " in sample("code") and "</html>" in sample("markup")
    assert all(len(sample(kind)) > 700 for kind in KINDS)


def test_info_finds_longest_and_unreached_tokens(trained):
    info = describe(open_codec(trained["bpe"]))
    codec = open_codec(trained["bpe"])
    lengths = [
        len(piece) for piece in codec.table.pieces if len(set(piece.decode("utf-8", "ignore").strip())) > 2
    ]
    assert [len(piece) for _, piece in info.longest][0] == max(lengths)
    assert info.vocab_size == 700 and info.special_tokens["<|pad|>"] == 699 and info.single_bytes == 256
    # every merge of byte-level BPE is reached by its own text, unless the pattern cuts it
    assert info.unreached == (0, [])
    # a byte piece is never used where its character has a piece of its own
    pieces = describe(open_codec(trained["sentencepiece"]))
    index = AutoTokenizer.from_pretrained(trained["sentencepiece"]).convert_tokens_to_ids("<0x61>")
    assert pieces.unreached[0] > 0 and index not in AutoTokenizer.from_pretrained(trained["sentencepiece"])(
        "a"
    )


def test_the_commands_print_figures_and_a_table(trained, tmp_path, capsys):
    code, out, _ = run(capsys, "tokenizer", "info", trained["bytes"], "--no-published")
    assert code == 0 and "270 tokens, of which 14 special: <|endoftext|> 256, " in out
    assert re.search(r"English prose +1\.00", out)
    (tmp_path / "own.txt").write_text("ka ren mi lo " * 20)
    arguments = [trained["bytes"], trained["bpe"], "--data", tmp_path / "own.txt"]
    code, out, _ = run(capsys, "tokenizer", "compare", *arguments)
    rows = {line.split("  ")[0]: line.split()[-2:] for line in out.splitlines()}
    assert code == 0 and rows["tokens"] == ["270", "700"] and list(rows)[1:6] == list(KINDS.values())
    expected = bytes_per_token(open_codec(trained["bpe"]), ["ka ren mi lo " * 20])
    assert rows["your text"] == ["1.00", f"{expected:.2f}"]


MISTRAL = "mistralai/Mistral-7B-v0.1"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the Hub's, and nobody who answers for the Hub."""
    monkeypatch.setattr(published, "PUBLISHED", (MISTRAL,))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "cache"


def test_figures_stand_beside_those_of_published_tokenizers(prefixed, trained, hub_cache, capsys):
    folder = hub_cache / f"models--{MISTRAL.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    shutil.copy(prefixed / "tokenizer.json", folder / "snapshots" / "abc")
    own, other = (
        f"{bytes_per_token(open_codec(x), [sample('code')]):.2f}" for x in (trained["bpe"], prefixed)
    )
    for command in ("info", "compare"):
        code, out, err = run(capsys, "tokenizer", command, trained["bpe"])
        assert code == 0 and err == "" and "Mistral-7B-v0.1" in out
        assert re.search(rf"code +{own} +{other}\n", out)
        code, out, err = run(capsys, "tokenizer", command, trained["bpe"], "--no-published")
        assert code == 0 and err == "" and "Mistral" not in out and re.search(rf"code +{own}\n", out)


def test_a_published_tokenizer_that_is_not_to_be_had_is_a_line_at_once(trained, hub_cache, capsys):
    begun = time.monotonic()
    code, out, err = run(capsys, "tokenizer", "info", trained["bytes"])
    assert time.monotonic() - begun < 10 and code == 0 and re.search(r"English prose +1\.00\n", out)
    assert err.startswith(f"without {MISTRAL}: it is not in the Hub's cache here") and err.count("\n") == 1


def test_a_rank_file_of_any_name_is_compared_by_its_encoding(tmp_path, capsys):
    lines = (f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256))
    (tmp_path / "ranks").write_text("".join(lines))
    arguments = ["tokenizer", "compare", tmp_path / "ranks", "--no-published"]
    assert run(capsys, *arguments)[0] == 2
    code, out, _ = run(capsys, *arguments, "--as", f"{tmp_path / 'ranks'}=cl100k_base")
    assert code == 0 and re.search(r"English prose +1\.00", out)
    code, _, err = run(capsys, *arguments, "--as", "cl100k_base")
    assert code == 2 and "--as is FILE=ENCODING of a tokenizer that is given" in err


# ---- the page ----


class _Spans(HTMLParser):
    def __init__(self):
        super().__init__()
        self.hovers, self.texts, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "span" and "title" in attributes:
            self.hovers.append(attributes["title"])
            self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data


def test_a_page_has_each_token_with_its_id_and_needs_no_other_file(trained, kind):
    codec = open_codec(trained[kind])
    html = page(codec, TEXT, "a <text>")
    spans = _Spans()
    spans.feed(html)
    assert [int(re.match(r"id (\d+) ", hover)[1]) for hover in spans.hovers] == codec.encode(TEXT)
    assert spans.links == [] and "a &lt;text&gt;" in html and "<b>" not in html
    assert f"{len(TEXT.encode()):,} bytes, {len(codec.encode(TEXT))} tokens" in html


def test_tokens_that_are_no_characters_are_shown_as_bytes_and_white_space_is_marked(trained):
    shown = list(show_tokens(open_codec(trained["bytes"]), "a\n\t🙂\x07"))
    assert [token.text for token in shown] == ["a", "↵", "→", "F0", "9F", "99", "82", "⟨7⟩"]
    assert [token.broken for token in shown] == [False] * 3 + [True] * 4 + [False]
    assert [token.breaks for token in shown] == [0, 1, 0, 0, 0, 0, 0, 0]


def test_hard_texts_make_a_page_and_a_terminal_text(trained, tmp_path, capsys):
    text = "\n".join(probe.text for probe in adversarial_texts() if len(probe.text) < 60)
    (tmp_path / "hard.txt").write_text(text, encoding="utf-8", newline="")
    arguments = ["tokenizer", "show", trained["bpe"], "--file", tmp_path / "hard.txt"]
    assert run(capsys, *arguments, "--output", tmp_path / "page.html")[0] == 0
    spans = _Spans()
    spans.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len(spans.hovers) == len(open_codec(trained["bpe"]).encode(text))


def test_only_a_terminal_gets_colours(trained, monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    arguments = ["tokenizer", "show", trained["bpe"], "ka\nren"]
    codec = open_codec(trained["bpe"])
    tokens = [token.text + "\n" * token.breaks for token in show_tokens(codec, "ka\nren")]
    plain = "|".join(tokens).replace("\n|", "\n") + f"\n6 bytes, {len(tokens)} tokens"
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out.startswith(plain)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True, raising=False)
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out.count("\x1b[0m") == len(tokens)
    assert re.sub(r"\x1b\[[\d;]*m", "", out).startswith("".join(tokens) + "\n6 bytes, ")
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(capsys, *arguments)[1].startswith(plain)


def test_a_page_goes_into_a_new_folder_and_where_it_cannot_be_it_is_said(trained, tmp_path, capsys):
    arguments = ["tokenizer", "show", trained["bytes"], "ka", "--output"]
    assert run(capsys, *arguments, tmp_path / "new" / "page.html")[0] == 0
    assert (tmp_path / "new" / "page.html").read_text().startswith("<!DOCTYPE html>")
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "new" / "page.html" / "x.html", "(File exists|Not a directory)"),
    ):
        code, _, err = run(capsys, *arguments, path)
        assert code == 2 and re.search(f"the page cannot be written to {re.escape(str(path))}: {reason}", err)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give the text itself, or a file with --file"),
        (["text", "--file", "x"], "give the text itself, or a file with --file"),
        (["--file", "nowhere.txt"], "there is no file nowhere.txt"),
    ],
)
def test_showing_nothing_is_refused(trained, capsys, arguments, sentence):
    code, _, err = run(capsys, "tokenizer", "show", trained["bytes"], *arguments)
    assert code == 2 and sentence in err
