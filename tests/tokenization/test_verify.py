"""Two tokenizers side by side: what counts as a difference, where it is told to be, and who refuses it."""

import base64
import json
import unicodedata

import pytest
import tiktoken
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tessera import cli
from tessera.tokenization import import_tokenizer, save_tokenizer, train_tokenizer
from tessera.tokenization.byte_level import ENCODINGS, GPT2_PATTERN, GPT4_PATTERN, Encoding
from tessera.tokenization.probes import adversarial_texts, every_character
from tessera.tokenization.reference_codecs import huggingface_codec, open_codec, tiktoken_codec
from tessera.tokenization.token_bytes import bytes_of_name
from tessera.tokenization.verify import verify_tokenizers


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        cli.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return exit.value.code or 0, out, err


def changed(folder, output, change) -> None:
    """A copy of a tokenizer directory with something else in its tokenizer.json."""
    described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(described)
    backend = Tokenizer.from_str(json.dumps(described))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(output)


def set_pattern(pattern):
    def change(described):
        described["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}

    return change


def drop_merge(described):
    described["model"]["merges"].pop(40)


# ---- the probes ----


def test_the_probes_hold_what_they_promise():
    probes = list(adversarial_texts(["<|mine|>"]))
    text = "".join(probe.text for probe in probes)
    assert len({probe.name for probe in probes}) == len(probes)
    assert set(map(chr, range(0x100))) <= set(text)
    assert {ord(c) >> 16 for c in text} == set(range(17))
    assert any(unicodedata.category(c) == "Cn" for c in text) and "\u0301" in text and "\u200d" in text
    for run_of in (" ", "\n", "a", "0"):
        for length in (1, 2, 3, 4, 10_000):
            assert run_of * length in [probe.text for probe in probes]
    assert any(probe.text == "\ufffd" for probe in probes) and "<|mine|>" in text
    assert "don''t" in text and "IT'LL" in text and "1,234,567.89" in text
    assert text.encode("utf-8").decode("utf-8") == text and probes == list(adversarial_texts(["<|mine|>"]))


def test_every_character_is_every_character():
    seen = set().union(*(probe.text for probe in every_character()))
    assert len(seen) == 0x110000 - 0x800


# ---- comparing ----


def test_a_tokenizer_equals_itself_and_its_text_comes_back(trained, kind):
    found = verify_tokenizers(trained[kind], trained[kind])
    assert found.equal and found.documents > 1500 and found.num_bytes > 500_000
    lost = (
        [probe for probe in adversarial_texts() if "\u2581" in probe.text] if kind == "sentencepiece" else []
    )
    assert found.came_back[0] == found.came_back[1] == found.documents - len(lost)


def test_a_sentencepiece_model_run_by_sentencepiece_equals_the_directory(trained):
    found = verify_tokenizers(trained["sentencepiece"] / "tokenizer.model", trained["sentencepiece"])
    assert found.equal and not found.only_special
    assert "(sentencepiece " in found.a and "(tokenizers " in found.b


def test_another_pattern_is_found_and_told(trained, tmp_path, capsys):
    changed(trained["bpe"], tmp_path / "other", set_pattern(r"[\s\S]"))
    text = tmp_path / "a.txt"
    text.write_text("1 2 3\n<|endoftext|>\nFüße: lo 1234567 mi\n", encoding="utf-8")
    code, out, err = run(
        capsys, "tokenizer", "verify", trained["bpe"], tmp_path / "other", "--data", tmp_path / "a.txt"
    )
    assert (code, err) == (1, "")
    assert "first difference: document 2, character " in out and out.endswith("different\n")
    found = verify_tokenizers(trained["bpe"], tmp_path / "other", ["1 2 3", "Füße: lo 1234567 mi"])
    where = found.difference
    tokenizer = AutoTokenizer.from_pretrained(trained["bpe"])
    ours = tokenizer("Füße: lo 1234567 mi")["input_ids"]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "other")("Füße: lo 1234567 mi")["input_ids"]
    first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    assert where.document == "document 2" and where.before + where.after == "Füße: lo 1234567 mi"
    assert where.ids == (ours[first : first + 8], theirs[first : first + 8])
    assert where.offset == len(where.before) == len(tokenizer.decode(ours[:first])) > 0


def test_a_missing_merge_is_found_among_the_probes_or_in_the_text(trained, tmp_path, corpus):
    changed(trained["bpe"], tmp_path / "other", drop_merge)
    found = verify_tokenizers(trained["bpe"], tmp_path / "other", corpus)
    assert not found.equal and found.difference.document.startswith("document ")
    assert found.difference.ids[0] != found.difference.ids[1]


def test_tokens_with_other_ids_and_other_special_ids_are_told(trained, tmp_path):
    def swap(described):
        vocabulary = described["model"]["vocab"]
        names = sorted(vocabulary, key=vocabulary.__getitem__)
        # bytes of no text of ASCII
        for one, other in ((names[0xA8], names[0xA9]),):
            vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        described["added_tokens"][1]["content"] = "<|renamed|>"

    changed(trained["bpe"], tmp_path / "other", swap)
    found = verify_tokenizers(trained["bpe"], tmp_path / "other", ["plain"])
    assert found.difference is None and not found.equal
    assert "ids that stand for other tokens, 2: 168 " in found.report()
    assert "special tokens of A alone, 1: <|im_start|> 687" in found.report()


def test_special_tokens_that_only_one_has_are_told_and_count_only_if_asked(trained, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(trained["bytes"])
    tokenizer.add_tokens([AddedToken("<|more|>", special=True, normalized=False)])
    tokenizer.save_pretrained(tmp_path / "more")
    arguments = ("tokenizer", "verify", trained["bytes"], tmp_path / "more")
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "special tokens of B alone, 1: <|more|> 270" in out and out.endswith("equal\n")
    code, out, _ = run(capsys, *arguments, "--strict")
    assert code == 1 and out.endswith("different\n")


def test_decoding_that_differs_is_a_difference(trained, tmp_path):
    def strip(described):
        described["decoder"] = {
            "type": "Sequence",
            "decoders": [described["decoder"], {"type": "Strip", "content": "!", "start": 0, "stop": 1}],
        }

    changed(trained["bpe"], tmp_path / "other", strip)
    found = verify_tokenizers(trained["bpe"], tmp_path / "other", ["a", "b!"])
    assert found.difference is None and found.decoding == ("document 2", "b!", "b") and not found.equal
    assert found.came_back == [2, 1]


@pytest.mark.parametrize(
    ("b", "sentence"),
    [
        ("nowhere", "nowhere is no file or directory, no encoding"),
        ("empty", "holds no tokenizer"),
        ("two", "holds several tokenizers; name the one that is meant: a.model, b.model"),
        ("two/a.model", "is not a SentencePiece model"),
    ],
)
def test_wrong_use_ends_with_a_sentence_and_exit_code_2(trained, tmp_path, capsys, monkeypatch, b, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.model").write_bytes(b"\x00\x01nothing")
    code, out, err = run(capsys, "tokenizer", "verify", trained["bytes"], b)
    assert (code, out) == (2, "") and err.startswith("tessera: error: ") and sentence in err
    assert err.count("\n") == 1


# ---- the original files ----


@pytest.fixture
def rank_file(trained, tmp_path, monkeypatch):
    """A rank file, with its encoding made known under a name that tiktoken does not have."""
    vocabulary = AutoTokenizer.from_pretrained(trained["bpe"]).get_vocab()
    ranks = {bytes_of_name(token): index for token, index in vocabulary.items() if index < 686}
    path = tmp_path / "small.tiktoken"
    path.write_bytes(
        b"".join(base64.b64encode(t) + b" %d\n" % ranks[t] for t in sorted(ranks, key=ranks.get))
    )
    monkeypatch.setitem(ENCODINGS, "small", Encoding("small", GPT4_PATTERN, 686, {"<|endoftext|>": 686}))
    return path, ranks


def test_a_rank_file_is_run_by_tiktoken_and_the_import_says_what_it_was_compared_with(rank_file, tmp_path):
    path, ranks = rank_file
    codec = open_codec(path)
    reference = tiktoken.Encoding("x", pat_str=GPT4_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert codec.library.startswith("tiktoken") and codec.encode("ka ren 12345") == reference.encode_ordinary(
        "ka ren 12345"
    )
    import_tokenizer(path, output=tmp_path / "out")
    meta = json.loads((tmp_path / "out" / "tokenizer_meta.json").read_text())
    assert meta["verified"]["against"] == f"tiktoken {tiktoken.__version__}"
    assert meta["verified"]["documents"] > 1500
    assert verify_tokenizers(path, tmp_path / "out").equal


def test_gpt2s_two_files_are_run_by_tiktoken(trained, tmp_path):
    # its ids of bytes are in another order than the alphabet's, which trained vocabularies follow too
    described = json.loads((trained["bpe"] / "tokenizer.json").read_text())["model"]
    vocabulary = described["vocab"]
    (tmp_path / "encoder.json").write_text(json.dumps(vocabulary))
    lines = [" ".join(merge) for merge in described["merges"]]
    (tmp_path / "vocab.bpe").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    found = verify_tokenizers(tmp_path, tmp_path)
    assert found.equal and "tiktoken" in found.a
    import_tokenizer(tmp_path, output=tmp_path / "out")
    assert verify_tokenizers(tmp_path, tmp_path / "out").equal


def test_an_import_that_encodes_otherwise_is_not_written(rank_file, tmp_path, monkeypatch):
    path, ranks = rank_file
    other = tiktoken.Encoding("x", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(
        "tessera.tokenization.importing.original_codec", lambda *_: tiktoken_codec(other, "the original")
    )
    with pytest.raises(
        ValueError, match="does not encode as the original does with tiktoken .* first difference"
    ):
        import_tokenizer(path, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_loads_with_another_split_is_not_written(trained, tmp_path, monkeypatch):
    changed(trained["bpe"], tmp_path / "other", set_pattern(GPT2_PATTERN))
    tokenizer = AutoTokenizer.from_pretrained(trained["bpe"])
    other = AutoTokenizer.from_pretrained(tmp_path / "other")
    monkeypatch.setattr("tessera.tokenization.save.AutoTokenizer.from_pretrained", lambda folder: other)
    with pytest.raises(ValueError, match="does not encode as the tokenizer in memory does"):
        save_tokenizer(tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_trained_sentencepiece_model_is_compared_with_sentencepiece_before_it_is_written(
    corpus, tmp_path, monkeypatch
):
    wrong = huggingface_codec(train_tokenizer(kind="bytes"), "the model")
    monkeypatch.setattr("tessera.tokenization.save.sentencepiece_codec", lambda *_: wrong)
    with pytest.raises(ValueError, match="does not encode as the model does"):
        train_tokenizer(corpus, kind="sentencepiece", vocab_size=600, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
