"""`--resume auto`, and runs whose disk is full."""

import pytest
from helpers.runs import tiny_arguments, tiny_run

from tessera.training.checkpoints import list_checkpoints
from tessera.training.checkpoints import store as checkpoints
from tessera.training.pretrain import pretrain
from tessera.training.pretrain_arguments import gather_arguments


def test_auto_starts_where_there_is_nothing_and_goes_on_where_there_is(tmp_path, capsys):
    first = pretrain(tiny_arguments(tmp_path, steps=2), resume="auto")
    assert "resuming" not in capsys.readouterr().out
    second = pretrain(tiny_arguments(tmp_path, steps=4), resume="auto")
    assert "resuming from" in capsys.readouterr().out
    assert second.tokens == 2 * first.tokens


def test_auto_starts_again_what_was_killed_before_its_first_checkpoint_and_leaves_other_files_alone(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="already holds files"):
        pretrain(tiny_arguments(tmp_path, steps=1), resume="auto")
    (run / "thesis.txt").rename(run / "recipe.yaml")
    (run / "config.json").write_text("{")
    assert pretrain(tiny_arguments(tmp_path, steps=1), resume="auto").final.is_dir()


def test_auto_does_not_start_over_checkpoints_that_are_all_damaged(tmp_path):
    tiny_run(tmp_path, steps=2)
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        (path / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="has no checkpoint to resume from"):
        pretrain(tiny_arguments(tmp_path, steps=2), resume="auto")


def test_auto_reads_the_runs_own_recipe(tmp_path):
    tiny_run(tmp_path, steps=2)
    given = gather_arguments({"save_path": str(tmp_path / "run")}, resume="auto")
    assert given.steps == 2 and given.batch_size == 4


def test_training_goes_on_over_a_full_disk_and_its_end_insists(tmp_path, monkeypatch, capsys):
    free = iter([0, 0, *[2**40] * 9])
    monkeypatch.setattr(checkpoints, "free_bytes", lambda path: next(free))
    result = tiny_run(tmp_path, steps=6, checkpoint_steps=2)
    said = capsys.readouterr().err
    assert said.count("was not written (no space left") == 2 and "there is none before it" in said
    [path] = list_checkpoints(result.folder / "checkpoints")
    assert path.name == "step-000006"
    monkeypatch.setattr(checkpoints, "free_bytes", lambda path: 0)
    with pytest.raises(OSError, match="step 8 was not written .*; that of step 6 is there"):
        tiny_run(tmp_path, resume=True, steps=8)
    assert list_checkpoints(result.folder / "checkpoints") == [path]
