"""Many runs that differ in algorithm, setting and seed: planned, carried out, resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import resources
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from fedllm.algorithms import ALGORITHMS
from fedllm.config import Config, apply_overrides, read
from fedllm.config.section import Section
from fedllm.errors import ConfigError, FedLLMError, unknown
from fedllm.experiment.configure import check_config
from fedllm.results import RunDir, overview

_RUNS_A_PROCESS = 32
"""After about so many, worker processes are started anew."""
BUILTIN = ("algorithms",)
"""Matrices that come with the package."""


def _one_setting() -> dict[str, dict[str, Any]]:
    return {"all": {}}


class Matrix(Section):
    """What varies, over a common configuration."""

    name: str
    """Folder of the whole, inside `runs/` unless another is given."""
    base: dict[str, Any]
    """An ordinary configuration."""
    settings: dict[str, dict[str, Any]] = Field(default_factory=_one_setting)
    """Name of a setting to the overrides that make it."""
    algorithms: Literal["all"] | list[str | dict[str, Any]] = "all"
    """Names, or mappings as under `algorithm:`; a `label` tells two of one name apart."""
    tuned: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Algorithm's name to its own settings, where the defaults do not suit so short a run."""
    references: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Label to the overrides of a row to compare with, such as central training."""
    seeds: list[int] = Field(default_factory=lambda: [0])
    """Root seeds; each gives a run of every cell."""


@dataclass(frozen=True)
class Cell:
    """One run of a matrix."""

    setting: str
    label: str
    """The algorithm's name, or what tells two rows of one name apart."""
    seed: int
    config: Config


@dataclass(frozen=True)
class Done:
    """A cell that has been carried out, or what stopped it."""

    cell: Cell
    error: str = ""


def load_matrix(source: str, overrides: list[str] | None = None) -> Matrix:
    """Read a matrix: a file, or one that comes with the package by its name.

    Raises:
        ConfigError: If it is not a matrix.
    """
    path = Path(source)
    if not path.is_file():
        if source not in BUILTIN:
            raise ConfigError([f"{unknown('matrix', source, BUILTIN)}; or give a file"])
        with resources.as_file(resources.files(__package__) / "matrices" / f"{source}.yaml") as p:
            tree = read(p)
    else:
        tree = read(path)
    tree = apply_overrides(tree, overrides or [])
    try:
        return Matrix.model_validate(tree)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()]
        raise ConfigError(lines, source) from None


def cells(matrix: Matrix, folder: Path) -> list[Cell]:
    """Return all runs of a matrix, those of one setting together.

    Args:
        matrix: What varies.
        folder: Where run directories go, as `<setting>/<label>/seed-<n>`.

    Raises:
        ConfigError: With every problem of every cell.
    """
    found = []
    problems: dict[str, None] = {}  # each once, in order
    for setting, overrides in matrix.settings.items():
        for label, rest in _rows(matrix):
            for seed in matrix.seeds:
                place = {
                    "name": f"seed-{seed}",
                    "seed": seed,
                    "output_dir": str(folder / setting / label),
                }
                tree = _overridden(matrix.base, overrides, rest, place)
                try:
                    config = check_config(tree)
                except ConfigError as error:
                    problems |= dict.fromkeys(f"{setting}, {label}: {p}" for p in error.problems)
                    continue
                found.append(Cell(setting, label, seed, config))
    if problems:
        raise ConfigError(list(problems), matrix.name)
    return found


def _rows(matrix: Matrix) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield label and overrides of every row: references first."""
    yield from matrix.references.items()
    chosen = list(ALGORITHMS) if matrix.algorithms == "all" else matrix.algorithms
    for entry in chosen:
        if isinstance(entry, str):
            yield entry, {"algorithm": {"name": entry, **matrix.tuned.get(entry, {})}}
        else:
            settings = {key: value for key, value in entry.items() if key != "label"}
            yield str(entry.get("label", entry.get("name"))), {"algorithm": settings}


def _overridden(base: Mapping[str, Any], *layers: Mapping[str, Any]) -> dict[str, Any]:
    tree = dict(base)
    for layer in layers:
        for key, value in layer.items():
            tree = _laid(tree, key.split("."), value)
    return tree


def _laid(tree: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    first, *rest = path
    inner = tree.get(first)
    below = _laid(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value
    return {**tree, first: below}


def carry_out(
    matrix: Matrix, folder: Path, *, workers: int = 1, told: Callable[[Done], None]
) -> list[Done]:
    """Run all cells that are not finished yet; one that fails does not stop the others.

    Args:
        matrix: What varies.
        folder: Where run directories are; finished ones are kept, unfinished ones resumed.
        workers: Processes; each trains with its share of the cores.
        told: Called after each cell.

    Raises:
        ConfigError: If a cell's configuration is wrong, before anything runs.
    """
    todo = cells(matrix, folder)
    if workers == 1:
        return [_told(_attempt(cell, None), told) for cell in todo]
    found = []
    batch = workers * _RUNS_A_PROCESS
    for start in range(0, len(todo), batch):
        # spawned, because threads of torch do not survive a fork; anew for each batch, to give
        # memory back (the pool's own way to renew its processes can hang: CPython issue 115634)
        with ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=_hush
        ) as pool:
            waiting = [pool.submit(_attempt, cell, workers) for cell in todo[start : start + batch]]
            for future in as_completed(waiting):
                told(future.result())
            found += [future.result() for future in waiting]
    return found


def _told(done: Done, told: Callable[[Done], None]) -> Done:
    told(done)
    return done


def _hush() -> None:
    """Keep a worker's log out of the terminal; each run has a file of its own for it."""
    logging.getLogger().addHandler(logging.NullHandler())


def _attempt(cell: Cell, workers: int | None) -> Done:
    import torch

    from fedllm.experiment.run import resume, run
    from fedllm.experiment.silence import Silent

    if workers is not None:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    path = cell.config.run_dir
    try:
        if not path.exists():
            run(cell.config, Silent())
        elif not overview(RunDir.open(path)).is_finished:
            resume(path, Silent())
    except FedLLMError as error:
        return Done(cell, str(error))
    return Done(cell)
