"""Measurements of what the project promises, printed as ratios within one run; behind ``titans-graph bench``."""
