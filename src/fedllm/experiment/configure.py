"""A configuration checked as a whole, algorithm and metrics included, before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm import algorithms
from fedllm.config import (
    Config,
    TrainingConfig,
    apply_overrides,
    is_central,
    means_mixed_ranks,
    read,
    validate,
)
from fedllm.errors import ConfigError, unknown
from fedllm.evaluation import METRICS, require_packages
from fedllm.experiment import exchange, schedules
from fedllm.federation import objective_of


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration file.

    Args:
        path: A YAML file.
        overrides: Words like `training.learning_rate=1e-3`.

    Raises:
        ConfigError: With every problem there is.
    """
    return check_config(read(path, overrides), str(path))


def make_config(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Check a configuration that is given as a mapping; see `load_config`."""
    return check_config(apply_overrides(tree, overrides))


def check_config(tree: Mapping[str, Any], source: str | None = None) -> Config:
    """Return the checked configuration.

    Raises:
        ConfigError: With every problem there is.
    """
    if is_central(tree):
        told = "stage: marks a run of central fine-tuning; carry it out with: fedllm train"
        told += f" {source}" if source is not None else ""
        raise ConfigError([told], source)
    config, problems = validate(tree)
    problems += _algorithm_problems(tree)
    metrics = _section(tree, "evaluation").get("metrics", "auto")
    if isinstance(metrics, list):
        strange = [name for name in metrics if name not in METRICS]
        problems += [f"evaluation.metrics: {unknown('metric', str(n), METRICS)}" for n in strange]
    if config is None:
        problems += exchange.misspelt(tree)
    else:
        problems += [*exchange.problems(config), *schedules.problems(config)]
        problems += _objective_problems(config)
    if problems or config is None:
        raise ConfigError(problems, source)
    if config.evaluation.metrics != "auto":
        require_packages(config.evaluation.metrics)
    return config


def _objective_problems(config: Config) -> list[str]:
    """Compare the objective with the task, where that is told and not recognised later."""
    if config.data.task == "auto":
        return []
    try:
        objective_of(config.training, config.data.task)
    except ConfigError as error:
        return error.problems
    return []


def _algorithm_problems(tree: Mapping[str, Any]) -> list[str]:
    given = tree.get("algorithm", {})
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping):
        return []
    settings = {key: value for key, value in given.items() if key != "name"}
    mixed = means_mixed_ranks(_section(tree, "adapter").get("rank"))
    return algorithms.problems(
        str(given.get("name", "fedit")),
        settings,
        mixed_rank=mixed,
        local_optimizer=_local_optimizer(_section(tree, "training")),
        schedule=_schedule(_section(tree, "federation")),
    )


def _schedule(federation: Mapping[str, Any]) -> str:
    given = federation.get("schedule", "sync")
    return str(given.get("name", "sync") if isinstance(given, Mapping) else given)


def _local_optimizer(training: Mapping[str, Any]) -> str:
    name = str(training.get("optimizer", TrainingConfig().optimizer))
    return f"{name} with momentum" if name == "sgd" and training.get("momentum") else name


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = tree.get(name)
    return section if isinstance(section, Mapping) else {}
