"""From the configuration to rows: what the task is, which rows are held out, which are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

import numpy as np

from fedllm.config import DataConfig, PartitionConfig
from fedllm.data.columns import Recognised, Wanted, to_rows
from fedllm.data.rows import Row, Rows, Task
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
    wanted = _wanted(config, partition)
    source = read_source(config)
    found = to_rows(source.train, wanted, source=source.train_name)
    task = _task(config, found)
    train = found.rows
    if source.test is None:
        train, test = _hold_out(train, config.holdout, seed, source.train_name)
        origin = f"{source.train_name}; {len(test)} of its rows are held out for testing"
    else:
        test = _official_test(source, wanted, found)
        origin = f"{source.train_name}; tested on {source.test_name}"
    names = _label_names(train, test, source.test_name) if task == "classification" else ()
    return Rows(
        train=_limit(train, config.max_train_rows, seed, "train"),
        test=_limit(test, config.max_test_rows, seed, "test"),
        task=task,
        label_names=names,
        source=origin,
    )


def _wanted(config: DataConfig, partition: PartitionConfig | None) -> Wanted:
    by = partition.by if partition else None
    is_owner = partition is not None and partition.name == "column"
    return Wanted(
        columns=config.columns,
        task=config.task,
        group=None if is_owner else by,
        client=by if is_owner else None,
    )


def _official_test(source: Source, wanted: Wanted, train: Recognised) -> list[Row]:
    found = to_rows(source.test or [], wanted, source=source.test_name)
    if found.shape is not train.shape:
        raise DataError(
            f"{source.test_name} has rows of the shape '{found.shape.name}', but those of "
            f"{source.train_name} are '{train.shape.name}'. Give both the same columns"
        )
    return found.rows


def _task(config: DataConfig, found: Recognised) -> Task:
    """Return the task that is told, or the one that the rows look like."""
    if config.task != "auto":
        return config.task
    if len(found.shape.tasks) == 1:
        return found.shape.tasks[0]
    rows = found.rows
    if any(sum(m.role == "assistant" for m in row.messages) > 1 for row in rows):
        return "chat"
    if all("####" in row.answer for row in rows):
        return "math"
    is_short = median(len(row.answer) for row in rows) <= _SHORT_ANSWER_CHARACTERS
    return "qa" if found.has_category or is_short else "chat"


def _hold_out(rows: list[Row], share: float, seed: int, where: str) -> tuple[list[Row], list[Row]]:
    """Divide rows into train and test, evenly over labels, so that train keeps every label."""
    if len(rows) < 2:
        raise DataError(
            f"{where}: there is no test split, and {len(rows)} row is too few to hold one out. "
            "Give data.test_path or more rows"
        )
    order = rng(seed, "data", "holdout").permutation(len(rows)).tolist()
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
