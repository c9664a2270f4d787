"""A matrix of runs: planned whole, carried out, resumed, and summed up over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from cli_world import call, fails
from small_runs import small_config, write_questions

from fedllm.algorithms import ALGORITHMS
from fedllm.config import dump
from fedllm.errors import ConfigError
from fedllm.experiment import matrix as matrix_module
from fedllm.experiment.comparison import Figure, Line, lines, markdown
from fedllm.experiment.matrix import Matrix, carry_out, cells, load_matrix

TinyModel = Callable[[str], Path]


def matrix_of(folder: Path, model: Path, **changes: object) -> Matrix:
    """Two algorithms in two settings, two seeds each."""
    base = yaml.safe_load(dump(small_config(folder, model, write_questions(folder / "rows.jsonl"))))
    for key in ("algorithm", "name", "output_dir", "seed"):
        del base[key]
    base["evaluation"]["metrics"] = ["token_accuracy", "loss"]
    tree = {
        "name": "small",
        "base": base,
        "settings": {
            "even": {"federation.partition.name": "iid"},
            "uneven": {"federation.partition.name": "quantity"},
        },
        "algorithms": ["fedit", {"name": "rolora", "flip_every": 2, "label": "slow rolora"}],
        "references": {"alone": {"federation.num_clients": 1, "federation.cohort_size": 1}},
        "seeds": [0, 1],
    }
    return Matrix.model_validate({**tree, **changes})


def finished(matrix: Matrix, folder: Path, **options: int) -> Sequence[Line]:
    """Carry a matrix out and sum it up."""
    errors = [done.error for done in carry_out(matrix, folder, told=lambda done: None, **options)]
    assert not any(errors), errors
    return lines(cells(matrix, folder))


def test_every_cell_is_a_run_of_its_own(tiny_model: TinyModel, tmp_path: Path) -> None:
    matrix = matrix_of(tmp_path, tiny_model("llama"))
    table = finished(matrix, tmp_path / "out")
    assert [(line.setting, line.label) for line in table] == [
        (setting, label)
        for setting in ("even", "uneven")
        for label in ("alone", "fedit", "slow rolora")
    ]
    assert all(line.seeds == 2 and line.metric == "token_accuracy" for line in table)
    config = yaml.safe_load(
        (tmp_path / "out/uneven/slow rolora/seed-1/config.yaml").read_text(encoding="utf-8")
    )
    assert config["algorithm"] == {"name": "rolora", "flip_every": 2}
    assert (config["seed"], config["federation"]["partition"]["name"]) == (1, "quantity")


def test_figures_are_the_mean_and_deviation_of_what_the_runs_ended_with(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    matrix = matrix_of(tmp_path, tiny_model("llama"), algorithms=["fedit"], references={})
    line = finished(matrix, tmp_path / "out")[0]
    last = []
    for seed in (0, 1):
        file = tmp_path / f"out/even/fedit/seed-{seed}/metrics.jsonl"
        last.append(json.loads(file.read_text().splitlines()[-1]))
    values = [record["eval"]["global"]["token_accuracy"] for record in last]
    assert line.overall == Figure(statistics.fmean(values), statistics.stdev(values))
    assert line.up_bytes is not None
    assert line.up_bytes.mean == statistics.fmean(r["bytes"]["up_total"] for r in last)
    assert line.agg_error is not None
    assert line.agg_error.mean > 0


def test_what_is_finished_is_not_run_again_and_what_is_not_is_resumed(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    matrix = matrix_of(tmp_path, tiny_model("llama"), references={}, seeds=[0])
    first = finished(matrix, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("metrics.jsonl")}
    cut = tmp_path / "out/even/fedit/seed-0"
    whole = (cut / "metrics.jsonl").read_bytes()
    (cut / "metrics.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    for folder in (cut / "checkpoints").iterdir():
        if folder.name != "1":
            for file in sorted(folder.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            folder.rmdir()
    (cut / "checkpoints").rename(cut / "gone")
    again = finished(matrix, tmp_path / "out")
    assert (cut / "metrics.jsonl").read_bytes() == whole
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("metrics.jsonl")}
    assert {p for p in before if before[p] != after[p]} == {cut / "metrics.jsonl"}
    assert [(a.overall, a.own) for a in again] == [(b.overall, b.own) for b in first]


@pytest.mark.slow
def test_two_processes_find_what_one_does(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix_module, "_RUNS_A_PROCESS", 1)  # so that processes are renewed
    matrix = matrix_of(tmp_path, tiny_model("llama"), references={}, seeds=[0])
    one = finished(matrix, tmp_path / "one")
    two = finished(matrix, tmp_path / "two", workers=2)
    assert [(a.overall, a.worst) for a in one] == [(b.overall, b.worst) for b in two]


def test_all_wrong_cells_are_told_before_anything_runs(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    matrix = matrix_of(
        tmp_path,
        tiny_model("llama"),
        algorithms=["fedit", {"name": "flexlroa"}],
        settings={"even": {}, "odd": {"training.batch_size": 0}},
    )
    with pytest.raises(ConfigError) as told:
        carry_out(matrix, tmp_path / "out", told=lambda done: None)
    text = str(told.value)
    assert "Did you mean 'flexlora'" in text
    assert "odd, fedit: training.batch_size" in text
    assert not (tmp_path / "out").exists()


def test_a_cell_that_fails_does_not_stop_the_others(tiny_model: TinyModel, tmp_path: Path) -> None:
    matrix = matrix_of(
        tmp_path,
        tiny_model("llama"),
        references={"burnt": {"training.learning_rate": 1e38, "training.local_steps": 6}},
        algorithms=["fedit"],
        settings={"even": {}},
        seeds=[0],
    )
    file = tmp_path / "m.yaml"
    file.write_text(yaml.safe_dump(matrix.model_dump(mode="json")), encoding="utf-8")
    text = fails("bench", file, "--to", tmp_path / "out")
    assert "1 of 2 runs failed (burnt)" in text
    assert "rejected every update" in text
    assert "| fedit |" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


def test_the_command_writes_the_table_it_prints(tiny_model: TinyModel, tmp_path: Path) -> None:
    matrix = matrix_of(tmp_path, tiny_model("llama"), references={}, seeds=[0])
    file = tmp_path / "m.yaml"
    file.write_text(yaml.safe_dump(matrix.model_dump(mode="json")), encoding="utf-8")
    code, text = call("bench", file, "algorithms=[rolora]", "--to", tmp_path / "out")
    assert code == 0, text
    assert "rolora" in text
    assert "fedit" not in text
    (rows,) = json.loads((tmp_path / "out" / "table.json").read_text())[:1]
    assert rows["label"] == "rolora"


@pytest.mark.parametrize(
    ("source", "part"),
    [("algorthms", "Did you mean 'algorithms'"), ("{}", "name: field required")],
)
def test_what_is_no_matrix_is_refused(source: str, part: str, tmp_path: Path) -> None:
    if source == "{}":
        (tmp_path / "m.yaml").write_text(source)
        source = str(tmp_path / "m.yaml")
    assert part in fails("bench", source)


def test_the_matrix_that_comes_along_holds_every_algorithm(tmp_path: Path) -> None:
    matrix = load_matrix("algorithms")
    found = cells(matrix, tmp_path)
    assert {cell.label for cell in found} == {*ALGORITHMS, *matrix.references}
    assert len(found) == len(matrix.settings) * len(matrix.seeds) * (len(ALGORITHMS) + 1)


def test_shares_are_per_cent_and_the_unknown_is_a_dash() -> None:
    line = Line("even", "x", "loss", 1, Figure(0.5, 0.01), Figure(2.5, 0.1), *(None,) * 5)
    row = markdown([line]).splitlines()[-1]
    assert row == "| x | 50.0 ± 1.0 | 2.500 ± 0.100 | - | - | - | - | - | 1 |"


def test_one_seed_has_no_deviation_and_unknown_values_are_left_out() -> None:
    assert Figure.of([2.0]) == Figure(2.0, 0.0)
    assert Figure.of([1.0, None, 3.0, float("nan")]) == Figure(2.0, statistics.stdev([1.0, 3.0]))
    assert Figure.of([None]) is None
