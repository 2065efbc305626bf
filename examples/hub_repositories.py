"""The repositories of `local_hub.py`: models and datasets as folders of commits and blobs.

What belongs here: what a repository is and what may happen to it; of HTTP nothing but a refusal's status.
A commit is one JSON file that says which blob is at which path, so every state stays; `repository.json` says
which commit each branch, tag and pull request is at.
"""

import base64
import hashlib
import json
import re
import uuid
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
# What git takes in no name of a reference (`git check-ref-format`).
NO_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/[.-]|[/.]$|\.lock(/|$)")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAIN = "refs/heads/main"


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: for people.
        code: what huggingface_hub's exceptions go by.
        fields: more of the answer's body.
        headers: more of the answer's headers.
    """

    def __init__(self, status: int, message: str, code: str = "", fields: dict | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **(fields or {})}
        self.headers = {"X-Error-Message": message, "X-Error-Code": code, **headers}


class Repository:
    """One model or dataset.

    Args:
        folder: of the repository.
        kind: `models` or `datasets`.
        name: `owner/name`.
    """

    def __init__(self, folder: Path, kind: str, name: str):
        self.folder, self.kind, self.name = folder, kind, name

    @classmethod
    def create(cls, folder: Path, kind: str, name: str, private: bool = False) -> "Repository":
        """A new one, with one empty commit."""
        repository = cls(folder, kind, name)
        for part in ("blobs", "commits"):
            (folder / part).mkdir(parents=True)
        repository.write_about({"private": private, "gated": False, "refs": {}, "pulls": []})
        repository.add_commit(MAIN, {}, "initial commit", parent=None)
        return repository

    @property
    def owner(self) -> str:
        """Whose it is."""
        return self.name.split("/")[0]

    @property
    def about(self) -> dict:
        """`private`, `gated`, `refs`: full name -> commit, and `pulls`: what each pull request is."""
        return json.loads((self.folder / "repository.json").read_text(encoding="utf-8"))

    def write_about(self, about: dict) -> None:
        """Replaces what `about` reads."""
        write_whole(self.folder / "repository.json", json.dumps(about, indent=2).encode())

    # ---- names of commits ----

    def find_ref(self, revision: str) -> str | None:
        """The full name of a branch, a tag or a pull request; None if it is none of them."""
        refs = self.about["refs"]
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in refs), None)

    def resolve(self, revision: str = "main") -> str:
        """The commit that a branch, a tag, a pull request or a (shortened) commit means."""
        ref = self.find_ref(revision)
        if ref is not None:
            return self.about["refs"][ref]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            for path in (self.folder / "commits").glob(f"{revision}*.json"):
                return path.stem
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add_ref(self, ref: str, revision: str) -> None:
        """Makes a branch or a tag."""
        about = self.about
        if NO_REF.search(ref) or re.match(r"refs/\w+/refs/", ref):
            raise Refused(400, f"Invalid reference name: {ref}")
        if ref in about["refs"]:
            raise Refused(409, f"Reference already exists: {ref}")
        about["refs"][ref] = self.resolve(revision)
        self.write_about(about)

    def remove_ref(self, ref: str) -> None:
        """Removes a branch or a tag; its commits stay."""
        about = self.about
        if ref not in about["refs"]:
            raise Refused(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        if ref == MAIN:
            raise Refused(403, "The main branch cannot be deleted")
        del about["refs"][ref]
        self.write_about(about)

    # ---- commits ----

    def commit(self, sha: str) -> dict:
        """`title`, `parent`, `date`, `author`, and `files`: path -> `oid`, `size`, `sha256`, `lfs`."""
        return json.loads((self.folder / "commits" / f"{sha}.json").read_text(encoding="utf-8"))

    def history(self, sha: str | None) -> Iterable[tuple[str, dict]]:
        """A commit and those before it, the newest first."""
        while sha:
            commit = self.commit(sha)
            yield sha, commit
            sha = commit["parent"]

    def add_commit(self, ref: str, files: dict, title: str, parent: str | None, author: str = "") -> str:
        """Makes `files` the state of a branch or a pull request."""
        values = {"title": title, "parent": parent, "date": now(), "author": author, "files": files}
        sha = hashlib.sha1(f"{json.dumps(values, sort_keys=True)}{uuid.uuid4()}".encode()).hexdigest()
        write_whole(self.folder / "commits" / f"{sha}.json", json.dumps(values, indent=1).encode())
        about = self.about
        about["refs"][ref] = sha
        self.write_about(about)
        return sha

    def apply(self, rows: list[dict], revision: str, author: str, as_pull: bool) -> tuple[str, int | None]:
        """Commits what a client sent: a header and operations, all of them or none.

        Returns:
            The commit, and the number of the pull request that was opened with it.
        """
        header = next(row["value"] for row in rows if row["key"] == "header")
        ref = self.find_ref(revision)
        if ref is None or ref.startswith("refs/tags/"):
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        parent = self.resolve(ref)
        if (wanted := header.get("parentCommit")) and as_pull:
            parent = self.resolve(wanted)
        elif wanted and not parent.startswith(wanted):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(self.commit(parent)["files"])
        for row in rows:
            self._operate(files, row["key"], row["value"])
        title = header["summary"]
        if not as_pull:
            return self.add_commit(ref, files, title, parent, author), None
        about = self.about
        number = len(about["pulls"]) + 1
        pull = {"title": title, "author": author, "base": ref, "status": "open", "date": now()}
        about["pulls"].append(pull)
        self.write_about(about)
        return self.add_commit(f"refs/pr/{number}", files, title, parent, author), number

    def _operate(self, files: dict, key: str, value: dict) -> None:
        path = value.get("path", "")
        if key != "header" and (not path or {"", ".", "..", ".git"} & set(path.rstrip("/").split("/"))):
            raise Refused(400, f"Invalid path: {path}")
        if key == "file":
            files[path] = self.add_blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[path] = self.large_file(value["oid"], path)
        elif key == "deletedFile":
            files.pop(path, None)
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        elif key != "header":
            raise Refused(400, f"this hub knows no '{key}' in a commit")

    def merge(self, number: int, author: str) -> str:
        """Merges a pull request, if what it is based on has not moved in the meantime."""
        about = self.about
        pull = about["pulls"][number - 1]
        head = about["refs"][f"refs/pr/{number}"]
        if pull["status"] != "open":
            raise Refused(400, f"pull request {number} is {pull['status']}")
        target = about["refs"][pull["base"]]
        if target not in {sha for sha, _ in self.history(head)}:
            raise Refused(409, "This pull request has conflicts")
        pull["status"] = "merged"
        self.write_about(about)
        return self.add_commit(pull["base"], self.commit(head)["files"], pull["title"], target, author)

    # ---- files ----

    def blob(self, sha256: str) -> Path:
        """Where the content with this hash is, or will be."""
        if not SHA256.fullmatch(sha256):
            raise Refused(400, f"'{sha256}' is not a SHA-256")
        return self.folder / "blobs" / sha256

    def add_blob(self, content: bytes) -> dict:
        """Stores the content of a small file."""
        sha256 = hashlib.sha256(content).hexdigest()
        write_whole(self.blob(sha256), content)
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git names it
        return {"oid": oid, "size": len(content), "sha256": sha256, "lfs": False}

    def large_file(self, sha256: str, path: str) -> dict:
        """A file whose content was uploaded before."""
        if not self.blob(sha256).exists():
            raise Refused(400, f"the upload of {path} is missing")
        size = self.blob(sha256).stat().st_size
        pointer = f"oid sha256:{sha256}\nsize {size}\n"
        oid = hashlib.sha1(pointer.encode()).hexdigest()
        return {"oid": oid, "size": size, "sha256": sha256, "lfs": True}

    def describe(self, sha: str) -> dict:
        """What the Hub says of a repository at a commit."""
        commit, about = self.commit(sha), self.about
        return {
            "_id": hashlib.sha1(self.name.encode()).hexdigest()[:24],
            "id": self.name,
            "modelId": self.name,
            "author": self.owner,
            "sha": sha,
            "lastModified": commit["date"],
            "createdAt": commit["date"],
            "private": about["private"],
            "gated": about["gated"],
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(commit["files"])],
        }

    def tree(self, sha: str, folder: str = "", recursive: bool = False, expand: bool = False) -> list[dict]:
        """Files and folders below a folder; expanded, with the commit that each file is from."""
        files = self.commit(sha)["files"]
        prefix = f"{folder}/" if folder else ""
        entries, folders = [], {}
        for path, file in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folders[prefix + "/".join(parts[:depth])] = True
            if recursive or len(parts) == 1:
                entries.append(self._entry(path, file, sha if expand else None))
        if folder and not entries and not folders:
            raise Refused(404, f"{folder} does not exist on {sha}", "EntryNotFound")
        oids = ((path, hashlib.sha1(path.encode()).hexdigest()) for path in folders)
        return [{"type": "directory", "path": path, "oid": oid, "size": 0} for path, oid in oids] + entries

    def _entry(self, path: str, file: dict, since: str | None) -> dict:
        entry = {"type": "file", "path": path, "oid": file["oid"], "size": file["size"]}
        if file["lfs"]:
            entry["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": 130}
        for sha, commit in self.history(since):
            if commit["files"].get(path) != file:
                break
            entry["lastCommit"] = {"id": sha, "title": commit["title"], "date": commit["date"]}
        return entry


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    aside.write_bytes(content)
    aside.replace(path)


def now() -> str:
    """The time as the Hub writes it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
