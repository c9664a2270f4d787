"""Data sets that come with the package: ten skills, generated on the spot, in several shapes."""

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
    "preferences": "the same questions, each with the right answer and another question's",
    "ratings": "the same questions, with right answers that are wanted and others that are not",
    "texts": "the same questions and answers as plain texts",
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


def preferences(split: str = "train", rows: int | None = None) -> list[dict[str, str]]:
    """Return questions with a better and a worse answer, that of another in the category.

    Rows have the keys `prompt`, `chosen`, `rejected` and `category`.
    """
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["completion"],
            "rejected": other,
            "category": row["category"],
        }
        for row, other in _with_others(skills(split, rows))
    ]


def ratings(split: str = "train", rows: int | None = None) -> list[dict[str, str | bool]]:
    """Return questions with an answer that is wanted in every second row.

    Rows have the keys `prompt`, `completion`, `label` and `category`.
    """
    return [
        {
            "prompt": row["prompt"],
            "completion": other if place % 2 else row["completion"],
            "label": place % 2 == 0,
            "category": row["category"],
        }
        for place, (row, other) in enumerate(_with_others(skills(split, rows)))
    ]


def texts(split: str = "train", rows: int | None = None) -> list[dict[str, str]]:
    """Return questions and answers as texts, under the key `text`."""
    return [{"text": f"{row['prompt']} {row['completion']}"} for row in skills(split, rows)]


def _with_others(rows: list[dict[str, str]]) -> list[tuple[dict[str, str], str]]:
    """Return each row with a wrong answer: the next different one in its category."""
    answers: dict[str, list[str]] = {}
    for row in rows:
        answers.setdefault(row["category"], []).append(row["completion"])
    seen: dict[str, int] = {}
    found = []
    for row in rows:
        own = answers[row["category"]]
        place = seen.get(row["category"], 0)
        seen[row["category"]] = place + 1
        later = (own[(place + step) % len(own)] for step in range(1, len(own)))
        found.append((row, next((a for a in later if a != row["completion"]), "I do not know.")))
    return found
