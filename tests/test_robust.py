"""What a few bad clients can and cannot do to an aggregation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from conformance.factors import adapter, quick, seeds
from hypothesis import given
from hypothesis import strategies as st

from fedllm.adapters import Adapter
from fedllm.errors import ConfigError, TrainingError
from fedllm.federation import Job, Part, Payload, Update
from fedllm.federation.robust import (
    ROBUST,
    Krum,
    Mean,
    Median,
    NormBound,
    Robust,
    TrimmedMean,
    make,
    problems,
)

RULES: dict[str, Robust] = {
    "mean": Mean(),
    "median": Median(),
    "trimmed-mean": TrimmedMean(0.3),
    "krum": Krum(1),
    "multi-krum": Krum(1, keep=2),
    "norm-bound": NormBound(2.0),
}


def world(
    adapters: Sequence[Adapter], start: Adapter | None = None, weights: Sequence[float] = ()
) -> tuple[list[Part], list[Job]]:
    """Return the parts and jobs of clients 0, 1, ... that sent these adapters."""
    begin = start or Adapter({n: torch.zeros_like(t) for n, t in adapters[0].tensors.items()})
    jobs = [Job(cid=cid, payload=Payload(4, begin)) for cid in range(len(adapters))]
    parts = [
        Part(
            weights[cid] if weights else 1 / len(adapters),
            Update(cid, 4, sent, num_samples=cid + 1, num_steps=2, metrics={"loss": 1.0}),
        )
        for cid, sent in enumerate(adapters)
    ]
    return parts, jobs


def numbers(*rows: Sequence[float]) -> list[Adapter]:
    """Return one adapter a client, with the one tensor `x`."""
    return [Adapter({"x": torch.tensor(row)}) for row in rows]


def values(parts: Sequence[Part]) -> list[list[float]]:
    return [part.update.adapter["x"].tolist() for part in parts]


def digests(parts: Sequence[Part]) -> list[tuple[float, int, str]]:
    return [(part.weight, part.update.cid, part.update.adapter.digest()) for part in parts]


# by hand


def test_the_median_of_an_odd_number_is_the_middle() -> None:
    parts, jobs = world(numbers([1.0, 9.0], [5.0, -7.0], [2.0, 1.0]))
    assert values(Median()(parts, jobs)) == [[2.0, 1.0]]


def test_the_median_of_an_even_number_is_between_the_middle_two() -> None:
    parts, jobs = world(numbers([1.0], [10.0], [2.0], [1e30]))
    assert values(Median()(parts, jobs)) == [[6.0]]


def test_the_median_ignores_weights_and_keeps_their_sum() -> None:
    parts, jobs = world(numbers([1.0], [2.0], [9.0]), weights=[0.01, 0.01, 0.48])
    (made,) = Median()(parts, jobs)
    assert made.update.adapter["x"].tolist() == [2.0]
    assert made.weight == 0.5
    assert (made.update.cid, made.update.num_samples, made.update.version) == (0, 6, 4)
    assert (made.update.state, made.update.metrics) == ({}, {})


def test_a_tensor_is_combined_over_the_clients_that_sent_it() -> None:
    sent = [
        Adapter({"x": torch.tensor(1.0)}, {"p": 2.0}),
        Adapter({"x": torch.tensor(3.0), "y": torch.tensor(7.0)}, {"q": 3.0}),
    ]
    parts, jobs = world(sent)
    (made,) = Median()(parts, jobs)
    assert {n: t.item() for n, t in made.update.adapter.tensors.items()} == {"x": 2.0, "y": 7.0}
    assert made.update.adapter.scaling == {"p": 2.0, "q": 3.0}


@pytest.mark.parametrize(
    ("share", "wanted"), [(0.0, 33.0), (0.19, 33.0), (0.2, 4.0), (0.39, 4.0), (0.4, 3.0)]
)
def test_the_trimmed_mean_leaves_out_whole_clients_at_both_ends(
    share: float, wanted: float
) -> None:
    parts, jobs = world(numbers([153.0], [3.0], [2.0], [7.0], [0.0]))
    assert values(TrimmedMean(share)(parts, jobs)) == [[wanted]]


def test_a_share_that_is_a_whole_number_of_clients_cuts_that_number() -> None:
    # 0.29 * 100 is 28.999999999999996
    parts, jobs = world(numbers(*[[float(i) ** 2] for i in range(100)]))
    (made,) = values(TrimmedMean(0.29)(parts, jobs))
    assert made[0] == pytest.approx(sum(i**2 for i in range(29, 71)) / 42, rel=1e-6)


def test_krum_takes_the_smallest_sum_of_squared_distances_to_its_neighbours() -> None:
    # f = 1, K = 5: two neighbours. Scores: 0: 1 + 9 = 10, 1: 1 + 4 = 5, 3: 4 + 1 = 5,
    # 4: 1 + 9 = 10, 50: 46^2 + 47^2; of the two fives the smaller number wins
    sent = numbers([50.0], [4.0], [0.0], [3.0], [1.0])
    parts, jobs = world(sent, weights=[0.2, 0.1, 0.3, 0.25, 0.15])
    (made,) = Krum(1)(parts, jobs)
    assert made.update.cid == 3
    assert made.update is parts[3].update
    assert made.weight == pytest.approx(1.0)


def test_multi_krum_keeps_the_best_with_their_weights() -> None:
    sent = numbers([50.0], [4.0], [0.0], [3.0], [1.0])
    parts, jobs = world(sent, weights=[0.2, 0.1, 0.3, 0.25, 0.15])
    made = Krum(1, keep=2)(parts, jobs)
    assert [part.update.cid for part in made] == [3, 4]
    assert [part.weight for part in made] == pytest.approx([0.625, 0.375])


def test_krum_compares_changes_and_not_places() -> None:
    # all are at 0, but clients 0 and 1 have come a long way
    sent = numbers(*[[0.0]] * 5)
    parts, _ = world(sent)
    begins = [100.0, -100.0, 1.0, 1.1, 1.2]
    jobs = [
        Job(cid=cid, payload=Payload(4, Adapter({"x": torch.tensor([begin])})))
        for cid, begin in enumerate(begins)
    ]
    (made,) = Krum(1)(parts, jobs)
    assert made.update.cid == 3


def test_krum_sees_small_distances_between_large_changes() -> None:
    # the example above, a long way from the download
    places = [50.0, 4.0, 0.0, 3.0, 1.0]
    sent = [Adapter({"x": torch.tensor([1e9 + x, 1.0], dtype=torch.float64)}) for x in places]
    parts, jobs = world(sent)
    assert [part.update.cid for part in Krum(1, keep=2)(parts, jobs)] == [3, 4]


@pytest.mark.parametrize(
    ("rule", "fewest"), [(Krum(0), 3), (Krum(1), 5), (Krum(2), 7), (Krum(1, 4), 7)]
)
def test_krum_says_how_many_clients_it_needs(rule: Krum, fewest: int) -> None:
    parts, jobs = world(numbers(*[[float(i)] for i in range(fewest)]))
    assert rule.fewest == fewest
    assert len(rule(parts, jobs)) == rule.keep
    with pytest.raises(TrainingError, match=f"at least {fewest} updates and got {fewest - 1}"):
        rule(parts[1:], jobs)


def test_the_norm_bound_scales_the_whole_change_against_the_download() -> None:
    start = Adapter({"x": torch.tensor([10.0, 10.0]), "y": torch.tensor([0.0])})
    far = Adapter({"x": torch.tensor([12.0, 11.0]), "y": torch.tensor([2.0])})
    near = Adapter({"x": torch.tensor([10.5, 10.0]), "y": torch.tensor([0.0])})
    parts, jobs = world([far, near], start)
    bounded, kept = NormBound(1.5)(parts, jobs)
    assert bounded.update.adapter["x"].tolist() == [11.0, 10.5]
    assert bounded.update.adapter["y"].tolist() == [1.0]
    assert kept.update is parts[1].update
    assert [bounded.weight, kept.weight] == [0.5, 0.5]


def test_what_was_not_downloaded_is_bounded_from_zero() -> None:
    parts, jobs = world(numbers([3.0, 4.0]), Adapter({"other": torch.ones(2)}))
    assert values(NormBound(1.0)(parts, jobs))[0] == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_change_that_is_not_finite_is_bounded_to_none(bad: float) -> None:
    parts, jobs = world(numbers([bad, 4.0]), Adapter({"x": torch.tensor([1.0, 2.0])}))
    assert values(NormBound(1.0)(parts, jobs)) == [[1.0, 2.0]]


# attacks


@quick
@given(seeds, st.integers(0, 4), st.data())
def test_the_median_stays_within_the_honest_range(seed: int, bad: int, data: st.DataObject) -> None:
    honest = [adapter(seed + i, 3, dtype=torch.float32) for i in range(bad + 1)]
    size = st.sampled_from([-1e30, -1.0, 0.0, 1e30, math.inf, -math.inf, math.nan])
    attacks = [
        replace(
            one, tensors={n: torch.full_like(t, data.draw(size)) for n, t in one.tensors.items()}
        )
        for one in honest[:bad]
    ]
    parts, jobs = world([*attacks, *honest])
    (made,) = Median()(parts, jobs)
    for name, tensor in made.update.adapter.tensors.items():
        stacked = torch.stack([one[name] for one in honest])
        assert bool((tensor >= stacked.amin(dim=0)).all())
        assert bool((tensor <= stacked.amax(dim=0)).all())


@quick
@given(
    seeds,
    st.integers(1, 3),
    st.sampled_from([-1e30, -5.0, 5.0, 1e30, math.inf, math.nan]),
    st.booleans(),
)
def test_krum_picks_an_honest_client(seed: int, bad: int, attack: float, agree: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    honest = [
        Adapter({"x": 0.1 * torch.randn(6, generator=generator), "y": torch.ones(2)})
        for _ in range(bad + 3)
    ]
    attacks = [
        Adapter({"x": torch.full((6,), attack * (1 if agree else 1 + i)), "y": torch.ones(2)})
        for i in range(bad)
    ]
    parts, jobs = world([*attacks, *honest])
    assert all(part.update.cid >= bad for part in Krum(bad)(parts, jobs))
    assert all(part.update.cid >= bad for part in Krum(bad, keep=bad + 1)(parts, jobs))


@quick
@given(seeds, st.floats(0.01, 100.0), st.sampled_from([1.0, 1e6, 1e30]))
def test_no_change_exceeds_the_norm_bound(seed: int, bound: float, size: float) -> None:
    start = adapter(seed, 3, dtype=torch.float32)
    other = adapter(seed + 1, 3, dtype=torch.float32)
    sent = replace(other, tensors={n: t * size for n, t in other.tensors.items()})
    parts, jobs = world([sent], start)
    (made,) = NormBound(bound)(parts, jobs)
    after = made.update.adapter.tensors.items()
    moved = math.sqrt(sum(float((t.double() - start[n].double()).square().sum()) for n, t in after))
    # what is left is the rounding of float32
    assert moved <= bound * 1.0001 + 1e-4


# laws that all rules obey


@quick
@given(seeds, st.sampled_from([n for n in RULES if n != "mean"]), st.randoms(use_true_random=False))
def test_no_rule_depends_on_order(seed: int, name: str, shuffle: Random) -> None:
    parts, jobs = world([adapter(seed + i, 2, dtype=torch.float32) for i in range(6)])
    shuffled, jumbled = list(parts), list(jobs)
    shuffle.shuffle(shuffled)
    shuffle.shuffle(jumbled)
    assert digests(RULES[name](shuffled, jumbled)) == digests(RULES[name](parts, jobs))


@quick
@given(seeds, st.sampled_from(list(RULES)), st.integers(5, 9))
def test_identical_clients_are_a_fixed_point(seed: int, name: str, count: int) -> None:
    own = adapter(seed, 2, dtype=torch.float32)
    small = replace(own, tensors={n: t / 100 for n, t in own.tensors.items()})
    parts, jobs = world([small] * count)
    made = RULES[name](parts, jobs)
    assert {part.update.adapter.digest() for part in made} == {small.digest()}
    assert math.fsum(part.weight for part in made) == pytest.approx(1.0)


@pytest.mark.parametrize("name", list(RULES))
def test_no_rule_modifies_what_it_is_given(name: str) -> None:
    start = adapter(99, 2, dtype=torch.float32)
    parts, jobs = world([adapter(i, 2, dtype=torch.float32) for i in range(5)], start)
    kept_parts, kept_jobs, before = list(parts), list(jobs), digests(parts)
    RULES[name](parts, jobs)
    assert parts == kept_parts
    assert jobs == kept_jobs
    assert digests(parts) == before
    assert start.digest() == adapter(99, 2, dtype=torch.float32).digest()


@pytest.mark.parametrize("name", ["mean", "median", "trimmed-mean", "norm-bound"])
def test_nothing_comes_of_nothing(name: str) -> None:
    assert RULES[name]([], []) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(RULES))
def test_every_rule_keeps_dtype_and_shape(name: str, dtype: torch.dtype) -> None:
    sent = [adapter(i, 2, dtype=dtype) for i in range(5)]
    parts, jobs = world(sent)
    for part in RULES[name](parts, jobs):
        forms = {n: (t.dtype, t.shape) for n, t in part.update.adapter.tensors.items()}
        assert forms == {n: (t.dtype, t.shape) for n, t in sent[0].tensors.items()}


# what is undefined


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "krum", "multi-krum"])
def test_unequal_ranks_are_undefined(name: str) -> None:
    parts, jobs = world([adapter(i, 2 + i % 2) for i in range(5)])
    with pytest.raises(ValueError, match="undefined for unequal ranks"):
        RULES[name](parts, jobs)


def test_the_norm_bound_takes_unequal_ranks() -> None:
    sent = [adapter(i, 2 + i % 2) for i in range(5)]
    parts, jobs = world(sent)
    assert [part.update.adapter.rank for part in NormBound(1.0)(parts, jobs)] == [2, 3, 2, 3, 2]


def test_unequal_scalings_are_undefined() -> None:
    parts, jobs = world([adapter(i, 2, scaling=1.0 + i) for i in range(3)])
    with pytest.raises(ValueError, match="undefined for unequal scalings"):
        Median()(parts, jobs)


def test_whole_numbers_are_undefined() -> None:
    parts, jobs = world([Adapter({"q.index": torch.arange(3)})] * 3)
    with pytest.raises(ValueError, match="holds whole numbers"):
        Median()(parts, jobs)


def test_krum_refuses_clients_that_sent_different_tensors() -> None:
    sent = [Adapter({"x": torch.ones(1), **({"y": torch.ones(1)} if i else {})}) for i in range(5)]
    parts, jobs = world(sent)
    with pytest.raises(ValueError, match="different tensors"):
        Krum(1)(parts, jobs)


def test_a_missing_job_is_named() -> None:
    parts, jobs = world(numbers([1.0], [2.0]))
    with pytest.raises(ValueError, match="job of client 1 from version 4"):
        NormBound(1.0)(parts, jobs[:1])


# the table


GIVEN = {
    "mean": {},
    "median": {},
    "trimmed-mean": {"share": 0.3},
    "krum": {"byzantine": 1},
    "multi-krum": {"byzantine": 1, "keep": 2},
    "norm-bound": {"bound": 2.0},
}


def test_the_table_makes_every_rule() -> None:
    assert {name: make(name, GIVEN[name]) for name in ROBUST} == RULES
    assert all(entry.summary for entry in ROBUST.values())


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("trimed-mean", {}, "Did you mean 'trimmed-mean'?"),
        ("median", {"share": 0.1}, "robust.share: unknown key. 'median' has none"),
        ("trimmed-mean", {"shares": 0.1}, "Did you mean 'share'?"),
        ("trimmed-mean", {}, "robust.share: 'trimmed-mean' needs a value"),
        ("trimmed-mean", {"share": 0.5}, "less than 0.5 (got 0.5)"),
        ("trimmed-mean", {"share": -0.1}, "(got -0.1)"),
        ("krum", {"byzantine": -1}, "robust.byzantine"),
        ("krum", {"byzantine": True}, "(got True)"),
        ("krum", {"byzantine": 1, "keep": 2}, "robust.keep: unknown key"),
        ("multi-krum", {"byzantine": 1}, "robust.keep: 'multi-krum' needs a value"),
        ("multi-krum", {"byzantine": 1, "keep": 0}, "robust.keep"),
        ("norm-bound", {"bound": 0.0}, "greater than 0"),
        ("norm-bound", {"bound": math.inf}, "finite"),
    ],
)
def test_wrong_settings_are_named(name: str, settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(name, settings)
    assert any(words in line for line in caught.value.problems)


def test_all_faults_are_told_at_once_under_the_section_they_are_in() -> None:
    found = problems("multi-krum", {"keep": 0, "share": 1}, where="aggregation.robust")
    assert len(found) == 3
    assert all(line.startswith("aggregation.robust.") for line in found)
