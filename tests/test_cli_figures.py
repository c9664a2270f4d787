"""Numbers as text, and the live view as a picture."""

from __future__ import annotations

import doctest
import io
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedllm.cli import figures
from fedllm.cli.figures import bytes_text, duration_text, sparkline, value_text
from fedllm.cli.live import LiveView
from fedllm.cli.plain import Plain
from fedllm.config import Config

NUMBERS = st.floats(0, 1e13)


def test_the_examples_in_the_documentation_hold() -> None:
    assert doctest.testmod(figures).failed == 0


@given(NUMBERS)
def test_bytes_and_durations_stay_short(number: float) -> None:
    assert len(bytes_text(number)) <= 8
    assert len(duration_text(min(number, 3e6))) <= 9


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=99))
def test_a_sparkline_ends_with_the_last_value_at_its_height(values: list[float]) -> None:
    line = sparkline(values, 12)
    assert len(line) == min(len(values), 12)
    if values[-1] == max(values) > min(values) and len(values) <= 12:
        assert line[-1] == "█"


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_an_unknown_value_is_a_dash(value: float | None) -> None:
    assert value_text(value) == "-"


# views


def parts_of(clients: int, cohort: int, rounds: int = 4, **more: Any) -> Any:
    """Return as much of a run's parts as the views look at."""
    config = Config.model_validate(
        {
            "name": "demo",
            "federation": {"num_clients": clients, "cohort_size": cohort, "rounds": rounds},
            "evaluation": {"every": 2, "max_rows": 40},
            **more,
        }
    )
    jobs = [SimpleNamespace(cid=cid, steps=10) for cid in range(cohort)]
    counts = {"waiting": 2, "training": cohort, "uploading": 0, "paused": 0}
    return SimpleNamespace(
        config=config,
        server=SimpleNamespace(version=0),
        evaluator=SimpleNamespace(names=("exact_match", "loss")),
        partition=SimpleNamespace(train_sizes=np.full(clients, 50)),
        loop=SimpleNamespace(
            computation=SimpleNamespace(running=jobs),
            fleet=SimpleNamespace(counts=lambda: counts),
            queue=SimpleNamespace(now_s=7500.0),
        ),
        dataset=SimpleNamespace(test=range(100)),
        scopes=("global",),
    )


def record_of(number: int, score: float | None) -> dict[str, Any]:
    record: dict[str, Any] = {"round": number, "main_metric": "exact_match"}
    if score is not None:
        record["eval"] = {"global": {"exact_match": score, "loss": 1.0}}
    if number:
        sent = {"up": 1_000_000, "down": 2_000_000, "up_total": 7_000_000, "down_total": 8_000_000}
        clients = [{"client": 0, "loss": 1.25, "steps": 10, "samples": 50}]
        record |= {"bytes": sent, "train": {"loss": 1.5, "clients": clients}}
    return record


def picture(view: LiveView, height: int = 40) -> str:
    console = Console(width=100, height=height, record=True, file=io.StringIO())
    console.print(view.view())
    return console.export_text()


def live(clients: int, cohort: int, height: int = 40) -> LiveView:
    view = LiveView(Console(width=100, height=height, file=io.StringIO(), force_terminal=True))
    view.begin(parts_of(clients, cohort), SimpleNamespace())  # type: ignore[arg-type]
    return view


def test_before_anything_is_loaded_the_view_says_what_is_being_done() -> None:
    view = LiveView(Console(file=io.StringIO()))
    view.say("loading the model")
    assert "loading the model" in picture(view)


def test_the_view_shows_rounds_clients_metrics_and_bytes() -> None:
    view = live(3, 3)
    view.record(record_of(0, 0.1))
    view.record(record_of(1, None))
    view.record(record_of(2, 0.4))
    view.step(0, 5, 10)
    shown = picture(view)
    for text in (
        "demo · fedit · builtin:tiny · builtin:skills · 3 clients",
        "round 3 of 4",
        "5/10",
        "1.250",  # client 0's last loss
        "0.400",
        "best 0.400 (round 2)",
        "▁█",
        "1.500",
        "↑ 1.0 MB",
        "↓ 2.0 MB",
        "↑ 7.0 MB",
        "training",
    ):
        assert text in shown, shown


def test_a_realistic_run_shows_its_clock_and_what_its_clients_do() -> None:
    view = live(3, 3)
    assert "virtual time" not in picture(view)
    view.begin(parts_of(3, 3, mode="realistic"), SimpleNamespace())  # type: ignore[arg-type]
    assert "2 h 05" in picture(view)
    assert "2 waiting, 3 training" in picture(view)
    view.record({**record_of(1, None), "staleness": {"mean": 1.5, "max": 3}})
    assert "updates 1.5 versions late" in picture(view)


def test_a_line_tells_a_realistic_round() -> None:
    out = io.StringIO()
    view = Plain(Console(file=out, width=200))
    view.begin(parts_of(3, 3, mode="realistic"), SimpleNamespace())  # type: ignore[arg-type]
    more = {
        "virtual_time_s": 7500.0,
        "staleness": {"mean": 1.5, "max": 3},
        "jobs": {"arrived": 2, "window": 1},
        "ended": "time is up",
    }
    view.record({**record_of(1, None), **more})
    for text in ("at 2 h 05", "1.5 versions late", "lost 1 by window", "ended: time is up"):
        assert text in out.getvalue()


def test_of_many_clients_the_first_dozen_is_shown() -> None:
    view = live(40, 30)
    view.step(0, 1, 10)
    shown = picture(view)
    assert "+ 18 more" in shown
    assert sum("/10" in line for line in shown.splitlines()) == 12


def test_in_a_low_terminal_fewer_clients_are_shown() -> None:
    view = live(40, 30, height=20)
    view.step(0, 1, 10)
    assert len(picture(view, height=20).splitlines()) <= 20


def test_the_height_stays_while_a_run_goes_on() -> None:
    view = live(5, 5)
    heights = {len(picture(view).splitlines())}
    view.record(record_of(0, 0.1))
    for done in (1, 10):
        for cid in range(5):
            view.step(cid, done, 10)
        heights.add(len(picture(view).splitlines()))
    view.answered(20)
    view.record(record_of(1, 0.2))
    heights.add(len(picture(view).splitlines()))
    assert len(heights) == 1


def test_generated_answers_are_counted_over_all_views() -> None:
    view = live(2, 2)
    view.record(record_of(0, 0.1))
    for count in (8, 16, 8, 16):  # the engine counts anew for each group of views
        view.answered(count)
    assert view.answers == 32
    assert "32 of 40 answers" in picture(view)


def test_progress_never_goes_back_nor_beyond_the_end() -> None:
    view = live(2, 2)
    seen = [view.progress]
    view.record(record_of(0, 0.1))
    for number in range(1, 5):
        for done in range(1, 11):
            for cid in range(2):
                view.step(cid, done, 10)
                seen.append(view.progress)
        view.record(record_of(number, None))
        seen.append(view.progress)
    assert seen == sorted(seen)
    assert seen[-1] == 4


def test_a_fault_in_drawing_does_not_reach_the_run() -> None:
    view = live(2, 2)
    view.record({"round": 1, "bytes": "nonsense"})
    assert "round 2 of 4" in picture(view)


def test_the_plain_view_writes_a_line_a_round() -> None:
    console = Console(width=60, record=True, file=io.StringIO())
    view = Plain(console)
    view.begin(parts_of(3, 3), SimpleNamespace())  # type: ignore[arg-type]
    view.record(record_of(0, 0.1))
    view.record(record_of(1, 0.3))
    lines = console.export_text().splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("round 1/4  exact_match 0.300  best 0.300  train loss 1.500  up 1.0")
