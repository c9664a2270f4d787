"""Checkpoints of a central run: the trainer's own, and a mark that they are complete."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.errors import RunError

MARK = "fedllm.json"
"""A checkpoint without this file was not written to its end."""


@dataclass
class Course:
    """What a resume has to know beside what the trainer saves."""

    evaluations: int = 0
    """How many there were."""
    best: float | None = None
    """The best value of the main metric after training began."""
    best_step: int = 0
    since_best: int = 0
    """Evaluations since."""
    step: int = 0
    """Of the last evaluation."""
    loss: float = 0.0
    """Sum of the losses of the steps since then."""
    rows: list[int] = field(default_factory=list)
    """Rows of these steps."""


def complete_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints of a run that were written to their end, the latest last."""
    found = [folder for folder in (path / "checkpoints").glob("checkpoint-*")
             if (folder / MARK).is_file()]  # fmt: skip
    return sorted(found, key=lambda folder: int(folder.name.rpartition("-")[2]))


def read_mark(folder: Path) -> tuple[Course, dict[str, int]]:
    """Return what a checkpoint says of the run so far, and how long its records were.

    Raises:
        RunError: If it is damaged.
    """
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return Course(**mark["course"]), dict(mark["lengths"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder / MARK} is damaged ({error}). Delete {folder} to resume from the checkpoint"
            " before it"
        ) from None
