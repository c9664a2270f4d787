"""Rows that cannot be used: why, what to do about it, and how many of them are too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm.errors import DataError

_SHOWN = 3  # faulty rows that a message names; the rest is counted
_REMEDY = "Mend or delete the row"


class RowFault(Exception):
    """Raised where a row is wrong and caught where rows are counted.

    Args:
        reason: A few words by which faults of one kind are counted, as "no answer".
        what: What is wrong in this row.
        remedy: How to mend it.
    """

    def __init__(self, reason: str, what: str, remedy: str = _REMEDY) -> None:
        self.reason = reason
        self.what = what
        self.remedy = remedy
        super().__init__(f"{what}. {remedy}")


@dataclass(frozen=True)
class Broken:
    """A row that cannot be used."""

    where: str
    reason: str
    what: str
    remedy: str

    @classmethod
    def at(cls, where: str, fault: RowFault) -> Broken:
        """Return a fault together with where it is."""
        return cls(where, fault.reason, fault.what, fault.remedy)

    @property
    def line(self) -> str:
        """Where, what and how to mend it, if that is not plain."""
        remedy = "" if self.remedy == _REMEDY else f". {self.remedy}"
        return f"{self.where}: {self.what}{remedy}"


def counted(broken: Sequence[Broken]) -> Mapping[str, int]:
    """Return how many rows have each kind of fault, the commonest first."""
    return dict(Counter(fault.reason for fault in broken).most_common())


def refuse(broken: Sequence[Broken], *, total: int, share: float, source: str) -> None:
    """Raise DataError if more than a share of the rows are broken.

    Args:
        broken: All of them.
        total: How many rows there are, the broken ones included.
        share: How large a part of them may be broken.
        source: The file or split, for messages.
    """
    count = len(broken)
    if count <= share * total:
        return
    shown = "".join(f"\n  {fault.line}" for fault in broken[:_SHOWN])
    more = f"\n  and {count - _SHOWN} more" if count > _SHOWN else ""
    reasons = ", ".join(f"{reason}: {number}" for reason, number in counted(broken).items())
    rows = "1 row" if count == 1 else f"{count} rows"
    raise DataError(
        f"{source}: {rows} cannot be used, of {total} ({reasons}):{shown}{more}\n"
        "Mend or delete them in the file, or leave them out with data.max_broken_share: "
        f"{_rounded_up(count / total)}"
    )


def _rounded_up(share: float) -> float:
    """Return the share with two digits, and not less than it.

    >>> _rounded_up(0.3412), _rounded_up(0.5)
    (0.35, 0.5)
    """
    rounded = round(share, 2)
    return rounded if rounded >= share else round(rounded + 0.01, 2)
