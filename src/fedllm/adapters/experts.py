"""Several experts in a layer, and a router for each cluster of clients (FedLEASE).

The server holds all of them: expert c in slot `expert<c>`, with the router of its cluster in that
slot too. A client holds all experts, and its own cluster's router under the layer's plain name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedllm.adapters.adapter import Adapter, Routing, uniform
from fedllm.adapters.algebra import Weighted, mean
from fedllm.adapters.names import (
    is_head,
    is_router,
    layer_of,
    name_a,
    name_router,
    slot_of,
)

if TYPE_CHECKING:
    from torch import Tensor

_EXPERT = "expert"


def expert_slot(cluster: int) -> str:
    """Return the slot of a cluster's expert.

    >>> expert_slot(2)
    'expert2'
    """
    return f"{_EXPERT}{cluster}"


def routers(like: Adapter, outputs: int, seed: int) -> dict[str, Tensor]:
    """Return a router (outputs, in) for each layer, uniform within 1 / sqrt(in), by name."""
    drawn = {}
    for path in like.modules:
        layer, a = layer_of(path), like[name_a(path)]
        name = name_router(layer)
        drawn[name] = uniform(outputs, a.shape[1], seed, name).to(a)
    return drawn


def founded(parts: Weighted, labels: Sequence[int], onto: Adapter, seed: int) -> Adapter:
    """Return the mean of each cluster's adapters as an expert, with a new router beside it.

    Args:
        parts: Weights and plain adapters; their heads are left out.
        labels: Cluster of each part, from 0 on.
        onto: A plain adapter that tells shapes and scalings; its heads are kept.
        seed: Of the routers; those of all clusters start alike.
    """
    whole, count = onto.select(is_head), max(labels) + 1
    start = routers(onto.body, 2 * count - 1, seed)
    for cluster in range(count):
        own = [(w, a.body) for (w, a), label in zip(parts, labels, strict=True) if label == cluster]
        expert = Adapter({**mean(own, onto), **start}, onto.scaling)
        whole = whole.joined(expert.moved(expert_slot(cluster)))
    return replace(whole, scaling={m: s for m, s in whole.scaling.items() if slot_of(m)})


def mean_by_cluster(parts: Weighted, whole: Adapter) -> dict[str, Tensor]:
    """Return the mean of what each cluster sent, its expert and router, and of all heads."""
    return mean([(weight, _from_cluster(sent)) for weight, sent in parts], whole)


def _from_cluster(sent: Adapter) -> Adapter:
    """Return what a client sent as the server names it."""
    own = next(slot_of(path) for path in sent.modules)
    router = sent.select(is_router).moved(own)
    return sent.select(lambda name: not is_router(name)).overlaid(router.tensors)


def num_experts(whole: Adapter) -> int:
    """Return how many experts each layer has."""
    return len({slot_of(path) for path in whole.modules})


def for_cluster(whole: Adapter, cluster: int) -> Adapter:
    """Return what a client of a cluster holds: all experts, its own router, how that chooses.

    M experts share 2M - 1 outputs of the router: one each, and M - 1 more for the client's own, so
    that it is always among the M largest.
    """
    count = num_experts(whole)
    own = expert_slot(cluster)
    router = whole.select(is_router).moved("", of=own)
    slots = (*(expert_slot(c) for c in range(count)), *[own] * (count - 1))
    shared = whole.select(lambda name: not is_router(name))
    return replace(shared.overlaid(router.tensors), routing=Routing(slots, top=count))


def centre(whole: Adapter) -> Adapter:
    """Return the uniform mean of all experts as a plain adapter, with the heads."""
    paths = whole.select(lambda name: not (is_router(name) or is_head(name)))
    plain = [paths.moved("", of=expert_slot(c)) for c in range(num_experts(whole))]
    middle = Adapter(mean([(1.0, expert) for expert in plain], plain[0]), plain[0].scaling)
    return middle.overlaid(whole.select(is_head).tensors)
