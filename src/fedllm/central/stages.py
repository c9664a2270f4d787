"""The stages of central fine-tuning, and which settings go with each. No torch here."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedllm.config import CentralConfig
from fedllm.errors import DataError, FedLLMError, MissingExtraError, unknown
from fedllm.evaluation import METRICS

Shape = Literal["answers", "texts", "pairs", "rated", "prompts"]


@dataclass(frozen=True)
class StageKind:
    """What a stage learns from, and which of TRL's trainers does it."""

    summary: str
    shape: Shape
    """What its rows hold."""
    module: str
    """Where TRL keeps its trainer and that trainer's settings."""
    trainer: str
    needs_reference: bool = False
    """Whether the loss compares with the model as it was."""

    @property
    def wanted(self) -> str:
        """What a row must hold, in words."""
        return _WANTED[self.shape]


STAGES: Mapping[str, StageKind] = {
    "sft": StageKind("answers, token by token", "answers", "trl.trainer.sft", "SFT"),
    "pt": StageKind("plain texts, token by token", "texts", "trl.trainer.sft", "SFT"),
    "dpo": StageKind("better over worse answers", "pairs", "trl.trainer.dpo", "DPO", True),
    "kto": StageKind("wanted and unwanted answers", "rated", "trl.trainer.kto", "KTO", True),
    "rm": StageKind("a reward for answers", "pairs", "trl.trainer.reward", "Reward"),
    "orpo": StageKind("odds of better answers", "pairs", "trl.experimental.orpo.orpo", "ORPO"),
    "simpo": StageKind("margin per token", "pairs", "trl.experimental.cpo.cpo", "CPO"),
    "grpo": StageKind("rewards of drawn answers", "prompts", "trl.trainer.grpo", "GRPO"),
}

METHODS: Mapping[str, tuple[str, str]] = {
    "lora": ("adapters of low rank beside frozen weights", "adapter.method: lora"),
    "rslora": ("LoRA scaled by alpha / sqrt(r)", "adapter.rslora: true"),
    "dora": ("LoRA that learns the length of weight columns apart", "adapter.dora: true"),
    "pissa": ("LoRA that begins as the leading singular vectors", "adapter.init: pissa"),
    "lora+": ("LoRA with a higher learning rate of B", "adapter.loraplus_ratio: 16"),
    "qlora": ("LoRA on a base packed into 4 bits", "model.quantization: 4bit"),
    "freeze": ("the weights of some layers", "adapter.method: freeze"),
    "full": ("all weights", "adapter.method: full"),
}
"""Ways to train to what they are, and the setting that asks for each."""

REWARDS = ("exact", "final_number", "short")
"""Reward functions by name; any other is `FILE.py:FUNCTION`."""
METRICS_OF_PAIRS = ("reward_accuracy", "reward_margin", "preference_loss")
"""What is measured where answers are compared; the first is the main metric."""

_WANTED: Mapping[Shape, str] = {
    "answers": "conversations with answers",
    "texts": "plain texts (data.task: text, or a column `text`)",
    "pairs": "a better and a worse answer each (columns `chosen` and `rejected`)",
    "rated": "an answer that is wanted or not (`kto_tag`, or `label: true/false`)",
    "prompts": "conversations whose last answer is the reference",
}
_TASKS: Mapping[Shape, tuple[str, ...]] = {
    "answers": ("classification", "qa", "math", "chat"),
    "texts": ("text",),
    "pairs": ("preference",),
    "rated": ("rated",),
    "prompts": ("classification", "qa", "math", "chat"),
}


def problems(config: CentralConfig) -> list[str]:
    """Return what does not go together, one sentence each."""
    return [
        *_method_problems(config),
        *_loss_problems(config),
        *_evaluation_problems(config),
        *_file_problems(config),
    ]


def check_rows(stage: str, task: str, source: str) -> None:
    """Refuse rows that a stage cannot learn from.

    Raises:
        DataError: If the task of the rows is not one of the stage's.
    """
    shape = STAGES[stage].shape
    if task in _TASKS[shape]:
        return
    fitting = [name for name, kind in STAGES.items() if task in _TASKS[kind.shape]]
    raise DataError(
        f"stage {stage} learns from {_WANTED[shape]}, but {source} holds rows of the task '{task}'."
        f" Give other data.path or data.columns, or a stage that fits: {', '.join(fitting)}"
    )


def check_installed(config: CentralConfig) -> None:
    """Refuse a run whose libraries are not there, before anything is loaded.

    Raises:
        MissingExtraError: For the first that is missing.
    """
    needed = [("trl", "train", f"stage {config.stage}"), ("accelerate", "train", "training")]
    if config.tracking in ("tensorboard", "wandb"):
        needed.append((config.tracking, "track", f"tracking: {config.tracking}"))
    for package, extra, why in needed:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, extra, why)
    if config.tracking == "trackio" and importlib.util.find_spec("trackio") is None:
        # no extra brings it: its releases want an older huggingface-hub than transformers does
        raise FedLLMError(
            "tracking: trackio needs 'trackio', which is not installed. Run: pip install trackio,"
            " or choose tensorboard or wandb"
        )
    if config.training.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise FedLLMError(
            "training.deepspeed needs 'deepspeed', which is not installed. Run: pip install"
            " deepspeed, or take the key out"
        )


def _method_problems(config: CentralConfig) -> Iterator[str]:
    adapter, stage = config.adapter, config.stage
    given = adapter.model_fields_set
    if adapter.method != "lora":
        for name in ("rslora", "dora", "loraplus_ratio"):
            if getattr(adapter, name):
                yield f"adapter.{name}: is for method lora, not {adapter.method}"
        if adapter.init != "default":
            yield f"adapter.init: {adapter.init} is for method lora, not {adapter.method}"
        if config.model.quantization != "none":
            yield (
                f"adapter.method: {adapter.method} trains weights, and those of a base in"
                f" {config.model.quantization} cannot be trained; choose lora, or"
                " model.quantization: none"
            )
    if adapter.init == "pissa":
        if config.model.quantization != "none":
            yield "adapter.init: pissa needs whole weights; set model.quantization: none"
        if adapter.dora:
            yield "adapter.dora: does not go with init: pissa; choose one"
        if STAGES[stage].needs_reference or stage == "grpo":
            yield (
                f"adapter.init: pissa moves part of the base into the adapter, so stage {stage}"
                " has no model to compare with; choose init: default"
            )
    if adapter.method == "freeze" and adapter.freeze_layers == 0:
        yield "adapter.freeze_layers: 0 layers would be trained; give a number such as 2 or -2"
    if adapter.method != "freeze" and "freeze_layers" in given and adapter.freeze_layers != 2:
        yield f"adapter.freeze_layers: is for method freeze, not {adapter.method}"
    if config.model.kind == "sequence-classification":
        yield "model.kind: a central run trains a causal LM; set it to auto or causal-lm"


def _loss_problems(config: CentralConfig) -> Iterator[str]:
    training, objective, stage = config.training, config.objective, config.stage
    if training.packing and stage not in ("sft", "pt"):
        yield f"training.packing: is for sft and pt, not {stage}"
    if stage == "kto" and training.batch_size < 2:
        yield "training.batch_size: kto compares answers within a batch; give at least 2"
    if stage == "grpo":
        whole = training.batch_size * training.gradient_accumulation * training.processes
        if whole % objective.num_generations:
            yield (
                f"objective.num_generations: {objective.num_generations} does not divide the"
                f" {whole} answers of a step (batch_size x gradient_accumulation x processes)"
            )
        for name in objective.rewards:
            if name not in REWARDS and ":" not in name:
                told = unknown("reward", name, (*REWARDS, "FILE.py:FUNCTION"))
                yield f"objective.rewards: {told}"
    if objective.sft_weight and stage != "dpo":
        yield f"objective.sft_weight: is for dpo, not {stage}"
    if config.data.streaming:
        yield from _stream_problems(config)
    if training.betas[0] == 1.0 or training.betas[1] == 1.0:
        yield "training.betas: must be below 1"


def _stream_problems(config: CentralConfig) -> Iterator[str]:
    """Say what rows that are read while training goes on do not allow."""
    if config.stage != "sft" or config.is_packed:
        yield "data.streaming: is for stage sft without packing"
    if config.training.max_steps is None:
        yield "data.streaming: the end of a stream is not known; give training.max_steps"
    if config.data.test_path is None:
        yield "data.streaming: nothing is held out of a stream; give data.test_path"
    if config.training.processes > 1 or config.training.dataloader_workers:
        yield "data.streaming: one process reads; set processes: 1 and dataloader_workers: 0"
    for name in ("evaluation", "checkpoint"):
        section = getattr(config, name)
        if section.every == "epoch" and "every" in section.model_fields_set:
            yield f"{name}.every: a stream has no epochs; give a number of steps"


def _evaluation_problems(config: CentralConfig) -> Iterator[str]:
    evaluation = config.evaluation
    if isinstance(evaluation.metrics, list):
        for name in evaluation.metrics:
            if name not in METRICS:
                yield f"evaluation.metrics: {unknown('metric', name, METRICS)}"
        if not evaluation.metrics:
            yield "evaluation.metrics: name at least one, or write auto"
    if evaluation.every == 0:
        for name in ("best_model", "early_stopping_patience"):
            if getattr(evaluation, name):
                yield f"evaluation.{name}: needs evaluations on the way; set evaluation.every"


def _file_problems(config: CentralConfig) -> Iterator[str]:
    training = config.training
    for name in ("deepspeed", "fsdp_config"):
        path = getattr(training, name)
        if path is None:
            continue
        try:
            json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            yield f"training.{name}: there is no file {path}"
        except (OSError, ValueError) as error:
            yield f"training.{name}: {path} is not JSON ({error})"
    if training.deepspeed and training.fsdp:
        yield "training.fsdp: does not go with training.deepspeed; choose one"
    if training.fsdp_config and not training.fsdp:
        yield "training.fsdp_config: needs training.fsdp, such as 'full_shard auto_wrap'"
