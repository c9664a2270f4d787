"""Reports of made-up runs: what stands in them, that nothing leaves them, how large they are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from results_runs import learned
from results_worlds import Work, course, evaluated, world_run

from fedllm.errors import RunError
from fedllm.results import report_figures, report_tables
from fedllm.results.history import History
from fedllm.results.report import page, write_report
from fedllm.results.run_dir import RunDir

JOBS = [
    Work(0, 0.0, 3000.0, 600.0, staleness=2, until_s=20000.0),
    Work(1, 0.0, 900.0, 9000.0, "window", until_s=9901.0),
    Work(2, 50.0, 100.0, 50.0, "dropout"),
]
ROUNDS = [evaluated(number, number / 4) for number in range(4)]


def small_world(path: Path) -> RunDir:
    return world_run(path, JOBS, ROUNDS, federation={"num_clients": 20, "rounds": 3})


class Page(HTMLParser):
    """Collects headings, tables by heading, and tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[str] = []
        self._heading, self._inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        if tag == "h2":
            self._heading = ""
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self._heading][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "h2":
            self._heading += data
        if self._inside in ("td", "th"):
            self.tables[self._heading][-1][-1] += data


def history(*records: dict[str, Any]) -> History:
    return History(records)


# what stands in it


def test_a_report_tells_how_jobs_ended(tmp_path: Path) -> None:
    found = Page(page(small_world(tmp_path / "one"))).tables
    head, *rows = found["Jobs"]
    assert head == ["outcome", "because", "jobs", "client-hours", "kJ"]
    by_outcome = {row[0]: row[2:] for row in rows}
    assert by_outcome["arrived"] == ["1", "1", "0.01"]
    assert by_outcome["window"] == ["1", "2.75", "0.01"]


def test_fairness_counts_clients_that_were_never_seen(tmp_path: Path) -> None:
    rows = Page(page(small_world(tmp_path / "one"))).tables["Fairness"]
    assert ["used updates of a client", "20", "0.05", "0", "0.5", "0.950"] in rows
    assert ["jobs of a client", "20", "0.15", "0", "1", "0.850"] in rows


def test_fairness_tells_of_the_lowest_and_the_highest_tenth() -> None:
    by_client = {str(cid): {"accuracy": cid / 100} for cid in range(20)}
    record = {"round": 1, "main_metric": "accuracy", "eval": {"clients": {"by_client": by_client}}}
    found = Page("<h2>x</h2>" + report_tables.fairness(history(record), course([]), 20)).tables
    assert found["x"][1][1:5] == ["20", "0.095", "0.005", "0.185"]


def test_the_rounds_of_prototype_mode_have_no_columns_of_time(tmp_path: Path) -> None:
    found = Page(page(learned(tmp_path / "one", rounds=2))).tables["Rounds"]
    assert found[0] == ["round", "exact_match", "train loss", "MB up", "MB down", "updates"]
    assert [row[0] for row in found[1:]] == ["0", "1", "2"]


def test_the_rounds_of_a_run_without_a_global_view_tell_the_personal_one() -> None:
    record = {"round": 1, "main_metric": "f1", "eval": {"personal": {"mean": {"f1": 0.25}}}}
    found = Page("<h2>x</h2>" + report_tables.rounds(history(record))).tables["x"]
    assert dict(zip(*found, strict=True))["f1"] == "0.25"


def test_of_many_rounds_some_are_shown_and_always_the_last() -> None:
    records = [evaluated(number, 0.5) for number in range(1001)]
    text = report_tables.rounds(history(*records))
    rows = Page("<h2>x</h2>" + text).tables["x"][1:]
    assert len(rows) <= 200
    assert rows[-1][0] == "1000"
    assert "One round in 6 is shown" in text


def test_a_report_says_whether_a_run_is_at_its_end(tmp_path: Path) -> None:
    assert "goes on" not in page(small_world(tmp_path / "done"))
    young = world_run(tmp_path / "young", JOBS, ROUNDS, federation={"rounds": 9})
    assert "goes on, or was stopped" in page(young)
    last = {**ROUNDS[-1], "ended": "nobody <will> come"}
    early = world_run(tmp_path / "early", JOBS, [*ROUNDS[:-1], last], federation={"rounds": 9})
    assert "ended early: nobody &lt;will&gt; come" in page(early)


# figures


def test_the_gantt_chart_tells_why_jobs_were_lost_and_when_versions_were_made() -> None:
    figure = report_figures.gantt(course(JOBS, [1800.0, 3600.0]))
    assert figure is not None
    traces = {trace.name: trace for trace in figure.data}
    assert {"training", "sent, 2 or 3 late", "lost: window", "lost: dropout"} <= set(traces)
    assert list(traces["new version"].x) == [30.0, 30.0, None, 60.0, 60.0, None]
    (told,) = traces["lost: window"].text
    assert told.split("<br>") == [
        "client 1, job 2: window",
        "its client's window closed",
        "4 steps, 10 J",
        "2 MB down, 1 MB up",
    ]
    assert traces["sent, 2 or 3 late"].text[0].endswith("2 versions late")
    (late,) = zip(traces["sent, 2 or 3 late"].base, traces["sent, 2 or 3 late"].x, strict=True)
    assert late == pytest.approx((3001 / 60, 10.0), abs=1e-4)


def test_of_many_evaluations_the_last_stays_in_the_figure() -> None:
    figure = report_figures.quality(
        history(*(evaluated(n, n / 2000) for n in range(2001))), "round"
    )
    assert figure is not None
    (line,) = figure.data
    assert len(line.x) <= 400
    assert (line.x[-1], line.y[-1]) == (2000, 1.0)


@pytest.mark.parametrize("against", ["virtual_time_s", "energy_total_j"])
def test_what_does_not_pass_is_no_axis(against: str) -> None:
    record = {**evaluated(1, 0.5), against: 0.0}
    assert report_figures.quality(history(record), against) is None
    assert report_figures.quality(history(evaluated(1, 0.5)), against) is not None


def test_of_many_clients_every_so_many_is_shown_and_that_is_said() -> None:
    figure = report_figures.participation(
        course([Work(c, 0.0, 1.0, 1.0) for c in range(1000)]), 2000
    )
    assert figure is not None
    assert {len(trace.x) for trace in figure.data} == {334}
    assert {len(trace.y) for trace in figure.data} == {334}
    told = figure.layout.xaxis.title.text
    assert told.startswith("1000 of 2000 clients never seen")
    assert told.endswith("one client in 3 is shown")


# nothing leaves it, nothing gets in


def test_no_button_sends_a_figure_to_a_server(tmp_path: Path) -> None:
    text = page(small_world(tmp_path / "one"))
    configs = re.findall(r'\{"responsive": true.*?\}\s*\)', text, re.S)
    assert len(configs) == text.count('<div class="plot">') > 5
    for config in configs:
        found = json.loads(config.rstrip(" \n)"))
        assert found["showSendToCloud"] is False
        buttons = {name for group in found["modeBarButtons"] for name in group}
        assert buttons == {"zoom2d", "pan2d", "resetScale2d", "toImage"}


def test_a_browser_is_told_to_fetch_nothing(tmp_path: Path) -> None:
    text = page(small_world(tmp_path / "one"))
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text, re.S)
    assert policy is not None
    rules = dict(rule.split(maxsplit=1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'"
    assert not any("http" in rule or "*" in rule for rule in rules.values())


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    bad = "</script><img src=x onerror=alert(1)>"
    values = {"global": {bad: 0.5}}
    rounds = [{**evaluated(n, 0.5), "main_metric": bad, "eval": values} for n in range(2)]
    run = world_run(tmp_path / "<img src=x onerror=alert(2)>", JOBS, rounds)
    found = Page(page(run))
    assert "img" not in found.tags
    usual = Page(page(small_world(tmp_path / "usual")))
    assert found.tags.count("script") == usual.tags.count("script")


# files


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is a folder; give the name of a file"):
        write_report(small_world(tmp_path / "one"), tmp_path)


def test_the_report_of_a_run_is_made_anew_however_it_is_named(tmp_path: Path) -> None:
    run = small_world(tmp_path / "one")
    path = write_report(run)
    path.write_text("old")
    assert write_report(run, tmp_path / "one" / ".." / "one" / "report.html").read_text() != "old"


@pytest.mark.slow
@pytest.mark.parametrize("clients", [40, 100_000])
def test_a_report_of_a_hundred_thousand_jobs_stays_small_and_takes_seconds(
    tmp_path: Path, clients: int
) -> None:
    ends = ("arrived", "arrived", "dropout", "window", "stale")
    jobs = [
        Work(n * 7919 % clients, 10.0 * n, 200.0, 90.0, ends[n % 5], n % 6, 10.0 * n + 400.0)
        for n in range(100_000)
    ]
    rounds = [evaluated(n, 0.5, virtual_time_s=100.0 * n) for n in range(10_001)]
    run = world_run(tmp_path / "one", jobs, rounds, federation={"num_clients": clients})
    began_s = time.process_time()
    text = page(run)
    assert time.process_time() - began_s < 30.0  # about 5 s; minutes if each job were drawn
    assert len(text.encode()) < 6_000_000


@pytest.mark.slow
def test_a_browser_shows_every_figure_under_the_policy(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("there is no Chromium here")
    path = write_report(small_world(tmp_path / "one"))
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
             f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    for complaint in ("Uncaught", "Refused to", "violates"):
        assert complaint not in done.stderr
    titles = re.findall('data-title="(.*?)"', done.stdout)
    assert set(titles) == {"Zoom", "Pan", "Reset axes", "Download plot as a PNG"}
    assert titles.count("Zoom") == path.read_text().count('<div class="plot">')
