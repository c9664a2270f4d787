"""The command line as a user has it, in a process of its own or in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from small_runs import small_config, write_questions
from typer.testing import CliRunner

from fedllm.cli import app
from fedllm.config import dump


def write_config(folder: Path, model: Path, *words: str, data: Path | None = None) -> Path:
    """Write a configuration of two short rounds, whose runs go to `folder/runs`."""
    data = data or write_questions(folder / "rows.jsonl")
    file = folder / "small.yaml"
    config = small_config(folder / "runs", model, data, "name=one", *words)
    file.write_text(dump(config), encoding="utf-8")
    return file


def call(*words: str | Path) -> tuple[int, str]:
    """Run a command in this process; return its exit code and all that it wrote."""
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "100"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def fails(*words: str | Path) -> str:
    """Run a command that is to be refused; return its one message."""
    code, text = call(*words)
    assert code == 2, text
    assert "Traceback" not in text
    assert text.count("error: ") == 1, text
    return text


def spawn(*words: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start a command in a process of its own, with one thread."""
    return subprocess.Popen(
        command(words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment(),
    )


def shell(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Carry out a command in a process of its own, with one thread."""
    return subprocess.run(
        command(words), capture_output=True, text=True, check=False, cwd=cwd, env=environment()
    )


def command(words: Sequence[str | Path]) -> list[str]:
    """Return the command line."""
    return [sys.executable, "-m", "fedllm", *map(str, words)]


def environment() -> dict[str, str]:
    """Return the environment of a child: several threads would fight over the cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
