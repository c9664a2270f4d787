"""Fixtures for all tests."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Let PEFT read a property that newer transformers calls deprecated; all else is an error."""
    config.addinivalue_line(
        "filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    )
    # a busy machine is no fault of an example
    hypothesis.settings.register_profile("patient", deadline=None)
    hypothesis.settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _own_cache_and_one_thread(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep tests out of the user's cache folder, and torch from fighting over the cores."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give `tiny_model(family)`: the folder of a tiny random model, built once a session.

    Tests that change a file ask for `tiny_copy`.
    """
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            # imported here so that tests without a model do not wait for torch
            from tiny_models import build

            folders[family] = build(family, tmp_path_factory.mktemp(family) / family)
        return folders[family]

    return folder


@pytest.fixture
def tiny_copy(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Give `tiny_copy(family)`: a copy of a tiny model's folder that the test may change."""
    return lambda family: Path(shutil.copytree(tiny_model(family), tmp_path / family))
