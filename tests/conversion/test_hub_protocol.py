"""The Hub of the examples answers huggingface_hub as the real one does, also when it refuses or fails."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd as Add
from huggingface_hub import CommitOperationCopy as Copy
from huggingface_hub import CommitOperationDelete as Delete
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from local_hub import TOKEN, Account, LocalHub

ACCOUNTS = {
    TOKEN: Account("someone", organisations=("a-lab",)),
    "hf_reader": Account("someone", may_write=False),
    "hf_other": Account("other"),
}
WEIGHTS = bytes(range(256)) * 1200


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LocalHub(tmp_path_factory.mktemp("hub"), accounts=ACCOUNTS) as hub:
        yield hub


@pytest.fixture
def client(hub, monkeypatch):
    """Makes clients for tokens, in this process: `client()` is the owner's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return lambda token=TOKEN: HfApi(endpoint=hub.url, token=token)


@pytest.fixture
def repo(client, request) -> str:
    """A repository with a small and a large file."""
    name = f"someone/{request.node.name.split('[')[0][:90]}"
    api = client()
    api.create_repo(name, exist_ok=True)
    api.create_commit(
        name,
        [Add("notes/a.txt", b"alpha"), Add("model.safetensors", WEIGHTS)],
        commit_message="the first files",
    )
    return name


def content(api: HfApi, repo: str, path: str, cache: Path, **where) -> bytes:
    return Path(api.hf_hub_download(repo, path, cache_dir=cache, **where)).read_bytes()


def files(api: HfApi, repo: str, **where) -> set[str]:
    return set(api.list_repo_files(repo, **where))


# ---- commits ----


def test_a_commit_adds_copies_and_deletes_and_the_one_before_stays(client, repo, tmp_path):
    api = client()
    first = api.model_info(repo).sha
    commit = api.create_commit(
        repo,
        [
            Add("b.txt", b"beta"),
            Copy("notes/a.txt", "notes/copy.txt"),
            Copy("model.safetensors", "copy.safetensors"),
            Delete("model.safetensors"),
        ],
        commit_message="the second",
    )
    assert files(api, repo) == {"b.txt", "notes/a.txt", "notes/copy.txt", "copy.safetensors"}
    assert content(api, repo, "copy.safetensors", tmp_path) == WEIGHTS
    assert content(api, repo, "notes/copy.txt", tmp_path) == b"alpha"
    assert content(api, repo, "model.safetensors", tmp_path, revision=first) == WEIGHTS
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(repo, "model.safetensors", cache_dir=tmp_path)
    history = [(entry.commit_id, entry.title) for entry in api.list_repo_commits(repo)]
    assert history[:2] == [(commit.oid, "the second"), (first, "the first files")]
    api.delete_folder("notes", repo)
    assert files(api, repo) == {"b.txt", "copy.safetensors"}


def test_a_commit_on_a_state_that_is_no_more_is_refused(client, repo):
    api = client()
    old = api.model_info(repo).sha
    api.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id=repo, parent_commit=old[:7])
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.upload_file(path_or_fileobj=b"2", path_in_repo="x", repo_id=repo, parent_commit=old)
    assert api.get_paths_info(repo, "x")[0].size == 1


def test_size_and_ending_decide_what_is_uploaded_on_its_own(client, repo, hub):
    api = client()
    operations = [Add("big.txt", bytes(10 << 20)), Add("s.bin", bytes(9)), Add("s.txt", bytes(9))]
    api.create_commit(repo, operations, commit_message="three")
    infos = {info.path: info for info in api.get_paths_info(repo, ["big.txt", "s.bin", "s.txt"])}
    assert {path for path, info in infos.items() if info.lfs} == {"big.txt", "s.bin"}
    assert [infos[path].size for path in ("big.txt", "s.bin", "s.txt")] == [10 << 20, 9, 9]
    puts = [path for method, path, _ in hub.requests if method == "PUT"]
    api.create_commit(repo, [Add("again.bin", bytes(9))], commit_message="known content")
    assert [path for method, path, _ in hub.requests if method == "PUT"] == puts


def test_a_long_tree_comes_in_pages_and_expanded_says_where_files_are_from(client, repo):
    api = client()
    first = api.model_info(repo).sha
    names = {f"many/{i:03}.txt" for i in range(120)}
    many = api.create_commit(repo, [Add(name, name.encode()) for name in names], commit_message="many")
    entries = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True, expand=True)}
    assert entries.keys() == names | {"many", "notes", "notes/a.txt", "model.safetensors"}
    assert entries["notes/a.txt"].last_commit.oid == first
    assert entries["many/119.txt"].last_commit.oid == many.oid
    assert {entry.path for entry in api.list_repo_tree(repo)} == {"many", "notes", "model.safetensors"}
    assert {entry.path for entry in api.list_repo_tree(repo, "many")} == names


# ---- branches, tags, pull requests ----


def test_branches_and_tags_are_revisions(client, repo, tmp_path):
    api = client()
    api.create_tag(repo, tag="v1")
    api.create_branch(repo, branch="try/this", revision="v1")
    api.upload_file(path_or_fileobj=b"new", path_in_repo="notes/a.txt", repo_id=repo, revision="try/this")
    for revision, expected in (("v1", b"alpha"), ("main", b"alpha"), ("try/this", b"new")):
        assert content(api, repo, "notes/a.txt", tmp_path, revision=revision) == expected
    refs = api.list_repo_refs(repo)
    assert [ref.name for ref in refs.branches] == ["main", "try/this"]
    assert [(ref.name, ref.ref) for ref in refs.tags] == [("v1", "refs/tags/v1")]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(repo, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo, revision="v1")
    api.delete_branch(repo, branch="try/this")
    api.delete_tag(repo, tag="v1")
    for revision in ("v1", "try/this"):
        with pytest.raises(RevisionNotFoundError):
            api.model_info(repo, revision=revision)


def test_whoever_may_not_write_proposes(client, repo, tmp_path):
    theirs, ours = client("hf_other"), client()
    upload = {"path_or_fileobj": WEIGHTS[1:], "path_in_repo": "model.safetensors", "repo_id": repo}
    with pytest.raises(HfHubHTTPError, match="403 Forbidden: .*other may not write"):
        theirs.upload_file(**upload)
    proposed = theirs.upload_file(**upload, create_pr=True)
    assert proposed.pr_num == 1
    assert content(ours, repo, "model.safetensors", tmp_path) == WEIGHTS
    assert content(ours, repo, "model.safetensors", tmp_path, revision="refs/pr/1") == WEIGHTS[1:]
    with pytest.raises(HfHubHTTPError, match="403"):
        theirs.merge_pull_request(repo, 1)
    ours.merge_pull_request(repo, 1)
    assert content(ours, repo, "model.safetensors", tmp_path) == WEIGHTS[1:]
    assert [(pull.num, pull.status) for pull in ours.get_repo_discussions(repo)] == [(1, "merged")]
    refs = ours.list_repo_refs(repo, include_pull_requests=True)
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]


# ---- who may do what ----


def test_each_token_may_do_what_it_may(client, repo, tmp_path):
    ours, private = client(), f"{repo}-private"
    ours.create_repo(private, private=True)
    assert ours.whoami()["name"] == "someone"
    assert client("hf_reader").model_info(private).private
    assert private in {model.id for model in client("hf_reader").list_models(author="someone")}
    assert private not in {model.id for model in client("hf_other").list_models(author="someone")}
    upload = {"path_or_fileobj": b"x", "path_in_repo": "x", "repo_id": repo}
    for call, error, words in (
        (lambda: client("hf_wrong").whoami(), HfHubHTTPError, "Invalid user token"),
        (lambda: client("hf_wrong").model_info(repo), HfHubHTTPError, "Invalid credentials"),
        (lambda: client(False).upload_file(**upload), HfHubHTTPError, "401"),
        (lambda: client("hf_reader").upload_file(**upload), HfHubHTTPError, "403 Forbidden: .*write token"),
        (lambda: client("hf_other").create_repo("someone/new"), HfHubHTTPError, "403 Forbidden: .*someone"),
        (lambda: client("hf_other").delete_repo(repo), HfHubHTTPError, "403"),
        (lambda: client("hf_other").model_info(private), RepositoryNotFoundError, "404"),
        (lambda: client(False).model_info(private), RepositoryNotFoundError, "401"),
        (lambda: client("hf_other").hf_hub_download(private, "x", cache_dir=tmp_path), Exception, "404"),
        (lambda: client("hf_other").delete_repo(private), RepositoryNotFoundError, "404"),
        (lambda: ours.create_repo(private), HfHubHTTPError, "409"),
        (lambda: ours.create_branch(repo, branch="bad name"), HfHubHTTPError, "Invalid reference name"),
        (lambda: ours.create_branch(repo, branch="refs/pr/1"), HfHubHTTPError, "Invalid reference name"),
    ):
        with pytest.raises(error, match=words):
            call()
    assert ours.create_repo("a-lab/shared").repo_id == "a-lab/shared"
    assert [lab["name"] for lab in ours.whoami()["orgs"]] == ["a-lab"]
    ours.delete_repo(private)
    assert not ours.repo_exists(private)


def test_a_gated_model_is_seen_by_all_and_read_by_its_owner(client, repo, tmp_path):
    client().update_repo_settings(repo, gated="manual")
    assert client("hf_other").model_info(repo).gated == "manual"
    for token in ("hf_other", False):
        with pytest.raises(GatedRepoError):
            client(token).hf_hub_download(repo, "notes/a.txt", cache_dir=tmp_path)
    assert content(client(), repo, "notes/a.txt", tmp_path) == b"alpha"


def test_the_address_of_content_is_worth_nothing_to_others(client, repo, hub):
    # A large file is served from a signed address, which needs no token and cannot be made up.
    path = f"/lfs/models/{repo}/{client().get_paths_info(repo, 'model.safetensors')[0].lfs.sha256}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError, match="403"):
        opener.open(urllib.request.Request(hub.url + path, headers={"Authorization": f"Bearer {TOKEN}"}))
    assert opener.open(hub.sign(path)).read() == WEIGHTS


# ---- what goes wrong on the way ----


def test_a_download_that_is_cut_goes_on_where_it_was(client, repo, hub, tmp_path):
    # Not less than a block of the client's, which it keeps only whole.
    large = os.urandom(24 << 20)
    client().upload_file(path_or_fileobj=large, path_in_repo="large.bin", repo_id=repo)
    hub.break_next("GET", "/lfs/", after=15 << 20)
    hub.requests.clear()
    assert content(client(), repo, "large.bin", tmp_path) == large
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and "/lfs/" in path]
    assert len(ranges) == 2 and ranges[0] == ""
    assert 0 < int(ranges[1].removeprefix("bytes=").removesuffix("-")) <= 15 << 20


@pytest.mark.parametrize("how", [{"status": 503}, {"status": None, "after": 1000}], ids=["503", "cut"])
@pytest.mark.parametrize("where", [("PUT", "/lfs/"), ("POST", "/objects/batch"), ("POST", "/preupload/")])
def test_an_upload_that_fails_once_is_tried_again(where, how, client, repo, hub, tmp_path):
    if where[0] == "POST" and "after" in how:
        how = {"status": None}
    new = os.urandom(200_000)
    hub.break_next(*where, **how)
    client().upload_file(path_or_fileobj=new, path_in_repo="new.bin", repo_id=repo)
    assert content(client(), repo, "new.bin", tmp_path) == new


def test_a_large_file_goes_up_in_parts_and_a_part_that_is_cut_is_sent_again(
    client, repo, hub, tmp_path, monkeypatch
):
    monkeypatch.setattr(hub, "part_size", 100_000)
    new = os.urandom(250_000)
    hub.break_next("PUT", r"/lfs/.*/2$", after=1000)
    hub.requests.clear()
    client().upload_file(path_or_fileobj=new, path_in_repo="new.bin", repo_id=repo)
    parts = [path.partition("?")[0][-2:] for method, path, _ in hub.requests if method == "PUT"]
    assert parts == ["/1", "/2", "/2", "/3"]
    assert content(client(), repo, "new.bin", tmp_path) == new
    assert not list(hub.find("models", repo).blob("0" * 64).parent.glob(".*"))


@pytest.mark.parametrize("where", [("PUT", "/lfs/"), ("POST", "/commit/"), ("POST", "/verify")])
def test_an_upload_that_fails_for_good_leaves_what_was_there(where, client, repo, hub, tmp_path):
    before = client().model_info(repo).sha
    hub.break_next(*where, status=500, times=10)
    # Around what fails in the middle the client puts an error of its own.
    with pytest.raises((HfHubHTTPError, RuntimeError), match="500|Error while uploading 'new.bin'"):
        client().upload_folder(repo_id=repo, folder_path=folder_with(tmp_path, new_bin=os.urandom(2000)))
    hub.mend()
    assert client().model_info(repo).sha == before
    assert "new.bin" not in files(client(), repo)


def folder_with(tmp_path: Path, **contents: bytes) -> Path:
    folder = tmp_path / "up"
    folder.mkdir()
    for name, bytes_of in contents.items():
        (folder / name.replace("_", ".")).write_bytes(bytes_of)
    return folder


# ---- the command line, and datasets ----


def test_the_hf_command_uploads_and_downloads(hub, client, tmp_path):
    run = partial(
        subprocess.run, capture_output=True, text=True, env={**os.environ, **hub.environment}, cwd=tmp_path
    )
    hf = [sys.executable, "-m", "huggingface_hub.cli.hf"]
    folder = folder_with(tmp_path, model_safetensors=WEIGHTS, README_md=b"# a dataset\n")
    done = run([*hf, "upload", "someone/cli", str(folder), ".", "--repo-type", "dataset", "--revision", "v2"])
    assert done.returncode == 0, done.stderr
    assert files(client(), "someone/cli", repo_type="dataset", revision="v2") == {
        "model.safetensors",
        "README.md",
    }
    done = run(
        [*hf, "download", "someone/cli", "--repo-type", "dataset", "--revision", "v2", "--local-dir", "down"]
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "down/model.safetensors").read_bytes() == WEIGHTS
    done = run([*hf, "upload", "other/cli", str(folder)])
    assert done.returncode == 1 and "403 Forbidden" in done.stderr
