"""From named tensors in flat buffers to what layers apply, for every kind of adapter.

A layer with one plain path works on views of the buffers. One with several paths, or with a core
or gain between its factors, gets them stacked into one A and one B; they are put together anew at
each step, and their gradient goes back to the tensors through autograd, once a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedllm.adapters import (
    Adapter,
    layer_of,
    name_a,
    name_b,
    name_core,
    name_gain,
    name_index,
    name_router,
    name_values,
    slot_of,
)
from fedllm.engine.buffers import Buffer
from fedllm.engine.low_rank import LowRank
from fedllm.engine.routing import Router, one_hot
from fedllm.engine.sparse import Sparse


@dataclass(frozen=True)
class Sources:
    """Where the tensors of a cohort lie."""

    adapters: Sequence[Adapter]
    """One a row."""
    buffers: Sequence[tuple[Buffer, Tensor]]
    """Buffers with their data in the compute dtype."""
    grads: tuple[Buffer, Tensor] | None = None
    """The trained buffer, with its flat fp32 gradient."""

    def find(self, name: str) -> Tensor:
        """View a tensor of every row, in the compute dtype."""
        buffer, data = next((b, d) for b, d in self.buffers if name in b)
        return buffer.layout.view(data, name)

    def master(self, name: str) -> Tensor:
        """View a tensor of every row in fp32."""
        buffer = next(b for b, _ in self.buffers if name in b)
        return buffer.layout.view(buffer.data, name)

    def grad(self, name: str) -> Tensor | None:
        """View the gradient of a tensor; None if it is not trained."""
        if self.grads is None or name not in self.grads[0]:
            return None
        return self.grads[0].layout.view(self.grads[1], name)

    def __contains__(self, name: str) -> bool:
        return any(name in buffer for buffer, _ in self.buffers)


@dataclass
class Composite:
    """A layer whose factors are put together from several tensors."""

    sources: Sources
    paths: Sequence[str]
    low_rank: LowRank
    _leaves: dict[str, Tensor] = field(default_factory=dict)
    _whole: tuple[Tensor, ...] = ()

    def assemble(self) -> None:
        """Stack the paths' factors as they are now, scalings, gains and cores inside B."""
        self._leaves = {}
        with torch.set_grad_enabled(self.sources.grads is not None):
            a = torch.cat([self._leaf(name_a(path)) for path in self.paths], dim=1)
            b = torch.cat([self._up(path) for path in self.paths], dim=2)
        dtype = self.sources.buffers[0][1].dtype
        self.low_rank.a, self.low_rank.b = a.detach().to(dtype), b.detach().to(dtype)
        self.low_rank.grad_a = torch.zeros_like(a) if a.requires_grad else None
        self.low_rank.grad_b = torch.zeros_like(b) if b.requires_grad else None
        self._whole = (a, b)

    def disassemble(self) -> None:
        """Pass the gradients of the stacked factors on to the tensors they were made of."""
        slopes = (self.low_rank.grad_a, self.low_rank.grad_b)
        known = [(t, g) for t, g in zip(self._whole, slopes, strict=True) if g is not None]
        if not known:
            return
        torch.autograd.backward([t for t, _ in known], [g for _, g in known])
        for name, leaf in self._leaves.items():
            grad = self.sources.grad(name)
            if grad is not None and leaf.grad is not None:
                grad.add_(leaf.grad)

    def _leaf(self, name: str) -> Tensor:
        leaf = self.sources.master(name).detach()
        if self.sources.grad(name) is not None:
            leaf.requires_grad_()
        self._leaves[name] = leaf
        return leaf

    def _up(self, path: str) -> Tensor:
        b = self._leaf(name_b(path))
        if name_core(path) in self.sources:
            b = b @ self._leaf(name_core(path))
        factor = [adapter.scaling[path] for adapter in self.sources.adapters]
        b = b * torch.tensor(factor, device=b.device)[:, None, None]
        if name_gain(path) in self.sources:
            b = b * self._leaf(name_gain(path))[:, None, None]
        return b


@dataclass(frozen=True)
class Assembled:
    """All adapted layers of a cohort, by name."""

    low_ranks: Mapping[str, LowRank]
    sparse: Mapping[str, Sparse]
    composites: Sequence[Composite]


def assembled(sources: Sources, shapes: Mapping[str, tuple[int, int]]) -> Assembled:
    """Return what the layers apply; composite layers are put together once already.

    Args:
        sources: The cohort's tensors; all adapters have the same names.
        shapes: Layer to (out, in) of its weight.
    """
    first = sources.adapters[0]
    by_layer: dict[str, list[str]] = {}
    for path in first.modules:
        by_layer.setdefault(layer_of(path), []).append(path)
    low_ranks: dict[str, LowRank] = {}
    composites = []
    for layer, paths in by_layer.items():
        router = _router(sources, layer, paths)
        is_plain = len(paths) == 1 and router is None and name_core(paths[0]) not in first
        if is_plain:
            low_ranks[layer] = _plain(sources, paths[0])
            continue
        ones = [1.0] * len(sources.adapters)
        empty = torch.empty(0)
        slots = tuple(slot_of(path) for path in paths)
        low_ranks[layer] = LowRank(empty, empty, ones, router=router, paths=slots)
        low_ranks[layer].columns = _columns(sources, paths)
        composites.append(Composite(sources, paths, low_ranks[layer]))
        composites[-1].assemble()
    return Assembled(low_ranks, _sparse(sources, shapes), composites)


def _plain(sources: Sources, path: str) -> LowRank:
    return LowRank(
        a=sources.find(name_a(path)),
        b=sources.find(name_b(path)),
        scaling=[adapter.scaling[path] for adapter in sources.adapters],
        grad_a=sources.grad(name_a(path)),
        grad_b=sources.grad(name_b(path)),
    )


def _columns(sources: Sources, paths: Sequence[str]) -> Tensor:
    """Return the number of the path that each column of the stack belongs to."""
    widths = torch.tensor([sources.master(name_a(path)).shape[1] for path in paths])
    device = sources.buffers[0][1].device
    return torch.repeat_interleave(torch.arange(len(paths)), widths).to(device)


def _router(sources: Sources, layer: str, paths: Sequence[str]) -> Router | None:
    name = name_router(layer)
    routings = [adapter.routing for adapter in sources.adapters]
    if name not in sources or routings[0] is None:
        return None
    slots = [routing.slots for routing in routings if routing is not None]
    weight = sources.find(name)
    return Router(
        weight=weight,
        slots=one_hot(slots, [slot_of(path) for path in paths]).to(weight.device),
        top=routings[0].top,
        columns=_columns(sources, paths),
        grad=sources.grad(name),
    )


def _sparse(sources: Sources, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Sparse]:
    first = sources.adapters[0]
    found = {}
    for layer in first.layers:
        if name_values(layer) in first:
            values = sources.find(name_values(layer))
            found[layer] = Sparse(
                index=first[name_index(layer)].to(values.device, torch.int64),
                values=values,
                shape=shapes[layer],
                grad=sources.grad(name_values(layer)),
            )
    return found
