"""The recipes that come with the package, and what `--recipe` may be."""

import pytest
import torch

from tessera import TesseraConfig, TesseraForCausalLM, cli
from tessera.configs.presets import preset_names
from tessera.configs.recipes import read_recipe, read_yaml, recipe_names
from tessera.training.pretrain_arguments import gather_arguments
from tessera.training.scaling import measure, muon_rates, scale_arguments

RECIPES = recipe_names()


def test_every_dialect_has_a_recipe():
    assert {*RECIPES} >= {"bytegpt", "bytes-shakespeare", "gpt2-124m", "llama-100m", "nanochat-speedrun"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_validates_and_its_model_builds(name):
    args = gather_arguments({"data_file": "x"}, name)
    assert not {"data_file", "save_path", "tokenizer"} & read_recipe(name).keys()
    assert args.config in preset_names() and args.optimizer in ("muon", "adamw")
    config = TesseraConfig.from_preset(args.config, depth=args.depth)
    assert args.sequence_length <= config.max_position_embeddings
    with torch.device("meta"):
        model = TesseraForCausalLM(config)
    if args.minutes is None:
        args = scale_arguments(args, config, args.sequence_length)
        multiplied = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        batch = args.batch_size * args.sequence_length
        tokens = args.tokens or args.steps * batch
        assert 8 * multiplied < tokens < 40 * model.num_parameters()
        assert 2**18 <= batch <= 2**19
        assert args.warmup_steps < 0.1 * tokens / batch
        # On 1, 2, 4 or 8 GPUs alike.
        assert all(args.batch_size % (args.micro_batch_size * count) == 0 for count in (1, 2, 4, 8))


def test_a_recipe_at_another_depth_is_another_model_with_its_own_batch():
    shallow, deep = (gather_arguments({"data_file": "x", "depth": d}, "nanochat-speedrun") for d in (8, 20))
    for args, batch in ((shallow, 2**18), (deep, 2**20)):
        config = TesseraConfig.from_preset(args.config, depth=args.depth)
        assert scale_arguments(args, config, 2048).batch_size * 2048 == batch


def test_what_the_recipes_of_muon_say_is_what_its_rule_says():
    """To the two digits that they are written with."""
    for name in ("llama-100m", "bytegpt"):
        args = gather_arguments({"data_file": "x"}, name)
        sizes = measure(TesseraConfig.from_preset(args.config))
        rates = muon_rates(sizes, args.tokens, batch=args.batch_size * args.sequence_length)
        assert args.learning_rate == pytest.approx(rates.learning_rate, rel=0.02)
        assert args.weight_decay == pytest.approx(rates.weight_decay, rel=0.05)


def test_presets_lists_the_recipes(capsys):
    with pytest.raises(SystemExit):
        cli.run(["presets"])
    tables = capsys.readouterr().out.split("\n\n")
    header, *rows = next(table for table in tables if table.startswith("recipe")).splitlines()
    assert header.split() == ["recipe", "preset", "optimizer", "tokens/step", "window", "length"]
    assert [row.split()[0] for row in rows] == RECIPES
    listed = next(row.split() for row in rows if row.startswith("llama-100m"))
    assert listed == ["llama-100m", "llama-100m", "muon", "524k", "2048", "2.2B", "tokens"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1e9", 1e9), ("-2.5E+3", -2500.0), (".5e1", 5.0), ("2e", "2e"), ("e3", "e3"), ("7", 7)],
)
def test_numbers_with_an_exponent_are_numbers(text, value, tmp_path):
    (tmp_path / "x.yaml").write_text(f"x: {text}\n")
    assert read_yaml(tmp_path / "x.yaml") == {"x": value}


def test_a_recipe_is_found_by_name_by_file_and_by_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("config: llama-tiny\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("config: gpt2-tiny\n")
    (tmp_path / "llama-100m").mkdir()  # holds no recipe: the name means the package's
    assert read_recipe("mine.yaml") == {"config": "llama-tiny"}
    assert read_recipe("run") == {"config": "gpt2-tiny"}
    assert read_recipe("llama-100m")["config"] == "llama-100m"


@pytest.mark.parametrize(
    ("given", "content", "sentence"),
    [
        ("llama-100", None, "no recipe 'llama-100'; did you mean 'llama-100m'"),
        ("a\0b", None, "no recipe"),
        ("none.yaml", None, "there is no file none.yaml"),
        ("x.yaml", "", "recipe x.yaml is empty"),
        ("x.yaml", "# steps: 100\n", "recipe x.yaml is empty"),
        ("x.yaml", "null", "recipe x.yaml is empty"),
        ("x.yaml", "a: [1", "x.yaml is not YAML"),
        ("x.yaml", "- 1\n- 2", "x.yaml must hold keys and values"),
        ("x.yaml", "1: 2", "x.yaml must hold keys and values"),
        ("x.yaml", b"\xff\xfe\x00", "x.yaml is not YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(given, content, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / given).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=sentence):
        read_recipe(given)
