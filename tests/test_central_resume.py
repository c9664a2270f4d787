"""Central runs that are killed, resumed, or shared by processes end as one that is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from central_runs import Silent, answers, central, go_on, losses, run_dir, weights

from fedllm.central.checkpoints import complete_checkpoints
from fedllm.config import dump
from fedllm.errors import RunError
from fedllm.results import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TESTS = Path(__file__).parent
WORDS = (
    "training.max_steps=8",
    "evaluation.every=2",
    "checkpoint.every=3",
    "adapter.dropout=0.1",
    "training.neftune_alpha=5",
)
"""Evaluations and checkpoints at different steps, and noise that the random state decides."""

KILLED = """
import os, signal, sys
from pathlib import Path
from central_runs import Silent, central
from fedllm.central.run import train

class Dying(Silent):
    def log(self, line):
        if line["current_steps"] == 5:
            os.kill(os.getpid(), signal.SIGKILL)

folder, data, *words = sys.argv[1:]
train(central(Path(folder), Path(data), "sft", "name=killed", *words), Dying())
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a run that was killed in its fifth step."""
    folder = tmp_path_factory.mktemp("killed")
    data = answers(folder / "answers.jsonl")
    path = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(folder), str(data), *WORDS],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
        capture_output=True,
    )
    assert done.returncode == -9, done.stderr
    return folder


def test_a_run_that_is_killed_and_resumed_ends_as_if_nothing_had_happened(
    killed: Path, tmp_path: Path
) -> None:
    whole = run_dir(central(tmp_path, killed / "answers.jsonl", "sft", "name=whole", *WORDS))
    shutil.copytree(killed / "killed", tmp_path / "killed")
    half = tmp_path / "killed" / "checkpoints" / "checkpoint-5"
    shutil.copytree(half.with_name("checkpoint-3"), half)
    (half / "fedllm.json").unlink()  # as if the kill had come while it was written
    resumed = go_on(tmp_path / "killed")
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    assert resumed.read("metrics") == whole.read("metrics")
    assert losses(resumed) == losses(whole)
    assert [p.name for p in complete_checkpoints(resumed.path)] == ["checkpoint-3", "checkpoint-6"]


def test_a_resume_says_what_is_restored(killed: Path, tmp_path: Path) -> None:
    from fedllm.central.run import resume

    shutil.copytree(killed / "killed", tmp_path / "killed")
    watch = Silent()
    resume(tmp_path / "killed", watch)
    told = next(line for line in watch.said if "resumed" in line)
    assert "step 3: weights, optimiser, schedule, random state, place in the data" in told
    with pytest.raises(RunError, match="has ended"):
        resume(tmp_path / "killed", watch)


def test_a_run_without_a_checkpoint_begins_anew(killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed / "killed", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints")
    resumed = go_on(tmp_path / "killed")
    assert len(losses(resumed)) == 8


def test_a_damaged_mark_is_told_with_a_remedy(killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed / "killed", tmp_path / "killed")
    mark = tmp_path / "killed" / "checkpoints" / "checkpoint-3" / "fedllm.json"
    mark.write_text("{")
    with pytest.raises(RunError, match=r"fedllm\.json is damaged"):
        go_on(tmp_path / "killed")


def test_two_processes_train_as_one_with_twice_the_accumulation(tmp_path: Path) -> None:
    data = answers(tmp_path / "answers.jsonl")
    words = ("training.batch_size=3", "training.max_steps=3")
    one = run_dir(
        central(tmp_path, data, "sft", *words, "name=one", "training.gradient_accumulation=2")
    )
    file = tmp_path / "two.yaml"
    config = central(tmp_path, data, "sft", *words, "name=two", "training.processes=2")
    file.write_text(dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "fedllm", "train", str(file), "--quiet"],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(config.run_dir)
    two = RunDir.open(config.run_dir)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, atol=1e-6, rtol=1e-5)
    mine, theirs = (run.read("metrics")[-1] for run in (one, two))
    assert theirs["train"]["tokens"] == mine["train"]["tokens"]
    assert theirs["train"]["loss"] == pytest.approx(mine["train"]["loss"], rel=1e-5)


def test_processes_of_accelerate_agree_that_a_run_exists(tmp_path: Path) -> None:
    data = answers(tmp_path / "answers.jsonl")
    config = central(tmp_path, data, "sft")
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    config.run_dir.mkdir(parents=True)
    settings = "--multi_gpu --num_processes 2 --num_machines 1"
    settings += " --mixed_precision no --dynamo_backend no"
    words = [*settings.split(), "-m", "fedllm", "train", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "never overwritten" in done.stderr
    assert list(config.run_dir.iterdir()) == []
