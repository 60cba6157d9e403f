"""Pictures of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SMOOTHING = 0.9


def loss_curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], floors: Mapping[str, float], title: str) -> None:
    """Write a PNG of bits per byte over steps: each run's records (see ``logs.read``), floors as dashed lines.

    Training losses are smoothed by an exponential mean over about ten steps; validations are dots. Linear axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lowest, highest = min(floors.values(), default=8.0), max(floors.values(), default=0.0)
    for number, (name, records) in enumerate(runs.items()):
        color = f"C{number}"
        steps, values = smoothed(records)
        axes.plot(steps, values, color=color, alpha=0.5, label=f"{name}, training (smoothed)")
        points = [(r["step"], r["bits_per_byte"]) for r in records if r["kind"] == "eval"]
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=f"{name}, validation")
        lowest = min([lowest, *values, *(v for _, v in points)])
        highest = max([highest, *values, *(v for _, v in points)])
    for number, (name, value) in enumerate(floors.items()):
        axes.axhline(value, linestyle="--", linewidth=1, color=f"C{number + 5}", label=f"{name} {value:.2f}")
    axes.set(xlabel="optimizer steps", ylabel="bits per byte", title=title)
    axes.set_xlim(left=0)
    axes.set_ylim(max(0.0, lowest - 0.3), highest + 0.3)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def smoothed(records: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    """Steps and the exponential mean of the training losses up to each, bias-corrected, in bits per byte."""
    steps, values = [], []
    mean = weight = 0.0
    for record in records:
        if record["kind"] == "train":
            mean = SMOOTHING * mean + (1 - SMOOTHING) * record["bits_per_byte"]
            weight = SMOOTHING * weight + (1 - SMOOTHING)
            steps.append(record["step"])
            values.append(mean / weight)
    return steps, values
