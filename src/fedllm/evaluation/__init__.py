"""Metrics and the evaluation of global and personal views."""

from fedllm.evaluation.evaluator import Evaluation, Evaluator, Scope
from fedllm.evaluation.metrics import BY_TASK, METRICS, Evidence, Metric

__all__ = ["BY_TASK", "METRICS", "Evaluation", "Evaluator", "Evidence", "Metric", "Scope"]
