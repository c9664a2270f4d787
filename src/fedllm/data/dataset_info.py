"""LLaMA-Factory's `dataset_info.json`: names for data sets, and how each is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedllm.config import DataConfig
from fedllm.data.messages import Tags
from fedllm.errors import DataError, did_you_mean, unknown

FILE = "dataset_info.json"

_ELSEWHERE = ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_KEYS = (
    *("file_name", "hf_hub_url", *_ELSEWHERE),
    *("formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags"),
)
_FORMATS: Mapping[str, tuple[str, ...]] = {
    "alpaca": (),
    "sharegpt": ("messages",),
    "openai": ("messages",),
}
"""Formats, and the columns of ours that rows of each must have."""
_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "messages": "messages",
    "system": "system",
    "tools": "tools",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "desirable",
}
"""Its names of columns to ours; `images`, `videos` and `audios` are known, but not learned."""
_ALIEN = ("images", "videos", "audios")
_ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_TAGS = ("role_tag", "content_tag", *_ROLE_TAGS)


@dataclass(frozen=True)
class Origin:
    """One path of `data.path`, and how it is read."""

    path: str
    subset: str | None
    split: str
    columns: Mapping[str, str]
    tags: Tags = field(default_factory=Tags)
    required: tuple[str, ...] = ()
    """Columns that the rows' shape must need."""
    num_rows: int | None = None
    """Take exactly so many training rows, repeating them if there are fewer."""
    text: str | None = None
    """The column of plain text, where there turns out to be no column for answers to it."""
    folder: str | None = None
    """Folder inside a hub data set."""
    joins_folder: bool = False
    """Whether all files of a folder are one split, as LLaMA-Factory reads folders."""


def origins(config: DataConfig) -> list[Origin]:
    """Return where every path of the configuration leads.

    Raises:
        DataError: If the registry cannot be read, lacks a name, or has an unknown key.
    """
    if config.registry is None:
        return [_direct(config, path) for path in config.paths]
    file = config.registry.expanduser()
    file = file / FILE if file.is_dir() else file
    registry = _read(file)
    return [
        _entry(config, name, registry[name], file)
        if name in registry
        else _outside(config, name, registry, file)
        for name in config.paths
    ]


def _direct(config: DataConfig, path: str) -> Origin:
    return Origin(path, config.subset, config.train_split, config.columns)


def _outside(config: DataConfig, name: str, registry: Mapping[str, Any], file: Path) -> Origin:
    path = Path(name).expanduser()
    if name.startswith("builtin:") or "/" in name or path.suffix or path.exists():
        return _direct(config, name)
    raise DataError(f"{file}: {unknown('data set', name, registry)}")


def _read(file: Path) -> Mapping[str, Any]:
    try:
        registry = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(
            f"data.registry: there is no {file}. Give a {FILE}, or the folder that holds it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.registry: {file} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from None
    if not isinstance(registry, dict):
        raise DataError(f"{file}: the top level must be an object of names and their data sets")
    return registry


def _entry(config: DataConfig, name: str, entry: Any, file: Path) -> Origin:
    where = f"{file}: '{name}'"
    _check_keys(entry, _KEYS, where)
    columns = entry.get("columns") or {}
    _check_keys(columns, (*_COLUMNS, *_ALIEN), f"{where}: columns")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in _FORMATS:
        raise DataError(f"{where}: {unknown('formatting', str(formatting), _FORMATS)}")
    ours = {_COLUMNS[k]: str(v) for k, v in columns.items() if k in _COLUMNS and v}
    is_lone = formatting == "alpaca" and list(ours) == ["instruction"]
    is_pairs = bool(entry.get("ranking", False))
    path, is_local = _place(entry, where, file)
    return Origin(
        path=path,
        subset=entry.get("subset"),
        split=str(entry.get("split", config.train_split)),
        columns={**ours, **config.columns},
        tags=_tags(entry.get("tags") or {}, where),
        required=("chosen", "rejected") if is_pairs else _FORMATS[formatting],
        num_rows=_count(entry.get("num_samples"), where),
        folder=entry.get("folder"),
        joins_folder=is_local,
        text=ours["instruction"] if is_lone else None,
    )


def _place(entry: Mapping[str, Any], where: str, file: Path) -> tuple[str, bool]:
    """Return the path, and whether it is on this machine; the hub comes first, as there."""
    if entry.get("hf_hub_url"):
        return str(entry["hf_hub_url"]), False
    if entry.get("file_name"):
        return str(file.parent / str(entry["file_name"])), True
    given = [key for key in _ELSEWHERE if entry.get(key)]
    if given:
        raise DataError(
            f"{where}: {given[0]} is not read here. Download the data and give file_name, or "
            "give hf_hub_url"
        )
    raise DataError(f"{where}: no source. Give file_name or hf_hub_url")


def _tags(tags: Any, where: str) -> Tags:
    _check_keys(tags, _TAGS, f"{where}: tags")
    roles = {str(tags[key]): role for key, role in _ROLE_TAGS.items() if tags.get(key)}
    return Tags(tags.get("role_tag"), tags.get("content_tag"), roles or None)


def _count(value: Any, where: str) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise DataError(f"{where}: num_samples must be a whole number above 0, not {value!r}")


def _check_keys(entry: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: must be an object, not a {type(entry).__name__}")
    for key in entry:
        if key not in known:
            raise DataError(
                f"{where}: unknown key '{key}'.{did_you_mean(key, known)} Known: {', '.join(known)}"
            )
