"""What is pulled is what the Hub says it is, opens, and is there whole or not at all."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_model
from huggingface_hub import CommitOperationAdd as Add
from huggingface_hub import HfApi, snapshot_download
from local_hub import TOKEN, Account, LocalHub
from transformers import AutoModelForCausalLM

from tessera import build_byte_tokenizer
from tessera.commands.hub import pull as command
from tessera.conversion import pull as pulling
from tessera.conversion.hub_files import content_hash
from tessera.conversion.pull import pull
from tessera.modeling.loading import load_model

# Of a repository, what is not the model's, or is the model again.
LEFT = ["consolidated.safetensors", "original/consolidated.safetensors", "pytorch_model.bin", "run.log"]
ACCOUNTS = {TOKEN: Account("someone"), "hf_other": Account("other")}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LocalHub(tmp_path_factory.mktemp("hub"), accounts=ACCOUNTS) as hub:
        yield hub


@pytest.fixture
def api(hub, monkeypatch, tmp_path):
    """A client; `pull` in this process talks to the Hub, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.mend()
    hub.requests.clear()
    return log_in(hub, monkeypatch, TOKEN)


def log_in(hub: LocalHub, monkeypatch, token: str | bool) -> HfApi:
    monkeypatch.setattr(pulling, "HfApi", partial(HfApi, endpoint=hub.url, token=token))
    monkeypatch.setattr(pulling, "snapshot_download", partial(snapshot_download, token=token))
    return HfApi(endpoint=hub.url, token=token)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "ours"
    tiny_model("llama-tiny").save_pretrained(folder, max_shard_size="700KB")
    build_byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def repo(api, model, request) -> str:
    """A repository with the model, and what else lies about in one."""
    name = f"someone/{request.node.name.split('[')[0][5:80]}-{abs(hash(request.node.name)) % 1000}"
    api.create_repo(name)
    others = {
        "pytorch_model.bin": b"a pickle",
        "original/consolidated.safetensors": b"twice",
        "consolidated.safetensors": b"twice",
        "run.log": b"x",
    }
    files = [Add(file.name, str(file)) for file in model.iterdir()]
    files += [Add(path, content) for path, content in others.items()]
    api.create_commit(name, files, commit_message="all")
    return name


def downloads(hub: LocalHub) -> list[str]:
    return [
        path
        for method, path, _ in hub.requests
        if method == "GET" and ("/lfs/" in path or "/resolve/" in path)
    ]


def same_weights(ours, theirs) -> bool:
    state = theirs.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


def test_a_model_comes_without_pickles_and_opens(api, hub, repo, model):
    done = pull(repo)
    folder = Path(repo.split("/")[1])
    assert done.folder == folder.absolute()
    assert {path.name for path in folder.iterdir()} == {path.name for path in model.iterdir()}
    assert same_weights(load_model(model), load_model(folder))
    assert (done.kind, done.parameters) == ("tessera", load_model(model).num_parameters())
    assert done.left == LEFT
    assert done.has_tokenizer and not done.has_template
    assert done.commit == api.model_info(repo).sha
    assert done.size == sum(path.stat().st_size for path in folder.iterdir())
    assert [path.name for path in Path().iterdir()] == [folder.name]


def test_it_is_converted_on_the_way(api, repo, model):
    for name in ("README.md", "LICENSE"):
        api.upload_file(path_or_fileobj=b"# mine\n", path_in_repo=name, repo_id=repo)
    done = pull(repo, "as-llama", to="llama", dtype="bfloat16")
    assert Path("as-llama/README.md").read_text() == Path("as-llama/LICENSE").read_text() == "# mine\n"
    for report in Path("as-llama").glob("conversion_report.*"):
        assert repo in report.read_text() and ".download" not in report.read_text()
    assert (done.kind, "converted from tessera to llama in bfloat16") == ("llama", done.notes[-1])
    theirs = AutoModelForCausalLM.from_pretrained("as-llama", dtype="auto")
    assert type(theirs).__module__.endswith("modeling_llama") and theirs.dtype == torch.bfloat16
    rounded = load_model(model).to(torch.bfloat16).state_dict()
    assert torch.equal(theirs.state_dict()["model.norm.weight"], rounded["model.norm.weight"])
    assert [path.name for path in Path().iterdir()] == ["as-llama"]


def test_what_cannot_be_converted_has_come_all_the_same(api, hub, repo):
    with pytest.raises(ValueError, match="cannot be a gpt2: .*norm_type.*for another --to"):
        pull(repo, "model", to="gpt2")
    assert [path.name for path in Path().iterdir()] == [".model.download"]
    hub.requests.clear()
    assert pull(repo, "model", to="llama").kind == "llama"
    assert not [path for path in downloads(hub) if "/lfs/" in path]


def test_a_revision_is_a_branch_a_tag_or_a_commit(api, repo):
    first = api.model_info(repo).sha
    api.create_tag(repo, tag="v1")
    api.create_branch(repo, branch="next")
    api.upload_file(path_or_fileobj=b"newer", path_in_repo="README.md", repo_id=repo, revision="next")
    expected = {"v1": False, first: False, "next": True, None: False}
    for number, (revision, there) in enumerate(expected.items()):
        assert pull(repo, f"r{number}", revision=revision).folder.joinpath("README.md").exists() == there
    with pytest.raises(ValueError, match=f"{repo} at nope has no such branch, tag or commit"):
        pull(repo, "no", revision="nope")
    assert not Path("no").exists() and not Path(".no.download").exists()


def test_a_download_that_was_broken_off_goes_on_where_it_was(api, hub, repo, model):
    last = max(model.glob("model-*.safetensors"))
    sha256 = content_hash(last, True)
    hub.break_next("GET", f"/lfs/.*{sha256}", after=1000, times=50)
    sentence = "cannot be reached.*what has come is in .*the same command goes on"
    with pytest.raises(ValueError, match=sentence) as caught:
        pull(repo, "model")
    assert "\n" not in str(caught.value)
    assert not Path("model").exists()
    there = {path.name for path in Path(".model.download").iterdir()}
    came = {name for name in there if name.endswith(".safetensors")}
    assert last.name not in came and "config.json" in there
    hub.mend()
    hub.requests.clear()
    pull(repo, "model")
    fetched = {path.partition("?")[0].rpartition("/")[2] for path in downloads(hub) if "/lfs/" in path}
    assert fetched == {sha256} | {
        content_hash(path, True) for path in model.glob("*.safetensors") if path.name not in came
    }
    assert same_weights(load_model(model), load_model("model"))
    assert [path.name for path in Path().iterdir()] == ["model"]


def test_content_that_is_not_what_was_announced_is_refused(api, hub, repo, model):
    shard = max(model.glob("model-*.safetensors"))
    blob = hub.find("models", repo).blob(content_hash(shard, True))
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-4] + bytes(value ^ 1 for value in whole[-4:]))
    with pytest.raises(ValueError, match=f"{shard.name} of {repo} did not come with the size and hash"):
        pull(repo, "model")
    assert not Path("model").exists() and not (Path(".model.download") / shard.name).exists()
    blob.write_bytes(whole)
    hub.requests.clear()
    pull(repo, "model")
    assert len([path for path in downloads(hub) if "/lfs/" in path]) == 1, "the others were there"


@pytest.mark.parametrize(
    ("path", "content", "sentence"),
    [
        ("config.json", b'{"model_type": "t5"}', "is of model type 't5'; known are tessera, "),
        ("config.json", b"{", ": config.json is not JSON"),
        ("model.safetensors.index.json", b"{}", "is no model that can be opened: .*weight_map"),
        (
            "model-00001-of-00003.safetensors",
            bytes(9),
            "is no model .* opened: .*model-00001-of-00003",
        ),
    ],
)
def test_what_is_no_model_is_told_and_nothing_of_it_stays(path, content, sentence, api, hub, repo):
    api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo)
    hub.requests.clear()
    with pytest.raises(ValueError, match=sentence) as caught:
        pull(repo, "model")
    assert repo in str(caught.value) and ".download" not in str(caught.value)
    assert not list(Path().iterdir())
    if path == "config.json":
        assert not [path for path in downloads(hub) if "/lfs/" in path], "no weights came before it was known"


def test_pickles_alone_are_no_model(api):
    api.create_repo("someone/pickles")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="pytorch_model.bin", repo_id="someone/pickles")
    with pytest.raises(ValueError, match="no safetensors at its top; pytorch_model.bin there is not read"):
        pull("someone/pickles")
    assert not list(Path().iterdir())


def test_what_is_not_given_is_told_in_a_sentence(api, hub, repo, monkeypatch):
    api.create_repo("someone/secret", private=True)
    gated = repo
    api.update_repo_settings(gated, gated="manual")
    cases = [
        (TOKEN, "someone/missing", "there is no someone/missing on the Hub, or it is private"),
        (False, "someone/secret", "there is no someone/secret on the Hub, or it is private"),
        ("hf_other", "someone/secret", "there is no someone/secret on the Hub, or it is private"),
        ("hf_other", gated, f"{gated} is given only to those who were granted access"),
        (False, gated, f"{gated} is given only to those who were granted access"),
        ("hf_wrong", gated, "the Hub does not know the token"),
        (TOKEN, "some one/x", "cannot be a name on the Hub"),
    ]
    for token, name, sentence in cases:
        log_in(hub, monkeypatch, token)
        with pytest.raises(ValueError, match=sentence) as caught:
            pull(name, "model")
        assert "\n" not in str(caught.value) and not list(Path().iterdir())
    monkeypatch.setattr(pulling, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9"))
    with pytest.raises(ValueError, match="the Hub at http://127.0.0.1:9 cannot be reached"):
        pull(gated, "model")
    assert not Path("model").exists()


def test_a_full_disk_and_a_directory_in_the_way_are_told_before_anything_comes(api, hub, repo, monkeypatch):
    Path("model").mkdir()
    Path("model/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="model is there already and not empty"):
        pull(repo, "model")
    full = shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    monkeypatch.setattr(pulling.shutil, "disk_usage", lambda path: full)
    with pytest.raises(ValueError, match=r"has 1.0 MB free, and 1.\d MB of .* are to come"):
        pull(repo, "other")
    assert not [path for path in downloads(hub) if "/lfs/" in path]
    assert [path.name for path in Path().iterdir()] == ["model"]
    hub.requests.clear()
    for given, sentence in (
        ({"dtype": "int3"}, "--dtype int3: choose from float32"),
        ({"dtype": "fp8", "to": "llama"}, "--dtype fp8 for llama: choose from"),
        ({"revision": ""}, "'' cannot be the name of a branch, tag or commit"),
        ({"folder": Path("empty"), "to": "llama"}, "is the current directory, which cannot be replaced"),
    ):
        Path("empty").mkdir(exist_ok=True)
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=sentence):
            if "folder" in given:
                patch.chdir("empty")
                given = {**given, "folder": "."}
            pull(repo, **given)
    assert not hub.requests


def test_the_command_says_what_came_and_how_to_go_on(api, repo, capsys):
    template = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    for name, content in (("tokenizer_config.json", json.dumps(template)), ("README.md", "# mine\n")):
        api.upload_file(path_or_fileobj=content.encode(), path_in_repo=name, repo_id=repo)
    command(repo, "here")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{repo} at main, commit {api.model_info(repo).sha[:8]}: ")
    assert lines[1] == f"stays there: {', '.join(LEFT)}"
    assert lines[2].endswith("parameters, context 512, with tokenizer and chat template")
    assert lines[3:] == ["written: here", "go on:   tessera chat --model here"]


def test_a_tokenizer_inside_the_file_is_not_missed(api, repo):
    pytest.importorskip("gguf")
    assert pull(repo, "one-file", to="gguf").has_tokenizer
    assert list(Path("one-file").glob("*.gguf"))
