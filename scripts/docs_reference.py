"""Writes docs/reference/configuration.md from the schema and the tables, so no name is kept twice.

python scripts/docs_reference.py            writes the page
python scripts/docs_reference.py --check    fails if it is out of date
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fedllm.algorithms import ALGORITHMS, server_class
from fedllm.config import CentralConfig, Config
from fedllm.data import PARTITIONS
from fedllm.data.builtin import BUILTIN_DATASETS
from fedllm.evaluation import BY_TASK, METRICS
from fedllm.models import BUILTIN_MODELS

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "configuration.md"

HEAD = """\
# Configuration

<!-- Written by scripts/docs_reference.py from src/fedllm/config/schema.py. Do not edit. -->

A run is one YAML file. Every key has a default, so an empty file is a valid run: `builtin:tiny`
on `builtin:skills` with FedIT. An unknown key is an error. Any key can be set on the command
line as `section.key=value`; the value is read as YAML. `1e-3` is read as a number.

```console
$ fedllm check examples/demo.yaml federation.rounds=2 adapter.rank=4
```

`fedllm run` writes the resolved configuration into the run directory as `config.yaml`; running
that file repeats the run.
"""


def render() -> str:
    """Return the whole page."""
    parts = [HEAD, *_section("", Config), _algorithms(), *_tables(), *_central()]
    return "\n".join(parts).rstrip() + "\n"


def _central() -> Iterator[str]:
    """Yield the keys that central runs have and federated ones have not, or not in that form."""
    yield (
        "## Central runs\n\nA configuration with the key `stage` is one of `fedllm train`. `model`"
        " and `data` are as above; the other sections are these.\n"
    )
    kinds: dict[str, Any] = {n: info.annotation for n, info in CentralConfig.model_fields.items()}
    nested = {name: kind for name, kind in kinds.items() if _is_model(kind)}
    rows = [row for row in _rows(CentralConfig) if row[0].strip("`") not in nested]
    yield _table(("key", "values", "default", "meaning"), rows) + "\n"
    for name, kind in nested.items():
        if name not in ("model", "data"):
            yield from _section(name, kind)


def _section(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    """Yield a table of a section's own keys, then its sub-sections."""
    title = f"`{prefix}`" if prefix else "Top level"
    description = "" if not prefix else _first_paragraph(model)
    kinds: dict[str, Any] = {name: info.annotation for name, info in model.model_fields.items()}
    nested = {name: kind for name, kind in kinds.items() if _is_model(kind)}
    rows = [row for row in _rows(model) if row[0].strip("`") not in nested]
    if prefix != "algorithm":  # its keys depend on its name, and have a table of their own
        yield f"## {title}\n"
        if description:
            yield description + "\n"
        yield _table(("key", "values", "default", "meaning"), rows) + "\n"
    for name, kind in kinds.items():
        for form in () if name in nested else filter(_form, _models_in(kind)):
            yield f"### `{prefix}.{name}: {{{_form(form)}, ...}}`\n"
            yield _text(form.__doc__) + "\n"
            yield _table(("key", "values", "default", "meaning"), _form_rows(form)) + "\n"
    for name, kind in nested.items():
        yield from _section(f"{prefix}.{name}" if prefix else name, kind)


def _rows(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Yield a row for each key of a model."""
    schema = model.model_json_schema()
    meanings = _meanings(model)
    for name, info in model.model_fields.items():
        values = _type(schema["properties"][name], schema.get("$defs", {}))
        default = info.get_default(call_default_factory=True)
        yield f"`{name}`", values, _default(default), _text(meanings.get(name))


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """Return the strings that stand below a model's fields, its parents' among them."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not _is_model(cls) or cls is BaseModel:
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        for field, after in zip(tree.body, tree.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[field.target.id] = inspect.cleandoc(str(after.value.value))
    return found


def _form_rows(form: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Yield a row for each key of a mapping that a key may hold, and for those one level down."""
    for row, info in zip(_rows(form), form.model_fields.values(), strict=True):
        yield row
        for inner in _models_in(info.annotation):
            for key, *rest in _rows(inner):
                yield f"{row[0][:-1]}.{key[1:]}", rest[0], rest[1], rest[2]


def _models_in(kind: Any) -> Iterator[type[BaseModel]]:
    """Yield the models among the members of a union or list."""
    if _is_model(kind):
        yield kind
    for member in get_args(kind):
        yield from _models_in(member)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _form(model: type[BaseModel]) -> str:
    """Return `key: value` by which a form is told from its alternatives; empty if it is not."""
    name, info = next(iter(model.model_fields.items()))
    fixed = get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1
    return f"{name}: {get_args(info.annotation)[0]}" if fixed else ""


def _algorithms() -> str:
    """Return the settings of each algorithm: the keyword fields of its server."""
    lines = [
        "## `algorithm`\n",
        "A name, or a mapping with `name` and the algorithm's own settings:",
        "`algorithm: {name: rolora, flip_every: 1}`. The default is "
        f"`{Config().algorithm.name}`.\n",
    ]
    rows = []
    for name, entry in ALGORITHMS.items():
        cls = server_class(name)
        settings = ", ".join(f"`{f.name}` = {f.default!r}" for f in fields(cls) if f.init)
        rows.append((f"`{name}`", entry.summary, cls.mixed_rank, settings))
    lines.append(_table(("name", "what it does", "unequal ranks", "settings"), rows) + "\n")
    return "\n".join(lines)


def _tables() -> Iterator[str]:
    """Yield the tables behind `fedllm list`."""
    named: Mapping[str, Iterable[tuple[str, str]]] = {
        "Partitions": [(n, e.summary) for n, e in PARTITIONS.items()],
        "Metrics": [(n, m.summary) for n, m in METRICS.items()],
        "Built-in models": [(f"builtin:{n}", e.summary) for n, e in BUILTIN_MODELS.items()],
        "Built-in data sets": [(f"builtin:{n}", text) for n, text in BUILTIN_DATASETS.items()],
    }
    for title, rows in named.items():
        yield f"## {title}\n"
        yield _table(("name", "what it is"), [(f"`{n}`", _text(text)) for n, text in rows]) + "\n"
    yield "## Metrics of each task\n"
    yield "`evaluation.metrics: auto` takes these; the first is the main metric.\n"
    chosen = [(f"`{t}`", ", ".join(f"`{n}`" for n in names)) for t, names in BY_TASK.items()]
    yield _table(("task", "metrics"), chosen) + "\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _type(schema: Mapping[str, Any], models: Mapping[str, Any]) -> str:
    """Return the values a key takes, from its JSON schema and those of the models it names."""
    if branches := schema.get("anyOf", schema.get("oneOf")):
        return " or ".join(dict.fromkeys(_type(branch, models) for branch in branches))
    if "$ref" in schema:
        keys = models[schema["$ref"].rpartition("/")[2]]["properties"]
        first = next(iter(keys))
        return f"mapping with `{first}`" if "const" in keys[first] else f"`{{{', '.join(keys)}}}`"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{v}`" for v in schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "array" if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])} numbers"
        case "array":
            return f"list of {_type(schema['items'], models)}"
        case "object":
            return "mapping"
        case "null":
            return "`null`"
        case "boolean":
            return "`true`, `false`"
        case "integer" | "number" as kind:
            return (kind if kind == "number" else "whole number") + _range(schema)
    return "text"


def _range(schema: Mapping[str, Any]) -> str:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:g}" for key, sign in words.items() if key in schema]
    return " " + ", ".join(limits) if limits else ""


def _default(value: object) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, BaseModel):
        value = getattr(value, "name", "{}")
    if isinstance(value, tuple):
        value = list(value)
    return f"`{value}`"


def _text(text: str | None) -> str:
    return " ".join((text or "").split())


def _first_paragraph(model: type[BaseModel]) -> str:
    return _text((model.__doc__ or "").split("\n\n")[0])


def main() -> None:
    """Write the page, or check that it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    page = render()
    if parser.parse_args().check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
            sys.exit(f"{PAGE} is out of date; run: python scripts/docs_reference.py")
        return
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
