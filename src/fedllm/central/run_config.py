"""The configuration of a central run that was begun. No torch here."""

from __future__ import annotations

from pathlib import Path

from fedllm.central.configure import check_central
from fedllm.config import CentralConfig, read
from fedllm.errors import RunError
from fedllm.results import RunDir


def config_of(path: Path) -> CentralConfig:
    """Return the configuration of a central run.

    Raises:
        RunError: If there is none at `path`.
    """
    RunDir.open(path)
    tree = read(path / "config.yaml")
    if "stage" not in tree:
        raise RunError(f"{path} is a federated run. Continue it with: fedllm run --resume {path}")
    return check_central(tree, str(path / "config.yaml"))
