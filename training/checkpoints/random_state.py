"""Random states of all processes of a run, saved together and given back, to as many processes or others.

What belongs here: generators that whatever runs in training may draw from: torch's on the CPU and the GPU,
Python's and NumPy's.
"""

import hashlib
import math
import random
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file

RANDOM_FILE = "random.safetensors"


def gather_random_states(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """The states of all processes, which all call it: for each generator its bytes, [processes, bytes]."""
    return {
        name: accelerator.gather(state.to(accelerator.device)[None]).cpu()
        for name, state in _own_state().items()
    }


def restore_random_state(checkpoint: Path, process: int) -> None:
    """Gives this process the state that it had when a checkpoint was written.

    A process that was not there then gets one that follows from the first one's and its own number, the same
    whenever it is asked for.
    """
    if not (checkpoint / RANDOM_FILE).is_file():
        return
    states = load_file(checkpoint / RANDOM_FILE)
    if process >= len(states["cpu"]):
        digest = hashlib.sha256(states["cpu"][0].numpy().tobytes() + process.to_bytes(8, "little"))
        set_seed(int.from_bytes(digest.digest()[:4], "little"))
        return
    # Cloned: torch reads a generator's state from the beginning of its memory.
    mine = {name: rows[process].clone() for name, rows in states.items()}
    torch.set_rng_state(mine["cpu"])
    if "cuda" in mine and torch.cuda.is_available():
        torch.cuda.set_rng_state(mine["cuda"])
    *words, gauss = mine["python"].view(torch.float64).tolist()
    random.setstate((3, tuple(map(int, words)), None if math.isnan(gauss) else gauss))
    *words, position, has_gauss, gauss = mine["numpy"].view(torch.float64).tolist()
    keys = np.asarray(words, dtype=np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))


def _own_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    # Words of 32 bits are whole numbers in a double, and so is everything else but the doubles.
    _, words, gauss = random.getstate()
    states["python"] = _as_bytes([*words, math.nan if gauss is None else gauss])
    _, keys, *rest = np.random.get_state()
    states["numpy"] = _as_bytes([*keys.tolist(), *rest])
    return states


def _as_bytes(numbers: list[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64).view(torch.uint8)
