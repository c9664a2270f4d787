"""The ways in: Makefile, pins, and what CI runs."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from door import MAKE_TARGETS, MAKEFILE, ROOT, extras, project
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PINS = {
    canonicalize_name(found.name): str(found.specifier).removeprefix("==")
    for found in map(Requirement, (ROOT / "constraints.txt").read_text().split())
}
NEEDED = [
    need
    for need in map(Requirement, [*project()["dependencies"], *itertools.chain(*extras().values())])
    if need.name != "fedllm"
]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.mark.parametrize("need", NEEDED, ids=lambda need: str(need.name))
def test_every_dependency_has_a_pin_that_suits_it(need: Requirement) -> None:
    pin = PINS[canonicalize_name(need.name)]
    assert need.specifier.contains(pin)


def test_pins_name_no_build_of_one_machine() -> None:
    # `torch==2.13.0` is met by 2.13.0+cpu and 2.13.0+cu130 alike
    assert [name for name, pin in PINS.items() if not re.fullmatch(r"[0-9.]+(post\d+)?", pin)] == []


@needs_make
def test_help_lists_every_target() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^  make ([a-z-]+) ", done.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(MAKE_TARGETS)


@needs_make
def test_an_old_python_is_told_what_to_do(tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    done = subprocess.run(
        ["make", "setup", f"PYTHON={old}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "3.11 or newer" in done.stdout
    assert not (tmp_path / ".venv").exists()


@needs_make
def test_an_earlier_demo_is_moved_aside_and_never_lost(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    program = tmp_path / ".venv" / "bin" / "fedllm"
    program.parent.mkdir(parents=True)
    program.write_text(
        '#!/bin/sh\nmkdir -p runs/demo && echo "$*" > runs/demo/"$(ls runs | wc -l)"'
    )
    program.chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt", ".venv/.stamp"):
        (tmp_path / name).touch()
    for _ in range(3):
        subprocess.run(["make", "demo"], cwd=tmp_path, capture_output=True, check=True)
    found = sorted(str(p.relative_to(tmp_path / "runs")) for p in (tmp_path / "runs").glob("*/*"))
    assert found == ["demo-1/1", "demo-2/2", "demo/3"]


def test_ci_calls_the_targets_that_a_developer_calls() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make check", "make test"]


def test_checking_changes_no_file() -> None:
    recipe = MAKEFILE.split("\ncheck:")[1].split("\n\n")[0]
    assert "ruff format --check" in recipe
    assert "--fix" not in recipe
