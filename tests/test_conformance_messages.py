"""What every algorithm must hold on the wire: isolation, bytes (G6), serialisation (G4, G7)."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import safetensors.torch
import torch
from conformance.cases import Case, Trip
from conformance.sanitiser import digest, leaks, tensors_in
from conformance.setups import Setup, each_case, each_head, each_setup
from conformance.world import (
    CLIENTS,
    HEAD_SHAPE,
    SHAPES,
    Federation,
    assert_same,
    effective,
    run_jobs,
    start_adapter,
)

from fedllm.adapters import Adapter, BaseDelta, algebra
from fedllm.experiment.traffic import Untrained
from fedllm.federation import (
    BaseClient,
    Codec,
    HeadPolicy,
    Job,
    MemoryStore,
    Part,
    Payload,
    restore_server,
    server_state,
    visible,
)
from fedllm.federation.transport import Transport

BYTES_PER_NUMBER = 8  # float64
ROUNDS = 6


def prints(value: object) -> dict[str, str]:
    """Hash every tensor of a value."""
    return {path: digest(tensor) for path, tensor in tensors_in(value, "")}


def through_bytes(value: Any) -> Any:
    """Return what comes back after the value was written as JSON and safetensors."""
    tree, tensors = Codec().pack(value)
    text, blob = json.dumps(tree), safetensors.torch.save(tensors)
    return Codec().unpack(json.loads(text), safetensors.torch.load(blob))


# isolation


@each_setup
@each_head
def test_a_job_writes_to_nothing_but_its_update(setup: Setup, head: HeadPolicy) -> None:
    fed = setup.build(head=head)
    for _ in range(3):
        fork = fed.fork()
        jobs = fork.jobs(CLIENTS)
        found = leaks(fork, jobs, lambda j=jobs, f=fork: run_jobs(j, f.client, f.engine))  # type: ignore[misc]
        assert found == []
        fed.round(fed.sampled(2))


@each_setup
def test_aggregation_writes_to_no_update_and_to_no_earlier_view(setup: Setup) -> None:
    fed = setup.build()
    for _ in range(3):
        done = fed.train(CLIENTS)
        before = prints([done.before, done.jobs, done.updates])
        fed.finish(done)
        assert prints([done.before, done.jobs, done.updates]) == before


class WritesToTheDownload(BaseClient):
    """A client that changes what the server lent it."""

    def start(self, job: Job) -> Adapter:
        for name in job.payload.adapter:
            job.payload.adapter[name].mul_(1.5)
        return super().start(job)


class WritesToItsState(BaseClient):
    """A client that trains in place on its private tensors."""

    def start(self, job: Job) -> Adapter:
        for tensor in job.state.values():
            tensor.add_(1.0)
        return super().start(job)


class Remembers(BaseClient):
    """A client that keeps weights where the next client finds them."""

    last: Mapping[str, torch.Tensor]

    def start(self, job: Job) -> Adapter:
        self.last = dict(job.payload.adapter.tensors)
        return super().start(job)


@pytest.mark.parametrize(
    ("cls", "place"),
    [
        (WritesToTheDownload, "[server].adapter"),
        (WritesToItsState, "[store]"),
        (Remembers, "[last"),
    ],
)
def test_the_sanitiser_catches_a_planted_leak(cls: type[BaseClient], place: str) -> None:
    fed = Federation("fedit", head="local")
    fed.round()
    fed.client = cls("local")
    jobs = fed.jobs(CLIENTS)
    found = leaks(fed, jobs, lambda: run_jobs(jobs, fed.client, fed.engine))
    assert any(place in path for path in found), found


def test_the_order_check_catches_a_client_that_starts_from_the_one_before() -> None:
    class Chained(BaseClient):
        last: Adapter | None = None

        def start(self, job: Job) -> Adapter:
            start = self.last or super().start(job)
            self.last = start.overlaid({n: start[n] * 1.5 for n in start})
            return start

    fed = Federation("fedit")
    jobs = fed.jobs(CLIENTS)
    forwards = run_jobs(jobs, Chained(), fed.engine)
    backwards = run_jobs(jobs[::-1], Chained(), fed.engine)[::-1]
    assert prints(forwards) != prints(backwards)


# bytes


def trip_of(fed: Federation, job: Job, since: int) -> Trip:
    """Gather what the closed forms depend on, from the log of earlier rounds."""
    stacks = tuple(sum(fed.ranks.of(j.cid) for j in r.jobs) for r in fed.rounds)
    rank, ranks = fed.ranks.of(job.cid), fed.ranks
    shapes = tuple(SHAPES.values())
    return Trip(shapes, rank, job.version, since, stacks, ranks.largest, ranks.is_mixed)


@each_setup
@each_head
def test_bytes_up_and_down_equal_the_closed_forms(setup: Setup, head: HeadPolicy) -> None:
    fed = setup.start(head=head)
    travels = head == "shared" and setup.case.shares_head
    head_numbers = HEAD_SHAPE[0] * HEAD_SHAPE[1] if travels else 0
    last: dict[int, int] = {}
    for _ in range(ROUNDS):
        done = fed.train(fed.sampled(2))
        for job, update in zip(done.jobs, done.updates, strict=True):
            trip = trip_of(fed, job, last.get(job.cid, -1))
            up = setup.case.up(trip) + setup.case.heads_up(trip) * head_numbers
            down = setup.case.down(trip) + setup.case.heads_down(trip) * head_numbers
            assert update.nbytes == BYTES_PER_NUMBER * up, trip
            assert job.payload.nbytes == BYTES_PER_NUMBER * down, trip
            last[job.cid] = job.version
        fed.finish(done)
    gaps = {job.version - before for job, before in contacts(fed)}
    assert {1, 2} < gaps, "the schedule must hold skipped rounds"


@each_setup
@each_head
def test_the_size_of_an_upload_is_known_before_training(setup: Setup, head: HeadPolicy) -> None:
    # the event loop decides when an upload ends before anything is computed
    fed = setup.start(head=head)
    for _ in range(ROUNDS):
        done = fed.round(fed.sampled(2))
        for job, update in zip(done.jobs, done.updates, strict=True):
            assert Transport().up_nbytes(fed.client, job) == update.nbytes


@each_setup
@each_head
def test_a_run_played_with_shapes_alone_moves_the_same_bytes(
    setup: Setup, head: HeadPolicy
) -> None:
    fed = setup.start(head=head)
    shaped = setup.start(head=head, device="meta")
    for _ in range(ROUNDS):
        cohort = fed.sampled(2)
        assert list(shaped.sampled(2)) == list(cohort)
        real = fed.round(cohort)
        jobs = shaped.jobs(cohort)
        updates = run_jobs(jobs, shaped.client, Untrained())  # type: ignore[arg-type]
        for job, update, other in zip(jobs, updates, real.updates, strict=True):
            assert all(t.is_meta for t in update.adapter.tensors.values())
            assert update.nbytes == other.nbytes
            shaped.store.put(job.cid, update.state)
        shaped.server.apply([Part(shaped.server.weight(u), u) for u in updates])
        assert [j.payload.nbytes for j in jobs] == [j.payload.nbytes for j in real.jobs]


def contacts(fed: Federation) -> list[tuple[Job, int]]:
    """Return every job with the version of the contact before it (-1 at first contact)."""
    last: dict[int, int] = {}
    found = []
    for done in fed.rounds:
        for job in done.jobs:
            found.append((job, last.get(job.cid, -1)))
            last[job.cid] = job.version
    return found


@each_setup
@each_head
def test_what_is_called_known_is_what_the_client_holds(setup: Setup, head: HeadPolicy) -> None:
    fed = setup.start(head=head)
    common = fed.server.adapter
    held: dict[int, Payload] = {}
    for _ in range(ROUNDS):
        done = fed.round(fed.sampled(2))
        for job in done.jobs:
            payload, rank = job.payload, fed.ranks.of(job.cid)
            first = Payload(-1, algebra.truncate(common, rank))
            before = held.get(job.cid, first)
            # what is not held under its name follows from the seed, or is a copy of what travels
            seeds = algebra.truncate(common, rank).tensors.values()
            copies = {
                digest(t)
                for t in (*seeds, *payload.sent.values(), *before.adapter.tensors.values())
            }
            for name in payload.known:
                value = digest(payload.adapter[name])
                assert value in (
                    {digest(before.adapter[name])} if name in before.adapter else copies
                )
            if payload.base.nbytes_since(payload.known_base) == 0:
                assert_same(base_of(payload), base_of(before))
            assert payload.known_base == before.version
            held[job.cid] = payload


def base_of(payload: Payload) -> dict[str, torch.Tensor]:
    """Return the dense increments of the base."""
    nothing = algebra.truncate(start_adapter(1, torch.float64), 0)
    return effective(nothing, payload.base or BaseDelta())


@each_case
def test_an_update_carries_no_name_outside_the_adapter(case: Case) -> None:
    fed = Setup(case).build()
    for _ in range(3):
        done = fed.round()
        for job, update in zip(done.jobs, done.updates, strict=True):
            assert set(update.adapter) <= set(job.payload.adapter)
            assert set(visible(update.state)) <= set(job.payload.adapter)


# serialisation


def saved_and_restored(fed: Federation) -> None:
    """Put server and private states through bytes, as a killed and resumed run does."""
    state = through_bytes(server_state(fed.server))
    states = {cid: through_bytes(dict(fed.store.get(cid))) for cid in fed.store.clients()}
    fed.__post_init__()
    restore_server(fed.server, state)
    fed.store = MemoryStore(states)


@each_setup
@each_head
def test_a_run_that_goes_through_bytes_everywhere_is_bit_identical(
    setup: Setup, head: HeadPolicy
) -> None:
    plain = setup.start(head=head).run(ROUNDS, cohort_size=2)
    saved = setup.start(head=head)
    for _ in range(ROUNDS):
        saved_and_restored(saved)
        jobs = [through_bytes(job) for job in saved.jobs(saved.sampled(2))]
        saved_and_restored(saved)
        updates = [through_bytes(u) for u in run_jobs(jobs, saved.client, saved.engine)]
        for update in updates:
            saved.store.put(update.cid, update.state)
        saved.server.apply([Part(saved.server.weight(u), u) for u in updates])
    assert server_state(plain.server).keys() == server_state(saved.server).keys()
    assert prints(plain.server) == prints(saved.server)
    assert prints(plain.store) == prints(saved.store)
    for name in ("version", "contacts", "changed"):
        assert getattr(plain.server, name) == getattr(saved.server, name)


@each_setup
@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), through_bytes])
def test_a_job_that_crossed_a_boundary_gives_the_same_update(
    setup: Setup, copied: Callable[[Any], Any]
) -> None:
    fed = setup.build(head="local").run(rounds=2)
    jobs = fed.jobs(CLIENTS)
    here = run_jobs(jobs, fed.client, fed.engine)
    there = run_jobs(
        [copied(job) for job in jobs], pickle.loads(pickle.dumps(fed.client)), fed.engine
    )
    assert prints(here) == prints([copied(update) for update in there])
    assert [u.metrics for u in here] == [u.metrics for u in there]


@each_setup
def test_every_tensor_of_a_message_owns_exactly_its_memory(setup: Setup) -> None:
    fed = setup.build(head="local").run(rounds=2)
    done = fed.round()
    messages = [server_state(fed.server), done.jobs, done.updates]
    wasteful = [
        path
        for path, tensor in tensors_in(messages, "")
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes
    ]
    assert wasteful == []
