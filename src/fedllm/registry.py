"""Explicit tables from a name to the place where the thing is made, without importing it.

Listing a table or checking a name costs nothing; only `load` imports. There is no registration by
import: a plugin is a line in a table.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedllm.errors import ConfigError, unknown


@dataclass(frozen=True)
class Entry:
    """One row of a table: where the thing lives and what it is in one line."""

    target: str
    """`package.module:attribute`."""
    summary: str


@dataclass(frozen=True)
class Table(Mapping[str, Entry]):
    """A named table of entries.

    Args:
        kind: What an entry is ("algorithm", "metric"), for messages.
        entries: Name to entry, in the order in which they are listed.
    """

    kind: str
    entries: Mapping[str, Entry]

    def __getitem__(self, name: str) -> Entry:
        if name not in self.entries:
            raise ConfigError([unknown(self.kind, name, self.entries)])
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def load(self, name: str) -> Any:
        """Import and return the thing called `name`.

        Raises:
            ConfigError: If the name is not in the table.
        """
        module, _, attribute = self[name].target.partition(":")
        found = importlib.import_module(module)
        return getattr(found, attribute) if attribute else found
