"""Metrics and the evaluation of global and personal views."""

from fedllm.evaluation.classes import ClassFigures, classification_report
from fedllm.evaluation.evaluator import Evaluation, Evaluator, Scope, Views
from fedllm.evaluation.metrics import BY_TASK, METRICS, Evidence, Metric, require_packages

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
