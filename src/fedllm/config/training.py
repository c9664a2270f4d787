"""What a client does with its data in one round."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from fedllm.config.section import Fraction, NonNegative, Section

KTO_NEEDS_TWO = (
    "objective kto compares each prompt with the answer to another one of the same step, so"
    " batch_size x gradient_accumulation must be at least 2"
)


class TrainingConfig(Section):
    """What a client does with its data in one round."""

    batch_size: PositiveInt = 8
    """Examples in a batch."""
    gradient_accumulation: PositiveInt = 1
    """Batches in one optimiser step; the loss is normalised over all of them."""
    local_epochs: PositiveInt | None = None
    """Passes over the client's data in a round. Give this or `local_steps`; default 1 epoch."""
    local_steps: PositiveInt | None = None
    """Optimiser steps in a round; the data repeats when it is short."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Rebuilt each round: no moments survive on a client."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegative = 0.0
    """Decoupled for AdamW, L2 for SGD."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """For SGD."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """For AdamW."""
    epsilon: PositiveFloat = 1e-8
    """For AdamW."""
    max_grad_norm: NonNegative = 1.0
    """Clip each client's gradient to this norm; 0 turns it off."""
    round_schedule: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    """How the learning rate falls over rounds."""
    round_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.99
    """Factor per round for `round_schedule: exponential`."""
    step_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls over the local steps of one round."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Local steps over which the learning rate rises at the start of each round."""
    tokens_per_pass: PositiveInt | Literal["auto"] = "auto"
    """Most tokens in one forward and backward pass; results do not depend on it."""

    objective: Literal["auto", "sft", "dpo", "kto"] = "auto"
    """What is learned: `sft` (the next token), `dpo` (the better answer of a pair over the worse)
    or `kto` (wanted answers over unwanted ones); `auto`: `dpo` for `data.task: preference`, `kto`
    for `rated`, else `sft`."""
    beta: PositiveFloat = 0.1
    """For `dpo` and `kto`: how dear it is to move away from the base model."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """For `dpo`: which function of the margin, as TRL names them."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """For `loss_type: robust`: the share of pairs whose answers are thought to be swapped."""
    desirable_weight: NonNegative = 1.0
    """For `kto`: weight of wanted answers."""
    undesirable_weight: NonNegative = 1.0
    """For `kto`: weight of unwanted answers."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("give either local_epochs or local_steps, not both")
        return self

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> TrainingConfig:
        if self.label_smoothing and self.loss_type != "robust":
            raise ValueError(
                f"label_smoothing {self.label_smoothing:g} belongs to loss_type: robust, and"
                f" loss_type is '{self.loss_type}'; set loss_type: robust, or take it out"
            )
        return self

    @model_validator(mode="after")
    def _something_to_compare(self) -> TrainingConfig:
        if self.objective == "kto" and self.batch_size * self.gradient_accumulation < 2:
            raise ValueError(KTO_NEEDS_TWO)
        return self
