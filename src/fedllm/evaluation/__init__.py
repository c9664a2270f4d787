"""Metrics and the evaluation of global and personal views.

The evaluator is imported when first used: names of metrics are asked for long before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedllm.evaluation.classes import ClassFigures, classification_report
from fedllm.evaluation.metrics import BY_TASK, METRICS, Evidence, Metric, require_packages

if TYPE_CHECKING:
    from fedllm.evaluation.evaluator import Evaluation, Evaluator, Scope, Views

__all__ = [
    "BY_TASK",
    "METRICS",
    "ClassFigures",
    "Evaluation",
    "Evaluator",
    "Evidence",
    "Metric",
    "Scope",
    "Views",
    "classification_report",
    "require_packages",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.evaluator"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
