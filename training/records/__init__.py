"""What is seen of a run: the progress line, metrics and trackers, curves, and the report.

What belongs here: figures on their way to a person. None of it changes what a run computes.
"""
