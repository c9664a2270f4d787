"""From `data.path` to the records of the train and test splits, which are never merged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedllm.config import DataConfig
from fedllm.data.dataset_info import Origin
from fedllm.data.formats import SUFFIXES, iter_file, missing, read_file
from fedllm.data.rows import Record
from fedllm.errors import DataError, did_you_mean, unknown

TEST_SPLITS = ("test", "validation", "valid", "dev", "val")
"""Names under which `test_split: auto` looks for official test rows, best first."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """The records of both splits; `test` is None where rows have to be held out."""

    train: list[Record]
    test: list[Record] | None
    train_name: str
    test_name: str


def read_source(config: DataConfig, origin: Origin) -> Source:
    """Read both splits of a built-in data set, a file, a folder or a hub data set.

    Args:
        config: Which splits, and `test_path`.
        origin: One path of `data.path`.

    Raises:
        DataError: If the source or one of its splits is missing or unreadable.
    """
    path = Path(origin.path).expanduser()
    if origin.path.startswith("builtin:"):
        source = _builtin(origin.path.removeprefix("builtin:"))
    elif path.is_dir():
        source = _joined(path) if origin.joins_folder else _folder(config, origin, path)
    elif path.is_file():
        source = _file(config, path)
    elif path.suffix.lower() in SUFFIXES or not _HUB_ID.fullmatch(origin.path):
        raise DataError(missing(path))
    else:
        source = _hub(config, origin)
    if config.test_path is None:
        return source
    test = Path(config.test_path).expanduser()
    return Source(source.train, read_file(test), source.train_name, str(test))


def open_source(config: DataConfig, origin: Origin) -> tuple[str, Callable[[], Iterator[Record]]]:
    """Return the name of a training split and what opens it, to be read row by row.

    Raises:
        DataError: If it is missing.
    """
    path = Path(origin.path).expanduser()
    if path.is_file():
        return str(path), partial(iter_file, path)
    if path.is_dir():
        files = _joined_files(path) if origin.joins_folder else _splits(path)
        if isinstance(files, dict):
            choose_splits(config, origin.split, list(files), str(path))
            files = files[origin.split]
        return f"{path} {origin.split}", partial(_chained, files)
    if origin.path.startswith("builtin:") or path.suffix.lower() in SUFFIXES:
        source = read_source(config.model_copy(update={"test_path": None}), origin)
        return source.train_name, partial(iter, source.train)
    return f"{origin.path} {origin.split}", partial(_streamed, origin)


def _chained(files: Sequence[Path]) -> Iterator[Record]:
    for file in files:
        yield from iter_file(file)


def _streamed(origin: Origin) -> Iterator[Record]:
    """Read a split of a hub data set while it arrives."""
    rows = _from_hub(origin, split=origin.split, streaming=True)
    names = {c: f.names for c, f in (rows.features or {}).items() if hasattr(f, "names")}
    where = f"{origin.path} {origin.split}"
    for number, row in enumerate(rows, start=1):
        yield f"{where} row {number}", _named(row, names)


def _builtin(name: str) -> Source:
    from fedllm.data import builtin

    if name not in builtin.BUILTIN_DATASETS:
        raise DataError(unknown("built-in data set", name, builtin.BUILTIN_DATASETS))
    generate = getattr(builtin, name)

    def records(split: str) -> list[Record]:
        rows: list[dict[str, Any]] = generate(split)
        return [(f"builtin:{name} {split} row {i}", row) for i, row in enumerate(rows, start=1)]

    where = f"builtin:{name}"
    return Source(records("train"), records("test"), f"{where} train", f"{where} test")


def _file(config: DataConfig, path: Path) -> Source:
    if config.test_split != "auto" and config.test_path is None:
        raise DataError(
            f"data.test_split is '{config.test_split}', but {path} is one file without splits. "
            "Give data.test_path, or leave test_split on auto to hold rows out"
        )
    return Source(read_file(path), None, str(path), str(path))


def _joined(folder: Path) -> Source:
    """Read all files of a folder as one split without a test split."""
    return Source(list(_chained(_joined_files(folder))), None, str(folder), str(folder))


def _joined_files(folder: Path) -> list[Path]:
    files = [f for f in sorted(folder.iterdir()) if f.suffix.lower() in SUFFIXES and f.is_file()]
    if not files:
        raise DataError(f"{folder}: no data files in this folder. Known: {', '.join(SUFFIXES)}")
    return files


def _splits(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each split, by the names of files."""
    files: dict[str, list[Path]] = {}
    for file in _joined_files(folder):
        # train-00000-of-00002.parquet is one part of a split
        split = re.sub(r"-\d+-of-\d+$", "", file.stem)
        files.setdefault(split, []).append(file)
    return files


def _folder(config: DataConfig, origin: Origin, folder: Path) -> Source:
    files = _splits(folder)

    def records(split: str) -> list[Record]:
        parts = files[split]
        if len(parts) > 1 and any(part.stem == split for part in parts):
            names = ", ".join(part.name for part in parts)
            raise DataError(f"{folder}: split '{split}' has several files: {names}. Keep one")
        return list(_chained(parts))

    test = choose_splits(config, origin.split, list(files), str(folder))
    return Source(
        records(origin.split),
        None if test is None else records(test),
        f"{folder} {origin.split}",
        f"{folder} {test or origin.split}",
    )


def choose_splits(config: DataConfig, train: str, splits: Sequence[str], where: str) -> str | None:
    """Return the test split to use, or None for a hold-out; check that train is there."""
    if train not in splits:
        raise DataError(
            f"{where}: no split '{train}'."
            f"{did_you_mean(train, splits)} It has: {', '.join(splits)}. "
            "Set data.train_split"
        )
    if config.test_path is not None:
        return None
    if config.test_split == "auto":
        others = (name for name in TEST_SPLITS if name in splits and name != train)
        return next(others, None)
    if config.test_split not in splits:
        raise DataError(
            f"{where}: no split '{config.test_split}'."
            f"{did_you_mean(config.test_split, splits)} It has: {', '.join(splits)}. "
            "Set data.test_split"
        )
    if config.test_split == train:
        raise DataError(
            f"data.test_split and data.train_split are both '{config.test_split}'; testing on "
            "training rows says nothing. Leave test_split on auto to hold rows out"
        )
    return config.test_split


def _from_hub(origin: Origin, **words: Any) -> Any:
    import datasets

    if origin.folder is not None:
        words["data_dir"] = origin.folder
    try:
        return datasets.load_dataset(origin.path, origin.subset, **words)
    except Exception as error:  # the hub's client raises dozens of kinds: network, names, scripts
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"'{origin.path}' is no file or folder here, and as a hub data set it could not be "
            f"loaded: {lines[0].rstrip('.')}. Check the name, data.subset and the network"
        ) from None


def _hub(config: DataConfig, origin: Origin) -> Source:
    found = _from_hub(origin)
    test = choose_splits(config, origin.split, list(found), origin.path)

    def records(split: str) -> list[Record]:
        rows = found[split]
        names = {c: f.names for c, f in rows.features.items() if hasattr(f, "names")}
        where = f"{origin.path} {split}"
        return [(f"{where} row {i}", _named(row, names)) for i, row in enumerate(rows, start=1)]

    return Source(
        records(origin.split),
        None if test is None else records(test),
        f"{origin.path} {origin.split}",
        f"{origin.path} {test or origin.split}",
    )


def _named(row: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> Mapping[str, Any]:
    """Turn class ids into class names; -1, which hides a label, stays."""
    changed = {c: n[row[c]] for c, n in names.items() if row[c] is not None and row[c] >= 0}
    return {**row, **changed}
