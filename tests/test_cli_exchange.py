"""What the command line tells of codecs, rejections, privacy, and exported adapters."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_world import call, write_config
from results_runs import config_yaml, learned
from rich.console import Console
from test_cli_figures import live, parts_of, picture, record_of

from fedllm.adapters.wire import WIRE
from fedllm.cli.plain import Plain
from fedllm.cli.tables import SUBJECTS
from fedllm.federation.robust import ROBUST
from fedllm.results import History, RunDir, overview
from fedllm.results.plots import aggregation_error, plot_run

# lists


@pytest.mark.parametrize(("subject", "table"), [("codecs", WIRE), ("robust", ROBUST)])
def test_codecs_and_rules_are_listed_in_full(subject: str, table: Mapping[str, Any]) -> None:
    rows = json.loads(call("list", subject, "--json")[1])
    assert {row["name"]: row["what"] for row in rows} == {n: table[n].summary for n in table}
    _, printed = call("list", subject)
    for name in table:
        assert name in printed
        assert table[name].summary in " ".join(printed.split())


def test_the_help_names_everything_that_can_be_listed() -> None:
    _, text = call("list", "--help")
    words = " ".join(text.replace("│", " ").split())
    assert [subject for subject in SUBJECTS if subject not in words] == []


# while a run goes on


def rejected(number: int, *cids: int) -> dict[str, Any]:
    rows = [{"client": cid, "reason": f"client {cid} sent nonsense"} for cid in cids]
    return {**record_of(number, 0.1), "rejected": rows}


def test_the_live_view_counts_rejected_updates_without_growing() -> None:
    view = live(5, 5)
    view.record(rejected(0))
    before = picture(view)
    assert "rejected" not in before
    view.record(rejected(1, 2))
    assert "1 update rejected" in picture(view)
    view.record(rejected(2, 0, 4))
    after = picture(view)
    assert "3 updates rejected" in after
    assert len(after.splitlines()) == len(before.splitlines())


def test_the_plain_view_counts_the_rejected_of_a_round_in_its_line() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    view = Plain(console)
    view.begin(parts_of(3, 3), SimpleNamespace())  # type: ignore[arg-type]
    for record in (rejected(0), rejected(1, 0, 2), rejected(2)):
        view.record(record)
    *_, first, second = console.export_text().splitlines()
    assert "2 rejected" in first
    assert "rejected" not in second


# fedllm show


def run_with(path: Path, *records: Mapping[str, Any], server_s: float = 0.0) -> RunDir:
    """Make up a run with these fields in its rounds."""
    run = RunDir.create(path / "one", config_yaml(federation={"rounds": len(records)}))
    for number, record in enumerate(records, start=1):
        run.append("metrics", [{"round": number, "rejected": [], **record}])
        run.append("timing", [{"round": number, "wall_s": 2.0, "aggregate": server_s}])
    return run


def shown(run: RunDir) -> str:
    code, text = call("show", run.path)
    assert code == 0, text
    return " ".join(text.split())


EPSILON = {"value": 3.14159, "delta": 1e-5, "adjacency": "x", "reason": "It holds for uniform."}


def test_show_tells_aggregation_rejections_and_privacy(tmp_path: Path) -> None:
    lost = [{"client": 1, "reason": "nan"}, {"client": 3, "reason": "nan"}]
    run = run_with(
        tmp_path,
        {"agg_error": 0.5, "rejected": lost, "privacy": {**EPSILON, "value": 2.0}},
        {"agg_error": 0.1, "rejected": lost[:1], "privacy": EPSILON},
        server_s=0.0125,
    )
    text = shown(run)
    assert "aggregation error 0.3 on average, 0.1 in the last round" in text
    assert "aggregation took the server 12.5 ms a round" in text
    assert "rejected updates: 3" in text
    assert "epsilon 3.14 at delta 1e-05. It holds for uniform." in text
    facts = json.loads(call("show", run.path, "--json")[1])
    assert facts["agg_error"] == pytest.approx(0.3)
    assert (facts["last_agg_error"], facts["rejected"]) == (0.1, 3)
    assert (facts["server_s"], facts["privacy"]) == (0.025, EPSILON)


def test_show_says_nothing_of_what_a_run_does_not_have(tmp_path: Path) -> None:
    text = shown(run_with(tmp_path, {"agg_error": None}, {"agg_error": None}))
    for word in ("aggregation", "rejected", "privacy", "epsilon"):
        assert word not in text


def test_show_calls_the_rounding_of_an_exact_method_nothing(tmp_path: Path) -> None:
    text = shown(run_with(tmp_path, {"agg_error": 3e-16}, {"agg_error": 0.0}))
    assert "aggregation error 0 on average, 0 in the last round" in text


def test_show_gives_the_reason_where_no_epsilon_can_be_claimed(tmp_path: Path) -> None:
    none = {**EPSILON, "value": None, "reason": "Clients take turns."}
    text = shown(run_with(tmp_path, {"privacy": none}))
    assert "privacy: no epsilon at delta 1e-05. Clients take turns." in text


def test_a_run_from_before_has_no_such_figures(tmp_path: Path) -> None:
    told = overview(learned(tmp_path / "one", rounds=2))
    assert (told.agg_error, told.last_agg_error, told.rejected, told.privacy) == (
        None,
        None,
        0,
        None,
    )
    assert told.server_s == 0.0


# plots


def test_the_aggregation_error_is_drawn_on_a_logarithmic_axis() -> None:
    records = (
        {"round": 0},
        {"round": 1, "agg_error": 0.5},
        {"round": 2, "agg_error": None},
        {"round": 3, "agg_error": 0.0},
        {"round": 4, "agg_error": 1e-3},
    )
    figure = aggregation_error(History(records))
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    (line,) = axes.get_lines()
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [(1, 0.5), (4, 1e-3)]


@pytest.mark.parametrize("error", [None, 0.0])
def test_an_error_that_is_unknown_or_nothing_is_not_drawn(
    error: float | None, tmp_path: Path
) -> None:
    assert aggregation_error(History(({"round": 1, "agg_error": error},))) is None
    assert plot_run(run_with(tmp_path, {"agg_error": error})) == []
    written = plot_run(run_with(tmp_path / "known", {"agg_error": 0.25}))
    assert [path.name for path in written] == ["agg_error.png"]


# exports


def test_an_export_in_our_own_layout_is_loaded_by_the_lines_it_prints(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write_config(tmp_path, tiny_model("llama"), "algorithm=fedalt", "evaluation.every=0")
    code, text = call("run", file, "--quiet")
    assert code == 0, text
    run = tmp_path / "runs" / "one"
    (cid, *_) = sorted(int(p.name) for p in (run / "checkpoints" / "2" / "clients").iterdir())
    folder = tmp_path / "own"
    code, text = call("export", run, "--to", folder, "--client", cid)
    assert code == 0, text
    assert "fedllm_adapter.json" in text
    lines = [line.strip() for line in text.splitlines() if line.startswith("  ")]
    program = [line for line in lines if "import" in line or " = " in line]
    assert len(program) == 3
    assert "peft" not in text
    names: dict[str, Any] = {}
    exec("\n".join(program), names)
    ids = torch.arange(9, 20)[None]
    with torch.no_grad():
        own = names["model"](input_ids=ids).logits
        fresh = type(names["base"]).from_pretrained(tiny_model("llama"))(input_ids=ids).logits
    assert own.isfinite().all()
    assert not torch.allclose(own, fresh, atol=1e-4)
