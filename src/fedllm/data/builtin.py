"""The data set that comes with the package: instructions in ten skills, generated on the spot."""

from __future__ import annotations

from random import Random
from typing import Literal

from fedllm.data.skills import CATEGORIES, Category
from fedllm.errors import ConfigError
from fedllm.seeding import derive

Split = Literal["train", "test"]

DEFAULT_ROWS: dict[Split, int] = {"train": 4000, "test": 400}

BUILTIN_DATASETS: dict[str, str] = {
    "skills": (
        f"{len(CATEGORIES)} generated instruction skills with short answers "
        f"({DEFAULT_ROWS['train']} train and {DEFAULT_ROWS['test']} test rows, "
        "each with a category)"
    ),
}
"""Name to a description in one line."""

# A category of finitely many questions runs dry; after this many draws a repetition is accepted.
_PATIENCE = 200


def skills(split: str = "train", rows: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """Generate instruction rows, the same ones for the same arguments on every machine.

    Args:
        split: `train` or `test`. No prompt is in both, whatever the seeds and numbers of rows.
        rows: How many rows; 4,000 for training and 400 for testing unless told.
        seed: Which rows of the many possible ones.

    Returns:
        Rows with the keys `prompt`, `completion` and `category`, in random order. The categories
        differ in size by one row at most.

    Example:
        >>> rows = skills("test", rows=20)
        >>> len(rows), len({row["category"] for row in rows})
        (20, 10)
    """
    chosen = _check(split)
    count = DEFAULT_ROWS[chosen] if rows is None else rows
    if count < 0:
        raise ConfigError([f"rows must be 0 or more, not {count}"])
    table: list[dict[str, str]] = []
    for place, category in enumerate(CATEGORIES.values()):
        share = count // len(CATEGORIES) + (place < count % len(CATEGORIES))
        table += _category_rows(category, chosen, share, seed)
    Random(derive(seed, "skills", chosen, "order")).shuffle(table)
    return table


def _check(split: str) -> Split:
    match split:
        case "train" | "test":
            return split
        case _:
            raise ConfigError(
                [f"Unknown split '{split}' of builtin:skills. Available: test, train"]
            )


def _category_rows(category: Category, split: Split, count: int, seed: int) -> list[dict[str, str]]:
    """Draw rows of one category, none twice as long as new ones can be found."""
    random = Random(derive(seed, "skills", split, category.name))
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    tries = 0
    while len(rows) < count:
        item = category.draw(random)
        prompt = category.ask(item, random)
        if category.is_test(item, prompt) != (split == "test"):
            continue
        tries += 1
        if prompt in seen and tries < _PATIENCE:
            continue
        seen.add(prompt)
        rows.append({"prompt": prompt, "completion": item.answer, "category": category.name})
        tries = 0
    return rows
