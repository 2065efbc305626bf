"""Processes that get ready side by side and work one after the other, for the benchmarks beside this file.

A worker says a line when it is ready, waits for one, and says what it found. One that fails or takes too long
is ended and told of, and the others go on.
"""

import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

LAST_LINES = 8  # of what a worker that failed had to say


class Worker:
    """A process, and what it has said.

    Args:
        name: for messages.
        command: program and arguments.
        environment: of the process.
    """

    def __init__(self, name: str, command: list[str], environment: dict[str, str]):
        self.name, self.started, self.ended = name, time.perf_counter(), False
        self.errors = tempfile.TemporaryFile("w+", errors="replace")
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
            start_new_session=True,  # what it starts ends with it
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.perf_counter() - self.started

    def wait_for(self, start: str, seconds: float) -> str | None:
        """The rest of the next line that starts so; None, and the worker is ended and the reason printed, if
        it ends before or the seconds are over."""
        until = time.perf_counter() + seconds
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, until - time.perf_counter()))
            except queue.Empty:
                print(f"{self.name}: given up after {self.age:.0f} s", flush=True)
                break
            if line is None:
                self.errors.seek(0)
                last = "".join(f"  {said}" for said in self.errors.readlines()[-LAST_LINES:]).rstrip()
                print(f"{self.name}: failed after {self.age:.0f} s\n{last}", flush=True)
                break
            if line.startswith(start):
                return line.removeprefix(start).strip()
        self.end()
        return None

    def say(self, line: str) -> None:
        """Sends it a line; one that is gone is found out by `wait_for`."""
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def end(self) -> None:
        """Ends it with all that it started."""
        if self.ended:
            return
        self.ended = True
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.errors.close()


@contextmanager
def start_workers(commands: dict[str, list[str]], **environment: str) -> Iterator[list[Worker]]:
    """Workers by name, with these variables over the environment; after it all have ended."""
    workers = []
    try:
        for name, command in commands.items():
            workers.append(Worker(name, command, {**os.environ, **environment}))
        yield workers
    finally:
        for worker in workers:
            worker.end()
