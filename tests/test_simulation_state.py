"""A loop that is stopped between two events, saved, and gone on with."""

from __future__ import annotations

import json

import pytest
from conformance.cases import CASES
from conformance.setups import Setup, each_setup
from conformance.world import CLIENTS, NUM_SAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_worlds import Slow, build, fate, loop_of, told
from safetensors.torch import load, save

from fedllm.experiment.run import CODEC
from fedllm.federation import BaseServer
from fedllm.seeding import rng
from fedllm.simulation import Event, EventQueue
from fedllm.system import Ideal


class Stopped(BaseException):
    """The process ends here."""


class StoppingQueue(EventQueue):
    """Lets so many events happen, then stops the process before the next."""

    def __init__(self, events: int = 10**6) -> None:
        super().__init__()
        self.events = self.left = events

    def pop(self) -> Event:
        if not self.left:
            raise Stopped
        self.left -= 1
        return super().pop()


def through_files(state: object) -> object:
    """Send a state through JSON and safetensors."""
    tree, tensors = CODEC.pack(state)
    apart = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    return CODEC.unpack(json.loads(json.dumps(tree)), load(save(apart)))


@each_setup
def test_a_loop_stopped_between_any_two_events_goes_on_as_if_nothing_had_happened(
    setup: Setup,
) -> None:
    world = Slow({0: 3.0, 1: 30.0})
    queue = StoppingQueue()
    whole = loop_of(build(setup), 3, world, queue)
    rounds = list(whole.run(3))
    total = queue.events - queue.left
    assert total >= 2 * sum(len(made.updates) for made in rounds)
    for stop in range(0, total, max(1, total // 12)):
        first = loop_of(build(setup), 3, world, StoppingQueue(stop))
        made = []
        with pytest.raises(Stopped):
            made += first.run(3)
        second = loop_of(build(setup), 3, world)
        second.restore(through_files(first.state()))
        made += second.run(3)
        assert told(made) == told(rounds)
        assert fate(second) == fate(whole)


@settings(max_examples=5)
@given(st.integers(0, 10**6))
def test_cohorts_follow_from_seed_and_version_alone(seed: int) -> None:
    cohorts = []
    for world in (Ideal(), Slow({2: 50.0})):
        loop = loop_of(build(Setup(CASES[0]), seed=seed), 2, world)
        cohorts.append([[u.cid for u in made.updates] for made in loop.run(4)])
    by_hand = [
        sorted(BaseServer().sample(CLIENTS, 2, rng(seed, "cohort", version)))
        for version in range(4)
    ]
    assert cohorts == [by_hand, by_hand]
    assert set(CLIENTS) == set(NUM_SAMPLES)
