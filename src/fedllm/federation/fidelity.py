"""How far an aggregation is from the ideal: the weighted mean of what the clients trained.

    agg_error = || sum_k p_k (W_k after - W_k trained) ||_F over all adapted layers

W_k trained is what client k's training ended with; W_k after is what the server made of it: the
global model, or, where clients keep tensors of their own, the client's model with them. For FedIT
that is s || sum_k p_k (B_k - B)(A_k - A) ||. Paths that a router weighs are compared one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedllm.adapters import (
    Adapter,
    Product,
    layer_of,
    name_a,
    name_b,
    name_router,
    name_values,
)
from fedllm.adapters.measure import difference_norm
from fedllm.federation.base import BaseServer
from fedllm.federation.client import visible
from fedllm.federation.messages import Job, Part

if TYPE_CHECKING:
    from torch import Tensor

    Terms = dict[str, list[Product | Tensor]]


def aggregation_error(
    server: BaseServer, parts: Sequence[Part], jobs: Mapping[int, Job]
) -> float | None:
    """Return the error of an aggregation that has just been done; None where there is no ideal.

    Cost: two QRs of (out + in) x R a layer, R the sum of all ranks, or one (out, in) product where
    that is smaller.

    Args:
        server: After the aggregation.
        parts: What was aggregated; weights need not sum to 1.
        jobs: Client to its job.
    """
    if not parts or not server.has_mean:
        return None
    total = sum(part.weight for part in parts)
    terms: Terms = {}
    if not server.is_personal:
        _add(terms, server.adapter, 1.0)
    for weight, update in parts:
        job, share = jobs[update.cid], weight / total
        download = job.payload.adapter
        trained = {**update.adapter.tensors, **visible(update.state)}
        own = download.overlaid({n: t for n, t in trained.items() if n in download})
        own = replace(own, scaling={**own.scaling, **update.adapter.scaling})
        _add(terms, own, -share)
        if server.is_personal:
            # without the paths of a stage that only now begins
            after = server.download(update.cid).adapter.select(download.tensors.__contains__)
            kept = {n: t for n, t in visible(update.state).items() if n in after}
            _add(terms, after.overlaid(kept), share)
        for layer, change in server.base.since(job.payload.base).items():
            terms.setdefault(layer, []).append(_scaled(change, share))
    return difference_norm(terms)


def _add(terms: Terms, adapter: Adapter, weight: float) -> None:
    """Add what an adapter does to each layer, times a weight."""
    for path in adapter.modules:
        if name_a(path) in adapter and name_b(path) in adapter:
            layer = layer_of(path)
            key = path if name_router(layer) in adapter else layer
            terms.setdefault(key, []).append(_scaled(adapter.product(path), weight))
    for layer in adapter.layers:
        if name_values(layer) in adapter:
            terms.setdefault(layer, []).append(adapter.sparse(layer) * weight)


def _scaled(change: Product | Tensor, weight: float) -> Product | Tensor:
    if isinstance(change, Product):
        return Product(change.b, change.a * weight)
    return change * weight
