"""The course of a central run as a picture."""

from __future__ import annotations

from pathlib import Path

from fedllm.results import RunDir


def draw(directory: RunDir) -> Path | None:
    """Draw the training loss over steps; nothing where nothing was logged."""
    lines = [line for line in directory.read("trainer_log") if line.get("loss") is not None]
    if not lines:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [line["current_steps"] for line in lines]
    axes.plot(steps, [line["loss"] for line in lines], marker="." if len(lines) < 50 else "")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    path = directory.path / "plots" / "training_loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
