"""What a run is told: recipes and flags over each other, other pipelines' YAML, `--resume` and `--smoke`."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.runs import tiny_arguments, tiny_run, write_config, write_prepared, write_text, write_words
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tessera import TesseraConfig, TesseraForCausalLM, cli
from tessera.commands import pretrain as pretrain_command
from tessera.configs.recipes import recipe_names
from tessera.data.training_rows import PACKINGS
from tessera.modeling.accounting import count_costs
from tessera.training.checkpoints import find_checkpoint
from tessera.training.checkpoints.policy import CheckpointPolicy
from tessera.training.inputs import read_model_config
from tessera.training.pipeline_names import FIXED, RUN_NAMES
from tessera.training.pretrain import Run
from tessera.training.pretrain_arguments import PretrainArguments, gather_arguments, run_of
from tessera.training.smoke import LENGTH, small_config


def write_yaml(folder: Path, name: str, values: dict | str) -> str:
    path = folder / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return str(path)


def told(folder: Path, values: dict, processes: int = 1, **given) -> PretrainArguments:
    recipe = write_yaml(folder, "train.yaml", {"config": "llama-tiny", "data_file": "x", **values})
    return gather_arguments(given, recipe, processes=processes)


@pytest.fixture
def tessera(capsys):
    """Runs a command line in this process; gives its exit code and what it printed."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.run([str(argument) for argument in arguments])
        return exit.value.code or 0, *capsys.readouterr()

    return run


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in lines if "loss" in record]


# ---- one over the other ----


def test_flags_lie_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    args = told(tmp_path, {"batch_size": 4, "clip": 0.5, "floor": 0.1}, batch_size=16, seed=3)
    assert (args.batch_size, args.clip, args.floor, args.seed, args.evaluations) == (16, 0.5, 0.1, 3, 4)
    assert (args.config, args.data_file) == ("llama-tiny", "x")


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        ({"tokens": 2e9}, {"steps": 100_000}, {"tokens": None, "steps": 100_000}),
        ({"minutes": 3}, {"epochs": 1.0}, {"minutes": None, "epochs": 1.0}),
        ({"micro_batch_size": 2}, {"accumulation": 4}, {"micro_batch_size": None, "accumulation": 4}),
        ({"warmup_steps": 5}, {"warmup": 0.1}, {"warmup_steps": None, "warmup": 0.1}),
        ({"eval_steps": 5}, {"evaluations": 2}, {"eval_steps": None, "evaluations": 2}),
        ({"tokens": 2e9, "minutes": 4}, {"flops": 1e18}, {"tokens": None, "minutes": None, "flops": 1e18}),
        ({"batch_schedule": "0:4,0.5:8"}, {"batch_size": 6}, {"batch_schedule": None, "batch_size": 6}),
        ({"schedule": "wsd", "decay": 0.5}, {"schedule": "linear"}, {"decay": None, "schedule": "linear"}),
        ({"schedule": "wsd", "decay": 0.5}, {"schedule": "wsd"}, {"decay": 0.5}),
        ({"learning_rate": 1e-3, "optimizer": "adamw"}, {"optimizer": "muon"}, {"learning_rate": None}),
        ({"learning_rate": 1e-3, "optimizer": "adamw"}, {"optimizer": "adamw"}, {"learning_rate": 1e-3}),
        ({"table_decay": 0.5}, {"optimizer": "adamw"}, {"table_decay": None}),
        ({"learning_rate": 1e-3}, {"optimizer": "muon", "learning_rate": 0.1}, {"learning_rate": 0.1}),
    ],
)
def test_a_flag_takes_the_place_of_what_means_the_same_in_the_recipe(below, above, expected, tmp_path):
    args = told(tmp_path, below, **above)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"batch_sise": 4}, "no 'batch_sise' to tell a run; did you mean 'batch_size'"),
        ({"wandb_project": "x"}, "no 'wandb_project'"),
        ({"steps": "many"}, "train.yaml: steps must be a whole number, got 'many'"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"clip": True}, "clip must be a number, got True"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing must be true or false, got 1"),
        ({"schedule": "cosin"}, "schedule must be .* got 'cosin'; did you mean 'cosine'"),
        ({"compile": "yes"}, "compile must be 'auto', 'on' or 'off', got 'yes'"),
        ({"decay": 0.2}, "decay is of schedule 'wsd', not of 'cosine'"),
        ({"momentum_warmup_steps": 9}, "needs momentum_start"),
        ({"batch_schedule": ["0.5:8"]}, "batch_schedule: shares start at 0 and rise"),
        ({"batch_schedule": ["0:8", "0.5:many"]}, "'0.5:many' is not a share of the run and a size"),
        ({"batch_schedule": [32]}, "batch_schedule must be a text, or a list of texts .in quotes."),
        ({"batch_schedule": ["0:8"], "batch_size": 16}, "goes up to 8, and batch_size says 16"),
        ({"batch_schedule": ["0:8"], "optimizer_in_backward": True}, "needs steps of one size"),
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1, got 0"),
        ({"data_file": ["a", 1]}, "data_file must be a text, or a list of texts"),
        ({"packing": "first-fit"}, "packing must be 'contiguous' or 'best-fit', got 'first-fit'"),
        ({"accumulation": 2, "micro_batch_size": 2}, "both split a step; give one"),
        ({"precision": "fp8"}, "precision must be .auto., .bf16., .fp16. or .fp32., got .fp8."),
        *(
            ({name: value}, f"{name} must be a finite number")
            for name in ("minutes", "epochs", "clip")
            for value in (math.nan, math.inf)
        ),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(values, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        told(tmp_path, values)


def test_every_nth_layer_checkpointed_is_checkpointing(tmp_path):
    below = {"gradient_checkpointing_every": 3}
    args = told(tmp_path, below)
    assert args.gradient_checkpointing and args.gradient_checkpointing_every == 3
    assert not told(tmp_path, below, gradient_checkpointing=False).gradient_checkpointing


def test_a_run_needs_a_configuration_and_data(tessera, tmp_path):
    for arguments, option in ((["--data", "x"], "--config"), (["--recipe", "llama-100m"], "--data")):
        code, _, err = tessera("pretrain", *arguments)
        assert code == 2 and f"tessera: error: option '{option}' is missing" in err


def test_a_recipe_is_trained_by_the_command_and_a_runs_own_recipe_trains_the_same(tessera, tmp_path):
    recipe = {"config": write_config(tmp_path), "batch_size": 4, "sequence_length": 32, "steps": 30}
    recipe |= {"log_steps": 1, "sample_tokens": 4}
    options = ["--data", write_text(tmp_path), "--steps", "4", "--learning-rate", "0.01"]
    code, out, err = tessera(
        "pretrain",
        "--recipe",
        write_yaml(tmp_path, "r.yaml", recipe),
        *options,
        "--save-path",
        tmp_path / "a",
    )
    assert code == 0, err
    assert len(losses(tmp_path / "a")) == 4
    last = out.splitlines()[-1]
    assert last.startswith("next: ") and f"tessera sft --model {tmp_path / 'a'} " in last
    assert f"tessera eval --model {tmp_path / 'a'} --data OTHER_TEXT " in last, (
        "a score on what it was trained on"
    )
    code, _, err = tessera(
        "pretrain", "--recipe", tmp_path / "a" / "recipe.yaml", "--save-path", tmp_path / "b"
    )
    assert code == 0, err
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


def test_a_schedule_of_batches_may_be_a_mapping_a_list_or_one_text(tmp_path):
    """YAML reads a bare 0:32 as a number of base 60, and a text in quotes as it is."""
    for text in ("{0: 4, 0.5: 8}", '["0:4", "0.5:8"]', "0:4,0.5:8"):
        recipe = write_yaml(tmp_path, "r.yaml", f"config: a\ndata_file: b\nbatch_schedule: {text}\n")
        args = gather_arguments({}, recipe)
        assert (args.batch_schedule, args.batch_size) == (["0:4", "0.5:8"], 8)
    saved = write_yaml(tmp_path, "saved.yaml", dataclasses.asdict(args))
    assert gather_arguments({}, saved) == args


def test_every_argument_is_an_option_under_a_heading_and_says_what_it_is(tessera):
    code, helped, _ = tessera("pretrain", "--help")
    assert code == 0
    for one in dataclasses.fields(PretrainArguments):
        if panel := one.metadata["panel"]:
            section = helped.split(f"\n{panel}:\n")[1].split("\n\n")[0]
            assert (one.metadata["flags"] or [f"--{one.name.replace('_', '-')}"])[0] in section
            assert " ".join(one.metadata["help"].split()[:2]) in " ".join(section.split())
    known = {*PretrainArguments.__dataclass_fields__["packing"].metadata["choices"]}
    assert known == {*PACKINGS}


def test_asking_for_help_does_not_import_torch():
    statement = "import sys; from tessera.cli import app; app(['pretrain', '--help'], standalone_mode=False)"
    check = f"{statement}; sys.exit(bool({{'torch', 'numpy', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0 and "--depth" in done.stdout, done.stderr


def test_a_list_is_given_with_commas_or_by_repeating_the_flag(tessera, monkeypatch):
    told = []
    monkeypatch.setattr(pretrain_command, "gather_arguments", lambda given, *_: told.append(given) or 1 / 0)
    for flags in (["--trackers", "wandb,tensorboard"], ["--trackers", "wandb", "--trackers", "tensorboard"]):
        with pytest.raises(ZeroDivisionError):
            cli.run(["pretrain", *flags, "--tokens", "2e9", "--no-async-checkpoints"])
    expected = {"trackers": ["wandb", "tensorboard"], "tokens": 2e9, "async_checkpoints": False}
    assert told == [expected, expected]


# ---- how long, how often ----


def test_tokens_end_a_run(tmp_path):
    result = tiny_run(tmp_path, steps=None, tokens=5 * 4 * 32)
    assert result.tokens == 5 * 4 * 32


def test_warmup_steps_are_steps(tmp_path):
    run = Run(tiny_arguments(tmp_path, steps=20, warmup_steps=5, optimizer="adamw", learning_rate=1.0))
    rates = []
    step = run.optimizer.step
    run.optimizer.step = lambda *a: rates.append(run.optimizer.param_groups[0]["lr"]) or step(*a)
    run.run()
    assert rates[1:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[6] < 1


@pytest.mark.parametrize(("cheap", "last"), [(True, "step-000009"), (False, "step-000008")])
def test_steps_say_when_to_record_evaluate_and_save(cheap, last, tmp_path, monkeypatch):
    """Before an evaluation it saves too where that costs little."""
    monkeypatch.setattr(CheckpointPolicy, "is_due_before_evaluation", lambda *_: cheap)
    given = {"steps": 10, "log_steps": 2, "eval_steps": 3, "checkpoint_steps": 4}
    result = tiny_run(tmp_path, **given)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "loss" in r] == [1, 3, 5, 7, 9, 10]
    assert [r["step"] for r in lines if "val_loss" in r] == [0, 3, 6, 9, 10]
    assert [path.name for path in sorted((result.folder / "checkpoints").iterdir())] == [
        last,
        "step-000010",
    ]


@pytest.mark.parametrize(("micro", "accumulation"), [(12, 1), (8, 2), (5, 3), (4, 3), (1, 12), (100, 1)])
def test_a_micro_batch_is_at_most_what_it_is_told(micro, accumulation, tmp_path):
    run = Run(tiny_arguments(tmp_path, batch_size=12, micro_batch_size=micro))
    parts = [len(batch["input_ids"]) for batch in run.feed.micro_batches(0, run.accelerator.device)]
    assert parts == [12 // accumulation] * accumulation


def test_a_warmup_in_steps_of_a_run_in_minutes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="warmup_steps needs a length in steps"):
        tiny_run(tmp_path, steps=None, minutes=1.0, warmup_steps=3)


# ---- other pipelines' words ----


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({"lr": 3e-4, "min_lr": 3e-5}, {"learning_rate": 3e-4, "floor": pytest.approx(0.1)}),
        ({"lr": 3e-4, "min_lr_ratio": 0.2}, {"floor": 0.2, "optimizer": "adamw"}),
        ({"lr": 0.02, "optimizer": "muon"}, {"learning_rate": 0.02, "optimizer": "muon"}),
        ({"optim": "adamw_torch_fused"}, {"optimizer": "adamw"}),
        ({"max_steps": 7, "warmup_iters": 2}, {"steps": 7, "warmup_steps": 2, "epochs": None}),
        ({"max_tokens": 1e9, "warmup_ratio": 0.01}, {"tokens": 10**9, "warmup": 0.01}),
        ({"per_device_train_batch_size": 4}, {"batch_size": 8, "accumulation": 1}),
        (
            {"per_device_batch_size": 4, "gradient_accumulation_steps": 3},
            {"batch_size": 24, "accumulation": 3, "micro_batch_size": None},
        ),
        (
            {"global_batch_size": 24, "per_device_batch_size": 4},
            {"batch_size": 24, "micro_batch_size": 4, "accumulation": None},
        ),
        (
            {"global_batch_size": 24, "per_device_batch_size": 4, "grad_accum_steps": 3},
            {"batch_size": 24, "accumulation": 3},
        ),
        ({"block_size": 64, "grad_clip": 0.5}, {"sequence_length": 64, "clip": 0.5}),
        (
            {"save_every": 50, "eval_every": 20},
            {"checkpoint_steps": 50, "checkpoint_minutes": 0, "eval_steps": 20},
        ),
        ({"out_dir": "o", "data_dir": "d"}, {"save_path": "o", "data_file": "d"}),
        ({"mixed_precision": "bf16"}, {"precision": "auto"}),
        ({"mixed_precision": False}, {"precision": "fp32"}),  # YAML's `no`
        ({"bf16": True, "fp16": False, "lr_scheduler_type": "cosine"}, {"precision": "auto"}),
        ({"grad_checkpointing": True}, {"gradient_checkpointing": True}),
        ({"lr_scheduler": "linear", "report_to": "none"}, {"schedule": "linear", "trackers": []}),
        ({"lr_scheduler_type": "warmup_stable_decay", "decay_ratio": 0.1}, {"schedule": "wsd", "decay": 0.1}),
        ({"lr_scheduler_type": "constant_with_warmup"}, {"schedule": "constant"}),
        ({"decay_lr": False}, {"schedule": "constant"}),
        ({"fp16": True, "bf16": False}, {"precision": "fp16"}),
        ({"torch_compile": True, "report_to": ["wandb"]}, {"compile": "on", "trackers": ["wandb"]}),
        ({"report_to": "wandb,tensorboard"}, {"trackers": ["wandb", "tensorboard"]}),
        ({"save_total_limit": 5, "z_loss_weight": 1e-4}, {"keep_last": 5, "z_loss": 1e-4}),
        ({"target_param_data_ratio": 8}, {"tokens_per_parameter": 8, "epochs": None}),
        ({"max_flops": 1e18, "final_lr_frac": 0.05}, {"flops": 1e18, "floor": 0.05}),
        ({"lr": 1e-3, "seed": None}, {"seed": 0}),
        ({"learning_rate": 3e-4, "beta2": 0.95}, {"optimizer": "adamw", "learning_rate": 3e-4}),
    ],
    ids=lambda value: "-".join(value),
)
def test_the_words_of_other_pipelines_are_understood(theirs, expected, tmp_path):
    """On two processes."""
    if "data_dir" in theirs:
        recipe = write_yaml(tmp_path, "train.yaml", {"config": "llama-tiny", **theirs})
        args = gather_arguments({}, recipe, processes=2)
    else:
        args = told(tmp_path, theirs, processes=2)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("theirs", "sentence"),
    [
        ({"lr_scheduler": "inverse_sqrt"}, "schedule must be 'cosine', 'linear', .* got 'inverse_sqrt'"),
        ({"beta2": 0.999}, "beta2 is 0.999"),
        ({"num_workers": 4}, "num_workers is 4"),
        ({"fp16": True, "bf16": True}, "fp16 and bf16 are both on"),
        ({"fp16": "yes"}, "fp16 must be true or false, got 'yes'"),
        ({"mixed_precision": "fp8"}, "precision must be 'auto', .* got 'fp8'"),
        ({"lr": 1e-3, "learning_rate": 1e-4}, "(?=.*lr )(?=.*learning_rate ).*say the same thing"),
        ({"min_lr": 1e-5}, "min_lr needs the learning_rate"),
        (
            {"batch_size": 8, "gradient_accumulation_steps": 4},
            "say global_batch_size or per_device_batch_size",
        ),
        (
            {"global_batch_size": 10, "per_device_batch_size": 4, "grad_accum_steps": 3},
            "a batch of 10 is not 4 on a device x 3 accumulated x 1 processes",
        ),
        ({"max_steps": "1k"}, "steps must be a whole number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_done_is_refused_by_name(theirs, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        told(tmp_path, theirs)


def test_every_name_means_an_argument_and_one_alone():
    ours = set(PretrainArguments.__dataclass_fields__)
    theirs = [name for names in RUN_NAMES.values() for name in names]
    assert set(RUN_NAMES) <= ours and len(theirs) == len(set(theirs))
    assert not set(theirs) & ours and not set(FIXED) & {*theirs, *ours}


LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def test_a_llama_in_yaml_has_the_parameters_of_transformers_llama(tmp_path):
    text = yaml.safe_dump(LLAMA).replace("1.0e-05", "1e-5")
    config, is_preset = read_model_config(write_yaml(tmp_path, "model.yaml", text))
    assert not is_preset
    theirs = LlamaForCausalLM(LlamaConfig(**{key: LLAMA[key] for key in LLAMA if key != "model_type"}))
    ours = TesseraForCausalLM(config)
    assert ours.num_parameters() == theirs.num_parameters()
    assert config.rope_parameters["rope_theta"] == 5e5 and config.rms_norm_eps == 1e-5
    assert config.max_position_embeddings == 128 and config.tie_word_embeddings


def test_a_model_in_yaml_may_start_from_a_preset_or_speak_as_bytegpt(tmp_path):
    given = write_yaml(tmp_path, "a.yaml", {"preset": "nanochat-tiny", "n_layer": 2, "layer_types": "SL"})
    config = read_model_config(given)[0]
    expected = TesseraConfig.from_preset("nanochat-tiny", num_hidden_layers=2, layer_types="SL")
    assert config.to_dict() == expected.to_dict()
    config = read_model_config(write_yaml(tmp_path, "b.yaml", {"dim": 64, "n_layers": 2, "n_heads": 2}))[0]
    assert config.attention_type == "latent"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"hidden_sise": 3}, "--config .*model.yaml: .*did you mean 'hidden_size'"),
        ({"n_head": 2, "num_heads": 2}, "n_head and num_heads say the same thing"),
        ({"model_type": "gpt_neox"}, "of model type 'gpt_neox'"),
        ({"preset": "lama-tiny"}, "did you mean 'llama-tiny'"),
        ({"hidden_size": "64"}, "hidden_size"),
    ],
)
def test_a_model_in_yaml_that_cannot_be_built_is_refused(values, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence) as caught:
        read_model_config(write_yaml(tmp_path, "model.yaml", values))
    assert "\n" not in str(caught.value)


# ---- the pipeline, from one end to the other ----


@pytest.fixture
def pipeline(tmp_path, monkeypatch) -> Path:
    """A folder as of a pipeline: tokens with their tokenizer, and two YAML files."""
    words = write_words(tmp_path / "words")
    train = [2 + i % 8 for i in range(2000)]
    write_prepared(tmp_path / "tokens", train, train[:400], 2000, words)
    write_yaml(tmp_path, "model.yaml", LLAMA)
    train = {
        "data_dir": "tokens",
        "output_dir": "out",
        "seq_len": 16,
        "per_device_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "min_lr": 1e-3,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "save_steps": 4,
        "eval_steps": 4,
        "log_every": 1,
        "mixed_precision": "bf16",
        "seed": 1,
    }
    write_yaml(tmp_path, "train.yaml", train)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FLAGS = ["--model_config", "model.yaml", "--train_config", "train.yaml"]


@pytest.mark.distributed
def test_a_pipelines_command_trains_and_resumes(pipeline):
    def launch(*more: str) -> str:
        command = "-m accelerate.commands.launch --cpu --num_processes 1 -m tessera.training.pretrain".split()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command, *FLAGS, *more], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "model: out/final" in launch()
    model = AutoModelForCausalLM.from_pretrained("out/final")
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (3, 300)
    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
    assert (recipe["batch_size"], recipe["accumulation"], recipe["optimizer"]) == (4, 2, "adamw")
    assert "resuming from out/checkpoints/step-000008" in launch("--resume")


def steps(folder: str) -> list[int]:
    lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in lines if "loss" in record]


def test_a_smoke_run_of_a_large_model_is_narrow_on_a_cpu_and_keeps_its_kinds_of_layers():
    config = TesseraConfig.from_preset("nanochat-d20", vocab_size=256)
    assert small_config(config).hidden_size == 1280
    small = small_config(config, cpu=True)
    assert count_costs(small).parameters < 10**6
    assert small.layer_types == ["sliding_attention", "full_attention"]
    middle = TesseraConfig.from_preset("bytegpt")
    assert small_config(middle, cpu=True).hidden_size == middle.hidden_size


def test_a_smoke_run_is_small_ends_soon_and_makes_room_for_the_next(pipeline, tessera):
    code, out, err = tessera("pretrain", *FLAGS, "--smoke", "--config", "nanochat-d4", "--tokens", "1e9")
    assert code == 0, err
    assert "smoke run: a few small steps" in out and "5 steps of 2 x 16 tokens" in out
    assert "next:" not in out and not Path("out").exists()
    assert find_checkpoint("out-smoke").name == "final"
    config = TesseraConfig.from_pretrained("out-smoke/final")
    assert (config.num_hidden_layers, config.hidden_size) == (2, 256)
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert sorted(path.name for path in Path("out-smoke/checkpoints").iterdir()) == [
        "step-000003",
        "step-000005",
    ]
    first = losses(Path("out-smoke"))
    code, out, err = tessera("pretrain", *FLAGS, "--smoke", "--config", "nanochat-d4")
    assert code == 0 and losses(Path("out-smoke")) == first
    code, out, err = tessera("pretrain", *FLAGS, "--smoke", "--config", "nanochat-d4", "--resume")
    assert code == 0, err
    assert "resuming from out-smoke/checkpoints/step-000005" in out and steps("out-smoke")[-1] == 10
    Path("other-smoke").mkdir()
    Path("other-smoke/mine.txt").touch()
    code, _, err = tessera("pretrain", *FLAGS, "--smoke", "--save-path", "other")
    assert code == 2 and "other-smoke already holds files" in err and Path("other-smoke/mine.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_trains_in_small(name, tessera, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = tessera("pretrain", "--recipe", name, "--data", write_text(tmp_path), "--smoke")
    assert code == 0, err
    assert f"5 steps of 2 x {LENGTH} tokens" in out
    assert find_checkpoint("runs/pretrain-smoke").name == "final"
    assert all(map(math.isfinite, losses(Path("runs/pretrain-smoke"))))


@pytest.mark.parametrize(
    ("path", "run"),
    [
        ("a/out", "a/out"),
        ("a/out/checkpoints/step-1", "a/out"),
        ("/a/checkpoints/step-1/", "/a"),
        ("step-1", ".."),
    ],
)
def test_a_checkpoint_belongs_to_the_run_above_it(path, run, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path / "checkpoints")
    assert run_of(path) == Path(run)


def test_a_path_to_resume_from_is_a_run_or_a_checkpoint(pipeline, tessera):
    assert tessera("pretrain", *FLAGS)[0] == 0
    whole = losses(Path("out"))
    assert len(whole) == 8

    # The run by its path alone: it knows what it was told.
    code, out, err = tessera("pretrain", "--resume", "out", "--steps", "10")
    assert code == 0, err
    assert "resuming from out/checkpoints/step-000008" in out and steps("out") == list(range(1, 11))
    # Wherever it is now.
    shutil.copytree("out", "moved")
    code, out, err = tessera("pretrain", "--resume", "moved", "--steps", "11")
    assert code == 0, err
    assert "model: moved/final" in out and steps("moved")[-1] == 11 and steps("out")[-1] == 10
    # An older checkpoint, into another directory.
    older = "out/checkpoints/step-000008"
    code, out, err = tessera("pretrain", *FLAGS, "--resume", older, "--steps", "9", "--save-path", "fork")
    assert code == 0, err
    assert f"resuming from {older}" in out and steps("fork") == [9]
    code, _, err = tessera("pretrain", *FLAGS, "--resume", older, "--save-path", "fork")
    assert code == 2 and "fork already holds files" in err and steps("fork") == [9]
    assert steps("out") == list(range(1, 11))
    # A checkpoint by its path alone means its run.
    code, out, err = tessera("pretrain", "--resume", older, "--steps", "9")
    assert code == 0, err
    assert steps("out") == list(range(1, 10))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([*FLAGS, "--resume"], "out has no checkpoint to resume from"),
        ([*FLAGS, "--resume", "none"], "none has no checkpoint to resume from"),
        (
            [*FLAGS, "--resume", "x/checkpoints/step-000001"],
            "cannot be resumed from: no readable manifest.json",
        ),
        ([*FLAGS, "stray"], "'stray' belongs to no option"),
        (["--resume", "none"], "option '--config' is missing"),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_one_line(arguments, sentence, pipeline, tessera):
    code, _, err = tessera("pretrain", *arguments)
    assert code == 2 and sentence in err and err.count("\n") == 1
    assert not Path("out").exists() and not Path("none").exists()
