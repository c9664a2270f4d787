"""From columns to rows: the shape is recognised from the names, or told by `data.columns`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fedllm.data.faults import Broken, RowFault, refuse
from fedllm.data.messages import Tags
from fedllm.data.rows import Record, Row, Task
from fedllm.data.shapes import SHAPES, Shape
from fedllm.errors import DataError, did_you_mean

ALIASES: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "prompt": ("prompt",),
    "completion": ("completion", "response"),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
    "question": ("question",),
    "answer": ("answer",),
    "text": ("text", "sentence"),
    "label": ("label",),
    "system": ("system",),
    "category": ("category",),
    "client": ("client", "client_id"),
    "history": ("history",),
    "tools": ("tools",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "desirable": ("desirable", "kto_tag"),
}
"""Our column names, each with the names under which files are known to have it."""

_ALIEN = ("images", "videos", "audios")


@dataclass(frozen=True)
class Wanted:
    """What the configuration says about the columns."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Our name to the file's, for what cannot be recognised."""
    task: Task | Literal["auto"] = "auto"
    """Only shapes that can be used for it are considered."""
    group: str | None = None
    """The file's column that gives the group; default: the category or label."""
    client: str | None = None
    """The file's column that gives the natural owner."""
    tags: Tags = field(default_factory=Tags)
    """How messages are written, where that is told."""
    text: str | None = None
    """The file's column of plain text, where it has no column for answers to it."""
    required: tuple[str, ...] = ()
    """Columns of ours that the shape must need, where a registry says what the rows are."""


@dataclass(frozen=True)
class Recognised:
    """Rows together with what was found out about their columns."""

    rows: list[Row]
    shape: Shape
    has_category: bool
    broken: list[Broken]
    """Rows that cannot be used."""


def to_rows(records: Sequence[Record], wanted: Wanted, *, source: str) -> Recognised:
    """Recognise the shape of records and turn each that can be used into a row.

    Args:
        records: At least one record.
        wanted: What the configuration says about the columns.
        source: The file or split, for messages.

    Raises:
        DataError: If no shape fits, or a column does not exist.
    """
    whole = [(where, record) for where, record in records if not isinstance(record, RowFault)]
    broken = [Broken.at(where, fault) for where, fault in records if isinstance(fault, RowFault)]
    if not whole:
        refuse(broken, total=len(records), share=0.0, source=source)
    try:
        reader = row_reader(whole, wanted, source)
    except DataError as error:
        more = f"\nBeside that, {broken[0].line}" if broken else ""
        raise DataError(f"{error}{more}") from None
    rows: list[Row] = []
    for where, record in whole:
        try:
            rows.append(reader.read(where, record))
        except RowFault as fault:
            broken.append(Broken.at(where, fault))
    return Recognised(rows, reader.shape, reader.has_category, broken)


@dataclass(frozen=True)
class RowReader:
    """How the records of one source become rows; `row_reader` finds it out."""

    shape: Shape
    used: Mapping[str, str]
    """Our names to the file's, of the columns that the shape uses."""
    group: str | None
    client: str | None
    has_category: bool
    tags: Tags

    def read(self, where: str, record: Mapping[str, Any]) -> Row:
        """Turn a record into a row.

        Raises:
            RowFault: If it lacks something or is wrong.
        """
        fields = {ours: record.get(name) for ours, name in self.used.items()}
        _demand(fields, self.used, self.shape)
        for name in _ALIEN:
            if record.get(name):
                raise RowFault("not only text", f"'{name}' is not empty; only text can be learned")
        found = self.shape.build(fields, self.tags)
        owner = _word(record, self.client) if self.client else None
        kind = _word(record, self.group) if self.group else found.label
        return Row(
            messages=found.messages,
            text=found.text,
            label=found.label,
            group=kind,
            client=owner,
            where=where,
            tools=found.tools,
            rejected=found.rejected,
            is_desirable=found.is_desirable,
            unused_messages=found.unused,
        )


def row_reader(
    records: Sequence[tuple[str, Mapping[str, Any]]], wanted: Wanted, source: str
) -> RowReader:
    """Recognise the shape of records from their columns.

    Raises:
        DataError: If no shape fits, or a column does not exist.
    """
    present = list(dict.fromkeys(name for _, record in records for name in record))
    if wanted.text is not None and not {"output", "response", "chosen"} & set(present):
        wanted = replace(wanted, columns={"text": wanted.text})
    theirs = _their_names(wanted.columns, present, source)
    if "desirable" not in theirs and "label" in theirs and "text" not in theirs:
        name = theirs["label"]
        if all(isinstance(record.get(name), bool) for _, record in records):  # as TRL writes KTO
            theirs["desirable"] = name
    shape = _recognise(theirs, wanted, present, source)
    return RowReader(
        shape=shape,
        used={o: theirs[o] for o in (*shape.required, *shape.optional) if o in theirs},
        group=_extra(wanted.group, present, source) or theirs.get("category"),
        client=_extra(wanted.client, present, source) or theirs.get("client"),
        has_category="category" in theirs,
        tags=wanted.tags,
    )


def _their_names(columns: Mapping[str, str], present: Sequence[str], source: str) -> dict[str, str]:
    """Return our name to the file's name for every column that is there."""
    for ours, name in columns.items():
        if ours not in ALIASES:
            raise DataError(
                f"data.columns: unknown name '{ours}'.{did_you_mean(ours, ALIASES)} "
                f"Known: {', '.join(ALIASES)}"
            )
        if name not in present:
            raise DataError(
                f"data.columns.{ours} is '{name}', a column that {source} does not have."
                f"{did_you_mean(name, present)} Its columns: {', '.join(present)}"
            )
    natural = {
        ours: next(name for name in names if name in present)
        for ours, names in ALIASES.items()
        if any(name in present for name in names)
    }
    return {**natural, **columns}


def _recognise(
    theirs: Mapping[str, str], wanted: Wanted, present: Sequence[str], source: str
) -> Shape:
    """Return the first shape that fits the columns, the task, and what was told."""
    core = {name for shape in SHAPES for name in shape.required}
    told = core & set(wanted.columns)
    fits = [
        shape
        for shape in SHAPES
        if told <= {*shape.required, *shape.optional}
        and theirs.keys() >= set(shape.required) >= set(wanted.required)
    ]
    for shape in fits:
        if wanted.task in ("auto", *shape.tasks):
            return shape
    if fits:
        what = f"look like '{fits[0].name}', which does not fit data.task '{wanted.task}'"
    else:
        what = "have a shape that is not recognised"
    known = [shape for shape in SHAPES if wanted.task in ("auto", *shape.tasks)]
    near = [hint for name in sorted(core - theirs.keys()) if (hint := _near(name, present))]
    shown = next((s for s in known if s.required == ("prompt", "completion")), known[-1])
    example = ", ".join(f"{name}: YOURS" for name in shown.required)
    raise DataError(
        f"{source}: its rows {what}. Columns: {', '.join(present)}.{''.join(near[:2])} "
        f"Shapes that fit: {'; '.join(shape.name for shape in known)}. "
        f"Say which column is which, for example data.columns: {{{example}}}"
    )


def _near(ours: str, present: Sequence[str]) -> str:
    hint = did_you_mean(ours, present).removeprefix(" Did you mean '").removesuffix("'?")
    return f" Is '{hint}' meant as '{ours}'?" if hint else ""


def _extra(name: str | None, present: Sequence[str], source: str) -> str | None:
    if name is not None and name not in present:
        raise DataError(
            f"federation.partition.by is '{name}', a column that {source} does not have."
            f"{did_you_mean(name, present)} Its columns: {', '.join(present)}"
        )
    return name


def _demand(fields: Mapping[str, Any], used: Mapping[str, str], shape: Shape) -> None:
    for ours in shape.required:
        value = fields[ours]
        if value is None or (isinstance(value, str) and not value.strip()) or value == []:
            raise RowFault("missing or empty column", f"'{used[ours]}' is missing or empty")


def _word(record: Mapping[str, Any], column: str) -> str:
    value = record.get(column)
    if value is None or value == "":
        raise RowFault("missing or empty column", f"'{column}' is missing or empty")
    return str(value)
