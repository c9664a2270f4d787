"""Hugging Face models: found, checked, loaded frozen, and described.

`fedllm.models.catalog` needs no torch; the names below are imported when first used, so that
`fedllm list` stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedllm.models.catalog import BUILTIN_MODELS, TESTED_FAMILIES
from fedllm.starting import import_transformers

if TYPE_CHECKING:
    from fedllm.models.architecture import position_limit, resolve_kind
    from fedllm.models.hardware import resolve_device, resolve_dtype
    from fedllm.models.loading import LoadedModel, base_hash, load_model
    from fedllm.models.memory import SizeEstimate, adapter_parameters, estimate_size
    from fedllm.models.targets import (
        Kind,
        head_modules,
        head_tensors,
        linear_shape,
        target_modules,
    )
    from fedllm.models.tokenizer import load_tokenizer

__all__ = [
    "BUILTIN_MODELS",
    "TESTED_FAMILIES",
    "Kind",
    "LoadedModel",
    "SizeEstimate",
    "adapter_parameters",
    "base_hash",
    "estimate_size",
    "head_modules",
    "head_tensors",
    "linear_shape",
    "load_model",
    "load_tokenizer",
    "position_limit",
    "resolve_device",
    "resolve_dtype",
    "resolve_kind",
    "target_modules",
]

_NEED_TORCH = ("hardware", "targets", "architecture", "tokenizer", "loading", "memory")


def __getattr__(name: str) -> Any:
    if name in __all__:
        import_transformers()
        for part in _NEED_TORCH:
            module = importlib.import_module(f"{__name__}.{part}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
