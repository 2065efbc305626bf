"""The dial: sizes, length, batch, rates and weight decay from a depth."""

import dataclasses
import math
from pathlib import Path

import pytest
import yaml
from helpers.models import tiny_config
from helpers.runs import tiny_arguments, write_text

from tessera import TesseraConfig, TesseraForCausalLM, cli
from tessera.configs.presets import preset_names, scale_to_depth
from tessera.modeling.accounting import count_costs
from tessera.training.inputs import read_model_config
from tessera.training.optimizers import build_optimizer
from tessera.training.pretrain import Run
from tessera.training.pretrain_arguments import PretrainArguments, gather_arguments
from tessera.training.scaling import (
    MOST_ADAMW_RATE,
    adamw_rates,
    flops_per_token,
    measure,
    muon_rates,
    scale_arguments,
    table_scale,
)

# depth, tokens a parameter -> parameters of layers and head, tokens, batch, steps, factor on rates, weight
# decay: as nanochat's own base_train.py computes them for a vocabulary of 32,768 (July 2026).
NANOCHAT = {
    (4, 12): (11_534_384, 138_412_608, 262_144, 528, 0.7071067811865476, 1.889903129391785),
    (8, 8): (41_943_232, 335_545_856, 262_144, 1_280, 0.7071067811865476, 0.5197231443014819),
    (12, 12): (110_100_912, 1_321_210_944, 524_288, 2_520, 1.0, 0.28),
    (16, 12): (234_881_792, 2_818_581_504, 524_288, 5_376, 1.0, 0.13125008583040784),
    (20, 12): (435_160_240, 5_221_922_880, 1_048_576, 4_980, 1.4142135623730951, 0.10018777642556008),
    (24, 8): (729_810_624, 5_838_484_992, 1_048_576, 5_568, 1.4142135623730951, 0.05973842446340308),
    (26, 12): (918_423_532, 11_021_082_384, 1_048_576, 10_510, 1.4142135623730951, 0.04747018702740847),
}


def told(**given) -> PretrainArguments:
    return PretrainArguments(**{"config": "x", "data_file": "x", "optimizer": "muon", **given})


@pytest.mark.parametrize(("depth", "ratio"), NANOCHAT)
def test_a_depth_trains_as_nanochat_does(depth, ratio):
    """But for 26 + 2 * depth numbers in smear, backout and scalars, which are counted here."""
    parameters, tokens, batch, steps, factor, decay = NANOCHAT[depth, ratio]
    config = TesseraConfig.from_preset("nanochat-d12", depth=depth)
    assert measure(config).parameters == parameters + 26 + 2 * depth
    given = {} if ratio == 12 else {"tokens_per_parameter": ratio}
    args = scale_arguments(told(depth=depth, **given), config, 2048, processes=8)
    assert args.tokens == pytest.approx(tokens, rel=1e-5)
    assert args.batch_size * 2048 == batch and args.tokens // batch == steps
    assert args.learning_rate == pytest.approx(0.02 * factor)
    assert args.weight_decay == pytest.approx(decay, rel=1e-5)
    chosen = {"batch_size", "learning_rate", "tokens", "tokens_per_parameter", "weight_decay"}
    assert {*args.chosen} == chosen - given.keys()


def test_what_is_given_stays_and_the_rest_follows_it():
    config = TesseraConfig.from_preset("nanochat-d12", depth=8)
    free = scale_arguments(told(depth=8), config, 2048)
    given = {"batch_size": 32, "learning_rate": 0.5, "weight_decay": 0.0, "tokens": 10**9}
    for name, value in given.items():
        args = scale_arguments(told(depth=8, **{name: value}), config, 2048)
        assert getattr(args, name) == value and name not in args.chosen
    small = scale_arguments(told(depth=8, batch_size=32), config, 2048)
    assert small.learning_rate == pytest.approx(free.learning_rate / 2), "a quarter of the batch of 128"
    longer = scale_arguments(told(depth=8, tokens=8 * free.tokens), config, 2048)
    # 2^18.5 tokens round down to 2^18, 8^0.383 times as many up to 2^20.
    assert longer.batch_size == 4 * free.batch_size
    assert longer.weight_decay == pytest.approx(free.weight_decay * math.sqrt(4) / 8, rel=1e-6)
    assert scale_arguments(told(), config, 2048) == told(), "no depth, no rule"
    assert scale_arguments(told(depth=8), config, 2048, processes=3).batch_size == 129


def test_a_handful_of_steps_forgets_a_twentieth_in_each_at_most():
    config = TesseraConfig.from_preset("bytes-demo", depth=2)
    args = scale_arguments(told(depth=2, steps=12, batch_size=4), config, 128)
    assert args.learning_rate * args.weight_decay == pytest.approx(0.05)


def test_operations_and_tokens_a_parameter_are_lengths_without_a_depth_too():
    config = TesseraConfig.from_preset("llama-100m")
    costs = count_costs(config)
    assert flops_per_token(config, config.max_position_embeddings) == costs.training_flops
    assert flops_per_token(config, 128) < costs.training_flops
    args = scale_arguments(told(flops=1e18), config, 2048)
    assert args.tokens == int(1e18 / costs.training_flops) and args.batch_size == 8
    multiplied = costs.parameters - costs.embedding
    both = scale_arguments(told(flops=1e18, tokens_per_parameter=0.5), config, 2048)
    assert both.tokens == int(0.5 * multiplied) and both.chosen == ["tokens"]
    tied = TesseraConfig.from_preset("gpt2-124m")
    tables = (50257 + 1024) * 768
    assert measure(tied).parameters == 124_439_808 - tables + 50257 * 768


def test_adamw_follows_the_step_law():
    """A billion parameters on a hundred billion tokens, by the formulas as printed in the paper."""
    sizes = dataclasses.replace(measure(tiny_config("llama-tiny")), layers=10**9)
    best = 0.58 * math.exp(0.571 * math.log(1e11))
    rate = 1.79 * math.exp(0.307 * math.log(1e11) - 0.713 * math.log(1e9))
    found = adamw_rates(sizes, 1e11)
    assert found.batch_tokens == 2**20 and 2**20 / math.sqrt(2) < best < 2**20 * math.sqrt(2)
    assert found.learning_rate == pytest.approx(rate * math.sqrt(2**20 / best))
    assert adamw_rates(sizes, 1e11, best).learning_rate == pytest.approx(rate)
    assert found.weight_decay == 0.1
    assert adamw_rates(dataclasses.replace(sizes, layers=1000), 1e9).learning_rate == MOST_ADAMW_RATE
    args = scale_arguments(told(depth=12, optimizer="adamw"), TesseraConfig.from_preset("llama-100m"), 2048)
    assert args.tokens_per_parameter == 20


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_dial_that_its_own_depth_leaves_alone(name):
    config = TesseraConfig.from_preset(name)
    depth = config.num_hidden_layers
    assert TesseraConfig.from_preset(name, depth=depth).to_dict() == config.to_dict()
    depths = sorted({2, 3, 5, depth, 2 * depth})
    sizes = [measure(TesseraConfig.from_preset(name, depth=layers)) for layers in depths]
    parameters = [one.layers for one in sizes]
    assert parameters == sorted(parameters) and parameters[-1] > 2 * parameters[-2]
    batches = [muon_rates(one, 12 * one.parameters).batch_tokens for one in sizes]
    assert batches == sorted(batches)
    rates = [adamw_rates(one, 20 * one.parameters).learning_rate for one in sizes]
    assert rates == sorted(rates, reverse=True)


def test_tables_learn_with_a_root_of_the_width_beside_a_depth():
    config = tiny_config("nanochat-tiny")
    model, rates = TesseraForCausalLM(config), {}
    for depth in (None, config.num_hidden_layers):
        optimizer = build_optimizer(model, table_scale=table_scale(told(depth=depth), config))
        rates[depth] = {group["name"]: group["lr"] for group in optimizer.param_groups}
    factor = (config.hidden_size / 768) ** -0.5
    for name, rate in rates[None].items():
        scaled = name in ("embeddings", "value embeddings", "head")
        assert rates[config.num_hidden_layers][name] == pytest.approx(rate * (factor if scaled else 1))
    assert table_scale(told(depth=3), tiny_config("llama-tiny")) == 1
    assert table_scale(told(depth=12), TesseraConfig.from_preset("nanochat-d12")) == 1


def test_latent_attention_and_experts_keep_their_proportions():
    config, base = TesseraConfig.from_preset("bytegpt", depth=24), TesseraConfig.from_preset("bytegpt")
    assert (config.hidden_size, config.num_attention_heads, config.kv_lora_rank) == (1024, 16, 256)
    assert (config.intermediate_size, config.moe_intermediate_size) == (4096, 1024)
    same = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "num_experts_per_tok")
    assert all(getattr(config, name) == getattr(base, name) for name in same)
    assert config.mlp_layer_types == ["dense", "sparse"] * 12
    odd = TesseraConfig.from_preset("verse-mini", depth=7)
    assert (odd.num_attention_heads, odd.num_key_value_heads, odd.hidden_size) == (9, 3, 576)


def test_a_file_with_its_layers_listed_has_the_dial_of_its_preset(tmp_path):
    TesseraConfig.from_preset("nanochat-d12").save_pretrained(tmp_path)
    config, is_preset = read_model_config(str(tmp_path / "config.json"), depth=6)
    assert not is_preset
    expected = TesseraConfig.from_preset("nanochat-d12", depth=6, auto_map=config.auto_map)
    assert config.to_dict() == expected.to_dict()
    values = TesseraConfig.from_preset("nanochat-d12").to_dict()
    values["layer_types"] = ["full_attention", *["sliding_attention"] * 10, "full_attention"]
    with pytest.raises(ValueError, match="layer_types that repeat a pattern"):
        scale_to_depth(values, 6)


def test_a_run_at_a_depth_is_told_and_keeps_what_was_chosen(tmp_path, capsys):
    given = {"config": "nanochat-tiny", "depth": 2, "steps": None, "batch_size": None, "sequence_length": 32}
    run = Run(tiny_arguments(tmp_path, **given, tokens=4000))
    rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
    assert rates["embeddings"] / rates["matrices"] == pytest.approx(15 * math.sqrt(768 / 48))
    run.run()
    assert "chosen by rule: batch_size " in capsys.readouterr().out
    saved = yaml.safe_load(Path(tmp_path, "run", "recipe.yaml").read_text())
    assert saved["depth"] == run.model.config.num_hidden_layers == 2
    assert saved["batch_size"] == run.args.batch_size and saved["weight_decay"] == run.args.weight_decay
    own = gather_arguments({}, str(tmp_path / "run"))
    assert own == run.args
    deeper = gather_arguments({"depth": 3}, str(tmp_path / "run"))
    assert (deeper.batch_size, deeper.learning_rate, deeper.tokens) == (None, None, 4000)
    longer = gather_arguments({"tokens": 8000}, str(tmp_path / "run"))
    assert longer.batch_size == run.args.batch_size, "a run that goes on keeps its batch"


def dry_run(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as exit:
        cli.run(["pretrain", "--dry-run", *map(str, arguments)])
    assert not exit.value.code
    return capsys.readouterr().out


def test_a_dry_run_says_what_a_run_would_be_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = dry_run(capsys, "--config", "nanochat-d12", "--depth", 12, "--sequence-length", 2048)
    assert "286,261,730 parameters, 110,100,962 of them" in out
    assert "2,520 steps of 256 x 2048 = 524,288 tokens: 1,321,211,544 tokens, 12 a parameter" in out
    assert "muon, learning rate 0.02, weight decay 0.28; cosine" in out
    assert "chosen by rule: batch_size 256, learning_rate 0.02" in out
    text = write_text(tmp_path)
    out = dry_run(capsys, "--config", "llama-tiny", "--data", text, "--epochs", 2, "--sequence-length", 32)
    steps = Run(tiny_arguments(tmp_path, config="llama-tiny", steps=None, epochs=2, batch_size=8)).total_steps
    assert f"{steps} steps of 8 x 32 = 256 tokens" in out and "chosen" not in out
    assert "1 epoch of the data" in dry_run(capsys, "--config", "llama-tiny")
    out = dry_run(capsys, "--config", "llama-tiny", "--steps", 8, "--batch-schedule", "0:2,0.5:6")
    assert "8 steps of up to 6 x 512 = 3,072 tokens (0:2, 0.5:6): 16,384 tokens" in out
    assert "a step: 1 x 6 rows" in out and "learning rate 0.02" in out
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--batch-size 2 --accumulation 3", "batch_size 2 is less than a row for each micro-batch"),
        ("--batch-schedule 0:2,0.5:4 --minutes 1", "batch_schedule and length_schedule need a length in"),
        ("--length-schedule 0:3,0.5:64 --steps 4", "windows of 3 do not divide rows of 64"),
        ("--warmup-steps 4 --minutes 1", "warmup_steps needs a length in steps"),
        ("--sequence-length 9999", "longer than the model's context of 512"),
        ("--tensor-parallel 2", "does not divide the 1 process"),
        (
            "--optimizer adamw --table-decay 0.1",
            "table_decay is of the tables beside muon; optimizer 'a",
        ),
        ("--optimizer-in-backward --accumulation 2", "accumulation 2 adds up several"),
    ],
)
def test_a_dry_run_without_data_refuses_what_the_run_would(flags, sentence, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.run(["pretrain", "--dry-run", "--config", "llama-tiny", *flags.split()])
    assert exit.value.code == 2 and sentence in capsys.readouterr().err
