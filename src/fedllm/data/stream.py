"""Training rows read, tokenised and handed out one after another, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import numpy.typing as npt

from fedllm.config import DataConfig
from fedllm.data.columns import Recognised, row_reader
from fedllm.data.dataset_info import Origin, origins
from fedllm.data.faults import Broken, RowFault, refuse
from fedllm.data.mixing import mixed
from fedllm.data.rows import Record, Row
from fedllm.data.selftest import check_prompts
from fedllm.data.sources import open_source
from fedllm.data.tasks import common_task, wanted_of
from fedllm.data.template import Tokenizer
from fedllm.data.tokens import Encoded
from fedllm.data.writer import Writer
from fedllm.errors import DataError
from fedllm.seeding import rng

_LOOKED_AT = 100  # rows that decide shape and task
_CHUNK = 64  # rows tokenised in one call
_BUFFER = 1000  # rows among which the next one is drawn


@dataclass(frozen=True)
class StreamedRow:
    """One tokenised row."""

    row: Row
    """What it was made from."""
    tokens: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    """Whether the loss counts the prediction of this token."""
    prompt_length: int
    """Leading tokens that the answer is generated from; 0 for plain text."""
    rejected: StreamedRow | None = None
    """For preference data: the worse answer after the same prompt."""


def stream_rows(
    config: DataConfig, tokenizer: Tokenizer, *, seed: int, template: str = "auto", epoch: int = 0
) -> Iterator[StreamedRow]:
    """Read the training rows once, in an order that follows from seed and epoch.

    At most about a thousand rows a source are held at a time. Shape and task are recognised from
    the first rows. Nothing is held out: give `test_path` or a test split to evaluate on.

    Args:
        config: Where the data is; `max_train_rows` ends the stream.
        tokenizer: Not modified.
        seed: Decides the order and the mixing.
        template: `auto`, a fallback's name or a file.
        epoch: Which pass over the rows this is.

    Raises:
        DataError: If the data cannot be read or does not fit, a row is broken (with
            `max_broken_share`: more of those seen so far are, or of the first hundred), or no row
            is within `max_length`.
    """
    sources = [_Source.opened(config, origin) for origin in origins(config)]
    task = common_task(config, [(source.name, source.recognised) for source in sources])
    settings = config.model_copy(update={"cache": False})
    writer = Writer.for_task(settings, tokenizer, task, "causal-lm", template)
    order = partial(rng, seed, "data", "stream", epoch)
    rows: Iterator[Row] = mixed(
        [partial(source.rows, order(number)) for number, source in enumerate(sources)],
        config.mix,
        weights=config.mix_weights,
        generator=order("mix"),
    )
    is_empty = True
    for chunk in _chunks(islice(rows, config.max_train_rows)):
        for streamed in _encoded(writer, chunk, is_first=is_empty):
            is_empty = False
            yield streamed
    if is_empty:
        raise DataError(
            f"{config.source}: no training row is within data.max_length {config.max_length}. "
            "Raise it, or set data.overlong: truncate"
        )


@dataclass(frozen=True)
class _Source:
    """One path: its name, what opens it, and how its records are read."""

    config: DataConfig
    name: str
    records: Callable[[], Iterator[Record]]
    read: Callable[[str, dict[str, object]], Row]
    recognised: Recognised

    @classmethod
    def opened(cls, config: DataConfig, origin: Origin) -> _Source:
        name, records = open_source(config, origin)
        first = list(islice(records(), _LOOKED_AT))
        whole = [(where, record) for where, record in first if not isinstance(record, RowFault)]
        if not whole:
            faults = [Broken.at(w, f) for w, f in first if isinstance(f, RowFault)]
            refuse(faults, total=len(first), share=0.0, source=name)
        reader = row_reader(whole, wanted_of(config, origin, None), name)
        rows = []
        for where, record in whole:
            try:
                rows.append(reader.read(where, record))
            except RowFault:
                continue  # counted when it is streamed
        found = Recognised(rows, reader.shape, reader.has_category, [])
        return cls(config, name, records, reader.read, found)

    def rows(self, generator: np.random.Generator) -> Iterator[Row]:
        """Read once, as many rows as asked, each drawn among the next thousand."""
        buffer: list[Row] = []
        for row in islice(self._usable(), self.config.max_rows_per_source):
            if len(buffer) < _BUFFER:
                buffer.append(row)
                continue
            place = int(generator.integers(_BUFFER))
            yield buffer[place]
            buffer[place] = row
        for place in generator.permutation(len(buffer)).tolist():
            yield buffer[place]

    def _usable(self) -> Iterator[Row]:
        broken: list[Broken] = []
        for number, (where, record) in enumerate(self.records(), start=1):
            try:
                if isinstance(record, RowFault):
                    raise record
                yield self.read(where, dict(record))
            except RowFault as fault:
                broken.append(Broken.at(where, fault))
                share = self.config.max_broken_share
                refuse(broken, total=max(number, _LOOKED_AT), share=share, source=self.name)


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    for first in rows:
        yield [first, *islice(rows, _CHUNK - 1)]


def _encoded(writer: Writer, rows: Sequence[Row], *, is_first: bool) -> Iterator[StreamedRow]:
    made, worse = writer.encode_split(rows, is_test=False)
    writer.refuse(made, rows, "streamed")
    kept = [rows[i] for i in made.kept.tolist()]
    if is_first:
        check_prompts(writer, made, kept)
    for place, row in enumerate(kept):
        rejected = None if worse is None else _row(worse, place, row, None)
        yield _row(made, place, row, rejected)


def _row(made: Encoded, place: int, row: Row, rejected: StreamedRow | None) -> StreamedRow:
    part = slice(int(made.offsets[place]), int(made.offsets[place + 1]))
    length = int(made.prompt_lengths[place])
    return StreamedRow(row, made.tokens[part], made.supervised[part], length, rejected)
