"""`make demo`, for seconds instead of minutes."""

import time
from types import SimpleNamespace

import pytest
from helpers.runs import write_text

from tessera.data.sources import read_documents
from tessera.training.demo import run_demo, standard_library_text

SECONDS = 3 / 60


def test_the_demo_trains_over_an_earlier_one_and_loads_the_model_in_a_new_process(
    tmp_path, capfd, monkeypatch
):
    """Its seconds are those of the processor, so that other work on the machine does not shorten it."""
    monkeypatch.setattr("tessera.training.clock.time", SimpleNamespace(perf_counter=time.process_time))
    folder = tmp_path / "demo"
    earlier = folder / "run" / "earlier.txt"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    (folder / ".tessera-demo").touch()
    result = run_demo(SECONDS, data=write_text(tmp_path), save_path=str(folder))
    said = capfd.readouterr().out
    assert result.after.bits_per_byte < 0.7 * result.before.bits_per_byte
    before, after = (f"{loss.bits_per_byte:.2f}" for loss in (result.before, result.after))
    assert f"{before} -> {after} bits per byte" in said
    assert f"loss curve: {folder / 'run' / 'loss.png'}" in said
    assert (folder / "run" / "loss.png").is_file() and not earlier.exists()
    assert "sample:\n" in said
    assert "TesseraForCausalLM " in said.split("in a new process:")[1]
    assert f"tessera generate --ckpt-path {folder / 'run'} --interactive" in said


def test_a_folder_that_is_no_demo_is_refused_and_left_alone(tmp_path):
    mine = tmp_path / "run" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ValueError, match="holds something other than a demo"):
        run_demo(SECONDS, data=write_text(tmp_path), save_path=str(tmp_path))
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("earlier", [True, False])
def test_a_text_that_cannot_be_trained_on_leaves_everything_as_it_was(earlier, tmp_path):
    folder = tmp_path / "demo"
    if earlier:
        (folder / "run").mkdir(parents=True)
        (folder / "run" / "loss.png").write_text("an earlier demo's")
        (folder / ".tessera-demo").touch()
    before = sorted(tmp_path.rglob("*"))
    for data, sentence in (
        (tmp_path / "none.txt", "no file or folder"),
        (write_text(tmp_path, "x"), "too short|more"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run_demo(SECONDS, data=str(data), save_path=str(folder))
    (tmp_path / "text.txt").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_standard_library_is_megabytes_of_python_and_help(tmp_path):
    documents = read_documents(standard_library_text(tmp_path / "text"))
    text = b"\n".join(documents)
    assert len(text) > 3_000_000
    assert b"class ArgumentParser(" in text and b"def dataclass(" in text
    assert b'The "for" statement' in text
