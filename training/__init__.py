"""Training on Accelerate: the loop, optimizers, schedules, checkpoints, and the demo."""
