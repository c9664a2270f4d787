"""Comparisons of made-up runs: what is grouped, what it cost, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_world import call
from results_runs import learned
from results_worlds import Work, evaluated, world_run

from fedllm.errors import RunError
from fedllm.results.compare import Spread, compare
from fedllm.results.compare_plots import draw

SCORES = (0.1, 0.4, 0.6)
ASYNC = {"name": "async", "alpha": 0.5}


def made(path: Path, scores: tuple[float, ...] = SCORES, **sections: Any) -> Path:
    """A run with an evaluation a round; an hour, 4 MB and 500 J each."""
    rounds = [evaluated(number, score) for number, score in enumerate(scores)]
    del rounds[0]["bytes"]  # as the loop writes it: nothing is sent before training
    return world_run(path, [Work(0, 0.0, 1.0, 1.0)], rounds, **sections).path


def scheduled(path: Path, **schedule: Any) -> Path:
    return made(path, mode="realistic", federation={"schedule": schedule})


# groups


def test_name_and_seed_do_not_make_a_group(tmp_path: Path) -> None:
    (group,) = compare([made(tmp_path / str(n), seed=n, name=f"run-{n}") for n in range(3)])
    assert len(group.runs) == 3
    assert group.settings == {}
    assert group.label == "0"


def test_where_a_run_is_computed_does_not_make_a_group(tmp_path: Path) -> None:
    paths = [
        made(tmp_path / str(n), mode="realistic", seed=n, execution={"workers": n})
        for n in range(2)
    ]
    (group,) = compare(paths)
    assert group.settings == {}


def test_groups_that_differ_in_much_are_named_by_their_first_run(tmp_path: Path) -> None:
    one = {"batch_size": 1, "local_steps": 2, "learning_rate": 0.1}
    other = {"batch_size": 3, "local_steps": 4, "learning_rate": 0.2}

    def labels(*paths: Path) -> list[str]:
        first = made(paths[0], training=one, model={"path": "a"}, adapter={"rank": 2})
        second = made(paths[1], training=other, model={"path": "b"}, adapter={"rank": 4})
        return [group.label for group in compare([first, second])]

    assert labels(tmp_path / "night", tmp_path / "day") == ["night", "day"]
    alike = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert labels(*alike) == [str(path) for path in alike]


def test_groups_of_one_schedule_are_told_apart_by_its_settings(tmp_path: Path) -> None:
    paths = [
        scheduled(tmp_path / "a", **ASYNC),
        scheduled(tmp_path / "b", **{**ASYNC, "alpha": 0.9}),
        scheduled(tmp_path / "c", name="sync"),
    ]
    groups = compare(paths)
    assert [group.label for group in groups] == ["async, alpha 0.5", "async, alpha 0.9", "sync"]
    assert [group.settings["federation.schedule.alpha"] for group in groups] == [0.5, 0.9, None]


# costs


def test_means_and_deviations_are_over_the_runs_of_a_group(tmp_path: Path) -> None:
    paths = [made(tmp_path / "a", (0.1, 0.5)), made(tmp_path / "b", (0.1, 0.4, 0.7), seed=1)]
    (group,) = compare(paths)
    assert group.figures["last"] == Spread(pytest.approx(0.6), pytest.approx(0.02**0.5), 2)  # type: ignore[arg-type]
    assert group.figures["virtual_time_s"] == Spread(5400.0, pytest.approx(1800 * 2**0.5), 2)  # type: ignore[arg-type]
    up, down = group.figures["bytes_up"], group.figures["bytes_down"]
    assert up is not None
    assert down is not None
    assert (up.mean, down.mean) == (1.5e6, 4.5e6)


@pytest.mark.parametrize(
    ("target", "spent"),
    [(0.05, (0.0, 0.0, 0.0, 0.0)), (0.4, (1, 3600.0, 4e6, 500.0)), (0.5, (2, 7200.0, 8e6, 1000.0))],
)
def test_a_target_costs_what_was_spent_when_it_was_first_reached(
    tmp_path: Path, target: float, spent: tuple[float, ...]
) -> None:
    (group,) = compare([made(tmp_path / "one")], target)
    costs = ("round", "virtual_time_s", "bytes_total", "energy_total_j")
    assert [group.figures[f"{cost} to target"] for cost in costs] == [
        Spread(value, 0.0, 1) for value in spent
    ]


def test_rounds_after_the_last_evaluation_count(tmp_path: Path) -> None:
    path = made(tmp_path / "one")
    more = {key: value for key, value in evaluated(5, 0.0).items() if key != "eval"}
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(more) + "\n")
    (group,) = compare([path])
    assert group.figures["round"] == Spread(5.0, 0.0, 1)
    assert group.figures["bytes_up"] == Spread(5e6, 0.0, 1)


def test_an_unknown_cost_is_not_nothing(tmp_path: Path) -> None:
    path = learned(tmp_path / "one", rounds=4).path
    (group,) = compare([path], 0.01)
    for cost in ("virtual_time_s", "energy_total_j"):
        assert group.figures[cost] is None
        assert group.figures[f"{cost} to target"] is None
    assert group.figures["bytes_total to target"] is not None


def test_the_table_tells_an_unknown_cost_from_a_target_not_reached(tmp_path: Path) -> None:
    learned(tmp_path / "ideal", rounds=4)
    made(tmp_path / "world")
    words = ["--target", "loss=-5", "--format", "markdown"]
    for name, time in (("ideal", "-"), ("world", "not reached")):
        code, text = call("compare", str(tmp_path / name), *words)
        assert code == 0
        head, _, row = ([c.strip() for c in line.split("|")] for line in text.strip().splitlines())
        cells = dict(zip(head, row, strict=True))
        assert cells["virtual time to -5"] == time
        assert cells["rounds to -5"] == "not reached"


def test_a_target_that_some_seeds_reach_says_how_many(tmp_path: Path) -> None:
    paths = [made(tmp_path / "a"), made(tmp_path / "b", (0.1, 0.2, 0.3), seed=1)]
    _, text = call("compare", *map(str, paths), "--target", "0.5")
    assert "2 (1 of 2)" in text


@pytest.mark.parametrize(("rounds", "ended", "told"), [(9, "", 1), (2, "", 0), (9, "time", 0)])
def test_runs_that_have_not_come_to_their_end_are_marked(
    tmp_path: Path, rounds: int, ended: str, told: int
) -> None:
    more = {"ended": ended} if ended else {}
    scores = [evaluated(number, score, **more) for number, score in enumerate(SCORES)]
    sections = {"federation": {"rounds": rounds}}
    path = world_run(tmp_path / "one", [Work(0, 0.0, 1.0, 1.0)], scores, **sections).path
    (group,) = compare([path])
    assert [run.is_finished for run in group.runs] == [not told]
    _, text = call("compare", str(path))
    assert ("1 (1 unfinished)" in text) == bool(told)
    (as_json,) = json.loads(call("compare", str(path), "--format", "json")[1])
    assert as_json["unfinished"] == [str(path)] * told


# what cannot be compared


def test_a_run_given_twice_is_not_two_seeds(tmp_path: Path) -> None:
    path = made(tmp_path / "one")
    with pytest.raises(RunError, match="given more than once"):
        compare([path, tmp_path / "one" / ".." / "one"])


def test_runs_without_a_common_view_are_not_mixed(tmp_path: Path) -> None:
    path = made(tmp_path / "one")
    other = tmp_path / "two"
    views = {"personal": {"mean": {"accuracy": 0.5}}}
    world_run(other, [], [{**evaluated(0, 0.0), "eval": views}])
    with pytest.raises(RunError, match=r"no view of accuracy in common.*evaluation\.scope"):
        compare([path, other])


def test_a_view_that_all_have_is_chosen(tmp_path: Path) -> None:
    views = {"global": {"accuracy": 0.1}, "personal": {"mean": {"accuracy": 0.9}}}
    both, own = tmp_path / "both", tmp_path / "own"
    world_run(both, [], [{**evaluated(0, 0.0), "eval": views}])
    world_run(own, [], [{**evaluated(0, 0.0), "eval": {"personal": views["personal"]}}], seed=1)
    (group,) = compare([both, own])
    assert {run.view for run in group.runs} == {"personal mean"}
    assert group.figures["last"] == Spread(0.9, 0.0, 2)


def test_different_metrics_are_told(tmp_path: Path) -> None:
    paths = [made(tmp_path / "one"), learned(tmp_path / "two", rounds=2).path]
    with pytest.raises(RunError, match=r"different metrics \(accuracy, exact_match\)"):
        compare(paths)
    assert compare(paths, metric="loss")


def test_a_misspelt_metric_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"it has accuracy, loss\. Did you mean 'accuracy'\?"):
        compare([made(tmp_path / "one")], metric="acuracy")


@pytest.mark.parametrize("word", ["nan", "loss=inf", "much", "loss="])
def test_a_target_is_a_number(tmp_path: Path, word: str) -> None:
    code, text = call("compare", str(made(tmp_path / "one")), "--target", word)
    assert code == 2
    assert "give a number, or METRIC=NUMBER" in text


# what is written


def test_nothing_is_drawn_if_one_picture_is_there(tmp_path: Path) -> None:
    groups, folder = compare([made(tmp_path / "one")]), tmp_path / "out"
    folder.mkdir()
    (folder / "energy_total_j.png").write_text("mine")
    with pytest.raises(RunError, match="nothing is overwritten"):
        draw(groups, folder)
    assert [path.name for path in folder.iterdir()] == ["energy_total_j.png"]


def test_what_is_not_known_of_any_run_is_not_drawn(tmp_path: Path) -> None:
    ideal = compare([learned(tmp_path / "ideal", rounds=2).path])
    assert {path.stem for path in draw(ideal, tmp_path / "a")} == {"round", "bytes_total"}
    world = compare([made(tmp_path / "world")])
    assert {path.stem for path in draw(world, tmp_path / "b")} == {
        "round",
        "virtual_time_s",
        "bytes_total",
        "energy_total_j",
    }


def test_a_file_in_the_way_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, text = call("compare", str(made(tmp_path / "one")), "--to", str(tmp_path / "file"))
    assert code == 2
    assert "Cannot write" in text
    assert (tmp_path / "file").read_text() == "mine"


def test_the_settings_that_differ_are_listed(tmp_path: Path) -> None:
    paths = [scheduled(tmp_path / "a", **ASYNC), scheduled(tmp_path / "b", name="sync")]
    _, text = call("compare", *map(str, paths))
    listed = text.partition("the groups differ in")[2]
    rows = {line.split()[0]: line.split()[1:] for line in listed.splitlines() if line.strip()}
    assert rows["federation.schedule.alpha"] == ["0.5", "-"]
    _, alone = call("compare", str(paths[0]))
    assert "differ" not in alone


@pytest.mark.parametrize(("form", "cell"), [("latex", r"\#1 50\% \_x\{y\} \& a|b"),
                                            ("markdown", r"#1 50% _x{y} & a\|b")])  # fmt: skip
def test_signs_that_mean_something_to_a_format_are_escaped(
    tmp_path: Path, form: str, cell: str
) -> None:
    path = made(tmp_path / "#1 50% _x{y} & a|b")
    code, text = call("compare", str(path), "--format", form)
    assert code == 0
    assert cell in text
