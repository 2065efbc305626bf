"""Folders of tokens: opened as memory maps, and refused when they are not what was written."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from local_hub import LocalHub
from transformers import AutoTokenizer

from tessera import build_byte_tokenizer, cli, tokenization
from tessera.data.mixing import Source
from tessera.data.prepare import prepare
from tessera.data.token_files import (
    PreparedData,
    decode_start,
    is_prepared,
    open_prepared,
    read_starts,
    smallest_dtype,
)

TEXTS = [f"Document {i} is about the number {i * i}, which is {i} times {i}." for i in range(300)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of bytes; tests copy it."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([Source(str(folder / "a.jsonl"))], folder / "out", val_fraction=0.1)
    return folder / "out"


@pytest.fixture
def prepared(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "prepared")


def change_meta(folder, **values) -> None:
    path = folder / "data_meta.json"
    meta = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))


# ---- reading ----


def test_a_prepared_folder_opens_as_memory_maps_of_what_was_written(prepared):
    data = open_prepared(prepared, verify=True)
    assert isinstance(data, PreparedData) and data.tokenizer is None
    for split in ("train", "val"):
        tokens = getattr(data, split)
        assert isinstance(tokens.ids, np.memmap) and not tokens.ids.flags.writeable
        assert tokens.ids.tobytes() == (prepared / f"{split}.bin").read_bytes()
        assert tokens.num_bytes == data.meta[split]["bytes"] == len(tokens.ids)
        starts = read_starts(prepared, split)
        texts = [bytes(tokens.ids[a:b]).decode().strip() for a, b in zip(starts, starts[1:], strict=False)]
        assert set(texts) < set(TEXTS)
    assert decode_start(data, "train", 10) == (prepared / "train.bin").read_bytes()[:10].decode()


def test_prepared_folders_are_told_from_text(prepared, tmp_path):
    assert is_prepared(prepared) and is_prepared(str(prepared))
    assert (
        not is_prepared(tmp_path) and not is_prepared(prepared / "train.bin") and not is_prepared("nowhere")
    )
    # What is left of one is refused as one, instead of being read as text.
    (prepared / "data_meta.json").unlink()
    assert is_prepared(prepared)


def test_little_endian_whatever_the_machine(prepared):
    for name, ids in (("uint16", [1, 256, 65535]), ("uint32", [1, 256, 65536 * 5])):
        data = b"".join(number.to_bytes(int(name[4:]) // 8, "little") for number in ids)
        for split in ("train", "val"):
            (prepared / f"{split}.bin").write_bytes(data)
            (prepared / f"{split}.idx").write_bytes((0).to_bytes(8, "little") + (3).to_bytes(8, "little"))
        counts = {"tokens": 3, "documents": 1, "bytes": 3}
        change_meta(prepared, dtype=name, vocab_size=10**6, train=counts, val=counts)
        data = open_prepared(prepared)
        assert data.train.ids.tolist() == ids


@pytest.mark.parametrize(
    ("vocab_size", "name"),
    [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32"), (2**32, "uint32")],
)
def test_the_smallest_type_that_holds_the_vocabulary(vocab_size, name):
    assert smallest_dtype(vocab_size) == name


# ---- what is refused ----


def cut(path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:-size])


DAMAGES = {
    "no folder": (lambda folder: shutil.rmtree(folder), "there is no folder"),
    "no meta": (lambda folder: (folder / "data_meta.json").unlink(), r"has no data_meta\.json"),
    "no train": (lambda folder: (folder / "train.bin").unlink(), r"has no train\.bin"),
    "no val": (lambda folder: (folder / "val.bin").unlink(), r"has no val\.bin"),
    "no idx": (lambda folder: (folder / "train.idx").unlink(), r"has no train\.idx"),
    "cut": (
        lambda folder: cut(folder / "train.bin", 7),
        r"train\.bin has \d+ bytes, but \d+ tokens .* cut short",
    ),
    "cut idx": (
        lambda folder: cut(folder / "val.idx", 3),
        r"val\.idx has \d+ bytes, expected a multiple of 8",
    ),
    "short idx": (lambda folder: cut(folder / "val.idx", 8), r"val\.idx does not fit val\.bin"),
    "meta cut": (lambda folder: cut(folder / "data_meta.json", 9), r"data_meta\.json is not JSON"),
    "meta list": (
        lambda folder: (folder / "data_meta.json").write_text("[]"),
        "holds a list, expected an object",
    ),
    "type": (
        lambda folder: change_meta(folder, dtype="int16"),
        "type 'int16', expected one of uint8, uint16",
    ),
    "other type": (lambda folder: change_meta(folder, dtype="uint16"), "tokens of uint16 are"),
    "newer": (
        lambda folder: change_meta(folder, format=2),
        "in format 2, this version reads up to 1: update",
    ),
    "vocabulary": (lambda folder: change_meta(folder, vocab_size=100), "beyond the vocabulary of 100"),
    "words for numbers": (lambda folder: change_meta(folder, vocab_size="32k"), "'32k', expected a number"),
    "words for counts": (lambda folder: change_meta(folder, val={"bytes": "x"}), "val.bytes is 'x'"),
    "no tokenizer": (lambda folder: change_meta(folder, tokenizer_sha256="0" * 64), "has no tokenizer/"),
    "other tokenizer": (
        lambda folder: (
            build_byte_tokenizer().save_pretrained(folder / "tokenizer"),
            change_meta(folder, tokenizer_sha256="0" * 64),
        ),
        "is not the tokenizer that the tokens of .* were made with",
    ),
    "empty": (
        lambda folder: ((folder / "val.bin").write_bytes(b""), change_meta(folder, val={"tokens": 0})),
        r"val\.bin holds 0 tokens, too few",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_not_what_was_written_is_refused(prepared, damage):
    apply, sentence = DAMAGES[damage]
    apply(prepared)
    with pytest.raises(ValueError, match=sentence):
        open_prepared(prepared)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "val.idx"])
def test_one_changed_byte_is_found_when_everything_is_verified(prepared, name):
    content = bytearray((prepared / name).read_bytes())
    content[len(content) // 2] ^= 1
    (prepared / name).write_bytes(content)
    open_prepared(prepared)
    with pytest.raises(ValueError, match=rf"{name} is damaged: its sha256 is \w+, data_meta\.json says \w+"):
        open_prepared(prepared, verify=True)


def test_ids_beyond_the_vocabulary_are_found_everywhere_when_all_is_read(prepared):
    ids = np.zeros(3_000_000, dtype="<u2")
    ids[1_300_000] = 60_000  # between the places that are looked at otherwise
    ids.tofile(prepared / "train.bin")
    ids[:5000].tofile(prepared / "val.bin")
    for name in ("train.idx", "val.idx"):
        (prepared / name).unlink()
    counts = {"bytes": 1}
    change_meta(prepared, dtype="uint16", vocab_size=400, train=counts, val=counts, sha256=None)
    open_prepared(prepared)
    with pytest.raises(ValueError, match="train.bin holds the id 60000, beyond the vocabulary of 400"):
        open_prepared(prepared, verify=True)


# ---- tokens that others made ----


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A folder as other pipelines publish it: uint16, a SentencePiece model, hardly any description."""
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "tokenizer").mkdir()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "tokenizer" / "spm"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer" / "spm.vocab").unlink()
    processor = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "spm.model"))
    for split, texts in (("train", TEXTS[:250]), ("val", TEXTS[250:])):
        ids = [id for text in texts for id in [*processor.encode(text), processor.eos_id()]]
        np.array(ids, dtype="<u2").tofile(folder / f"{split}.bin")
    notes = {"vocab_size": 300, "train": 250, "sources": ["web"], "filters": ["long"], "sha256": "0" * 64}
    (folder / "data_meta.json").write_text(json.dumps({**notes, "tokenizer_sha256": "of spm.model"}))
    return folder


@pytest.mark.parametrize("dtype", [None, "uint16", "<u2", "numpy.uint16"])
def test_tokens_that_others_made_are_read_as_they_are(foreign, tmp_path, dtype):
    folder = shutil.copytree(foreign, tmp_path / "foreign")
    change_meta(folder, dtype=dtype)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    data = open_prepared(folder, verify=True)
    assert data.train.ids.tobytes() == (foreign / "train.bin").read_bytes()
    assert data.val.num_bytes == len("\n".join(TEXTS[250:]).encode())
    assert data.train.num_bytes == pytest.approx(len("\n".join(TEXTS[:250]).encode()), rel=0.05)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    assert len(tokenizer) == 300
    first = data.train.ids[: data.train.ids.tolist().index(tokenizer.eos_token_id)]
    assert tokenizer.decode(first.tolist()) == TEXTS[0]
    assert before.items() <= {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}.items()
    assert not list(folder.glob("*.partial"))
    again = open_prepared(folder)  # reads what was converted
    assert again.tokenizer == data.tokenizer and again.val.num_bytes == data.val.num_bytes


def test_a_process_of_the_same_number_elsewhere_does_not_disturb(foreign, tmp_path, monkeypatch):
    folder = shutil.copytree(foreign, tmp_path / "foreign")
    convert = tokenization.import_tokenizer

    def overtaken(*arguments, **options):
        monkeypatch.setattr(tokenization, "import_tokenizer", convert)
        converted = convert(*arguments, **options)
        save = converted.save_pretrained

        def save_late(aside):
            aside.mkdir()
            (aside / "begun").touch()
            open_prepared(folder)  # with the same process id, since it is this one
            assert (aside / "begun").is_file()
            save(aside)

        converted.save_pretrained = save_late
        return converted

    monkeypatch.setattr(tokenization, "import_tokenizer", overtaken)
    assert len(AutoTokenizer.from_pretrained(open_prepared(folder).tokenizer)) == 300
    assert not list(folder.glob(".tokenizer-*"))


def test_tokens_that_others_made_are_shown(foreign, tmp_path, capsys):
    folder = shutil.copytree(foreign, tmp_path / "foreign")
    code, out, _ = tessera(capsys, "data", "inspect", folder, "--verify")
    assert code == 0 and TEXTS[0] in out


def test_tokens_without_a_tokenizer_are_refused(foreign, tmp_path):
    folder = shutil.copytree(foreign, tmp_path / "foreign")
    (folder / "tokenizer" / "spm.model").unlink()
    with pytest.raises(ValueError, match="holds neither tokenizer.json nor a SentencePiece model"):
        open_prepared(folder)
    (folder / "tokenizer").rmdir()
    with pytest.raises(ValueError, match="has no tokenizer/, so that nobody knows what its ids mean"):
        open_prepared(folder)


DOWNLOAD = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from tessera.data.download import download

source, folder = map(Path, sys.argv[1:])
for repo, kind in (("someone/tokens", "dataset"), ("someone/model-tokens", "model")):
    HfApi().create_repo(repo, repo_type=kind)
    HfApi().upload_folder(repo_id=repo, repo_type=kind, folder_path=source)
    download(repo, folder / kind)
HfApi().create_repo("someone/else", repo_type="dataset")
damaged = {"val.bin": b"xyz", "data_meta.json": b'{"val": {"tokens": 9}}'}
for repo, files in (("someone/else", {"a.txt": b"x"}), ("someone/tokens", damaged)):
    for name, content in files.items():
        HfApi().upload_file(repo_id=repo, repo_type="dataset", path_or_fileobj=content, path_in_repo=name)
for repo in ("someone/else", "someone/nothing", "someone/tokens", "no name"):
    try:
        download(repo, folder / "refused")
    except ValueError as error:
        print(error)
"""


def test_tokens_are_fetched_from_the_hub_and_checked(foreign, tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        done = subprocess.run(
            [sys.executable, "-c", DOWNLOAD, str(foreign), str(tmp_path / "got")],
            env={**os.environ, **hub.environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            encoding="utf-8",
        )
    assert done.returncode == 0, done.stderr
    for kind in ("dataset", "model"):
        folder = tmp_path / "got" / kind
        for name in ("train.bin", "val.bin", "data_meta.json", "tokenizer/spm.model"):
            assert (folder / name).read_bytes() == (foreign / name).read_bytes()
        assert not list(folder.glob(".*"))
    sentences = done.stdout.splitlines()
    assert "someone/else on the Hub has no data_meta.json: it does not hold tokens" in sentences[0]
    assert "there is no dataset or model someone/nothing on the Hub" in sentences[1]
    assert "cut short" in sentences[2]
    assert "no name on the Hub" in sentences[3]
    assert sorted(path.name for path in (tmp_path / "got").iterdir()) == ["dataset", "model"]


# ---- the commands ----


def tessera(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli.run([str(argument) for argument in arguments])
    return exit.value.code or 0, *capsys.readouterr()


def test_prepare_shows_its_counts_and_inspect_what_is_there(tmp_path, capsys):
    source = tmp_path / "a.jsonl"
    rows = [{"body": text} for text in [*TEXTS, "short", TEXTS[0]]]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = tessera(
        capsys, "data", "prepare", "--data", f"{source}:2", "--column", "body", "--output", tmp_path / "out",
        "--filters", "duplicate", "--min-chars", "9", "--val-fraction", "0.1", "--workers", "1",
    )  # fmt: skip
    assert code == 0
    meta = json.loads((tmp_path / "out" / "data_meta.json").read_text())
    lines = [line.split() for line in out.splitlines()]
    assert ["train", str(meta["train"]["documents"]), f"{meta['train']['tokens']:,}", "0.0", "1.00"] in lines
    row = ["300", f"{meta['sources'][0]['tokens']:,}", "0.0", "0.98", "100.0", "%", "2.0"]
    assert [str(source), *row] in lines
    assert ["too_short", "1", "0.33", "%"] in lines and ["duplicate", "1", "0.33", "%"] in lines
    code, out, _ = tessera(capsys, "data", "inspect", tmp_path / "out", "--verify", "--characters", "20")
    assert code == 0
    assert f"train begins:\n{(tmp_path / 'out' / 'train.bin').read_text()[:20]}\n" in out
    cut(tmp_path / "out" / "train.bin", 1)
    code, out, err = tessera(capsys, "data", "inspect", tmp_path / "out")
    assert (code, out) == (2, "") and err.startswith("tessera: error: ") and "cut short" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either --data or --preset"),
        (["--data", "a.txt", "--preset", "c4-wikipedia"], "give either --data or --preset"),
        (["--preset", "c4"], "there is no mixture 'c4'; there are c4-wikipedia"),
        (["--data", "nowhere.txt"], "there is no file or folder nowhere.txt"),
        (["--data", "nowhere.txt:-1"], "the weight of nowhere.txt must be positive"),
        (["--data", "a.txt", "--tokens", "0.5"], "--tokens must be at least 1, got 0.5"),
        (["--data", "a.txt", "--tokens", "nan"], "--tokens must be at least 1"),
        (["--data", "a.txt", "--filters", "all"], "there is no filter 'all'"),
    ],
)
def test_mistakes_end_in_a_sentence(tmp_path, capsys, arguments, sentence):
    code, _, err = tessera(capsys, "data", "prepare", "--output", tmp_path / "out", *arguments)
    assert code == 2 and err.startswith("tessera: error: ") and sentence in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
