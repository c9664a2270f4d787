"""The course of a central run as a picture."""

from __future__ import annotations

from pathlib import Path

from fedllm.results import RunDir
from fedllm.results.storage import explained

_FEW = 50
"""Points that are marked one by one."""


def draw(directory: RunDir) -> Path | None:
    """Draw the training loss over steps; nothing where nothing was logged."""
    from fedllm.results import style

    lines = [line for line in directory.read("trainer_log") if line.get("loss") is not None]
    if not lines:
        return None
    figure = style.panels(size=(6.4, 3.8))
    axes = figure.axes[0]
    steps, losses = zip(*((line["current_steps"], line["loss"]) for line in lines), strict=True)
    axes.plot(steps, losses, color=style.BLUE, marker="." if len(lines) < _FEW else "")
    axes.set_title("Training loss by step", loc="left")
    style.round_axis(axes, "step")
    # it is per token in sft and pt alone
    axes.set_ylabel("loss")
    path = directory.path / "plots" / "training_loss.png"
    with explained(path, "The run itself is untouched."):
        return style.save(figure, path)
