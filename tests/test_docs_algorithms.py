"""The pages and figures of the algorithms are what their script writes, and all are there."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import yaml

from fedllm.algorithms import ALGORITHMS, settings_of
from fedllm.algorithms import server_class as class_of

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "algorithms"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Import the script, whose folder is no package."""
    folder = str(ROOT / "scripts")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("docs_algorithms")
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def rendered(script: ModuleType) -> dict[Path, str]:
    """Return every file the script writes."""
    return dict(script.render())


def test_pages_and_figures_are_up_to_date(rendered: dict[Path, str]) -> None:
    stale = [p.name for p, text in rendered.items() if not p.exists() or p.read_text() != text]
    assert stale == [], "run: python scripts/docs_algorithms.py"


def test_there_is_a_page_a_figure_and_a_note_for_each_and_for_nothing_else() -> None:
    names = set(ALGORITHMS)
    assert {p.stem for p in FOLDER.glob("*.md")} == names | {"index"}
    assert {p.stem for p in (FOLDER / "figures").glob("*.svg")} == names
    assert set(yaml.safe_load((FOLDER / "notes.yaml").read_text())) == names


def test_figures_are_pictures(rendered: dict[Path, str]) -> None:
    for path, text in rendered.items():
        if path.suffix == ".svg":
            root = ElementTree.fromstring(text)
            assert root.tag.endswith("svg")
            assert "trained" in text or "frozen" in text


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_setting_of_an_algorithm_is_explained(script: ModuleType, name: str) -> None:
    told = script.field_texts(name)
    assert [key for key in settings_of(class_of(name)) if not told.get(key)] == []


def test_bytes_on_the_pages_are_the_closed_forms(script: ModuleType) -> None:
    both = 2 * script.SIDE * script.RANK * 4
    assert (script.play("fedit").up, script.play("fedit").down) == (both, both)
    assert script.play("ffa-lora").up == both / 2
    assert script.play("local-only").up == script.play("local-only").down == 0
    assert script.play("ravan").up == 4 * script.RANK**2 * 4
    assert script.play("scaffold").up == 2 * both
