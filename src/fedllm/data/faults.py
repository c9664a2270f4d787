"""One row that cannot be used: why, and what to do about it."""

from __future__ import annotations


class RowFault(Exception):
    """Raised where a row is wrong and caught where rows are counted.

    Args:
        reason: A few words by which faults of one kind are counted, as "no answer".
        what: What is wrong in this row.
        remedy: How to mend it.
    """

    def __init__(self, reason: str, what: str, remedy: str = "Mend or delete the row") -> None:
        self.reason = reason
        self.what = what
        self.remedy = remedy
        super().__init__(f"{what}. {remedy}")
