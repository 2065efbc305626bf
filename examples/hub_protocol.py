"""The protocol of the Hub, as `local_hub.py` speaks it: what is asked, who may ask, and how it is answered.

What belongs here: the routes, accounts, bodies, and repositories with their branches. Reading and writing of
files is in `hub_contents.py`.
"""

import json
import re
import shutil
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from hub_contents import Contents
from hub_repositories import Refused, Repository

if TYPE_CHECKING:
    from local_hub import Account, LocalHub

BLOCK = 1 << 20


class Handler(Contents, BaseHTTPRequestHandler):
    """One request: what it names is found, and the method that serves it is called."""

    hub: "LocalHub"
    protocol_version = "HTTP/1.1"
    # (method, path, name of the serving method, who may ask); segments stay quoted until they are taken apart
    # `read`: anybody; `write`: who has a token that writes; `signed`: who was given the address. Whether they
    # may have this repository is seen where that is found.
    ROUTES = [
        (method, re.compile(path), serve, right)
        for method, path, serve, right in (
            ("GET", r"/api/whoami-v2", "_whoami", "read"),
            ("POST", r"/api/validate-yaml", "_validate_yaml", "read"),
            ("POST", r"/api/repos/create", "_create", "write"),
            ("DELETE", r"/api/repos/delete", "_delete", "write"),
            ("GET", r"/api/(models|datasets)", "_list", "read"),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)", "_info", "read"),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/revision/([^/]+)", "_info", "read"),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/refs", "_refs", "read"),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/commits/([^/]+)", "_commits", "read"),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", "_tree", "read"),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)", "_paths_info", "read"),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/discussions", "_pulls", "read"),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/discussions/(\d+)/merge", "_merge", "write"),
            ("PUT", r"/api/(models|datasets)/([^/]+/[^/]+)/settings", "_settings", "write"),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/branch/(.+)", "_add_branch", "write"),
            ("DELETE", r"/api/(models|datasets)/([^/]+/[^/]+)/branch/(.+)", "_remove_branch", "write"),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/tag/(.+)", "_add_tag", "write"),
            ("DELETE", r"/api/(models|datasets)/([^/]+/[^/]+)/tag/(.+)", "_remove_tag", "write"),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/([^/]+)", "_preupload", "write"),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/commit/([^/]+)", "_commit", "write"),
            ("POST", r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", "_lfs_batch", "write"),
            ("PUT", r"/lfs/(models|datasets)/([^/]+/[^/]+)/([0-9a-f]{64})", "_lfs_put", "signed"),
            ("PUT", r"/lfs/(models|datasets)/([^/]+/[^/]+)/([0-9a-f]{64})/(\d+)", "_lfs_put_part", "signed"),
            ("POST", r"/lfs/(models|datasets)/([^/]+/[^/]+)/([0-9a-f]{64})", "_lfs_join_parts", "signed"),
            ("POST", r"/lfs/(models|datasets)/([^/]+/[^/]+)/verify", "_lfs_verify", "write"),
            ("GET", r"/lfs/(models|datasets)/([^/]+/[^/]+)/([0-9a-f]{64})", "_lfs_get", "signed"),
            ("GET", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "_resolve", "read"),
        )
    ]

    def log_message(self, *_) -> None:
        """Nothing: the tests' output is their own."""

    def do_GET(self) -> None:
        """Serves GET, and HEAD, which differs in that no body is sent."""
        self._serve("GET")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Serves POST."""
        self._serve("POST")

    def do_PUT(self) -> None:
        """Serves PUT."""
        self._serve("PUT")

    def do_DELETE(self) -> None:
        """Serves DELETE."""
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        self.body_read = False
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
        self.broken = self.hub.take_break(self.command, url.path)
        try:
            if self.broken and self.broken.status:
                raise Refused(self.broken.status, "this was to go wrong")
            for wanted, path, serve, right in self.ROUTES:
                if wanted == method and (found := path.fullmatch(url.path)):
                    self.account = self._identify(right, url.path)
                    return getattr(self, serve)(*(unquote(part or "") for part in found.groups()))
            raise Refused(404, f"there is no {method} {url.path} here")
        except Refused as error:
            self._reply(error.body, error.status, error.headers)
        except (BrokenPipeError, ConnectionError):
            self.close_connection = True
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            self._reply({"error": f"malformed request: {error!r}"}, 400)

    # ---- who asks ----

    def _identify(self, right: str, path: str) -> "Account | None":
        """Whose token was sent, if one was; refused where it is unknown or may not do this kind of thing."""
        if right == "signed":
            if self.query.get("signature") != self.hub.signature(path):
                raise Refused(403, "The signature does not match")
            return None
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.accounts:
            raise Refused(401, "Invalid credentials in Authorization header")
        account = self.hub.accounts.get(token)
        if right == "write" and account is None:
            raise Refused(401, "Invalid username or password.")
        if right == "write" and not account.may_write:
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository")
        return account

    def _find(self, kind: str, name: str, *, content: bool = False, write: bool = False) -> Repository:
        """A repository of which the caller may see that it is there, read the files, or change it."""
        try:
            repository = self.hub.find(kind, name)
            if repository.about["private"] and not self._owns(repository):
                raise Refused(404, "Repository not found", "RepoNotFound")
        except Refused as error:
            error.status = 404 if self.account else 401
            raise
        if self._owns(repository):
            return repository
        if content and repository.about["gated"]:
            raise Refused(403 if self.account else 401, f"Access to {name} is restricted", "GatedRepo")
        if write:
            raise Refused(403, f"Forbidden: {self.account.name} may not write to {name}; open a pull request")
        return repository

    def _owns(self, repository: Repository) -> bool:
        return self.account is not None and self.account.owns(repository.owner)

    # ---- bodies ----

    def _blocks(self) -> Iterator[bytes]:
        """The body of the request."""
        self.body_read = True
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        left = 0 if chunked else int(self.headers.get("Content-Length") or 0)
        passed = 0
        while chunked or left:
            if chunked:
                size = int(self.rfile.readline().split(b";")[0], 16)
                block = self.rfile.read(size)
                self.rfile.readline()
                chunked = bool(size)
            else:
                block = self.rfile.read(min(left, BLOCK))
                left -= len(block)
            passed += len(block)
            if self.broken and not self.broken.status and passed >= self.broken.after:
                self._cut()
            yield block

    def _cut(self) -> None:
        """Ends the connection in the middle."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionError("cut")

    def _body(self) -> bytes:
        return b"".join(self._blocks())

    def _json(self) -> dict:
        return json.loads(self._body() or b"{}")

    def _reply(self, values, status: int = 200, headers: dict[str, str] | None = None) -> None:
        # Who is still sending would lose the answer with the connection.
        if not self.body_read:
            self._body()
        content = json.dumps(values).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_file(self, path: Path, headers: dict[str, str]) -> None:
        """Answers with a file, or with the range of it that was asked for."""
        size = path.stat().st_size
        start, end, status = 0, size - 1, 200
        if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = found.groups()
            start = int(first) if first else max(size - int(last), 0)
            end = min(int(last), end) if first and last else end
            status = 206
            if start >= size:
                raise Refused(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{size}"})
            headers = {**headers, "Content-Range": f"bytes {start}-{end}/{size}"}
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(end - start + 1))
        self.send_header("Accept-Ranges", "bytes")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.broken:
            end = min(end, start + self.broken.after - 1)
        with path.open("rb") as stream:
            stream.seek(start)
            left = end - start + 1
            while left and (block := stream.read(min(left, BLOCK))):
                self.wfile.write(block)
                left -= len(block)
        if self.broken:
            self._cut()

    # ---- accounts and repositories ----

    def _whoami(self) -> None:
        if self.account is None:
            raise Refused(401, "Invalid username or password.")
        role = "write" if self.account.may_write else "read"
        # What is everybody's cannot be listed; no role of the Hub's own then, whose owners could be counted.
        role = "admin" if self.account.organisations is None and self.account.may_write else role
        token = {"displayName": "local", "role": role}
        name = self.account.name
        orgs = [{"type": "org", "id": org, "name": org} for org in self.account.organisations or ()]
        self._reply({"type": "user", "id": name, "name": name, "orgs": orgs, "auth": {"accessToken": token}})

    def _validate_yaml(self) -> None:
        self._reply({"errors": [], "warnings": []})

    def _create(self) -> None:
        given = self._json()
        kind = f"{given.get('type') or 'model'}s"
        owner = given.get("organization") or self.account.name
        if not self.account.owns(owner):
            raise Refused(403, f'You don\'t have the rights to create a {kind[:-1]} under "{owner}"')
        private = given.get("private") or given.get("visibility") == "private"
        repository = self.hub.create(kind, f"{owner}/{given['name']}", bool(private))
        self._reply({"url": self._page(repository), "name": repository.name})

    def _page(self, repository: Repository) -> str:
        return f"{self.hub.url}/{'datasets/' if repository.kind == 'datasets' else ''}{repository.name}"

    def _delete(self) -> None:
        given = self._json()
        name = f"{given.get('organization') or self.account.name}/{given['name']}"
        with self.hub.lock:
            shutil.rmtree(self._find(f"{given.get('type') or 'model'}s", name, write=True).folder)
        self._reply({})

    def _list(self, kind: str) -> None:
        rows = []
        for path in sorted((self.hub.root / kind).glob("*/*/repository.json")):
            repository = self.hub.find(kind, "/".join(path.parts[-3:-1]))
            if repository.about["private"] and not self._owns(repository):
                continue
            wanted = self.query.get("author", repository.owner), self.query.get("search", "").lower()
            if wanted[0] == repository.owner and wanted[1] in repository.name.lower():
                rows.append(repository.describe(repository.resolve()))
        self._reply(rows)

    def _info(self, kind: str, name: str, revision: str = "main") -> None:
        repository = self._find(kind, name)
        self._reply(repository.describe(repository.resolve(revision)))

    def _settings(self, kind: str, name: str) -> None:
        given = self._json()
        with self.hub.lock:
            repository = self._find(kind, name, write=True)
            about = repository.about
            about["gated"] = given.get("gated", about["gated"])
            if "visibility" in given:
                about["private"] = given["visibility"] == "private"
            repository.write_about(about)
        self._reply({})

    # ---- branches, tags, commits, pull requests ----

    def _refs(self, kind: str, name: str) -> None:
        rows = {"heads": [], "tags": [], "pr": []}
        for ref, sha in self._find(kind, name).about["refs"].items():
            _, group, short = ref.split("/", 2)
            rows[group].append({"name": short, "ref": ref, "targetCommit": sha})
        answer = {"branches": rows["heads"], "tags": rows["tags"], "converts": []}
        self._reply({**answer, "pullRequests": rows["pr"]} if "include_prs" in self.query else answer)

    def _change_ref(self, kind: str, name: str, ref: str, start: str | None) -> None:
        with self.hub.lock:
            repository = self._find(kind, name, write=True)
            repository.remove_ref(ref) if start is None else repository.add_ref(ref, start)
        self._reply({})

    def _add_branch(self, kind: str, name: str, branch: str) -> None:
        self._change_ref(kind, name, f"refs/heads/{branch}", self._json().get("startingPoint") or "main")

    def _remove_branch(self, kind: str, name: str, branch: str) -> None:
        self._change_ref(kind, name, f"refs/heads/{branch}", None)

    def _add_tag(self, kind: str, name: str, revision: str) -> None:
        self._change_ref(kind, name, f"refs/tags/{self._json()['tag']}", revision)

    def _remove_tag(self, kind: str, name: str, tag: str) -> None:
        self._change_ref(kind, name, f"refs/tags/{tag}", None)

    def _commits(self, kind: str, name: str, revision: str) -> None:
        repository = self._find(kind, name)
        rows = []
        for sha, commit in repository.history(repository.resolve(revision)):
            row = {"id": sha, "title": commit["title"], "message": "", "date": commit["date"]}
            rows.append({**row, "authors": [{"user": commit["author"] or repository.owner}]})
        self._reply(rows)

    def _pulls(self, kind: str, name: str) -> None:
        repository = self._find(kind, name)
        rows = [
            {
                "num": number,
                "title": pull["title"],
                "author": {"name": pull["author"]},
                "createdAt": pull["date"],
                "status": pull["status"],
                "repo": {"name": name, "type": kind[:-1]},
                "isPullRequest": True,
            }
            for number, pull in enumerate(repository.about["pulls"], start=1)
        ]
        self._reply({"discussions": rows, "count": len(rows), "start": 0})

    def _merge(self, kind: str, name: str, number: str) -> None:
        with self.hub.lock:
            self._find(kind, name, write=True).merge(int(number), self.account.name)
        self._reply({})
