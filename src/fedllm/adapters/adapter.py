"""An adapter: named tensors with the scaling of each module, never changed once made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from fedllm.adapters.lazy import LazyModule
from fedllm.adapters.names import (
    in_slot,
    is_a,
    is_b,
    is_head,
    is_on_path,
    layer_of,
    module_of,
    name_a,
    name_b,
    name_core,
    name_gain,
    name_index,
    name_values,
    slot_of,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


class Product(NamedTuple):
    """A low-rank matrix `b @ a`, any scaling already inside: b (out, R), a (R, in)."""

    b: Tensor
    a: Tensor

    def dense(self) -> Tensor:
        """Return the (out, in) matrix itself."""
        return self.b @ self.a


@dataclass(frozen=True)
class Routing:
    """How a router weighs the paths of its layer: softmax, keep the largest, sum to 1 again."""

    slots: tuple[str, ...]
    """The slot of the path that each output of the router stands for; a slot may have several."""
    top: int
    """How many outputs are kept."""


@dataclass(frozen=True)
class Adapter:
    """Named tensors, possibly only some of them, and alpha / r of every path.

    A layer computes W x + sum over its paths of g * scaling * B @ core @ A x, with A (r, in), B
    (out, r), core (r, r) the identity where there is none, and g the router's weight (1 without a
    router) times the gain. The tensors are shared, not copied, and never written to.
    """

    tensors: Mapping[str, Tensor]
    """Name (see `fedllm.adapters.names`) to tensor."""
    scaling: Mapping[str, float] = field(default_factory=dict)
    """Path to alpha / r (or alpha / sqrt(r))."""
    routing: Routing | None = None
    """How routers choose, if layers have one."""
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Layer to (out, in) of its weight, for layers with a sparse change."""

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def modules(self) -> tuple[str, ...]:
        """The low-rank paths of which at least one tensor is here, in order."""
        return tuple(dict.fromkeys(module_of(n) for n in self.tensors if is_on_path(n)))

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of which at least one tensor is here, in order."""
        return tuple(dict.fromkeys(layer_of(n) for n in self.tensors if not is_head(n)))

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of the tensors that are trained in full."""
        return tuple(name for name in self.tensors if is_head(name))

    @property
    def body(self) -> Adapter:
        """The part without heads."""
        return self.select(lambda name: not is_head(name))

    @property
    def nbytes(self) -> int:
        """What the tensors take on the wire."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def rank(self) -> int:
        """The largest rank of any path; 0 if no factor is here."""
        return max((self.rank_of(m) for m in self.modules), default=0)

    def rank_of(self, module: str) -> int:
        """Return the rank r of a path."""
        for name, side in ((name_a(module), 0), (name_b(module), 1), (name_core(module), 0)):
            if name in self.tensors:
                return self.tensors[name].shape[side]
        return 0

    def product(self, module: str) -> Product:
        """Return the update of a path, gain * scaling * B @ core @ A, as factors."""
        b, a = self.tensors[name_b(module)], self.tensors[name_a(module)] * self.scaling[module]
        if name_core(module) in self.tensors:
            b = b @ self.tensors[name_core(module)]
        if name_gain(module) in self.tensors:
            b = b * self.tensors[name_gain(module)]
        return Product(b, a)

    def sparse(self, layer: str) -> Tensor:
        """Return the sparse change of a layer, written out as (out, in)."""
        values, index = self.tensors[name_values(layer)], self.tensors[name_index(layer)]
        rows, columns = self.shapes[layer]
        flat = values.new_zeros(rows * columns)
        flat[index.long()] = values
        return flat.view(rows, columns)

    def select(self, keep: Callable[[str], bool]) -> Adapter:
        """Return the part whose names satisfy `keep`."""
        return replace(self, tensors={n: t for n, t in self.tensors.items() if keep(n)})

    def overlaid(self, tensors: Mapping[str, Tensor]) -> Adapter:
        """Return this adapter with some of its tensors replaced (or added)."""
        return replace(self, tensors={**self.tensors, **tensors})

    def moved(self, slot: str, of: str = "") -> Adapter:
        """Return the tensors of slot `of`, named as those of another slot ("": the plain one)."""
        here = {n: t for n, t in self.tensors.items() if slot_of(n) == of}
        scaling = {in_slot(m, slot): s for m, s in self.scaling.items() if slot_of(m) == of}
        return Adapter({in_slot(n, slot): t for n, t in here.items()}, scaling, self.routing)

    def joined(self, other: Adapter) -> Adapter:
        """Return this adapter with the paths of another one added (or replaced)."""
        return replace(
            self,
            tensors={**self.tensors, **other.tensors},
            scaling={**self.scaling, **other.scaling},
            routing=other.routing or self.routing,
        )

    def weighed(self, weights: Mapping[str, float]) -> Adapter:
        """Return this adapter with the paths of some slots counting by a constant factor."""
        scaling = {m: s * weights.get(slot_of(m), 1.0) for m, s in self.scaling.items()}
        return replace(self, scaling=scaling)

    def digest(self) -> str:
        """Return a SHA-256 over names, shapes, bytes and scalings: equal adapters, equal text."""
        sha = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().cpu().contiguous()
            sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for module in sorted(self.scaling):
            sha.update(f"{module}{self.scaling[module]!r}".encode())
        if self.routing is not None:
            sha.update(repr(self.routing).encode())
        return sha.hexdigest()


def initial(
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    scaling: float,
    seed: int,
    heads: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Return the adapter every client starts from: A uniform, B zero, so the model is unchanged.

    Args:
        shapes: Module to (out, in) of its weight.
        rank: LoRA rank r.
        scaling: alpha / r of every module.
        seed: The same seed gives the same A; a smaller rank has the leading rows of a larger one.
        heads: Tensors trained in full, by name.
    """
    tensors: dict[str, Tensor] = {}
    for module, (rows, columns) in shapes.items():
        tensors[name_a(module)] = uniform(rank, columns, seed, module)
        tensors[name_b(module)] = torch.zeros(rows, rank)
    return Adapter({**tensors, **(heads or {})}, dict.fromkeys(shapes, scaling))


def fresh(like: Adapter, seed: int) -> Adapter:
    """Return an adapter of the same shapes with a newly drawn A and B = 0; the rest stays."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in like.tensors.items():
        if is_a(name):
            rank, columns = tensor.shape
            tensors[name] = uniform(rank, columns, seed, module_of(name)).to(tensor)
        elif is_b(name):
            tensors[name] = torch.zeros_like(tensor)
        else:
            tensors[name] = tensor
    return replace(like, tensors=tensors)


def uniform(rows: int, columns: int, seed: int, name: str) -> Tensor:
    """Draw (rows, in) as `kaiming_uniform(a=sqrt(5))` does: uniform within 1 / sqrt(in).

    The same seed and name give the same numbers; fewer rows are the leading ones.
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    bound = columns**-0.5
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
