"""From YAML and `a.b=value` words to a checked configuration, with every fault in one error."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails

from fedllm.config.central import CentralConfig
from fedllm.config.schema import Config
from fedllm.errors import ConfigError, did_you_mean


class _Loader(yaml.SafeLoader):
    """Reads `1e-3` as a number: YAML 1.1 wants `1.0e-3` and calls the rest a string."""


class _Dumper(yaml.SafeDumper):
    """Puts strings that `_Loader` would read as numbers in quotes."""


_NAMED = {
    ("algorithm",): "name",
    ("federation", "schedule"): "name",
    ("federation", "partition"): "name",
    ("communication", "uplink"): "name",
    ("communication", "downlink"): "name",
    ("updates", "robust"): "name",
    ("system", "availability"): "kind",
}
"""Where a bare word stands for a mapping, and the key that it is the value of."""
_SCIENTIFIC = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+.0123456789"))


def read(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML or JSON file and lay the overrides over it, unchecked.

    Args:
        path: A YAML or JSON file whose top level is a mapping.
        overrides: Words like `training.learning_rate=1e-3`; the value is read as YAML.

    Raises:
        ConfigError: If the file cannot be read or parsed, or a word is not `a.b=value`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(["there is no such file; check the path"], str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot be read: {error}"], str(path)) from None
    try:
        tree = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError([f"{where}: not valid JSON: {error.msg}"], str(path)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = getattr(error, "problem", None) or str(error)
        raise ConfigError([f"{where}not valid YAML: {what}"], str(path)) from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError([f"the top level must be a mapping, not a {_kind(tree)}"], str(path))
    tree = apply_overrides(tree, overrides, str(path))
    if isinstance(tree.get("system"), str):
        tree["system"] = _system_file(path.parent, tree["system"])
    return tree


def _system_file(folder: Path, name: str) -> dict[str, Any]:
    """Read a `sys.yaml` beside the configuration; paths inside it are as seen from there.

    Raises:
        ConfigError: If it cannot be read.
    """
    path = Path(name) if Path(name).is_absolute() else folder / name
    system = read(path)
    for section, key in (
        ("devices", "trace"),
        ("links", "trace"),
        ("devices", "ai_benchmark"),
        ("links", "measured"),
        ("availability", "path"),
    ):
        part = system.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str):
            part[key] = str(path.parent / part[key])
    return system


def apply_overrides(
    tree: Mapping[str, Any], overrides: Sequence[str], source: str | None = None
) -> dict[str, Any]:
    """Return a copy of the tree with `a.b=value` words laid over it (`tree` is not modified).

    Raises:
        ConfigError: If a word is not of that form, or goes through something not a mapping.
    """
    result = _copy(tree)
    problems = []
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            problems.append(f"'{word}' is not an override; write section.key=value")
            continue
        try:
            value = _scalar(text)
        except yaml.YAMLError:
            problems.append(f"{key}: '{text}' is not a YAML value")
            continue
        problems += _lay(result, key.split("."), value)
    if problems:
        raise ConfigError(problems, source)
    return result


def _lay(tree: dict[str, Any], path: Sequence[str], value: Any) -> list[str]:
    """Put a value at a path into the tree, changed in place; return what is in the way."""
    *parents, last = path
    node = tree
    for depth, part in enumerate(parents, start=1):
        child = node.get(part)
        if isinstance(child, str) and tuple(parents) in _NAMED:
            child = {_NAMED[tuple(parents)]: child}
        if child is not None and not isinstance(child, dict):
            where = ".".join(path[:depth])
            return [f"{'.'.join(path)}: '{where}' is {child!r}, which has no keys inside"]
        node[part] = node = {} if child is None else child
    node[last] = value
    return []


def validate(tree: Mapping[str, Any]) -> tuple[Config | None, list[str]]:
    """Check a raw tree; return the configuration (None if it is wrong) and all its problems."""
    shorthand = dict(tree)
    if isinstance(shorthand.get("algorithm"), str):
        shorthand["algorithm"] = {"name": shorthand["algorithm"]}
    try:
        return Config.model_validate(shorthand), []
    except ValidationError as error:
        return None, [_sentence(detail) for detail in error.errors()]


def validate_central(tree: Mapping[str, Any]) -> tuple[CentralConfig | None, list[str]]:
    """Check a raw tree of central fine-tuning, as `validate` does for a federation."""
    try:
        return CentralConfig.model_validate(dict(tree)), []
    except ValidationError as error:
        return None, [_sentence(detail, CentralConfig) for detail in error.errors()]


def dump(config: Config | CentralConfig) -> str:
    """Return the resolved configuration as YAML that re-runs the run."""
    tree = config.model_dump(mode="json")
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def _sentence(detail: ErrorDetails, root: type[BaseModel] = Config) -> str:
    """Turn one pydantic error into a line that says where, what and how to mend it."""
    where = ".".join(str(part) for part in detail["loc"] if not _is_branch(part))
    if detail["type"] == "extra_forbidden":
        *parents, name = [str(part) for part in detail["loc"]]
        known = _fields(parents, root)
        hint = did_you_mean(name, known) or f" Known here: {', '.join(known)}"
        return f"{where}: unknown key.{hint}"
    if detail["type"] == "union_tag_invalid":
        return _branch_sentence(where, detail["ctx"])
    if detail["type"] == "too_short":
        return f"{where}: too short; give at least {detail['ctx']['min_length']}"
    if detail["type"] == "missing":
        return f"{where}: missing; give it a value"
    message = detail["msg"].removeprefix("Value error, ")
    got = detail["input"]
    if isinstance(got, (str, int, float, bool)) or got is None:
        hint = ""
        expected = detail.get("ctx", {}).get("expected")
        if isinstance(got, str) and isinstance(expected, str):
            hint = did_you_mean(got, expected.replace("'", "").replace(" or ", ", ").split(", "))
        return f"{where}: {message[0].lower() + message[1:]} (got {got!r}).{hint}"
    return f"{where}: {message}" if where else message


def _branch_sentence(where: str, context: Mapping[str, Any]) -> str:
    """Say that a key such as `policy`, which decides what goes beside it, is missing or wrong."""
    key, _, got = str(context["tag"]).partition("=")
    tags = [tag.strip("' ").partition("=") for tag in str(context["expected_tags"]).split(",")]
    known = [value for name, _, value in tags if name == key]
    choices = f"choose one of {', '.join(known)}"
    if not got:
        return f"{where}.{key}: missing; {choices}"
    return f"{where}.{key}: no such {key}; {choices} (got {got!r}).{did_you_mean(got, known)}"


def _fields(parents: Sequence[str], root: type[BaseModel]) -> list[str]:
    """Return the keys known at this place of the tree."""
    kind: Any = root
    for part in parents:
        kind = _inside(kind, part)
        if type(None) in get_args(kind):  # a section that may be absent
            kind = next(filter(_is_model, get_args(kind)), kind)
    return list(kind.model_fields) if _is_model(kind) else []


def _inside(kind: Any, part: str) -> Any:
    """Return the type one step further on pydantic's way: a key, a branch or an index."""
    if _is_model(kind):
        return kind.model_fields[part].annotation if part in kind.model_fields else None
    if part.isdigit():
        return next(iter(get_args(kind)), None)
    for branch in get_args(kind):
        member, *notes = get_args(branch) or (branch,)
        if any(isinstance(note, Tag) and note.tag == part for note in notes):
            return member
    return None


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_branch(part: str | int) -> bool:
    """Tell pydantic's names for the members of a union, and our tags, from keys of ours."""
    return isinstance(part, str) and (
        part.startswith(("literal[", "list[", "constrained-", "function-"))
        or part in {"int", "float", "str", "bool"}
        or "=" in part
    )


def _scalar(text: str) -> Any:
    return yaml.load(text, _Loader) if text else None


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _kind(value: object) -> str:
    return {"list": "list", "str": "text"}.get(type(value).__name__, type(value).__name__)
