"""What local training learns from its rows: next tokens, preferences or ratings. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from fedllm.config import KTO_NEEDS_TWO, TrainingConfig
from fedllm.errors import ConfigError

if TYPE_CHECKING:
    from fedllm.data import TokenSet

Objective = Literal["sft", "dpo", "kto"]

_BY_TASK: dict[str, Objective] = {"preference": "dpo", "rated": "kto"}
_FORWARD_PASSES: dict[Objective, int] = {"sft": 0, "dpo": 1, "kto": 3}


def objective_of(training: TrainingConfig, task: str) -> Objective:
    """Return what is learned on data of a task.

    >>> objective_of(TrainingConfig(), "preference"), objective_of(TrainingConfig(), "qa")
    ('dpo', 'sft')

    Args:
        training: Its `objective` may be `auto`.
        task: What the rows are, as the data set says.

    Raises:
        ConfigError: If the objective and the data do not fit each other.
    """
    own = _BY_TASK.get(task, "sft")
    chosen = own if training.objective == "auto" else training.objective
    if chosen == "sft" and own == "kto":
        raise ConfigError(
            [
                "training.objective: sft would teach the unwanted answers of rated rows as well;"
                " set it to kto, or keep the wanted rows alone and set data.task: chat"
            ]
        )
    if chosen not in ("sft", own):
        wanted = next(task for task, name in _BY_TASK.items() if name == chosen)
        raise ConfigError(
            [
                f"training.objective: {chosen} needs rows of the task '{wanted}', but these are"
                f" '{task}'; set training.objective: auto, or give other data"
            ]
        )
    if chosen == "kto" and training.batch_size * training.gradient_accumulation < 2:
        raise ConfigError([f"training: {KTO_NEEDS_TWO}"])
    return chosen


def task_of(tokens: TokenSet) -> str:
    """Return the task that tokenised rows are of, as far as the objective depends on it."""
    if tokens.rejected is not None:
        return "preference"
    return "rated" if tokens.desirable is not None else "other"


def trained_lengths(tokens: TokenSet, objective: Objective) -> np.ndarray:
    """Return the tokens that training on each row goes over, int (rows,): of a pair, both sides."""
    if objective != "dpo" or tokens.rejected is None:
        return tokens.lengths
    return np.asarray(tokens.lengths + tokens.rejected.lengths)


def trained_share(tokens: TokenSet, objective: Objective) -> float:
    """Return the share of these tokens that logits are needed for."""
    flags = [tokens.supervised]
    if objective == "dpo" and tokens.rejected is not None:
        flags.append(tokens.rejected.supervised)
    return float(np.concatenate(flags).mean())


def forward_passes(objective: Objective) -> int:
    """Return the passes without a gradient that a device does for each pass with one.

    A pair or a rated row is scored by the base model too; KTO also scores mismatched answers, by
    the model and by the base.
    """
    return _FORWARD_PASSES[objective]
