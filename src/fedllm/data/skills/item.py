"""What a task category of `builtin:skills` is: a way to draw problems and the ways to ask them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

TEST_SHARE = 10
"""One in this many problems (or questions) belongs to the test split."""


@dataclass(frozen=True)
class Item:
    """One problem before it is put into words.

    Attributes:
        kind: Which group of phrasings fits this problem.
        fields: The slots of the phrasing.
        answer: The completion that counts as right.
    """

    kind: str
    fields: Mapping[str, str]
    answer: str


@dataclass(frozen=True)
class Category:
    """A family of problems with the phrasings in which users ask them.

    Attributes:
        name: The value of a row's `category`.
        draw: Returns a random problem.
        phrasings: Kind of problem to the prompts that ask for it.
        held_out: `problem` keeps whole problems for the test split, whatever their phrasing;
            `question` is for categories of a few hundred problems, where a problem is seen in
            training but the test asks for it in words that training never used for it.
    """

    name: str
    draw: Callable[[Random], Item]
    phrasings: Mapping[str, tuple[str, ...]]
    held_out: Literal["problem", "question"]

    def ask(self, item: Item, random: Random) -> str:
        """Put a problem into words."""
        return random.choice(self.phrasings[item.kind]).format(**item.fields)

    def is_test(self, item: Item, prompt: str) -> bool:
        """Tell which split a problem belongs to, the same for every seed and number of rows."""
        key = prompt
        if self.held_out == "problem":
            key = "|".join([item.kind, *(item.fields[name] for name in sorted(item.fields))])
        digest = hashlib.blake2b(f"{self.name}|{key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % TEST_SHARE == 0
