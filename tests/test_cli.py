"""The words of the command line: help, lists, exit codes, and what is imported for them."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from cli_world import call, environment, fails, shell

import fedllm
from fedllm.algorithms import ALGORITHMS
from fedllm.data import PARTITIONS
from fedllm.evaluation import METRICS

HEAVY = ("torch", "transformers", "matplotlib", "datasets", "peft", "sklearn")
SUBJECTS = (
    *("models", "datasets", "algorithms", "metrics", "partitions", "codecs", "robust"),
    *("schedules", "devices", "links", "worlds"),
)


def child_cpu_s() -> float:
    """Return the CPU seconds of all children so far, which a busy machine does not change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds_and_imports(*words: str) -> tuple[float, set[str], str]:
    """Run the command line in a child; return its time, the heavy modules, and its output."""
    code = (
        "import sys, fedllm.cli as cli\n"
        "try:\n    cli.main()\n"
        f"finally:\n    print('MODULES', *[m for m in {HEAVY!r} if m in sys.modules])"
    )
    begin = child_cpu_s()
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    text, _, modules = done.stdout.partition("MODULES")
    return child_cpu_s() - begin, set(modules.split()), text + done.stderr


@pytest.mark.parametrize(
    "words", [("--help",), ("--version",), ("run", "--help"), *(("list", s) for s in SUBJECTS)]
)
def test_help_and_lists_are_quick_and_import_nothing_heavy(words: tuple[str, ...]) -> None:
    tries = [seconds_and_imports(*words)]
    if tries[0][0] >= 1.0:  # the machine may have been busy
        tries += [seconds_and_imports(*words) for _ in range(3)]
    assert all(modules == set() for _, modules, _ in tries)
    assert min(seconds for seconds, _, _ in tries) < 1.0


def test_a_broken_configuration_is_answered_at_once_without_torch(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("trainin: {}\nfederation: {rounds: -1}\nalgorithm: flexlroa\n")
    tries = [seconds_and_imports("check", str(file)) for _ in range(3)]
    assert all(modules == set() for _, modules, _ in tries)
    assert min(seconds for seconds, _, _ in tries) < 1.0
    text = tries[0][2]
    assert "3 problems" in text
    assert "Did you mean 'training'?" in text
    assert "Did you mean 'flexlora'?" in text
    assert "federation.rounds" in text


def test_the_version_is_printed() -> None:
    assert call("--version") == (0, f"fedllm {fedllm.__version__}\n")


def test_no_word_at_all_shows_the_help() -> None:
    code, text = call()
    assert code == 2
    assert "Usage" in text
    assert "export" in text


def test_an_unknown_command_is_refused_with_a_suggestion() -> None:
    code, text = call("chek")
    assert code == 2
    assert "Did you mean 'check'?" in text


def test_an_unknown_subject_is_refused_with_a_suggestion() -> None:
    assert "Did you mean 'metrics'?" in fails("list", "metric")


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_list_as_json_has_a_name_and_a_description_for_each_row(subject: str) -> None:
    code, text = call("list", subject, "--json")
    assert code == 0
    rows = json.loads(text)
    assert rows
    assert all(row["name"] and row["what"] for row in rows)


@pytest.mark.parametrize(
    ("subject", "table"),
    [("algorithms", ALGORITHMS), ("metrics", METRICS), ("partitions", PARTITIONS)],
)
def test_a_list_shows_the_whole_table(subject: str, table: dict[str, object]) -> None:
    names = [row["name"] for row in json.loads(call("list", subject, "--json")[1])]
    assert names == list(table)
    printed = call("list", subject)[1]
    assert all(name in printed for name in names)


def test_algorithms_are_listed_with_what_they_can_do() -> None:
    rows = {row["name"]: row for row in json.loads(call("list", "algorithms", "--json")[1])}
    assert rows["flora"]["mixed_rank"] == "exact"
    assert rows["fedsa-lora"]["personal"] is True
    assert rows["rolora"]["settings"]["flip_every"] == {"type": "int", "default": 1}
    assert "arXiv:2502.01755" in rows["rolora"]["paper"]


def test_a_missing_file_suggests_one_that_is_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert "Did you mean demo.yaml?" in fails("run", "dmo.yaml")
    assert "demo.yaml" in fails("check", "something_else.yaml")


def test_a_setting_in_place_of_the_file_is_explained() -> None:
    assert "the file comes before it" in fails("run", "training.learning_rate=1")


def test_no_file_and_nothing_to_resume_is_explained() -> None:
    assert "--resume DIR" in fails("run")


def test_a_resumed_run_takes_no_settings(tmp_path: Path) -> None:
    text = fails("run", "--resume", tmp_path, "training.learning_rate=1")
    assert "keeps its configuration" in text


@pytest.mark.parametrize("command", ["show", "eval"])
def test_what_is_no_run_is_refused(command: str, tmp_path: Path) -> None:
    assert {"show": "is not a run directory", "eval": "is no run"}[command] in fails(
        command, tmp_path
    )


def test_module_and_command_are_the_same_thing(tmp_path: Path) -> None:
    done = shell("run", "nothing.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: There is no file nothing.yaml; check the path.\n"
