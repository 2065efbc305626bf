"""Pretraining and post-training: trainers, optimizers, schedules, checkpoints, the planner."""
