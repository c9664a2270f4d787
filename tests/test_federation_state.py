"""Messages, their sizes, what can be saved and what comes back, and private state."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.adapters import Adapter, BaseDelta, Product, initial, is_a
from fedllm.federation import (
    BaseServer,
    Codec,
    Job,
    MemoryStore,
    Part,
    Payload,
    Update,
    restore_server,
    server_state,
    weighted,
)
from fedllm.system import RankRule

SHAPES = {"q": (20, 14), "v": (14, 20)}


def adapter() -> Adapter:
    return initial(SHAPES, 4, 2.0, seed=3, heads={"score.weight": torch.ones(3, 14)})


def update(cid: int = 1, num_samples: int = 10) -> Update:
    return Update(cid, version=2, adapter=adapter(), num_samples=num_samples, num_steps=5)


def through_json(value: Any, *types: type) -> Any:
    codec = Codec(*types)
    tree, tensors = codec.pack(value)
    return codec.unpack(json.loads(json.dumps(tree)), tensors)


# codec

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.just("$")
)
keys = st.text(max_size=3) | st.integers() | st.just("$")
hashable = st.integers() | st.text(max_size=3)
values = st.recursive(
    scalars | st.frozensets(st.integers(), max_size=3) | st.frozensets(st.text(max_size=3)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(st.tuples(hashable, hashable), inner, max_size=2)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(values)
def test_plain_values_come_back_as_they_were(value: object) -> None:
    back = through_json(value)
    assert back == value
    assert repr(back) == repr(value) or isinstance(value, (frozenset, dict, list, tuple))


@pytest.mark.parametrize("value", [float("inf"), -0.0, 1e-320, 0.1, 2**80, (), [], {}, {1: (2,)}])
def test_awkward_values_come_back_with_their_type(value: object) -> None:
    assert repr(through_json(value)) == repr(value)


def test_nan_comes_back() -> None:
    assert np.isnan(through_json(float("nan")))


class Phase(Enum):
    FIRST = "first"
    SECOND = "second"


class Pair(NamedTuple):
    left: int
    right: object


@dataclass(frozen=True)
class Record:
    phase: Phase
    pairs: tuple[Pair, ...]


def test_listed_types_come_back_as_themselves() -> None:
    record = Record(Phase.SECOND, (Pair(1, "x"), Pair(2, None)))
    back = through_json(record, Phase, Pair, Record)
    assert back == record
    assert type(back.pairs[0]) is Pair
    assert back.phase is Phase.SECOND


@pytest.mark.parametrize("value", [Phase.FIRST, Pair(1, 2), [Record(Phase.FIRST, ())]])
def test_a_type_that_is_not_listed_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="not among the types this codec knows"):
        Codec().pack(value)


def test_a_stranger_with_a_listed_name_is_refused() -> None:
    stranger = type("Job", (tuple,), {"_fields": ()})()
    with pytest.raises(TypeError, match="Job"):
        Codec().pack(stranger)


def test_a_tensor_that_occurs_twice_is_kept_once() -> None:
    shared, other = torch.ones(3), torch.ones(3)
    tree, tensors = Codec().pack({"a": shared, "b": [shared, other]})
    assert len(tensors) == 2
    back = Codec().unpack(tree, tensors)
    assert back["a"] is back["b"][0]
    assert back["b"][1] is other


def messages() -> list[object]:
    """Return one of each message, no field at its default."""
    base = BaseDelta().merged(1, {"q": Product(torch.ones(20, 1), torch.ones(1, 14))})
    base = base.merged(2, {"q": Product(torch.ones(20, 14), torch.ones(14, 14))})
    payload = Payload(3, adapter(), frozenset({"q.x", "v.y"}), base, known_base=1)
    job = Job(7, payload, "warm-up", 2**62, 5, 3e-4, 40, {"score.weight": torch.ones(3, 14)})
    done = replace(update(), stage="s", state={"b": torch.zeros(2)}, metrics={"loss": 0.5})
    return [payload, job, done, Part(0.25, done)]


@pytest.mark.parametrize("message", messages(), ids=lambda m: type(m).__name__)
def test_messages_come_back_field_by_field(message: object) -> None:
    back = through_json(message)
    assert type(back) is type(message)
    tree, tensors = Codec().pack(message)
    again, others = Codec().pack(back)
    assert again == tree
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[n], others[n]) for n in tensors)


# messages


def test_only_what_is_not_known_travels_down() -> None:
    start = adapter()
    assert Payload(0, start).nbytes == start.nbytes
    known = frozenset(start.select(is_a))
    assert Payload(0, start, known).nbytes == start.nbytes - start.select(is_a).nbytes
    assert Payload(0, start, frozenset(start)).nbytes == 0


def test_the_missing_part_of_the_base_travels_down() -> None:
    step = {"q": Product(torch.ones(20, 1), torch.ones(1, 14))}
    base = BaseDelta().merged(1, step).merged(2, step)
    nothing = Adapter({})
    sizes = [Payload(2, nothing, base=base, known_base=v).nbytes for v in (-1, 0, 1, 2)]
    assert sizes == [4 * 68, 4 * 68, 4 * 34, 0]


def test_an_update_sends_its_adapter_and_not_its_state() -> None:
    private = replace(update(), state={"b": torch.zeros(1000)})
    assert private.nbytes == adapter().nbytes


def test_a_job_starts_from_the_version_of_its_payload() -> None:
    assert Job(1, Payload(5, adapter())).version == 5


def test_parts_become_what_the_algebra_takes() -> None:
    one, two = update(1), update(2)
    assert weighted([Part(0.3, one), Part(0.7, two)]) == [(0.3, one.adapter), (0.7, two.adapter)]


# server


def started(**chosen: Any) -> BaseServer:
    server = BaseServer(**chosen)
    server.start(adapter(), RankRule((4,)), "shared")
    return server


def test_a_cohort_is_drawn_without_replacement_from_the_pool() -> None:
    server, pool = started(), [3, 5, 8, 13, 21]
    for seed in range(20):
        cohort = server.sample(pool, 3, np.random.default_rng(seed))
        assert len(set(cohort)) == 3
        assert set(cohort) <= set(pool)
    assert sorted(server.sample(pool, 9, np.random.default_rng(0))) == pool


def test_every_client_is_drawn_about_equally_often() -> None:
    server, draw = started(), np.random.default_rng(0)
    counts = np.zeros(10)
    for _ in range(2000):
        counts[list(server.sample(range(10), 3, draw))] += 1
    assert np.all(np.abs(counts / 2000 - 0.3) < 0.05)


def test_the_state_of_a_server_is_what_a_run_changes() -> None:
    assert set(server_state(started(weights="uniform"))) == {
        "version",
        "adapter",
        "base",
        "contacts",
        "changed",
    }


def test_a_restored_server_holds_the_saved_state_and_its_own_settings() -> None:
    server = started(weights="uniform")
    server.apply([Part(1.0, update())])
    server.contacts[4] = 1
    other = started(weights="uniform")
    restore_server(other, through_json(server_state(server)))
    assert (other.version, other.contacts, other.changed) == (1, {4: 1}, server.changed)
    assert other.adapter.digest() == server.adapter.digest()
    assert (other.weights, other.head, other.ranks) == ("uniform", "shared", RankRule((4,)))


def test_applying_counts_versions_and_notes_what_changed() -> None:
    server = started()
    half = replace(update(), adapter=update().adapter.select(is_a))
    server.apply([Part(1.0, half)])
    server.apply([Part(1.0, half), Part(2.0, half)])
    assert server.version == 2
    assert server.changed == {"q.lora_A": 2, "v.lora_A": 2}


# private state


def test_a_store_returns_what_was_put_and_nothing_for_strangers() -> None:
    store, tensors = MemoryStore(), {"b": torch.ones(2)}
    store.put(5, tensors)
    store.put(3, {"b": torch.zeros(2)})
    store.put(9, {})
    assert store.get(5) == tensors
    assert store.get(9) == store.get(100) == {}
    assert list(store.clients()) == [3, 5]


def test_a_store_starts_from_saved_tensors_without_adopting_the_mapping() -> None:
    saved = {1: {"b": torch.ones(2)}}
    store = MemoryStore(saved)
    store.put(2, {"b": torch.zeros(2)})
    assert list(store.clients()) == [1, 2]
    assert list(saved) == [1]
