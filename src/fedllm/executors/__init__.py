"""Where jobs run."""

from fedllm.executors.inline import InlineExecutor

__all__ = ["InlineExecutor"]
