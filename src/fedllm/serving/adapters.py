"""Adapters from their folders into the layers of a resident model, many at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fedllm.adapters import Adapter, Routing, is_a, is_b, is_router, module_of, name_a, name_b
from fedllm.adapters.reading import load_adapter
from fedllm.engine import Resident
from fedllm.engine.assembly import Sources, assembled
from fedllm.engine.buffers import Buffer
from fedllm.engine.lora import Active
from fedllm.errors import ModelError


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter of any writer.

    Raises:
        ModelError: If the folder holds none, a damaged one, or one that cannot share a batch with
            others.
    """
    adapter = load_adapter(folder)
    if adapter.heads:
        raise ModelError(
            f"{folder} has '{adapter.heads[0]}' trained in full, so it cannot share a batch with"
            f" others. Merge it: fedllm export {folder} --to MERGED --merged; then serve MERGED"
        )
    return adapter


def together(adapters: Mapping[str, Adapter]) -> list[Adapter]:
    """Return adapters with the same tensors each, so that they can lie side by side.

    A path that an adapter lacks gets B = 0 there, and a router it lacks weighs only such paths.

    Raises:
        ModelError: If some have parts of another kind that others have not, or unequal routers.
    """
    everything = list(adapters.values())
    names = {name for adapter in everything for name in adapter}
    strange = [n for n in names if not (is_a(n) or is_b(n) or is_router(n))]
    missing = any(name not in adapter for adapter in everything for name in strange)
    routings = [adapter.routing for adapter in everything if adapter.routing is not None]
    if missing or len({(len(routing.slots), routing.top) for routing in routings}) > 1:
        raise ModelError(
            "these adapters are of kinds that cannot lie side by side (their routers or other parts"
            " differ in shape). Serve one adapter folder alone"
        )
    shapes = {name: tensor.shape for one in everything for name, tensor in one.tensors.items()}
    return [_filled(one, shapes, next(iter(routings), None)) for one in everything]


def activate(resident: Resident, adapters: Sequence[Adapter]) -> Active:
    """Put adapters, one a row, in the layout that the layers of a model apply."""
    buffer = Buffer(adapters, lambda name: True, resident.device)
    data = buffer.data.to(resident.dtype)
    layers = assembled(Sources(adapters, [(buffer, data)]), resident.shapes)
    return Active(modules=layers.low_ranks, sparse=layers.sparse)


def check_shapes(
    name: str, adapter: Adapter, shapes: Mapping[str, tuple[int, int]], model: str
) -> None:
    """Refuse an adapter that does not fit the layers of the base.

    Raises:
        ModelError: Naming the first tensor that does not fit.
    """
    for path in adapter.modules:
        layer = path.partition(":")[0]
        rows, columns = shapes[layer]
        a, b = adapter[name_a(path)], adapter[name_b(path)]
        if a.shape[1] != columns or b.shape[0] != rows or a.shape[0] != b.shape[1]:
            raise ModelError(
                f"adapter '{name}': {path} is ({b.shape[0]}, {a.shape[1]}) at ranks {b.shape[1]}"
                f" and {a.shape[0]}, and {model} has a layer of ({rows}, {columns}) there. Serve it"
                " on the base it was trained on"
            )


def _filled(adapter: Adapter, shapes: Mapping[str, torch.Size], routing: Routing | None) -> Adapter:
    """Return the adapter with paths that add nothing where it has none."""
    tensors, scaling = {}, {}
    for name, (rows, columns) in shapes.items():
        if name in adapter:
            tensors[name] = adapter[name]
        elif is_router(name):
            tensors[name] = torch.zeros(rows, columns)
        else:
            tensors[name] = torch.zeros((1, columns) if is_a(name) else (rows, 1))
        if not is_router(name):
            scaling[module_of(name)] = adapter.scaling.get(module_of(name), 1.0)
    return replace(adapter, tensors=tensors, scaling=scaling, routing=adapter.routing or routing)
