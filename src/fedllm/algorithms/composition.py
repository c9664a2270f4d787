"""An optimiser mixed into a method: one class that inherits from both, the optimiser's hooks first.

Hooks call `super()`, so an optimiser's `aggregate` finds the method's behind it. Alone, an
optimiser's classes stand on the base classes, which are FedIT. Methods are named by their modules.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

from fedllm.federation import BaseClient, BaseServer, HeadPolicy


@functools.cache
def server_class(method: str, optimizer: str | None) -> type[BaseServer]:
    """Return the method's server class, with an optimiser's mixed in if one is given."""
    found: Any = importlib.import_module(method).Server
    if optimizer is not None:
        first = importlib.import_module(optimizer).Server
        found = dataclass(kw_only=True)(type("Server", (first, found), {"__doc__": first.__doc__}))
    own: type[BaseServer] = found
    return own


def client(method: str, optimizer: str | None, head: HeadPolicy) -> BaseClient:
    """Return the behaviour of the method's clients, with an optimiser's mixed in.

    A client that was pickled comes back through this function, too.
    """
    return client_class(method, optimizer)(head)


@functools.cache
def client_class(method: str, optimizer: str | None) -> type[BaseClient]:
    """Return the class of the method's clients, with an optimiser's mixed in."""
    found: type[BaseClient] = importlib.import_module(method).Client
    if optimizer is None:
        return found

    # a class that no module holds cannot be pickled by its name
    def reduce(self: BaseClient) -> tuple[Any, ...]:
        return client, (method, optimizer, self.head)

    first: type[BaseClient] = importlib.import_module(optimizer).Client
    return type("Client", (first, found), {"__reduce__": reduce})
