"""Measuring a model: loss of a text, in nats and in bits per byte."""
