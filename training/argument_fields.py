"""What a field of the arguments knows of itself, and the checks that follow from it.

What belongs here: help, names on the command line, choices and bounds of a field, and the value of a YAML
file as a field wants it. Which fields there are is `pretrain_arguments.py`.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import Field, field
from types import NoneType
from typing import Any, get_args


def told(
    default: Any,
    panel: str,
    text: str,
    *,
    flags: tuple[str, ...] = (),
    kind: type | None = None,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> Any:
    """A field of `PretrainArguments`: all that the command line, a recipe and the checks need to know of it.

    Args:
        default: the value where nothing is given; `MISSING` for none.
        panel: heading in `--help`; empty for what is no flag.
        text: what it is, with the default in brackets where it is worth a word.
        flags: its names on the command line where they are others than its own.
        kind: type on the command line where that takes more than the field's, as 2e9 for a whole number.
        choices: all values that there are.
        least, above, most: bounds of a number.
    """
    about = {"panel": panel, "help": text, "flags": flags, "kind": kind, "choices": choices}
    return field(default=default, metadata={**about, "least": least, "above": above, "most": most})


def fit(value: Any, one: Field, what: str) -> Any:
    """A value of a YAML file as the field wants it.

    Args:
        value: of the file.
        one: the field.
        what: named in errors.

    Raises:
        ValueError: for a value of another type.
    """
    kinds = [kind for kind in get_args(one.type) or [one.type] if kind is not NoneType]
    if type(value) is bool and {"on", "off"} <= {*one.metadata["choices"]}:
        return "on" if value else "off"  # as YAML reads these two
    if list[str] in kinds and isinstance(value, dict):
        return [f"{share}:{size}" for share, size in value.items()]
    if list[str] in kinds and isinstance(value, list):
        if all(type(part) is str for part in value):
            return value
        raise ValueError(f"{what} must be a text, or a list of texts (in quotes), got {value!r}")
    if kinds == [list[str]] and type(value) is str:
        return split_list(value)
    kind = kinds[0]
    if kind is int and type(value) is float and value.is_integer():
        return int(value)  # 2e9
    fits = type(value) in (int, float) if kind is float else type(value) is kind
    if not fits:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise ValueError(f"{what} must be {names.get(kind, 'a list of texts')}, got {value!r}")
    return value


def split_list(text: str) -> list[str]:
    """Several texts in one, between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def check(one: Field, value: Any) -> None:
    """Refuses a value that is outside of what its field takes.

    Raises:
        ValueError: with the field's name, and the bounds or choices that it has.
    """
    name, about = one.name, one.metadata
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    if about["choices"] and value not in about["choices"]:
        *others, last = map(repr, about["choices"])
        known = f"{', '.join(others)} or {last}"
        raise ValueError(f"{name} must be {known}, got {value!r}{nearest(value, about['choices'])}")
    least, most = about["least"], about["most"]
    if most is not None and not 0 <= value <= most:
        raise ValueError(f"{name} is a share between 0 and 1, got {value}")
    if least is not None and value < least:
        raise ValueError(f"{name} must {f'be at least {least}' if least else 'not be negative'}, got {value}")
    if about["above"] is not None and value <= about["above"]:
        raise ValueError(f"{name} must be positive, got {value}")


def nearest(given: Any, known: Iterable[str]) -> str:
    """The end of a sentence that refuses a name: the known one that is meant, if one is near."""
    close = difflib.get_close_matches(str(given), known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
