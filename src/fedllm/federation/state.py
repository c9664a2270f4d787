"""State as JSON plus tensors: what is saved, resumed, and sent between processes.

Nothing is pickled. A `Codec` knows an explicit list of types and refuses any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from fedllm.adapters import Adapter, BaseDelta, Pool, Product, Routing
from fedllm.federation.base import BaseServer
from fedllm.federation.messages import ClientId, Job, Mix, Part, Payload, Update

if TYPE_CHECKING:
    from torch import Tensor

_TAG = "$"
Tree = Any
"""What `json` can hold."""


class Codec:
    """Turns values into a JSON tree with tensors aside, and back.

    Args:
        types: Dataclasses, named tuples and enums that may occur besides the federation's own.
    """

    def __init__(self, *types: type) -> None:
        own = (Adapter, Routing, BaseDelta, Pool, Product, Payload, Mix, Job, Update, Part)
        self.types = {cls.__name__: cls for cls in (*own, *types)}

    def pack(self, value: object) -> tuple[Tree, dict[str, Tensor]]:
        """Return the tree and the tensors it refers to; a tensor shared in `value` is kept once."""
        tensors: dict[str, Tensor] = {}
        names: dict[int, str] = {}

        def walk(item: Any) -> Tree:
            if item is None or isinstance(item, (bool, str)):
                return item
            if isinstance(item, Enum):
                return {_TAG: self._known(item), "value": item.value}
            if isinstance(item, (int, float)):
                return item
            if dataclasses.is_dataclass(item) and not isinstance(item, type):
                fields = {f.name: walk(getattr(item, f.name)) for f in dataclasses.fields(item)}
                return {_TAG: self._known(item), "fields": fields}
            if isinstance(item, tuple) and hasattr(item, "_fields"):
                fields = {n: walk(x) for n, x in zip(item._fields, item, strict=True)}
                return {_TAG: self._known(item), "fields": fields}
            if isinstance(item, (list, tuple, frozenset)):
                items = [walk(x) for x in (sorted(item) if isinstance(item, frozenset) else item)]
                return items if isinstance(item, list) else {_TAG: type(item).__name__, "of": items}
            if isinstance(item, Mapping):
                if all(isinstance(k, str) for k in item) and _TAG not in item:
                    return {k: walk(v) for k, v in item.items()}
                return {_TAG: "dict", "of": [[walk(k), walk(v)] for k, v in item.items()]}
            name = names.setdefault(id(item), f"t{len(names)}")
            tensors[name] = item
            return {_TAG: "tensor", "name": name}

        return walk(value), tensors

    def unpack(self, tree: Tree, tensors: Mapping[str, Tensor]) -> Any:
        """Return what `pack` was given."""
        if isinstance(tree, list):
            return [self.unpack(item, tensors) for item in tree]
        if not isinstance(tree, dict):
            return tree
        match tree.get(_TAG):
            case None:
                return {key: self.unpack(item, tensors) for key, item in tree.items()}
            case "tensor":
                return tensors[tree["name"]]
            case "tuple":
                return tuple(self.unpack(item, tensors) for item in tree["of"])
            case "frozenset":
                return frozenset(self.unpack(item, tensors) for item in tree["of"])
            case "dict":
                return {self.unpack(k, tensors): self.unpack(v, tensors) for k, v in tree["of"]}
            case name:
                cls = self.types[name]
                if "value" in tree:
                    return cls(tree["value"])
                fields = {k: self.unpack(v, tensors) for k, v in tree["fields"].items()}
                return cls(**fields)

    def _known(self, item: object) -> str:
        name = type(item).__name__
        if self.types.get(name) is not type(item):
            raise TypeError(f"{type(item)} is not among the types this codec knows")
        return name


_GIVEN = frozenset({"ranks", "head", "num_clients", "rounds", "seed", "weight_of", "downlink"})
"""Fields of a server that follow from the configuration, not from the run."""


def server_state(server: BaseServer) -> dict[str, object]:
    """Return the fields that make up a server's checkpoint."""
    return {
        f.name: getattr(server, f.name)
        for f in dataclasses.fields(server)
        if not f.init and f.name not in _GIVEN
    }


def restore_server(server: BaseServer, state: Mapping[str, object]) -> None:
    """Put a checkpoint back into a server made from the same configuration."""
    for name, value in state.items():
        setattr(server, name, value)


class MemoryStore:
    """Client state in memory; grows with the clients that keep something, not with all."""

    def __init__(self, tensors: Mapping[ClientId, Mapping[str, Tensor]] | None = None) -> None:
        self._tensors = dict(tensors or {})

    def get(self, cid: ClientId) -> Mapping[str, Tensor]:
        """Return the private tensors of a client; empty if it has none."""
        return self._tensors.get(cid, {})

    def put(self, cid: ClientId, tensors: Mapping[str, Tensor]) -> None:
        """Keep these tensors for a client, in place of what it kept before."""
        self._tensors.pop(cid, None)
        if tensors:
            self._tensors[cid] = tensors

    def clients(self) -> Iterable[ClientId]:
        """Return the clients that keep something, in ascending order."""
        return sorted(self._tensors)
