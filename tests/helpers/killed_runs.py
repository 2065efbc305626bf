"""Training runs in processes that are copies of a warm one, so that a start costs a moment and not an import.

Started as a program with a kind and a folder; each kind prints what it saw as JSON in its last line. What
belongs here: whatever has to fork before torch has threads.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"}

import matplotlib.pyplot  # noqa: F401  (what a run imports on its way, so that its copies need not)
import torch

from helpers.runs import tiny_arguments, write_config, write_text
from tessera.data.training_rows import RowSequence
from tessera.training.checkpoints import store as checkpoints
from tessera.training.pretrain import pretrain
from tessera.training.signals import Stopped


def run(folder: Path, given: dict, log: Path | None = None) -> None:
    """Trains, from where it can go on, in this process."""
    sys.stdout.flush()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    with (folder / "errors.txt").open("a") as errors:
        os.dup2(errors.fileno(), 2)
    if log is not None:
        note_rows(log)
        note_hashes(log.with_suffix(".hashed"))
    pretrain(tiny_arguments(folder, **given), resume="auto")


def note_rows(log: Path) -> None:
    """Writes down the numbers of the rows that this process reads, a part of a step a line."""
    read = RowSequence.batch

    def batch(self, numbers):
        with log.open("a") as file:
            file.write(json.dumps(list(numbers)) + "\n")
        return read(self, numbers)

    RowSequence.batch = batch


def note_hashes(log: Path) -> None:
    """Writes down which checkpoints this process hashes."""
    verify = checkpoints.verify

    def noted(path):
        with log.open("a") as file:
            file.write(f"{path.name}\n")
        return verify(path)

    checkpoints.verify = noted


def start(folder: Path, given: dict, log: Path | None = None, **environment: str) -> int:
    """Forks a process that trains; it exits with 0 if that ended well."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        os.environ |= environment
        run(folder, given, log)
        code = 0
    except Stopped as stopped:
        code = stopped.exit_code
    except BaseException:
        with (folder / "errors.txt").open("a") as errors:
            traceback.print_exc(file=errors)
    finally:
        os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def given_for(folder: Path, preset: str, dropout: float = 0.0, **more) -> dict:
    fields = {"resid_pdrop": dropout}
    if preset.startswith("bytegpt"):
        fields |= {
            "router_correction_bias": True,
            "scoring_func": "sigmoid",
            "router_bias_update_speed": 0.01,
        }
    config = write_config(folder, preset, **fields)
    return {"config": config, "data_file": write_text(folder), "sequence_length": 16, **more}


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "run" / "final" / "model.safetensors").read_bytes()).hexdigest()


def is_writing(folder: Path) -> bool:
    """Whether there is half a checkpoint."""
    return any((folder / "run" / "checkpoints").glob(".step-*"))


def killed(folder: Path, kills: str, preset: str, seed: str) -> dict:
    """Kills runs with SIGKILL at random moments, every other time while a checkpoint is being written, and
    has them go on until they are through."""
    given = given_for(folder, preset, 0.1, steps=60, evaluations=2, eval_tokens=200, sample_tokens=0)
    chance = random.Random(int(seed))
    (whole := folder / "whole").mkdir()
    began = time.monotonic()
    assert wait(start(whole, given)) == 0, (whole / "errors.txt").read_text()
    length = time.monotonic() - began
    given |= {"checkpoint_steps": 2, "keep_last": 1}
    seen = {"kills": 0, "writing": 0, "finished": 0, "same": True, "seconds": length}
    cut = None
    while cut is not None or seen["kills"] < int(kills):
        if cut is None:
            (cut := folder / f"cut{seen['finished']}").mkdir()
        child = start(cut, given)
        if seen["kills"] < int(kills):
            wait_and_kill(child, cut, chance, length, in_writing=seen["kills"] % 2 == 1)
        code = wait(child)
        if code == -signal.SIGKILL:
            seen["kills"] += 1
            seen["writing"] += is_writing(cut)
        elif code:
            return seen | {"errors": (cut / "errors.txt").read_text()[-3000:]}
        else:
            seen["finished"] += 1
            seen["same"] &= digest(cut) == digest(whole)
            cut = None
    return seen


def wait_and_kill(child: int, folder: Path, chance: random.Random, length: float, in_writing: bool) -> None:
    """Kills a run at a moment of the first half of it, or soon after while it writes; unless it has ended."""
    moment = time.monotonic() + chance.uniform(0, 0.5 * length)
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while os.waitid(os.P_PID, child, ended) is None:
        if time.monotonic() >= moment and (not in_writing or is_writing(folder)):
            time.sleep(chance.uniform(0, 0.004) if in_writing else 0)
            os.kill(child, signal.SIGKILL)
            return
        time.sleep(0.0005)


def together(
    folder: Path, given: dict, processes: int, log: str, signal_after: float | None = None
) -> list[int]:
    """Trains on several processes and returns their exit codes; one of them may be sent SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        environment = environment if processes > 1 else {}
        children.append(start(folder, given, folder / f"{log}-{rank}.rows", **environment))
    if signal_after is not None:
        rows = folder / f"{log}-1.rows"
        while not rows.exists() or len(rows.read_text().splitlines()) < signal_after:
            time.sleep(0.002)
        os.kill(children[-1], signal.SIGTERM)  # the others hear of it from this one
    return [wait(child) for child in children]


def elastic(folder: Path, parallel: str, optimizer: str, weights: str) -> dict:
    """Two processes that are stopped, and one, two or three that go on; against one that was not.

    Where the weights of the two are split, those of the two that go on are not, and the other way round.
    """
    given = given_for(folder, "llama-tiny", steps=12, batch_size=6, sample_tokens=0)
    given |= {"optimizer": optimizer, "weights": weights}
    (whole := folder / "whole").mkdir()
    seen = {"whole": together(whole, given, 1, "all")}
    (two := folder / "two").mkdir()
    seen["two"] = together(two, {**given, "parallel": parallel}, 2, "first", signal_after=4)
    given["parallel"] = "fsdp" if parallel == "ddp" else "ddp"
    seen["stopped"] = [path.name for path in (two / "run" / "checkpoints").glob("step-*")]
    for processes in (1, 2, 3):
        shutil.copytree(two, there := folder / f"on{processes}")
        seen[f"on{processes}"] = together(there, given, processes, "then")
    for path in folder.glob("*/errors.txt"):
        if "Traceback" in (text := path.read_text()):
            seen[f"errors of {path.parent.name}"] = text[-2000:]
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, where, *options = sys.argv[1:]
    print(json.dumps({"killed": killed, "elastic": elastic}[kind](Path(where), *options)))
