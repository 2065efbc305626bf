"""Optimizers: groups and their rates, Muon, AdamW, weights in few bits, a step shared by several processes.

What belongs here: everything from gradients to updated weights, and the state between. `groups.py` says which
parameter gets which rule, `mixed.py` is the optimizer, `muon.py` and `adamw.py` are its rules.
"""

from .groups import MuonAdamW, build_optimizer, describe, describe_as_text, orthogonalize

__all__ = ["MuonAdamW", "build_optimizer", "describe", "describe_as_text", "orthogonalize"]
