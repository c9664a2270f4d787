"""Timelines, reports and comparisons: read from run directories, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from cli_world import call
from hypothesis import given
from hypothesis import strategies as st
from small_runs import Silent, small_config, write_questions

from fedllm.errors import RunError
from fedllm.experiment.run import run
from fedllm.results import RunDir
from fedllm.results.compare import Spread, compare
from fedllm.results.report import page, write_report
from fedllm.results.time_plots import time_unit
from fedllm.results.timeline import Timeline, gini

WORLD = (
    "mode=realistic",
    "federation.num_clients=4",
    "federation.rounds=4",
    "federation.schedule={name: buffered, size: 2}",
    "system={preset: edge-boxes, time_scale: 3000, dropout: {per_job: 0.2}}",
    "evaluation.every=2",
)


@pytest.fixture(scope="module")
def runs(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    data, model = write_questions(folder / "questions.jsonl"), tiny_model("llama")

    def carried_out(*words: str) -> Path:
        return run(small_config(folder, model, data, *words), Silent()).path

    return {
        "ideal": carried_out("name=ideal"),
        "world": carried_out("name=world", *WORLD),
        "other": carried_out("name=other", *WORLD, "seed=1"),
        "async": carried_out("name=async", *WORLD, "federation.schedule=async"),
    }


# timelines


def job(number: int, client: int, began: float, ended: float, outcome: str = "arrived") -> Any:
    return {
        "job": number,
        "client": client,
        "began_s": began,
        "ended_s": ended,
        "outcome": outcome,
        "download_s": 0.0,
        "train_s": ended - began,
        "upload_s": 0.0,
        "staleness": 1 if outcome == "arrived" else None,
    }


def event(time_s: float, kind: str, client: int, number: int, state: str, **more: Any) -> Any:
    return {
        "time_s": time_s,
        "event": kind,
        "client": client,
        "job": number,
        "state": state,
        **more,
    }


def test_a_paused_job_is_two_stretches_of_training_and_one_of_sending() -> None:
    events = [
        event(0.0, "WINDOW_OPEN", 3, 1, "available", until_s=10.0),
        event(10.0, "WINDOW_CLOSE", 3, 1, "idle"),
        event(50.0, "WINDOW_OPEN", 3, 1, "training", until_s=90.0),
        event(60.0, "TRAINING_DONE", 3, 1, "uploading"),
        event(65.0, "UPLOAD_DONE", 3, 1, "idle"),
    ]
    course = Timeline(events, [job(1, 3, 0.0, 65.0)])
    found = [(s.start_s, s.end_s, s.phase, s.outcome) for s in course.segments()]
    assert found == [
        (0.0, 10.0, "training", "arrived"),
        (50.0, 60.0, "training", "arrived"),
        (60.0, 65.0, "uploading", "arrived"),
    ]
    assert course.windows([3]) == {3: [(0.0, 10.0), (50.0, 65.0)]}
    assert course.segments([4]) == []


def test_counts_and_seconds_are_by_outcome_and_client() -> None:
    rows = [job(1, 3, 0.0, 5.0), job(2, 3, 5.0, 6.0, "dropout"), job(3, 1, 0.0, 2.0)]
    course = Timeline([event(6.0, "DROPOUT", 3, 2, "idle")], rows)
    assert course.outcomes == {"arrived": 2, "dropout": 1}
    assert course.seconds_by_outcome() == {"arrived": 7.0, "dropout": 1.0}
    assert course.jobs_by_client() == {1: (1, 1), 3: (2, 1)}
    assert course.busiest(1) == [3]


@given(st.lists(st.floats(0.0, 9.0), min_size=1, max_size=20))
def test_gini_is_the_mean_difference_over_twice_the_mean(values: list[float]) -> None:
    total, count = sum(values), len(values)
    found = gini(values)
    assert -1e-9 <= found < 1.0
    if total > 1e-6:
        pairs = sum(abs(a - b) for a in values for b in values)
        assert found == pytest.approx(pairs / (2 * count * total), abs=1e-9)


def test_at_work_counts_everybody_once(runs: dict[str, Path]) -> None:
    course = Timeline.of(RunDir.open(runs["world"]))
    _, training, uploading = course.at_work(400)
    spent = sum(course.seconds_by_outcome().values())
    counted = sum(training + uploading) * course.end_s / 400
    assert counted == pytest.approx(spent, rel=0.1)


@pytest.mark.parametrize(
    ("end_s", "name"),
    [(5.0, "seconds"), (500.0, "minutes"), (5e4, "hours"), (5e5, "days")],
)
def test_times_are_told_in_a_unit_that_fits(end_s: float, name: str) -> None:
    assert time_unit(end_s)[1] == name


def test_figures_of_time_are_drawn_where_time_passes(runs: dict[str, Path]) -> None:
    drawn = {path.stem for path in (runs["world"] / "plots").glob("*.png")}
    assert {"timeline", "quality_for_cost", "participation", "utilisation"} <= drawn
    ideal = {path.stem for path in (runs["ideal"] / "plots").glob("*.png")}
    assert not {"timeline", "quality_for_cost", "participation", "utilisation"} & ideal


# reports


class Outside(HTMLParser):
    """Collects what a page would fetch, and its headings."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "action")]


@pytest.mark.parametrize("name", ["ideal", "world", "async"])
def test_a_report_is_one_page_that_fetches_nothing(runs: dict[str, Path], name: str) -> None:
    path = write_report(RunDir.open(runs[name]))
    assert path == runs[name] / "report.html"
    text = path.read_text()
    assert len(text) < 6_000_000
    reader = Outside()
    reader.feed(text)
    assert reader.fetched == []
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert {"Quality", "Metrics", "Rounds", "Configuration", "Environment"} <= set(headings)
    assert ("What clients did" in headings) == (name != "ideal")
    assert text.count('<div class="plot">') > 0
    assert write_report(RunDir.open(runs[name])) == path  # made anew each time


def test_another_file_is_never_overwritten(runs: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "mine.html"
    assert write_report(RunDir.open(runs["ideal"]), other) == other
    with pytest.raises(RunError, match="nothing is overwritten"):
        write_report(RunDir.open(runs["ideal"]), other)


def test_text_of_a_run_is_escaped(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "evil"
    shutil.copytree(runs["ideal"], copy)
    config = copy / "config.yaml"
    bad = "system_prompt: <script>alert(1)</script>"
    config.write_text(config.read_text().replace("system_prompt: null", bad))
    text = page(RunDir.open(copy))
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_a_run_that_goes_on_can_be_reported(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "young"
    shutil.copytree(runs["world"], copy)
    for name in ("metrics", "events", "ledger", "timing"):
        (copy / f"{name}.jsonl").write_text("")
    assert "round" in page(RunDir.open(copy))


@pytest.mark.slow
def test_a_browser_draws_a_report_without_an_error(runs: dict[str, Path], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("there is no Chromium here")
    path = write_report(RunDir.open(runs["world"]), tmp_path / "report.html")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
             f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert "Uncaught" not in done.stderr
    assert done.stdout.count("main-svg") >= 5


# comparisons


def test_runs_that_differ_in_their_seed_are_one_group(runs: dict[str, Path]) -> None:
    groups = compare([runs[name] for name in ("world", "other", "async")])
    assert [len(group.runs) for group in groups] == [2, 1]
    assert [group.label for group in groups] == ["buffered", "async"]
    last = [run.last for run in groups[0].runs]
    assert groups[0].figures["last"] == Spread.of(last)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6))
def test_a_spread_is_mean_and_deviation_of_what_is_known(values: list[float]) -> None:
    found = Spread.of([None, *values])
    assert found is not None
    mean = sum(values) / len(values)
    assert found.mean == pytest.approx(mean, abs=1e-9)
    square = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    assert found.deviation == pytest.approx(square**0.5, abs=1e-9)
    assert found.count == len(values)
    assert Spread.of([None]) is None


def test_the_cost_of_a_target_is_that_of_the_first_evaluation_that_reaches_it(
    runs: dict[str, Path],
) -> None:
    (group,) = compare([runs["world"]], target=1.1, metric="token_accuracy")
    assert group.figures["round to target"] is None
    (group,) = compare([runs["world"]], target=1e6, metric="loss")
    assert group.figures["round to target"] == Spread(0.0, 0.0, 1)
    (course,) = group.runs
    best = min(course.values.values())
    (group,) = compare([runs["world"]], target=best, metric="loss")
    first = min(number for number, value in course.values.items() if value <= best)
    spread = group.figures["round to target"]
    assert spread is not None
    assert spread.mean == first
    hours = group.figures["virtual_time_s to target"]
    assert hours is not None
    assert hours.mean == course.costs["virtual_time_s"][first]


def test_what_cannot_be_compared_is_told(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no bleu to compare by: it has"):
        compare([runs["world"]], metric="bleu")
    with pytest.raises(RunError, match="not a run directory"):
        compare([tmp_path])


def test_the_commands_print_and_draw(runs: dict[str, Path], tmp_path: Path) -> None:
    words = [str(runs[name]) for name in ("world", "other", "async")]
    code, text = call("compare", *words, "--target", "loss=0.01", "--to", str(tmp_path / "out"))
    assert code == 0
    assert "not reached" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"round.png", "bytes_total.png"}
    code, text = call("compare", *words, "--to", str(tmp_path / "out"))
    assert code == 2
    assert "nothing is overwritten" in text
    code, text = call("compare", *words, "--format", "json")
    assert [len(row["runs"]) for row in json.loads(text)] == [2, 1]
    code, text = call("compare", *words, "--format", "latex")
    assert text.startswith(r"\begin{tabular}")
    code, text = call("compare", *words, "--target", "high")
    assert (code, "METRIC=NUMBER" in text) == (2, True)
    code, text = call("report", str(runs["world"]), "--to", str(tmp_path / "x.html"))
    assert code == 0
    code, text = call("report", str(tmp_path / "none"))
    assert code == 2


def test_show_tells_of_virtual_time(runs: dict[str, Path]) -> None:
    code, text = call("show", str(runs["world"]))
    assert code == 0
    assert re.search(r"virtual time .* jobs: \d+ arrived", text)
    code, text = call("show", str(runs["ideal"]))
    assert "virtual time" not in text
