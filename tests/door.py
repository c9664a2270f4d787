"""What the one door offers, as the files at the root say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
MAKE_TARGETS = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split()


def project() -> dict[str, Any]:
    """Return the table `project` of pyproject.toml."""
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    table: dict[str, Any] = tree["project"]
    return table


def extras() -> dict[str, list[str]]:
    """Return the optional dependencies by extra."""
    found: dict[str, list[str]] = project()["optional-dependencies"]
    return found
