"""A data set row by row: which rows can be used, which are mended, too long or broken, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedllm.config import DataConfig
from fedllm.data.columns import Recognised, Wanted, to_rows
from fedllm.data.dataset_info import origins
from fedllm.data.faults import Broken
from fedllm.data.rows import Record, Row, Task
from fedllm.data.selftest import check_prompts
from fedllm.data.sources import read_source
from fedllm.data.tasks import common_task, wanted_of
from fedllm.data.template import Tokenizer
from fedllm.data.tokens import Encoded, decoded
from fedllm.data.writer import Kind, Writer
from fedllm.errors import DataError

Verdict = Literal["ok", "mended", "too long", "broken"]
VERDICTS: tuple[Verdict, ...] = ("ok", "mended", "too long", "broken")

_STEP = 64  # suggested lengths are multiples of it
_COVERED = 0.99  # of the rows, by the suggested length
_UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class RowVerdict:
    """What was found out about one row."""

    where: str
    verdict: Verdict
    reason: str = ""
    """A few words by which rows are counted; empty where all is well."""
    what: str = ""
    remedy: str = ""
    length: int | None = None
    """Tokens of the whole row (of a pair's longer side); None where it is broken."""


@dataclass(frozen=True)
class DataCheck:
    """The verdicts on all rows of a data set, and what they amount to."""

    source: str
    task: Task
    max_length: int
    rows: tuple[RowVerdict, ...]
    suggested_length: int | None
    """The least multiple of 64 that holds 99 % of the rows; None where no row can be used."""
    supervised_share: float
    """Of the tokens of all rows that can be used."""
    example: tuple[tuple[str, bool], ...]
    """A row of ordinary length as the model sees it: text, and whether it is learned."""

    @property
    def totals(self) -> Mapping[Verdict, int]:
        """Rows of each verdict."""
        counts = Counter(row.verdict for row in self.rows)
        return {verdict: counts[verdict] for verdict in VERDICTS}

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row that is not broken."""
        return [row.length for row in self.rows if row.length is not None]


def check_data(
    config: DataConfig, tokenizer: Tokenizer, *, kind: Kind = "causal-lm", template: str = "auto"
) -> DataCheck:
    """Read every row of a data set, test rows included, and judge each.

    Args:
        config: Where the data is and how to read it.
        tokenizer: Not modified.
        kind: Of the model.
        template: `auto`, a fallback's name or a file.

    Raises:
        DataError: If a file cannot be read or recognised as a whole.
    """
    splits = _splits(config)
    task = common_task(config, [(name, found) for name, _, found in splits])
    lenient = config.model_copy(
        update={
            "cache": False,
            "max_broken_share": 1.0,
            "overlong": "drop",
            "max_length": _UNLIMITED,
        }
    )
    judge = _Judge(config, Writer.for_task(lenient, tokenizer, task, kind, template))
    rows: list[RowVerdict] = []
    for _, records, found in splits:
        verdicts = {fault.where: _broken(fault) for fault in found.broken}
        verdicts |= judge.judge(found.rows)
        rows += [verdicts[where] for where, _ in records]
    return judge.sum_up(tuple(rows), task)


def _splits(config: DataConfig) -> list[tuple[str, list[Record], Recognised]]:
    """Return name, records and rows of every split of every path; `test_path` comes once."""
    parts: dict[str, tuple[list[Record], Wanted]] = {}
    for origin in origins(config):
        source, wanted = read_source(config, origin), wanted_of(config, origin, None)
        parts[source.train_name] = (source.train, wanted)
        if source.test is not None:
            parts.setdefault(source.test_name, (source.test, wanted))
    return [
        (name, records, to_rows(records, wanted, source=name))
        for name, (records, wanted) in parts.items()
    ]


def _broken(fault: Broken) -> RowVerdict:
    return RowVerdict(fault.where, "broken", fault.reason, fault.what, fault.remedy)


class _Judge:
    """Tokenises rows without a limit and compares them with it."""

    def __init__(self, config: DataConfig, writer: Writer) -> None:
        self.config = config
        self.writer = writer
        self.tokens = self.learned = 0
        self.candidates: list[tuple[int, Encoded, int]] = []

    def judge(self, rows: Sequence[Row]) -> dict[str, RowVerdict]:
        """Return the verdict on each row by its place."""
        if not rows:
            return {}
        made, worse = self.writer.encode_split(rows, is_test=False)
        kept = [rows[i] for i in made.kept.tolist()]
        check_prompts(self.writer, made, kept)
        lengths = np.diff(made.offsets)
        if worse is not None:
            lengths = np.maximum(lengths, np.diff(worse.offsets))
        found = {rows[i].where: self._refused(rows[i]) for i in made.refused.tolist()}
        for place, (row, length) in enumerate(zip(kept, lengths.tolist(), strict=True)):
            found[row.where] = self._measured(row, length)
            self.candidates.append((length, made, place))
        self.tokens += int(made.offsets[-1])
        self.learned += int(made.supervised.sum())
        return {**{row.where: _short(row) for row in rows}, **found}

    def _refused(self, row: Row) -> RowVerdict:
        strict = replace(
            self.writer, config=self.writer.config.model_copy(update={"max_broken_share": 0.0})
        )
        try:
            strict.encode_split([row], is_test=False)
        except DataError as error:
            what = str(error).removeprefix(f"{row.where}: ")
            what, _, remedy = what.partition(". ")
            return RowVerdict(row.where, "broken", "refused by the chat template", what, remedy)
        return RowVerdict(row.where, "broken", "refused by the chat template")

    def _measured(self, row: Row, length: int) -> RowVerdict:
        limit = self.config.max_length
        if length > limit:
            reason, what = "too long", f"{length} tokens, more than max_length {limit}"
            if self.config.overlong == "truncate":
                what += "; it is shortened, or dropped if too little is left"
            remedy = "Raise max_length, or shorten the row"
            return RowVerdict(row.where, "too long", reason, what, remedy, length)
        notes = self._notes(row)
        if notes:
            return RowVerdict(row.where, "mended", notes[0], "; ".join(notes), "", length)
        return RowVerdict(row.where, "ok", length=length)

    def _notes(self, row: Row) -> list[str]:
        """Return what is done to a row that would go wrong as it stands."""
        renderer = self.writer.renderer
        texts = [m.content for m in (*row.messages, *row.rejected)] + [row.text or ""]
        notes = []
        if row.unused_messages:
            notes.append("messages after the last answer are left out")
        if renderer is not None and any(map(renderer.control_pattern.search, texts)):
            notes.append("control tokens in its text stay text")
        return notes

    def sum_up(self, rows: tuple[RowVerdict, ...], task: Task) -> DataCheck:
        """Return all verdicts with lengths, shares and an example."""
        lengths = sorted(length for length, _, _ in self.candidates)
        suggested = None
        if lengths:
            covering = lengths[min(int(_COVERED * len(lengths)), len(lengths) - 1)]
            suggested = -(-covering // _STEP) * _STEP
        return DataCheck(
            source=self.config.source,
            task=task,
            max_length=self.config.max_length,
            rows=rows,
            suggested_length=suggested,
            supervised_share=self.learned / max(self.tokens, 1),
            example=self._example(),
        )

    def _example(self) -> tuple[tuple[str, bool], ...]:
        if not self.candidates:
            return ()
        middle = sorted(self.candidates, key=lambda c: c[0])[len(self.candidates) // 2]
        _, made, place = middle
        part = slice(int(made.offsets[place]), int(made.offsets[place + 1]))
        return decoded(made.tokens[part], made.supervised[part], self.writer.tokenizer)


def _short(row: Row) -> RowVerdict:
    """Return the verdict on a row of less than two tokens."""
    return RowVerdict(row.where, "broken", "empty", "nothing of it can be learned", "Delete it")
