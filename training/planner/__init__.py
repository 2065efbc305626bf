"""The planner: parameters, operations, memory, time and cost of a run, before it is started.

What belongs here: what is computed and not trained. `request.py` says what is planned, `plan.py` makes the
plan from memory (`memory.py`, `activations.py`) and time (`throughput.py`, `peak.py`) on a card (`cards.py`),
and `report.py` writes it.
"""

from .plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
