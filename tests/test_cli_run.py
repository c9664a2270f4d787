"""Whole commands on runs that take a second or two."""

from __future__ import annotations

import errno
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_world import call, fails, shell, spawn, write_config
from small_runs import records, write_labels, write_questions

from fedllm.experiment import load_config
from fedllm.experiment.check import check
from fedllm.results import RunDir

TinyModel = Callable[[str], Path]


@pytest.fixture(scope="session")
def finished(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Give a finished run with something personal in it, and what its command wrote."""
    folder = tmp_path_factory.mktemp("finished")
    file = write_config(folder, tiny_model("llama"), "algorithm=fedsa-lora")
    code, text = call("run", file)
    assert code == 0, text
    return folder / "runs" / "one", text


# run


def test_a_run_tells_its_rounds_and_what_to_do_next(finished: tuple[Path, str]) -> None:
    path, text = finished
    assert "round 0/2" in text
    assert "round 2/2" in text
    assert "round 2 of 2" in text
    for command in (f"show {path}", f"eval {path} --scope personal", f"export {path} --to "):
        assert f"fedllm {command}" in text.replace("\n", " ")


def test_a_quiet_run_prints_its_path_alone(tiny_model: TinyModel, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_model("llama"))
    assert call("run", file, "-q") == (0, f"{tmp_path / 'runs' / 'one'}\n")


def test_an_existing_run_is_refused_and_not_touched(
    finished: tuple[Path, str],
) -> None:
    path, _ = finished
    before = records(path)
    text = fails("run", path.parent.parent / "small.yaml")
    assert "never overwritten" in text
    assert f"fedllm run --resume {path}" in text
    assert records(path) == before


def test_a_dry_run_loads_everything_and_writes_nothing(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    file = write_config(tmp_path, tiny_model("llama"))
    before = sorted(tmp_path.iterdir())
    code, text = call("run", file, "--dry-run")
    assert code == 0
    assert "dry run" in text
    assert "bytes a round" in text
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_stopped_run_says_how_to_go_on_and_that_works(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    file = write_config(tmp_path, tiny_model("llama"), "federation.rounds=400")
    path = tmp_path / "runs" / "one"
    child = spawn("run", file)
    metrics = path / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_bytes().count(b"\n") > 3:
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, text = child.communicate(timeout=60)
    assert child.returncode == 130, text
    assert text.startswith("stopped in round ")
    assert text.endswith(f"are saved; continue with: fedllm run --resume {path}\n")
    assert text.count("\n") == 1
    whole = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(whole.replace("rounds: 400", "rounds: 6"))
    resumed = shell("run", "--resume", path)
    assert resumed.returncode == 0, resumed.stderr
    assert RunDir.open(path).read("metrics")[-1]["round"] >= 6


def test_a_run_stopped_by_a_fault_of_ours_leaves_its_trace_in_the_log(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fall(run: RunDir) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr("fedllm.results.plots.plot_run", fall)
    code, text = call("run", write_config(tmp_path, tiny_model("llama")))
    path = tmp_path / "runs" / "one"
    assert code == 1
    assert "ZeroDivisionError: on purpose" in text
    assert f"rounds 1-2 are saved; continue with: fedllm run --resume {path}" in text
    assert "ZeroDivisionError: on purpose" in (path / "log.txt").read_text()


def test_a_full_disk_is_told_in_one_message(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr("fedllm.results.plots.plot_run", full)
    text = fails("run", write_config(tmp_path, tiny_model("llama")))
    assert "No space is left on the device for somewhere" in text
    assert "rounds 1-2 are saved" in text


# show, eval, export


def test_show_prints_the_figures_as_a_table_or_as_json(finished: tuple[Path, str]) -> None:
    path, _ = finished
    code, text = call("show", path)
    assert code == 0
    assert "token_accuracy" in text
    assert "plots" in text
    facts = json.loads(call("show", path, "--json")[1])
    assert facts["algorithm"] == "fedsa-lora"
    assert facts["is_finished"] is True
    assert {row["view"] for row in facts["metrics"]} >= {"global", "personal mean"}
    assert all(Path(plot).is_file() for plot in facts["plots"])


def test_eval_finds_what_the_last_round_found(finished: tuple[Path, str], tmp_path: Path) -> None:
    path, _ = finished
    file = tmp_path / "found.json"
    code, text = call("eval", path, "--save", file)
    assert code == 0, text
    assert "after round 2" in text
    assert "worst 10 %" in text
    saved = json.loads(file.read_text())
    last = RunDir.open(path).read("metrics")[-1]["eval"]
    assert saved["eval"] == last
    assert saved["predictions"]


def test_eval_of_one_client_uses_its_rows_alone(finished: tuple[Path, str], tmp_path: Path) -> None:
    path, _ = finished
    file = tmp_path / "found.json"
    code, text = call("eval", path, "--client", "1", "--scope", "personal", "--save", file)
    assert code == 0, text
    saved = json.loads(file.read_text())["eval"]
    assert list(saved) == ["personal"]
    assert list(saved["personal"]["by_client"]) == ["1"]
    last = RunDir.open(path).read("metrics")[-1]["eval"]["personal"]["by_client"]["1"]
    assert saved["personal"]["by_client"]["1"] == pytest.approx(last, abs=1e-5)


@pytest.mark.parametrize("command", ["eval", "export"])
def test_a_client_that_is_not_there_is_refused(
    command: str, finished: tuple[Path, str], tmp_path: Path
) -> None:
    to = ("--to", tmp_path / "x") if command == "export" else ()
    assert "clients 0 to 2" in fails(command, finished[0], "--client", "3", *to)


def test_an_export_is_loaded_by_the_lines_it_prints(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    path, _ = finished
    for words in ((), ("--client", "1"), ("--merged",)):
        folder = tmp_path / f"out{len(words)}{words[:1]}"
        code, text = call("export", path, "--to", folder, *words)
        assert code == 0, text
        assert "safetensors" in text
        lines = [line.strip() for line in text.partition("load it with:")[2].splitlines()]
        scope: dict[str, object] = {}
        exec("\n".join(lines), scope)  # the printed lines are the claim
        assert scope["model"]


def test_export_overwrites_nothing(finished: tuple[Path, str], tmp_path: Path) -> None:
    assert "is not overwritten" in fails("export", finished[0], "--to", tmp_path)


# check


def test_check_describes_data_clients_model_and_cost(tiny_model: TinyModel, tmp_path: Path) -> None:
    code, text = call("check", write_config(tmp_path, tiny_model("llama")))
    assert code == 0, text
    for words in (
        "18 train, 6 test",
        "LlamaForCausalLM",
        "trainable",
        "bytes a round",
        "memory",
        "roughly",
        "mean distance",
        "effective groups",
        "learned",
        "<|im_end|>",
    ):
        assert words in text, text
    assert not (tmp_path / "runs").exists()


def test_check_of_many_clients_shows_quantiles(tiny_model: TinyModel, tmp_path: Path) -> None:
    data = write_questions(tmp_path / "many.jsonl", 80)
    file = write_config(tmp_path, tiny_model("llama"), "federation.num_clients=30", data=data)
    code, text = call("check", file)
    assert code == 0, text
    assert "median" in text
    assert "of clients" in text


@pytest.mark.parametrize("algorithm", ["fedit", "rolora", "flora", "fedsa-lora"])
def test_the_bytes_that_check_foretells_are_those_of_the_run(
    algorithm: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    file = write_config(tmp_path, tiny_model("llama"), f"algorithm={algorithm}")
    report = check(load_config(file))
    assert call("run", file, "-q")[0] == 0
    sent = RunDir.open(tmp_path / "runs" / "one").read("metrics")[-1]["bytes"]
    assert report.traffic.up_bytes * report.traffic.rounds_played == sent["up_total"]
    assert report.traffic.down_bytes * report.traffic.rounds_played == sent["down_total"]


def test_check_of_a_classifier_shows_labels_and_head(tiny_model: TinyModel, tmp_path: Path) -> None:
    data = write_labels(tmp_path / "labels.jsonl")
    metrics = "evaluation.metrics=[accuracy, loss]"
    file = write_config(tmp_path, tiny_model("bert"), metrics, data=data)
    code, text = call("check", file)
    assert code == 0, text
    assert "joy" in text
    assert "head of" in text
    assert "label " in text
