"""Files of the Hub and questions to it, for what goes there and what comes from there alike.

What belongs here: the hash and the size that the Hub gives a file, names that it takes, and how a question
that it does not answer becomes a sentence.
"""

import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tessera.data.hashing import file_sha256
from tessera.data.hub_errors import may_pass, why_refused

T = TypeVar("T")

# What git does not take in the name of a branch or a tag (`git check-ref-format`).
_NO_REVISION = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[/.-]|/\.|[/.]$|\.lock(/|$)|^@?$")


def ask(
    api: HfApi,
    question: Callable[[HfApi], T],
    repo: str,
    *,
    reads: bool = False,
    advice: Callable[[bool], str] = lambda passes: "",
) -> T:
    """What the Hub answers.

    Args:
        api: client.
        question: is given the client.
        repo: what is asked about, as it is named in sentences.
        reads: whether it is to be read, and not written.
        advice: what to add to a sentence, if the error may pass or if it will not.

    Raises:
        ValueError: why it does not answer, in a sentence.
    """
    try:
        return question(api)
    except Exception as error:
        reason = why_refused(error, api.endpoint, repo, reads)
        if reason is None:
            raise
        raise ValueError(reason + advice(may_pass(error))) from error


def require_repo_id(repo_id: str) -> None:
    """Checks that the Hub takes a name.

    Raises:
        ValueError: if it does not.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be a name on the Hub: {error}") from error


def require_revision(revision: str | None, *, branch: bool = False) -> None:
    """Checks that a name can be that of a branch, tag or commit, or, if `branch`, of a branch.

    Raises:
        ValueError: if it cannot.
    """
    if revision is None:
        return
    if _NO_REVISION.search(revision):
        kind = "branch" if branch else "branch, tag or commit"
        raise ValueError(f"--revision {revision!r} cannot be the name of a {kind}")
    if branch and revision.startswith("refs/"):
        raise ValueError(f"--revision {revision}: name a branch without refs/, such as v1")


def content_hash(path: Path, sha256: bool) -> str:
    """The name of a file's content on the Hub: its SHA-256 in large-file storage, else what git calls it."""
    if sha256:
        return file_sha256(path)
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def format_size(size: int) -> str:
    """A size as people read it."""
    if size < 1000:
        return f"{size} B"
    power = min(int(math.log10(size)) // 3, 4)
    return f"{size / 1000**power:.1f} {('', 'kB', 'MB', 'GB', 'TB')[power]}"
