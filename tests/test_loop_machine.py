"""Random worlds under every schedule: nothing is lost sight of, whatever happens to clients."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from conformance.cases import CASES
from conformance.setups import Setup
from conformance.world import CLIENTS
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loop_worlds import build, fate, loop_of, told
from safetensors.torch import load, save

from fedllm.experiment.run import CODEC
from fedllm.seeding import uniform
from fedllm.simulation import Async, Buffered, Loop, Round, Schedule, SemiSync, Sequential, Sync
from fedllm.system import Work, World

FEDIT = Setup(next(case for case in CASES if case.name == "fedit"))
PERIOD_S = 50.0
ROUNDS = 12


@dataclass(frozen=True)
class Random(World):
    """A world whose every answer is drawn from (seed, client); windows come back every 50 s."""

    seed: int
    share_open: float
    leaving: float
    speed: float
    cells: int

    def window(self, cid: int, time_s: float) -> tuple[float, float] | None:
        if self.share_open == 1.0:
            return 0.0, math.inf
        if uniform(self.seed, "never", cid) < 0.1:
            return None
        length = max(self.share_open * PERIOD_S * 2 * uniform(self.seed, "length", cid), 0.5)
        length = min(length, 0.95 * PERIOD_S)
        start = uniform(self.seed, "phase", cid) * PERIOD_S - PERIOD_S
        turn = math.floor((time_s - start) / PERIOD_S)
        for number in (turn - 1, turn, turn + 1, turn + 2):
            open_s = start + number * PERIOD_S
            if open_s + length > time_s:
                return open_s, open_s + length
        raise AssertionError

    def fit_s(self, cid: int, work: Work) -> float:
        return work.steps * self.speed * (0.1 + uniform(self.seed, "device", cid))

    def download_s(self, cid: int, nbytes: int, time_s: float, sharing: int) -> float:
        return sharing * nbytes * self.speed * uniform(self.seed, "down", cid) / 1e4

    def upload_s(self, cid: int, nbytes: int, time_s: float, sharing: int) -> float:
        return sharing * nbytes * self.speed * uniform(self.seed, "up", cid) / 1e4

    def cell(self, cid: int) -> int | None:
        return cid % self.cells if self.cells else None

    def drops_after_s(self, cid: int, job: int, busy_s: float) -> float:
        is_leaving = uniform(self.seed, "leaving", cid, job) < self.leaving
        return busy_s * uniform(self.seed, "leaves", cid, job) if is_leaving else math.inf

    def energy_j(self, cid: int, train_s: float, download_s: float, upload_s: float) -> float:
        return train_s + download_s + upload_s


worlds = st.builds(
    Random,
    seed=st.integers(0, 10**6),
    share_open=st.sampled_from([1.0, 0.6, 0.2, 0.05]),
    leaving=st.sampled_from([0.0, 0.3]),
    speed=st.sampled_from([0.0, 0.1, 1.0, 20.0]),
    cells=st.sampled_from([0, 0, 2]),
)
waits = st.sampled_from([None, 0.5, 20.0])
SCHEDULES = st.one_of(
    st.builds(
        dict,
        kind=st.just(Sync),
        cohort_size=st.sampled_from([1, 2]),
        over_selection=st.sampled_from([1.0, 1.5, 2.0]),
        min_updates=st.sampled_from([1, 2]),
        wait_s=waits,
    ),
    st.builds(dict, kind=st.just(Sequential), wait_s=waits, is_reshuffled=st.booleans()),
    st.builds(dict, kind=st.just(SemiSync), cohort_size=st.just(3), tiers=st.just(2)),
    st.builds(
        dict,
        kind=st.just(Buffered),
        cohort_size=st.sampled_from([2, 4]),
        size=st.sampled_from([1, 2]),
        latest=st.sampled_from([None, 1]),
        wait_s=waits,
    ),
    st.builds(
        dict,
        kind=st.just(Async),
        cohort_size=st.sampled_from([1, 3]),
        staleness=st.sampled_from(["constant", "polynomial", "hinge"]),
        latest=st.sampled_from([None, 0]),
    ),
)


def schedule(words: dict[str, Any]) -> Schedule:
    return words["kind"](**{key: value for key, value in words.items() if key != "kind"})


class Worlds(RuleBasedStateMachine):
    """Drives a loop round by round, saved and restored in between, and looks at what it tells."""

    @initialize(
        world=worlds,
        words=SCHEDULES,
        at_close=st.sampled_from(["discard", "partial", "pause"]),
        selection=st.sampled_from(["available", "any"]),
        limit=st.sampled_from([math.inf, math.inf, 120.0]),
    )
    def begin(
        self, world: Random, words: dict[str, Any], at_close: str, selection: str, limit: float
    ) -> None:
        self.world, self.words = world, words
        self.options = {
            "at_window_close": at_close,
            "selection": selection,
            "time_limit_s": limit,
        }
        self.loop, self.rounds = self.new(), []
        self.course = self.loop.run(ROUNDS)

    def new(self, **options: Any) -> Loop:
        options = {**self.options, **options}
        return loop_of(build(FEDIT), world=self.world, schedule=schedule(self.words), **options)

    @precondition(lambda self: not (self.rounds and self.rounds[-1].is_last))
    @rule()
    def next_round(self) -> None:
        self.rounds.append(next(self.course))

    @rule()
    def save_and_restore(self) -> None:
        tree, tensors = CODEC.pack(self.loop.state())
        apart = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        self.loop = self.new()
        self.loop.restore(CODEC.unpack(json.loads(json.dumps(tree)), load(save(apart))))
        self.course = self.loop.run(ROUNDS)

    @invariant()
    def every_job_ends_exactly_once(self) -> None:
        events, ledger = log(self.rounds)
        begun = [e["job"] for e in events if e["state"] == "available"]
        ended = [row["job"] for row in ledger]
        flying = [flight.number for flight in self.loop.fleet.flights.values()]
        assert Counter(begun) == Counter(ended) + Counter(flying)
        assert all(count == 1 for count in Counter(begun).values())

    @invariant()
    def time_never_runs_back(self) -> None:
        events, ledger = log(self.rounds)
        times = [e["time_s"] for e in events]
        assert times == sorted(times)
        assert all(row["began_s"] <= row["ended_s"] for row in ledger)
        assert [made.number for made in self.rounds] == list(range(1, len(self.rounds) + 1))

    @invariant()
    def nobody_is_in_two_states(self) -> None:
        doing: dict[int, str] = {}
        for event in log(self.rounds)[0]:
            cid, kind = event["client"], event["event"]
            if cid is None:
                continue
            before = doing.get(cid, "idle")
            if kind == "WINDOW_OPEN":
                assert before in ("idle", "paused"), event
                doing[cid] = "training" if event["state"] == "available" else event["state"]
            elif kind == "TRAINING_DONE":
                assert before == "training", event
                doing[cid] = "uploading"
            elif kind == "UPLOAD_DONE":
                assert before == "uploading", event
                doing[cid] = "idle"
            else:
                assert before != "idle", event
                is_paused = kind == "WINDOW_CLOSE" and "outcome" not in event
                doing[cid] = "paused" if is_paused else "idle"

    @invariant()
    def nobody_works_outside_a_window(self) -> None:
        for event in log(self.rounds)[0]:
            if event["event"] in ("WINDOW_OPEN", "TRAINING_DONE", "UPLOAD_DONE"):
                # what is done at the instant at which a window closes is done in time
                window = self.world.window(event["client"], math.nextafter(event["time_s"], -1))
                assert window is not None
                assert window[0] <= event["time_s"] <= window[1]

    @invariant()
    def outcomes_are_told_by_what_is_aggregated(self) -> None:
        for made in self.rounds:
            assert len(made.staleness) == len(made.updates)
            assert all(late >= 0 for late in made.staleness)
            latest = self.words.get("latest")
            assert latest is None or all(late <= latest for late in made.staleness)
        arrived = log(self.rounds)[1]
        used = sum(len(made.updates) for made in self.rounds)
        assert used <= sum(row["outcome"] == "arrived" for row in arrived)

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        self.rounds += self.course
        assert self.rounds[-1].is_last
        assert self.loop.server.version <= ROUNDS
        assert (self.loop.server.version == ROUNDS) or self.rounds[-1].ended
        assert not self.loop.fleet.flights
        for options in ({"compute": "eager"}, {"lost": "compute"}, {}):
            other = self.new(**options)
            rounds = list(other.run(ROUNDS))
            assert told(rounds) == told(self.rounds)
            assert fate(other) == fate(self.loop)


def log(rounds: list[Round]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return all events and all lines of the ledger."""
    return [e for r in rounds for e in r.events], [row for r in rounds for row in r.ledger]


assert len(CLIENTS) == 4
TestWorlds = Worlds.TestCase
TestWorlds.settings = settings(max_examples=60, stateful_step_count=8, deadline=None)
