"""What a central run would be, found out without training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm.central.parts import build, check_length, cut, load_tokens
from fedllm.central.stages import check_installed
from fedllm.config import CentralConfig
from fedllm.data import Dataset, TokenSet
from fedllm.data.tokens import decoded

_TRAINED_BYTES = 16
"""fp32 parameter, gradient and two moments of AdamW."""
_ACTIVATION_BYTES = 34
"""Bytes of activations for each token, layer and unit of the hidden size, in 16 bits."""
_CHECKPOINTED_BYTES = 2
"""The same where only the inputs of layers are kept."""


@dataclass(frozen=True)
class CentralReport:
    """All that a dry run knows."""

    config: CentralConfig
    data: Dataset
    architecture: str
    parameters: int
    """Of the base."""
    trained: int
    """How many of them, or of adapters, are trained."""
    sequences: int
    """Sequences in an epoch: rows, or packs of rows."""
    steps: int
    """Optimiser steps in all."""
    base_bytes: int
    trained_bytes: int
    activation_bytes: int
    example: tuple[tuple[str, bool], ...]
    """The training row of ordinary length: text, and whether it is learned."""
    worse: tuple[tuple[str, bool], ...]
    """For pairs: the same row with the worse answer."""


def check(config: CentralConfig, say: Callable[[str], None] = lambda text: None) -> CentralReport:
    """Read the data and work out what a run takes; no weight is loaded.

    Raises:
        FedLLMError: If something the user can mend is wrong.
    """
    check_installed(config)
    from fedllm.models import load_tokenizer

    say("reading the data")
    tokenizer = load_tokenizer(config.model)
    data, _ = cut(config, load_tokens(config, tokenizer))
    say("working out sizes")
    return report(config, data, tokenizer)


def rehearse(
    config: CentralConfig, say: Callable[[str], None] = lambda text: None
) -> CentralReport:
    """Do everything that comes before the first step, model included, and write nothing.

    Raises:
        FedLLMError: If something the user can mend is wrong.
    """
    from fedllm.central.packed import layout
    from fedllm.central.rewards import reward_function

    check_installed(config)
    parts = build(config, say)
    layout(config, parts.tuned)
    if config.stage == "grpo":
        for name in config.objective.rewards:
            reward_function(name)
    say("working out sizes")
    return report(config, parts.data, parts.tuned.loaded.tokenizer)


def report(config: CentralConfig, data: Dataset, tokenizer: Any) -> CentralReport:
    """Describe a run whose data is there."""
    from fedllm.central.sizes import sizes_of

    sizes = sizes_of(config)
    check_length(sizes.position_limit, config, data)
    sequences = _sequences(config, data.train)
    training = config.training
    a_step = training.batch_size * training.gradient_accumulation * training.processes
    an_epoch = max(math.ceil(sequences / a_step), 1)
    steps = training.max_steps or math.ceil((training.epochs or 1.0) * an_epoch)
    lengths = data.train.lengths
    longest = config.data.max_length if config.is_packed else int(lengths.max())
    in_a_batch = training.batch_size * longest * (2 if data.train.rejected is not None else 1)
    per_unit = _CHECKPOINTED_BYTES if training.gradient_checkpointing else _ACTIVATION_BYTES
    logits = in_a_batch * sizes.vocabulary * 4
    row = int(np.argmin(np.abs(lengths - np.median(lengths))))
    worse = data.train.rejected
    return CentralReport(
        config=config,
        data=data,
        architecture=sizes.architecture,
        parameters=sizes.parameters,
        trained=sizes.trained,
        sequences=sequences,
        steps=steps,
        base_bytes=sizes.base_bytes,
        trained_bytes=sizes.trained * _TRAINED_BYTES,
        activation_bytes=in_a_batch * sizes.layers * sizes.hidden * per_unit + logits,
        example=decoded(*data.train.row(row), tokenizer),
        worse=decoded(*worse.row(row), tokenizer) if worse is not None else (),
    )


def _sequences(config: CentralConfig, train: TokenSet) -> int:
    from fedllm.central.examples import bins

    return len(bins(train.lengths, config.data.max_length)) if config.is_packed else len(train)
