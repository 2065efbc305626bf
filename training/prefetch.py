"""The rows of coming steps, made ready while the device is busy with the current one.

On a GPU a thread reads the next step's rows into pinned memory and copies them on a stream of their own; on a
CPU rows are read when they are asked for. Either way they are those of `Feed`, in its order: nothing here
remembers anything that a resumed run would need. What belongs here: when rows are read and how they travel.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from .feed import Feed
from .step import StepData


class Prefetcher:
    """Gives the rows of steps, and reads ahead by one.

    Args:
        feed: the rows.
        device: where they are wanted.
        place_of: which rows of the feed a step has.
        ahead: whether to read ahead in a thread; default: on a GPU.
    """

    def __init__(
        self, feed: Feed, device: torch.device, place_of: Callable[[int], int], ahead: bool | None = None
    ):
        self.feed, self.device, self.place_of = feed, device, place_of
        self.ahead = device.type == "cuda" if ahead is None else ahead
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rows") if self.ahead else None
        self._next: tuple[int, Future] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def get(self, step: int) -> StepData:
        """The rows of a step, on the device."""
        place = self.place_of(step)
        if not self.ahead:
            return self._read(place)
        if self._next is not None and self._next[0] == place:
            data, ready = self._next[1].result()
        else:
            self.forget()
            data, ready = self._read_aside(place)
        following = self.place_of(step + 1)
        self._next = following, self._pool.submit(self._read_aside, following)
        if ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(ready)
            for tensor in [data.counted, *(value for batch in data.batches for value in batch.values())]:
                # Their memory is the other stream's: not to be given out again before this one is done.
                tensor.record_stream(stream)
        return data

    def forget(self) -> None:
        """Drops what was read ahead: the run goes elsewhere, or splits its steps otherwise."""
        if self._next is not None:
            self._next[1].cancel()
            if not self._next[1].cancelled():
                self._next[1].exception()
            self._next = None

    def close(self) -> None:
        """Ends the thread."""
        self.forget()
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def _read(self, place: int) -> StepData:
        counted = torch.tensor(self.feed.counted(place), device=self.device)
        return StepData(counted, [_shared(batch) for batch in self.feed.micro_batches(place, self.device)])

    def _read_aside(self, place: int) -> tuple[StepData, torch.cuda.Event | None]:
        if self._stream is None:
            return self._read(place), None
        cpu = torch.device("cpu")
        counted = torch.tensor(self.feed.counted(place)).pin_memory()
        batches = [_shared(batch) for batch in self.feed.micro_batches(place, cpu)]
        pinned = {id(tensor): tensor.pin_memory() for batch in batches for tensor in batch.values()}
        with torch.cuda.stream(self._stream):
            copied = {key: tensor.to(self.device, non_blocking=True) for key, tensor in pinned.items()}
            moved = [{name: copied[id(tensor)] for name, tensor in batch.items()} for batch in batches]
            data = StepData(counted.to(self.device, non_blocking=True), moved)
            event = torch.cuda.Event()
            event.record(self._stream)
        return data, event


def _shared(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A micro-batch in which the targets, which go by two names, are one tensor."""
    if "shift_labels" in batch:
        batch["labels"] = batch["shift_labels"]
    return batch
