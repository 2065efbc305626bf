"""Tokens to the Hub and back, against a server of its protocol on this machine."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from local_hub import Account, LocalHub

from tessera import build_byte_tokenizer
from tessera.data.mixing import Source
from tessera.data.prepare import prepare
from tessera.data.upload import upload, write_card


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    build_byte_tokenizer(eos_token="<|endoftext|>").save_pretrained(folder / "tokenizer")
    rows = [{"text": f"Document {i} is about {i * i}. " * 9} for i in range(200)]
    (folder / "private name.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(str(folder / "private name.jsonl"))
    prepare([source], folder / "out", tokenizer=str(folder / "tokenizer"), val_fraction=0.1)
    return folder / "out"


def run(hub, *arguments, **variables):
    environment = {**os.environ, **hub.environment, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "tessera", "data", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")


def test_tokens_go_to_the_hub_and_come_back_byte_for_byte(tokens, tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        sent = run(hub, "upload", tokens, "someone/tokens", "--private")
        assert sent.returncode == 0, sent.stderr
        uploads = [path for method, path, _ in hub.requests if method == "PUT"]
        assert len(uploads) >= 2, "the ids go to storage for large files"
        got = run(hub, "download", "someone/tokens", "--output", tmp_path / "got")
        assert got.returncode == 0, got.stderr
        # Public already: what was asked for cannot be had.
        assert run(hub, "upload", tokens, "someone/open").returncode == 0
        refused = run(hub, "upload", tokens, "someone/open", "--private")
        assert refused.returncode == 2 and "is there already and public" in refused.stderr
    for path in tokens.rglob("*"):
        if path.is_file() and path.name != "data_meta.json":
            assert (tmp_path / "got" / path.relative_to(tokens)).read_bytes() == path.read_bytes()


def files_in(hub, name):
    repository = hub.find("datasets", name)
    files = repository.commit(repository.resolve("main"))["files"]
    return {path: repository.blob(file["sha256"]).read_bytes() for path, file in files.items()}


CARDS = r"""
import sys
from huggingface_hub import HfApi
for name, text in (("README.md", b"By hand."), ("notes/a.txt", b"Mine.")):
    HfApi().upload_file(path_or_fileobj=text, path_in_repo=name, repo_id=sys.argv[1], repo_type="dataset")
"""


def test_other_tokens_replace_those_of_before_but_no_card_of_somebodys_hand(tokens, tmp_path):
    source = Source(str(tokens.parent / "private name.jsonl"))
    prepare([source], tmp_path / "bytes", val_fraction=0.1)
    with LocalHub(tmp_path / "hub") as hub:
        assert run(hub, "upload", tokens, "someone/tokens").returncode == 0
        first = files_in(hub, "someone/tokens")
        assert run(hub, "upload", tmp_path / "bytes", "someone/tokens").returncode == 0
        second = files_in(hub, "someone/tokens")
        environment = {**os.environ, **hub.environment}
        subprocess.run([sys.executable, "-c", CARDS, "someone/tokens"], env=environment, check=True)
        assert run(hub, "upload", tokens, "someone/tokens").returncode == 0
        third = files_in(hub, "someone/tokens")
    assert "tokenizer/tokenizer.json" in first
    assert not [name for name in second if name.startswith("tokenizer/")]
    # The card of an earlier upload is nobody's work: it tells of the tokens that are there.
    assert second["README.md"] != first["README.md"] and b"as uint8" in second["README.md"]
    assert third["README.md"] == b"By hand." and third["notes/a.txt"] == b"Mine."
    assert third["train.bin"] == first["train.bin"] and third.keys() == first.keys() | {"notes/a.txt"}


def test_what_goes_wrong_is_a_sentence_and_the_next_call_succeeds(tokens, tmp_path):
    accounts = {"hf_may": Account("someone"), "hf_reads": Account("someone", may_write=False)}
    with LocalHub(tmp_path / "hub", accounts=accounts) as hub:
        for token, sentence in (("hf_unknown", "does not know the token"), ("hf_reads", "may not write")):
            done = run(hub, "upload", tokens, "someone/tokens", HF_TOKEN=token)
            assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1
        hub.break_next("POST", "/commit/", status=400)
        done = run(hub, "upload", tokens, "someone/tokens")
        assert done.returncode == 2 and "refused someone/tokens (400)" in done.stderr
        assert run(hub, "upload", tokens, "someone/tokens").returncode == 0
        assert run(hub, "download", "someone/tokens", "--output", tmp_path / "got").returncode == 0


def test_a_folder_that_is_damaged_is_not_sent(tokens, tmp_path):
    damaged = shutil.copytree(tokens, tmp_path / "damaged")
    content = bytearray((damaged / "train.bin").read_bytes())
    content[100] ^= 1
    (damaged / "train.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.bin is damaged"):
        upload(damaged, "someone/tokens", dry_run=tmp_path / "dry")
    assert not (tmp_path / "dry").exists()
    for repo, sentence in (("tokens", "lacks the owner"), ("a b/c", "cannot be a name")):
        with pytest.raises(ValueError, match=sentence):
            upload(tokens, repo, dry_run=tmp_path / "dry")


def test_a_dry_run_has_what_would_be_sent_and_the_card_no_path(tokens, tmp_path):
    upload(tokens, "someone/tokens", dry_run=tmp_path / "dry")
    names = {str(path.relative_to(tmp_path / "dry")) for path in (tmp_path / "dry").rglob("*.*")}
    assert {"README.md", "train.bin", "val.idx", "data_meta.json", "tokenizer/tokenizer.json"} <= names
    sent = (tmp_path / "dry" / "data_meta.json").read_text()
    assert "private name.jsonl" in sent and str(tokens.parent) not in sent
    card = (tmp_path / "dry" / "README.md").read_text()
    assert "private name.jsonl" in card and str(tokens.parent) not in card
    meta = json.loads((tokens / "data_meta.json").read_text())
    assert f"| train | {meta['train']['documents']:,} | {meta['train']['tokens']:,} |" in card
    assert card == write_card(meta, "someone/tokens")


@pytest.mark.parametrize(
    ("given", "published"),
    [
        ("/gone/corpus/pages", "pages"),
        ("~/corpus/", "corpus"),
        ("../corpus", "corpus"),
        ("secret/pages.jsonl", "pages.jsonl"),
        ("secret/pages.txt.zst", "pages.txt.zst"),
        ("secret/corpus/pages", "pages"),
        ("C:\\secret\\pages", "pages"),
        ("org/name", "org/name"),
        ("org/name-1.5", "org/name-1.5"),
    ],
)
def test_a_source_that_is_gone_is_published_without_its_folder(tokens, tmp_path, given, published):
    folder = shutil.copytree(tokens, tmp_path / "tokens")
    meta = json.loads((folder / "data_meta.json").read_text())
    meta["sources"][0]["source"] = given
    meta["val_data"] = [given]
    (folder / "data_meta.json").write_text(json.dumps(meta))
    upload(folder, "someone/tokens", dry_run=tmp_path / "dry")
    sent = json.loads((tmp_path / "dry" / "data_meta.json").read_text())
    assert sent["sources"][0]["source"] == published and sent["val_data"] == [published]
    assert f"\n| {published} |" in (tmp_path / "dry" / "README.md").read_text()
