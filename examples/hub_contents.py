"""What the Hub of `local_hub.py` gives and takes of a repository's files.

What belongs here: trees, downloads with ranges, uploads whole and in parts, commits. The routes that lead
here and what a request brings with it are in `hub_protocol.py`.
"""

import hashlib
import json
import math
import uuid
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from hub_repositories import Refused, Repository, write_whole

# From this size on a file is uploaded on its own (LFS), below it inside the commit; these endings always. The
# Hub's own choice, shortened.
LARGE_FILE = 10 << 20
LARGE_SUFFIXES = (".safetensors", ".bin", ".parquet", ".gz", ".npz")
# Entries in one answer of `tree`, plain and expanded: the Hub's.
PAGE, EXPANDED_PAGE = 1000, 50


class Contents:
    """The part of the request handler that serves files."""

    # ---- reading ----

    def _tree(self, kind: str, name: str, revision: str, folder: str) -> None:
        repository = self._find(kind, name)
        recursive, expand = (
            self.query.get(flag, "false").lower() in ("true", "1") for flag in ("recursive", "expand")
        )
        entries = repository.tree(repository.resolve(revision), folder.strip("/"), recursive, expand)
        first, page = int(self.query.get("cursor", 0)), EXPANDED_PAGE if expand else PAGE
        headers = {}
        if first + page < len(entries):
            query = urlencode({**self.query, "cursor": first + page})
            headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?{query}>; rel="next"'
        self._reply(entries[first : first + page], headers=headers)

    def _paths_info(self, kind: str, name: str, revision: str) -> None:
        body = self._body()
        if "json" in self.headers.get("Content-Type", ""):
            given = json.loads(body)
            paths = [given["paths"]] if isinstance(given["paths"], str) else given["paths"]
            expand = bool(given.get("expand"))
        else:
            given = parse_qs(body.decode())
            paths, expand = given.get("paths", []), given.get("expand", [""])[-1].lower() in ("true", "1")
        repository = self._find(kind, name)
        everything = repository.tree(repository.resolve(revision), recursive=True, expand=expand)
        wanted = {path.strip("/") for path in paths}
        self._reply([entry for entry in everything if entry["path"] in wanted])

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self._find("datasets" if kind else "models", name, content=True)
        sha = repository.resolve(revision)
        headers = {"X-Repo-Commit": sha}
        file = repository.commit(sha)["files"].get(path)
        if file is None:
            raise Refused(404, f"Entry not found: {path}", "EntryNotFound", **headers)
        if not file["lfs"]:
            return self._send_file(repository.blob(file["sha256"]), {**headers, "ETag": f'"{file["oid"]}"'})
        # Large files are elsewhere: the client takes what it needs to know from here, and follows.
        headers["X-Linked-Etag"] = headers["ETag"] = f'"{file["sha256"]}"'
        headers["X-Linked-Size"] = str(file["size"])
        place = f"/lfs/{repository.kind}/{quote(name)}/{file['sha256']}"
        self._reply({}, 302, {**headers, "Location": self.hub.sign(place)})

    def _lfs_get(self, kind: str, name: str, sha256: str) -> None:
        blob = self.hub.find(kind, name).blob(sha256)
        if not blob.exists():
            raise Refused(404, "there is no such content")
        self._send_file(blob, {"ETag": f'"{sha256}"'})

    # ---- writing ----

    def _find_for_commit(self, kind: str, name: str) -> Repository:
        """A repository that the caller may change, or propose a change to."""
        return self._find(kind, name, write="create_pr" not in self.query)

    def _preupload(self, kind: str, name: str, revision: str) -> None:
        repository = self._find_for_commit(kind, name)
        there = repository.commit(repository.resolve(revision))["files"]
        rows = []
        for file in self._json()["files"]:
            large = file["size"] >= LARGE_FILE or file["path"].endswith(LARGE_SUFFIXES)
            mode = "lfs" if large else "regular"
            row = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in there:
                # By which the client leaves out what has not changed.
                known = there[file["path"]]
                row["oid"] = known["sha256"] if known["lfs"] else known["oid"]
            rows.append(row)
        self._reply({"files": rows})

    def _lfs_batch(self, kind: str, name: str) -> None:
        # Content alone changes nothing, and the request does not say whether a pull request will be opened.
        repository = self._find("datasets" if kind else "models", name)
        place = f"/lfs/{repository.kind}/{quote(name)}"
        given = self._json()
        in_parts = "multipart" in given.get("transfers", ())
        rows = []
        for file in given["objects"]:
            row = {"oid": file["oid"], "size": file["size"]}
            if not repository.blob(file["oid"]).exists():
                content = f"{place}/{file['oid']}"
                upload = {"href": self.hub.sign(content)}
                if in_parts and file["size"] > self.hub.part_size:
                    parts = range(1, math.ceil(file["size"] / self.hub.part_size) + 1)
                    addresses = {str(part): self.hub.sign(f"{content}/{part}") for part in parts}
                    upload["header"] = {"chunk_size": str(self.hub.part_size), **addresses}
                row["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}{place}/verify"}}
            rows.append(row)
        self._reply({"transfer": "multipart" if in_parts else "basic", "objects": rows})

    def _lfs_put(self, kind: str, name: str, sha256: str) -> None:
        self._keep(self.hub.find(kind, name).blob(sha256), sha256, self._blocks())
        self._reply({})

    def _keep(self, blob: Path, sha256: str, blocks: Iterable[bytes]) -> None:
        """Stores content that is there whole, with the hash that was announced, or not at all."""
        aside, found = blob.with_name(f".{sha256}.{uuid.uuid4().hex}"), hashlib.sha256()
        try:
            with aside.open("wb") as stream:
                for block in blocks:
                    stream.write(block)
                    found.update(block)
            if found.hexdigest() != sha256:
                raise Refused(400, "the content does not have the hash that was announced")
            aside.replace(blob)
        finally:
            aside.unlink(missing_ok=True)

    def _lfs_put_part(self, kind: str, name: str, sha256: str, part: str) -> None:
        content = b"".join(self._blocks())
        write_whole(self.hub.find(kind, name).blob(sha256).with_name(f".{sha256}.{part}"), content)
        self._reply({}, headers={"ETag": hashlib.sha256(content).hexdigest()})

    def _lfs_join_parts(self, kind: str, name: str, sha256: str) -> None:
        blob = self.hub.find(kind, name).blob(sha256)
        parts = []
        for part in self._json()["parts"]:
            path = blob.with_name(f".{sha256}.{int(part['partNumber'])}")
            if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != part["etag"]:
                raise Refused(400, f"part {part['partNumber']} is not there as it is named")
            parts.append(path)
        self._keep(blob, sha256, (path.read_bytes() for path in parts))
        for path in parts:
            path.unlink()
        self._reply({})

    def _lfs_verify(self, kind: str, name: str) -> None:
        given = self._json()
        blob = self._find(kind, name).blob(given["oid"])
        if not blob.exists() or blob.stat().st_size != given["size"]:
            raise Refused(404, "the upload is not there")
        self._reply({})

    def _commit(self, kind: str, name: str, revision: str) -> None:
        as_pull = "create_pr" in self.query
        rows = [json.loads(line) for line in self._body().splitlines() if line.strip()]
        with self.hub.lock:
            repository = self._find_for_commit(kind, name)
            sha, number = repository.apply(rows, revision, self.account.name, as_pull)
        page = self._page(repository)
        answer = {"success": True, "commitUrl": f"{page}/commit/{sha}", "commitOid": sha}
        if as_pull:
            answer["pullRequestUrl"] = f"{page}/discussions/{number}"
        self._reply(answer)
