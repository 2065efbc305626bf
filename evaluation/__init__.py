"""Measuring a model: bits per byte, perplexity, task suites, and the statistics behind the numbers."""
