"""A Hugging Face Hub on this machine, for trying `push` and loading without an account or a network.

    python examples/local_hub.py --root hub --port 8008

prints the variables that turn huggingface_hub, transformers and datasets to it; in Python:

    with LocalHub("hub") as hub:
        environment = {**os.environ, **hub.environment}
        subprocess.run(["tessera", "push", "runs/chat", "someone/model"], env=environment)

It speaks the protocol of the real one for models and datasets: accounts, private and gated repositories,
branches, tags and pull requests, preupload, LFS upload whole and in parts, commit, tree, paths-info, resolve
with ranges. This is the server; what it answers stands in `hub_protocol.py` and, of files, in
`hub_contents.py`; what a repository is in `hub_repositories.py`. It listens to this machine alone.
"""

import argparse
import hashlib
import os
import re
import threading
import time
import uuid
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

from hub_protocol import Handler
from hub_repositories import NAME, Refused, Repository

TOKEN = "hf_local"


@dataclass(frozen=True)
class Account:
    """Whose a token is, and what it may do.

    Attributes:
        name: of the user.
        may_write: no for a token that only reads.
        organisations: whose repositories are the user's as well; None: everybody's.
    """

    name: str
    may_write: bool = True
    organisations: tuple[str, ...] | None = ()

    def owns(self, owner: str) -> bool:
        """Whether what belongs to `owner` is this user's."""
        return owner == self.name or self.organisations is None or owner in self.organisations


@dataclass
class Break:
    """Something that shall go wrong: see `LocalHub.break_next`."""

    method: str
    path: re.Pattern
    status: int | None
    after: int
    times: int


class LocalHub:
    """The server, in a thread of its own. A context manager: it runs inside `with`.

    Args:
        root: folder of the repositories; what an earlier hub left there is served again.
        port: 0 takes a free one.
        accounts: token -> account; if not given, `hf_local` of `someone` who may do everything.

    Attributes:
        part_size: bytes from which on a large file is uploaded in parts of so many.
        requests: (method, path with query, range asked for) of every request so far.
    """

    def __init__(self, root: str | Path, port: int = 0, accounts: dict[str, Account] | None = None):
        self.root = Path(root).absolute()
        self.root.mkdir(parents=True, exist_ok=True)
        self.accounts = accounts or {TOKEN: Account("someone", organisations=None)}
        self.part_size = 5 << 30
        self.requests: list[tuple[str, str, str]] = []
        self.lock = threading.RLock()
        self._breaks: list[Break] = []
        self._secret = uuid.uuid4().hex
        handler = type("Handler", (Handler,), {"hub": self})
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
        skip_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1,localhost")))
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": next(iter(self.accounts)),
            # What is downloaded from here must not pass for the real Hub's later.
            "HF_HOME": str(self.root / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
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
        """A new, empty repository; `kind` is `models` or `datasets`, `name` is `owner/name`."""
        parts = name.split("/")
        if len(parts) != 2 or not all(NAME.fullmatch(part) for part in parts):
            raise Refused(400, f"Invalid repo name: {name}")
        folder = self.root / kind / name
        with self.lock:
            if folder.exists():
                raise Refused(409, "You already created this repo", fields={"url": f"{self.url}/{name}"})
            return Repository.create(folder, kind, name, private)

    def find(self, kind: str, name: str) -> Repository:
        """The repository of this name."""
        # The name comes from outside: nothing above the root may be named by it.
        safe = all(NAME.fullmatch(part) for part in name.split("/"))
        repository = Repository(self.root / kind / name, kind, name)
        if not safe or not repository.folder.is_dir():
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repository

    def break_next(
        self, method: str, path: str, *, status: int | None = None, after: int = 0, times: int = 1
    ) -> None:
        """Makes the next requests go wrong, to see what a client does then.

        Args:
            method: of the requests.
            path: regular expression that is searched in their path.
            status: what they are answered with; None cuts the connection instead.
            after: bytes of a body that pass before the cut.
            times: how many requests.
        """
        self._breaks.append(Break(method, re.compile(path), status, after, times))

    def mend(self) -> None:
        """Takes back what `break_next` has left to go wrong."""
        self._breaks.clear()

    def take_break(self, method: str, path: str) -> Break | None:
        """What shall go wrong with this request."""
        with self.lock:
            for found in self._breaks:
                if found.times and found.method == method and found.path.search(path):
                    found.times -= 1
                    return found
        return None

    def sign(self, path: str) -> str:
        """An address that may be used without a token, as storage services give them.

        Under another name of this machine: storage is elsewhere, by which clients know to send it no token.
        """
        query = urlencode({"signature": self.signature(path)})
        return f"http://localhost:{self._server.server_port}{path}?{query}"

    def signature(self, path: str) -> str:
        """What only this hub can know of a path."""
        return hashlib.sha256(f"{self._secret}{path}".encode()).hexdigest()


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
