"""Which keys and values rotary parameters have, and the refusal of all others.

What belongs here: the dictionary `rope_parameters` of a configuration, before anything is computed from it.
"""

import difflib
import math
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

# rope_type -> keys that it needs and keys that it may have, beside those in _ROPE_KEYS.
_ROPE_TYPES = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        set(),
    ),
}
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
_SCALING_KEYS = set().union(*(needed | optional for needed, optional in _ROPE_TYPES.values())) - _ROPE_KEYS

# key -> what its value must be, and the check; every other key is a positive number.
_ROPE_VALUES = {
    "rope_theta": ("a number above 1", lambda value: _is_number(value) and value > 1),
    "factor": ("a number of at least 1", lambda value: _is_number(value) and value >= 1),
    "partial_rotary_factor": ("a number in (0, 1]", lambda value: _is_number(value) and 0 < value <= 1),
    "original_max_position_embeddings": (
        "a whole number of at least 1",
        lambda value: type(value) is int and value >= 1,
    ),
    "mscale": ("a number of at least 0", lambda value: _is_number(value) and value >= 0),
    "mscale_all_dim": ("a number of at least 0", lambda value: _is_number(value) and value >= 0),
    "truncate": ("true or false", lambda value: isinstance(value, bool)),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def validate_rope_parameters(given: dict[str, Any]) -> None:
    """Refuses a rotary type, key or value that the frequencies cannot be computed from.

    Raises:
        ValueError: with the key, what was given and what would work.
    """
    rope_type = given.get("rope_type", "default")
    if not isinstance(rope_type, str) or rope_type not in _ROPE_TYPES:
        raise ValueError(
            f"rope_parameters: rope_type must be one of {', '.join(_ROPE_TYPES)}; got {rope_type!r}"
        )
    needed, optional = _ROPE_TYPES[rope_type]
    known = sorted(needed | optional | _ROPE_KEYS)
    idle = sorted(key for key in given if key not in known and key in _SCALING_KEYS)
    if idle:
        # Left behind by a change of type; the library warns too.
        logger.warning_once(f"rope_parameters: rope_type '{rope_type}' does not use {', '.join(idle)}")
    for key in given:
        if key not in known and key not in idle:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"rope_parameters: rope_type '{rope_type}' has no key '{key}'{hint}")
    missing = sorted((needed | {"rope_type", "rope_theta"}) - given.keys())
    if missing:
        raise ValueError(f"rope_parameters: rope_type '{rope_type}' needs {', '.join(missing)}")
    for key in given.keys() - {"rope_type", "type", *idle}:
        expected, fits = _ROPE_VALUES.get(key, ("a positive number", _is_positive))
        if not fits(given[key]):
            raise ValueError(f"rope_parameters: {key} must be {expected}, got {given[key]!r}")
    for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        # Both of YaRN's have a default; llama3 needs both.
        values = {"beta_slow": 1, "beta_fast": 32, **given}
        if low in known and values[low] >= values[high]:
            raise ValueError(
                f"rope_parameters: {high} ({values[high]}) must be larger than {low} ({values[low]})"
            )


def require_type_and_length(given: dict[str, Any]) -> None:
    """Refuses a scaling without its type, or without the length that it scales from.

    The library would take the type for "default" and the new length for the original one, and scale nothing.

    Raises:
        ValueError: with the key.
    """
    rope_type = given.get("rope_type", given.get("type"))
    scaling = sorted(key for key in given if key in _SCALING_KEYS)
    if scaling and "rope_type" not in given and "type" not in given:
        raise ValueError(f"rope_parameters has {', '.join(scaling)} but no rope_type that uses it")
    if rope_type in ("yarn", "llama3") and given.get("original_max_position_embeddings") is None:
        raise ValueError(f"rope_parameters: rope_type '{rope_type}' needs original_max_position_embeddings")


def share_that_truncates_to(part: int, whole: int) -> float:
    """The share of `whole` of which `int(whole * share)`, as the library computes it, is `part`."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, 2.0)
