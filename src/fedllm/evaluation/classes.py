"""Per class: how many of its rows are found, and how many that were called it are it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class ClassFigures:
    """What is known of one class."""

    precision: float
    """Of the rows that the model gives this class, the share that has it; 0 without any."""
    recall: float
    """Of the rows that have this class, the share that the model finds; 0 without any."""
    f1: float
    """Harmonic mean of the two."""
    support: int
    """Rows that have this class."""


def classification_report(
    right: np.ndarray, chosen: np.ndarray, names: Sequence[str]
) -> Mapping[str, ClassFigures]:
    """Return the figures of every class, in the order of their ids (scikit-learn).

    Args:
        right: int (rows,), the class of each row.
        chosen: int (rows,), the class that the model chose; -1 where its answer names none.
        names: Name of each class.
    """
    from sklearn.metrics import precision_recall_fscore_support

    figures = precision_recall_fscore_support(
        right, chosen, labels=np.arange(len(names)), average=None, zero_division=0
    )
    return {
        name: ClassFigures(float(p), float(r), float(f), int(n))
        for name, p, r, f, n in zip(names, *figures, strict=True)
    }


def as_json(report: Mapping[str, ClassFigures]) -> dict[str, dict[str, float]]:
    """Return a report as plain numbers."""
    return {name: asdict(figures) for name, figures in report.items()}
