"""Writes docs/algorithms: a page and a figure for each algorithm, from its file and a note.

python scripts/docs_algorithms.py            writes pages and figures
python scripts/docs_algorithms.py --check    fails if one is out of date

What travels is not written down anywhere: it is what the real server and client say when rounds are
played on one 768 x 768 layer with rank 8 and 10 clients, and so are the bytes.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from algorithm_figure import Stage, draw

from fedllm.adapters import in_slot, layer_of, module_of, slot_of
from fedllm.algorithms import ALGORITHMS, server_class
from fedllm.algorithms.catalog import Description, describe
from fedllm.experiment import make_config
from fedllm.experiment.traffic import Untrained, untrained_loop
from fedllm.federation import FitRequest, FitResult, Progress

FOLDER = Path(__file__).parents[1] / "docs" / "algorithms"
MARK = "<!-- Written by scripts/docs_algorithms.py. Do not edit. -->"
LAYER, SIDE, RANK, CLIENTS, ROUNDS = "layer", 768, 8, 10, 10
TUNED: Mapping[str, Mapping[str, Any]] = {
    "fedlease": {"warmup_rounds": 2},
    "slora": {"sparse_rounds": 4},
}
"""Settings under which the rounds played hold every phase."""


@dataclass
class Recorder(Untrained):
    """An engine that remembers what was asked of it."""

    asked: list[FitRequest]

    def train(
        self, requests: Sequence[FitRequest], progress: Progress | None = None
    ) -> list[FitResult]:
        """Serve the fits, and take note of them."""
        self.asked += requests
        return super().train(requests, progress)


@dataclass(frozen=True)
class Played:
    """What rounds of an algorithm showed."""

    stages: tuple[Stage, ...]
    up: float
    """Mean bytes of a client and round."""
    down: float


def play(name: str) -> Played:
    """Play rounds without training, and see what each stage trains, sends and keeps."""
    config = make_config(
        {
            "algorithm": {"name": name, **TUNED.get(name, {})},
            "adapter": {"rank": RANK},
            "federation": {"num_clients": CLIENTS, "rounds": ROUNDS},
        }
    )
    recorder = Recorder([])
    loop = untrained_loop(config, {LAYER: (SIDE, SIDE)}, {}, [100] * CLIENTS, recorder)
    stages: dict[str, Stage] = {}
    rows: list[Mapping[str, int]] = []
    for made in loop.run(ROUNDS):
        rows += made.ledger
        jobs = {request.job.cid: request for request in recorder.asked if not request.is_gradient}
        passes = [r for r in recorder.asked if r.job.cid == max(jobs)]
        job = jobs[max(jobs)].job
        known = job.payload.known
        roles = {}
        for tensor in job.payload.adapter:
            live = any(tensor in r.start and r.client.trainable(tensor, r.job) for r in passes)
            sent, kept = (f(tensor, job) for f in (loop.client.shared, loop.client.kept))
            roles[tensor] = _role(live, sent, kept, tensor in known)
        stages[made.updates[0].stage] = Stage(made.updates[0].stage, _by_path(roles))
        recorder.asked.clear()
    if set(stages) == {""}:
        stages[""] = Stage("every round", stages[""].paths)
    mean = [sum(row[way] for row in rows) / len(rows) for way in ("up_bytes", "down_bytes")]
    return Played(tuple(stages.values()), *mean)


def _role(live: bool, sent: bool, kept: bool, known: bool) -> str:
    if sent:
        return "trained, sent and kept" if kept else "trained and sent"
    if kept:
        return "trained and kept"
    if live:
        return "trained"
    return "frozen, known" if known else "frozen, received"


def _by_path(roles: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return slot to kind of tensor to role."""
    paths: dict[str, dict[str, str]] = {}
    for name, role in roles.items():
        kind = name.removeprefix(module_of(name)).removeprefix(".").removeprefix("lora_")
        slot = slot_of(name)
        assert in_slot(layer_of(name), slot) == module_of(name)
        paths.setdefault(slot, {})[kind] = role
    return paths


def parts_of(name: str) -> dict[str, str]:
    """Return the parts of an algorithm's docstring, from `head` to `Evidence`."""
    lines = (inspect.getdoc(ALGORITHMS.load(name)) or "").splitlines()
    parts, key = {"head": [lines[0]]}, "head"
    for line in lines[1:]:
        word = line.partition(":")[0]
        if word in ("Paper", "Box", "Fields", "Evidence") and line[len(word)] == ":":
            key, line = word, line[len(word) + 1 :]
        parts.setdefault(key, []).append(line)
    return {key: "\n".join(found).strip("\n") for key, found in parts.items()}


def page(name: str, note: Mapping[str, Any], played: Played, fedit: Played) -> str:
    """Return an algorithm's page."""
    parts, found = parts_of(name), describe(name)
    summary = parts["head"].partition(": ")[2]
    return (
        "\n".join(
            [
                f"# {parts['head'].partition(':')[0]} (`{name}`)\n",
                MARK + "\n",
                summary[0].upper() + summary[1:] + "\n",
                f"![What `{name}` trains, sends and keeps](figures/{name}.svg)\n",
                "## What it does\n",
                "```text",
                inspect.cleandoc(" " * 5 + parts["Box"]).strip(),
                "```\n",
                _flow(parts.get("Fields", "")) + "\n",
                "## When to use it\n",
                _flow(note["use"]) + "\n",
                "## What it costs\n",
                _costs(note, played, fedit),
                "## With other settings\n",
                _traits(found) + "\n",
                f'```yaml title="{name}.yaml"',
                f"name: {name}",
                f"algorithm: {{name: {name}}}",
                "```\n",
                "## Options\n",
                _options(name, found),
                "## What holds\n",
                "The test-suite checks, besides what it asks of every algorithm:\n",
                *(f"- {line}" for line in note["holds"]),
                "",
                "## What it rests on\n",
                _flow(parts["Paper"]) + "\n",
                _flow(parts["Evidence"]) + "\n",
            ]
        ).rstrip()
        + "\n"
    )


def _costs(note: Mapping[str, Any], played: Played, fedit: Played) -> str:
    rows = [
        f"| {way} | {count:,.0f} | {count / of:.2f} |"
        for way, count, of in (
            ("up", played.up, fedit.up),
            ("down", played.down, fedit.down),
        )
    ]
    head = "| bytes of a client and round | number | of FedIT's |\n| --- | --- | --- |\n"
    told = f"One {SIDE} x {SIDE} layer, rank {RANK}, {CLIENTS} clients, mean over {ROUNDS} rounds:"
    return f"{told}\n\n{head}" + "\n".join(rows) + f"\n\n{_flow(note['compute'])}\n"


def _traits(found: Description) -> str:
    personal = "Clients have views of their own." if found.is_personal else "All share one model."
    ranks = {
        "exact": "Clients may have unequal ranks, and nothing is lost.",
        "projected": "Clients may have unequal ranks; a smaller one gets what fits.",
        "padded": "Clients may have unequal ranks; a component is averaged over its owners.",
        "unsupported": "All clients need one rank.",
    }[found.mixed_rank]
    others = (
        f"Optimisers, robust aggregation, top-k and privacy are not defined: {found.no_optimizer}."
        if found.no_optimizer
        else "`optimizer` may be any of " + ", ".join(f"`{o}`" for o in found.optimizers) + "."
    )
    return f"{personal} {ranks} {others}"


def _options(name: str, found: Description) -> str:
    told = field_texts(name)
    rows = [
        f"| `{key}` | {_or(setting['type'])} | `{setting['default']}` | {told.get(key, '')} |"
        for key, setting in found.settings.items()
    ]
    return "\n".join(["| key | type | default | |", "| --- | --- | --- | --- |", *rows]) + "\n"


def _or(kind: str) -> str:
    return kind.replace("|", "or")


def field_texts(name: str) -> dict[str, str]:
    """Return what the source says of each setting, below it or beside it."""
    told: dict[str, str] = {}
    for cls in reversed(server_class(name).__mro__):
        if cls.__module__.startswith("fedllm"):
            told |= _told(inspect.getsource(cls))
    return told


def _told(source: str) -> dict[str, str]:
    found, lines = {}, source.splitlines()
    (cls,) = ast.parse(inspect.cleandoc(source)).body
    assert isinstance(cls, ast.ClassDef)
    for item, after in zip(cls.body, [*cls.body[1:], None], strict=True):
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        text = lines[item.lineno - 1].partition("  # ")[2]
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = str(after.value.value)
        found[item.target.id] = _flow(text)
    return found


def index(played: Mapping[str, Played]) -> str:
    """Return the page that lists all."""
    rows = []
    for name in ALGORITHMS:
        found, own = describe(name), played[name]
        up, down = own.up / played["fedit"].up, own.down / played["fedit"].down
        personal = "yes" if found.is_personal else "no"
        rows.append(
            f"| [`{name}`]({name}.md) | {found.summary} | {up:.2f} | {down:.2f}"
            f" | {found.mixed_rank} | {personal} | {'no' if found.no_optimizer else 'yes'} |"
        )
    return "\n".join(
        [
            "# Algorithms\n",
            MARK + "\n",
            f"{len(ALGORITHMS)} algorithms, each in a file of at most 60 lines. Bytes are relative"
            f" to FedIT's, for one {SIDE} x {SIDE} layer of rank {RANK} with {CLIENTS} clients, a"
            f" mean over {ROUNDS} rounds."
            " [What is common to all](../explanation/algorithms.md) explains"
            " the words; [Results](../results.md) has them measured against each other.\n",
            "| name | | bytes up | bytes down | unequal ranks | personal | optimisers |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _flow(text: str) -> str:
    return " ".join(text.split()).replace("<-", "&larr;")


def render() -> Iterator[tuple[Path, str]]:
    """Yield every file with its content."""
    notes = yaml.safe_load((FOLDER / "notes.yaml").read_text(encoding="utf-8"))
    missing, strange = set(ALGORITHMS) - set(notes), set(notes) - set(ALGORITHMS)
    if missing or strange:
        sys.exit(f"docs/algorithms/notes.yaml lacks {sorted(missing)} and has {sorted(strange)}")
    played = {name: play(name) for name in ALGORITHMS}
    yield FOLDER / "index.md", index(played)
    for name, own in played.items():
        yield FOLDER / f"{name}.md", page(name, notes[name], own, played["fedit"])
        buffer = io.StringIO()
        draw(own.stages, (own.up, own.down), (played["fedit"].up, played["fedit"].down), buffer)
        yield FOLDER / "figures" / f"{name}.svg", buffer.getvalue()


def main() -> None:
    """Write the pages and figures, or check that they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    for path, text in render():
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            sys.exit(f"{path} is out of date; run: python scripts/docs_algorithms.py")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
