"""Measurements of what the project promises, printed as ratios within one run; behind ``titans-graph bench``."""

PARTS = ("speed", "growth", "length", "decode", "peer")
"""What can be measured on its own, in this order."""
