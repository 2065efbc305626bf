"""Checkpoints of other families and layouts to Tessera and back, verified; releases to the Hub."""
