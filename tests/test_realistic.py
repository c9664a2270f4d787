"""Whole runs in realistic mode: prototype mode where nothing takes time, honest elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_world import call
from small_runs import Silent, final_digests, records, small_config, write_questions

from fedllm.config import Config, dump
from fedllm.errors import ConfigError
from fedllm.experiment.parts import build
from fedllm.experiment.run import resume, run
from fedllm.results import RunDir, plots

BOXES = "system={preset: edge-boxes, time_scale: 3000}"
SIZES = {
    "small": {"tflops": 0.1, "memory_gb": 0.0001, "bandwidth_gb_s": 1},
    "large": {"tflops": 1.0, "memory_gb": 1.0, "bandwidth_gb_s": 9},
}


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "plot_run", lambda directory: [])


@pytest.fixture
def configure(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Config]:
    data = write_questions(tmp_path / "questions.jsonl")
    return lambda *words: small_config(tmp_path, tiny_model("llama"), data, *words)


def devices(**shares: int) -> str:
    return f"system.devices={json.dumps({'of': shares, 'profiles': SIZES})}"


@pytest.mark.parametrize("algorithm", ["fedit", "ditto", "flora", "scaffold"])
def test_a_world_in_which_nothing_takes_time_is_prototype_mode(
    configure: Callable[..., Config], algorithm: str
) -> None:
    words = (f"algorithm={algorithm}", "federation.rounds=2")
    ideal = run(configure("name=ideal", *words), Silent()).path
    world = run(configure("name=world", *words, "mode=realistic"), Silent()).path
    assert records(world) == records(ideal)
    assert final_digests(world) == final_digests(ideal)


@pytest.mark.parametrize("schedule", ["sync", "async", "semi-sync", "sequential"])
def test_the_same_seed_gives_the_same_run_and_resuming_a_finished_one_changes_nothing(
    configure: Callable[..., Config], schedule: str
) -> None:
    cohort = ("federation.cohort_size=null",) if schedule == "sequential" else ()
    words = ("mode=realistic", f"federation.schedule={schedule}", BOXES, "federation.rounds=4")
    words = (*words, *cohort, "federation.num_clients=4")
    if schedule == "semi-sync":
        words = (*words, "federation.schedule.tiers=2")
    first, second = (
        run(configure(f"name={name}", *words), Silent()).path for name in ("first", "second")
    )
    assert records(first) == records(second)
    assert final_digests(first) == final_digests(second)
    before = records(first)
    resume(first, Silent())
    assert records(first) == before
    times = [r["virtual_time_s"] for r in RunDir.open(first).read("metrics")]
    assert times == sorted(times)
    assert times[-1] > 0


def test_clients_whose_device_is_too_small_are_found_before_anything_is_trained(
    configure: Callable[..., Config],
) -> None:
    words = ("mode=realistic", devices(small=1, large=1), "federation.num_clients=12")
    with pytest.raises(ConfigError) as told:
        build(configure(*words))
    for part in ("cannot hold the training", "with small (0.0001 GB)", "too_small: exclude"):
        assert part in str(told.value)
    with pytest.raises(ConfigError, match="12 of 12 clients"):
        build(configure("mode=realistic", devices(small=1), "federation.num_clients=12",
                        "system.devices.too_small=exclude"))  # fmt: skip
    parts = build(configure(*words, "system.devices.too_small=exclude"))
    pool = set(parts.loop.population.pool())
    fits = {cid for cid in range(12) if parts.loop.world.device(cid).name == "large"}  # type: ignore[attr-defined]
    assert pool == fits
    assert 0 < len(pool) < 12


def test_ranks_come_from_what_a_device_has_left(configure: Callable[..., Config]) -> None:
    rank = "adapter.rank={policy: memory, choices: [1, 2, 4], budget_mb: device}"
    words = ("mode=realistic", "algorithm=flexlora", rank, "federation.num_clients=8")
    parts = build(configure(*words, devices(large=1)))
    assert {parts.server.ranks.of(cid) for cid in range(8)} == {4}
    cost = parts.loop.world.cost  # type: ignore[attr-defined]
    exact = {"middle": {**SIZES["large"], "memory_gb": cost.memory_bytes(2) * 1.001 / 1e9}}
    system = f"system.devices={json.dumps({'of': 'middle', 'profiles': exact})}"
    parts = build(configure(*words, system))
    assert {parts.server.ranks.of(cid) for cid in range(8)} == {2}
    with pytest.raises(ConfigError, match="mode: realistic"):
        build(configure("algorithm=flexlora", rank))


def test_a_time_limit_ends_a_run_that_is_whole(configure: Callable[..., Config]) -> None:
    words = ("mode=realistic", BOXES, "federation.rounds=50", "federation.time_limit_s=2000")
    directory = run(configure(*words), Silent())
    last = directory.read("metrics")[-1]
    assert last["ended"] == "the time limit of 2000 s is reached"
    assert last["virtual_time_s"] == 2000.0
    assert "eval" in last
    assert last["round"] < 50
    assert final_digests(directory.path)
    code, text = call("show", str(directory.path))
    assert (code, "ended early" in text) == (0, True)
    assert "not finished" not in text


def test_the_ledger_of_a_run_adds_up(configure: Callable[..., Config]) -> None:
    words = ("mode=realistic", BOXES, "federation.schedule={name: buffered, size: 2}")
    directory = run(configure(*words, "federation.rounds=6"), Silent())
    ledger, metrics = directory.read("ledger"), directory.read("metrics")
    assert len({row["job"] for row in ledger}) == len(ledger)
    last = metrics[-1]
    assert last["bytes"]["up_total"] == sum(row["up_bytes"] for row in ledger)
    assert last["bytes"]["down_total"] == sum(row["down_bytes"] for row in ledger)
    assert last["energy_total_j"] == pytest.approx(sum(row["energy_j"] for row in ledger))
    counted: dict[str, int] = {}
    for record in metrics[1:]:
        for outcome, count in record["jobs"].items():
            counted[outcome] = counted.get(outcome, 0) + count
    assert sum(counted.values()) == len(ledger)
    for row in ledger:
        parts = row["download_s"] + row["train_s"] + row["upload_s"]
        assert parts <= row["ended_s"] - row["began_s"] + 1e-6


def test_check_tells_what_world_it_is(configure: Callable[..., Config], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump(configure("mode=realistic", BOXES, "federation.num_clients=6")))
    code, text = call("check", str(path))
    assert code == 0
    for word in ("schedule", "devices", "links", "a job", "there at the start"):
        assert word in text


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        (
            {"algorithm": "fedlease", "federation": {"schedule": "async"}},
            "not defined for 'fedlease'",
        ),
        (
            {"algorithm": "cyclic", "federation": {"schedule": "buffered"}},
            "choose sync or sequential",
        ),
        ({"federation": {"schedule": {"name": "buffered", "size": 99}}}, "never fill 99"),
        ({"mode": "realistic", "system": {"preset": "moon"}}, "no such name 'moon'"),
        ({"federation": {"at_window_close": "stop"}}, "'discard', 'partial' or 'pause'"),
    ],
)
def test_what_makes_no_sense_is_one_message_and_exit_code_two(
    tmp_path: Path, tree: Any, told: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    code, text = call("check", str(path))
    assert code == 2
    assert told in " ".join(text.split())
    assert "Traceback" not in text
