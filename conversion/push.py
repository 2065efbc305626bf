"""A model to the Hub: what goes where, and one commit that is there whole or not at all.

What belongs here: what a push changes in a repository, in sentences before it happens; the sending, which a
further call takes up where a lost connection left it; and every way that can fail as a sentence. What is sent
is in `release.py`.
"""

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from .checkpoints import SIDE_FILES
from .hub_files import ask, content_hash, format_size, require_repo_id, require_revision
from .release import (
    Origin,
    ReleaseFile,
    build_release,
    check_release,
    discard,
    find_origin,
    left_out,
    list_release,
    write_release,
)
from .targets import require_dtype

# Of an earlier release, what a loader would take up instead of or beside the new one's files.
_LOADED_BY_NAME = re.compile(
    rf"(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?|adapter_config\.json|{SIDE_FILES.pattern}"
)
# Files that are uploaded before their arrival is fixed; as many as the client sends at once.
_TOGETHER = 5


@dataclass
class Remote:
    """A repository as it is before a push.

    Attributes:
        is_there: whether it is.
        is_private: whether only its owners see it.
        head: commit of the branch; None if there is no such branch yet.
        files: path -> (size, hash, whether that is the content's SHA-256 and not git's).
    """

    is_there: bool = False
    is_private: bool = False
    head: str | None = None
    files: dict[str, tuple[int, str, bool]] = field(default_factory=dict)


def push(
    model: str | Path,
    repo_id: str,
    *,
    family: str | None = None,
    dtype: str | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    license: str | None = None,
    output: str | Path | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Builds and checks the release of a model, and commits it to the Hub.

    What a loader of the new release would take from an earlier one in its place (shards beside a single file,
    another tokenizer) goes in the same commit; other files stay.

    Args:
        model: model directory, or a run's.
        repo_id: `owner/name`; created if it is not there.
        family: to convert to first: `llama`, `qwen3` or another of transformers'; default: as it is.
        dtype: to round to first: `float32`, `bfloat16` or `float16`, and for `deepseek_v3` `fp8`; default: as
            it is.
        private: of a new repository; one that is there and public is refused.
        revision: branch, made from the main one if it is not there; default: the main one.
        message: of the commit.
        license: identifier for the card.
        output: directory to put the release in, instead of sending it.
        dry_run: only say what would be sent.
        say: is given what happens, a line at a time.

    Returns:
        The address of the commit, or of the repository after a dry run, or the directory.

    Raises:
        ValueError: for a model that cannot be released as it is, a name that the Hub does not take, or a Hub
            that refuses or is not reached.
    """
    _require_name(repo_id)
    require_revision(revision, branch=True)
    _require_license(license)
    if dtype is not None:
        require_dtype(dtype, family)
    if output is not None and Path(output).exists():
        raise ValueError(f"{output} is there already; choose another directory")
    sends = output is None and not dry_run
    if sends:
        if not get_token():
            raise ValueError("there is no token for the Hub: set HF_TOKEN, or log in with `hf auth login`")
        # Before the work: whether the Hub is there, knows the token, and what it would be put on.
        ask(HfApi(), lambda api: _require_write(api, repo_id), repo_id)
        remote = _look(repo_id, revision, private)
    elif dry_run:
        try:
            remote = _look(repo_id, revision, private)
        except ValueError as error:
            remote = None
            say(f"what is at {repo_id} now is not known: {error}")
    with tempfile.TemporaryDirectory(prefix="tessera-push-") as scratch:
        folder = Path(scratch) / "release"
        folder.mkdir()
        checkpoint, origin = find_origin(model, family, dtype)
        told = build_release(
            checkpoint, folder, repo_id, origin=origin, revision=revision, license=license, on_hub=_on_hub
        )
        check_release(checkpoint, folder, Path(scratch))
        say("loads without Tessera, with the same logits")
        files = list_release(folder)
        _describe(files, origin, [*origin.notes, *told], dry_run, say)
        if output is None:
            same = set() if remote is None else same_files(files, remote)
            _describe_target(repo_id, revision, private, remote, files, same, say)
        if not sends:
            if output is not None:
                write_release(folder, Path(output))
            # What an earlier call could not send is kept for the one that will.
            if not origin.was_kept:
                discard(origin)
            return f"{HfApi().endpoint}/{repo_id}" if output is None else str(output)
        url = send(files, same, remote, repo_id, private, revision, message or "Upload model", say)
        discard(origin)
        return url


def _require_name(repo_id: str) -> None:
    require_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} lacks the owner: give owner/name")


def _require_license(license: str | None) -> None:
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+_-]*", license):
        raise ValueError(
            f"--license {license!r} is no identifier of the Hub's, such as apache-2.0 or mit; for one that "
            "it has no name for, give other"
        )


# ---- what is there, and what becomes of it ----


def _look(repo_id: str, revision: str | None, private: bool) -> Remote:
    """What is at the branch, or at the main one that it would be made from."""

    def look(api: HfApi) -> Remote:
        try:
            about = api.model_info(repo_id)
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401:
                raise ValueError("private repositories are not seen without a token") from error
            return Remote()
        _require_private(repo_id, private, about.private)
        head = about.sha
        if revision is not None:
            if any(tag.name == revision for tag in api.list_repo_refs(repo_id).tags):
                raise ValueError(f"{revision} is a tag of {repo_id}, which stays as it is; name a branch")
            try:
                head = api.model_info(repo_id, revision=revision).sha
            except RevisionNotFoundError:
                head = None
        files = {
            entry.path: (entry.size, entry.lfs.sha256, True)
            if entry.lfs
            else (entry.size, entry.blob_id, False)
            for entry in api.list_repo_tree(repo_id, recursive=True, revision=head)
            if hasattr(entry, "blob_id")
        }
        return Remote(True, about.private, head, files)

    return ask(HfApi(), look, repo_id)


def _require_write(api: HfApi, repo_id: str) -> None:
    user = api.whoami()
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    # Of tokens with finer rights the Hub tells at the first change only.
    if role == "read":
        raise ValueError(
            f"the token may not write to {repo_id}, it only reads: make one that writes, in the settings of "
            f"your account at {api.endpoint}"
        )
    owner = repo_id.split("/")[0]
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs") or [])]
    # A repository that is seen may have been opened to others.
    if role == "write" and owner.lower() not in map(str.lower, owners) and not api.repo_exists(repo_id):
        raise ValueError(
            f"the token may not write to {repo_id}: it is of {user['name']}, who can create repositories "
            f"for {', '.join(owners)}"
        )


def _require_private(repo_id: str, private: bool, is_private: bool | None) -> None:
    if private and not is_private:
        raise ValueError(
            f"{repo_id} is there already and public; choose another name, or make it private on the Hub"
        )


def _describe(
    files: list[ReleaseFile], origin: Origin, notes: list[str], each: bool, say: Callable[[str], None]
) -> None:
    if origin.step is not None:
        say(f"the run is not finished: this is its checkpoint of step {origin.step:,}")
    if origin.converted is not None:
        say(f"converted: {origin.converted}")
    for note in notes:
        say(note)
    for file in files if each else []:
        storage = ", large-file storage" if file.is_large else ""
        say(f"  {file.name:<32} {format_size(file.size):>9}  {file.what}{storage}")
    total = format_size(sum(file.size for file in files))
    say(f"  {f'{len(files)} files':<32} {total:>9}" if each else f"{len(files)} files, {total}")
    if names := left_out(origin.model, files):
        say(f"stays here: {_some(names)}")


def _describe_target(
    repo_id: str,
    revision: str | None,
    private: bool,
    remote: Remote | None,
    files: list[ReleaseFile],
    same: set[str],
    say: Callable[[str], None],
) -> None:
    branch = revision or "main"
    if remote is None:
        return say(f"to: {repo_id}, branch {branch}")
    if not remote.is_there:
        return say(f"to: {repo_id}, new and {'private' if private else 'public'}, branch {branch}")
    new = "" if remote.head else ", which is new"
    say(f"to: {repo_id}, there and {'private' if remote.is_private else 'public'}, branch {branch}{new}")
    replaced = [file.name for file in files if file.name in remote.files and file.name not in same]
    gone, kept = left_over(remote, files)
    for words, names in (
        ("the same there", sorted(same)),
        ("replaced there", replaced),
        ("removed there, being of another release", gone),
        ("stays there", kept),
    ):
        if names:
            say(f"{words}: {_some(names)}")


def left_over(remote: Remote, files: list[ReleaseFile]) -> tuple[list[str], list[str]]:
    """What a repository has beside a release: what would be loaded with it, and the rest."""
    names = {file.name for file in files}
    others = [name for name in sorted(remote.files) if name not in names and name != ".gitattributes"]
    gone = [name for name in others if _LOADED_BY_NAME.fullmatch(name)]
    return gone, [name for name in others if name not in gone]


def same_files(files: list[ReleaseFile], remote: Remote) -> set[str]:
    """Names of those that a repository has with the same content."""
    same = set()
    for file in files:
        size, digest, sha256 = remote.files.get(file.name, (None, None, False))
        if size == file.size and digest == content_hash(file.path, sha256):
            same.add(file.name)
    return same


def _some(names: list[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---- sending ----


def send(
    files: list[ReleaseFile],
    same: set[str],
    remote: Remote,
    repo_id: str,
    private: bool,
    revision: str | None,
    message: str,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Uploads what the repository does not have yet, and commits everything at once.

    Contents go first, a few files at a time; the Hub keeps them although nothing names them yet, and asks a
    further call for the others only. So a lost connection costs the files on their way, and no reader ever
    sees half a release; `upload_folder` of the Hub's client makes several commits of a large one.

    Args:
        files: of the release.
        same: names of those that are there already.
        remote: the repository as it was looked at; a branch that has moved since is refused.
        repo_id, private, revision, message, say: as `push` has them.

    Returns:
        The address of the commit, or of the branch's if nothing is new.

    Raises:
        ValueError: if the Hub refuses or is not reached.
    """
    additions = [CommitOperationAdd(file.name, str(file.path)) for file in files if file.name not in same]
    gone, _ = left_over(remote, files)

    created = ""

    def commit(api: HfApi) -> str:
        nonlocal created
        api.create_repo(repo_id, private=private, exist_ok=True)
        if not remote.is_there:
            created = f"; {repo_id} was created, {'private' if private else 'public'}"
        _require_private(repo_id, private, private and api.model_info(repo_id).private)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not additions and not gone:
            head = api.model_info(repo_id, revision=revision).sha
            say("everything is there already: no commit")
            return f"{api.endpoint}/{repo_id}/commit/{head}"
        for first in range(0, len(additions), _TOGETHER):
            api.preupload_lfs_files(repo_id, additions[first : first + _TOGETHER], revision=revision)
        operations = [*additions, *map(CommitOperationDelete, gone)]
        done = api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, parent_commit=remote.head
        )
        return done.commit_url

    def advise(passes: bool) -> str:
        again = "; what has arrived is kept there, and the same command sends the rest" if passes else ""
        return created + again

    return ask(HfApi(), commit, repo_id, advice=advise)


def _on_hub(name: str, kind: str) -> bool:
    """Whether the Hub has a repository of this name; not, where it cannot be asked."""
    try:
        return HfApi().repo_exists(name, repo_type=kind)
    except Exception:
        return False
