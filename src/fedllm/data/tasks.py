"""From the configuration to rows: what the task is, which rows are held out, which are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np

from fedllm.config import DataConfig, PartitionConfig
from fedllm.data.columns import Recognised, Wanted, to_rows
from fedllm.data.dataset_info import Origin, origins
from fedllm.data.faults import Broken, counted, refuse
from fedllm.data.mixing import mixed
from fedllm.data.rows import TALK, Row, Rows, Task
from fedllm.data.sources import Source, read_source
from fedllm.errors import DataError, did_you_mean
from fedllm.seeding import rng

_SHORT_ANSWER_CHARACTERS = 100


def load_rows(config: DataConfig, seed: int, *, partition: PartitionConfig | None = None) -> Rows:
    """Read a data set, recognise its shape and task, and choose the rows of both splits.

    Needs no tokenizer. Official splits are never merged; rows are held out of train only where
    there is no test split.

    Args:
        config: Where the data is and how to read it.
        seed: Decides which rows are held out and, with `max_train_rows`, used.
        partition: Its `by` names a column that rows must carry as group or client.

    Raises:
        DataError: If the data cannot be read or does not fit the configuration.
    """
    found = [_read(config, origin, partition) for origin in origins(config)]
    task = common_task(config, [(one.source.train_name, one.recognised) for one in found])
    has_tests = any(one.test is not None for one in found)
    splits = []
    for number, one in enumerate(found):
        splits.append(one if has_tests else _with_hold_out(one, config.holdout, seed, number))
    train = _mix(config, splits, seed)
    test = _tests(config, splits)
    names = (
        _label_names(train, test, splits[0].source.test_name) if task == "classification" else ()
    )
    return Rows(
        train=_limit(train, config.max_train_rows, seed, "train"),
        test=_limit(test, config.max_test_rows, seed, "test"),
        task=task,
        label_names=names,
        source="; ".join(dict.fromkeys(one.title for one in splits)),
        dropped=counted([fault for one in found for fault in one.broken]),
    )


@dataclass(frozen=True)
class _Found:
    """The rows of one path."""

    origin: Origin
    source: Source
    recognised: Recognised
    train: list[Row]
    test: list[Row] | None
    broken: list[Broken]
    title: str


def _read(config: DataConfig, origin: Origin, partition: PartitionConfig | None) -> _Found:
    wanted = wanted_of(config, origin, partition)
    source = read_source(config, origin)
    found = to_rows(source.train, wanted, source=source.train_name)
    _refuse(config, found, source.train_name)
    if source.test is None:
        return _Found(origin, source, found, found.rows, None, found.broken, source.train_name)
    test = _official_test(source, wanted, found)
    _refuse(config, test, source.test_name)
    title = f"{source.train_name}; tested on {source.test_name}"
    return _Found(origin, source, found, found.rows, test.rows, found.broken + test.broken, title)


def _refuse(config: DataConfig, found: Recognised, source: str) -> None:
    total = len(found.rows) + len(found.broken)
    share = config.max_broken_share if found.rows else 0.0
    refuse(found.broken, total=total, share=share, source=source)


def _with_hold_out(found: _Found, share: float, seed: int, number: int) -> _Found:
    where = found.source.train_name
    train, test = _hold_out(found.train, share, seed, where, number)
    title = f"{where}; {len(test)} of its rows are held out for testing"
    return replace(found, train=train, test=test, title=title)


def _mix(config: DataConfig, found: Sequence[_Found], seed: int) -> list[Row]:
    """Return the training rows of all paths, as many of each as asked, mixed."""
    sources = [_sampled(config, one, seed, number) for number, one in enumerate(found)]
    if len(sources) == 1:
        return sources[0]
    return list(
        mixed(
            [partial(iter, rows) for rows in sources],
            config.mix,
            weights=config.mix_weights,
            generator=rng(seed, "data", "mix"),
        )
    )


def _sampled(config: DataConfig, found: _Found, seed: int, number: int) -> list[Row]:
    rows, wanted = found.train, found.origin.num_rows
    if wanted is not None and wanted != len(rows):
        generator = rng(seed, "data", "samples", number)
        once = generator.permutation(len(rows))[:wanted].tolist()
        again = generator.integers(len(rows), size=wanted - len(once)).tolist()
        rows = [rows[i] for i in sorted(once) + again]
    most = config.max_rows_per_source
    return list(_limit(rows, most, seed, f"source {number}"))


def _tests(config: DataConfig, found: Sequence[_Found]) -> list[Row]:
    """Return the test rows of all paths; `test_path` is one for all."""
    tests = [one.test for one in found if one.test is not None]
    return tests[0] if config.test_path is not None else [row for test in tests for row in test]


def wanted_of(config: DataConfig, origin: Origin, partition: PartitionConfig | None) -> Wanted:
    """Return what the configuration says about the columns of one path."""
    by = partition.by if partition else None
    is_owner = partition is not None and partition.name == "column"
    return Wanted(
        columns=origin.columns,
        task=config.task,
        group=None if is_owner else by,
        client=by if is_owner else None,
        tags=origin.tags,
        required=origin.required,
        text=origin.text,
    )


def _official_test(source: Source, wanted: Wanted, train: Recognised) -> Recognised:
    found = to_rows(source.test or [], wanted, source=source.test_name)
    if found.shape is not train.shape:
        raise DataError(
            f"{source.test_name} has rows of the shape '{found.shape.name}', but those of "
            f"{source.train_name} are '{train.shape.name}'. Give both the same columns"
        )
    return found


def common_task(config: DataConfig, found: Sequence[tuple[str, Recognised]]) -> Task:
    """Return the task that is told, or the one that the rows of all sources look like.

    Args:
        config: Its `task` is told, or `auto`.
        found: Name and rows of each source.

    Raises:
        DataError: If rows of different kinds would be mixed.
    """
    if config.task != "auto":
        return config.task
    tasks = [task_of(one) for _, one in found]
    kinds = ["talk" if task in TALK else task for task in tasks]
    for (name, _), kind in zip(found, kinds, strict=True):
        if kind != kinds[0]:
            raise DataError(
                f"data.path: {found[0][0]} and {name} cannot be mixed: the rows of one are "
                f"'{kinds[0]}', of the other '{kind}'. Give them the same columns, or set "
                "data.task to one that both can be used for"
            )
    return tasks[0] if len(set(tasks)) == 1 else "chat"


def task_of(found: Recognised) -> Task:
    """Return what rows look like."""
    usual, *others = found.shape.tasks
    if not others or usual not in TALK:
        return usual
    rows = found.rows
    if not rows:
        return "chat"
    if any(sum(m.role == "assistant" for m in row.messages) > 1 for row in rows):
        return "chat"
    if all("####" in row.answer for row in rows):
        return "math"
    is_short = median(len(row.answer) for row in rows) <= _SHORT_ANSWER_CHARACTERS
    return "qa" if found.has_category or is_short else "chat"


def _hold_out(
    rows: list[Row], share: float, seed: int, where: str, number: int
) -> tuple[list[Row], list[Row]]:
    """Divide rows into train and test, evenly over labels, so that train keeps every label."""
    if len(rows) < 2:
        raise DataError(
            f"{where}: there is no test split, and {len(rows)} row is too few to hold one out. "
            "Give data.test_path or more rows"
        )
    stream = ("data", "holdout", number) if number else ("data", "holdout")
    order = rng(seed, *stream).permutation(len(rows)).tolist()
    seen: set[str | None] = {None}
    spare = []  # all but the first row of each label
    for i in order:
        if rows[i].label in seen:
            spare.append(i)
        seen.add(rows[i].label)
    spare.sort(key=lambda i: rows[i].label or "")  # stable, so random within a label
    wanted = min(max(round(share * len(rows)), 1), len(rows) - 1)
    if not spare:
        raise DataError(
            f"{where}: there is no test split, and every row has a label of its own, "
            "so none can be held out. Give data.test_path"
        )
    every = np.linspace(0, len(spare), min(wanted, len(spare)), endpoint=False).astype(int)
    chosen = {spare[i] for i in every}
    return (
        [row for i, row in enumerate(rows) if i not in chosen],
        [row for i, row in enumerate(rows) if i in chosen],
    )


def _label_names(train: Sequence[Row], test: Sequence[Row], where: str) -> tuple[str, ...]:
    """Return the class names that train has, numbers by value, else by name."""
    known = {row.label for row in train if row.label is not None}
    alien = [row for row in test if row.label not in known]
    if alien:
        count = Counter(row.label for row in alien)[alien[0].label]
        hint = did_you_mean(alien[0].label or "", known)
        raise DataError(
            f"{alien[0].where}: the label '{alien[0].label}' ({count} of {len(test)} test rows) "
            f"is in {where} but not in the training rows, so it cannot be learned.{hint} Known: "
            f"{', '.join(sorted(known)[:20])}. Mend the labels, or choose another data.test_split"
            " (test splits with hidden labels have -1 here)"
        )
    if len(known) < 2:
        raise DataError(
            f"classification needs at least 2 different labels; the training rows have {len(known)}"
            f": {', '.join(known)}. Check data.columns.label"
        )
    return tuple(sorted(known, key=_label_order))


def _label_order(label: str) -> tuple[float, str]:
    try:
        return float(label), label
    except ValueError:
        return float("inf"), label


def _limit(rows: list[Row], most: int | None, seed: int, split: str) -> tuple[Row, ...]:
    if most is None or most >= len(rows):
        return tuple(rows)
    chosen = rng(seed, "data", "limit", split).permutation(len(rows))[:most]
    return tuple(rows[i] for i in sorted(chosen.tolist()))
