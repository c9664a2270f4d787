"""The configuration of central fine-tuning: one machine, all rows, through TRL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from fedllm.config.data import DataConfig
from fedllm.config.schema import ModelConfig
from fedllm.config.section import Fraction, NonNegative, Section

Stage = Literal["sft", "pt", "dpo", "kto", "rm", "orpo", "simpo", "grpo"]
Whole = Annotated[int, Field(ge=0)]


class TuningConfig(Section):
    """Which weights are trained."""

    method: Literal["lora", "freeze", "full"] = "lora"
    """Adapters of low rank, the weights of some layers, or all weights. QLoRA is `lora` with
    `model.quantization: 4bit`."""
    rank: PositiveInt = 8
    """LoRA rank r."""
    alpha: PositiveFloat | None = None
    """LoRA alpha; scaling = alpha / r. Default 2 r."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the input of the low-rank path, while training."""
    targets: Literal["auto", "all-linear"] | list[str] = "auto"
    """Which linear layers get an adapter: `auto` (attention query and value), `all-linear`
    (every linear layer but the head), or a list of module names."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    dora: bool = False
    """Learn the length of each weight column apart from its direction (DoRA)."""
    init: Literal["default", "pissa"] = "default"
    """`default`: B = 0, and A as federated runs draw it; `pissa`: the leading singular vectors."""
    loraplus_ratio: Annotated[float, Field(ge=1.0)] | None = None
    """Learning rate of B over that of A (LoRA+); absent: the same."""
    freeze_layers: int = 2
    """For `freeze`: train the last so many layers; a negative number means the first ones."""

    @property
    def scaling(self) -> float:
        """The factor on B A."""
        return self.scaling_alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def scaling_alpha(self) -> float:
        """Alpha, given or by default."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank


class OptimisationConfig(Section):
    """How the weights are trained."""

    batch_size: PositiveInt = 8
    """Examples in a batch of one process; with `packing`, packs of `data.max_length` tokens."""
    gradient_accumulation: PositiveInt = 1
    """Batches in one optimiser step; the loss is normalised over all of them."""
    epochs: PositiveFloat | None = None
    """Passes over the training rows. Give this or `max_steps`; default 1."""
    max_steps: PositiveInt | None = None
    """Optimiser steps; the data repeats when it is short."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate."""
    scheduler: str = "cosine"
    """How the learning rate falls: `constant`, `linear`, `cosine`, or another of transformers'."""
    warmup: NonNegative = 0.0
    """Steps over which the learning rate rises; below 1, a share of all steps."""
    optimizer: str = "adamw"
    """`adamw`, `sgd`, or another of transformers' names, such as `adafactor`."""
    weight_decay: NonNegative = 0.0
    """Decoupled for AdamW, L2 for SGD."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """For AdamW."""
    epsilon: PositiveFloat = 1e-8
    """For AdamW."""
    max_grad_norm: NonNegative = 1.0
    """Clip the gradient to this norm; 0 turns it off."""
    shuffle: bool = True
    """Draw a new order of the rows for each epoch."""
    packing: bool | None = None
    """Lay several examples into one sequence, none of which sees another. Default: for `pt`."""
    neftune_alpha: PositiveFloat | None = None
    """Noise on the input embeddings (NEFTune)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the arithmetic; `auto` follows the dtype in which the model is held."""
    log_every: PositiveInt = 10
    """Steps between lines of `trainer_log.jsonl`."""
    processes: PositiveInt = 1
    """Processes on this machine, each with its own batches; they share one gradient."""
    dataloader_workers: Whole = 0
    """Processes that put batches together."""
    deepspeed: str | None = None
    """A DeepSpeed configuration (JSON), handed through to transformers."""
    fsdp: str | None = None
    """Options for FSDP, such as `full_shard auto_wrap`, handed through to transformers."""
    fsdp_config: str | None = None
    """A file with more settings for FSDP (JSON)."""

    @model_validator(mode="after")
    def _one_length(self) -> OptimisationConfig:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("give either epochs or max_steps, not both")
        return self


class ObjectiveConfig(Section):
    """Settings of the stage's own objective."""

    beta: PositiveFloat | None = None
    """How close the model is held to where it began (DPO, KTO, GRPO), or the weight of the odds
    ratio (ORPO) or the scale of the reward (SimPO). Default: 0.1; SimPO 2, GRPO none."""
    loss: str = "sigmoid"
    """For `dpo`: `sigmoid`, `hinge`, `ipo`, or another of TRL's loss types."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """For `dpo` and `simpo`: share of pairs that are taken to be the wrong way round."""
    sft_weight: NonNegative = 0.0
    """For `dpo`: adds the loss of the better answers with this weight."""
    simpo_gamma: NonNegative = 0.5
    """For `simpo`: the margin that is aimed at."""
    desirable_weight: PositiveFloat = 1.0
    """For `kto`: weight of wanted answers."""
    undesirable_weight: PositiveFloat = 1.0
    """For `kto`: weight of unwanted answers."""
    rewards: list[str] = Field(default_factory=lambda: ["exact"], min_length=1)
    """For `grpo`: `exact`, `final_number`, `short` or `FILE.py:FUNCTION`; they are added up."""
    num_generations: Annotated[int, Field(ge=2)] = 4
    """For `grpo`: answers to each prompt; must divide the batch."""
    max_new_tokens: PositiveInt = 64
    """For `grpo`: longest answer."""
    temperature: PositiveFloat = 1.0
    """For `grpo`: of the drawn answers."""


class MeasuringConfig(Section):
    """What is measured, and when."""

    every: Whole | Literal["epoch"] = "epoch"
    """Evaluate after each epoch or every so many steps; 0 means only at the end."""
    metrics: list[str] | Literal["auto"] = "auto"
    """See `fedllm list metrics`; `auto` takes those that fit the task."""
    max_rows: PositiveInt | None = None
    """Evaluate on at most this many test rows (drawn from the seed) until the end."""
    max_new_tokens: PositiveInt = 64
    """Longest generated answer."""
    batch_size: PositiveInt = 64
    """Prompts generated for at once."""
    early_stopping_patience: PositiveInt | None = None
    """End training after so many evaluations in a row without a better main metric."""
    best_model: bool = False
    """Keep the weights of the best evaluation instead of the last ones."""


class SavingConfig(Section):
    """What is saved while training goes on."""

    every: Whole | Literal["epoch"] = "epoch"
    """Save after each epoch or every so many steps; 0 means never."""
    keep: PositiveInt = 2
    """How many checkpoints are kept."""


class CentralConfig(Section):
    """A whole central run; `stage` tells it from a federated one."""

    name: str = Field(default="central", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the run inside `output_dir`."""
    output_dir: Path = Path("runs")
    """Where run directories go."""
    seed: Whole = 0
    """Root of every random stream."""
    stage: Stage
    """`sft` (answers), `pt` (plain texts), `dpo`, `orpo`, `simpo` and `rm` (pairs of answers),
    `kto` (rated answers), `grpo` (rewards)."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    adapter: TuningConfig = Field(default_factory=TuningConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: OptimisationConfig = Field(default_factory=OptimisationConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    evaluation: MeasuringConfig = Field(default_factory=MeasuringConfig)
    checkpoint: SavingConfig = Field(default_factory=SavingConfig)
    tracking: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where the course of training is shown besides the run directory: `tensorboard` and `wandb`
    need `fedllm[track]`, `trackio` is installed by itself."""

    @field_validator("stage", mode="before")
    @classmethod
    def _lower(cls, stage: Any) -> Any:
        return stage.lower() if isinstance(stage, str) else stage

    @property
    def run_dir(self) -> Path:
        """The folder this run writes to."""
        return self.output_dir / self.name

    @property
    def is_packed(self) -> bool:
        """Whether several examples share a sequence."""
        return self.training.packing if self.training.packing is not None else self.stage == "pt"


def is_central(tree: Mapping[str, Any]) -> bool:
    """Tell whether a raw tree configures a central run."""
    return "stage" in tree
