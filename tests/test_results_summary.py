"""The final table: figures that follow from the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from results_runs import config_yaml, learned

from fedllm.errors import ConfigError
from fedllm.results import History, MetricRow, RunDir, overview, summary_rows


def record(number: int, **values: Any) -> dict[str, Any]:
    return {"round": number, "main_metric": "accuracy", "eval": {"global": values}}


def run_of(path: Path, *records: dict[str, Any]) -> RunDir:
    run = RunDir.create(path / "one", config_yaml())
    run.append("metrics", records)
    return run


def test_a_row_tells_first_last_and_the_earliest_best(tmp_path: Path) -> None:
    run = run_of(
        tmp_path,
        record(0, accuracy=0.1, loss=3.0),
        {"round": 1},
        record(2, accuracy=0.8, loss=0.5),
        record(3, accuracy=0.8, loss=float("nan")),
        record(4, accuracy=0.6, loss=0.9),
    )
    accuracy, loss = summary_rows(run)
    assert accuracy == MetricRow("accuracy", "global", 0.1, 0.6, 0.8, best_round=2, is_main=True)
    assert loss == MetricRow("loss", "global", 3.0, 0.9, 0.5, best_round=2, is_main=False)


def test_the_main_metric_comes_first_in_every_view(tmp_path: Path) -> None:
    rows = summary_rows(learned(tmp_path / "one", rounds=2, personal=True))
    assert [row.view for row in rows[:5]] == [
        "global",
        "client mean",
        "worst 10 % of clients",
        "personal mean",
        "personal, worst 10 %",
    ]
    assert {row.metric for row in rows[:5]} == {"exact_match"}
    assert [row.is_main for row in rows] == [row.metric == "exact_match" for row in rows]


def test_a_run_without_evaluation_has_no_rows(tmp_path: Path) -> None:
    assert summary_rows(run_of(tmp_path, {"round": 1, "train": {"loss": 1.0}})) == []


def test_the_overview_adds_up_ledger_and_clock(tmp_path: Path) -> None:
    run = learned(tmp_path / "one", num_clients=3, rounds=4)
    told = overview(run)
    assert (told.name, told.algorithm, told.num_clients) == ("one", "fedit", 3)
    assert (told.bytes_up, told.bytes_down) == (4 * 3 * 16384, 4 * 3 * 32768)
    assert told.wall_s == pytest.approx(5 * 1.5)
    assert told.is_finished


def test_a_run_that_stopped_early_is_not_finished(tmp_path: Path) -> None:
    told = overview(run_of(tmp_path, record(0, accuracy=0.1), record(3, accuracy=0.2)))
    assert (told.rounds_done, told.rounds_planned) == (3, 10)
    assert not told.is_finished


def test_a_configuration_of_another_version_is_named(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "one", "nmae: x\n")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        overview(run)


def test_clients_not_evaluated_last_keep_their_last_known_value() -> None:
    def evaluated(number: int, **values: float) -> dict[str, Any]:
        by_client = {cid[1:]: {"f1": value} for cid, value in values.items()}
        return {"round": number, "eval": {"clients": {"by_client": by_client}}}

    history = History((evaluated(1, c2=0.1, c10=0.2), evaluated(2, c2=0.3)))
    assert history.by_client("clients", "f1") == {2: 0.3, 10: 0.2}
