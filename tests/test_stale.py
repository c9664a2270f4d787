"""Late updates: FedAsync, FedBuff and tiers by their equations, for every algorithm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from conformance.cases import CASES
from conformance.setups import SETUPS, Setup
from conformance.world import (
    CLIENTS,
    SHAPES,
    FakeEngine,
    Federation,
    assert_same,
    effective,
)
from loop_worlds import Slow, build, fate, loop_of, told
from safetensors.torch import load, save
from torch import Tensor

from fedllm.adapters import BaseDelta
from fedllm.algorithms import ALGORITHMS, SCHEDULES, problems, server_class
from fedllm.config import Config
from fedllm.experiment.run import CODEC
from fedllm.federation import NOBODY, FitRequest, FitResult, Part, Progress
from fedllm.federation.staleness import fresh_parts, is_mean
from fedllm.simulation import Async, Buffered, Schedule, SemiSync, Sequential

STREAMS = ("buffered", "async", "semi-sync")


def is_defined(setup: Setup, schedule: str) -> bool:
    return schedule not in refused(setup)


def refused(setup: Setup) -> Mapping[str, str]:
    settings = dict(setup.case.settings)
    return server_class(setup.case.name, settings.get("optimizer")).refused_schedules


def is_linear(setup: Setup) -> bool:
    settings = dict(setup.case.settings)
    cls = server_class(setup.case.name, settings.get("optimizer"))
    return not cls.recoordinated and not hasattr(cls, "step")


LATE = [setup for setup in SETUPS if is_defined(setup, "buffered")]
LINEAR = [setup for setup in LATE if is_linear(setup) and not setup.mixed]
each_late = pytest.mark.parametrize("setup", LATE, ids=str)
each_linear = pytest.mark.parametrize("setup", LINEAR, ids=str)


def late_round(fed: Federation, cids: tuple[int, ...], versions: int = 2) -> Any:
    """Train some clients, and let others make versions meanwhile."""
    late = fed.train(cids)
    for _ in range(versions):
        fed.round([cid for cid in CLIENTS if cid not in cids])
    return late


def jobs_of(done: Any) -> dict[int, Any]:
    return {job.cid: job for job in done.jobs}


def aggregate(fed: Federation, parts: list[Part], jobs: Any, *, is_change: bool) -> None:
    fed.server.apply(fresh_parts(fed.server, parts, jobs, is_change=is_change))


# fresh updates


@pytest.mark.parametrize("setup", SETUPS, ids=str)
@pytest.mark.parametrize("is_change", [False, True])
def test_fresh_updates_whose_weights_sum_to_one_come_back_as_they_are(
    setup: Setup, is_change: bool
) -> None:
    fed = setup.build()
    done = fed.train(CLIENTS)
    parts = [Part(share, u) for share, u in zip(done.shares.values(), done.updates, strict=True)]
    found = fresh_parts(fed.server, parts, jobs_of(done), is_change=is_change)
    assert all(ours is theirs.update for (_, ours), theirs in zip(found, parts, strict=True))
    assert [part.weight for part in found] == [part.weight for part in parts]


def test_what_is_left_over_is_todays_model_s() -> None:
    fed = Federation("ffa-lora")
    done = fed.train((1,))
    found = fresh_parts(fed.server, [Part(0.3, done.updates[0])], jobs_of(done), is_change=True)
    assert [part.weight for part in found] == pytest.approx([0.3, 0.7])
    present = found[1].update
    assert present.cid == NOBODY
    assert set(present.adapter) == set(done.updates[0].adapter)
    assert all(present.adapter[name] is fed.server.adapter[name] for name in present.adapter)
    assert not is_mean(fed.server, found[:1])


def test_more_than_all_the_weight_leaves_a_negative_rest() -> None:
    fed = Federation("fedit")
    done = fed.train((1,))
    start, sent = fed.server.adapter, done.updates[0].adapter
    aggregate(fed, [Part(1.5, done.updates[0])], jobs_of(done), is_change=True)
    for name, tensor in sent.tensors.items():
        wanted = start[name] + 1.5 * (tensor - start[name])
        torch.testing.assert_close(fed.server.adapter[name], wanted)


# FedAsync


@each_linear
def test_fedasync_mixes_the_model_itself(setup: Setup) -> None:
    fed = setup.build()
    done = late_round(fed, (2,))
    now, (sent,) = fed.server.adapter, done.updates
    aggregate(fed, [Part(0.25, sent)], jobs_of(done), is_change=False)
    for name, tensor in sent.adapter.tensors.items():
        wanted = 0.75 * now[name] + 0.25 * tensor
        torch.testing.assert_close(fed.server.adapter[name], wanted, atol=1e-12, rtol=1e-9)
    others = [name for name in now if name not in sent.adapter]
    assert all(torch.equal(fed.server.adapter[name], now[name]) for name in others)


@each_linear
def test_fedasync_with_alpha_one_takes_the_model_bit_for_bit(setup: Setup) -> None:
    fed = setup.build()
    done = late_round(fed, (2,))
    (sent,) = done.updates
    aggregate(fed, [Part(1.0, sent)], jobs_of(done), is_change=False)
    for name, tensor in sent.adapter.tensors.items():
        assert torch.equal(fed.server.adapter[name], tensor)


# FedBuff


@each_linear
def test_fedbuff_adds_discounted_changes(setup: Setup) -> None:
    fed = setup.build()
    done = late_round(fed, (1, 2))
    now, jobs = fed.server.adapter, jobs_of(done)
    weights = {1: 0.35, 2: 0.2}
    parts = [Part(weights[update.cid], update) for update in done.updates]
    aggregate(fed, parts, jobs, is_change=True)
    for name in {name for update in done.updates for name in update.adapter}:
        own = [u for u in done.updates if name in u.adapter]
        total = sum(
            weights[u.cid] * (u.adapter[name] - jobs[u.cid].payload.adapter[name]) for u in own
        )
        if len(own) < 2:  # averaged over those that sent it, and today's model
            total = total / (weights[own[0].cid] + 1.0 - sum(weights.values()))
        wanted = now[name] + total
        torch.testing.assert_close(fed.server.adapter[name], wanted, atol=1e-12, rtol=1e-9)


def test_a_buffer_of_one_is_not_fedasync() -> None:
    # algorithms.md 6.2, invariant 1: they differ by alpha (x - x_then)
    alpha, models = 0.4, []
    for is_change in (True, False):
        fed = Federation("fedit")
        done = late_round(fed, (2,))
        before, then = fed.server.adapter, jobs_of(done)[2].payload.adapter
        aggregate(fed, [Part(alpha, done.updates[0])], jobs_of(done), is_change=is_change)
        models.append(fed.server.adapter)
    for name in models[0]:
        difference = models[0][name] - models[1][name]
        torch.testing.assert_close(difference, alpha * (before[name] - then[name]))
        assert float(difference.norm()) > 1e-6 or name.startswith("score")


@each_late
def test_the_order_of_a_buffer_is_irrelevant(setup: Setup) -> None:
    views = []
    for turn in (1, -1):
        fed = setup.build()
        done = late_round(fed, (1, 2))
        parts = [Part(0.3, update) for update in done.updates][::turn]
        aggregate(fed, parts, jobs_of(done), is_change=True)
        views.append(fed.global_view())
    tolerance = setup.tolerance(torch.float64)
    assert_same(views[0], views[1], max(tolerance, 1e-8))


GONE_ON = {"fedalt", "local-only"}
"""What these clients sent last is what counts, or nothing at all."""


@pytest.mark.parametrize("setup", [s for s in LATE if s.holds("zero-step")], ids=str)
@pytest.mark.parametrize("versions", [0, 1, 3])
def test_who_changes_nothing_changes_nothing_however_late(setup: Setup, versions: int) -> None:
    if setup.case.name in GONE_ON:
        pytest.skip("its server holds what each client sent last")
    fed = setup.build()
    fed.steps = 0
    late = fed.train((2,))
    fed.steps = 2
    for _ in range(versions):
        fed.round([0, 1, 3])
    before = fed.global_view()
    aggregate(fed, [Part(0.3, late.updates[0])], jobs_of(late), is_change=True)
    assert_same(fed.global_view(), before, 1e-8)


# products


def change(done: Any, cid: int) -> dict[str, Tensor]:
    """Return s_k B_k A_k - s_then B_then A_then of a client, as matrices."""
    start = jobs_of(done)[cid].payload.adapter
    sent = done.updates[[u.cid for u in done.updates].index(cid)].adapter
    after, before = effective(sent, BaseDelta()), effective(start, BaseDelta())
    return {layer: after[layer] - before[layer] for layer in SHAPES}


EXACT = ["flora", "fedmomentum"]


@pytest.mark.parametrize("name", [*EXACT, "flexlora"])
@pytest.mark.parametrize("mixed", [False, True])
def test_late_products_are_put_onto_todays_weights(name: str, mixed: bool) -> None:
    settings = {"energy": 1.0} if name == "fedmomentum" else {}
    (case,) = [c for c in CASES if c.name == name]
    setup = Setup(replace(case, settings=settings), mixed)
    fed = setup.build()
    done = late_round(fed, (1, 2))
    before = fed.global_view()
    parts = [Part(0.3, done.updates[0]), Part(0.2, done.updates[1])]
    aggregate(fed, parts, jobs_of(done), is_change=False)
    after = fed.global_view()
    for layer in SHAPES:
        changes = [change(done, cid)[layer] for cid in (1, 2)]
        if name == "flora":  # its clients begin with nothing
            changes = [effective(u.adapter, BaseDelta())[layer] for u in done.updates]
        wanted = before[layer] + 0.3 * changes[0] + 0.2 * changes[1]
        error = float((after[layer] - wanted).norm())
        if name in EXACT:
            assert error < 1e-9
        else:
            tail = torch.linalg.svdvals(wanted)[fed.ranks.largest :]
            assert error == pytest.approx(float(tail.norm()), rel=1e-6, abs=1e-9)


def test_fedsvd_brings_a_late_change_to_todays_a_exactly() -> None:
    fed = Federation("fedsvd").run(rounds=1)
    done = late_round(fed, (2,))
    now = fed.server.adapter
    brought = fed.server.rebase(done.updates[0], done.jobs[0])
    assert brought is not None
    moved, before = (
        effective(a, BaseDelta()) for a in (now.overlaid(brought.adapter.tensors), now)
    )
    start = done.jobs[0].payload.adapter
    trained = effective(start.overlaid(done.updates[0].adapter.tensors), BaseDelta())
    began = effective(start, BaseDelta())
    for layer in SHAPES:
        wanted = before[layer] + trained[layer] - began[layer]
        assert_same({layer: moved[layer]}, {layer: wanted})


def test_what_an_earlier_stage_asked_for_is_dropped() -> None:
    fed = Federation("slora", {"density": 0.1, "sparse_rounds": 2})
    done = late_round(fed, (2,))
    parts = fresh_parts(fed.server, [Part(0.5, done.updates[0])], jobs_of(done), is_change=True)
    assert parts == []


def test_a_control_variate_counts_one_client_in_n_whatever_its_weight() -> None:
    fed = Federation("scaffold")
    done = late_round(fed, (2,))
    before = dict(fed.server.control)
    aggregate(fed, [Part(0.1, done.updates[0])], jobs_of(done), is_change=True)
    for name, tensor in done.updates[0].extra.items():
        wanted = before[name] + tensor / len(CLIENTS)
        torch.testing.assert_close(fed.server.control[name], wanted)


def test_a_server_optimiser_sees_the_weighted_change_alone() -> None:
    plain, moved = Federation("fedit"), Federation("fedavgm", {"server_learning_rate": 2.0})
    for fed in (plain, moved):
        done = late_round(fed, (2,), versions=0)
        aggregate(fed, [Part(0.25, done.updates[0])], jobs_of(done), is_change=True)
    start = Federation("fedit").server.adapter
    for name in start:
        gone = plain.server.adapter[name] - start[name]
        torch.testing.assert_close(moved.server.adapter[name] - start[name], 2.0 * gone)


def test_fedalt_keeps_the_latest_of_each_client_and_nobody_s() -> None:
    fed = Federation("fedalt")
    done = late_round(fed, (2,))
    aggregate(fed, [Part(0.25, done.updates[0])], jobs_of(done), is_change=True)
    assert NOBODY not in fed.server.pool.members
    assert set(fed.server.pool.members) == set(CLIENTS)


# who goes with what


def test_every_refusal_has_a_reason_and_is_told() -> None:
    assert {kind.name for kind in schedules_of_config()} == set(SCHEDULES)
    for name in ALGORITHMS:
        for schedule in SCHEDULES:
            why = server_class(name).refused_schedules.get(schedule, "")
            found = [p for p in problems(name, {}, schedule=schedule) if "schedule" in p]
            assert bool(found) == bool(why)
            assert all(why in problem and "choose sync" in problem for problem in found)
        assert "sync" not in server_class(name).refused_schedules


def schedules_of_config() -> list[Any]:
    kinds = [{"name": "buffered"}, {"name": "async"}, {"name": "semi-sync"}, {"name": "sequential"}]
    made = [Config.model_validate({"federation": {"schedule": kind}}) for kind in kinds]
    return [Config().federation.schedule, *(config.federation.schedule for config in made)]


def test_few_algorithms_are_refused() -> None:
    whole = {n for n in ALGORITHMS if "async" in server_class(n).refused_schedules}
    assert whole == {"fine-tune", "feddpa-f", "fedlease", "hilora", "cyclic"}
    assert {n for n in ALGORITHMS if "sequential" in server_class(n).refused_schedules} == (
        whole - {"cyclic"}
    )


def schedule_named(name: str) -> Schedule:
    return {
        "buffered": lambda: Buffered(cohort_size=3, size=2),
        "async": lambda: Async(cohort_size=3),
        "semi-sync": lambda: SemiSync(cohort_size=4, tiers=2),
        "sequential": Sequential,
    }[name]()


@pytest.mark.parametrize("name", [*STREAMS, "sequential"])
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_every_pair_that_is_not_refused_runs_and_resumes(setup: Setup, name: str) -> None:
    if not is_defined(setup, name):
        pytest.skip("refused")
    world = Slow({0: 1.0, 1: 4.0, 2: 9.0, 3: 2.0}, open_s=100.0)
    whole = loop_of(build(setup), world=world, schedule=schedule_named(name))
    rounds = list(whole.run(7))
    assert [made.number for made in rounds] == list(range(1, 8))
    for tensor in whole.server.adapter.tensors.values():
        assert torch.isfinite(tensor).all()
    half = loop_of(build(setup), world=world, schedule=schedule_named(name))
    course = half.run(7)
    made = [next(course) for _ in range(3)]
    tree, tensors = CODEC.pack(half.state())
    apart = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    again = loop_of(build(setup), world=world, schedule=schedule_named(name))
    again.restore(CODEC.unpack(json.loads(json.dumps(tree)), load(save(apart))))
    made += again.run(7)
    assert told(made) == told(rounds)
    assert fate(again) == fate(whole)


# what a job costs


class Watching(FakeEngine):
    """Adds up what is trained, in passes of a job's steps."""

    passes: float = 0.0

    def train(self, requests: Any, progress: Progress | None = None) -> list[FitResult]:
        for request in requests:
            self.passes += self._passes(request)
        return super().train(requests, progress)

    def _passes(self, request: FitRequest) -> float:
        rows = 4 * request.job.steps
        return request.job.num_samples / rows if request.is_gradient else 1.0


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_the_cost_model_knows_how_often_a_job_trains(setup: Setup) -> None:
    engine = Watching()
    fed = setup.start(engine=engine)
    for _ in range(5):
        engine.passes = 0.0
        done = fed.round()
        asked = sum(fed.client.num_passes(job, rows_per_step=4) for job in done.jobs)
        assert engine.passes == pytest.approx(asked)
