"""From columns to rows: the shape is recognised from the names, or told by `data.columns`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fedllm.data.faults import RowFault
from fedllm.data.messages import messages_of
from fedllm.data.rows import Message, Record, Row, Task
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
}
"""Our column names, each with the names under which files are known to have it."""

_SHOWN = 3  # faulty rows that a message names; the rest is counted


@dataclass(frozen=True)
class Shape:
    """One way in which files name their columns."""

    name: str
    tasks: tuple[Task, ...]
    """What rows of this shape can be used for, the usual use first."""
    required: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[Mapping[str, Any]], tuple[tuple[Message, ...], str | None, str | None]]
    """From our columns to messages, text and label."""


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


@dataclass(frozen=True)
class Recognised:
    """Rows together with what was found out about their columns."""

    rows: list[Row]
    shape: Shape
    has_category: bool


def to_rows(records: Sequence[Record], wanted: Wanted, *, source: str) -> Recognised:
    """Recognise the shape of records and turn each into a row.

    Args:
        records: At least one record.
        wanted: What the configuration says about the columns.
        source: The file or split, for messages.

    Raises:
        DataError: If no shape fits, a column does not exist, or rows lack what they need.
    """
    present = list(dict.fromkeys(name for _, record in records for name in record))
    theirs = _their_names(wanted.columns, present, source)
    shape = _recognise(theirs, wanted, present, source)
    used = {ours: theirs[ours] for ours in (*shape.required, *shape.optional) if ours in theirs}
    group = _extra(wanted.group, present, source) or theirs.get("category")
    client = _extra(wanted.client, present, source) or theirs.get("client")
    rows: list[Row] = []
    faults: list[str] = []
    for where, record in records:
        try:
            fields = {ours: record.get(name) for ours, name in used.items()}
            _demand(fields, used, shape)
            messages, text, label = shape.build(fields)
            owner = _word(record, client) if client else None
            kind = _word(record, group) if group else label
            rows.append(Row(messages, text, label, kind, owner, where))
        except RowFault as fault:
            faults.append(f"{where}: {fault}")
    if faults:
        raise DataError(_faulty(faults, source))
    return Recognised(rows, shape, "category" in theirs)


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
        if told <= {*shape.required, *shape.optional} and theirs.keys() >= set(shape.required)
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
    example = ", ".join(f"{name}: YOURS" for name in known[min(1, len(known) - 1)].required)
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


def _faulty(faults: Sequence[str], source: str) -> str:
    count = len(faults)
    shown = "".join(f"\n  {fault}" for fault in faults[:_SHOWN])
    more = f"\n  and {count - _SHOWN} more" if count > _SHOWN else ""
    rows = "1 row" if count == 1 else f"{count} rows"
    return f"{source}: {rows} cannot be used:{shown}{more}\nMend or delete them in the file"


def _word(record: Mapping[str, Any], column: str) -> str:
    value = record.get(column)
    if value is None or value == "":
        raise RowFault("missing or empty column", f"'{column}' is missing or empty")
    return str(value)


def _exchange(question: Any, answer: Any, system: Any = None) -> tuple[Message, ...]:
    head = (Message("system", str(system)),) if system else ()
    return (*head, Message("user", str(question)), Message("assistant", str(answer)))


def _prompt(fields: Mapping[str, Any]) -> tuple[tuple[Message, ...], None, None]:
    messages = _exchange(fields["prompt"], fields["completion"], fields.get("system"))
    return messages, None, None


def _instruction(fields: Mapping[str, Any]) -> tuple[tuple[Message, ...], None, None]:
    parts = [str(part) for part in (fields["instruction"], fields.get("input")) if part]
    messages = _exchange("\n".join(parts), fields["output"], fields.get("system"))
    return messages, None, None


def _question(fields: Mapping[str, Any]) -> tuple[tuple[Message, ...], None, None]:
    messages = _exchange(fields["question"], fields["answer"], fields.get("system"))
    return messages, None, None


def _labelled(fields: Mapping[str, Any]) -> tuple[tuple[Message, ...], str, str]:
    return (), str(fields["text"]), str(fields["label"])


def _plain(fields: Mapping[str, Any]) -> tuple[tuple[Message, ...], str, None]:
    return (), str(fields["text"]), None


def _conversation(fields: Mapping[str, Any]) -> tuple[tuple[Message, ...], None, None]:
    messages = list(messages_of(fields["messages"]))
    system = fields.get("system")
    if system and not any(message.role == "system" for message in messages):
        messages.insert(0, Message("system", str(system)))
    while messages and not (messages[-1].role == "assistant" and messages[-1].is_learned):
        messages.pop()  # nothing is learned from what follows the last answer
    if not messages:
        raise RowFault(
            "no answer", "the conversation has no message of the assistant, so no answer"
        )
    if not any(message.role == "user" for message in messages):
        raise RowFault("no question", "the conversation has no message of a user before its answer")
    return tuple(messages), None, None


_TALK: tuple[Task, ...] = ("qa", "math", "chat")

SHAPES: tuple[Shape, ...] = (
    Shape("messages", _TALK, ("messages",), ("system",), _conversation),
    Shape("prompt, completion", _TALK, ("prompt", "completion"), ("system",), _prompt),
    Shape(
        "instruction, input, output",
        _TALK,
        ("instruction", "output"),
        ("input", "system"),
        _instruction,
    ),
    Shape("question, answer", _TALK, ("question", "answer"), ("system",), _question),
    Shape("text, label", ("classification",), ("text", "label"), (), _labelled),
    Shape("text", ("text",), ("text",), (), _plain),
)
"""All shapes; where several fit, the first is taken."""
