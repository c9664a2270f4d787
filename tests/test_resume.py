"""Runs that are killed at any moment end as if they had never been."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import Silent, final_digests, records, small_config, write_questions

from fedllm.config import Config
from fedllm.errors import RunError
from fedllm.experiment import outputs as outputs_module
from fedllm.experiment import run as run_module
from fedllm.experiment.run import resume, run
from fedllm.results import RunDir, plots
from fedllm.simulation import EventKind

TESTS = Path(__file__).parent
KILLED_RUNS = 6


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the half of a run's time that its pictures take."""
    monkeypatch.setattr(plots, "plot_run", lambda directory: [])


@pytest.fixture(scope="module")
def configure(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Config]:
    folder = tmp_path_factory.mktemp("resumed")
    data = write_questions(folder / "questions.jsonl")
    return lambda *words: small_config(
        folder, tiny_model("llama"), data, "algorithm=fedsa-lora", "federation.rounds=3", *words
    )


@pytest.fixture(scope="module")
def whole(configure: Callable[..., Config]) -> Path:
    """Give the folder of a run that nothing disturbed."""
    return run(configure("name=whole"), Silent()).path


def assert_same_run(path: Path, other: Path) -> None:
    assert records(path) == records(other)
    assert final_digests(path) == final_digests(other)


# by SIGKILL


REALISTIC = (
    "mode=realistic",
    "federation.num_clients=4",
    "federation.rounds=5",
    "system.devices.of=raspberry-pi-5",
    "system.links.of=4g",
    "system.dropout.per_job=0.4",
    "system.availability={kind: intermittent, on_s: 40, off_s: 20, distribution: constant}",
    "system.time_scale=900",
)
BUFFERED = ("federation.schedule={name: buffered, size: 2, deadline_s: 30}",)
PAUSING = ("federation.at_window_close=pause",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "more"),
    [("fedsa-lora", ()), ("flora", ()), ("fedit", (*REALISTIC, *BUFFERED, *PAUSING))],
    ids=["fedsa-lora", "flora", "realistic"],
)
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(
    algorithm: str, more: tuple[str, ...], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    data = write_questions(tmp_path / "questions.jsonl")
    words = [str(tmp_path / "runs"), str(tiny_model("llama")), str(data), algorithm]
    done = subprocess.run(
        [sys.executable, str(TESTS / "kill_runs.py"), *words, str(KILLED_RUNS), *more],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    undisturbed, *killed = [json.loads(line) for line in done.stdout.splitlines()]
    assert undisturbed["moments"] > 50
    assert len(killed) >= KILLED_RUNS
    if more:
        events = undisturbed["records"]["events.jsonl"]
        kinds = {json.loads(line)["event"] for line in events.splitlines()}
        assert kinds >= {kind.name for kind in EventKind}
        assert len(killed) == KILLED_RUNS + len(EventKind)
    assert sum(told["kills"] for told in killed) > KILLED_RUNS
    for told in killed:
        assert told["records"] == undisturbed["records"], told["moment"]
        assert told["digests"] == undisturbed["digests"], told["moment"]
        assert told["temporary"] == [], told["moment"]


# by an exception


class Interrupted(BaseException):
    """Ctrl-C, or worse."""


class Interrupting(Silent):
    """Breaks off at a word of one kind."""

    def __init__(self, kind: str, number: int) -> None:
        self.kind, self.left = kind, number

    def _count(self, kind: str) -> None:
        if kind == self.kind:
            self.left -= 1
            if self.left == 0:
                raise Interrupted(kind)

    def say(self, text: str) -> None:
        self._count("say")

    def begin(self, parts: Any, directory: Any) -> None:
        self._count("begin")

    def step(self, cid: int, done: int, total: int) -> None:
        self._count("step")

    def answered(self, count: int) -> None:
        self._count("answered")

    def record(self, record: Any) -> None:
        self._count("record")


@pytest.mark.parametrize(
    ("kind", "number"),
    [("begin", 1), ("step", 1), ("step", 7), ("answered", 3), ("record", 1), ("record", 3)],
)
def test_a_run_interrupted_at_any_word_goes_on_as_if_it_had_not_been(
    kind: str, number: int, configure: Callable[..., Config], whole: Path
) -> None:
    config = configure(f"name={kind}-{number}")
    with pytest.raises(Interrupted):
        run(config, Interrupting(kind, number))
    assert_same_run(resume(config.run_dir, Silent()).path, whole)


@pytest.mark.parametrize(
    ("owner", "place", "number"),
    [
        *((RunDir, "append", number) for number in (1, 3, 4, 6, 7)),
        (RunDir, "lengths", 3),
        (RunDir, "write", 2),
        (outputs_module, "save_peft", 2),
        (run_module, "save_checkpoint", 1),
        (run_module, "save_checkpoint", 3),
    ],
)
def test_a_run_interrupted_while_writing_goes_on_as_if_it_had_not_been(
    owner: Any,
    place: str,
    number: int,
    configure: Callable[..., Config],
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configure(f"name={place}-{number}", "checkpoint.keep=1")
    real, calls = getattr(owner, place), itertools.count(1)

    def breaking(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise Interrupted(place)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, breaking)
        with pytest.raises(Interrupted):
            run(config, Silent())
    path = resume(config.run_dir, Silent()).path
    assert_same_run(path, whole)
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["3"]


def test_torn_and_extra_lines_after_the_last_checkpoint_are_cut_off(
    configure: Callable[..., Config], whole: Path
) -> None:
    config = configure("name=torn")
    with pytest.raises(Interrupted):
        run(config, Interrupting("record", 3))
    for name in ("metrics", "events", "ledger", "timing"):
        with (config.run_dir / f"{name}.jsonl").open("ab") as out:
            out.write(b'{"round": 99}\n{"rou')
    assert_same_run(resume(config.run_dir, Silent()).path, whole)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    configure: Callable[..., Config], whole: Path
) -> None:
    config = configure("name=damaged")
    with pytest.raises(Interrupted):
        run(config, Interrupting("record", 4))
    tensors = config.run_dir / "checkpoints" / "2" / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    assert_same_run(resume(config.run_dir, Silent()).path, whole)


def test_rare_checkpoints_repeat_the_rounds_since_the_last_one(
    configure: Callable[..., Config], whole: Path
) -> None:
    config = configure("name=rare", "checkpoint.every=2")
    with pytest.raises(Interrupted):
        run(config, Interrupting("record", 4))
    assert [p.name for p in (config.run_dir / "checkpoints").iterdir()] == ["2"]
    assert_same_run(resume(config.run_dir, Silent()).path, whole)


def test_a_run_interrupted_before_its_first_record_describes_its_data_all_the_same(
    configure: Callable[..., Config], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("name=early")

    def breaking(*args: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "write", breaking)
        with pytest.raises(Interrupted):
            run(config, Silent())
    path = resume(config.run_dir, Silent()).path
    assert_same_run(path, whole)
    described = (path / "heterogeneity.json", whole / "heterogeneity.json")
    assert described[0].read_bytes() == described[1].read_bytes()


def test_resuming_a_finished_run_changes_nothing(
    configure: Callable[..., Config], whole: Path
) -> None:
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and p.name != "log.txt"}
    resume(whole, Silent())
    after = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and p.name != "log.txt"}
    assert after == before


def test_a_run_that_another_process_works_on_is_not_resumed(
    configure: Callable[..., Config], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: Any) -> None:
        raise AssertionError("something was loaded")

    with RunDir.open(whole) as other:
        other.lock()
        monkeypatch.setattr(run_module, "build", loaded)
        with pytest.raises(RunError, match="another process"):
            resume(whole, Silent())


def test_an_error_in_a_run_lets_go_of_its_directory(configure: Callable[..., Config]) -> None:
    config = configure("name=released")
    with pytest.raises(Interrupted):
        run(config, Interrupting("step", 1))
    with RunDir.open(config.run_dir) as directory:
        directory.lock()
