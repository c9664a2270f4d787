"""Named random streams: the same everywhere, apart from each other, and nobody else's business."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.seeding import Numbered, derive, rng

names = st.lists(st.one_of(st.integers(-(10**6), 10**6), st.text("abc", max_size=3)), max_size=4)
seeds = st.integers(0, 2**64)


@given(seeds, names)
def test_a_stream_follows_from_seed_and_names_alone(seed: int, words: list) -> None:
    assert derive(seed, *words) == derive(seed, *words)
    assert (rng(seed, *words).random(4) == rng(seed, *words).random(4)).all()
    assert 0 <= derive(seed, *words) < 2**63


@given(seeds, names, st.integers(-5, 2**63), st.integers(-5, 2**63))
def test_what_is_hashed_before_gives_the_same_seeds(
    seed: int, words: list, first: int, second: int
) -> None:
    numbered = Numbered(seed, *words)
    assert numbered.of(first, second) == derive(seed, *words, first, second)
    assert numbered.of(second, first) == derive(seed, *words, second, first)


@given(seeds, names, seeds, names)
def test_other_seeds_or_names_give_other_streams(
    seed: int, words: list, other_seed: int, other_words: list
) -> None:
    same = (seed, words) == (other_seed, other_words)
    assert (derive(seed, *words) == derive(other_seed, *other_words)) is same


@pytest.mark.parametrize(
    ("one", "other"),
    [((1,), ("1",)), (("ab", "c"), ("a", "bc")), (("a",), ("a", "")), ((1, 2), (12,)), ((), ("",))],
)
def test_names_do_not_run_into_each_other(one: tuple, other: tuple) -> None:
    assert derive(0, *one) != derive(0, *other)


def test_streams_are_the_same_in_every_process() -> None:
    code = "from fedllm.seeding import derive; print(derive(7, 'cohort', 3, 'job'))"
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("0", "1")
    }
    assert told == {str(derive(7, "cohort", 3, "job"))}


def test_seeds_stay_as_they_were_so_that_old_runs_can_be_repeated() -> None:
    assert derive(0, "cohort", 3) == 5050133197562406695
    assert derive(1, "job", 2, 5) == 4464245582916837154


def test_drawing_leaves_the_global_generators_alone() -> None:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    rng(3, "anything").random(100)
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))  # noqa: NPY002


def test_order_of_asking_does_not_matter() -> None:
    forth = {i: rng(0, "client", i).integers(1 << 60) for i in range(20)}
    back = {i: rng(0, "client", i).integers(1 << 60) for i in reversed(range(20))}
    assert forth == back
    assert len(set(forth.values())) == 20
