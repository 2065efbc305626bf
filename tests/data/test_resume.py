"""Going on after a kill: what is written is, byte for byte, what one undisturbed call writes."""

import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers.corpora import EOS, WORDS, train_bpe
from helpers.corpora import write_texts as write
from transformers import PreTrainedTokenizerFast

from tessera.data import encoding_pass, journal, mixing
from tessera.data.filters import Filters
from tessera.data.mixing import Source
from tessera.data.prepare import prepare

fork = multiprocessing.get_context("fork")


def documents(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    texts = [" ".join([f"{seed}-{i}", *draw.choices(WORDS, k=draw.randint(3, 60))]) for i in range(count)]
    # some of them twice, which `duplicate` shall still know after a kill
    return [text for i, text in enumerate(texts) for text in (text, *([texts[i // 2]] if i % 5 == 0 else []))]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> str:
    backend = train_bpe(documents(100, 9), 400)
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def cases(tmp_path_factory, bpe) -> dict[str, dict]:
    """Arguments of `prepare` by name; together they reach everything that a mark holds."""
    folder = tmp_path_factory.mktemp("sources")
    first, second = write(folder / "a.jsonl", documents(900, 1)), write(folder / "b.jsonl", documents(500, 2))
    val = write(folder / "val.jsonl", documents(100, 3))
    return {
        "mixture": {
            "sources": [Source(first, 0.7), Source(second, 0.3)],
            "tokenizer": bpe,
            "tokens": 30_000,
            "filters": Filters(("duplicate", "near_duplicate"), 30),
            "val_fraction": 0.1,
            "explain": 3,
        },
        "bytes, draw leaves none": {"sources": [Source(first), Source(second)], "val_fraction": 1e-9},
        "text of its own": {"sources": [Source(second)], "val_data": [val], "tokenizer": bpe},
    }


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Many batches and a mark after each."""
    monkeypatch.setattr(encoding_pass, "SECONDS_BETWEEN_MARKS", 0.0)
    monkeypatch.setattr(mixing, "BATCH", 2**11)
    monkeypatch.setattr("tessera.data.prepare.BATCH", 2**11)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_a_process(call) -> "multiprocessing.process.BaseProcess":
    """Starts a copy of this process, which has everything imported, that is gone after the call."""

    def run():
        sys.stderr = sys.stdout = open(os.devnull, "w")
        call()

    process = fork.Process(target=run)
    process.start()
    return process


def check_kills(given: dict, folder: Path, kills: int, seed: int) -> None:
    """Kills calls after random times until that has happened so often, each output being gone on with."""
    prepare(output=folder / "first", **given)  # imports what it needs
    start = time.perf_counter()
    prepare(output=folder / "whole", **given)
    seconds = time.perf_counter() - start
    expected, draw = content(folder / "whole"), random.Random(seed)
    assert content(folder / "first") == expected
    killed = went_on = outputs = 0
    while killed < kills:
        outputs += 1
        assert outputs < 3 * kills, "it is hardly ever killed in the middle"
        output = folder / f"out{outputs}"
        mark = folder / f"out{outputs}.partial" / "progress.json"
        while not output.exists():
            before = mark.stat().st_mtime_ns if mark.exists() else None
            process = in_a_process(lambda output=output: prepare(output=output, **given))
            if draw.random() < 0.7 and killed < kills:  # else at any moment, or never
                while process.is_alive() and (not mark.exists() or mark.stat().st_mtime_ns == before):
                    time.sleep(0.001)
                process.join(draw.uniform(0, seconds / 4))
            else:
                process.join(draw.uniform(0, seconds) if killed < kills else None)
            process.kill()
            process.join()
            killed += process.exitcode == -signal.SIGKILL
            went_on += mark.exists()
        assert content(output) == expected
        assert not (mark.parent / "tokens").exists()
    assert went_on >= kills // 2


@pytest.mark.parametrize("case", ["mixture", "bytes, draw leaves none", "text of its own"])
def test_killed_at_random_moments_it_writes_what_an_undisturbed_run_does(cases, tmp_path, case):
    check_kills(cases[case], tmp_path, 3, seed=1)


@pytest.fixture
def begun(cases, tmp_path):
    """A call that was killed in the middle, and its arguments."""
    given, mark = cases["mixture"], tmp_path / "out.partial" / "progress.json"
    process = in_a_process(lambda: prepare(output=tmp_path / "out", **given))
    while not mark.exists():
        time.sleep(0.001)
    process.kill()
    process.join()
    return given, tmp_path / "out"


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"tokens": 20_000}, r"another value of tokens \(tokens: 30000, now 20000\)"),
        ({"seed": 1}, "another value of seed"),
        ({"filters": Filters(("duplicate",), 31)}, "another value of filters"),
        ({"tokenizer": None}, "another value of tokenizer"),
    ],
)
def test_other_arguments_are_refused_unless_begun_anew(begun, other, sentence):
    given, output = begun
    before = content(output.with_name("out.partial"))
    with pytest.raises(ValueError, match=sentence + ".* or begin anew with --restart"):
        prepare(output=output, **{**given, **other})
    assert content(output.with_name("out.partial")) == before
    meta = prepare(output=output, restart=True, **{**given, **other})
    prepare(output=output.with_name("whole"), **{**given, **other})
    assert content(output) == content(output.with_name("whole")) and meta["seed"] == other.get("seed", 0)


def test_a_source_that_changed_meanwhile_is_refused(begun):
    given, output = begun
    path = Path(given["sources"][1].source)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    try:
        with pytest.raises(ValueError, match=r"b\.jsonl has changed since .* was begun"):
            prepare(output=output, **given)
    finally:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    prepare(output=output, **given)


def test_files_that_were_cut_meanwhile_are_refused(begun):
    given, output = begun
    path = output.with_name("out.partial") / "tokens" / "train.bin"
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(ValueError, match=r"train\.bin has 10 bytes, but [\d,]+ were written before"):
        prepare(output=output, **given)


def test_two_calls_at_once_are_refused(cases, tmp_path):
    import fcntl

    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing"):
            prepare(output=tmp_path / "out", **cases["mixture"])


def test_a_full_disk_is_a_sentence_and_what_was_written_is_gone_on_from(cases, tmp_path):
    given = cases["mixture"]
    prepare(output=tmp_path / "whole", **given)
    size = (tmp_path / "whole" / "train.bin").stat().st_size

    def with_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        try:
            prepare(output=tmp_path / "out", **given)
        except ValueError as error:
            (tmp_path / "sentence").write_text(str(error))

    in_a_process(with_little_room).join()
    sentence = (tmp_path / "sentence").read_text()
    assert re.search(
        r"\w+\.bin cannot be written beyond byte [\d,]+: File too large; what was written", sentence
    )
    assert (tmp_path / "out.partial" / "progress.json").exists()
    prepare(output=tmp_path / "out", **given)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.slow
def test_killed_twenty_times_it_writes_what_an_undisturbed_run_does(cases, tmp_path):
    check_kills(cases["mixture"], tmp_path, 20, seed=2)


@pytest.mark.parametrize("case", ["mixture", "bytes, draw leaves none"])
def test_ended_between_any_two_changes_of_the_disk_it_goes_on(cases, tmp_path, case, monkeypatch):
    """Not by chance: each call ends right before its n-th change, which also meets the last steps."""
    given = cases[case]
    monkeypatch.setattr(journal, "HELD", 2**11)
    prepare(output=tmp_path / "whole", **given)
    expected, draw = content(tmp_path / "whole"), random.Random(3)

    def call_and_die(after: int):
        changes = 0

        def dying(call):
            def counted(*arguments, **keywords):
                nonlocal changes
                changes += 1
                if changes > after:
                    os._exit(9)
                return call(*arguments, **keywords)

            return counted

        for name in ("write", "fsync", "replace", "ftruncate", "rename", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        prepare(output=tmp_path / "out", **given)

    deaths = 0
    while not (tmp_path / "out").exists():
        assert deaths < 300
        process = in_a_process(lambda: call_and_die(draw.randint(60, 150)))
        process.join()
        deaths += 1
    assert content(tmp_path / "out") == expected
    assert deaths > 3
