"""A Hugging Face Hub on this machine, for trying `push` and loading without an account or a network.

    python examples/local_hub.py --root hub --port 8008

prints the variables that turn huggingface_hub, transformers and datasets to it; in Python:

    with LocalHub("hub") as hub:
        environment = {**os.environ, **hub.environment}
        subprocess.run(["tessera", "push", "runs/chat", "someone/model"], env=environment)

It speaks the protocol of the real one for models and datasets: create and delete, branches, preupload, LFS
upload, commit, tree, paths-info, resolve with ranges. Every commit stays, under `--root`, as one JSON file
that says which blob is at which path. Who has the token may do anything, so it listens to this machine alone.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import threading
import time
import uuid
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_local"
# From this size on a file is uploaded on its own (LFS), below it inside the commit; weights always.
LARGE_FILE = 1 << 20
LARGE_SUFFIXES = (".safetensors", ".bin", ".parquet", ".gz", ".npz")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, code: str = "", url: str = "", **headers: str):
        super().__init__(message)
        self.status = status
        self.body = {"error": message, "url": url}
        self.headers = {"X-Error-Message": message, "X-Error-Code": code, **headers}


class Repository:
    """One model or dataset: branches, commits and blobs in a folder.

    Args:
        folder: of the repository.
        kind: `models` or `datasets`.
        name: `owner/name`.
    """

    def __init__(self, folder: Path, kind: str, name: str):
        self.folder, self.kind, self.name = folder, kind, name

    @property
    def about(self) -> dict:
        """Whether it is private, and the commit of each branch."""
        return json.loads((self.folder / "repository.json").read_text(encoding="utf-8"))

    def write_about(self, about: dict) -> None:
        """Replaces what `about` reads."""
        _write_whole(self.folder / "repository.json", json.dumps(about, indent=2).encode())

    def resolve(self, revision: str) -> str:
        """The commit that a branch or a (shortened) commit means."""
        branches = self.about["branches"]
        revision = revision.removeprefix("refs/heads/")
        if revision in branches:
            return branches[revision]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            for path in (self.folder / "commits").glob(f"{revision}*.json"):
                return path.stem
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, sha: str) -> dict:
        """`title`, `parent`, `date`, and `files`: path -> `oid`, `size`, `sha256`, `lfs`."""
        return json.loads((self.folder / "commits" / f"{sha}.json").read_text(encoding="utf-8"))

    def add_commit(self, branch: str, files: dict, title: str) -> str:
        """Makes `files` the state of a branch."""
        about = self.about
        parent = about["branches"].get(branch)
        values = {"title": title, "parent": parent, "date": _now(), "files": files}
        sha = hashlib.sha1(f"{json.dumps(values, sort_keys=True)}{uuid.uuid4()}".encode()).hexdigest()
        _write_whole(self.folder / "commits" / f"{sha}.json", json.dumps(values, indent=1).encode())
        about["branches"][branch] = sha
        self.write_about(about)
        return sha

    def blob(self, sha256: str) -> Path:
        """Where the content with this hash is."""
        return self.folder / "blobs" / sha256

    def add_blob(self, content: bytes) -> dict:
        """Stores the content of a small file."""
        sha256 = hashlib.sha256(content).hexdigest()
        _write_whole(self.blob(sha256), content)
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git names it
        return {"oid": oid, "size": len(content), "sha256": sha256, "lfs": False}

    def describe(self, sha: str) -> dict:
        """What the Hub says of a repository at a commit."""
        commit = self.commit(sha)
        return {
            "_id": hashlib.sha1(self.name.encode()).hexdigest()[:24],
            "id": self.name,
            "modelId": self.name,
            "author": self.name.split("/")[0],
            "sha": sha,
            "lastModified": commit["date"],
            "createdAt": commit["date"],
            "private": self.about["private"],
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(commit["files"])],
        }

    def tree(self, sha: str, folder: str = "", recursive: bool = False) -> list[dict]:
        """Files and folders below a folder."""
        commit = self.commit(sha)
        prefix = f"{folder}/" if folder else ""
        entries, folders = [], {}
        for path, file in sorted(commit["files"].items()):
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folders[prefix + "/".join(parts[:depth])] = True
            if recursive or len(parts) == 1:
                entries.append(self.entry(path, file, commit))
        if folder and not entries and not folders:
            raise Refused(404, f"{folder} does not exist on {sha}", "EntryNotFound")
        oids = ((path, hashlib.sha1(path.encode()).hexdigest()) for path in folders)
        return [{"type": "directory", "path": path, "oid": oid, "size": 0} for path, oid in oids] + entries

    @staticmethod
    def entry(path: str, file: dict, commit: dict) -> dict:
        """A file as `tree` and `paths-info` list it."""
        last = {"id": "0" * 40, "title": commit["title"], "date": commit["date"]}
        entry = {"type": "file", "path": path, "oid": file["oid"], "size": file["size"], "lastCommit": last}
        if file["lfs"]:
            entry["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": 130}
        return entry


class LocalHub:
    """The server, in a thread of its own. A context manager: it runs inside `with`.

    Args:
        root: folder of the repositories; what an earlier hub left there is served again.
        port: 0 takes a free one.
    """

    def __init__(self, root: str | Path, port: int = 0):
        self.root = Path(root).absolute()
        self.root.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._thread = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a new process that shall take this for the Hub; they are read at import."""
        skip_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1")))
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            # What is downloaded from here must not pass for the real Hub's later.
            "HF_HOME": str(self.root / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "NO_PROXY": skip_proxy,
            "no_proxy": skip_proxy,
        }

    def start(self) -> "LocalHub":
        """Serves from now on."""
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stops serving; the repositories stay."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "LocalHub":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def create(self, kind: str, name: str, private: bool = False) -> Repository:
        """A new, empty repository."""
        parts = name.split("/")
        if len(parts) != 2 or not all(NAME.fullmatch(part) for part in parts):
            raise Refused(400, f"Invalid repo name: {name}")
        repository = Repository(self.root / kind / name, kind, name)
        if repository.folder.exists():
            raise Refused(409, "You already created this repo", url=f"{self.url}/{name}")
        for part in ("blobs", "commits"):
            (repository.folder / part).mkdir(parents=True)
        repository.write_about({"private": private, "branches": {}})
        repository.add_commit("main", {}, "initial commit")
        return repository

    def find(self, kind: str, name: str, authorized: bool) -> Repository:
        """A repository that the caller may see."""
        repository = Repository(self.root / kind / name, kind, name)
        # The name comes from outside: nothing above the root may be named by it.
        safe = all(NAME.fullmatch(part) for part in name.split("/"))
        if not safe or not repository.folder.is_dir() or (repository.about["private"] and not authorized):
            raise Refused(404 if authorized else 401, "Repository not found", "RepoNotFound")
        return repository


class _Handler(BaseHTTPRequestHandler):
    """One request: what it names is found, and the method that serves it is called."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"
    # (method, path, name of the serving method); segments stay quoted until they are taken apart
    ROUTES = [
        (method, re.compile(path), serve)
        for method, path, serve in (
            ("GET", r"/api/whoami-v2", "_whoami"),
            ("POST", r"/api/validate-yaml", "_validate_yaml"),
            ("POST", r"/api/repos/create", "_create"),
            ("DELETE", r"/api/repos/delete", "_delete"),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)", "_info"),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/revision/([^/]+)", "_info"),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/refs", "_refs"),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/commits/([^/]+)", "_commits"),
            ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", "_tree"),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)", "_paths_info"),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/branch/(.+)", "_branch"),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/([^/]+)", "_preupload"),
            ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/commit/([^/]+)", "_commit"),
            ("POST", r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", "_lfs_batch"),
            ("PUT", r"/lfs/(models|datasets)/([^/]+/[^/]+)/([0-9a-f]{64})", "_lfs_put"),
            ("POST", r"/lfs/(models|datasets)/([^/]+/[^/]+)/verify", "_lfs_verify"),
            ("GET", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "_file"),
        )
    ]

    # What needs no token though it is no GET: reading, and the addresses that an upload was given.
    OPEN = {"_paths_info", "_validate_yaml", "_lfs_put", "_lfs_verify"}

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
        self.authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        try:
            for wanted, path, serve in self.ROUTES:
                if wanted == method and (found := path.fullmatch(url.path)):
                    if method != "GET" and serve not in self.OPEN and not self.authorized:
                        raise Refused(401, "Invalid username or password.")
                    return getattr(self, serve)(*(unquote(part or "") for part in found.groups()))
            raise Refused(404, f"there is no {method} {url.path} here")
        except Refused as error:
            self._reply(error.body, error.status, error.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _body(self) -> bytes:
        self.body_read = True
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self) -> dict:
        return json.loads(self._body() or b"{}")

    def _reply(self, values, status: int = 200, headers: dict[str, str] | None = None) -> None:
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

    # ---- the account and repositories ----

    def _whoami(self) -> None:
        if not self.authorized:
            raise Refused(401, "Invalid username or password.")
        token = {"displayName": "local", "role": "write"}
        self._reply(
            {"type": "user", "id": "1", "name": "someone", "orgs": [], "auth": {"accessToken": token}}
        )

    def _validate_yaml(self) -> None:
        self._reply({"errors": [], "warnings": []})

    def _create(self) -> None:
        given = self._json()
        kind = f"{given.get('type') or 'model'}s"
        name = f"{given.get('organization') or 'someone'}/{given['name']}"
        private = given.get("private") or given.get("visibility") == "private"
        with self.hub.lock:
            self.hub.create(kind, name, bool(private))
        prefix = "datasets/" if kind == "datasets" else ""
        self._reply({"url": f"{self.hub.url}/{prefix}{name}", "name": name})

    def _delete(self) -> None:
        given = self._json()
        name = f"{given.get('organization') or 'someone'}/{given['name']}"
        repository = self.hub.find(f"{given.get('type') or 'model'}s", name, self.authorized)
        shutil.rmtree(repository.folder)
        self._reply({})

    def _info(self, kind: str, name: str, revision: str = "main") -> None:
        repository = self.hub.find(kind, name, self.authorized)
        self._reply(repository.describe(repository.resolve(revision)))

    def _refs(self, kind: str, name: str) -> None:
        branches = self.hub.find(kind, name, self.authorized).about["branches"]
        rows = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha}
            for branch, sha in branches.items()
        ]
        self._reply({"branches": rows, "tags": [], "converts": [], "pullRequests": []})

    def _commits(self, kind: str, name: str, revision: str) -> None:
        repository = self.hub.find(kind, name, self.authorized)
        sha, rows = repository.resolve(revision), []
        while sha:
            commit = repository.commit(sha)
            rows.append(
                {
                    "id": sha,
                    "title": commit["title"],
                    "message": "",
                    "date": commit["date"],
                    "authors": [{"user": "someone"}],
                }
            )
            sha = commit["parent"]
        self._reply(rows)

    def _branch(self, kind: str, name: str, branch: str) -> None:
        start = self._json().get("startingPoint") or "main"
        repository = self.hub.find(kind, name, self.authorized)
        with self.hub.lock:
            about = repository.about
            if branch in about["branches"]:
                raise Refused(409, f"Reference already exists: {branch}")
            about["branches"][branch] = repository.resolve(start)
            repository.write_about(about)
        self._reply({})

    # ---- reading ----

    def _tree(self, kind: str, name: str, revision: str, folder: str) -> None:
        repository = self.hub.find(kind, name, self.authorized)
        recursive = self.query.get("recursive", "false").lower() in ("true", "1")
        self._reply(repository.tree(repository.resolve(revision), folder.strip("/"), recursive))

    def _paths_info(self, kind: str, name: str, revision: str) -> None:
        body = self._body()
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body.decode()).get("paths", [])
        repository = self.hub.find(kind, name, self.authorized)
        everything = repository.tree(repository.resolve(revision), recursive=True)
        wanted = {path.strip("/") for path in ([paths] if isinstance(paths, str) else paths)}
        self._reply([entry for entry in everything if entry["path"] in wanted])

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self.hub.find("datasets" if kind else "models", name, self.authorized)
        sha = repository.resolve(revision)
        file = repository.commit(sha)["files"].get(path)
        if file is None:
            raise Refused(404, f"Entry not found: {path}", "EntryNotFound", **{"X-Repo-Commit": sha})
        start, end, status = 0, file["size"] - 1, 200
        if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = found.groups()
            start = int(first) if first else max(file["size"] - int(last), 0)
            end = min(int(last), end) if first and last else end
            status = 206
            if start >= file["size"]:
                raise Refused(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{file['size']}"})
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(end - start + 1))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{file["sha256"] if file["lfs"] else file["oid"]}"')
        if file["lfs"]:
            self.send_header("X-Linked-Etag", f'"{file["sha256"]}"')
            self.send_header("X-Linked-Size", str(file["size"]))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end}/{file['size']}")
        self.end_headers()
        if self.command == "HEAD":
            return
        with repository.blob(file["sha256"]).open("rb") as stream:
            stream.seek(start)
            left = end - start + 1
            while left and (block := stream.read(min(left, 1 << 20))):
                self.wfile.write(block)
                left -= len(block)

    # ---- writing ----

    def _preupload(self, kind: str, name: str, revision: str) -> None:
        repository = self.hub.find(kind, name, self.authorized)
        there = repository.commit(repository.resolve(revision))["files"]
        rows = []
        for file in self._json()["files"]:
            large = file["size"] >= LARGE_FILE or file["path"].endswith(LARGE_SUFFIXES)
            row = {
                "path": file["path"],
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
            }
            if file["path"] in there:
                # By which the client leaves out what has not changed.
                known = there[file["path"]]
                row["oid"] = known["sha256"] if known["lfs"] else known["oid"]
            rows.append(row)
        self._reply({"files": rows})

    def _lfs_batch(self, kind: str, name: str) -> None:
        kind = "datasets" if kind else "models"
        repository = self.hub.find(kind, name, self.authorized)
        address = f"{self.hub.url}/lfs/{kind}/{name}"
        rows = []
        for file in self._json()["objects"]:
            row = {"oid": file["oid"], "size": file["size"]}
            if not repository.blob(file["oid"]).exists():
                row["actions"] = {
                    "upload": {"href": f"{address}/{file['oid']}"},
                    "verify": {"href": f"{address}/verify"},
                }
            rows.append(row)
        self._reply({"transfer": "basic", "objects": rows})

    def _lfs_put(self, kind: str, name: str, sha256: str) -> None:
        repository = self.hub.find(kind, name, authorized=True)
        content = self._body()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refused(400, "the content does not have the hash that was announced")
        _write_whole(repository.blob(sha256), content)
        self._reply({})

    def _lfs_verify(self, kind: str, name: str) -> None:
        given = self._json()
        blob = self.hub.find(kind, name, authorized=True).blob(given["oid"])
        if not blob.exists() or blob.stat().st_size != given["size"]:
            raise Refused(404, "the upload is not there")
        self._reply({})

    def _commit(self, kind: str, name: str, revision: str) -> None:
        repository = self.hub.find(kind, name, self.authorized)
        rows = [json.loads(line) for line in self._body().splitlines() if line.strip()]
        with self.hub.lock:
            parent = repository.resolve(revision)
            files = dict(repository.commit(parent)["files"])
            title = "commit"
            for row in rows:
                value = row["value"]
                if row["key"] == "header":
                    title = value["summary"]
                    if value.get("parentCommit") not in (None, parent):
                        raise Refused(412, "A commit has happened since. Please refresh and try again.")
                elif row["key"] == "file":
                    files[value["path"]] = repository.add_blob(base64.b64decode(value["content"]))
                elif row["key"] == "lfsFile":
                    if not repository.blob(value["oid"]).exists():
                        raise Refused(400, f"the upload of {value['path']} is missing")
                    pointer = f"oid sha256:{value['oid']}\nsize {value['size']}\n"
                    oid = hashlib.sha1(pointer.encode()).hexdigest()
                    files[value["path"]] = {
                        "oid": oid,
                        "size": repository.blob(value["oid"]).stat().st_size,
                        "sha256": value["oid"],
                        "lfs": True,
                    }
                elif row["key"] == "deletedFile":
                    files.pop(value["path"], None)
                elif row["key"] == "deletedFolder":
                    prefix = value["path"].rstrip("/") + "/"
                    files = {path: file for path, file in files.items() if not path.startswith(prefix)}
                else:
                    raise Refused(400, f"this hub knows no '{row['key']}' in a commit")
            sha = repository.add_commit(revision, files, title)
        prefix = "datasets/" if kind == "datasets" else ""
        url = f"{self.hub.url}/{prefix}{name}/commit/{sha}"
        self._reply({"success": True, "commitUrl": url, "commitOid": sha})


def _write_whole(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    aside.write_bytes(content)
    aside.replace(path)


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def main() -> None:
    """Serves until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="hub", help="folder of the repositories")
    parser.add_argument("--port", type=int, default=8008)
    args = parser.parse_args()
    with LocalHub(args.root, args.port) as hub:
        print(f"a hub at {hub.url}; in another terminal:\n")
        for name, value in hub.environment.items():
            print(f"export {name}={value}")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
