"""The task categories of `builtin:skills`, each able to draw and to ask any number of problems."""

from __future__ import annotations

from fedllm.data.skills import knowledge, reasoning
from fedllm.data.skills.item import Category, Item

CATEGORIES: dict[str, Category] = {
    category.name: category
    for category in sorted(
        (*knowledge.CATEGORIES, *reasoning.CATEGORIES), key=lambda category: category.name
    )
}

__all__ = ["CATEGORIES", "Category", "Item"]
