"""Central runs that take a second or two: a tiny model, a few rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fedllm.central.configure import make_central
from fedllm.central.run import resume, train
from fedllm.config import CentralConfig
from fedllm.results import RunDir

WORDS = ("river", "bread", "engine", "music", "winter", "stone", "lamp", "garden")


class Silent:
    """Watches a central run and keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def ready(self) -> None: ...

    def begin(self, parts: Any, path: Path, steps: int) -> None: ...

    def log(self, line: Mapping[str, Any]) -> None: ...

    def record(self, record: Mapping[str, Any]) -> None: ...


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write one JSON line a row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(path: Path, rows: int = 24) -> Path:
    """Write questions whose answer is in them."""
    return write_lines(
        path,
        [
            {"prompt": f"Repeat {WORDS[i % 8]} {i}", "completion": f"{WORDS[i % 8]} {i}"}
            for i in range(rows)
        ],
    )


def texts(path: Path, rows: int = 24) -> Path:
    """Write plain texts, some of them long."""
    sentence = "The {} runs to the sea, and the sea is full. "
    return write_lines(
        path, [{"text": sentence.format(WORDS[i % 8]) * (1 + i % 5)} for i in range(rows)]
    )


def central(folder: Path, data: Path, stage: str, *overrides: str) -> CentralConfig:
    """Configure a run of four steps below `folder`."""
    tree = {
        "name": "run",
        "output_dir": str(folder),
        "stage": stage,
        "model": {"device": "cpu", "dtype": "float32"},
        "adapter": {"rank": 4},
        "data": {"path": str(data), "holdout": 0.25, "max_length": 64, "cache": False},
        "training": {"batch_size": 6, "learning_rate": 3e-3, "max_steps": 4, "log_every": 1},
        "evaluation": {"every": 0, "metrics": ["loss", "token_accuracy"]},
        "checkpoint": {"every": 0},
    }
    return make_central(tree, overrides)


def run_dir(config: CentralConfig) -> RunDir:
    """Carry a run out."""
    return RunDir.open(train(config, Silent()))


def go_on(path: Path) -> RunDir:
    """Resume a run."""
    return RunDir.open(resume(path, Silent()))


def losses(run: RunDir) -> list[float]:
    """Return the loss of each logged step."""
    return [line["loss"] for line in run.read("trainer_log")]


def weights(run: RunDir) -> dict[str, Tensor]:
    """Return what a run trained."""
    for folder, file in (("adapter", "adapter_model"), ("model", "model")):
        if (run.path / folder).exists():
            return dict(load_file(run.path / folder / f"{file}.safetensors"))
    raise AssertionError(f"{run.path} has no result")
