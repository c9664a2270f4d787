"""Whole runs on preferences and ratings: every algorithm, workers, resuming, realistic mode."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_worker import JudgingBuild, judge
from safetensors.torch import load_file
from small_runs import Silent, final_digests, records, small_config, write_questions

from fedllm.algorithms import ALGORITHMS
from fedllm.config import Config
from fedllm.errors import ConfigError
from fedllm.evaluation import BY_TASK
from fedllm.experiment import execution, make_config, parts
from fedllm.experiment.check import report
from fedllm.experiment.run import resume, run
from fedllm.results import plots
from fedllm.system import ModelCost

TASKS = ["preference", "rated"]
RATED = ["fedalt", "fedlease", "feddpa-t", "fedex-lora", "ilora", "scaffold", "slora"]
"""With routers, probing, mixed views, merged bases, a shifted start, gradients, sparse stages."""
each_task = pytest.mark.parametrize("task", TASKS)
FEDIT = "algorithm=fedit"


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the half of a run's time that its pictures take."""
    monkeypatch.setattr(plots, "plot_run", lambda directory: [])


Configure = Callable[..., Config]


@pytest.fixture
def configure(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Configure:
    """Give `configure(task, *words)`; the rows are judged as they are loaded."""
    data = write_questions(tmp_path / "questions.jsonl", rows=32)

    def make(task: Any, *words: str) -> Config:
        monkeypatch.setattr(parts, "load_dataset", judge(task))
        known = ("evaluation.metrics=auto", f"name={task}", *words)
        return small_config(tmp_path, tiny_model("llama"), data, *known)

    return make


def metrics(path: Path) -> list[Mapping[str, Any]]:
    """What each evaluation of a run found."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line["eval"] for line in lines if line.get("eval")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "task"),
    [*((name, "preference") for name in sorted(ALGORITHMS)), *((n, "rated") for n in RATED)],
)
def test_every_algorithm_trains(configure: Configure, algorithm: str, task: str) -> None:
    path = run(configure(task, f"algorithm={algorithm}", "evaluation.every=2"), Silent()).path
    *_, last = metrics(path)
    seen = [last["global"], last["clients"]["mean"]] if "global" in last else []
    seen += [last["personal"]["overall"]] if "personal" in last else []
    assert seen
    for values in seen:
        assert set(values) == set(BY_TASK[task])
        assert all(math.isfinite(value) for value in values.values())
    assert abs(seen[-1]["reward_margin"]) > 1e-5  # something was learned


@each_task
def test_a_federation_learns_what_is_preferred(configure: Configure, task: str) -> None:
    words = ("federation.rounds=6", "federation.cohort_size=3", "training.local_steps=6",
             "training.learning_rate=0.02", "evaluation.every=6")  # fmt: skip
    first, *_, last = metrics(run(configure(task, FEDIT, *words), Silent()).path)
    assert first["global"]["reward_accuracy"] == 0.0  # the model is still the base
    assert first["global"]["reward_margin"] == pytest.approx(0.0, abs=1e-6)
    assert last["global"]["reward_accuracy"] > 0.5
    assert last["global"]["reward_margin"] > 0.05
    assert last["global"]["preference_loss"] < first["global"]["preference_loss"] - 0.01


@pytest.mark.slow
@each_task
@pytest.mark.parametrize("algorithm", ["fedit", "flora", "ditto"])
def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not_been(
    configure: Configure, algorithm: str, task: str
) -> None:
    class Breaking(Silent):
        left = 2

        def record(self, record: Mapping[str, Any]) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    words = (f"algorithm={algorithm}", "federation.rounds=3")
    whole = run(configure(task, "name=whole", *words), Silent()).path
    broken = configure(task, "name=broken", *words)
    with pytest.raises(KeyboardInterrupt):
        run(broken, Breaking())
    again = resume(broken.run_dir, Silent()).path
    assert records(again) == records(whole)
    assert final_digests(again) == final_digests(whole)


@pytest.mark.slow
def test_a_run_on_workers_is_the_run_of_one_process(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "Build", JudgingBuild)
    found = []
    for count in (0, 2):
        config = configure("preference", FEDIT, f"name=w{count}", f"execution.workers={count}")
        found.append(run(config, Silent()).path)
    one, two = (load_file(next(p.glob("checkpoints/2/adapter/*.safetensors"))) for p in found)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=1e-5)


@each_task
def test_what_was_found_can_be_checked_before_a_run(configure: Configure, task: str) -> None:
    config = configure(task, FEDIT)
    made = parts.build(config)
    found = report(config, made.dataset, made.partition, made.loaded.tokenizer)
    sides = [made.dataset.train, made.dataset.train.rejected]
    mean = sum(len(side.tokens) for side in sides if side) / len(made.dataset.train)
    steps_rows = 2 * min(4.0, float(made.partition.train_sizes.mean()))
    assert found.duration.tokens_per_round == pytest.approx(steps_rows * 2 * mean)


def fit_s(configure: Configure, task: str, *words: str) -> float:
    realistic = ("mode=realistic", "system.devices.of=raspberry-pi-5", "system.links.of=4g")
    made = parts.build(configure(task, FEDIT, *realistic, *words))
    (job,) = made.server.local_run([0])
    job = job.filled(steps=2, num_samples=10)
    work = made.loop.population.work(job, made.client, made.loop.plan, 2)
    return made.loop.world.fit_s(0, work)


def test_realistic_devices_pay_for_both_sides_and_for_the_base(configure: Configure) -> None:
    chosen = fit_s(configure, "preference", "training.objective=sft")
    pairs = fit_s(configure, "preference")
    assert 2.2 < pairs / chosen < 3.8  # two sides, and half a pass more of each


def test_an_objective_that_does_not_fit_is_refused_before_the_model_is_loaded(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="task 'rated'"):
        parts.build(configure("preference", "training.objective=kto"))


def test_an_objective_that_does_not_fit_a_told_task_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"training\.objective: dpo needs rows of the task"):
        make_config({"data": {"task": "chat"}, "training": {"objective": "dpo"}})


def test_metrics_of_preferences_are_refused_elsewhere(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    data = write_questions(tmp_path / "questions.jsonl")
    config = small_config(
        tmp_path, tiny_model("llama"), data, "evaluation.metrics=[reward_margin, chosen_logps]"
    )
    with pytest.raises(ConfigError, match="'reward_margin' does not fit task 'qa'"):
        parts.build(config)


def test_passes_without_a_gradient_cost_their_operations() -> None:
    shape = {"body_parameters": 1000, "table_parameters": 90, "layers": 2, "hidden": 8}
    cost = ModelCost(
        **shape, intermediate=16, vocabulary=50, rank_parameters=30, supervised=0.5, length=12.0
    )
    more = replace(cost, forward_passes=3)
    forward = 2 * (1000 + 4 * 30) + 2 * 2 * 12.0 * 8 + 2 * 50 * 8 * 0.5
    assert more.step_flops(7.0, 4) - cost.step_flops(7.0, 4) == pytest.approx(7 * 3 * forward)
    assert more.step_bytes(4) - cost.step_bytes(4) == 3 * 1000 * 2.0


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "task"), [("dpo_en_demo", "preference"), ("kto_en_demo", "rated")]
)
def test_real_rows_are_learned_from(tmp_path: Path, name: str, task: str) -> None:
    tree = {
        "output_dir": str(tmp_path),
        "data": {"path": real(f"instruct/{name}.json"), "max_length": 256, "overlong": "truncate",
                 "max_train_rows": 12, "max_test_rows": 6},
        "federation": {"num_clients": 2, "rounds": 1},
        "training": {"batch_size": 4, "local_steps": 2},
    }  # fmt: skip
    path = run(make_config(tree), Silent()).path
    first, last = metrics(path)
    assert set(last["global"]) == set(BY_TASK[task])
    start = math.log(2) if task == "preference" else 0.5
    assert first["global"]["preference_loss"] == pytest.approx(start, abs=1e-5)
    assert last["global"]["preference_loss"] != pytest.approx(start, abs=1e-4)


def real(name: str) -> str:
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("FEDLLM_REAL_DATA", root.parent / "shared" / "data"))
    if not (folder / name).exists():
        pytest.skip(f"{folder / name} is not here; set FEDLLM_REAL_DATA to the folder that has it")
    return str(folder / name)
