"""Where a result is written, and how it gets its name: what is in the way, and who else is there."""

import shutil

import pytest

from tessera.conversion import aside, journal
from tessera.conversion.aside import claimed, keep, keep_file, resolve_target

IN_THE_WAY = r"has appeared meanwhile and is not empty; move it away, and the same call keeps"


def write(folder, text: str = "weights") -> None:
    (folder / journal.NAME).write_text("{}\n")
    (folder / "model").write_text(text)
    (folder / "more").mkdir(exist_ok=True)
    (folder / "more/file").write_text(text)


@pytest.mark.parametrize("name", ["_force", "sync_folder"])
def test_who_comes_while_another_keeps_its_result_is_refused_and_spoils_nothing(name, tmp_path, monkeypatch):
    """The second tries at each moment at which the first waits for the disk."""
    target, refusals, original = tmp_path / "out", [], getattr(aside, name)

    def second() -> None:
        with claimed(target) as folder:
            journal.clear(folder)
            write(folder, "of the second")
            keep(folder, target)

    def wait(path) -> None:
        original(path)
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="another process") as caught:
            patch.setattr(aside, name, original)
            second()
        refusals.append(str(caught.value))

    with claimed(target) as folder:
        write(folder)
        monkeypatch.setattr(aside, name, wait)
        keep(folder, target)
    assert len(refusals) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in target.iterdir()) == ["model", "more"]
    assert (target / "model").read_text() == (target / "more/file").read_text() == "weights"


def test_a_lock_of_a_directory_that_has_got_its_name_is_worth_nothing(tmp_path, monkeypatch):
    """The second has opened the first's lock, and gets it only once the first has ended."""
    import fcntl

    target, flock = tmp_path / "out", fcntl.flock

    def late(lock, how) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        aside.place_aside(target).rename(target)
        (target / journal.LOCK).unlink()
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="another process has just written"), claimed(target):
        pass
    assert target.is_dir() and not aside.place_aside(target).exists()


def test_an_error_removes_what_was_written_and_a_target_that_appears_does_not(tmp_path):
    target = tmp_path / "new/out"
    with pytest.raises(OSError), claimed(target) as folder:
        write(folder)
        raise OSError("full")
    assert not any(tmp_path.iterdir())
    for finish in (keep, keep_file):
        target = tmp_path / f"{finish.__name__}.gguf"
        with pytest.raises(ValueError, match=IN_THE_WAY), claimed(target) as folder:
            write(folder)
            (folder / "a.gguf").write_text("weights")
            target.mkdir()
            (target / "mine").write_text("mine")
            finish(folder, target)
        assert [path.name for path in target.iterdir()] == ["mine"]
        target.rename(tmp_path / f"moved-{finish.__name__}")
        with claimed(target) as folder:
            assert (folder / "model").read_text() == "weights"
            finish(folder, target)
        assert (target if target.is_file() else target / "a.gguf").read_text() == "weights"
    assert not list(tmp_path.glob(".*"))


def test_what_no_conversion_has_left_is_not_cleared_away(tmp_path):
    folder = aside.place_aside(tmp_path / "out")
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds thesis.txt and no journal.jsonl"), claimed(tmp_path / "out"):
        pass
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    shutil.rmtree(folder)
    folder.write_text("mine")
    with pytest.raises(ValueError, match="partial is a file, where out is to be"), claimed(tmp_path / "out"):
        pass
    assert folder.read_text() == "mine"


def test_a_kill_while_another_calls_files_are_cleared_leaves_them_to_be_cleared(tmp_path, monkeypatch):
    write(tmp_path)

    def die(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        journal.clear(tmp_path)
    assert (tmp_path / journal.NAME).exists()


def test_targets_that_cannot_be_are_refused_by_name(tmp_path):
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    (tmp_path / "file").write_text("mine")
    for name, sentence in (
        ("one", "one cannot be a target: its links lead nowhere"),
        ("file/below/it", r"file is a file, so there can be no .*file/below/it"),
        ("file", "file is there already and not empty"),
    ):
        with pytest.raises(ValueError, match=sentence):
            resolve_target(tmp_path / name)
