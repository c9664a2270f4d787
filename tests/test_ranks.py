"""Rank policies: exact shares, draws that follow from (seed, client) alone, memory, and errors."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_world import call, fails, write_config
from hypothesis import given
from hypothesis import strategies as st

from fedllm.algorithms import ALGORITHMS, server_class
from fedllm.config import BudgetRange, Config, dump
from fedllm.errors import ConfigError
from fedllm.experiment import make_config
from fedllm.experiment.check import check
from fedllm.experiment.parts import ranks_of
from fedllm.system import MemoryRule, RankRule, TierRule, WeightedRule, apportion, rank_rule

TinyModel = Callable[[str], Path]

TIERS = {"policy": "tiers", "tiers": [{"rank": 16, "share": 0.2}, {"rank": 4, "share": 0.8}]}
DISTRIBUTION = {"policy": "distribution", "choices": [2, 4, 8, 16], "weights": [4, 3, 2, 1]}
MEMORY = {"policy": "memory", "choices": [2, 4, 8, 16], "budget_mb": {"low": 1, "high": 16}}
POLICIES = {"list": [2, 4, 8, 16], "tiers": TIERS, "distribution": DISTRIBUTION, "memory": MEMORY}
RANK_PARAMETERS = 20_000
"""A rank then takes 0.32 MB, so that choice 2 needs 0.64 MB and choice 16 needs 5.12 MB."""


def config_of(rank: object, *words: str) -> Config:
    return make_config({"algorithm": "flora", "adapter": {"rank": rank}}, words)


def rule_of(rank: object, *, seed: int = 0, num_clients: int = 1000) -> RankRule:
    return rank_rule(
        config_of(rank).adapter.rank,
        seed,
        num_clients=num_clients,
        rank_parameters=RANK_PARAMETERS,
    )


def memory_rule(
    budget_mb: Any, choices: tuple[int, ...] = (2, 4, 8, 16), head: int = 0, seed: int = 0
) -> MemoryRule:
    return MemoryRule(
        choices,
        seed,
        budget_mb=budget_mb,
        rank_parameters=RANK_PARAMETERS,
        head_parameters=head,
    )


def problems(tree: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make_config(tree)
    return caught.value.problems


def rank_problems(rank: object) -> list[str]:
    return problems({"algorithm": "flora", "adapter": {"rank": rank}})


# all policies


@pytest.mark.parametrize("rank", POLICIES.values(), ids=POLICIES)
def test_a_policy_is_read_written_and_read_again(rank: object) -> None:
    config = config_of(rank)
    assert make_config(yaml.safe_load(dump(config))) == config
    assert config.adapter.max_rank == 16
    rule = rule_of(rank)
    assert rule.largest == 16
    assert rule.is_mixed
    assert pickle.loads(pickle.dumps(rule)) == rule


@pytest.mark.parametrize("rank", POLICIES.values(), ids=POLICIES)
def test_a_rank_follows_from_seed_and_client_alone(rank: object) -> None:
    forwards = [rule_of(rank, seed=5).of(cid) for cid in range(200)]
    rule = rule_of(rank, seed=5)
    assert [rule.of(cid) for cid in reversed(range(200))] == forwards[::-1]
    assert [rule_of(rank, seed=6).of(cid) for cid in range(200)] != forwards
    assert set(forwards) == set(rule.choices)


@pytest.mark.parametrize("rank", POLICIES.values(), ids=POLICIES)
def test_a_hundred_million_clients_cost_no_more_than_those_asked_for(rank: object) -> None:
    begin = time.perf_counter()
    rule = rule_of(rank, num_clients=100_000_000)
    assert all(rule.of(cid) in rule.choices for cid in range(0, 100_000_000, 1_000_000))
    assert time.perf_counter() - begin < 1.0
    assert len(pickle.dumps(rule)) < 2000


@pytest.mark.parametrize(
    "rank", [POLICIES["list"], DISTRIBUTION, MEMORY], ids=["list", "distribution", "memory"]
)
def test_a_draw_does_not_depend_on_the_population(rank: object) -> None:
    few, many = rule_of(rank, num_clients=10), rule_of(rank, num_clients=10**9)
    assert [few.of(cid) for cid in range(10)] == [many.of(cid) for cid in range(10)]


def test_one_rank_and_a_list_are_what_they_always_were() -> None:
    assert rule_of(8) == RankRule((8,))
    assert not rule_of(8).is_mixed
    drawn = [rule_of([2, 4, 8, 16], seed=7).of(cid) for cid in range(12)]
    assert drawn == [16, 8, 4, 2, 16, 2, 4, 8, 2, 16, 8, 16]


@pytest.mark.parametrize(
    "rank",
    [
        {"policy": "tiers", "tiers": [{"rank": 4, "share": 0.5}, {"rank": 4, "share": 0.5}]},
        {"policy": "distribution", "choices": [4], "weights": [2]},
        {"policy": "memory", "choices": [4], "budget_mb": 2},
    ],
    ids=["tiers", "distribution", "memory"],
)
def test_a_policy_with_one_rank_is_not_mixed(rank: object) -> None:
    assert make_config({"algorithm": "fedit", "adapter": {"rank": rank}}).adapter.max_rank == 4
    rule = rule_of(rank)
    assert not rule.is_mixed
    assert {rule.of(cid) for cid in range(20)} == {4}


@pytest.mark.parametrize("rank", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_an_algorithm_refuses_every_policy_that_mixes_ranks(name: str, rank: object) -> None:
    tree = {"algorithm": name, "adapter": {"rank": rank}}
    if server_class(name).mixed_rank == "unsupported":
        (problem,) = problems(tree)
        assert problem.startswith(f"adapter.rank: '{name}' needs one rank")
    else:
        assert make_config(tree).adapter.max_rank == 16


def test_policies_are_refused_and_ranks_drawn_without_torch() -> None:
    code = (
        "import sys\n"
        "from fedllm.errors import ConfigError\n"
        "from fedllm.experiment import make_config\n"
        "from fedllm.system import rank_rule\n"
        f"tree = {{'algorithm': 'fedit', 'adapter': {{'rank': {TIERS!r}}}}}\n"
        "try:\n    make_config(tree)\n"
        "except ConfigError as error:\n    assert 'needs one rank' in error.problems[0]\n"
        "else:\n    raise AssertionError\n"
        "rank = make_config({**tree, 'algorithm': 'flora'}).adapter.rank\n"
        "assert rank_rule(rank, 0, num_clients=5, rank_parameters=1).of(3) in (4, 16)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# tiers


@pytest.mark.parametrize(
    ("shares", "total", "counts"),
    [
        ([0.2, 0.8], 10, (2, 8)),
        ([0.29, 0.71], 100, (29, 71)),
        ([0.2, 0.8], 8, (2, 6)),
        ([0.5, 0.5], 3, (2, 1)),
        ([0.333333, 0.333333, 0.333334], 8, (3, 2, 3)),
        ([0.01, 0.99], 8, (0, 8)),
        ([1.0], 4, (4,)),
    ],
)
def test_remainders_go_to_the_largest(
    shares: list[float], total: int, counts: tuple[int, ...]
) -> None:
    assert apportion(shares, total) == counts


@given(
    parts=st.lists(st.integers(1, 1000), min_size=1, max_size=8),
    total=st.integers(1, 10**9),
)
def test_counts_sum_to_the_population_and_keep_within_one_of_their_share(
    parts: list[int], total: int
) -> None:
    counts = apportion([part / sum(parts) for part in parts], total)
    assert sum(counts) == total
    for count, part in zip(counts, parts, strict=True):
        assert abs(count * sum(parts) - part * total) < sum(parts) * 1.001


@given(num_clients=st.integers(1, 400), seed=st.integers(0, 99))
def test_every_tier_has_exactly_its_clients(num_clients: int, seed: int) -> None:
    rule = rule_of(TIERS, seed=seed, num_clients=num_clients)
    assert isinstance(rule, TierRule)
    found = Counter(rule.of(cid) for cid in range(num_clients))
    assert tuple(found[rank] for rank in (16, 4)) == rule.counts
    assert rule.counts == apportion([0.2, 0.8], num_clients)


def test_every_client_is_as_likely_in_a_tier_alone_and_in_company() -> None:
    seeds, num_clients = 2000, 10
    alone, together = Counter[int](), Counter[tuple[int, int]]()
    for seed in range(seeds):
        rule = rule_of(TIERS, seed=seed, num_clients=num_clients)
        first, second = (cid for cid in range(num_clients) if rule.of(cid) == 16)
        alone.update((first, second))
        together[first, second] += 1
    # five standard deviations of a binomial around 1 / 5 for clients, and 1 / 45 for pairs
    assert all(abs(alone[cid] - 400) < 90 for cid in range(num_clients))
    assert len(together) == 45
    assert all(abs(count - 44.4) < 33 for count in together.values())


# distribution


def test_ranks_are_drawn_in_proportion_to_their_weights() -> None:
    rule = rule_of(DISTRIBUTION)
    assert isinstance(rule, WeightedRule)
    found = Counter(rule.of(cid) for cid in range(4000))
    # five standard deviations around 1600, 1200, 800 and 400
    for rank, expected in zip((2, 4, 8, 16), (1600, 1200, 800, 400), strict=True):
        assert abs(found[rank] - expected) < 160
    scaled = replace(rule, weights=tuple(1e300 * weight for weight in rule.weights))
    assert [scaled.of(cid) for cid in range(50)] == [rule.of(cid) for cid in range(50)]


# memory


def test_a_client_has_the_largest_rank_that_fits() -> None:
    assert memory_rule(0.64).of(3) == 2
    assert memory_rule(1.27).of(3) == 2
    assert memory_rule(1.28).of(3) == 4
    assert memory_rule(1000.0).of(3) == 16
    assert memory_rule(1.28, choices=(4, 2)).of(3) == 4
    # a head of 50 000 parameters takes 0.8 MB
    assert memory_rule(1.44 + 0.63, head=50_000).of(3) == 2
    assert memory_rule(1.44 + 0.64, head=50_000).of(3) == 4


def test_a_list_of_budgets_is_drawn_evenly() -> None:
    found = Counter(memory_rule([0.7, 3.0, 3.0]).of(cid) for cid in range(3000))
    assert set(found) == {2, 8}
    assert abs(found[2] - 1000) < 130  # five standard deviations


def test_a_range_of_budgets_is_drawn_evenly_over_its_logarithm() -> None:
    rule = memory_rule(BudgetRange(low=1, high=16))
    budgets = [rule.budget_of(cid) for cid in range(4000)]
    assert 1 <= min(budgets) < 1.02
    assert 15.7 < max(budgets) <= 16
    # each doubling holds a quarter of the clients; five standard deviations around 1000
    for low in (1, 2, 4, 8):
        assert abs(sum(low <= budget < 2 * low for budget in budgets) - 1000) < 137


ranges = st.tuples(st.floats(0.65, 30), st.floats(1.0, 20)).map(
    lambda pair: BudgetRange(low=pair[0], high=pair[0] * pair[1])
)


@given(budget=ranges, more_low=st.floats(1.0, 9), more_high=st.floats(1.0, 9), cid=st.integers(0))
def test_a_larger_budget_never_lowers_a_rank(
    budget: BudgetRange, more_low: float, more_high: float, cid: int
) -> None:
    low = min(budget.low * more_low, budget.high * more_high)
    wider = BudgetRange(low=max(low, budget.low), high=budget.high * more_high)
    assert memory_rule(wider).budget_of(cid) >= memory_rule(budget).budget_of(cid) * (1 - 1e-12)
    roomy = replace(memory_rule(wider), budget_mb=memory_rule(wider).budget_of(cid) * (1 + 1e-9))
    assert roomy.of(cid) >= memory_rule(budget).of(cid)


@pytest.mark.parametrize(
    ("budget", "share"),
    [
        (0.6, "100.0%"),
        ([0.5, 0.6, 1, 1], "50.0%"),
        (BudgetRange(low=0.32, high=1.28), "50.0%"),
        (BudgetRange(low=0.1, high=0.2), "100.0%"),
        (BudgetRange(low=0.5, high=0.5), "100.0%"),
    ],
    ids=["one", "list", "range", "range below", "range of one"],
)
def test_a_client_too_small_for_any_rank_is_an_error_that_says_what_is_enough(
    budget: Any, share: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        memory_rule(budget)
    (problem,) = caught.value.problems
    assert problem.startswith(f"adapter.rank.budget_mb: {share} of the clients have less")
    assert "than the 0.64 MB that rank 2 takes" in problem
    assert "smallest budget be 0.64 or more" in problem


@given(rank_parameters=st.integers(1, 10**10), head=st.integers(0, 10**8))
def test_the_budget_that_the_error_names_is_enough(rank_parameters: int, head: int) -> None:
    rule = replace(memory_rule(1e12), rank_parameters=rank_parameters, head_parameters=head)
    with pytest.raises(ConfigError) as caught:
        replace(rule, budget_mb=rule.needed_mb(2) * 0.999)
    named = float(str(caught.value).partition("less than the ")[2].split()[0])
    assert replace(rule, budget_mb=named).of(0) == 2


def test_a_frozen_head_takes_no_memory_for_training() -> None:
    rank = {"policy": "memory", "choices": [1], "budget_mb": 0.001}
    shapes = {"q": (4, 6)}
    with pytest.raises(ConfigError, match="head included"):
        ranks_of(config_of(rank), shapes, 1000)
    assert ranks_of(config_of(rank, "adapter.head=frozen"), shapes, 1000).of(0) == 1


# errors


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        ("many", "adapter.rank: input should be a valid integer"),
        ([], "adapter.rank: too short; give at least 1"),
        ([2, 0], "adapter.rank.1: input should be greater than 0 (got 0)"),
        ({"policy": "teirs"}, "adapter.rank.policy: no such policy; choose one of tiers,"),
        ({"choices": [2]}, "adapter.rank.policy: missing; choose one of tiers, distribution, mem"),
        ({"policy": None}, "adapter.rank.policy: no such policy"),
        ({"policy": "tiers"}, "adapter.rank.tiers: missing"),
        ({"policy": "tiers", "tiers": []}, "adapter.rank.tiers: too short"),
        (
            {"policy": "tiers", "tiers": [{"rank": 4, "share": 0.5}, {"rank": 2, "share": 0.4}]},
            "adapter.rank: the shares of the tiers sum to 0.9; make them sum to 1",
        ),
        ({**DISTRIBUTION, "weights": [1]}, "adapter.rank: 4 choices have 1 weights"),
        ({**DISTRIBUTION, "weight": [1]}, "adapter.rank.weight: unknown key. Did you mean 'weig"),
        ({**DISTRIBUTION, "weights": [1, 1, 1, 0]}, "adapter.rank.weights.3: input should be gre"),
        ({**MEMORY, "budget_mb": "lots"}, "adapter.rank.budget_mb: give megabytes (a number"),
        ({**MEMORY, "budget_mb": []}, "adapter.rank.budget_mb: too short"),
        ({**MEMORY, "budget_mb": {"low": 2, "high": 1}}, "adapter.rank.budget_mb: low 2 is above"),
        ({**MEMORY, "budget_mb": float("inf")}, "adapter.rank.budget_mb: input should be a finite"),
    ],
)
def test_a_wrong_policy_is_one_fault_told_at_its_place(rank: object, said: str) -> None:
    (problem,) = rank_problems(rank)
    assert problem.startswith(said)
    assert "\n" not in problem


def test_a_misspelt_policy_gets_a_suggestion() -> None:
    (problem,) = rank_problems({"policy": "teirs"})
    assert problem.endswith("(got 'teirs'). Did you mean 'tiers'?")


def test_all_faults_of_a_policy_are_told_at_once_and_the_algorithms_too() -> None:
    tiers = [{"rank": 0, "shre": 2}, {"rank": 4, "share": 2}]
    found = problems({"algorithm": "fedit", "adapter": {"rank": {**TIERS, "tiers": tiers}}})
    assert sorted(problem.split(": ")[0] for problem in found) == [
        "adapter.rank",
        "adapter.rank.tiers.0.rank",
        "adapter.rank.tiers.0.share",
        "adapter.rank.tiers.0.shre",
        "adapter.rank.tiers.1.share",
    ]
    assert any(problem.endswith("shre: unknown key. Did you mean 'share'?") for problem in found)


# the command line


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("adapter.rank={policy: teirs}", "Did you mean 'tiers'?"),
        ("adapter.rank={policy: tiers, tiers: [{rank: 2, share: 0.7}]}", "sum to 0.7"),
        ("adapter.rank={policy: memory, choices: [2], budget_mb: 1e-6}", "smallest budget"),
    ],
)
def test_a_bad_policy_is_refused_by_the_command_line(
    command: str, word: str, said: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    file = write_config(tmp_path, tiny_model("llama"), "algorithm=flora")
    assert said in " ".join(fails(command, file, word).split())
    assert not (tmp_path / "runs").exists()


def test_check_shows_how_many_clients_have_each_rank(tiny_model: TinyModel, tmp_path: Path) -> None:
    word = "adapter.rank={policy: tiers, tiers: [{rank: 4, share: 0.3}, {rank: 2, share: 0.7}]}"
    file = write_config(tmp_path, tiny_model("llama"), "algorithm=flora")
    code, text = call("check", file, word)
    assert code == 0, text
    assert "rank up to 4 on" in text
    assert "2 for 2, 4 for 1 of 3 clients" in text
    code, text = call("check", file)
    assert code == 0, text
    assert "rank 2 on" in text
    assert " of 3 clients" not in text.partition("rounds")[0]


def test_check_and_run_agree_on_what_fits_a_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_model("llama"), "algorithm=flora")
    size = check(make_config(yaml.safe_load(file.read_text()))).size
    per_rank = size.adapter_parameters / 2  # the file says rank 2
    budgets = [16 * per_rank * rank / 1e6 for rank in (1, 3, 4)]
    word = f"adapter.rank={{policy: memory, choices: [1, 2, 4], budget_mb: {budgets}}}"
    report = check(make_config(yaml.safe_load(file.read_text()), [word]))
    assert sum(report.ranks.values()) == 3
    assert set(report.ranks) == {1, 2, 4}
    assert call("run", file, "-q", word)[0] == 0
    ledger = (tmp_path / "runs" / "one" / "ledger.jsonl").read_text()
    sent = sum(yaml.safe_load(line)["up_bytes"] for line in ledger.splitlines())
    assert report.traffic.up_bytes * report.traffic.rounds_played == sent
