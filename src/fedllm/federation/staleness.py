"""Updates that started from an earlier version, and today's model as a participant of its own.

An aggregation weighs updates by w_k and today's model by w_0 = 1 - sum_k w_k (algorithms are asked
nothing else). For FedBuff and tiers an update counts as a change of today's model,
x_now + (x_k - x_then), so that with w_k = eta s(d_k) / K

    w_0 x_now + sum_k w_k (x_now + x_k - x_then) = x_now + eta / K sum_k s(d_k) (x_k - x_then).

FedAsync mixes x_k itself: (1 - w) x_now + w x_k. That is defined where tensors of two versions can
be added; everywhere else it is the change that counts, too. What "change" is, the algorithm says
(`BaseServer.rebase`): of factors, or of products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedllm.federation.base import BaseServer
from fedllm.federation.messages import ClientId, Job, Part

_ROUNDING = 1e-9
"""How far weights that are meant to sum to 1 may be from it."""


def is_mean(server: BaseServer, parts: Sequence[Part]) -> bool:
    """Tell whether parts make a mean of today's updates: all fresh, with weights that sum to 1.

    Of others nobody can say what the ideal aggregate would be (`agg_error`).
    """
    total = sum(weight for weight, _ in parts)
    is_fresh = all(update.version == server.version for _, update in parts)
    return is_fresh and abs(total - 1.0) <= _ROUNDING


def fresh_parts(
    server: BaseServer, parts: Sequence[Part], jobs: Mapping[ClientId, Job], *, is_change: bool
) -> list[Part]:
    """Return what a server aggregates: every update in today's coordinates, and today's model.

    Where all updates are fresh and weights sum to 1, they come back as they are.

    Args:
        server: Before the aggregation.
        parts: Weights, which need not sum to 1, and updates.
        jobs: Client to the job that its update answers.
        is_change: Whether a late update counts as a change of today's model.
    """
    fresh, version = [], server.version
    for part in parts:
        weight, update = part
        if update.version < version and (is_change or server.recoordinated):
            brought = server.rebase(update, jobs[update.cid])
            if brought is not None:
                fresh.append(Part(weight, brought))
        else:
            fresh.append(part)
    rest = 1.0 - sum([weight for weight, _ in fresh])
    if fresh and abs(rest) > _ROUNDING:
        fresh.append(Part(rest, server.present(fresh)))
    return fresh
