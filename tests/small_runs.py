"""Whole runs that take a second: a tiny model, a few rows, two rounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.config import Config
from fedllm.experiment import make_config

NUM_CLIENTS = 3
RECORDS = ("metrics.jsonl", "events.jsonl", "ledger.jsonl")
"""The files that the seed decides to the last byte."""


class Silent:
    """Watches a run and says nothing."""

    def say(self, text: str) -> None: ...

    def begin(self, parts: Any, run: Any) -> None: ...

    def step(self, cid: int, done: int, total: int) -> None: ...

    def answered(self, count: int) -> None: ...

    def record(self, record: Mapping[str, Any]) -> None: ...


def write_questions(path: Path, rows: int = 24) -> Path:
    """Write sums with their results, one JSON line each."""
    stream = np.random.default_rng(5)
    lines = []
    for _ in range(rows):
        a, b = (int(n) for n in stream.integers(0, 10, size=2))
        lines.append({"prompt": f"{a} + {b}", "completion": str(a + b), "category": "small"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_labels(path: Path, rows: int = 24) -> Path:
    """Write short texts with a label of two, one JSON line each."""
    words = ("joy", "dull")
    lines = [{"text": f"film {i} was {words[i % 2]}", "label": words[i % 2]} for i in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def small_config(folder: Path, model: Path, data: Path, *overrides: str) -> Config:
    """Configure a run of two rounds below `folder`; `overrides` are words like `seed=1`."""
    tree = {
        "name": "run",
        "output_dir": str(folder),
        "model": {"path": str(model), "dtype": "float32", "device": "cpu"},
        "adapter": {"rank": 2},
        "data": {"path": str(data), "holdout": 0.25, "max_length": 64},
        "federation": {"num_clients": NUM_CLIENTS, "cohort_size": 2, "rounds": 2},
        "training": {"batch_size": 4, "learning_rate": 1e-2, "local_steps": 2},
        "evaluation": {"max_new_tokens": 2, "metrics": ["token_accuracy", "loss", "exact_match"]},
    }
    return make_config(tree, overrides)


def records(run: Path) -> dict[str, bytes]:
    """Return the bytes of the files that the seed decides."""
    return {name: (run / name).read_bytes() for name in RECORDS}


def final_digests(run: Path) -> dict[str, str]:
    """Return the digest of every adapter in the last checkpoint, by its folder there."""
    last = max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    found = {}
    for path in sorted(last.rglob("fedllm.json")):  # PEFT's layout
        found[str(path.parent.relative_to(last))] = json.loads(path.read_text())
    for path in sorted(last.rglob("fedllm_adapter.json")):  # our own
        found[str(path.parent.relative_to(last))] = json.loads(path.read_text())["metadata"]
    return {folder: origin["adapter_sha256"] for folder, origin in found.items()}
