"""A push changes what it says it changes, all of it in one commit, and goes on where it was broken off."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
from helpers.models import tiny_model
from huggingface_hub import CommitOperationAdd as Add
from huggingface_hub import HfApi
from local_hub import TOKEN, Account, LocalHub

from tessera import build_byte_tokenizer
from tessera.commands.hub import push as command
from tessera.conversion import push as pushing
from tessera.conversion.push import push

ACCOUNTS = {TOKEN: Account("someone"), "hf_reader": Account("someone", may_write=False)}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LocalHub(tmp_path_factory.mktemp("hub"), accounts=ACCOUNTS) as hub:
        yield hub


@pytest.fixture
def api(hub, monkeypatch):
    """A client; `push` in this process talks to the Hub, and does not try its release in another one."""
    monkeypatch.setattr(pushing, "get_token", lambda: TOKEN)
    monkeypatch.setattr(pushing, "HfApi", partial(HfApi, endpoint=hub.url, token=TOKEN))
    monkeypatch.setattr(pushing, "check_release", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.mend()
    hub.requests.clear()
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model in several files."""
    folder = tmp_path_factory.mktemp("model") / "ours"
    tiny_model("llama-tiny").save_pretrained(folder, max_shard_size="700KB")
    build_byte_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def uploads(hub: LocalHub) -> list[str]:
    return [path.rpartition("/")[2].partition("?")[0] for method, path, _ in hub.requests if method == "PUT"]


def history(hub: LocalHub, name: str, revision: str = "main") -> list[set[str]]:
    """Names of the files in each commit, the newest first."""
    repository = hub.find("models", name)
    return [set(commit["files"]) for _, commit in repository.history(repository.resolve(revision))]


def test_a_dry_run_lists_what_would_go_where_and_sends_nothing(api, hub, model):
    lines = []
    assert (
        push(model, "someone/dry", dry_run=True, private=True, say=lines.append) == f"{hub.url}/someone/dry"
    )
    text = "\n".join(lines)
    shard = next(model.glob("model-00001*"))
    row = next(line.split() for line in lines if shard.name in line)
    assert row[1:] == [f"{shard.stat().st_size / 1e3:.1f}", "kB", "weights,", "large-file", "storage"]
    assert "modeling_tessera.py" in text and "code of the model" in text and "chat_template" not in text
    assert "to: someone/dry, new and private, branch main" in lines
    assert {method for method, _, _ in hub.requests} == {"GET"}
    assert not (hub.root / "models/someone/dry").exists()


def test_a_dry_run_goes_on_without_a_hub(api, model, monkeypatch):
    monkeypatch.setattr(pushing, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9", token=TOKEN))
    lines = []
    push(model, "someone/dry", dry_run=True, say=lines.append)
    assert lines[0].startswith("what is at someone/dry now is not known: the Hub at http://127.0.0.1:9")
    assert lines[-1] == "to: someone/dry, branch main"


@pytest.mark.parametrize("how", [{"after": 1000}, {"status": 503}], ids=["cut", "503"])
def test_an_upload_that_was_broken_off_goes_on_where_it_was(how, api, hub, model, monkeypatch):
    name = f"someone/half-{'cut' if 'after' in how else 'refused'}"
    # One after the other, so that it is known which have arrived.
    monkeypatch.setattr(pushing, "_TOGETHER", 1)
    shards = sorted(model.glob("model-*.safetensors"))
    last = shards[-1]
    sha256 = pushing.content_hash(last, True)
    hub.break_next("PUT", f"/lfs/.*{sha256}", times=12, **how)
    sentence = (
        "the Hub (at .* cannot be reached|refused).*; what has arrived is kept there, and the same command"
    )
    with pytest.raises(ValueError, match=f"no commit was made: {sentence}") as caught:
        push(model, name)
    assert "\n" not in str(caught.value)
    assert history(hub, name) == [set()], "no reader sees half of it"
    hub.mend()
    arrived = {path.name for path in (hub.root / "models" / name / "blobs").iterdir()}
    assert 0 < len(arrived) < len(shards) + 1
    hub.requests.clear()
    push(model, name)
    assert not arrived & set(uploads(hub)) and sha256 in uploads(hub)
    files, empty = history(hub, name)
    assert {shard.name for shard in shards} < files and not empty


def test_a_connection_that_is_lost_in_the_commit_leaves_all_or_nothing(api, hub, model):
    hub.break_next("POST", "/commit/main", after=100, times=12)
    with pytest.raises(ValueError, match="cannot be reached.*the same command sends the rest"):
        push(model, "someone/lost")
    assert history(hub, "someone/lost") == [set()]
    hub.mend()
    hub.requests.clear()
    url = push(model, "someone/lost")
    assert not uploads(hub), "all contents had arrived"
    lines = []
    # As if the answer had been lost after the commit: everything is there, and it stays one commit.
    assert push(model, "someone/lost", say=lines.append) == url
    assert "everything is there already: no commit" in lines
    assert len(history(hub, "someone/lost")) == 2


@pytest.mark.parametrize(
    ("number", "method", "path", "status", "sentence"),
    [
        (0, "POST", "/commit/main", 413, r"the Hub refused someone/no-. \(413\).*no-0 was created, public$"),
        (
            1,
            "POST",
            "/preupload/",
            403,
            "the token may not write to someone/no-.; .*no-1 was created, public$",
        ),
        (2, "POST", "/preupload/", 429, r"the Hub refused someone/no-. \(429\).*created.*sends the rest$"),
        (3, "PUT", "/lfs/", 413, r"no commit was made: the Hub refused someone/no-. \(413\).*public$"),
        (4, "POST", "/repos/create", 500, r"the Hub refused someone/no-. \(500\): [^;]*; what has arrived"),
    ],
)
def test_what_the_hub_refuses_ends_in_a_sentence(number, method, path, status, sentence, api, hub, model):
    hub.break_next(method, path, status=status, times=12)
    with pytest.raises(ValueError, match=sentence) as caught:
        push(model, f"someone/no-{number}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("method", "path", "status"), [("POST", "/preupload/", 429), ("PUT", "/lfs/", 503)])
def test_a_hub_that_is_busy_once_is_asked_again(method, path, status, api, hub, model):
    hub.break_next(method, path, status=status)
    push(model, f"someone/busy-{status}")
    assert len(history(hub, f"someone/busy-{status}")) == 2


def test_who_may_not_write_is_told_so(api, hub, model, monkeypatch, tmp_path):
    monkeypatch.setattr(pushing, "HfApi", partial(HfApi, endpoint=hub.url, token="hf_reader"))
    with pytest.raises(ValueError, match="the token may not write to someone/mine, it only reads"):
        push(tmp_path / "not even looked at", "someone/mine")
    monkeypatch.setattr(pushing, "HfApi", partial(HfApi, endpoint=hub.url, token=TOKEN))
    with pytest.raises(
        ValueError, match="not write to another/theirs: it is of someone, who can create .*someone"
    ):
        push(tmp_path / "not even looked at", "another/theirs")
    monkeypatch.setattr(pushing, "HfApi", partial(HfApi, endpoint=hub.url, token="hf_ключ"))
    with pytest.raises(ValueError, match="the token for the Hub has characters that no token has"):
        push(tmp_path / "not even looked at", "someone/mine")


def test_what_cannot_be_is_told_before_the_hub_is_asked(api, hub, tmp_path):
    for given, sentence in (
        ({"revision": "refs/pr/1"}, "name a branch without refs/"),
        ({"revision": "bad name"}, "'bad name' cannot be the name of a branch"),
        ({"revision": ""}, "'' cannot be the name of a branch"),
        ({"license": "mit\nprivate: true"}, "is no identifier of the Hub's"),
        ({"dtype": "q8_0"}, "q8_0: choose from float32, bfloat16, float16, and fp8 for native, deepseek_v3"),
        (
            {"dtype": "fp8", "family": "llama"},
            "--dtype fp8 for llama: choose from float32, bfloat16, float16$",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            push(tmp_path / "not even looked at", "someone/mine", **given)
    assert not hub.requests


def test_what_is_replaced_is_said_and_nothing_of_an_earlier_release_is_loaded_with_it(api, hub, model):
    api.create_repo("someone/earlier")
    earlier = {
        "model.safetensors": b"earlier weights",
        "pytorch_model.bin": b"a pickle",
        "chat_template.jinja": b"another template",
        "README.md": b"# earlier\n",
        "notes/plan.md": b"my own",
        "tokenizer/study.json": b"my own",
        "tokenizer_notes/x/y.json": b"my own",
        "tokenizer_corpus.json": b"my own",
        "picture.jpg": b"mine too",
        "config.json": (model / "config.json").read_bytes(),
    }
    head = api.create_commit(
        "someone/earlier", [Add(name, content) for name, content in earlier.items()], commit_message="earlier"
    )
    lines = []
    push(model, "someone/earlier", message="better", say=lines.append)
    text = "\n".join(lines)
    assert "to: someone/earlier, there and public, branch main" in text
    assert "replaced there: README.md" in text
    gone = "chat_template.jinja, model.safetensors, pytorch_model.bin"
    assert f"removed there, being of another release: {gone}" in text
    mine = "notes/plan.md, picture.jpg, tokenizer/study.json, tokenizer_corpus.json, tokenizer_notes/x/y.json"
    assert f"stays there: {mine}" in text
    states = history(hub, "someone/earlier")
    assert len(states) == 3 and not set(gone.split(", ")) & states[0]
    assert {*mine.split(", "), "README.md", "config.json"} < states[0]
    old = api.list_repo_files("someone/earlier", revision=head.oid)
    assert set(old) == earlier.keys(), "it is still in the history"


def test_the_command_lists_or_writes_but_not_both(api, hub, model, capsys):
    with pytest.raises(ValueError, match="--dry-run writes nothing, and --output a directory"):
        command(str(model), "someone/dry", dry_run=True, output="x")
    command(str(model), "someone/dry", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loads without Tessera, with the same logits"
    assert lines[-1] == f"nothing was sent to: {hub.url}/someone/dry"


def test_a_branch_that_moves_in_the_meantime_is_not_overwritten(api, hub, model, monkeypatch):
    api.create_repo("someone/moving")

    def move(*_):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="config.json", repo_id="someone/moving")

    monkeypatch.setattr(pushing, "check_release", move)
    with pytest.raises(ValueError, match=r"\(412\): A commit has happened since"):
        push(model, "someone/moving")
    assert history(hub, "someone/moving")[0] == {"config.json"}


def test_a_branch_is_made_and_a_tag_is_left_as_it_is(api, hub, model):
    push(model, "someone/branches", revision="try/this")
    assert history(hub, "someone/branches") == [set()]
    assert len(history(hub, "someone/branches", "try/this")) == 2
    api.create_tag("someone/branches", tag="v1")
    with pytest.raises(ValueError, match="v1 is a tag of someone/branches"):
        push(model, "someone/branches", revision="v1")


def test_what_shall_be_private_does_not_go_where_everybody_reads(api, hub, model):
    repository = hub.create("models", "someone/public")
    with pytest.raises(ValueError, match="someone/public is there already and public"):
        push(model, "someone/public", private=True)
    assert not repository.commit(repository.resolve("main"))["files"]


def test_pickles_state_logs_and_secrets_stay_behind_and_links_go_as_what_they_name(api, hub, model, tmp_path):
    folder, elsewhere = tmp_path / "ours", tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.mkdir()
    for file in model.iterdir():
        (elsewhere / file.name).write_bytes(file.read_bytes())
        (folder / file.name).symlink_to(elsewhere / file.name)
    for name in ("training_args.bin", "pytorch_model.bin", ".env", "train.log", "optimizer.safetensors"):
        (folder / name).write_bytes(b"not for others")
    (folder / "checkpoints").mkdir()
    (folder / "vocab.json").symlink_to(tmp_path / "nowhere")
    lines = []
    push(folder, "someone/clean", say=lines.append)
    left = ".env, checkpoints/, optimizer.safetensors, pytorch_model.bin, train.log, training_args.bin"
    assert f"stays here: {left}, vocab.json" in lines
    files = history(hub, "someone/clean")[0]
    assert not files & set(left.split(", "))
    sizes = {entry.path: entry.size for entry in api.list_repo_tree("someone/clean")}
    for shard in model.glob("model-*.safetensors"):
        assert sizes[shard.name] == shard.stat().st_size


def raise_overflow(*_, **__):
    raise OverflowError("converts again")


def test_a_conversion_is_kept_for_the_next_attempt_and_not_after_it(api, hub, model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    kept = tmp_path / "cache/tessera/push"
    hub.break_next("POST", "/commit/main", status=500, times=12)
    with pytest.raises(ValueError, match="500"):
        push(model, "someone/kept", family="llama", dtype="bfloat16")
    assert len(list(kept.iterdir())) == 2
    hub.mend()
    (kept / "old").mkdir()
    os.utime(kept / "old", (0, 0))
    push(model, "someone/kept", family="llama", dtype="bfloat16", dry_run=True)
    assert len(list(kept.iterdir())) == 2, (
        "what waits to be sent is there still, and what nobody wants is not"
    )
    with monkeypatch.context() as patch, pytest.raises(OverflowError):
        patch.setattr("transformers.__version__", "another")
        patch.setattr("tessera.conversion.release.convert", raise_overflow)
        push(model, "someone/kept", family="llama", dtype="bfloat16", dry_run=True)
    with monkeypatch.context() as patch:
        patch.setattr("tessera.conversion.release.convert", lambda *_, **__: pytest.fail("converts again"))
        push(model, "someone/kept", family="llama", dtype="bfloat16")
    assert not list(kept.iterdir())
    repository = hub.find("models", "someone/kept")
    file = repository.commit(repository.resolve())["files"]["config.json"]
    config = json.loads(repository.blob(file["sha256"]).read_text())
    assert (config["model_type"], config["dtype"]) == ("llama", "bfloat16")
