"""Imported tokenizers against tiktoken and SentencePiece themselves, on small files made here."""

import base64
import hashlib
import io
import json

import pytest
import sentencepiece
import tiktoken
import tiktoken_ext.openai_public
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoTokenizer

from tessera import cli
from tessera.tokenization import SPECIAL_TOKENS, add_chat, import_tokenizer
from tessera.tokenization.byte_level import BYTE_NAMES, ENCODINGS, GPT2_PATTERN, GPT4_PATTERN, Encoding

BYTE_OF = {name: byte for byte, name in BYTE_NAMES.items()}


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, split_special_tokens=True)["input_ids"]


def ids_of(tokenizer, *tokens: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(tokens))


# ---- tiktoken ----


@pytest.fixture(scope="session")
def ranks(trained) -> dict[bytes, int]:
    """Ranks of the BPE that was trained here, without its special tokens."""
    vocabulary = AutoTokenizer.from_pretrained(trained["bpe"]).get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)[: -len(SPECIAL_TOKENS)]
    return {bytes(BYTE_OF[name] for name in token): rank for rank, token in enumerate(tokens)}


def rank_file(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


@pytest.fixture
def tiny(tmp_path, ranks, monkeypatch):
    """A rank file, and an encoding of it with holes among its special ids as o200k_base has."""
    encoding = Encoding(
        "tiny",
        GPT4_PATTERN,
        len(ranks),
        {"<|endoftext|>": len(ranks) + 1, "<|endofprompt|>": len(ranks) + 20},
        hashlib.sha256(rank_file(ranks)).hexdigest(),
    )
    monkeypatch.setitem(ENCODINGS, "tiny", encoding)
    path = tmp_path / "tiny.tiktoken"
    path.write_bytes(rank_file(ranks))
    return path, encoding


def test_ids_of_a_rank_file_are_those_of_tiktoken(tiny, ranks, texts):
    path, encoding = tiny
    # in whatever order the lines are
    path.write_bytes(b"".join(sorted(path.read_bytes().splitlines(keepends=True))))
    pattern = GPT4_PATTERN.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")
    reference = tiktoken.Encoding(
        "tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(encoding.special_tokens)
    )
    tokenizer = import_tokenizer(path)
    assert len(tokenizer) == reference.n_vocab
    for text in texts:
        assert encode(tokenizer, text) == reference.encode_ordinary(text), text
        assert tokenizer.decode(encode(tokenizer, text)) == text
    text = "ka<|endoftext|>ren<|endofprompt|> x"
    assert tokenizer(text)["input_ids"] == reference.encode(text, allowed_special="all")


def test_a_word_that_is_a_token_is_taken_whole_where_no_merges_lead_to_it(tmp_path, monkeypatch):
    ranks = {**{bytes([byte]): byte for byte in range(256)}, b"abc": 256}
    monkeypatch.setitem(ENCODINGS, "odd", Encoding("odd", GPT4_PATTERN, 257, {"<|endoftext|>": 257}))
    (tmp_path / "odd.tiktoken").write_bytes(rank_file(ranks))
    tokenizer = import_tokenizer(tmp_path / "odd.tiktoken")
    reference = tiktoken.Encoding("odd", pat_str=GPT4_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in ("abc", "abcd", "abc1abc"):
        assert encode(tokenizer, text) == reference.encode_ordinary(text)
    assert encode(tokenizer, "abc") == [256]


@pytest.mark.parametrize("chat", [True, False])
def test_holes_among_special_ids_hold_chat_tokens_and_the_size_stays(tiny, ranks, chat):
    path, _ = tiny
    tokenizer = import_tokenizer(path, chat=chat)
    n = len(ranks)
    assert len(tokenizer) == n + 21
    assert ids_of(tokenizer, f"<|reserved_{n}|>", "<|endoftext|>", "<|endofprompt|>") == [n, n + 1, n + 20]
    assert ids_of(tokenizer, f"<|reserved_{n + 19}|>") == [n + 19]
    if chat:
        assert ids_of(tokenizer, *SPECIAL_TOKENS[1:]) == list(range(n + 2, n + 15))
    assert bool(tokenizer.chat_template) == chat and tokenizer.eos_token == "<|endoftext|>"


def test_an_encoding_without_holes_gets_its_chat_tokens_after_it(tiny, ranks, monkeypatch):
    path, _ = tiny
    monkeypatch.setitem(ENCODINGS, "plain", Encoding("plain", GPT2_PATTERN, 686, {"<|endoftext|>": 686}))
    tokenizer = import_tokenizer(path, encoding="plain")
    assert ids_of(tokenizer, *SPECIAL_TOKENS) == list(range(686, 700))
    assert len(import_tokenizer(path, encoding="plain", chat=False)) == 687


def test_a_rank_file_is_known_by_its_hash_or_its_name(tiny, tmp_path, ranks):
    path, _ = tiny
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    assert len(import_tokenizer(tmp_path / "tokenizer.model")) == len(ranks) + 21  # by the hash
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(import_tokenizer(path)) == len(ranks) + 21  # by the name
    (tmp_path / "x.tiktoken").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="say whose it is with --as"):
        import_tokenizer(tmp_path / "x.tiktoken")
    assert len(import_tokenizer(tmp_path / "x.tiktoken", encoding="tiny")) == len(ranks) + 21


def test_an_encoding_by_name_comes_through_tiktoken(tiny, ranks, monkeypatch):
    def construct():
        return {"name": "tiny", "pat_str": GPT4_PATTERN, "mergeable_ranks": ranks, "special_tokens": {}}

    monkeypatch.setattr("tiktoken.registry.ENCODING_CONSTRUCTORS", {"tiny": construct})
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    by_name, by_file = import_tokenizer("tiny"), import_tokenizer(tiny[0])
    assert by_name.get_vocab() == by_file.get_vocab()


def test_no_connection_is_said_in_a_sentence(monkeypatch):
    def construct():
        raise ConnectionError("a long story")

    monkeypatch.setattr("tiktoken.registry.ENCODING_CONSTRUCTORS", {"r50k_base": construct})
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(ValueError, match="r50k_base cannot be downloaded .* give the file"):
        import_tokenizer("gpt2")


@pytest.mark.parametrize("name", ENCODINGS)
def test_what_is_known_of_encodings_is_what_tiktoken_says(name, monkeypatch):
    seen = {}

    def load(url, expected_hash):
        seen.update(url=url, sha256=expected_hash)
        return {}

    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", load)
    said = getattr(tiktoken_ext.openai_public, name)()
    assert ENCODINGS[name].special_tokens == said["special_tokens"]
    assert ENCODINGS[name].sha256 == seen["sha256"]
    if name == "o200k_base":
        assert ENCODINGS[name].pattern == said["pat_str"]


# ---- GPT-2's files ----


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2_files_give_the_ids_that_they_hold(tmp_path, trained, ranks, texts, names):
    state = json.loads((trained["bpe"] / "tokenizer.json").read_text())["model"]
    vocabulary = {**state["vocab"], "<|endoftext|>": len(state["vocab"])}
    (tmp_path / names[0]).write_text(json.dumps(vocabulary))
    merges = "\n".join(" ".join(pair) for pair in state["merges"])
    (tmp_path / names[1]).write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    pattern = tiktoken_ext.openai_public.r50k_pat_str
    reference = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    tokenizer = import_tokenizer(tmp_path)
    for text in texts:
        assert encode(tokenizer, text) == reference.encode_ordinary(text), text
    assert tokenizer.eos_token_id == len(ranks) == 686
    assert ids_of(tokenizer, *SPECIAL_TOKENS[1:]) == list(range(687, 700))


# ---- SentencePiece ----


def train_model(corpus, **settings) -> bytes:
    lines = [line for text in corpus[:20] for line in text.split("\n")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 600, "byte_fallback": True, **settings},
    )
    return model.getvalue()


IDENTITY = {"normalization_rule_name": "identity"}
SETTINGS = {
    "as Mistral's": {**IDENTITY, "remove_extra_whitespaces": False, "control_symbols": ["[INST]"]},
    "extra spaces removed": IDENTITY,
    "extra spaces removed, no prefix": {**IDENTITY, "add_dummy_prefix": False},
    "no byte fallback": {**IDENTITY, "byte_fallback": False, "vocab_size": 400},
    "user-defined, no prefix": {
        **IDENTITY,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<own>", "kaka", "two words", "\u2581\u2581", "ka\u2581ren"],
    },
    "other roles": {**IDENTITY, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "eos_piece": "<end>"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_ids_of_a_model_are_those_of_sentencepiece(tmp_path, corpus, texts, name):
    data = train_model(corpus, **SETTINGS[name])
    (tmp_path / "some.model.v9").write_bytes(data)
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    tokenizer = import_tokenizer(tmp_path / "some.model.v9", chat=False, output=tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    more = [
        "  ka  ren  ",
        " ",
        "\u00a0ka",
        "ﬁ Å K ½",
        "x<own>kakaka two words<own> ka ren",
        "[INST] ka [/INST]",
        "ka<end>ka",
    ]
    for text in [*texts, *corpus[:5], *more]:
        expected = reference.encode(text)
        assert encode(tokenizer, text) == expected, text
        assert encode(loaded, text) == expected, text
        # U+FFFD and an unknown piece are written in other ways
        if "\ufffd" not in text and tokenizer.unk_token_id not in expected:
            assert tokenizer.decode(expected) == reference.decode(expected), text
    for role in ("unk", "bos", "eos", "pad"):
        index = getattr(reference, f"{role}_id")()
        assert getattr(tokenizer, f"{role}_token_id") == (None if index < 0 else index)


def test_the_dummy_prefix_is_before_a_text_but_not_after_a_special_token(corpus, tmp_path):
    """So that a rendered conversation comes back as it was."""
    (tmp_path / "m.model").write_bytes(train_model(corpus, **SETTINGS["as Mistral's"]))
    tokenizer = import_tokenizer(tmp_path / "m.model")
    assert tokenizer.eos_token == "</s>" and tokenizer.pad_token == "<|pad|>"
    assert ids_of(tokenizer, *SPECIAL_TOKENS) == list(range(600, 614))
    assert encode(tokenizer, "ka ka")[0] == encode(tokenizer, "ka ka")[-1]
    chat = [{"role": "user", "content": "ka  ren"}, {"role": "assistant", "content": "東 ka"}]
    given = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    text = "<|im_start|>user\nka  ren<|im_end|>\n<|im_start|>assistant\n東 ka<|im_end|>\n"
    assert tokenizer.decode(given["input_ids"]) == text
    masked = [i for i, m in zip(given["input_ids"], given["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(masked) == "東 ka<|im_end|>"


def test_the_model_stays_beside_the_tokenizer(tmp_path, corpus):
    data = train_model(corpus, **IDENTITY)
    (tmp_path / "x.model").write_bytes(data)
    import_tokenizer(tmp_path / "x.model", output=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == data
    meta = json.loads((tmp_path / "out" / "tokenizer_meta.json").read_text())
    assert meta["type"] == "sentencepiece" and meta["source"] == "x.model" and meta["vocab_size"] == 614
    assert meta["source_sha256"] == hashlib.sha256(data).hexdigest()


# ---- directories ----


def test_a_directory_of_hugging_face_keeps_its_ids_and_its_template(tmp_path, folder, texts):
    first = AutoTokenizer.from_pretrained(folder)
    first.chat_template = "{{ messages[0].content }}"
    first.save_pretrained(tmp_path / "theirs")
    import_tokenizer(tmp_path / "theirs", output=tmp_path / "ours")
    again = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert again.get_vocab() == first.get_vocab() and again.chat_template == first.chat_template
    assert all(again(text)["input_ids"] == first(text)["input_ids"] for text in texts)
    assert str(tmp_path) not in (tmp_path / "ours" / "tokenizer_config.json").read_text()
    assert "is_local" not in (tmp_path / "ours" / "tokenizer_config.json").read_text()


def test_a_model_in_a_directory_is_found(tmp_path, corpus):
    (tmp_path / "tokenizer.model").write_bytes(train_model(corpus, **IDENTITY))
    assert len(import_tokenizer(tmp_path, chat=False)) == 600


# ---- the command, and refusals ----


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        cli.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return exit.value.code or 0, out, err


def test_the_command_imports(tmp_path, capsys, tiny):
    code, out, err = run(capsys, "tokenizer", "import", tiny[0], "--output", tmp_path / "out")
    assert (code, err) == (0, "") and "707 tokens" in out
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 707
    arguments = ("tokenizer", "import", tiny[0], "--as", "tiny", "--no-chat", "--output", tmp_path / "bare")
    assert run(capsys, *arguments)[0] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "bare").chat_template is None


@pytest.fixture
def damaged(tmp_path, corpus, tiny, ranks):
    """A folder of files that cannot be imported."""
    model = train_model(corpus, **IDENTITY)
    (tmp_path / "cut.model").write_bytes(model[: len(model) // 2])
    (tmp_path / "cut2.model").write_bytes(model[:-10])
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "noise.model").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "unigram.model").write_bytes(
        train_model(corpus, **{**IDENTITY, "model_type": "unigram", "vocab_size": 400})
    )
    (tmp_path / "nfkc.model").write_bytes(train_model(corpus))
    lines = tiny[0].read_bytes().splitlines(keepends=True)
    (tmp_path / "short.tiktoken").write_bytes(b"".join(lines[:-5]))
    (tmp_path / "torn.tiktoken").write_bytes(b"".join(lines)[:-7])
    (tmp_path / "gap.tiktoken").write_bytes(b"".join(lines[:300] + lines[301:]))
    (tmp_path / "twice.tiktoken").write_bytes(b"".join([*lines, lines[0]]))
    renumbered = {token: rank for rank, token in enumerate(token for token in ranks if token != b"\n")}
    (tmp_path / "byteless.tiktoken").write_bytes(rank_file(renumbered))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "encoder.json").write_text('{"a": 0}')
    (tmp_path / "gpt2" / "vocab.bpe").write_text("#version: 0.2\na b\n")
    (tmp_path / "nothing").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("cut.model", "is not a SentencePiece model, or not a whole one"),
        ("cut2.model", "is not a SentencePiece model, or not a whole one"),
        ("empty.model", "is not a SentencePiece model, or not a whole one"),
        ("noise.model", "is not a SentencePiece model, or not a whole one"),
        ("unigram.model", "only BPE can be imported"),
        ("nfkc.model", "normalises text (rule nmt_nfkc); only models of the rule identity"),
        ("short.tiktoken --as tiny", "tiny has 686 ranks, but there are 681"),
        ("torn.tiktoken --as tiny", "is not a whole tiktoken rank file: line 686"),
        ("gap.tiktoken --as tiny", "the ranks in"),
        ("twice.tiktoken --as tiny", "line 687"),
        ("byteless.tiktoken --as tiny", "has no token for the byte 0x0a"),
        ("tiny.tiktoken --as big", "there is no encoding big; known are gpt2, "),
        ("broken", "cannot be read"),
        ("gpt2", "are not a vocabulary and the merges of it"),
        ("gpt2/encoder.json", "give the folder that it is in"),
        ("nothing", "holds no tokenizer: looked for tokenizer.json"),
        ("nowhere", "is no file or directory, no encoding (known are gpt2,"),
        ("nothing --as tiny", "the encoding is said of a rank file only"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_a_sentence(damaged, capsys, source, sentence):
    name, *options = source.split()
    out = damaged / "out"
    code, _, err = run(capsys, "tokenizer", "import", damaged / name, *options, "--output", out)
    assert code == 2 and err.startswith("tessera: error: ") and err.count("\n") == 1, err
    assert sentence in err and not out.exists()


def test_a_name_that_the_hub_does_not_have_is_refused(monkeypatch):
    def fail(name):
        raise OSError("cannot connect\nand more")

    monkeypatch.setattr("tessera.tokenization.locate.hf_hub_download", lambda *names: fail(names[0]))
    monkeypatch.setattr("tessera.tokenization.locate.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(ValueError, match="some/name is no file or directory.*: cannot connect$"):
        import_tokenizer("some/name")


def test_a_name_on_the_hub_with_a_model_alone_is_read_as_that_model(tmp_path, corpus, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(train_model(corpus, **SETTINGS["as Mistral's"]))

    def download(name, file):
        if file != "tokenizer.model":
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr("tessera.tokenization.locate.hf_hub_download", download)
    tokenizer = import_tokenizer("some/name", output=tmp_path / "out")
    assert tokenizer.get_vocab() == import_tokenizer(tmp_path / "tokenizer.model").get_vocab()
    assert (tmp_path / "out" / "tokenizer.model").is_file()


@pytest.mark.parametrize("name", ["spm.model", "some_240323.model.v3"])
def test_a_folder_may_call_its_one_model_otherwise(tmp_path, corpus, name):
    (tmp_path / name).write_bytes(train_model(corpus, **IDENTITY))
    assert len(import_tokenizer(tmp_path, chat=False)) == 600


def test_adding_chat_to_an_import_twice_changes_nothing(tiny):
    tokenizer = import_tokenizer(tiny[0])
    assert len(add_chat(tokenizer)) == 707
