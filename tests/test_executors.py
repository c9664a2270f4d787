"""The inline executor: whose training is gathered, in which order results come, how it fails."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
from conformance.cases import CASES
from conformance.setups import Setup
from conformance.world import CLIENTS, FakeEngine
from loop_worlds import CountingEngine

from fedllm.executors import InlineExecutor
from fedllm.federation import BaseClient, Engine, Job, Update


class Twice(BaseClient):
    """Trains, then trains on from there; even clients train only once."""

    async def run(self, job: Job, engine: Engine) -> Update:
        first = await engine.fit(job, self.start(job), self, tag="first")
        second = first
        if job.cid % 2:
            second = await engine.fit(job, first.adapter, self, tag="second")
        return Update(job.cid, job.version, second.adapter, job.num_samples, second.num_steps)


class Thrice(BaseClient):
    async def run(self, job: Job, engine: Engine) -> Update:
        adapter = self.start(job)
        for tag in ("a", "b"):
            adapter = (await engine.fit(job, adapter, self, tag=tag)).adapter
        return Update(job.cid, job.version, adapter, job.num_samples, 2 * job.steps)


class Lazy(BaseClient):
    """Sends back what it got."""

    async def run(self, job: Job, engine: Engine) -> Update:
        return Update(job.cid, job.version, job.payload.adapter, job.num_samples, 0)


class Failing(BaseClient):
    """One client breaks down, before or after its training."""

    def __init__(self, cid: int, *, after: bool) -> None:
        super().__init__()
        self.cid, self.after = cid, after
        self.ended: list[int] = []

    async def run(self, job: Job, engine: Engine) -> Update:
        if job.cid == self.cid and not self.after:
            raise ValueError("broke down early")
        try:
            result = await engine.fit(job, self.start(job), self)
        finally:
            self.ended.append(job.cid)
        if job.cid == self.cid:
            raise ValueError("broke down late")
        return Update(job.cid, job.version, result.adapter, job.num_samples, result.num_steps)


def jobs(cohort: tuple[int, ...] = CLIENTS) -> list[Job]:
    return Setup(CASES[0]).build().jobs(cohort)


@pytest.mark.parametrize("cohort", [(0, 1, 2, 3), (3, 0, 2), (1,), ()])
def test_updates_come_in_the_order_of_the_jobs(cohort: tuple[int, ...]) -> None:
    updates = InlineExecutor(FakeEngine(), BaseClient()).run(jobs(cohort))
    assert [update.cid for update in updates] == list(cohort)


def test_two_trainings_of_a_client_are_each_gathered_over_the_cohort() -> None:
    engine = CountingEngine()
    InlineExecutor(engine, Thrice()).run(jobs())
    assert engine.calls == [[(cid, tag) for cid in CLIENTS] for tag in ("a", "b")]


def test_who_trains_once_does_not_hold_up_who_trains_twice() -> None:
    engine = CountingEngine()
    updates = InlineExecutor(engine, Twice()).run(jobs())
    assert engine.calls == [[(c, "first") for c in CLIENTS], [(1, "second"), (3, "second")]]
    assert [update.cid for update in updates] == list(CLIENTS)
    alone = [InlineExecutor(FakeEngine(), Twice()).run([job])[0] for job in jobs()]
    assert [u.adapter.digest() for u in updates] == [u.adapter.digest() for u in alone]


def test_a_cohort_that_does_not_train_asks_the_engine_for_nothing() -> None:
    engine = CountingEngine()
    updates = InlineExecutor(engine, Lazy()).run(jobs())
    assert engine.calls == []
    assert len(updates) == len(CLIENTS)


def test_several_jobs_of_one_client_each_get_their_own_update() -> None:
    first, second = jobs((1, 1))
    updates = InlineExecutor(FakeEngine(), BaseClient()).run([first, replace(second, seed=5)])
    assert len({update.adapter.digest() for update in updates}) == 2


@pytest.mark.parametrize("after", [False, True], ids=["before training", "after training"])
@pytest.mark.parametrize("cid", CLIENTS)
def test_a_clients_error_reaches_the_caller_and_no_coroutine_is_left(cid: int, after: bool) -> None:
    client = Failing(cid, after=after)
    with pytest.raises(ValueError, match="broke down"):
        InlineExecutor(FakeEngine(), client).run(jobs())
    # a coroutine that was begun has been ended, and one that was not warns of it when collected
    begun = CLIENTS if after else CLIENTS[:cid]
    assert sorted(client.ended) == sorted(begun)
    gc.collect()


def test_an_error_of_the_engine_reaches_the_caller_and_no_coroutine_is_left() -> None:
    class Broken(FakeEngine):
        def train(self, requests, progress=None):
            raise RuntimeError("out of memory")

    client = Failing(99, after=False)
    with pytest.raises(RuntimeError, match="out of memory"):
        InlineExecutor(Broken(), client).run(jobs())
    assert sorted(client.ended) == list(CLIENTS)


def test_progress_is_handed_to_the_engine() -> None:
    seen = []

    class Telling(FakeEngine):
        def train(self, requests, progress=None):
            progress(7, 1, 2)
            return super().train(requests)

    def note(cid: int, done: int, total: int) -> None:
        seen.append((cid, done, total))

    InlineExecutor(Telling(), BaseClient(), note).run(jobs())
    assert seen == [(7, 1, 2)]
