"""transformers' rules for the names of weights, of which a model needs a handful.

With the first model it compiles those of all its architectures, some 900 regular expressions:
a thirtieth of the time to the first step. Here each is compiled when it is first asked.
"""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

RULES, MAPPING = "transformers.core_model_loading", "transformers.conversion_mapping"
BUILD = "_build_checkpoint_conversion_mapping"


class Pattern:
    """A regular expression that is compiled when anything is asked of it."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copying asks for is no pattern's
            raise AttributeError(name)
        # Python remembers what it has compiled last
        return getattr(re.compile(*self._arguments), name)


def compile_when_asked() -> None:
    """Let transformers' rules of all architectures compile their patterns when they are used.

    Where a version builds them another way, nothing is changed.
    """
    rules, mapping = sys.modules.get(RULES), sys.modules.get(MAPPING)
    build: Any = getattr(mapping, BUILD, None)
    is_known = build is not None and getattr(rules, "re", None) is re
    if not is_known or build.__module__ == __name__:
        return
    lazy = SimpleNamespace(**{**vars(re), "compile": Pattern})

    def patiently() -> Any:
        vars(rules)["re"] = lazy
        try:
            return build()
        finally:
            vars(rules)["re"] = re

    vars(mapping)[BUILD] = patiently
