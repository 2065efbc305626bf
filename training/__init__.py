"""Training: pretraining on Accelerate; SFT, DPO and GRPO on TRL; the demo.

A pretraining run is told by `pretrain_arguments.py`, gone through by `pretrain.py`, and trained by
`engine.py` and `step.py` on the rows of `feed.py`. Rooms of their own: `optimizers/`, `checkpoints/`,
`records/` (what is seen of a run) and `planner/`.
"""
