"""Many clients in one pass over one frozen model.

The names below are imported when first used: a central run takes single parts of the package, and
need not wait for the rest of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedllm.engine.engine import CohortEngine, clients_at_once
    from fedllm.engine.resident import TOKENS_PER_PASS, Resident

__all__ = ["TOKENS_PER_PASS", "CohortEngine", "Resident", "clients_at_once"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        part = "engine" if name in ("CohortEngine", "clients_at_once") else "resident"
        return getattr(importlib.import_module(f"{__name__}.{part}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
