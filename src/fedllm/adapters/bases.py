"""Several frozen bases side by side, each with a small trained core (RAVAN's heads).

A layer's update is sum_j gain_j B_j core_j A_j with B_j and A_j drawn once from a seed. Each term
is a path of its own, in slot `head0`, `head1`, ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from fedllm.adapters.adapter import Adapter
from fedllm.adapters.lazy import LazyModule
from fedllm.adapters.linear import flat_norm
from fedllm.adapters.names import (
    in_slot,
    is_core,
    is_gain,
    is_head,
    module_of,
    name_a,
    name_b,
    name_core,
    name_gain,
    slot_of,
)
from fedllm.errors import ConfigError
from fedllm.seeding import rng

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

Kind = Literal["gram-schmidt", "gaussian"]


def base_slots(count: int) -> tuple[str, ...]:
    """Return the slots of the bases.

    >>> base_slots(2)
    ('head0', 'head1')
    """
    return tuple(f"head{j}" for j in range(count))


def with_bases(adapter: Adapter, count: int, kind: Kind, seed: int) -> Adapter:
    """Return the adapter with `count` bases in the place of every path; they add nothing yet.

    Cores are zero, gains and scalings 1; heads stay.

    Args:
        adapter: Gives layers, shapes and the rank; not modified.
        count: How many bases a layer has.
        kind: Orthonormal rows of all A_j of a layer together (and columns of all B_j), or normal
            entries of variance 1 / r.
        seed: The same seed gives the same bases.

    Raises:
        ConfigError: If a layer has no room for that many orthogonal rows.
    """
    tensors = dict(adapter.select(is_head).tensors)
    scaling: dict[str, float] = {}
    for layer in adapter.modules:
        a, b, rank = adapter[name_a(layer)], adapter[name_b(layer)], adapter.rank_of(layer)
        room = min(b.shape[0], a.shape[1])
        if kind == "gram-schmidt" and count * rank > room:
            raise ConfigError([_no_room(layer, count, rank, room)])
        rows = _drawn(a, a.shape[1], count * rank, kind, seed, layer, "down")
        columns = _drawn(b, b.shape[0], count * rank, kind, seed, layer, "up")
        for j, slot in enumerate(base_slots(count)):
            path, own = in_slot(layer, slot), slice(j * rank, (j + 1) * rank)
            tensors[name_a(path)] = rows[own].clone()
            tensors[name_b(path)] = columns[own].T.clone(memory_format=torch.contiguous_format)
            tensors[name_core(path)] = a.new_zeros(rank, rank)
            tensors[name_gain(path)] = a.new_ones(())
            scaling[path] = 1.0
    return replace(adapter, tensors=tensors, scaling=scaling)


def _no_room(layer: str, count: int, rank: int, room: int) -> str:
    return (
        f"algorithm.heads: {count} orthogonal heads of rank {rank} need {count * rank} rows, and"
        f" {layer} has {room}; lower algorithm.heads or adapter.rank, or set algorithm.bases:"
        " gaussian"
    )


def _drawn(like: Tensor, columns: int, rows: int, kind: Kind, seed: int, *names: str) -> Tensor:
    """Draw rows in the dtype and on the device of `like`."""
    if like.is_meta:
        return like.new_empty(rows, columns)
    drawn = torch.from_numpy(rng(seed, "bases", *names).standard_normal((rows, columns)))
    if kind == "gram-schmidt":
        drawn = torch.linalg.qr(drawn.T).Q.T
    else:
        drawn = drawn / min(like.shape) ** 0.5
    made: Tensor = drawn.to(like)
    return made


def gains_folded(adapter: Adapter) -> Adapter:
    """Return the adapter with every gain taken into its core; all products stay."""
    tensors = dict(adapter.tensors)
    for name, gain in adapter.tensors.items():
        if is_gain(name):
            core = name_core(module_of(name))
            tensors[core] = tensors[core] * gain
            tensors[name] = torch.ones_like(gain)
    return replace(adapter, tensors=tensors)


def strongest(adapter: Adapter, slots: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """Return the `count` slots whose cores are largest over all layers; equal ones by lot."""
    lot = rng(seed, "heads").permutation(len(slots)).tolist()
    cores = adapter.select(is_core).tensors
    size = [flat_norm({n: t for n, t in cores.items() if slot_of(n) == slot}) for slot in slots]
    order = sorted(range(len(slots)), key=lambda j: (-size[j], lot[j]))
    return tuple(slots[j] for j in sorted(order[:count]))


def is_chosen(name: str, download: Adapter, settings: Mapping[str, Any], seed: int) -> bool:
    """Tell whether a core or gain is of a head that a job trains.

    Args:
        name: Of any tensor; all others are of no head.
        download: What the job starts from.
        settings: `heads`, `trained_heads` (None is all) and `choose` (`random` or `norm`).
        seed: Of the job.
    """
    if not (is_core(name) or is_gain(name)):
        return False
    slots = base_slots(settings["heads"])
    by = download if settings["choose"] == "norm" else Adapter({})
    return slot_of(name) in strongest(by, slots, settings["trained_heads"] or len(slots), seed)
