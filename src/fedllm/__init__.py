"""Federated fine-tuning of Hugging Face language models."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "attach"]


def __getattr__(name: str) -> Any:
    # torch comes with it, and `import fedllm` must not wait for that
    if name == "attach":
        from fedllm.engine.attach import attach

        return attach
    raise AttributeError(f"module 'fedllm' has no attribute '{name}'")
