"""How much memory this process has had at once, as the system counts it."""

from pathlib import Path

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Whether the system counts it.
COUNTED = _STATUS.exists()


def peak() -> int:
    """Bytes that were in memory at most, since the start or `forget_peak`."""
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def forget_peak() -> int:
    """Makes the peak what is in memory now, where that is allowed; gives the peak."""
    try:
        _REFERENCES.write_text("5")
    except OSError:
        pass
    return peak()
