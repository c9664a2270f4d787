"""Where jobs run."""

from fedllm.executors.inline import InlineExecutor
from fedllm.executors.workers import WorkerExecutor

__all__ = ["InlineExecutor", "WorkerExecutor"]
