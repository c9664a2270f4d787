"""From a central configuration to the parts of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedllm.central.stages import STAGES, check_rows
from fedllm.config import CentralConfig
from fedllm.data import Dataset, chat_template, load_dataset
from fedllm.errors import DataError
from fedllm.seeding import derive

if TYPE_CHECKING:
    from fedllm.central.measuring import Measure
    from fedllm.central.streaming import Stream
    from fedllm.central.tables import Settled
    from fedllm.central.tuning import Tuned

Say = Callable[[str], None]
_WHOLE = 2**31 - 1
_FEW = 5


@dataclass(frozen=True)
class Parts:
    """Everything a central run is made of, but the trainer."""

    config: CentralConfig
    data: Dataset
    tuned: Tuned
    measure: Measure
    train: Settled
    """Examples to learn from, as the trainer takes them."""
    test: Settled | None
    """Those that answers are compared on."""
    owners: np.ndarray | None
    """Row that each piece of a text is from, where texts are cut."""
    stream: Stream | None = None
    """Where training rows come from if they are read while training goes on."""

    def tokens_in(self, rows: Sequence[int]) -> int:
        """Return how many tokens some training rows have."""
        if self.stream is not None:
            return self.stream.tokens_in(rows)
        return int(self.data.train.lengths[list(rows)].sum())

    def where(self, rows: Sequence[int]) -> str:
        """Name some training rows: where they stand."""
        if self.stream is not None:
            names = [self.stream.where(row) for row in rows]
        else:
            numbers = [int(row if self.owners is None else self.owners[row]) for row in rows]
            names = [self.data.rows.train[number].where for number in dict.fromkeys(numbers)]
        more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
        return ", ".join(names[:_FEW]) + more


def load_tokens(config: CentralConfig, tokenizer: Any) -> Dataset:
    """Read and tokenise the data set, as federated runs do.

    Raises:
        DataError: If it cannot be read, or its rows are not the stage's.
    """
    data = config.data
    if data.streaming:
        # the test rows alone; what is trained on comes later
        update = {"streaming": False, "path": data.test_path, "registry": None, "mix": "concat",
                  "mix_weights": None}  # fmt: skip
        data = data.model_copy(update=update)
    if config.stage == "pt":
        # whole texts; they are cut into pieces afterwards
        data = data.model_copy(update={"max_length": _WHOLE})
    found = load_dataset(
        data,
        tokenizer,
        kind="causal-lm",
        seed=config.seed,
        template=config.model.chat_template,
    )
    check_rows(config.stage, found.task, found.source)
    return found


def cut(config: CentralConfig, data: Dataset) -> tuple[Dataset, np.ndarray | None]:
    """Cut long texts into pieces for `pt`; return as well the row each training piece is from."""
    if config.stage != "pt":
        return data, None
    from fedllm.central.examples import pieces

    train, owners = pieces(data.train, config.data.max_length)
    test, of_test = pieces(data.test, config.data.max_length)
    tests = tuple(data.rows.test[i] for i in of_test.tolist())
    return replace(data, train=train, test=test, rows=replace(data.rows, test=tests)), owners


def build(config: CentralConfig, say: Say = lambda text: None) -> Parts:
    """Load the model, tokenise the data and put the parts of a run together.

    Raises:
        FedLLMError: If something the user can mend is wrong.
    """
    from fedllm.models import load_tokenizer, position_limit

    say("reading the data")
    tokenizer = load_tokenizer(config.model)
    data, owners = cut(config, load_tokens(config, tokenizer))
    say("loading the model")
    from fedllm.central.arguments import check_names
    from fedllm.central.examples import examples
    from fedllm.central.measuring import Measure
    from fedllm.central.tuning import Tuned, stage_kind
    from fedllm.models import load_model

    check_names(config)
    kind, labels = stage_kind(config.stage), int(config.stage == "rm")
    seed = derive(config.seed, "head")
    loaded = load_model(config.model, kind=kind, num_labels=labels, seed=seed)
    check_length(position_limit(loaded.model), config, data)
    # what is saved with the weights is what they were trained with
    words: Any = loaded.tokenizer
    words.chat_template = chat_template(words, config.model.chat_template)
    tuned = Tuned(loaded, config)
    pack_to = config.data.max_length if config.is_packed else None
    compares = STAGES[config.stage].shape in ("pairs", "rated")
    stream = _stream(config, words)
    return Parts(
        config=config,
        data=data,
        tuned=tuned,
        measure=Measure(config, data, tuned),
        train=stream.table() if stream else examples(config.stage, data.train, pack_to),
        test=examples(config.stage, data.test, None) if compares else None,
        owners=owners,
        stream=stream,
    )


def _stream(config: CentralConfig, tokenizer: Any) -> Stream | None:
    """Return where training rows come from, if not from memory."""
    if not config.data.streaming:
        return None
    from fedllm.central.streaming import Stream

    return Stream(config, tokenizer)


def check_length(limit: int | None, config: CentralConfig, data: Dataset) -> None:
    """Refuse rows longer than the positions the model has learned.

    Raises:
        DataError: If there is such a row.
    """
    sets = [data.train, data.test, data.train.rejected, data.test.rejected]
    longest = max(int(own.lengths.max()) for own in sets if own is not None)
    if limit is not None and longest > limit:
        raise DataError(
            f"the longest row has {longest} tokens, but {config.model.path} knows {limit}"
            f" positions. Set data.max_length: {limit} (with data.overlong: drop or truncate)"
        )
