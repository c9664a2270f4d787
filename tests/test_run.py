"""Whole runs of a tiny model: what they leave behind, and that they can be had again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import yaml
from small_runs import (
    NUM_CLIENTS,
    Silent,
    final_digests,
    records,
    small_config,
    write_labels,
    write_questions,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedllm.adapters import Adapter
from fedllm.adapters.peft_format import load_peft
from fedllm.algorithms import ALGORITHMS, server_class
from fedllm.config import Config
from fedllm.engine import CohortEngine
from fedllm.engine.attach import attach
from fedllm.engine.packing import segments
from fedllm.engine.shards import collect
from fedllm.errors import ConfigError, DataError, RunError
from fedllm.experiment import load_config
from fedllm.experiment import run as run_module
from fedllm.experiment.parts import Parts
from fedllm.experiment.run import restored, resume, run
from fedllm.federation import View
from fedllm.results import RunDir, plots

FILES = {
    "config.yaml",
    "environment.json",
    "heterogeneity.json",
    "log.txt",
    "metrics.jsonl",
    "events.jsonl",
    "ledger.jsonl",
    "timing.jsonl",
    "checkpoints/2/state.json",
    "checkpoints/2/state.safetensors",
    "checkpoints/2/sha256.json",
    "checkpoints/2/adapter/adapter_config.json",
    "checkpoints/2/adapter/adapter_model.safetensors",
    "predictions/2.jsonl",
}
PLOTS = {
    "agg_error.png",
    "bytes.png",
    "clients.png",
    "heterogeneity.png",
    "quality.png",
    "training_loss.png",
}
PLOT_RUN = plots.plot_run
each_algorithm = pytest.mark.parametrize("algorithm", list(ALGORITHMS))


@dataclass(frozen=True)
class Setting:
    """What a small run needs."""

    folder: Path
    model: Path
    encoder: Path
    questions: Path
    labels: Path

    def config(self, *overrides: str) -> Config:
        return small_config(self.folder, self.model, self.questions, *overrides)

    def classifying(self, *overrides: str) -> Config:
        words = ("evaluation.metrics=auto", *overrides)
        return small_config(self.folder, self.encoder, self.labels, *words)


@pytest.fixture(scope="module")
def setting(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("small-runs")
    return Setting(
        folder,
        tiny_model("llama"),
        tiny_model("bert"),
        write_questions(folder / "questions.jsonl"),
        write_labels(folder / "labels.jsonl"),
    )


@pytest.fixture(scope="module")
def finished(setting: Setting) -> Callable[[str], Path]:
    """Give `finished(algorithm)`: the folder of a run with seed 0, carried out once."""
    done: dict[str, Path] = {}

    def folder(algorithm: str) -> Path:
        if algorithm not in done:
            config = setting.config(f"name={algorithm}", f"algorithm={algorithm}")
            done[algorithm] = run(config, Silent()).path
        return done[algorithm]

    return folder


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the half of a run's time that its pictures take."""
    monkeypatch.setattr(plots, "plot_run", lambda directory: [])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# what a run leaves behind


@each_algorithm
def test_a_run_leaves_every_documented_file(
    algorithm: str, finished: Callable[[str], Path]
) -> None:
    path = finished(algorithm)
    found = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    assert found >= FILES
    assert not [name for name in found if "tmp" in name]
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["1", "2"]


def test_a_run_ends_with_its_plots(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "plot_run", PLOT_RUN)
    path = run(setting.config("name=drawn"), Silent()).path
    assert {p.name for p in (path / "plots").iterdir()} == PLOTS


def test_metrics_have_a_line_for_the_start_and_for_each_round(
    finished: Callable[[str], Path],
) -> None:
    path = finished("fedit")
    start, *rounds = lines(path / "metrics.jsonl")
    assert start["round"] == 0
    assert "train" not in start
    assert [record["round"] for record in rounds] == [1, 2]
    for record in [start, *rounds]:
        assert set(record["eval"]["global"]) == {"token_accuracy", "loss", "exact_match"}
        assert record["main_metric"] == "token_accuracy"
        assert record["virtual_time_s"] == 0.0
    assert all(len(record["train"]["clients"]) == 2 for record in rounds)


def test_the_ledger_adds_up_to_the_bytes_of_the_metrics(finished: Callable[[str], Path]) -> None:
    path = finished("rolora")
    ledger = lines(path / "ledger.jsonl")
    up = down = 0
    for record in lines(path / "metrics.jsonl")[1:]:
        own = [row for row in ledger if row["round"] == record["round"]]
        assert len(own) == 2
        up += sum(row["up_bytes"] for row in own)
        down += sum(row["down_bytes"] for row in own)
        assert record["bytes"]["up"] == sum(row["up_bytes"] for row in own) > 0
        assert (record["bytes"]["up_total"], record["bytes"]["down_total"]) == (up, down)


def test_every_client_of_every_round_is_in_the_events(finished: Callable[[str], Path]) -> None:
    path = finished("fedit")
    events = lines(path / "events.jsonl")
    for record in lines(path / "metrics.jsonl")[1:]:
        for client in record["train"]["clients"]:
            own = [
                e["event"]
                for e in events
                if (e["round"], e["client"]) == (record["round"], client["client"])
            ]
            assert own == ["WINDOW_OPEN", "TRAINING_DONE", "UPLOAD_DONE"]


def test_the_training_loss_is_weighed_by_rows(finished: Callable[[str], Path]) -> None:
    for record in lines(finished("fedit") / "metrics.jsonl")[1:]:
        clients = record["train"]["clients"]
        total = sum(c["samples"] for c in clients)
        mean = sum(c["loss"] * c["samples"] for c in clients) / total
        assert record["train"]["loss"] == pytest.approx(mean)
        assert record["train"]["tokens"] > 0


@each_algorithm
def test_clients_own_adapters_are_saved_exactly_where_there_are_some(
    algorithm: str, finished: Callable[[str], Path]
) -> None:
    path = finished(algorithm)
    took_part = {row["client"] for row in lines(path / "ledger.jsonl")}
    clients = {f"clients/{cid}/adapter" for cid in took_part}
    is_personal = server_class(algorithm).is_personal
    assert set(final_digests(path)) == ({"adapter"} | clients if is_personal else {"adapter"})


def test_seconds_by_the_clock_stay_out_of_what_the_seed_decides(
    finished: Callable[[str], Path],
) -> None:
    path = finished("fedit")
    told = b"".join(records(path).values())
    assert b"wall" not in told
    assert b"per_s" not in told
    assert all(record["wall_s"] > 0 for record in lines(path / "timing.jsonl"))


def test_the_saved_configuration_is_the_run(setting: Setting, finished) -> None:
    path = finished("flora")
    assert load_config(path / "config.yaml") == setting.config("name=flora", "algorithm=flora")
    tree = yaml.safe_load((path / "config.yaml").read_text())
    assert tree["training"]["learning_rate"] == 0.01


# the same again


@each_algorithm
def test_the_same_seed_gives_the_same_bytes(
    algorithm: str, setting: Setting, finished: Callable[[str], Path]
) -> None:
    config = setting.config(f"name={algorithm}-again", f"algorithm={algorithm}")
    again = run(config, Silent()).path
    assert records(again) == records(finished(algorithm))
    assert final_digests(again) == final_digests(finished(algorithm))


def test_another_seed_gives_another_run(setting: Setting, finished) -> None:
    other = run(setting.config("name=other", "seed=1"), Silent()).path
    assert final_digests(other) != final_digests(finished("fedit"))
    assert (other / "metrics.jsonl").read_bytes() != (
        finished("fedit") / "metrics.jsonl"
    ).read_bytes()


def test_the_saved_configuration_runs_the_run_again(setting: Setting, finished) -> None:
    config = load_config(finished("fedit") / "config.yaml", ["name=from-saved"])
    assert records(run(config, Silent()).path) == records(finished("fedit"))


def test_how_many_tokens_share_a_pass_hardly_matters(setting: Setting, finished) -> None:
    config = setting.config("name=short-passes", "training.tokens_per_pass=40")
    path = run(config, Silent()).path
    one, other = (load_peft(p / "checkpoints" / "2" / "adapter") for p in (path, finished("fedit")))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-4)


def test_the_clients_of_a_round_train_in_common_passes(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    train = CohortEngine.train

    def counting(self: CohortEngine, requests: Any, progress: Any = None) -> Any:
        calls.append(len(requests))
        return train(self, requests, progress)

    monkeypatch.setattr(CohortEngine, "train", counting)
    run(setting.config("name=counted", "federation.cohort_size=3"), Silent())
    assert calls == [3, 3]


# never overwritten


def test_an_existing_run_is_refused_before_anything_is_loaded(
    setting: Setting, finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = finished("fedit")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}

    def loaded(*args: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(run_module, "build", loaded)
    with pytest.raises(RunError, match="never overwritten"):
        run(setting.config("name=fedit"), Silent())
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_wrong_data_leaves_no_run_directory(setting: Setting) -> None:
    config = setting.config("name=lost", "data.path=/nowhere/rows.jsonl")
    with pytest.raises(DataError):
        run(config, Silent())
    assert not config.run_dir.exists()


def test_a_metric_that_does_not_fit_is_told_before_the_run_begins(setting: Setting) -> None:
    config = setting.config("name=unfit", "evaluation.metrics=[macro_f1]")
    with pytest.raises(ConfigError, match="macro_f1"):
        run(config, Silent())
    assert not config.run_dir.exists()


# as other libraries see it


def engine_logits(parts: Parts, adapter: Adapter, rows: np.ndarray) -> torch.Tensor:
    """Return the engine's logits on test rows: after each token, or of each class."""
    sequences = collect(parts.dataset.test, rows, np.zeros(len(rows), int))
    resident = parts.engine.resident
    active = parts.engine.activate([adapter], parts.server.view().base)
    active.by_sequence = segments(np.zeros(len(rows), int), np.ones(len(rows), int))
    active.by_token = segments(np.zeros(len(rows), int), sequences.lengths)
    with torch.no_grad(), resident.using(active):
        if parts.kind == "causal-lm":
            every = np.arange(len(sequences.tokens))
            return resident.forward.token_logits(sequences, every)
        return resident.forward.class_logits(sequences)


def base_model(base: Path, parts: Parts) -> Any:
    """Load the base as any program does."""
    if parts.kind == "causal-lm":
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return AutoModelForSequenceClassification.from_pretrained(
        base, dtype=torch.float32, num_labels=len(parts.dataset.label_names)
    ).eval()


def peft_logits(folder: Path, base: Path, parts: Parts, rows: np.ndarray) -> torch.Tensor:
    """Return plain PEFT's logits on the same rows."""
    model = peft.PeftModel.from_pretrained(base_model(base, parts), folder).eval()
    return logits_of(model, parts, rows)


def logits_of(model: Any, parts: Parts, rows: np.ndarray) -> torch.Tensor:
    """Return a model's logits on test rows, one row at a time."""
    found = []
    for row in rows:
        ids = torch.tensor(parts.dataset.test.row(row)[0].astype(np.int64))[None]
        with torch.no_grad():
            found.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0])
    return torch.cat(found) if parts.kind == "causal-lm" else torch.stack(found)


@each_algorithm
def test_peft_loads_the_checkpoints_adapter_with_the_engines_logits(
    algorithm: str, setting: Setting, finished: Callable[[str], Path]
) -> None:
    path, rows = finished(algorithm), np.arange(4)
    parts, _ = restored(path)
    folder = path / "checkpoints" / "2" / "adapter"
    ours = engine_logits(parts, parts.server.view().adapter, rows)
    theirs = peft_logits(folder, setting.model, parts, rows)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    plain = engine_logits(parts, parts.engine.resident.initial_adapter(2, 1.0, 0), rows)
    # B is 0 or nothing has been shared yet; FLoRA's training is in the base
    if algorithm not in {"fedsa-lora", "flora", "local-only", "fedlease"}:
        assert (plain - ours).abs().max() > 1e-2


def test_peft_loads_a_clients_own_adapter_with_its_own_logits(
    setting: Setting, finished: Callable[[str], Path]
) -> None:
    path, rows = finished("fedsa-lora"), np.arange(4)
    parts, _ = restored(path)
    for cid in range(NUM_CLIENTS):
        own = parts.server.view(cid).adapter.overlaid(parts.loop.store.get(cid))
        folder = path / "checkpoints" / "2" / "clients" / str(cid) / "adapter"
        ours = engine_logits(parts, own, rows)
        theirs = peft_logits(folder, setting.model, parts, rows)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", [n for n in ALGORITHMS if server_class(n).is_personal])
def test_a_clients_own_adapter_can_be_attached_to_the_base(
    algorithm: str, setting: Setting, finished: Callable[[str], Path]
) -> None:
    path, rows = finished(algorithm), np.arange(4)
    parts, _ = restored(path)
    assert parts.server.contacts
    for cid in parts.server.contacts:
        payload = parts.server.view(cid, parts.loop.store.get(cid))
        shares = payload.mix.shares if payload.mix is not None else {}
        ours = engine_logits(parts, payload.adapter.weighed(shares), rows)
        folder = path / "checkpoints" / "2" / "clients" / str(cid) / "adapter"
        theirs = logits_of(attach(base_model(setting.model, parts), folder), parts, rows)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["shared", "local", "frozen"])
def test_a_classifier_runs_under_every_head_policy(head: str, setting: Setting) -> None:
    words = (f"name=bert-{head}", f"adapter.head={head}", "federation.cohort_size=3")
    path = run(setting.classifying(*words), Silent()).path
    last = lines(path / "metrics.jsonl")[-1]
    assert list(last["eval"]["global"]) == ["accuracy", "loss", "macro_f1"]
    assert ("personal" in last["eval"]) is (head == "local")
    parts, _ = restored(path)
    rows = np.arange(3)
    folders = {"adapter": None}
    if head == "local":
        folders |= {f"clients/{cid}/adapter": cid for cid in range(NUM_CLIENTS)}
    assert set(final_digests(path)) == set(folders)
    for name, cid in folders.items():
        adapter = parts.server.view(cid).adapter
        if cid is not None:
            adapter = adapter.overlaid(parts.loop.store.get(cid))
        ours = engine_logits(parts, adapter, rows)
        theirs = peft_logits(path / "checkpoints" / "2" / name, setting.encoder, parts, rows)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


# loaded again


SHORT_PHASES = {
    "fedlease": ("algorithm.warmup_rounds=1",),
    "slora": ("algorithm.sparse_rounds=1",),
    "hilora": ("algorithm.root_rounds=1", "algorithm.cluster_rounds=1"),
}


@each_algorithm
def test_a_classifier_goes_through_every_phase_of_every_algorithm(
    algorithm: str, setting: Setting
) -> None:
    words = (f"name=phases-{algorithm}", f"algorithm={algorithm}", "federation.rounds=3")
    config = setting.classifying(*words, *SHORT_PHASES.get(algorithm, ()), "evaluation.every=0")
    path = run(config, Silent()).path
    *_, last = lines(path / "metrics.jsonl")
    assert last["rejected"] == []
    views = [last["eval"]["global"], *last["eval"].get("personal", {}).values()]
    assert all(0 <= view["accuracy"] <= 1 for view in views if "accuracy" in view)
    assert last["eval"]["global"]["loss"] < 10


def test_instances_are_mixed_although_some_clients_have_no_local_adapter_yet(
    setting: Setting,
) -> None:
    words = ("algorithm=feddpa-t", "federation.cohort_size=1", "federation.partition.name=quantity")
    config = setting.config("name=mixed-views", *words)
    path = run(config, Silent()).path
    parts, _ = restored(path)
    states = {cid: parts.loop.store.get(cid) for cid in range(NUM_CLIENTS)}
    mixes = [parts.server.view(cid, state).mix for cid, state in states.items()]
    assert None in mixes
    assert any(mix is not None for mix in mixes)
    assert "personal" in lines(path / "metrics.jsonl")[-1]["eval"]


@each_algorithm
def test_a_restored_run_evaluates_to_its_last_metrics(
    algorithm: str, finished: Callable[[str], Path]
) -> None:
    path = finished(algorithm)
    parts, directory = restored(path)
    assert directory.path == path
    found = parts.evaluator.evaluate(parts.server, parts.loop.store, parts.scopes, sample=False)
    wanted = lines(path / "metrics.jsonl")[-1]["eval"]
    assert json.loads(json.dumps(found.record)) == wanted
    told = lines(path / "predictions" / "2.jsonl")
    assert list(found.predictions) == told
    assert all(line["prompt"] for line in told)
    assert ("personal" in wanted) is server_class(algorithm).is_personal


def test_a_personal_view_differs_from_the_global_one(finished: Callable[[str], Path]) -> None:
    parts, _ = restored(finished("fedsa-lora"))
    rows = parts.partition.test(0)
    payload = parts.server.view(0)
    own = payload.adapter.overlaid(parts.loop.store.get(0))
    views = [View(adapter, payload.base, rows) for adapter in (payload.adapter, own)]
    losses = [parts.engine.score([v], parts.dataset.test).loss_sum.sum() for v in views]
    assert losses[0] != losses[1]


def test_a_folder_that_is_no_run_and_one_without_a_checkpoint_are_told_apart(
    setting: Setting, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="is not a run directory"):
        restored(tmp_path / "nothing")
    with pytest.raises(RunError, match="is not a run directory"):
        resume(tmp_path / "nothing", Silent())
    text = yaml.safe_dump(setting.config("name=young").model_dump(mode="json"))
    RunDir.create(tmp_path / "young", text).close()
    with pytest.raises(RunError, match="no checkpoint yet"):
        restored(tmp_path / "young")


# other ways to run


def test_evaluation_happens_when_it_is_due_and_always_at_the_end(setting: Setting) -> None:
    words = ("name=rare", "evaluation.every=2", "federation.rounds=5", "checkpoint.every=3")
    path = run(setting.config(*words), Silent()).path
    due = [record["round"] for record in lines(path / "metrics.jsonl") if "eval" in record]
    assert due == [0, 2, 4, 5]
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["3", "5"]


def test_evaluation_can_wait_for_the_end(setting: Setting) -> None:
    words = ("name=late", "evaluation.every=0", "checkpoint.keep=1")
    path = run(setting.config(*words), Silent()).path
    found = lines(path / "metrics.jsonl")
    assert [(record["round"], "eval" in record) for record in found] == [(1, False), (2, True)]
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["2"]


def test_clients_of_unequal_rank_run(setting: Setting) -> None:
    words = ("name=mixed", "algorithm=flora", "adapter.rank=[1, 2, 4]", "evaluation.scope=both")
    path = run(setting.config(*words), Silent()).path
    assert {"global", "personal"} <= set(lines(path / "metrics.jsonl")[-1]["eval"])
