"""A module that is imported when it is first used.

An algorithm's file imports the algebra, and `fedllm list` and `fedllm check` import algorithms to
know their settings. Neither may wait for torch, so the two files that compute with it bind it here.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """Stands for a module until one of its attributes is asked for."""

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), attribute)
        setattr(self, attribute, value)
        return value
