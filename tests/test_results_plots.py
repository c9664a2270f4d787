"""Plots: drawn from the run directory alone, each only where there is data for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from results_runs import config_yaml, learned

from fedllm.errors import RunError
from fedllm.results.history import History
from fedllm.results.plots import clients, heterogeneity, plot_run, quality, traffic, training_loss
from fedllm.results.run_dir import RunDir

ALL = ["quality.png", "training_loss.png", "clients.png", "bytes.png", "heterogeneity.png"]


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def history(*records: dict[str, Any]) -> History:
    return History(records)


def lines(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """Label of each line to its points."""
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axes.get_lines()
    }


def test_a_whole_run_has_all_its_figures(tmp_path: Path) -> None:
    run = learned(tmp_path / "one", personal=True, rounds=4)
    written = plot_run(run)
    assert names(written) == ALL
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert {path.parent for path in written} == {run.path / "plots"}


def test_plotting_neither_needs_the_lock_nor_takes_it(tmp_path: Path) -> None:
    with learned(tmp_path / "one", rounds=2) as run:
        assert names(plot_run(RunDir.open(run.path))) == ALL
        run.append("metrics", [])


def test_a_run_that_has_just_begun_has_no_figures(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "one", config_yaml())
    assert plot_run(run) == []
    assert not (run.path / "plots").exists()


def test_a_run_without_evaluation_has_the_figures_that_do_not_need_it(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "one", config_yaml())
    bytes_sent = {"up": 1, "down": 2, "up_total": 1, "down_total": 2}
    run.append("metrics", [{"round": 1, "train": {"loss": 2.0}, "bytes": bytes_sent}])
    assert names(plot_run(run)) == ["training_loss.png", "bytes.png"]


def test_the_training_figure_shows_the_mean_and_leaves_gaps_for_nan() -> None:
    figure = training_loss(
        history(
            {"round": 0},
            {"round": 1, "train": {"loss": 2.0, "clients": [{"client": 0, "loss": 2.0}]}},
            {"round": 2, "train": {"loss": None, "clients": [{"client": 0, "loss": None}]}},
            {"round": 3, "train": {"loss": 1.0, "clients": [{"client": 0, "loss": 1.0}]}},
        )
    )
    assert figure is not None
    assert lines(figure.axes[0])["mean"] == [(1, 2.0), (3, 1.0)]


def evaluation(value: float) -> dict[str, Any]:
    return {
        "global": {"accuracy": value, "loss": 1 - value},
        "clients": {
            "mean": {"accuracy": value, "loss": 1.0},
            "worst_10": {"accuracy": value / 2, "loss": 2.0},
            "by_client": {"0": {"accuracy": value / 2}, "1": {"accuracy": value}},
        },
    }


def evaluated(value: float, number: int) -> dict[str, Any]:
    total = {"up_total": number * 1_000_000, "down_total": number * 3_000_000}
    record = {"round": number, "main_metric": "accuracy", "bytes": total}
    return {**record, "eval": evaluation(value)}


def test_the_quality_figure_has_a_panel_a_metric_and_a_line_a_view() -> None:
    figure = quality(history(evaluated(0.2, 0), {"round": 1}, evaluated(0.6, 2)))
    assert figure is not None
    main, loss = figure.axes
    assert main.get_ylabel() == "accuracy"
    assert loss.get_ylabel() == "loss (nats per token)"
    points = [list(line.get_ydata()) for line in main.get_lines()]
    assert points == [[0.2, 0.6], [0.2, 0.6], [0.1, 0.3]]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["global", "client mean", "worst 10 % of clients"]


@pytest.mark.parametrize(("metric", "order"), [("accuracy", ["0", "1"]), ("loss", ["1", "0"])])
def test_the_client_figure_begins_with_the_worst(metric: str, order: list[str]) -> None:
    values = {"0": {metric: 0.1}, "1": {metric: 0.7}}
    record = {"round": 1, "main_metric": metric, "eval": {"clients": {"by_client": values}}}
    figure = clients(history(record))
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == order


def test_the_traffic_figure_sets_quality_against_bytes_both_ways() -> None:
    figure = traffic(history(evaluated(0.2, 0), evaluated(0.6, 2)))
    assert figure is not None
    sent, bought = figure.axes
    assert lines(sent)["down to clients"] == [(0, 0.0), (2, 6.0)]
    assert lines(sent)["up to the server"] == [(0, 0.0), (2, 2.0)]
    assert lines(bought)["global"] == [(0.0, 0.2), (8.0, 0.6)]


def test_few_groups_are_stacked_and_many_are_a_heat_map() -> None:
    few = heterogeneity({"group_names": ["a", "b"], "counts": [[1, 2], [3, 0]]})
    assert few is not None
    widths = [[bar.get_width() for bar in stack] for stack in few.axes[0].containers]
    assert widths == [[1, 3], [2, 0]]
    many = heterogeneity({"group_names": list(range(12)), "counts": [[1] * 12, [0] * 12]})
    assert many is not None
    shares = many.axes[0].images[0].get_array()
    assert shares.shape == (2, 12)
    assert shares.sum(axis=1).tolist() == pytest.approx([1.0, 0.0])


def test_a_split_without_rows_is_left_out() -> None:
    assert heterogeneity({"group_names": [], "counts": []}) is None


def test_a_plot_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "one", config_yaml())
    run.write("heterogeneity.json", json.dumps({"group_names": ["a"], "counts": [[1]]}))
    (run.path / "plots").write_text("in the way")
    with pytest.raises(RunError, match=r"heterogeneity\.png.*The run itself is untouched"):
        plot_run(run)
