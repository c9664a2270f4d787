"""What every algorithm must do with private tensors and with heads that are trained in full."""

from __future__ import annotations

import pytest
import torch
from conformance.sanitiser import digest
from conformance.setups import (
    Setup,
    each_head,
    each_setup,
    each_that_holds,
)
from conformance.world import HEAD, assert_same

from fedllm.federation import HeadPolicy, visible


@each_setup
@each_head
def test_private_tensors_survive_whatever_ran_in_between(setup: Setup, head: HeadPolicy) -> None:
    fed = setup.start(head=head)
    kept: dict[int, dict[str, str]] = {}
    for cohort in [(0, 1), (2, 3), (1, 2), (0, 3), (0, 1, 2, 3)]:
        done = fed.train(cohort)
        for job, update in zip(done.jobs, done.updates, strict=True):
            start = fed.client.start(job)
            private = [n for n in start if fed.client.kept(n, job)]
            assert bool(private) >= (head == "local")
            assert set(private) == set(visible(update.state))
            assert bool(set(private) & set(update.adapter)) <= setup.case.sends_private
            first = {n: digest(job.payload.adapter[n]) for n in private}
            expected = {n: kept.get(job.cid, {}).get(n, first[n]) for n in private}
            assert {n: digest(start[n]) for n in private} == expected
            kept[job.cid] = {n: digest(t) for n, t in visible(update.state).items()}
            ended = {digest(t) for end in done.ends(job.cid) for t in end.tensors.values()}
            assert set(kept[job.cid].values()) <= ended
        fed.finish(done)


@each_that_holds("head mean")
def test_a_shared_head_is_the_weighted_mean(setup: Setup) -> None:
    fed = setup.build()
    done = fed.round((0, 2, 3))
    if not setup.case.shares_head:
        assert digest(fed.server.adapter[HEAD]) == digest(done.before.adapter[HEAD])
        return
    for update in done.updates:
        ended = {digest(end[HEAD]) for end in done.ends(update.cid)}
        assert digest(update.adapter[HEAD]) in ended
    weights = {u.cid: fed.server.weight(u) for u in done.updates}
    total = sum(weights.values())
    wanted = sum(weights[u.cid] / total * u.adapter[HEAD] for u in done.updates)
    assert_same({HEAD: fed.server.adapter[HEAD]}, {HEAD: torch.as_tensor(wanted)})


@each_setup
@pytest.mark.parametrize("head", ["local", "frozen"])
def test_a_head_that_is_not_shared_never_travels(setup: Setup, head: HeadPolicy) -> None:
    fed = setup.start(head=head)
    start = digest(fed.server.adapter[HEAD])
    for _ in range(3):
        done = fed.round((0, 1, 3))
        assert all(HEAD in job.payload.known for job in done.jobs)
        assert all(HEAD not in update.adapter for update in done.updates)
        assert digest(fed.server.adapter[HEAD]) == start
    moved = digest(fed.client_view(0)[HEAD]) != start
    assert moved == (head == "local")
    assert digest(fed.client_view(2)[HEAD]) == start
