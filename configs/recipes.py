"""Recipes: what a training run is told, by name, from the YAML files in `recipes/`, or from anybody's file.

What belongs here: from a name or path to keys and values. What the keys mean, and which there are, is in
`tessera.training.pretrain_arguments`.
"""

import difflib
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

RECIPE_FILE = "recipe.yaml"  # of a run


class _Loader(yaml.SafeLoader):
    """Reads 3e-4 as the number it is; PyYAML, which keeps to YAML 1.1, wants 3.0e-4 and gives a text else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, in alphabetical order."""
    folder = _recipe_folder()
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def read_recipe(given: str) -> dict[str, Any]:
    """Reads a recipe.

    Args:
        given: a YAML file, a run directory (whose `recipe.yaml` is meant), or the name of a recipe.

    Raises:
        ValueError: if it is none of them, or does not hold keys and values.
    """
    values = _read(given)
    if not values:
        raise ValueError(
            f"the recipe {given} is empty; a recipe has one 'key: value' a line, such as steps: 100"
        )
    return values


def _read(given: str) -> dict[str, Any]:
    path = Path(given)
    # os.path has no opinion on names that no file can have; they are no recipe either.
    if os.path.isdir(given) and (path / RECIPE_FILE).is_file():
        return read_yaml(path / RECIPE_FILE)
    if os.path.isfile(given) or path.suffix in (".yaml", ".yml", ".json"):
        return read_yaml(path)
    names = recipe_names()
    if given in names:
        return _parse((_recipe_folder() / f"{given}.yaml").read_text(encoding="utf-8"), given)
    close = difflib.get_close_matches(given, names, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise ValueError(f"there is no recipe '{given}'{hint} (recipes: {', '.join(names)}; or a YAML file)")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file of keys and values.

    Raises:
        ValueError: if the file is missing, or is anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: it is not text") from error


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{source} must hold keys and values, one 'key: value' a line")
    return values


def _recipe_folder():
    return resources.files("tessera.configs") / "recipes"
