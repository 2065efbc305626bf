"""Training runs, tiny and whole: what they learn, what they leave, how they stop, resume and refuse."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState
from helpers.models import DIALECTS
from helpers.runs import (
    BYTEGPT,
    REPETITIVE,
    tiny_arguments,
    tiny_run,
    untimed_records,
    write_config,
    write_text,
    write_words,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tessera import TesseraConfig, TesseraForCausalLM
from tessera.data.training_rows import RowSequence
from tessera.training import validation
from tessera.training.checkpoints import find_checkpoint
from tessera.training.inputs import encode
from tessera.training.pretrain import Run
from tessera.training.run_folder import claimed
from tessera.training.schedules import learning_rate_factor


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bits(ours: Path, theirs: Path) -> None:
    expected = weights(theirs)
    for name, tensor in weights(ours).items():
        assert torch.equal(tensor, expected[name]), name


def records(run: Path, key: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop_after(monkeypatch, step: int, error: type[BaseException] = SystemExit) -> None:
    """The process is killed in the middle of the step after `step`."""
    whole = Run._optimizer_step

    def optimizer_step(self, progress):
        if self.step == step:
            raise error
        return whole(self, progress)

    monkeypatch.setattr(Run, "_optimizer_step", optimizer_step)


# ---- learning ----


def test_the_first_and_the_last_validation_see_all_the_text_and_others_a_sample(tmp_path, monkeypatch):
    scored = []

    def text_loss(*given):
        scored.append(trainer_text_loss(*given))
        return scored[-1]

    trainer_text_loss = validation.text_loss
    monkeypatch.setattr(validation, "text_loss", text_loss)
    tiny_run(tmp_path, evaluations=1, eval_tokens=64)
    whole = int(len(REPETITIVE) * 0.1) - 1
    first, during, last = [loss.tokens for loss in scored]
    assert (first, last) == (whole, whole) and 32 <= during <= 96


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_loss_falls_on_a_repetitive_text(optimizer, tmp_path):
    rate = 3e-3 if optimizer == "adamw" else None
    result = tiny_run(tmp_path, steps=40, optimizer=optimizer, learning_rate=rate)
    assert 7 < result.before.bits_per_byte < 10
    assert result.after.bits_per_byte < 0.6 * result.before.bits_per_byte
    losses = [record["loss"] for record in records(result.folder, "loss")]
    assert losses == sorted(losses, reverse=True)
    assert result.tokens == 40 * 4 * 32


@pytest.mark.parametrize("preset", DIALECTS)
def test_every_dialect_trains_and_loads(preset, tmp_path):
    result = tiny_run(tmp_path, config=preset, steps=3)
    assert result.after.nats < result.before.nats
    assert AutoModelForCausalLM.from_pretrained(result.final).config.model_type == "tessera"


@pytest.mark.parametrize("preset", ["llama-tiny", "bytegpt-tiny"])
def test_accumulation_does_not_change_the_weights(preset, tmp_path):
    """AdamW turns the least difference in a gradient near zero into a step of its own; this rate is small."""
    config = write_config(tmp_path, preset, router_aux_loss_coef=0.0)  # balance is a matter of each batch
    given = {"config": config, "optimizer": "adamw", "learning_rate": 1e-4}
    results = []
    for accumulation in (1, 4):
        (folder := tmp_path / str(accumulation)).mkdir()
        results.append(tiny_run(folder, accumulation=accumulation, **given))
    for key in ("loss", "grad_norm"):  # which AdamW does not feel the size of
        one, four = ([record[key] for record in records(result.folder, key)] for result in results)
        assert four == pytest.approx(one, rel=1e-4)
    whole, parts = (weights(result.final) for result in results)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=2e-5, rtol=0, msg=name)


def test_gradient_checkpointing_does_not_change_the_weights(tmp_path, monkeypatch):
    finals, enabled = [], []
    whole = Run._train

    def train(self):
        enabled.append(all(layer.gradient_checkpointing for layer in self.model.model.layers))
        whole(self)

    monkeypatch.setattr(Run, "_train", train)
    for checkpointing in (False, True):
        (folder := tmp_path / str(checkpointing)).mkdir()
        finals.append(tiny_run(folder, gradient_checkpointing=checkpointing).final)
    assert enabled == [False, True]
    plain, recomputed = map(weights, finals)
    for name, tensor in plain.items():
        torch.testing.assert_close(recomputed[name], tensor, atol=1e-5, rtol=0, msg=name)


def test_each_step_trains_on_the_next_rows(tmp_path, monkeypatch):
    seen = []
    batch = RowSequence.batch

    def noted(self, numbers):
        seen.extend(numbers)
        return batch(self, numbers)

    monkeypatch.setattr(RowSequence, "batch", noted)
    tiny_run(tmp_path, steps=5, accumulation=2)
    assert seen == list(range(20))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_rates_of_all_groups_follow_the_schedule(optimizer, tmp_path):
    run = Run(tiny_arguments(tmp_path, optimizer=optimizer, steps=10, warmup=0.3, floor=0.1))
    groups = run.optimizer.param_groups
    peaks, seen = [group["lr"] for group in groups], []
    step = run.optimizer.step

    def noted(*args, **kwargs):
        seen.append([group["lr"] / peak for group, peak in zip(groups, peaks, strict=True)])
        return step(*args, **kwargs)

    run.optimizer.step = noted
    run.run()
    for i, factors in enumerate(seen):
        assert factors == pytest.approx([learning_rate_factor(run.args, i / 10)] * len(groups))


def test_gradients_are_clipped(tmp_path):
    """To next to nothing, so that AdamW's epsilon drowns them."""
    result = tiny_run(tmp_path, optimizer="adamw", learning_rate=0.01, clip=1e-12)
    assert result.after.nats == pytest.approx(result.before.nats, abs=1e-3)
    assert (
        tiny_run(tmp_path, save_path=str(tmp_path / "free"), optimizer="adamw", learning_rate=0.01).after.nats
        < 5
    )


def test_an_epoch_is_every_window_once(tmp_path):
    data = write_text(tmp_path, "x" * 1000)
    result = tiny_run(tmp_path, data_file=data, steps=None, epochs=2)
    # 900 bytes for training make 27 windows of 32 and a start; two epochs are 13 or 14 steps of 4
    assert result.tokens // (4 * 32) in (13, 14)


def test_minutes_end_a_run(tmp_path):
    result = tiny_run(tmp_path, steps=None, minutes=0.01, log_steps=1000)
    assert 0.6 <= result.seconds < 3
    recorded = [record["step"] for record in untimed_records(result.folder, "loss")]
    assert recorded == [1, untimed_records(result.folder)[-1]["step"]]


def test_two_runs_do_not_share_a_directory(tmp_path):
    result = tiny_run(tmp_path)
    weights = (result.final / "model.safetensors").read_bytes()
    with claimed(result.folder, PartialState()):
        for resume in (True, "auto"):
            with pytest.raises(ValueError, match="another process is training in .*run; wait for it, end it"):
                tiny_run(tmp_path, resume=resume, steps=9)
    assert (result.final / "model.safetensors").read_bytes() == weights
    assert tiny_run(tmp_path, resume=True, steps=9).tokens > result.tokens
    with pytest.raises(ValueError, match="no checkpoint"):
        tiny_run(tmp_path, resume=True, save_path=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_model_that_has_diverged_is_sampled_from_without_an_error(tmp_path):
    with pytest.raises(FloatingPointError, match="is nan at step .*; lower the learning rate"):
        tiny_run(tmp_path, steps=40, eval_steps=4, learning_rate=1e30, optimizer="adamw")
    assert (tmp_path / "run" / "samples.jsonl").is_file()


def test_a_place_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tessera.training.run_folder.write_durably", full)
    with pytest.raises(OSError, match="--save-path .*run cannot be written to: No space left on device$"):
        tiny_run(tmp_path)


# ---- what a run leaves ----


def test_a_run_directory_is_complete_and_its_model_loads_through_the_auto_classes(tmp_path):
    result = tiny_run(tmp_path, steps=12, evaluations=2, sample_prompt="the ")
    run = result.folder
    assert run == tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        *("config.json", "recipe.yaml", "checkpoints", "final", "sample.txt", "report.html"),
        *("metrics.jsonl", "events.jsonl", "samples.jsonl", "loss.png", "course.png"),
    }
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (run / "sample.txt").read_text(encoding="utf-8") == result.sample
    assert result.sample.startswith("the ")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["steps"] == 12 and recipe["optimizer"] == "muon"
    assert TesseraConfig.from_pretrained(run).hidden_size == 48
    assert [record["step"] for record in records(run, "val_loss")] == [0, 4, 8, 12]
    last = records(run, "val_loss")[-1]
    assert last["val_loss"] == pytest.approx(result.after.nats, abs=1e-5)

    tokenizer = AutoTokenizer.from_pretrained(result.final)
    model, info = AutoModelForCausalLM.from_pretrained(result.final, output_loading_info=True)
    assert not any(info.values()), info
    ids = tokenizer("the quick", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [list(b"the quick")]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 13)
    assert_same_bits(result.final, run / "checkpoints" / "step-000012")


def test_a_save_path_that_names_a_file_also_gets_the_weights(tmp_path):
    target = tmp_path / "out" / "model.safetensors"
    result = tiny_run(tmp_path, save_path=str(target), steps=2)
    assert result.folder == tmp_path / "out" / "model"
    assert target.read_bytes() == (result.final / "model.safetensors").read_bytes()
    assert [path.name for path in target.parent.iterdir() if path.is_file()] == ["model.safetensors"]


def test_bytegpts_own_json_is_a_configuration(tmp_path):
    path = tmp_path / "bytegpt.json"
    path.write_text(json.dumps(BYTEGPT))
    result = tiny_run(tmp_path, config=str(path), steps=2)
    config = TesseraConfig.from_pretrained(result.final)
    assert (config.attention_type, config.hidden_size, config.kv_lora_rank) == ("latent", 48, 16)
    assert config.mlp_layer_types == ["dense", "sparse"]


def test_matplotlib_may_be_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = tiny_run(tmp_path, steps=1)
    assert not (result.folder / "loss.png").exists()
    assert "matplotlib is not installed" in capsys.readouterr().out


# ---- stopping and resuming ----


@pytest.mark.parametrize(
    ("preset", "optimizer"), [("llama-tiny", "muon"), ("gpt2-tiny", "adamw"), ("bytegpt-tiny", "muon")]
)
def test_a_killed_and_resumed_run_ends_in_the_same_bits(preset, optimizer, tmp_path, monkeypatch):
    """gpt2-tiny has dropout. A checkpoint after every step; the step that was cut short is done again."""
    given = {"preset": preset, "optimizer": optimizer, "steps": 8, "checkpoint_minutes": 1e-9}
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    whole = tiny_run(tmp_path / "whole", **given)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 5)
        tiny_run(tmp_path / "cut", **given)
    run = tmp_path / "cut" / "run"
    assert not (run / "final").exists()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')  # killed in the middle of a line
    resumed = tiny_run(tmp_path / "cut", resume=True, **given)
    assert_same_bits(resumed.final, whole.final)
    assert resumed.after == whole.after
    assert [record["step"] for record in records(run, "val_loss")] == [0, 5, 8]


def test_a_resumed_run_has_the_biases_and_the_layers_ahead_of_one_that_was_not_stopped(tmp_path, monkeypatch):
    fields = {
        "scoring_func": "sigmoid",
        "router_correction_bias": True,
        "router_bias_update_speed": 0.01,
        "num_mtp_layers": 1,
        "train_mtp": True,
    }
    given = {"steps": 4, "checkpoint_minutes": 1e-9, "log_steps": 1, "accumulation": 2}
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    config = write_config(tmp_path, "bytegpt-tiny", **fields)
    whole = tiny_run(tmp_path / "whole", config=config, **given)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 3)
        tiny_run(tmp_path / "cut", config=config, **given)
    resumed = tiny_run(tmp_path / "cut", config=config, resume=True, **given)
    assert_same_bits(resumed.final, whole.final)
    final = weights(whole.final)
    for layer in (1, 2):
        bias = final[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        moves = (bias / 0.01).round()
        assert torch.allclose(bias, 0.01 * moves) and 0 < moves.abs().max() <= 4
    measured = records(whole.folder, "router_max_violation")
    assert [record["step"] for record in measured] == [1, 2, 3, 4]
    # Two of four experts: an even load would be 0, and one expert cannot have more than half.
    assert all(0 <= record["router_max_violation"] <= 1 for record in measured)
    assert all(0 < record["router_entropy"] <= math.log(4) for record in measured)


def test_a_broken_checkpoint_is_passed_over_with_a_sentence(tmp_path, monkeypatch, capsys):
    given = {"steps": 8, "checkpoint_minutes": 1e-9}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 5)
        tiny_run(tmp_path, **given)
    run = tmp_path / "run"
    with (run / "checkpoints" / "step-000005" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    tiny_run(tmp_path, resume=True, **given)
    said = capsys.readouterr().out
    assert "passing over" in said and "step-000005: model.safetensors is not what was written" in said
    assert f"resuming from {run / 'checkpoints' / 'step-000004'}" in said


def test_a_finished_run_resumes_to_more_steps(tmp_path):
    first = tiny_run(tmp_path, steps=3)
    second = tiny_run(tmp_path, resume=True, steps=6)
    assert second.tokens == 2 * first.tokens
    assert second.after.nats < first.after.nats


def test_ctrl_c_ends_the_step_saves_it_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    whole = Run._optimizer_step

    def optimizer_step(self, progress):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self, progress)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_optimizer_step", optimizer_step)
        tiny_run(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "stopped at step 3; its checkpoint is saved, go on with --resume" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "step-000003").is_dir()
    (tmp_path / "whole").mkdir()
    expected = tiny_run(tmp_path / "whole")
    assert_same_bits(tiny_run(tmp_path, resume=True).final, expected.final)


@pytest.mark.parametrize(
    "change",
    [
        {"data_file": REPETITIVE.replace("fox", "cat")},
        {"data_file": REPETITIVE + "more"},
        {"seed": 1},
        {"batch_size": 2},
        {"sequence_length": 16},
        {"optimizer": "adamw"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_resuming_with_other_rows_or_another_optimizer_is_refused(change, tmp_path):
    tiny_run(tmp_path, steps=2)
    before = snapshot(tmp_path / "run")
    if "data_file" in change:
        change = {"data_file": write_text(tmp_path, change["data_file"], "other.txt")}
    with pytest.raises(ValueError, match="trained on other data"):
        tiny_run(tmp_path, resume=True, **{"steps": 4, **change})
    assert snapshot(tmp_path / "run") == before


def test_resuming_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint to resume from"):
        tiny_run(tmp_path, resume=True)
    assert not (tmp_path / "run").exists()


# ---- starting from weights ----


@pytest.mark.parametrize("given", ["run", "run/final", "run/checkpoints/step-000030"])
def test_a_run_starts_from_the_weights_of_another(given, tmp_path):
    first = tiny_run(tmp_path, steps=30)
    second = tiny_run(tmp_path, save_path=str(tmp_path / "second"), ckpt_path=str(tmp_path / given), steps=1)
    assert second.before == first.after


def test_a_run_starts_from_a_directory_that_holds_weights_and_nothing_else(tmp_path):
    first = tiny_run(tmp_path, steps=10, save_path=str(tmp_path / "weights" / "model.safetensors"))
    second = tiny_run(tmp_path, ckpt_path=str(tmp_path / "weights"), steps=1)
    assert second.before == first.after


@pytest.mark.parametrize("exists", [False, True], ids=["absent", "empty"])
def test_weights_that_are_not_there_yet_are_passed_over_with_a_word(exists, tmp_path, capsys):
    path = tmp_path / "weights"
    if exists:
        path.mkdir()
    tiny_run(tmp_path, ckpt_path=str(path), steps=1)
    assert f"no checkpoint in {path} yet: starting from random weights" in capsys.readouterr().out


# ---- tokenizers ----


@pytest.fixture
def word_tokenizer(tmp_path) -> Path:
    return write_words(tmp_path / "words")


def test_a_tokenizer_directory_is_trained_with_and_saved_everywhere(word_tokenizer, tmp_path):
    """Its sample starts where documents do."""
    config = write_config(tmp_path, vocab_size=16)
    result = tiny_run(tmp_path, tokenizer=str(word_tokenizer), config=config, sequence_length=8)
    bytes_per_token = result.after.num_bytes / result.after.tokens
    assert 4 < bytes_per_token < 5.5, "nine words of the text are 45 bytes"
    assert set(result.sample.split()) <= {"the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog."}
    assert result.sample
    for folder in (result.final, result.folder / "checkpoints" / "step-000006"):
        assert AutoTokenizer.from_pretrained(folder)("lazy dog.")["input_ids"] == [6, 3]
        assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 1


def test_a_prompt_that_the_tokenizer_makes_nothing_of_gives_no_sample(word_tokenizer, tmp_path):
    config = write_config(tmp_path, vocab_size=16)
    given = {"tokenizer": str(word_tokenizer), "config": config, "sequence_length": 8}
    assert tiny_run(tmp_path, sample_prompt="\n", **given).sample == ""


def test_documents_are_separated_by_the_end_of_text_token(word_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(word_tokenizer)
    tokens = encode(tokenizer, [b"the fox", b"lazy"])
    assert tokens.ids.tolist() == [9, 4, 1, 6, 1]
    assert tokens.num_bytes == len(b"the fox\nlazy")


# ---- refusals ----


def broken_weights(folder: Path) -> str:
    """A directory whose checkpoint was cut short."""
    TesseraForCausalLM(TesseraConfig.from_pretrained(write_config(folder))).save_pretrained(folder / "bad")
    file = folder / "bad" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return str(folder / "bad")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"data_file": lambda folder: str(folder / "missing.txt")}, "there is no file or folder"),
        ({"data_file": lambda folder: write_text(folder, "")}, "is empty"),
        ({"data_file": lambda folder: write_text(folder, "short")}, "validation; give more|too short"),
        ({"data_file": lambda folder: write_text(folder, "s" * 32)}, "but a window of 32 needs 33"),
        ({"batch_size": 3, "accumulation": 4}, r"batch_size 3 is less than a row .* \(4 x 1\); give 4"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"accumulation": 0}, "accumulation must be at least 1"),
        ({"steps": 0}, "steps must be positive"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"clip": -1.0}, "clip must not be negative"),
        ({"warmup": 1.5}, "warmup is a share between 0 and 1"),
        ({"optimizer": "sgd"}, "optimizer must be 'muon', 'adamw' or 'adamw-8bit', got 'sgd'"),
        ({"config": "lama-tiny"}, "llama-tiny"),
        ({"config": lambda folder: str(folder / "none.json")}, "there is no file"),
        ({"sequence_length": 513}, "longer than the model's context of 512"),
        ({"sample_prompt": "x" * 512}, "sample_prompt has 512 tokens"),
        ({"tokenizer": lambda folder: str(folder / "none")}, "tokenizer .* cannot be loaded"),
        ({"tokenizer": lambda folder: str(folder)}, "holds no tokenizer"),
        ({"ckpt_path": lambda folder: write_text(folder, "x", "file")}, "holds no model.safetensors"),
        ({"ckpt_path": broken_weights}, "cannot be read"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_work_is_refused_before_anything_is_written(given, sentence, tmp_path):
    given = {key: value(tmp_path) if callable(value) else value for key, value in given.items()}
    with pytest.raises(ValueError, match=sentence):
        tiny_run(tmp_path, **given)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(word_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="has 10 tokens, the model's vocabulary only 9"):
        tiny_run(tmp_path, tokenizer=str(word_tokenizer), config=write_config(tmp_path, vocab_size=9))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("existing", ["run/notes.txt", "run.safetensors"])
def test_what_is_already_there_is_refused_and_left_alone(existing, tmp_path):
    path = tmp_path / existing
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match="choose another --save-path"):
        tiny_run(tmp_path, save_path=str(tmp_path / existing.split("/")[0]))
    assert [file.read_bytes() for file in snapshot(tmp_path) if file.name == path.name] == [b"mine"]


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="is (nan|inf) at step .*; lower the learning rate"):
        tiny_run(tmp_path, optimizer="adamw", learning_rate=1e30, clip=0, warmup=0, steps=20)
    assert not (tmp_path / "run" / "final").exists()


# ---- several processes ----


# The command, in which the second process has a clock that runs fast.
FAST_CLOCK = """
import os, sys, time
from types import SimpleNamespace
from tessera.cli import run
from tessera.training import pretrain
if os.environ.get("RANK") == "1":
    pretrain.time = SimpleNamespace(perf_counter=lambda: 5 * time.perf_counter())
run(["pretrain", *sys.argv[1:]])
"""


@pytest.mark.distributed
@pytest.mark.parametrize("preset", ["llama-tiny", "bytegpt-tiny"])
def test_two_processes_train_the_same_model_as_one(preset, tmp_path):
    """The held-out text is an odd number of batches, and checkpoints follow a clock that is not shared."""
    config = write_config(tmp_path, preset, router_aux_loss_coef=0.0)
    data = write_text(tmp_path)
    options = f"--config {config} --data-file {data} --steps 12 --batch-size 4 --accumulation 2".split()
    options += "--sequence-length 16 --optimizer adamw --learning-rate 1e-4".split()
    options += "--checkpoint-minutes 0.001 --evaluations 2".split()
    (script := tmp_path / "fast_clock.py").write_text(FAST_CLOCK)
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    # two processes and two micro-batches of one row each against four micro-batches
    said = {}
    for processes, launcher in ((1, []), (2, launch)):
        program = [str(script)] if preset == "bytegpt-tiny" else ["-m", "tessera.training.pretrain"]
        command = [sys.executable, *launcher, *program, *options]
        command += ["--save-path", str(tmp_path / f"run{processes}")]
        if processes == 1:
            command[command.index("--accumulation") + 1] = "4"
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        said[processes] = done.stdout
    assert "on 2 x cpu" in said[2] and said[2].count("after training") == said[2].count("model:") == 1

    one, two = tmp_path / "run1", tmp_path / "run2"
    for key in ("loss", "grad_norm", "val_loss"):
        ours, theirs = records(two, key), records(one, key)
        assert [record["step"] for record in ours] == [record["step"] for record in theirs]
        assert [record[key] for record in ours] == pytest.approx([r[key] for r in theirs], abs=1e-4, rel=1e-4)
    for name, tensor in weights(one / "final").items():
        torch.testing.assert_close(weights(two / "final")[name], tensor, atol=2e-5, rtol=0, msg=name)
    newest = sorted((two / "checkpoints").iterdir())[-1]
    states = load_file(newest / "random.safetensors")["cpu"]
    assert len(states) == 2 and not torch.equal(*states), "dropout would be the same on both"


def test_a_launchers_own_accumulation_does_not_divide_the_loss(tmp_path, monkeypatch):
    for folder in ("plain", "set"):
        (tmp_path / folder).mkdir()
    plain = tiny_run(tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    tiny_run(tmp_path / "set")
    norms = [records(tmp_path / folder / "run", "grad_norm") for folder in ("plain", "set")]
    assert norms[0] and [r["grad_norm"] for r in norms[0]] == [r["grad_norm"] for r in norms[1]]
    assert plain.after.nats > 0


def test_a_resumed_run_leaves_no_older_model_as_its_end(tmp_path, monkeypatch):
    tiny_run(tmp_path, steps=3, checkpoint_minutes=1e-9)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 5)
        tiny_run(tmp_path, resume=True, steps=8, checkpoint_minutes=1e-9)
    found = find_checkpoint(tmp_path / "run")
    assert int(found.name.removeprefix("step-")) > 3


@pytest.mark.parametrize(("given", "expected"), [(None, "adamw"), ("muon", "muon")])
def test_bytegpts_own_json_trains_with_adamw_as_the_original(given, expected, tmp_path):
    config = tmp_path / "bytegpt.json"
    config.write_text(json.dumps(BYTEGPT))
    tiny_run(tmp_path, config=str(config), optimizer=given, learning_rate=1e-2)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["optimizer"] == expected
