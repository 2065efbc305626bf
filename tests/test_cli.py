"""The `tessera` command as a user types it: what it prints, how it fails, what it leaves alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.runs import BYTEGPT, without_torchao, write_config, write_text
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from tessera import TesseraConfig, TesseraForCausalLM, __version__, build_byte_tokenizer, cli
from tessera.configs.presets import preset_names
from tessera.training.guards import OutOfRows

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def tessera(capsys):
    """Runs a command line in this process; gives its exit code and what it printed."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err

    yield run
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


def in_new_process(*arguments, stdin: str = "", **given) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, env=ENVIRONMENT, encoding="utf-8", **given
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def model(tmp_path) -> Path:
    """A model directory."""
    config = TesseraConfig.from_pretrained(write_config(tmp_path))
    TesseraForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ---- the command itself ----


def test_version(tessera):
    assert tessera("--version") == (0, f"tessera {__version__}\n", "")


def test_help_names_every_command(tessera):
    code, helped, _ = tessera("--help")
    assert code == 0
    assert all(f"\n  {name} " in helped for name in ("pretrain", "generate", "presets", "demo"))
    _, out, err = tessera()
    assert (out + err).strip() == helped.strip(), "no arguments show the help"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pretain"], "No such command 'pretain'. Did you mean 'pretrain'?"),
        (["generate", "--ckpt-path", "x", "--promt", "y"], "No such option: --promt"),
        (["pretrain", "--config", "llama-tiny"], "option '--data' is missing"),
        (["generate", "--ckpt-path", "x", "--temperature", "hot"], "Invalid value for '--temperature'"),
    ],
)
def test_what_is_mistyped_is_named(arguments, sentence, tessera):
    code, out, err = tessera(*arguments)
    assert (code, out) == (2, "")
    assert sentence in err and "Traceback" not in err


def test_presets_lists_all_with_their_numbers(tessera):
    code, out, _ = tessera("presets")
    assert code == 0
    header, *rows = out.split("\n\n")[0].splitlines()
    assert header.split()[:4] == ["preset", "parameters", "active", "embedding"]
    listed = {row.split()[0]: row.split()[1:] for row in rows}
    assert set(listed) == set(preset_names())
    assert all(len(numbers) == 6 and all(n[0].isdigit() for n in numbers) for numbers in listed.values())
    assert listed["gpt2-124m"][0] == "124M"
    active, total = (float(listed["bytegpt"][i].removesuffix("M")) for i in (1, 0))
    assert active < total


def best_seconds(*arguments: str) -> float:
    def once() -> float:
        started = time.perf_counter()
        assert in_new_process(*arguments).returncode == 0
        return time.perf_counter() - started

    return min(once() for _ in range(3))


def test_importing_and_asking_for_help_cost_next_to_nothing():
    python, transformers = best_seconds("-c", ""), best_seconds("-c", "import transformers")
    assert best_seconds("-m", "tessera", "--help") <= transformers + 0.3
    assert best_seconds("-c", "import tessera") <= python + 0.3


@pytest.mark.parametrize("statement", ["import tessera", "import tessera.cli"])
def test_importing_does_not_import_torch(statement):
    done = in_new_process("-c", f"import sys; {statement}; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_trainers_module_is_the_command_for_accelerate_launch():
    done = in_new_process(
        "-m", "accelerate.commands.launch", "--cpu", "-m", "tessera.training.pretrain", "--help"
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: tessera pretrain" in done.stdout


# ---- mistakes ----


def damaged(model: Path, damage: str) -> Path:
    file = model / "model.safetensors"
    weights = load_file(file)
    if damage == "missing":
        del weights["model.norm.weight"]
    elif damage == "extra":
        weights["model.layers.9.surplus"] = weights["model.norm.weight"].clone()
    elif damage == "misshapen":
        weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, file, metadata={"format": "pt"})
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    return model


DAMAGE = {
    "missing": "1 missing (model.norm.weight)",
    "extra": "1 unexpected (model.layers.9.surplus)",
    "misshapen": "1 misshapen (model.norm.weight)",
    "cut short": "cannot be read",
}


def assert_refused(result, sentence: str) -> None:
    code, out, err = result
    assert code == 2
    assert err.startswith("tessera: error: ") and err.count("\n") == 1, err
    assert sentence in err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"--config": "lama-tiny"}, "llama-tiny"),
        ({"--config": "config.json:{"}, "is not JSON"),
        ({"--config": 'config.json:{"hidden_sise": 64}'}, "did you mean 'hidden_size'?"),
        ({"--config": 'config.json:{"hidden_size": "wide"}'}, "hidden_size"),
        ({"--config": 'config.json:{"num_attention_heads": 7}'}, "num_attention_heads"),
        ({"--config": 'config.json:{"dim": 64, "n_layer": 2}'}, "did you mean 'n_layers'?"),
        ({"--config": 'config.json:{"model_type": "llama"}'}, "of model type 'llama'"),
        ({"--data-file": "missing.txt"}, "there is no file or folder"),
        ({"--data-file": "empty.txt:"}, "is empty"),
        ({"--data-file": "short.txt:" + "x" * 60}, "a window of 64 needs 65"),
        ({"--tokenizer": "no/such/folder"}, "tokenizer no/such/folder cannot be loaded"),
        ({"--optimizer": "sgd"}, "'muon', 'adamw' or 'adamw-8bit'"),
        ({"--batch-size": "0"}, "batch_size must be at least 1, got 0"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value.values())[:40],
)
def test_pretraining_refuses_in_one_line_and_writes_nothing(given, sentence, tessera, tmp_path, monkeypatch):
    """A value `name:content` is a file of that content."""
    monkeypatch.chdir(tmp_path)
    options = {"--config": "llama-tiny", "--data-file": write_text(tmp_path), "--sequence-length": "64"}
    for option, value in given.items():
        name, written, content = value.partition(":")
        if written:
            Path(name).write_text(content)
        options[option] = name
    before = snapshot(tmp_path)
    flags = [part for pair in options.items() for part in pair]
    assert_refused(tessera("pretrain", "--save-path", "run", *flags), sentence)
    assert snapshot(tmp_path) == before
    assert not Path("run").exists()


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["generate", "pretrain"])
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(command, damage, tessera, model, tmp_path):
    before = snapshot(damaged(model, damage))
    options = ["--prompt", "hi"]
    if command == "pretrain":
        options = ["--config", model, "--data-file", write_text(tmp_path), "--save-path", tmp_path / "run"]
    assert_refused(tessera(command, "--ckpt-path", model, *options), DAMAGE[damage])
    assert snapshot(model) == before
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_does_not_fit_is_refused_in_one_line(tessera, tmp_path):
    build_byte_tokenizer(eos_token="<|end|>").save_pretrained(tmp_path / "bytes")
    config = write_config(tmp_path)
    options = ["--config", config, "--data-file", write_text(tmp_path), "--save-path", tmp_path / "run"]
    result = tessera("pretrain", "--tokenizer", tmp_path / "bytes", *options)
    assert_refused(result, "has 257 tokens, the model's vocabulary only 256")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give --prompt, --input-file or --interactive"),
        (["--prompt", ""], "a prompt is empty"),
        (["--prompt", "x" * 500], "more than the model's context of 512"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be 0 or more, got -1"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--prompt", "x", "--config", "verse-tiny"], "does not fit the model"),
        (["--input-file", "missing.txt"], "there is no file missing.txt"),
        (["--input-file", "blank.txt"], "holds no prompts"),
    ],
)
def test_generating_refuses_in_one_line(arguments, sentence, tessera, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("blank.txt").write_text("\n  \n")
    assert_refused(tessera("generate", "--ckpt-path", model, *arguments), sentence)


def test_generating_from_nowhere_is_refused_in_one_line(tessera, tmp_path):
    result = tessera("generate", "--ckpt-path", tmp_path / "none", "--prompt", "x")
    assert_refused(result, "there is no checkpoint")


def test_a_run_that_is_there_is_refused_and_left_alone(tessera, model, tmp_path):
    before = snapshot(model)
    options = ["--config", "llama-tiny", "--data-file", write_text(tmp_path), "--steps", "1"]
    assert_refused(
        tessera("pretrain", *options, "--save-path", model), "already holds files; resume that run"
    )
    assert snapshot(model) == before


def test_a_place_that_cannot_be_written_is_refused_in_one_line(tessera, tmp_path):
    (tmp_path / "file").write_text("mine")
    options = ["--config", "llama-tiny", "--data-file", write_text(tmp_path), "--steps", "1"]
    assert_refused(
        tessera("pretrain", *options, "--save-path", tmp_path / "file" / "run"), str(tmp_path / "file")
    )
    assert (tmp_path / "file").read_text() == "mine"


# ---- from one end to the other ----


@pytest.mark.distributed
def test_bytegpts_commands_train_and_generate(tmp_path):
    (tmp_path / "bytegpt.json").write_text(json.dumps(BYTEGPT))
    (tmp_path / "prompts.txt").write_text("the quick\nlazy\n\ndog é\n", encoding="utf-8")
    write_text(tmp_path, name="data.txt")
    train = "--ckpt-path weights --config bytegpt.json --data-file data.txt --epochs 1 --batch-size 4"
    train += " --learning-rate 0.01 --save-path out/model.safetensors"
    done = in_new_process("-m", "tessera", "pretrain", *train.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no checkpoint in weights yet" in done.stdout
    assert "Traceback" not in done.stderr and "Writing" not in done.stderr, done.stderr
    assert "\r" not in done.stderr, "a bar that moves, in what is not a terminal"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) > 50_000

    generate = "-m tessera generate --config bytegpt.json --max-new-tokens 8 --temperature 0.2".split()
    for path in ("out", "out/model", "out/model.safetensors"):
        options = ["--ckpt-path", path, "--input-file", "prompts.txt"]
        done = in_new_process(*generate, *options, cwd=tmp_path)
        assert (done.returncode, without_torchao(done.stderr)) == (0, "")
        prompts = [line for line in done.stdout.splitlines() if line.startswith("Prompt: ")]
        assert prompts == ["Prompt: the quick", "Prompt: lazy", "Prompt: dog é"]
        assert done.stdout.count("Completion: ") == 3

    typed = "the quick\n/clear\nlazy\n/exit\nnever read\n"
    done = in_new_process(*generate, "--ckpt-path", "out", "--interactive", stdin=typed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(">>> ") == 4
    assert without_torchao(done.stderr).count("\n") == 1 and "/exit leaves" in done.stderr


def test_a_trained_run_is_generated_from_and_a_seed_repeats_itself(tessera, tmp_path):
    run = tmp_path / "run"
    options = ["--config", "llama-tiny", "--data-file", write_text(tmp_path), "--steps", "3"]
    options += ["--sequence-length", "32", "--batch-size", "4", "--sample-prompt", "the "]
    code, out, err = tessera("pretrain", *options, "--save-path", run)
    assert code == 0
    assert f"model: {run / 'final'}" in out and "sample:\nthe " in out
    said = [
        tessera("generate", "--ckpt-path", run, "--prompt", "the ", "--temperature", "1", "--seed", seed)
        for seed in ("1", "1", "2")
    ]
    assert said[0] == said[1] != said[2]
    assert said[0][0] == 0 and said[0][1].startswith("Prompt: the \nCompletion: ")
    code, out, _ = tessera("pretrain", *options, "--save-path", run, "--resume", "--steps", "4")
    assert code == 0 and "resuming from" in out


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_leaves_a_checkpoint_and_one_sentence(tmp_path):
    run = tmp_path / "run"
    options = ["--config", write_config(tmp_path), "--data-file", write_text(tmp_path), "--minutes", "1"]
    options += ["--sequence-length", "32", "--batch-size", "2", "--save-path", str(run)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tessera", "pretrain", *options],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = run / "metrics.jsonl"
    for _ in range(600):
        if metrics.is_file() and '"loss"' in metrics.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with --resume" in out and "Traceback" not in err
    assert len(list((run / "checkpoints").glob("step-*/manifest.json"))) == 1


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OutOfRows("one row does not fit"), "tessera: error: one row does not fit"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), "tessera: error: memory is not enough; take a"),
        (torch.OutOfMemoryError("CUDA out of memory"), "tessera: error: memory is not enough; take a"),
    ],
)
def test_memory_that_runs_out_is_a_sentence(error, sentence, monkeypatch, capsys):
    def run_out(*_, **__):
        raise error

    monkeypatch.setattr(cli, "app", run_out)
    with pytest.raises(SystemExit) as exit:
        cli.run([])
    assert exit.value.code == 2 and capsys.readouterr().err.startswith(sentence)
