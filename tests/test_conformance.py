"""What every algorithm must hold when it aggregates: invariants G1 to G5, G8 and G9, heads, ranks.

Nothing here asks for an algorithm's name; what differs between algorithms stands in
`conformance/cases.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from conformance.cases import CASES, Case, both
from conformance.sanitiser import digest, tensors_in
from conformance.setups import (
    SETUPS,
    Setup,
    each_case,
    each_dtype,
    each_head,
    each_setup,
    each_that_holds,
)
from conformance.world import CLIENTS, HEAD, NUM_SAMPLES, SHAPES, assert_same, effective, run_jobs

from fedllm.adapters import Adapter, layer_of, name_a, name_b
from fedllm.algorithms import ALGORITHMS, problems, server_class
from fedllm.federation import HeadPolicy, Part


def test_every_algorithm_has_a_row_in_the_table() -> None:
    assert {case.name for case in CASES} == set(ALGORITHMS)


@each_case
def test_row_and_class_make_the_same_promises(case: Case) -> None:
    cls = server_class(case.name)
    assert (cls.is_personal, cls.mixed_rank) == (case.personal, case.mixed_rank)


@each_case
def test_mixed_ranks_are_refused_exactly_where_they_are_undefined(case: Case) -> None:
    assert problems(case.name, case.settings) == []
    refusals = problems(case.name, case.settings, mixed_rank=True)
    if case.mixed_rank != "unsupported":
        assert refusals == []
        return
    (refusal,) = refusals
    assert refusal.startswith("adapter.rank:")
    able = [c.name for c in CASES if c.mixed_rank != "unsupported"]
    assert all(name in refusal for name in able)


@each_setup
def test_training_moves_what_each_client_is_evaluated_with(setup: Setup) -> None:
    fed = setup.build()
    before = {cid: fed.client_view(cid) for cid in CLIENTS}
    fed.run(rounds=3)
    for cid in CLIENTS:
        after = fed.client_view(cid)
        assert all(float((after[n] - before[cid][n]).norm()) > 1e-3 for n in after)


@each_setup
def test_the_same_seed_gives_the_same_run_and_another_seed_another(setup: Setup) -> None:
    first, again, other = (setup.build(seed=seed).run(cohort_size=2) for seed in (1, 1, 2))
    assert first.server.adapter.digest() == again.server.adapter.digest()
    assert [j.cid for r in first.rounds for j in r.jobs] == [
        j.cid for r in again.rounds for j in r.jobs
    ]
    assert first.views().keys() == other.views().keys()
    assert any(not torch.equal(t, other.views()[n]) for n, t in first.views().items())


@each_that_holds("zero-step")
@each_dtype
def test_zero_steps_leave_every_view_unchanged(setup: Setup, dtype: torch.dtype) -> None:
    fed = setup.build(dtype=dtype).run(rounds=2)
    before = fed.views()
    fed.steps = 0
    fed.round()
    assert_same(fed.views(), before, setup.tolerance(dtype))


@each_that_holds("one client")
@each_dtype
@pytest.mark.parametrize("cid", CLIENTS)
def test_one_client_alone_becomes_the_view(setup: Setup, dtype: torch.dtype, cid: int) -> None:
    fed = setup.build(dtype=dtype).run(rounds=2)
    done = fed.round([cid])
    wanted = effective(done.trained[cid], done.jobs[0].payload.base)
    assert_same(fed.client_view(cid), wanted, setup.tolerance(dtype))
    if not (setup.case.personal or setup.mixed):
        assert_same(fed.global_view(), wanted, setup.tolerance(dtype))


@each_that_holds("identical clients")
@each_dtype
@pytest.mark.parametrize("weights", [(0.4, 0.3, 0.2, 0.1), (1.0, 1.0, 1.0, 1.0), (97.0, 0.5, 1, 1)])
def test_identical_clients_count_as_one(
    setup: Setup, dtype: torch.dtype, weights: tuple[float, ...]
) -> None:
    fed = setup.build(dtype=dtype).run(rounds=2)
    done = fed.train([1])
    (update,) = done.updates
    fed.store.put(1, update.state)
    parts = [Part(w, replace(update, cid=c)) for w, c in zip(weights, CLIENTS, strict=True)]
    fed.server.apply(parts)
    wanted = effective(done.trained[1], done.jobs[0].payload.base)
    assert_same(fed.client_view(1), wanted, setup.tolerance(dtype))


@pytest.mark.parametrize("setup", [s for s in SETUPS if s.is_exact], ids=str)
@each_dtype
@pytest.mark.parametrize("cohort_size", [4, 2])
def test_exact_methods_reach_the_ideal_update(
    setup: Setup, dtype: torch.dtype, cohort_size: int
) -> None:
    fed = setup.build(dtype=dtype)
    for _ in range(3):
        done = fed.round(fed.sampled(cohort_size))
        view = fed.global_view()
        assert_same({m: view[m] for m in SHAPES}, done.ideal(), setup.tolerance(dtype))


@each_setup
@each_head
def test_an_upload_depends_neither_on_order_nor_on_company(setup: Setup, head: HeadPolicy) -> None:
    fed = setup.build(head=head).run(rounds=2, cohort_size=2)
    jobs = fed.jobs(CLIENTS)
    together = run_jobs(jobs, fed.client, fed.engine)
    backwards = run_jobs(jobs[::-1], fed.client, fed.engine)[::-1]
    alone = [run_jobs([job], fed.client, fed.engine)[0] for job in jobs[::-1]][::-1]
    for variants in zip(together, backwards, alone, strict=True):
        first, *others = ({p: digest(t) for p, t in tensors_in(u, "update")} for u in variants)
        assert first
        assert all(first == other for other in others)


@each_setup
def test_the_aggregate_does_not_depend_on_the_order_of_updates(setup: Setup) -> None:
    fed = setup.build().run(rounds=2)
    done = fed.train(CLIENTS)
    seen = []
    for updates in itertools.islice(itertools.permutations(done.updates), 0, 24, 5):
        fork = fed.fork()
        fork.finish(replace(done, updates=list(updates)))
        seen.append(fork.views())
    for views in seen[1:]:
        assert_same(views, seen[0])


@each_setup
def test_what_is_frozen_keeps_its_digest(setup: Setup) -> None:
    fed = setup.build(head="frozen")
    for _ in range(4):
        before = fed.server.adapter
        done = fed.round()
        seen, live = set(), set()
        for request, result in done.fits:
            frozen = [n for n in request.start if not fed.client.trainable(n, request.job)]
            assert HEAD in frozen
            for name in frozen:
                assert digest(result.adapter[name]) == digest(request.start[name])
            seen |= set(request.start)
            live |= set(request.start) - set(frozen)
        for name in seen - live:  # frozen in every pass of everyone
            assert all(name not in update.adapter for update in done.updates)
            if name in before and name in fed.server.adapter and not setup.case.reworks_frozen:
                assert digest(fed.server.adapter[name]) == digest(before[name])


@each_setup
def test_weights_count_relative_to_each_other(setup: Setup) -> None:
    fed = setup.build().run(rounds=2)
    done = fed.train(CLIENTS)
    views = []
    for factor in (1.0, 1e-3, 250.0):
        fork = fed.fork()
        fork.server.apply([Part(factor * NUM_SAMPLES[u.cid], u) for u in done.updates])
        views.append(fork.views())
    assert_same(views[1], views[0])
    assert_same(views[2], views[0])


@pytest.mark.parametrize("case", [c for c in CASES if not c.own_weights], ids=str)
def test_clients_weigh_by_their_samples_or_all_alike(case: Case) -> None:
    fed = Setup(case).build()
    uniform = Setup(replace(case, settings={**case.settings, "weights": "uniform"})).build()
    updates = fed.train(CLIENTS).updates
    assert [fed.server.weight(u) for u in updates] == [40.0, 30.0, 20.0, 10.0]
    assert [uniform.server.weight(u) for u in updates] == [1.0] * 4


@pytest.mark.parametrize("setup", [s for s in SETUPS if not s.case.own_weights], ids=str)
@pytest.mark.parametrize("absent", [0, 3], ids=["first", "last"])
@pytest.mark.parametrize("module", list(SHAPES))
def test_weights_are_normalised_for_each_module_over_those_that_sent_it(
    setup: Setup, absent: int, module: str
) -> None:
    fed = setup.build().run(rounds=2)
    done = fed.train(CLIENTS)
    lacking = [
        replace(u, adapter=u.adapter.select(lambda n: layer_of(n) != module))
        if u.cid == absent
        else u
        for u in done.updates
    ]
    some, everyone, without = fed.fork(), fed.fork(), fed.fork()
    some.finish(replace(done, updates=lacking))
    everyone.finish(done)
    without.finish(replace(done, updates=[u for u in done.updates if u.cid != absent]))
    # the absent client's own state differs between the forks, so it is not compared
    cids = [cid for cid in CLIENTS if cid != absent]
    for cid in cids:
        whole, less = everyone.client_view(cid), without.client_view(cid)
        wanted = {n: less[n] if layer_of(n) == module else t for n, t in whole.items()}
        assert_same(some.client_view(cid), wanted)


@each_setup
def test_the_global_adapter_keeps_its_shapes_whoever_takes_part(setup: Setup) -> None:
    fed = setup.build()
    shapes = {n: (t.shape, t.dtype) for n, t in fed.server.adapter.tensors.items()}
    for cohort in [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (1, 2), (0, 3)]:
        fed.round(cohort)
        now = {n: (t.shape, t.dtype) for n, t in fed.server.adapter.tensors.items()}
        assert now == shapes
        assert all(bool(t.isfinite().all()) for t in fed.views().values())


@pytest.mark.parametrize(
    "setup",
    [
        s
        for s in SETUPS
        if s.mixed and s.case.mixed_rank == "padded" and s.holds("unsent component")
    ],
    ids=str,
)
def test_a_component_that_nobody_sent_stays_as_it_is(setup: Setup) -> None:
    fed = setup.build().run(rounds=2)
    largest = max(CLIENTS, key=fed.ranks.of)
    smallest = min(CLIENTS, key=fed.ranks.of)
    before = fed.client_view(largest)
    rank = fed.ranks.of(smallest)
    fed.steps = 0
    fed.round([smallest])
    assert fed.server.adapter.rank > rank
    assert_same(fed.client_view(largest), before)


@each_setup
def test_no_component_that_a_client_receives_is_dead(setup: Setup) -> None:
    # a zero row of A with a zero column of B has no gradient: that rank is lost for ever
    fed = setup.build()
    by_rank = sorted(CLIENTS, key=fed.ranks.of)
    for cohort in (by_rank[:1], by_rank[:2], by_rank[1:3], by_rank):
        fed.round(cohort)
        for job in fed.jobs(CLIENTS):
            start = fed.client.start(job)
            for path in start.modules:
                sizes = start[name_a(path)].norm(dim=1) + start[name_b(path)].norm(dim=0)
                assert int((sizes > 1e-6).sum()) >= min(
                    start.rank_of(path), *SHAPES[layer_of(path)]
                )


@pytest.mark.parametrize("setup", [s for s in SETUPS if s.case.up is both], ids=str)
def test_an_update_is_read_in_its_own_scaling(setup: Setup) -> None:
    fed = setup.build().run(rounds=2)
    done = fed.train(CLIENTS)
    plain, rescaled = fed.fork(), fed.fork()
    plain.finish(done)
    other = []
    for update, c in zip(done.updates, (0.5, 1.0, 2.0, 3.0), strict=True):
        tensors = {n: t if n == HEAD else t / c for n, t in update.adapter.tensors.items()}
        scaling = {m: s * c**2 for m, s in update.adapter.scaling.items()}
        other.append(replace(update, adapter=Adapter(tensors, scaling)))
    rescaled.finish(replace(done, updates=other))
    assert_same(rescaled.views(), plain.views())


@pytest.mark.parametrize("case", [c for c in CASES if not c.own_download], ids=str)
def test_a_client_that_skipped_starts_where_the_others_start(case: Case) -> None:
    fed = Setup(case).build()
    for _ in range(3):
        fed.round([0, 1, 2])
    steady, late = (next(j for j in fed.jobs(CLIENTS) if j.cid == cid) for cid in (0, 3))
    assert_same(
        effective(late.payload.adapter, late.payload.base),
        effective(steady.payload.adapter, steady.payload.base),
    )
    if not case.personal:
        assert_same(
            effective(fed.client.start(late), late.payload.base),
            effective(fed.client.start(steady), steady.payload.base),
        )


@pytest.mark.parametrize("case", [c for c in CASES if c.own_download], ids=str)
def test_what_a_client_receives_does_not_depend_on_when_it_came_last(case: Case) -> None:
    fed = Setup(case).build()
    for _ in range(3):
        fed.round([0, 1, 2])
    steady, never = fed.fork(), fed.fork()
    steady.server.contacts[3] = fed.server.version - 1
    never.server.contacts.pop(3, None)
    received = [f.jobs([3])[0].payload for f in (fed, steady, never)]
    wanted = effective(received[0].adapter, received[0].base)
    for payload in received[1:]:
        assert_same(effective(payload.adapter, payload.base), wanted)
