"""The README.md of a published model: what it is, how to load it, how it was trained, how good it is.

What belongs here: from a configuration and the files of a run to the page. Only what the files say is on it.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from tessera.data.hashing import file_sha256
from tessera.modeling.accounting import count_costs
from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import read_json

from .families import architecture

# Of a recipe: where data and starting weights come from, and what says nothing of the result.
_DATA = ("data_file", "data", "dataset")
_STARTS = ("model", "ckpt_path")
_LOCAL = ("save_path", "eval_data", "sample_prompt", "sample_tokens", "tokenizer", "resume")


def write_model_card(
    folder: Path,
    repo_id: str,
    config: TesseraConfig,
    model_type: str,
    *,
    run: Path | None = None,
    license: str | None = None,
    on_hub: Callable[[str, str], bool] = lambda name, kind: False,
) -> None:
    """Writes `README.md`.

    Args:
        folder: of the release, with its weights, and its tokenizer if it has one.
        repo_id: where it will be.
        config: of the model, as Tessera has it.
        model_type: `tessera`, whose code travels with the weights, or a family of transformers.
        run: run directory with `recipe.yaml` and `eval.json`, as far as they are there.
        license: identifier as the Hub knows it.
        on_hub: whether a name that the recipe gives is a `model` or `dataset` there. Paths are not on the
            card: they are of one machine only.
    """
    recipe, scores = _read_recipe(run), _read_scores(run, folder)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        tags=["tessera", *(["custom_code"] if model_type == "tessera" else [])],
        datasets=[name for name in _named(recipe, _DATA) if on_hub(name, "dataset")] or None,
        base_model=next((name for name in _named(recipe, _STARTS) if on_hub(name, "model")), None),
    )
    sections = [
        f"# {repo_id.split('/')[-1]}",
        _introduction(config, model_type),
        "## Use",
        _usage(repo_id, model_type == "tessera", folder),
        "## Architecture",
        _table(_describe(config)),
    ]
    settings = {
        key: _without_folders(value)
        for key, value in recipe.items()
        if value is not None and key not in _LOCAL
    }
    if settings:
        sections += ["## Training", _table(settings)]
    if scores:
        sections += ["## Evaluation", _table(scores)]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    ModelCard(text).save(folder / "README.md")


def _introduction(config: TesseraConfig, model_type: str) -> str:
    costs = count_costs(config)
    active = "" if costs.active == costs.parameters else f" ({costs.active:,} of them active for a token)"
    kind = "Tessera" if model_type == "tessera" else f"`{model_type}`"
    return (
        f"A {kind} decoder of {costs.parameters:,} parameters{active} with a context of "
        f"{config.max_position_embeddings:,} tokens."
    )


def _usage(repo_id: str, remote: bool, folder: Path) -> str:
    trust = ", trust_remote_code=True" if remote else ""
    lines = [f'model = AutoModelForCausalLM.from_pretrained("{repo_id}"{trust})']
    if (folder / "chat_template.jinja").is_file():
        inputs = [
            "inputs = tokenizer.apply_chat_template(",
            '    [{"role": "user", "content": "Hello!"}],',
            '    add_generation_prompt=True, return_tensors="pt", return_dict=True,',
            ")",
        ]
    else:
        inputs = ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
    names = "AutoModelForCausalLM"
    if (folder / "tokenizer_config.json").is_file():
        names += ", AutoTokenizer"
        lines += [f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}"{trust})', *inputs]
        lines += ["out = model.generate(**inputs, max_new_tokens=100)", "print(tokenizer.decode(out[0]))"]
    return "```python\n" + "\n".join([f"from transformers import {names}", "", *lines]) + "\n```"


def _describe(config: TesseraConfig) -> dict[str, Any]:
    """The tiles that are laid: sizes, and what is not at its default."""
    plain = architecture(TesseraConfig())
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "attention_type")
    tiles = architecture(config)
    shown = {name: tiles[name] for name in sizes}
    shown |= {name: value for name, value in tiles.items() if value != plain.get(name)}
    return {name: _short(value) for name, value in shown.items() if value is not None}


def _short(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return ", ".join(f"{value.count(kind)} x {kind}" for kind in dict.fromkeys(value))


def _table(rows: dict[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(f"| {name} | {' '.join(shown.split()).replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _read_recipe(run: Path | None) -> dict[str, Any]:
    file = None if run is None else run / "recipe.yaml"
    if file is None or not file.is_file():
        return {}
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    return values if isinstance(values, dict) else {}


def _read_scores(run: Path | None, folder: Path) -> dict[str, float]:
    """The figures of `eval.json`, if they are of these very weights."""
    file = None if run is None else run / "eval.json"
    if file is None or not file.is_file():
        return {}
    report = read_json(file)
    measured = (report.get("model") or {}).get("sha256") or {}
    files = {name: folder / name for name in measured}
    if not measured or not all(file.is_file() for file in files.values()):
        return {}
    if any(file_sha256(files[name]) != sha for name, sha in measured.items()):
        return {}
    return dict(_numbers(report.get("results") or {}))


def _numbers(values: dict, prefix: str = ""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def _without_folders(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(str(_without_folders(part)) for part in value)
    return Path(value).name if isinstance(value, str) else value


def _named(recipe: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    """Values that have the form of a name on the Hub, and are no path here."""
    values = [value for key in keys if isinstance(value := recipe.get(key), str)]
    name = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
    return [value for value in values if name.fullmatch(value) and not Path(value).exists()]
