"""The one list of transformers' tests that Tessera leaves out, each with its reason.

docs/contract.md shows the same list to readers; `test_left_out.py` compares the two.
"""

import unittest

EVERY = ("bytegpt", "llama", "nanochat", "verse", "gpt")

# test -> dialects it is left out for, and why
LEFT_OUT: dict[str, tuple[tuple[str, ...], str]] = {}


def leave_out(case: type[unittest.TestCase], dialect: str) -> type[unittest.TestCase]:
    """Replaces the listed tests of a class by skips that say why; a test of another name stays."""
    for name, (dialects, reason) in LEFT_OUT.items():
        if dialect in dialects and hasattr(case, name):
            setattr(case, name, unittest.skip(reason)(getattr(case, name)))
    return case
