"""The loss curve as a picture."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tencentpretrain import faults


def plot_losses(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draws every loss of the training and validation records over the steps into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        losses = {"loss": record["loss"], **(record["losses"] if len(record["losses"]) > 1 else {})}
        for name, loss in losses.items():
            label = name if record["kind"] == "train" else f"{name} (validation)"
            steps, values = curves.setdefault(label, ([], []))
            if loss is not None:
                steps.append(record["step"])
                values.append(loss)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, (steps, values) in curves.items():
        validation = label.endswith("(validation)")
        axes.plot(steps, values, label=label, linestyle="--" if validation else "-", marker="." if validation else None)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    place = path.with_name(f".{path.name}.part")
    faults.reach("plot.write", path)
    figure.savefig(place, format="png", dpi=110)
    faults.reach("plot.rename", path)
    os.replace(place, path)
