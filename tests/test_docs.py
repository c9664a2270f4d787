"""What the documentation shows is true: commands run, examples load, pages are up to date."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest
import typer
import yaml
from cli_world import spawn
from door import MAKE_TARGETS, extras
from typer.testing import CliRunner

from fedllm.algorithms import ALGORITHMS
from fedllm.central.configure import load_central
from fedllm.cli import app
from fedllm.config import is_central, read
from fedllm.experiment import load_config
from fedllm.registry import Entry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))

SMALL = (
    "federation.rounds=1",
    "training.batch_size=2",
    "training.local_steps=1",
    "data.max_train_rows=60",
    "data.max_test_rows=8",
    "evaluation.max_new_tokens=2",
)
"""Laid over every documented run, so that each takes a second and still goes all the way."""
SMALL_CENTRAL = ("data.max_train_rows=40", "data.max_test_rows=4", "evaluation.max_new_tokens=2")
"""The same for central runs."""

_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    title: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands of a console block, without the prompt."""
        return [line.removeprefix("$ ") for line in self.text.splitlines() if line.startswith("$ ")]


def name(path: Path) -> str:
    """Return a path as a reader would write it."""
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    for language, title, text in _FENCE.findall(page.read_text(encoding="utf-8")):
        yield Block(language, title, text)


RUNNABLE = [page for page in PAGES if any(b.language == "console" for b in blocks(page))]


@pytest.fixture
def sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]
) -> Path:
    """Make a folder that looks like the repository's root, with small stand-ins for real data."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "src").symlink_to(ROOT / "src")
    shutil.copytree(ROOT / "benchmarks" / "matrices", tmp_path / "benchmarks" / "matrices")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "encoder").symlink_to(tiny_model("bert"))
    for folder in ("gsm8k", "sst2"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for split in ("train", "test"):
        sums = [{"question": f"{n} plus 2?", "answer": f"#### {n + 2}"} for n in range(40)]
        lines = "".join(json.dumps(row) + "\n" for row in sums)
        (tmp_path / "data" / "gsm8k" / f"{split}.jsonl").write_text(lines)
    for split in ("train", "validation"):
        reviews = "".join(f"film number {n}\t{n % 2}\n" for n in range(40))
        (tmp_path / "data" / "sst2" / f"{split}.tsv").write_text("sentence\tlabel\n" + reviews)
    words = ("river", "bread", "engine", "music", "winter")
    tasks = [
        {"instruction": f"Say {w} {n}", "input": "", "output": f"{w} is {w} {n}"}
        for n in range(12)
        for w in words
    ]
    (tmp_path / "data" / "alpaca.json").write_text(json.dumps(tasks))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fedllm(*words: str) -> str:
    """Run a command in this process and return what it printed."""
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, f"fedllm {' '.join(words)}\n{done.output}\n{done.exception!r}"
    return done.output


def serve(*words: str) -> None:
    """Start a server, and stop it once it takes requests."""
    process = spawn("serve", *words, "--port", "0")
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    process.terminate()
    assert process.wait(60) == 0, process.communicate()[1]
    assert lines[1].startswith("ready: http://")


def carry_out(command: str) -> None:
    """Run a documented command on a small scale, or check it where it would install something."""
    first, *words = shlex.split(command)
    match first, *words:
        case "make", target, *settings:
            assert target in MAKE_TARGETS
            assert all("=" in word for word in settings)
            if target == "demo":
                fedllm("run", "examples/demo.yaml", *SMALL)
        case "fedllm", "train", str(config), *rest if "--convert" not in rest:
            fedllm("train", config, *rest, *SMALL_CENTRAL)
        case "fedllm", ("run" | "check"), str(config), *rest if config != "--resume":
            fedllm(words[0], config, *rest, *SMALL)
        case "fedllm", "bench", str(matrix), *rest:
            few = ("algorithms=[fedit]", "settings={small: {}}", "seeds=[0]", "references={}")
            fedllm("bench", matrix, *rest, *few, *(f"base.{word}" for word in SMALL))
        case "fedllm", "serve", *rest:
            serve(*rest)
        case "fedllm", *_:
            fedllm(*words)
        case "python", "-m", module:
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        case "pip", "install", "-c", "constraints.txt", "-e", package:
            wanted = re.fullmatch(r"\.\[(\w+)\]", package)
            assert wanted is not None
            assert wanted[1] in extras()
        case "source", ".venv/bin/activate":
            pass
        case _:
            pytest.fail(f"no test knows how to try this command: {command}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # as `fedllm` itself does
@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_every_command_and_program_of_a_page_runs_in_order(page: Path, sandbox: Path) -> None:
    for block in blocks(page):
        if block.title and block.language != "python":
            (sandbox / block.title).write_text(block.text)
        elif block.language == "python" and not block.title:
            exec(compile(block.text, name(page), "exec"), {})
        for command in block.commands if block.language == "console" else ():
            carry_out(command)


def test_console_blocks_hold_commands_and_no_other_language_does() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert (block.language == "console") == bool(block.commands), (name(page), block.text)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_algorithm_of_the_how_to_runs_and_resumes(
    sandbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "how-to" / "algorithm-in-20-lines.md"
    source = next(block for block in blocks(page) if block.title.endswith("my_momentum.py"))
    module = ModuleType("momentum_of_the_how_to")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source.text, source.title, "exec"), vars(module))
    row = Entry(module.__name__, "of the how-to")
    monkeypatch.setitem(cast("dict[str, Entry]", ALGORITHMS.entries), "my-momentum", row)
    settings = ("algorithm={name: my-momentum, beta: 0.5}", "name=momentum")
    fedllm("run", "examples/demo.yaml", *SMALL, *settings, "federation.rounds=2")
    states = sorted(sandbox.glob("runs/momentum/checkpoints/*/state.json"))
    assert "velocity" in states[-1].read_text()
    fedllm("run", "--resume", "runs/momentum")


# examples


@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_an_example_is_valid_and_opens_with_the_command_that_runs_it(example: Path) -> None:
    assert load_config(example).name == example.stem.replace("_", "-")
    opening = example.read_text(encoding="utf-8").splitlines()[0]
    assert opening.startswith(f"# fedllm run {name(example)}")


@pytest.mark.parametrize(
    "block",
    [b for page in PAGES for b in blocks(page) if b.language == "yaml"],
    ids=lambda block: block.title,
)
def test_a_configuration_in_the_text_is_valid(block: Block, tmp_path: Path) -> None:
    (tmp_path / block.title).write_text(block.text)
    path = tmp_path / block.title
    config = load_central(path)[0] if is_central(read(path)) else load_config(path)
    assert config.name == path.stem


# completeness


def test_the_configuration_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location(
        "docs_reference", ROOT / "scripts" / "docs_reference.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    hint = "run: python scripts/docs_reference.py"
    assert module.PAGE.read_text(encoding="utf-8") == module.render(), hint


def test_every_command_and_option_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
    group = cast("typer.core.TyperGroup", typer.main.get_command(app))
    for command in group.commands.values():
        section = re.search(rf"^## `fedllm {command.name}\b.*?(?=^## |\Z)", text, re.M | re.S)
        assert section is not None, command.name
        options = [p.opts[0] for p in command.params if p.param_type_name == "option"]
        assert [o for o in options if o != "--help" and f"`{o}" not in section[0]] == []


@pytest.mark.parametrize("page", ["README.md", "docs/algorithms/index.md"])
def test_every_algorithm_is_described(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [algorithm for algorithm in ALGORITHMS if f"`{algorithm}`" not in text] == []


def test_the_site_shows_every_page() -> None:
    shown: list[str] = []

    def collect(node: object) -> None:
        if isinstance(node, str):
            shown.append(node)
        elif isinstance(node, (list, dict)):
            for child in node.values() if isinstance(node, dict) else node:
                collect(child)

    collect(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES[2:]]
    assert sorted(shown) == sorted(pages)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose)
    local = [link for link in links if not link.startswith("https://")]
    assert [link for link in local if not (page.parent / link).exists()] == []
