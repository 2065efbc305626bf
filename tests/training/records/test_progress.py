"""What is shown of a run: the words, the room on a terminal, and when."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest

from tessera.training.records import progress as room
from tessera.training.records.progress import Progress, compact, draw_bar, duration, fit_line

PARTS = [" 37 %", "loss 3.123", "3 min 10 s left", "12.3k tok/s", "1.234 bits/byte, val 1.3", "step 7/20", ""]


@pytest.mark.parametrize("columns", range(1, 160, 7))
def test_a_line_fits_the_terminal_and_keeps_what_matters_most(columns):
    line = fit_line(PARTS, 0.37, columns)
    assert len(line) <= columns
    assert line.startswith(" 37 %"[:columns])
    if columns >= 20:
        assert "loss 3.123" in line
    shown = [part in line for part in PARTS[:-1]]
    assert shown == sorted(shown, reverse=True)  # nothing is left out before something less important
    if columns >= 120:
        assert all(shown) and "█" in line


def test_a_line_for_a_terminal_without_such_letters_is_ascii():
    assert fit_line(PARTS, 0.371, 120, plain=True).isascii()


def test_a_bar_grows_in_eighths():
    assert draw_bar(0.0, 4) == "░░░░" and draw_bar(1.0, 4) == "████"
    assert draw_bar(0.5, 4) == "██░░" and draw_bar(1 / 32, 4) == "▏░░░"


@pytest.mark.parametrize(
    "seconds,words",
    [
        (0.2, "1 s"),
        (59, "59 s"),
        (190, "3 min 10 s"),
        (1800, "30 min"),
        (7500, "2 h 5 min"),
        (273600, "3 d 4 h"),
    ],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    "number,words", [(812.4, "812"), (999.7, "1k"), (12_345, "12.3k"), (999_900, "1M"), (1.25e6, "1.25M")]
)
def test_numbers_are_short(number, words):
    assert compact(number) == words


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch, capsys):
    now = iter([0.0, 0.0, 1.0, 11.0, 12.0, 21.5])
    monkeypatch.setattr(room.time, "perf_counter", lambda: next(now))
    with Progress(bits_of_a_nat=0.5) as shown:
        shown.note_validation(2.5)
        for i in range(1, 5):
            shown.update(
                i / 10, i, 4.0, tokens_per_second=12_345.0, mfu=0.411, learning_rate=0.02, memory_gib=9.5
            )
    lines = capsys.readouterr().err.splitlines()
    rest = "12.3k tok/s, 2.000 bits/byte, val 2.500, step {}, MFU 41 %, lr 0.02, 9.5 GiB"
    assert lines == [
        f" 20 %, loss 4.000, 44 s left, {rest.format(2)}",
        f" 40 %, loss 4.000, 33 s left, {rest.format(4)}",
    ]


def test_other_processes_show_nothing(capsys):
    with Progress(shows=False) as shown:
        shown.update(1.0, 1, 4.0)
        shown.write("a line")
    assert capsys.readouterr() == ("", "")


def test_a_rollback_does_not_turn_the_time_back(monkeypatch):
    monkeypatch.setattr(room.time, "perf_counter", lambda: 0.0)
    shown = Progress(shows=False)
    assert shown._seconds_left(10.0, 0.5) > 0
    assert shown._seconds_left(11.0, 0.4) is None
    assert shown._seconds_left(12.0, 0.5) == pytest.approx(5.0)


TERMINAL = """
import sys, time
from tessera.training.records.progress import Progress
with Progress(total_steps=3) as shown:
    for i in range(1, 4):
        shown.last_shown = 0.0
        shown.update(i / 3, i, 5.0 - i, tokens_per_second=1000.0)
        shown.write(f"validation {i}")
"""


@pytest.mark.parametrize("rows", [20, 0])  # in a container its height may not be known
def test_a_terminal_has_one_line_in_its_place_and_others_above(rows):
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 70, 0, 0))
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.Popen([sys.executable, "-c", TERMINAL], stderr=theirs, env=env)
    written = b""
    while done.poll() is None or written == b"":
        try:
            written += os.read(ours, 2**16)
        except (BlockingIOError, OSError):
            time.sleep(0.02)
    os.close(theirs)
    try:
        while more := os.read(ours, 2**16):
            written += more
    except OSError:
        pass
    screen = _screen(written.decode())
    assert screen[:3] == ["validation 1", "validation 2", "validation 3"]
    assert re.match(r"100 % █+ · loss 2.000 · ", screen[3]) and len(screen[3]) < 70
    assert [line for line in screen[4:] if line] == []


def _screen(written: str) -> list[str]:
    """What a terminal shows that knows line feeds, carriage returns and nothing else."""
    lines, column = [""], 0
    for letter in io.StringIO(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", written), newline="").read():
        if letter == "\n":
            lines.append("")
        elif letter == "\r":
            column = 0
        else:
            lines[-1] = lines[-1][:column].ljust(column) + letter + lines[-1][column + 1 :]
            column += 1
        if letter == "\n":
            column = 0
    return [line.rstrip() for line in lines]
