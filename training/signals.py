"""How a run is asked to stop: Ctrl-C, `kill`, or a scheduler that wants the machine back.

What belongs here: signals, and the exception that a run ends with. What a run does before it ends is the
loop's.
"""

import os
import signal
import threading
import time

# A terminal sends Ctrl-C to a launcher and to what it started, and the launcher sends it on.
SAME_SIGNAL_SECONDS = 1.0


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop has finished its step, saved it and ended.

    Attributes:
        exit_code: 128 and the number of the signal, as shells count: 130 for Ctrl-C, 143 for SIGTERM.

    Args:
        number: of the signal; 0 in a process that only heard of it, which counts as SIGTERM.
    """

    def __init__(self, number: int):
        super().__init__()
        self.exit_code = 128 + (number or signal.SIGTERM)


class StopSignals:
    """Within it, the first signal is noted down; a second one ends the process at once.

    SIGINT (Ctrl-C), SIGTERM (`kill`, Slurm, Kubernetes) and SIGUSR1 (Slurm's `--signal`). Outside the main
    thread, where Python takes no signals, it notes nothing.

    Attributes:
        number: of the signal, 0 for none.
    """

    def __init__(self):
        self.number, self.when = 0, 0.0
        self.before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            names = ("SIGINT", "SIGTERM", "SIGUSR1")
            for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self.when = int(number), now
            name = signal.Signals(number).name
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\n{name}: finishing the step and saving it; once more ends at once\n".encode())
        elif now - self.when >= SAME_SIGNAL_SECONDS:
            self._restore()
            os.kill(os.getpid(), number)
