"""From a file, ours or LLaMA-Factory's, to a checked central configuration. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.central.llamafactory import is_llamafactory, mapped
from fedllm.central.llamafactory_values import Mapped
from fedllm.central.stages import problems
from fedllm.config import CentralConfig, apply_overrides, is_central, read, validate_central
from fedllm.errors import ConfigError

_FOREIGN = ("federation", "algorithm", "communication", "updates", "system", "mode", "execution")


def load_central(path: Path, overrides: Sequence[str] = ()) -> tuple[CentralConfig, Mapped | None]:
    """Read and check a configuration file, YAML or JSON.

    Args:
        path: Ours, with a key `stage`; or LLaMA-Factory's, which is recognised by its
            `model_name_or_path`.
        overrides: Words like `training.learning_rate=1e-3`; LLaMA-Factory's own keys go as well
            where its file is given.

    Returns:
        The configuration, and what became of LLaMA-Factory's keys if the file was one.

    Raises:
        ConfigError: With every problem there is.
    """
    source = str(path)
    plain = read(path)
    if not is_llamafactory(plain):
        return check_central(apply_overrides(plain, overrides, source), source), None
    own = [word for word in overrides if "." in word.partition("=")[0]]
    theirs = [word for word in overrides if word not in own]
    found = mapped(apply_overrides(plain, theirs, source), source, path.parent)
    return check_central(apply_overrides(found.tree, own, source), source), found


def make_central(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> CentralConfig:
    """Check a configuration that is given as a mapping; see `load_central`."""
    return check_central(apply_overrides(tree, overrides))


def check_central(tree: Mapping[str, Any], source: str | None = None) -> CentralConfig:
    """Return the checked configuration.

    Raises:
        ConfigError: With every problem there is.
    """
    if not is_central(tree):
        other = f"fedllm run {source or 'CONFIG.yaml'}"
        lacking = "stage: missing; a central run has one, such as `stage: sft`. Carry a federated"
        raise ConfigError([f"{lacking} one out with: {other}"], source)
    foreign = [key for key in _FOREIGN if key in tree]
    config, found = validate_central({k: v for k, v in tree.items() if k not in foreign})
    told = [f"{key}: is for federated runs; take it or `stage` out" for key in foreign]
    told += found
    if config is not None:
        told += problems(config)
    if told or config is None:
        raise ConfigError(told, source)
    return config
