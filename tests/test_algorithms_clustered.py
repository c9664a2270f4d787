"""What the specification says of methods that find clusters of clients: FedLEASE and HiLoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conformance.sanitiser import digest
from conformance.world import (
    CLIENTS,
    HEAD,
    NUM_SAMPLES,
    RANK,
    SCALING,
    SHAPES,
    FakeEngine,
    Federation,
    Round,
    assert_same,
    noise,
    run_jobs,
)
from torch import Tensor

from fedllm.adapters import (
    Adapter,
    Routing,
    clustering,
    in_slot,
    initial,
    is_b,
    is_head,
    name_a,
    name_b,
    name_router,
    slot_of,
)
from fedllm.algorithms import make
from fedllm.federation import Part, Update
from fedllm.system import RankRule

COHORTS = [(0, 1, 2), (1, 3), (0, 2), (0, 1, 2, 3), (2, 3), (1,)]
GROUPS = [(0, 2), (1, 3)]
PATHS = [name for m in SHAPES for name in (name_a(m), name_b(m))]


def digests(adapter: Adapter, *slots: str) -> dict[str, str]:
    """Hash the tensors of some slots."""
    return {n: digest(t) for n, t in adapter.tensors.items() if slot_of(n) in slots}


def alike(updates: Sequence[Update], strength: float = 100.0) -> list[Update]:
    """Return updates in which B of clients 0 and 2, and of 1 and 3, point nearly the same way."""
    found = []
    for update in updates:
        group = next(i for i, members in enumerate(GROUPS) if update.cid in members)
        common = {
            n: t + strength * noise(t.shape, "group", group, in_slot(n, ""))
            for n, t in update.adapter.tensors.items()
            if is_b(n)
        }
        found.append(replace(update, adapter=update.adapter.overlaid(common)))
    return found


def gathered(settings: dict[str, Any] | None = None, name: str = "fedlease") -> Federation:
    """Return a federation whose two groups of clients have just been told apart."""
    fed = Federation(
        name, {"warmup_rounds": 1, **(settings or {})} if name == "fedlease" else settings or {}
    )
    for _ in range(10):
        done = fed.train(CLIENTS)
        fed.finish(replace(done, updates=alike(done.updates)))
        if fed.server.members:  # type: ignore[attr-defined]
            return fed
    raise AssertionError("no clusters were found")


# the warm-up of FedLEASE


def test_clients_of_fedlease_train_alone_and_then_send_once() -> None:
    fed = Federation("fedlease", {"warmup_rounds": 3})
    alone = Federation("local-only")
    for version in range(3):
        assert list(fed.sampled(1)) == list(CLIENTS)
        done = fed.train(CLIENTS)
        alone.round()
        assert all(job.payload.nbytes == 0 for job in done.jobs)
        for update in done.updates:
            held = {n: digest(t) for n, t in alone.store.get(update.cid).items()}
            mine = update.state if version < 2 else update.adapter.tensors
            assert {n: digest(t) for n, t in mine.items()} == held
            assert bool(update.state) == (version < 2)
            assert bool(len(update.adapter)) == (version == 2)
        fed.finish(done)
        assert bool(fed.server.members) == (version == 2)  # type: ignore[attr-defined]
    assert len(fed.sampled(1)) == 1
    assert fed.store.clients() == []


def test_a_client_is_evaluated_with_what_it_trains_alone() -> None:
    fed = Federation("fedlease", {"warmup_rounds": 3})
    done = fed.round()
    for cid in CLIENTS:
        view = fed.server.view(cid, fed.store.get(cid)).adapter
        assert {n: digest(t) for n, t in view.tensors.items()} == {
            n: digest(done.trained[cid][n]) for n in view
        }
    assert not any(fed.global_view()[m].any() for m in SHAPES)


def test_fedlease_tells_groups_apart_and_founds_an_expert_for_each() -> None:
    fed = Federation("fedlease", {"warmup_rounds": 1})
    done = fed.train(CLIENTS)
    updates = alike(done.updates)
    fed.finish(replace(done, updates=updates))
    assert fed.server.members == {0: 0, 1: 1, 2: 0, 3: 1}  # type: ignore[attr-defined]
    for cluster, members in enumerate(GROUPS):
        for name in PATHS:
            mean = sum(updates[cid].adapter[name] for cid in members) / len(members)
            expert = fed.server.adapter[in_slot(name, f"expert{cluster}")]
            assert_same({name: expert}, {name: torch.as_tensor(mean)})
    assert not any(name in fed.server.adapter for name in PATHS)


@pytest.mark.parametrize("asked", [1, 2, 3, 4])
def test_the_number_of_clusters_may_be_given(asked: int) -> None:
    fed = gathered({"clusters": asked})
    assert len(set(fed.server.members.values())) == asked  # type: ignore[attr-defined]
    assert {slot_of(p) for p in fed.server.adapter.modules} == {f"expert{c}" for c in range(asked)}


def test_clusters_depend_neither_on_the_order_nor_on_the_size_of_b() -> None:
    fed = Federation("fedlease", {"warmup_rounds": 1})
    done = fed.train(CLIENTS)
    found = []
    for order, factor in [((0, 1, 2, 3), 1.0), ((3, 1, 0, 2), 1.0), ((2, 0, 3, 1), 7.5)]:
        fork = fed.fork()
        updates = [alike(done.updates, strength=2.0)[cid] for cid in order]
        bigger = [
            replace(
                u,
                adapter=u.adapter.overlaid(
                    {n: u.adapter[n] * factor for n in u.adapter if is_b(n)}
                ),
            )
            for u in updates
        ]
        fork.server.apply([Part(1.0, u) for u in bigger])
        found.append(fork.server.members)  # type: ignore[attr-defined]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0].values())) == 2


def test_one_expert_is_fedit() -> None:
    fed = Federation("fedlease", {"warmup_rounds": 1, "clusters": 1})
    base = Federation("fedit", {"weights": "uniform"})
    fed.round()
    base.round()
    assert_same(fed.global_view(), base.global_view())
    for cohort in COHORTS:
        # the fake engine knows no router, whose one output is always 1: both train as FedIT does
        jobs, others = fed.jobs(cohort), base.jobs(cohort)
        for job, other in zip(jobs, others, strict=True):
            assert job.payload.adapter.routing == Routing(("expert0",), top=1)
            assert {job.payload.adapter[name_router(m)].shape[0] for m in SHAPES} == {1}
            start = fed.client.start(job).body.moved("", of="expert0")
            for name in PATHS:
                assert_same({name: start[name]}, {name: other.payload.adapter[name]})
        trained = run_jobs(others, base.client, base.engine)
        base.server.apply([Part(1.0, u) for u in trained])
        sent = [
            replace(u, adapter=u.adapter.body.moved("expert0").overlaid({HEAD: u.adapter[HEAD]}))
            for u in trained
        ]
        fed.server.apply([Part(1.0, u) for u in sent])
        assert_same(fed.global_view(), base.global_view())


# the experts of FedLEASE


def test_a_client_receives_all_experts_and_its_clusters_router() -> None:
    fed = gathered()
    for cohort in COHORTS:
        for job in fed.round(cohort).jobs:
            received, own = job.payload.adapter, f"expert{job.cid % 2}"
            assert received.routing == Routing(("expert0", "expert1", own), top=2)
            assert {slot_of(p) for p in received.modules} == {"expert0", "expert1"}
            for m, (_, columns) in SHAPES.items():
                assert received[name_router(m)].shape == (3, columns)
    for job in fed.jobs(CLIENTS):
        for m in SHAPES:
            kept = fed.server.adapter[in_slot(name_router(m), f"expert{job.cid % 2}")]
            assert torch.equal(job.payload.adapter[name_router(m)], kept)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_the_own_expert_has_more_outputs_than_can_be_left_out(count: int) -> None:
    fed = gathered({"clusters": min(count, 4)})
    for job in fed.jobs(CLIENTS):
        routing = job.payload.adapter.routing
        assert routing is not None
        own = routing.slots[-1]
        others = [slot for slot in routing.slots if slot != own]
        assert len(routing.slots) == 2 * routing.top - 1
        assert len(others) == len(set(others)) == routing.top - 1


def test_a_client_trains_its_own_expert_and_router_only() -> None:
    fed = gathered()
    for cohort in COHORTS:
        done = fed.round(cohort)
        for request, end in done.fits:
            own, other = (f"expert{(request.job.cid + i) % 2}" for i in (0, 1))
            assert digests(end.adapter, other) == digests(request.start, other)
            assert not set(digests(end.adapter, own).items()) & set(
                digests(request.start, own).items()
            )
            for m in SHAPES:
                assert not torch.equal(end.adapter[name_router(m)], request.start[name_router(m)])
        for update in done.updates:
            own = f"expert{update.cid % 2}"
            routers = {name_router(m) for m in SHAPES}
            assert set(update.adapter) == {HEAD, *routers, *(in_slot(n, own) for n in PATHS)}
            assert update.state == {}


def test_experts_and_routers_are_averaged_within_their_cluster() -> None:
    fed = gathered()
    for cohort in COHORTS:
        before = fed.server.adapter
        done = fed.round(cohort)
        for cluster, members in enumerate(GROUPS):
            sent = [u.adapter for u in done.updates if u.cid in members]
            slot = f"expert{cluster}"
            names = [in_slot(n, slot) for n in PATHS]
            for name in [*names, *(name_router(m) for m in SHAPES)]:
                held = in_slot(name, slot)
                if not sent:
                    assert fed.server.adapter[held] is before[held]
                    continue
                mean = torch.stack([adapter[name] for adapter in sent]).mean(dim=0)
                assert_same({held: fed.server.adapter[held]}, {held: mean})


def test_a_client_that_missed_the_warm_up_joins_the_largest_cluster() -> None:
    fed = Federation("fedlease", {"warmup_rounds": 1, "clusters": 2})
    done = fed.train([0, 1, 3])
    fed.finish(replace(done, updates=alike(done.updates)))
    assert fed.server.members == {0: 0, 1: 1, 3: 1}  # type: ignore[attr-defined]
    for cohort in COHORTS:
        done = fed.round(cohort)
        for update in done.updates:
            if update.cid == 2:
                assert {slot_of(p) for p in update.adapter.modules} == {"expert1"}


def test_what_a_late_client_trained_alone_is_put_aside() -> None:
    fed = Federation("fedlease", {"warmup_rounds": 2, "clusters": 2})
    fed.round()
    assert fed.store.get(2)
    fed.round([0, 1, 3])
    start = fed.client.start(next(iter(fed.jobs([2]))))
    assert not set(PATHS) & set(start)
    fed.round([2])
    assert fed.store.get(2) == {}


def test_the_global_view_of_fedlease_is_a_plain_adapter_of_mean_experts() -> None:
    fed = gathered().run(rounds=3, cohort_size=2)
    view = fed.server.view().adapter
    assert view.routing is None
    assert set(view) == {*PATHS, HEAD}
    assert view.scaling == dict.fromkeys(SHAPES, SCALING)
    for name in PATHS:
        experts = [fed.server.adapter[in_slot(name, f"expert{c}")] for c in (0, 1)]
        assert_same({name: view[name]}, {name: (experts[0] + experts[1]) / 2})


def test_the_bytes_of_four_experts_are_those_of_the_specification() -> None:
    server, client = make("fedlease", {"warmup_rounds": 1, "clusters": 4})
    server.start(initial({"q": (768, 768)}, 8, 2.0, 0), RankRule((8,)), num_clients=4, rounds=3)
    engine = FakeEngine()
    for _ in range(2):
        jobs = [replace(job, steps=1, num_samples=10) for job in server.local_run(range(4))]
        # FakeEngine draws float64 noise and gives back float32
        updates = run_jobs(jobs, client, engine)
        down, up = jobs[0].payload.nbytes, updates[0].nbytes
        server.apply([Part(1.0, u) for u in updates])
    assert down == 4 * 49_152 + 768 * 7 * 4 == 218_112
    assert up == 49_152 + 768 * 7 * 4


# HiLoRA


STAGES = {"root_rounds": 2, "cluster_rounds": 2, "max_clusters": 2}


def split(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U_r and S_r V_r^T, by numpy."""
    u, s, vh = np.linalg.svd(product.numpy(), full_matrices=False)
    return torch.from_numpy(u[:, :rank]), torch.from_numpy(s[:rank, None] * vh[:rank])


def tier_product(adapter: Adapter, module: str, slot: str) -> Tensor:
    path = f"{module}:{slot}"
    return SCALING * adapter[name_b(path)] @ adapter[name_a(path)]


def run_hilora(
    rounds: int, settings: dict[str, Any] | None = None
) -> tuple[Federation, list[Round]]:
    """Return a federation of two groups after some rounds with everyone."""
    fed = Federation("hilora", {**STAGES, **(settings or {})})
    made = []
    for _ in range(rounds):
        done = fed.train(CLIENTS)
        if fed.server.stage == "root":
            done = replace(done, updates=alike(done.updates))
        made.append(fed.finish(done))
    return fed, made


def test_the_stages_of_hilora_follow_each_other() -> None:
    _, made = run_hilora(6)
    assert [done.jobs[0].stage for done in made] == ["root"] * 2 + ["cluster"] * 2 + ["leaf"] * 2
    for done in made:
        for request, end in done.fits:
            stage = request.job.stage
            slots = {slot_of(p) for p in request.start.modules}
            assert slots == {"root": {"root"}, "cluster": {"root", "cluster"}}.get(
                stage, {"root", "cluster", "leaf"}
            )
            frozen = [slot for slot in slots if slot != stage]
            assert digests(end.adapter, *frozen) == digests(request.start, *frozen)
            assert digests(end.adapter, stage) != digests(request.start, stage)
        for update in done.updates:
            sent = {slot_of(n) for n in update.adapter if not is_head(n)}
            assert sent == ({update.stage} if update.stage != "leaf" else set())
            assert {slot_of(n) for n in update.state} == (
                {"leaf"} if update.stage == "leaf" else set()
            )


@pytest.mark.parametrize(
    ("rounds", "settings", "ends"),
    [
        (50, {}, (15, 35)),
        (10, {}, (3, 7)),
        (1, {}, (1, 1)),
        (50, {"root_rounds": 4}, (4, 24)),
        (50, {"root_rounds": 4, "cluster_rounds": 0}, (4, 4)),
    ],
)
def test_stage_lengths_follow_from_the_run_unless_they_are_given(
    rounds: int, settings: dict[str, int], ends: tuple[int, int]
) -> None:
    assert Federation("hilora", settings, total_rounds=rounds).server.ends == ends  # type: ignore[attr-defined]


def test_the_last_round_of_the_root_asks_everyone() -> None:
    fed = Federation("hilora", STAGES)
    sizes = []
    for _ in range(6):
        cohort = fed.sampled(2)
        sizes.append(len(cohort))
        fed.round(cohort)
    assert sizes == [2, 4, 2, 2, 2, 2]
    assert set(fed.server.members) == set(CLIENTS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("end", [2, 4])
def test_starting_a_tier_changes_no_model(end: int) -> None:
    fed, _ = run_hilora(end - 1)
    done = fed.train(CLIENTS)
    if end == 2:
        done = replace(done, updates=alike(done.updates))
    fed.finish(done)
    tier = "root" if end == 2 else "cluster"
    for cid in CLIENTS:
        view = fed.server.view(cid, fed.store.get(cid)).adapter
        assert {slot_of(p) for p in view.modules} == (
            {"root", "cluster"} if end == 2 else {"root", "cluster", "leaf"}
        )
        for m in SHAPES:
            kept = [
                tier_product(view, m, t) for t in (("root",) if end == 2 else ("root", "cluster"))
            ]
            assert_same({m: fed.client_view(cid)[m]}, {m: torch.stack(kept).sum(dim=0)})
            newest = "cluster" if tier == "root" else "leaf"
            assert view[name_a(f"{m}:{newest}")].any()
            assert not torch.equal(view[name_a(f"{m}:{newest}")], view[name_a(f"{m}:root")])


def test_the_root_is_the_split_of_the_mean_product_of_everyone() -> None:
    fed = Federation("hilora", {"root_rounds": 100})
    for cohort in COHORTS:
        done = fed.round(cohort)
        for m in SHAPES:
            ideal = sum(
                done.shares[u.cid] * tier_product(u.adapter, m, "root") for u in done.updates
            )
            u, rows = split(torch.as_tensor(ideal), RANK)
            a, b = (fed.server.adapter[n(f"{m}:root")] for n in (name_a, name_b))
            assert_same({m: b.T @ b}, {m: torch.eye(RANK, dtype=b.dtype)})
            assert_same({m: b @ b.T}, {m: u @ u.T})
            assert_same({m: SCALING * b @ a}, {m: u @ rows})
            assert_same({m: SCALING * (a @ a.T).sqrt().diag()}, {m: rows.norm(dim=1)})


def test_each_cluster_has_a_split_of_its_own() -> None:
    fed, _ = run_hilora(2)
    assert fed.server.members == {0: 0, 1: 1, 2: 0, 3: 1}  # type: ignore[attr-defined]
    root = digests(fed.server.adapter, "root")
    for cohort in [(0, 1, 2), (1, 3)]:
        before = fed.server.adapter
        done = fed.round(cohort)
        assert digests(fed.server.adapter, "root") == root
        for cluster, members in enumerate(GROUPS):
            sent = {u.cid: u.adapter for u in done.updates if u.cid in members}
            if not sent:
                assert digests(fed.server.adapter, f"cluster{cluster}") == digests(
                    before, f"cluster{cluster}"
                )
                continue
            rows = sum(NUM_SAMPLES[cid] for cid in sent)
            for m in SHAPES:
                ideal = sum(
                    NUM_SAMPLES[cid] / rows * tier_product(adapter, m, "cluster")
                    for cid, adapter in sent.items()
                )
                u, right = split(torch.as_tensor(ideal), RANK)
                found = tier_product(fed.server.adapter, m, f"cluster{cluster}")
                assert_same({m: found}, {m: u @ right})
                b = fed.server.adapter[name_b(f"{m}:cluster{cluster}")]
                assert_same({m: b.T @ b}, {m: torch.eye(RANK, dtype=b.dtype)})


def test_the_server_follows_where_each_b_points() -> None:
    fed = Federation("hilora", {"root_rounds": 100, "decay": 0.75})
    wanted: dict[int, dict[str, Tensor]] = {}
    for cohort in COHORTS:
        done = fed.round(cohort)
        for update in done.updates:
            for m in SHAPES:
                name = name_b(f"{m}:root")
                b = update.adapter[name]
                past = wanted.setdefault(update.cid, {}).get(name, torch.zeros_like(b))
                wanted[update.cid][name] = 0.75 * past + 0.25 * b / b.norm()
    found = fed.server.directions  # type: ignore[attr-defined]
    assert set(found) == set(wanted) == set(CLIENTS)
    for cid, tensors in wanted.items():
        assert_same(found[cid].tensors, tensors)
    distances = clustering.subspace_distances([found[cid] for cid in CLIENTS], RANK)
    assert distances.min() >= 0
    assert distances.max() <= 1
    turned = []
    for cid in CLIENTS:
        turn = torch.linalg.qr(noise((RANK, RANK), "turn", cid)).Q
        turned.append(Adapter({n: t @ turn for n, t in found[cid].tensors.items()}))
    assert np.allclose(clustering.subspace_distances(turned, RANK), distances)


def test_directions_are_forgotten_once_there_are_clusters() -> None:
    fed, _ = run_hilora(3)
    assert fed.server.directions == {}  # type: ignore[attr-defined]


def test_a_client_that_was_never_clustered_joins_the_largest_cluster() -> None:
    fed = Federation("hilora", {"root_rounds": 1, "max_clusters": 2})
    done = fed.train([0, 1, 3])
    fed.finish(replace(done, updates=alike(done.updates)))
    members = fed.server.members  # type: ignore[attr-defined]
    assert members == {0: 0, 1: 1, 3: 1}
    (job,) = fed.jobs([2])
    for m in SHAPES:
        b = fed.server.adapter[name_a(f"{m}:cluster1")]
        assert torch.equal(job.payload.adapter[name_a(f"{m}:cluster")], b)
    fed.round([2])
    assert fed.server.adapter[name_b("h.0.c_attn:cluster1")].any()
    assert not fed.server.adapter[name_b("h.0.c_attn:cluster0")].any()


def penalty_by_hand(view: Adapter, tier: str, weights: dict[str, float]) -> float:
    total = 0.0
    for m in SHAPES:
        for slot, weight in weights.items():
            product = view[name_b(f"{m}:{slot}")].T @ view[name_b(f"{m}:{tier}")]
            total += weight * float(product.square().sum())
    return total


def test_later_tiers_pay_for_overlapping_with_earlier_ones() -> None:
    settings = {"root_penalty": 0.3, "cluster_penalty": 0.2}
    fed, made = run_hilora(6, settings)
    wanted = {"root": {}, "cluster": {"root": 0.3}, "leaf": {"root": 0.3, "cluster": 0.2}}
    for done in made:
        for request, end in done.fits:
            stage = request.job.stage
            live = {
                n: t for n, t in end.adapter.tensors.items() if fed.client.trainable(n, request.job)
            }
            penalty = fed.client.penalty(live, request.job)
            if stage == "root":
                assert penalty is None
                continue
            assert penalty is not None
            by_hand = penalty_by_hand(end.adapter, stage, wanted[stage])
            assert by_hand > 1e-3
            assert float(penalty) == pytest.approx(by_hand)


def test_a_step_down_the_penalty_by_hand() -> None:
    fed, _ = run_hilora(3, {"root_penalty": 0.3})
    fed.engine, fed.steps, fed.learning_rate = FakeEngine("quadratic"), 1, 0.01
    done = fed.round()
    m = "layers.0.q_proj"
    (request, end) = next((r, e) for r, e in done.fits if r.job.cid == 1)
    start = request.start
    root, b, a = (
        start[n] for n in (name_b(f"{m}:root"), name_b(f"{m}:cluster"), name_a(f"{m}:cluster"))
    )
    gap = tier_product(start, m, "root") + tier_product(start, m, "cluster")
    gap = gap - noise(SHAPES[m], "target", 1, m)
    slope = SCALING * gap @ a.T + 0.3 * 2 * root @ (root.T @ b)
    assert_same({m: end.adapter[name_b(f"{m}:cluster")]}, {m: b - 0.01 * slope})


def test_tiers_that_are_done_travel_once_and_leaves_never() -> None:
    fed, _ = run_hilora(2)
    head = fed.server.adapter[HEAD].nbytes
    tier = sum(RANK * (o + i) for o, i in SHAPES.values()) * 8
    sizes = {}
    for cohort in [(0,), (0, 1), (0,), (0, 2), (2,)]:
        done = fed.round(cohort)
        sizes |= {
            (j.version, j.cid): (j.payload.nbytes, u.nbytes)
            for j, u in zip(done.jobs, done.updates, strict=True)
        }
    assert sizes == {
        (2, 0): (2 * tier + head, tier + head),  # the root's end, and the cluster's first
        (3, 0): (tier + head, tier + head),
        (3, 1): (2 * tier + head, tier + head),
        (4, 0): (tier + head, 0),
        (5, 0): (0, 0),
        (5, 2): (2 * tier + head, 0),  # it saw the root's last round, not its result
        (6, 2): (0, 0),
    }


def test_the_global_view_of_hilora_is_the_root_as_a_plain_adapter() -> None:
    fed, _ = run_hilora(5)
    view = fed.server.view().adapter
    assert set(view) == {*PATHS, HEAD}
    for name in PATHS:
        assert torch.equal(view[name], fed.server.adapter[in_slot(name, "root")])


def test_a_shared_head_rests_while_leaves_are_trained_and_a_local_one_does_not() -> None:
    for head, moves in (("shared", False), ("local", True), ("frozen", False)):
        fed = Federation("hilora", STAGES, head=head)  # type: ignore[arg-type]
        for _ in range(4):
            fed.round()
        before = digest(fed.client_view(1)[HEAD])
        fed.round()
        assert (digest(fed.client_view(1)[HEAD]) != before) == moves


# both


@pytest.mark.parametrize("name", ["fedlease", "hilora", "fine-tune", "feddpa-f"])
def test_an_update_of_an_earlier_stage_is_dropped(name: str) -> None:
    settings = {
        "fedlease": {"warmup_rounds": 2},
        "hilora": STAGES,
        "fine-tune": {"tune_rounds": 4},
        "feddpa-f": {"personal_rounds": 4},
    }[name]
    fed = Federation(name, settings)
    fed.round()
    done = fed.train([0])
    (old,) = done.updates
    assert fed.server.rebase(old, done.jobs[0]) is not None
    fed.round()
    assert fed.server.stage != old.stage
    assert fed.server.rebase(old, done.jobs[0]) is None


@pytest.mark.parametrize("settings", [{"max_clusters": 3}, {"clusters": 3}])
def test_clusters_of_shapes_alone_are_some_clusters(settings: dict[str, int]) -> None:
    fed = Federation("fedlease", {"warmup_rounds": 1, **settings}, device="meta")
    updates = [
        Update(job.cid, 0, job.payload.adapter, 10, 1, stage=job.stage) for job in fed.jobs(CLIENTS)
    ]
    fed.server.apply([Part(1.0, u) for u in updates])
    assert set(fed.server.members) == set(CLIENTS)  # type: ignore[attr-defined]
    assert all(t.is_meta for t in fed.server.adapter.tensors.values())
