"""Devices, links, availability and the cost model against closed forms and their own promises."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.config import Config, SystemConfig, validate
from fedllm.config.profiles import DEVICES, LINKS
from fedllm.config.worlds import SUMMARIES, WORLDS
from fedllm.errors import ConfigError
from fedllm.experiment import load_config, make_config
from fedllm.seeding import uniform
from fedllm.system import ModelCost, SimulatedWorld, Work
from fedllm.system.draws import Choice, correlated
from fedllm.system.links import read_measured
from fedllm.system.traces import Record, WindowTrace, generate, write_as

COST = ModelCost(
    body_parameters=1_000_000,
    table_parameters=50_000,
    layers=2,
    hidden=128,
    intermediate=256,
    vocabulary=500,
    rank_parameters=1_000,
    supervised=0.5,
    length=32.0,
    batch_tokens=256.0,
)
WORK = Work(steps=4, passes=1.0, tokens_per_step=200.0, rank=8)
FIXED = {
    "devices": {"of": "box", "profiles": {"box": {
        "tflops": 0.002, "utilization": 0.5, "memory_gb": 1.0, "bandwidth_gb_s": 10.0,
        "train_w": 8.0, "transmit_w": 2.0}}},
    "links": {"of": "line", "profiles": {"line": {
        "downlink_mbps": 8.0, "uplink_mbps": 2.0, "latency_ms": 500.0}}},
}  # fmt: skip


def world(system: Any, seed: int = 0, cost: ModelCost = COST) -> SimulatedWorld:
    return SimulatedWorld(SystemConfig.model_validate(system), cost, seed)


# the cost model


def test_operations_of_a_step_are_those_of_the_formula() -> None:
    body = 4 * 1_000_000
    adapter = 6 * 8 * 1_000
    attention = 3 * 2 * 2 * 32 * 128
    output = 4 * 500 * 128 * 0.5
    assert COST.step_flops(200.0, 8) == 200 * (body + adapter + attention + output)


def test_checkpointing_is_slower_and_takes_less_memory() -> None:
    again = ModelCost(**{**COST.__dict__, "checkpointing": True})
    assert 1.3 < again.step_flops(200.0, 8) / COST.step_flops(200.0, 8) < 1.5
    assert again.memory_bytes(8) < COST.memory_bytes(8)


@pytest.mark.parametrize(
    ("precision", "size"), [("fp32", 4), ("bf16", 2), ("int8", 1), ("nf4", 0.5)]
)
def test_weights_take_the_bytes_of_their_precision(precision: Any, size: float) -> None:
    bare = {"batch_tokens": 0.0, "precision": precision}
    cost = ModelCost(**{**COST.__dict__, **bare})
    assert cost.fixed_bytes() == size * 1_050_000
    assert cost.memory_bytes(4) - cost.fixed_bytes() == 16 * 4 * 1_000


@given(st.integers(1, 64), st.floats(1.0, 1e4), st.integers(1, 64))
def test_time_grows_with_steps_tokens_and_rank(steps: int, tokens: float, rank: int) -> None:
    def fit_s(work: Work) -> float:
        return COST.fit_s(work, 1e9, 1e9)

    base = Work(steps, 1.0, tokens, rank)
    assert fit_s(base._replace(steps=2 * steps)) == pytest.approx(2 * fit_s(base))
    assert fit_s(base._replace(passes=2.0)) == pytest.approx(2 * fit_s(base))
    assert fit_s(base._replace(rank=rank + 1)) > fit_s(base) > 0
    assert fit_s(base._replace(tokens_per_step=2 * tokens)) >= fit_s(base)


# a hand-made world


def test_times_and_energy_of_a_hand_made_world_have_a_closed_form() -> None:
    made = world(FIXED)
    flops, moved = COST.step_flops(200.0, 8), COST.step_bytes(8)
    step_s = max(flops / 1e9, moved / 5e9)
    assert made.fit_s(0, WORK) == pytest.approx(4 * step_s)
    assert made.download_s(0, 1_000_000, 0.0, 1) == pytest.approx(0.5 + 1.0)
    assert made.upload_s(0, 1_000_000, 0.0, 1) == pytest.approx(0.5 + 4.0)
    assert made.upload_s(0, 1_000_000, 0.0, 3) == pytest.approx(0.5 + 12.0)
    assert made.upload_s(0, 0, 0.0, 1) == 0.0
    assert made.energy_j(0, 10.0, 1.0, 2.0) == pytest.approx(8 * 10 + 2 * 3)
    assert made.drops_after_s(0, 1, 10.0) == math.inf
    assert made.cell(0) is None


def test_halving_the_uplink_doubles_upload_times_and_nothing_else() -> None:
    half = json.loads(json.dumps(FIXED))
    half["links"]["profiles"]["line"]["uplink_mbps"] = 1.0
    whole, slow = world(FIXED), world(half)
    assert slow.upload_s(3, 10**6, 7.0, 1) - 0.5 == pytest.approx(
        2 * (whole.upload_s(3, 10**6, 7.0, 1) - 0.5)
    )
    assert slow.download_s(3, 10**6, 7.0, 1) == whole.download_s(3, 10**6, 7.0, 1)


def test_a_time_scale_multiplies_every_duration() -> None:
    whole, scaled = world(FIXED), world({**FIXED, "time_scale": 60.0})
    assert scaled.fit_s(0, WORK) == 60 * whole.fit_s(0, WORK)
    assert scaled.upload_s(0, 99, 0.0, 1) == 60 * whole.upload_s(0, 99, 0.0, 1)
    assert scaled.download_s(0, 99, 0.0, 1) == 60 * whole.download_s(0, 99, 0.0, 1)


def test_the_default_world_is_the_ideal_one() -> None:
    made = world({})
    assert made.window(5, 123.0) == (0.0, math.inf)
    assert (made.fit_s(5, WORK), made.download_s(5, 99, 0.0, 1), made.upload_s(5, 99, 0.0, 1)) == (
        0.0,
        0.0,
        0.0,
    )
    assert made.energy_j(5, 1.0, 1.0, 1.0) == 0.0


def test_the_paper_s_relative_times_are_kept() -> None:
    times = [
        world({"devices": {"of": f"paper-{n}"}}).fit_s(0, WORK) for n in ("tx2", "nano", "rpi")
    ]
    assert [time / times[0] for time in times] == pytest.approx([1.0, 1.8125, 11.625])


# draws


@pytest.mark.parametrize("preset", sorted(WORLDS))
def test_answers_do_not_depend_on_what_was_asked_before(preset: str) -> None:
    def answers(made: SimulatedWorld, cids: Any) -> dict[int, Any]:
        return {
            cid: (
                made.device(cid),
                made.link_name(cid),
                made.window(cid, 5e4),
                made.upload_s(cid, 10**6, 5e4, 2),
                made.download_s(cid, 10**6, 5e4, 1),
                made.drops_after_s(cid, 3, 100.0),
                made.cell(cid),
            )
            for cid in cids
        }

    forward = answers(world({"preset": preset}, 4), range(40))
    backward = answers(world({"preset": preset}, 4), reversed(range(40)))
    assert forward == backward
    assert forward != answers(world({"preset": preset}, 5), range(40)) or preset == "hospitals"


def test_uniform_numbers_are_uniform_and_stable() -> None:
    found = np.sort([uniform(1, "x", i) for i in range(4000)])
    assert float(np.abs(found - (np.arange(4000) + 0.5) / 4000).max()) < 0.03
    assert uniform(1, "x", 7) == uniform(1, "x", 7) != uniform(2, "x", 7)


@given(st.lists(st.floats(0.1, 9.0), min_size=1, max_size=5), st.floats(0.0, 0.999999))
def test_a_choice_follows_its_weights(weights: list[float], u: float) -> None:
    index, within = Choice(tuple(weights)).draw(u)
    assert sum(weights[:index]) <= u * sum(weights) * (1 + 1e-9) + 1e-9
    assert 0.0 <= within <= 1.0


def test_devices_come_in_the_shares_asked_for() -> None:
    made = world({"devices": {"of": {"a100": 3, "laptop": 1}}})
    names = [made.device(cid).name for cid in range(4000)]
    assert names.count("a100") / 4000 == pytest.approx(0.75, abs=0.03)


def test_a_spread_changes_speed_and_not_memory() -> None:
    made = world({"devices": {"of": "a100", "spread": 0.3}})
    speeds = np.log([made.device(cid).flops_per_s for cid in range(2000)])
    assert float(speeds.std()) == pytest.approx(0.3, abs=0.03)
    assert len({made.device(cid).memory_bytes for cid in range(50)}) == 1


@pytest.mark.parametrize("correlation", [-0.9, 0.0, 0.9])
def test_devices_and_links_are_as_correlated_as_asked(correlation: float) -> None:
    mixture = {
        "devices": {"of": ["raspberry-pi-5", "laptop", "a100", "h100"]},
        "links": {"of": ["4g", "wifi", "wired"]},
        "correlation": correlation,
    }
    made = world(mixture)
    rate = [-made.download_s(cid, 10**8, 0.0, 1) for cid in range(1500)]
    speed = [made.device(cid).flops_per_s for cid in range(1500)]
    ranks = [np.argsort(np.argsort(values)) for values in (rate, speed)]
    found = float(np.corrcoef(*ranks)[0, 1])
    assert found == pytest.approx(correlation, abs=0.15)


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_full_correlation_is_equality(u: float, other: float) -> None:
    assert correlated(u, other, 1.0) == pytest.approx(u, abs=1e-9)
    assert correlated(u, other, -1.0) == pytest.approx(1.0 - u, abs=1e-9)
    assert correlated(u, other, 0.0) == pytest.approx(other, abs=1e-9)


def test_rates_lie_in_their_range_and_vary_in_time_if_asked() -> None:
    still, moving = (world({"links": {"of": "4g", "variation": v}}) for v in (0.0, 0.5))
    for cid in range(50):
        seconds = still.download_s(cid, 10**9, 0.0, 1)
        assert 20 * 0.98 <= 8e3 / (seconds - 0.05) <= 101
    found = {round(moving.upload_s(1, 10**9, 600.0 * k, 1), 1) for k in range(9)}
    assert len(found) == 9
    same = [moving.upload_s(1, 10**9, time_s, 1) for time_s in (601.0, 1199.0)]
    assert same[0] == pytest.approx(same[1], rel=1e-3)  # jitter apart


def test_cells_are_shared_by_some() -> None:
    made = world({"links": {"of": "wifi", "cells": 4}})
    assert {made.cell(cid) for cid in range(200)} == {0, 1, 2, 3}


# availability

KINDS = [
    {"kind": "intermittent", "on_s": 50.0, "off_s": 80.0},
    {"kind": "intermittent", "on_s": 50.0, "off_s": 80.0, "distribution": "constant"},
    {"kind": "intermittent", "on_s": 50.0, "off_s": 80.0, "distribution": "lognormal"},
    {"kind": "diurnal", "chance": 0.6, "weekend_chance": 0.2, "time_zones": [-8, 0, 5.5]},
]


@pytest.mark.parametrize("availability", KINDS, ids=str)
@given(cid=st.integers(0, 500), time_s=st.floats(0.0, 3e6))
def test_windows_are_the_first_that_end_later_and_consistent(
    availability: Any, cid: int, time_s: float
) -> None:
    made = WORLD_OF[str(availability)]
    found = made.window(cid, time_s)
    assert found is not None
    open_s, close_s = found
    assert open_s < close_s
    assert close_s > time_s
    inside = max(open_s, time_s)
    assert made.window(cid, (inside + close_s) / 2) == found
    after = made.window(cid, close_s)
    assert after is not None
    assert after[0] >= close_s
    if open_s > time_s:  # nothing ends between, or it would have come first
        between = made.window(cid, (time_s + open_s) / 2)
        assert between == found


WORLD_OF = {str(kind): world({"availability": kind}) for kind in KINDS}


def test_the_share_that_is_there_is_that_of_on_and_off() -> None:
    made = WORLD_OF[str(KINDS[0])]
    for time_s in (0.0, 5000.0, 1e6):
        there = sum(made.window(cid, time_s)[0] <= time_s for cid in range(3000)) / 3000
        assert there == pytest.approx(50 / 130, abs=0.04)


def test_nights_are_by_local_time_and_weekends_apart() -> None:
    made = world({"availability": {"kind": "diurnal", "start_hour": 22, "hours": 7,
                                   "weekend_chance": 0.0, "time_zones": [9.0]}})  # fmt: skip
    night = 15 * 3600.0  # midnight where clocks are nine hours ahead
    assert all(made.window(cid, night)[0] <= night for cid in range(50))
    noon = 3 * 3600.0
    assert all(made.window(cid, noon)[0] > noon for cid in range(50))
    friday = 4 * 86400.0 + 20 * 3600.0  # 5 in the morning of Saturday, local time
    assert all(made.window(cid, friday + 6 * 3600)[0] > 6.5 * 86400.0 for cid in range(50))


def test_traces_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    record = generate(7, 3, "random", seed=1)
    write_as(record, "ours", path)
    trace = record.trace()
    in_order = world({"availability": {"kind": "trace", "path": path, "assignment": "in-order"}})
    for cid in range(20):
        assert in_order.window(cid, 5000.0) == trace.window(cid % 7, 5000.0)
    drawn = world({"availability": {"kind": "trace", "path": path}})
    known = {trace.window(index, 5000.0) for index in range(7)}
    assert {drawn.window(cid, 5000.0) for cid in range(100)} == known


@pytest.mark.parametrize("kind", ["trace", "intermittent", "diurnal", "always"])
def test_many_clients_asked_together_are_answered_as_one_by_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "trace.jsonl"
    write_as(generate(7, 3, "random", seed=1), "ours", path)
    made = world({"availability": {"kind": kind} | ({"path": path} if kind == "trace" else {})})
    alone = [made.window(cid, 5000.0) for cid in range(100)]
    assert list(made.windows(range(100), 5000.0)) == alone


@pytest.mark.parametrize(
    "there",
    [
        {"kind": "always"},
        {"kind": "intermittent", "on_s": 600.0, "off_s": 1800.0},
        {"kind": "diurnal", "hours": 6.0, "chance": 0.8, "weekend_chance": 0.5},
        {"kind": "trace"},
    ],
    ids=lambda there: there["kind"],
)
def test_presence_is_the_share_of_clients_that_is_there(
    tmp_path: Path, there: dict[str, Any]
) -> None:
    path = tmp_path / "trace.jsonl"
    write_as(generate(20, 7, "random", seed=1), "ours", path)
    made = world({"availability": there | ({"path": path} if there["kind"] == "trace" else {})})
    times = np.random.default_rng(0).uniform(0.0, 7 * 86400.0, size=200).tolist()
    found = [(made.window(cid, time_s), time_s) for time_s in times for cid in range(20)]
    share = np.mean([window is not None and window[0] <= time_s for window, time_s in found])
    assert made.presence == pytest.approx(share, abs=0.05)
    assert (made.presence == 1.0) is (there["kind"] == "always")


def test_a_trace_that_does_not_repeat_has_the_presence_of_its_span() -> None:
    own = {"a": [(0.0, 30.0)], "b": [(10.0, 20.0), (50.0, 90.0)], "c": []}
    assert WindowTrace.of(own, 100.0, wraps=False).presence == pytest.approx(80 / 300)
    assert WindowTrace.of({}, 100.0).presence == 1.0
    for_ever = WindowTrace.of(
        {"a": [(0.0, 30.0)]}, 100.0, wraps=False, coverage={"a": (0, 50)}, unknown="available"
    )
    assert for_ever.window(0, 1e9) == (50.0, math.inf)
    assert for_ever.presence == pytest.approx(0.8)


@given(st.integers(0, 300), st.integers(0, 300))
def test_dropouts_are_drawn_for_each_job(cid: int, job: int) -> None:
    made = world({"dropout": {"per_job": 1.0}})
    assert 0.0 <= made.drops_after_s(cid, job, 80.0) < 80.0
    assert made.drops_after_s(cid, job, 80.0) != made.drops_after_s(cid, job + 1, 80.0)


def test_dropouts_come_as_often_as_asked() -> None:
    often = world({"dropout": {"per_job": 0.25}})
    lost = sum(often.drops_after_s(cid, 1, 10.0) < math.inf for cid in range(4000)) / 4000
    assert lost == pytest.approx(0.25, abs=0.03)
    hourly = world({"dropout": {"per_hour": 2.0}})
    within = sum(hourly.drops_after_s(cid, 1, 1.0) < 1800.0 for cid in range(4000)) / 4000
    assert within == pytest.approx(1 - math.exp(-1.0), abs=0.03)


# files of others


def test_measured_links_are_read_and_drawn_above_zero(tmp_path: Path) -> None:
    path = tmp_path / "speeds.json"
    row = {"down_u": 1000.0, "down_sigma": 3000.0, "up_u": 500.0, "up_sigma": 100.0}
    path.write_text(json.dumps({"a": row}))
    made = world({"links": {"of": "measured", "measured": path}})
    times = [made.download_s(0, 1024 * 1000, 600.0 * k, 1) for k in range(300)]
    assert min(times) > 0
    ups = [made.upload_s(0, 1024 * 500, 600.0 * k, 1) for k in range(300)]
    assert float(np.median(ups)) == pytest.approx(1.0, abs=0.1)


def test_devices_and_links_of_a_trace_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    record = generate(5, 1, seed=2)
    write_as(record, "ours", path)
    made = world(
        {"devices": {"of": "trace", "trace": path}, "links": {"of": "trace", "trace": path}}
    )
    speeds = sorted(values["relative_speed"] for values in record.capacities.values())
    found = sorted(device.flops_per_s for device in made.devices.kinds)
    base = world({"devices": {"of": "phone-mid"}}).device(0).flops_per_s
    assert found == pytest.approx([base * speed for speed in speeds])
    assert {device.memory_bytes for device in made.devices.kinds} == {4e9}
    told = tmp_path / "told.jsonl"
    write_as(Record(10.0, capacities={"a": {"flops_per_s": 2e12}}), "ours", told)
    (own,) = world({"devices": {"of": "trace", "trace": told}}).devices.kinds
    assert own.flops_per_s == 2e12
    rates = {round(link["down_bps"] * (1 - link["loss"])) for link in record.links.values()}
    for cid in range(20):
        seconds = made.download_s(cid, 10**9, 0.0, 1) - 0.05
        assert min(abs(8e9 / seconds / rate - 1) for rate in rates) < 1e-6
    empty = tmp_path / "empty.jsonl"
    write_as(Record(10.0, windows={"a": [(0.0, 1.0)]}), "ours", empty)
    with pytest.raises(ConfigError, match=r"system\.devices\.trace: .* tells no capacity"):
        world({"devices": {"of": "trace", "trace": empty}})
    with pytest.raises(ConfigError, match=r"system\.links\.trace: .* tells no link"):
        world({"links": {"of": "trace", "trace": empty}})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"a": {"down_u": 1}}', '{"a": 3}'])
def test_a_file_that_holds_no_links_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "speeds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"system\.links\.measured"):
        read_measured(path)


def test_phones_of_a_benchmark_list_are_as_fast_as_their_score(tmp_path: Path) -> None:
    path = tmp_path / "phones.json"
    rows = [
        {"Model": "slow", "RAM": "4GB", "FP16_Score": "10000"},
        {"Model": "fast", "RAM": "8 GB", "FP16_Score": "30000"},
        {"Model": "none", "RAM": "", "FP16_Score": "-"},
    ]
    path.write_text(json.dumps(rows))
    made = world({"devices": {"of": "ai-benchmark", "ai_benchmark": path}})
    kinds = {device.name: device for device in made.devices.kinds}
    assert set(kinds) == {"slow", "fast"}
    assert kinds["fast"].flops_per_s == pytest.approx(3 * kinds["slow"].flops_per_s)
    assert kinds["fast"].memory_bytes == 4e9


@pytest.mark.realdata
def test_published_traces_are_read() -> None:
    root = Path(__file__).resolve().parents[1]
    traces = Path(os.environ.get("FEDLLM_REAL_DATA", root.parent / "shared" / "data")) / "traces"
    if not traces.is_dir():
        pytest.skip(f"needs {traces}, which is no part of the project")
    assert len(read_measured(traces / "network_speed_flash.json")) == 19
    phones = world({"devices": {"of": "ai-benchmark",
                                "ai_benchmark": traces / "device_ai_benchmark.json"}})  # fmt: skip
    assert len(phones.devices.kinds) > 300
    made = world({"links": {"of": "measured", "measured": traces / "network_speed_flash.json"}})
    seconds = [made.upload_s(cid, 10**6, 0.0, 1) for cid in range(200)]
    assert 0.05 < float(np.median(seconds)) < 2.0


# configuration


def test_presets_have_a_summary_and_can_be_changed_in_part() -> None:
    assert set(SUMMARIES) == set(WORLDS)
    assert len(WORLDS) >= 4
    for name in WORLDS:
        system = SystemConfig.model_validate({"preset": name, "links": {"of": "5g"}})
        assert system.links.of == {"5g": 1.0}
        assert system.devices == SystemConfig.model_validate({"preset": name}).devices


def test_a_system_file_is_read_from_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "worlds").mkdir()
    (tmp_path / "worlds" / "sys.yaml").write_text(
        "devices: {of: laptop}\navailability: {kind: trace, path: t.jsonl}\n"
    )
    (tmp_path / "run.yaml").write_text("mode: realistic\nsystem: worlds/sys.yaml\n")
    config = load_config(tmp_path / "run.yaml")
    assert config.system.devices.of == {"laptop": 1.0}
    assert config.system.availability.path == tmp_path / "worlds" / "t.jsonl"  # type: ignore[union-attr]
    changed = load_config(tmp_path / "run.yaml", ["system={preset: paper}"])
    assert changed.system.preset == "paper"
    (tmp_path / "run.yaml").write_text("mode: realistic\nsystem: none.yaml\n")
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"system": {"preset": "papers"}}, "Did you mean 'paper'?"),
        ({"system": {"devices": {"of": {"a10": 1}}}}, "Did you mean 'a100'?"),
        ({"system": {"links": {"of": "wi-fi"}}}, "Did you mean 'wifi'?"),
        ({"system": {"devices": {"of": "ai-benchmark"}}}, "no such name 'ai-benchmark'"),
        ({"system": {"links": {"profiles": {"x": {"uplink_mbps": [9, 2]}}}}}, "exchange them"),
        ({"system": {"availability": {"kind": "diurnal", "hour": 3}}}, "Did you mean 'hours'?"),
        ({"system": {"devices": {"of": "laptop"}}, "mode": "prototype"}, "set mode: realistic"),
    ],
)
def test_a_world_that_makes_no_sense_is_refused(tree: Any, told: str) -> None:
    config, problems = validate({"mode": "realistic", **tree})
    assert config is None
    assert any(told in problem for problem in problems), problems


def test_words_on_the_command_line_reach_inside_bare_names() -> None:
    tree = {"mode": "realistic", "updates": {"robust": "krum"}}
    tree["federation"] = {"schedule": "sync", "partition": "dirichlet"}
    words = ["federation.schedule.deadline_s=3", "updates.robust.byzantine=1"]
    words += ["system.availability.kind=intermittent", "system.availability.on_s=5"]
    config = make_config(tree, [*words, "federation.partition.alpha=0.3"])
    assert config.federation.schedule.deadline_s == 3  # type: ignore[union-attr]
    assert config.federation.partition.alpha == 0.3
    assert config.system.availability.on_s == 5  # type: ignore[union-attr]


def test_the_resolved_world_makes_the_same_world_again() -> None:
    system = SystemConfig.model_validate({"preset": "phones-overnight", "links": {"cells": 3}})
    again = Config.model_validate({"mode": "realistic", "system": system.model_dump(mode="json")})
    assert again.system == system


def test_every_profile_is_possible() -> None:
    assert len(DEVICES) >= 12
    assert set(LINKS) == {"wifi", "4g", "5g", "wired"}
    for profile in DEVICES.values():
        assert profile.train_w >= profile.transmit_w
