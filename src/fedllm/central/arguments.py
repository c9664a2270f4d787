"""What TRL's trainers are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedllm.central.tuning import Tuned
from fedllm.config import CentralConfig
from fedllm.config.central import ObjectiveConfig, OptimisationConfig
from fedllm.errors import ConfigError, unknown
from fedllm.seeding import derive

_OPTIMIZERS = {"adamw": "adamw_torch"}
_BETAS = {"simpo": 2.0, "grpo": 0.0}
_NO_LIMIT_S = 10 * 365 * 24 * 3600
_LARGEST_SEED = 2**32


def arguments(config: CentralConfig, tuned: Tuned, folder: Path) -> dict[str, Any]:
    """Return the keyword arguments of a trainer's settings.

    Args:
        config: The checked configuration.
        tuned: The model.
        folder: Where checkpoints go.
    """
    training = config.training
    device = tuned.loaded.model.device.type
    half = tuned.half
    return {
        "output_dir": str(folder),
        "gradient_checkpointing": training.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": half is torch.bfloat16,
        "fp16": half is torch.float16,
        "use_cpu": device == "cpu",
        "seed": derive(config.seed, "training") % _LARGEST_SEED,
        "data_seed": derive(config.seed, "order") % _LARGEST_SEED,
        "logging_steps": training.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [] if config.tracking == "none" else [config.tracking],
        "run_name": config.name,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_num_workers": training.dataloader_workers,
        "dataloader_pin_memory": device == "cuda",
        "ddp_timeout": _NO_LIMIT_S,
        "ddp_find_unused_parameters": False,
        "deepspeed": training.deepspeed,
        "fsdp": training.fsdp or "",
        "fsdp_config": training.fsdp_config,
        **_of_steps(training),
        **_of_order(config),
        **_of_stage(config),
    }


def _of_steps(training: OptimisationConfig) -> dict[str, Any]:
    """Return what decides the steps of the optimiser."""
    return {
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "num_train_epochs": training.epochs or 1.0,
        "max_steps": training.max_steps or -1,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.scheduler,
        "warmup_steps": training.warmup,
        "optim": _OPTIMIZERS.get(training.optimizer, training.optimizer),
        "weight_decay": training.weight_decay,
        "adam_beta1": training.betas[0],
        "adam_beta2": training.betas[1],
        "adam_epsilon": training.epsilon,
        "max_grad_norm": training.max_grad_norm,
        "neftune_noise_alpha": training.neftune_alpha,
    }


def _of_order(config: CentralConfig) -> dict[str, Any]:
    """Return what decides the order of rows; GRPO has a sampler of its own."""
    if config.stage == "grpo":
        return {"shuffle_dataset": config.training.shuffle}
    is_drawn = config.training.shuffle and config.stage != "kto"
    return {"train_sampling_strategy": "random" if is_drawn else "sequential"}


def _of_stage(config: CentralConfig) -> dict[str, Any]:
    """Return the settings of a stage's own objective."""
    objective, stage = config.objective, config.stage
    given = _BETAS.get(stage, 0.1) if objective.beta is None else objective.beta
    # rows have their length already; two of TRL's trainers know no "any"
    longest = config.data.max_length if stage in ("orpo", "simpo") else None
    common = {"beta": given, "max_length": longest}
    match stage:
        case "sft" | "pt":
            settings = {"skip_prepare_dataset": True}
            return {"dataset_kwargs": settings, "max_length": None}
        case "dpo":
            return {**common, **_of_pairs(objective)}
        case "kto":
            return {
                **common,
                "desirable_weight": objective.desirable_weight,
                "undesirable_weight": objective.undesirable_weight,
            }
        case "rm":
            return {"max_length": None}
        case "orpo":
            return common
        case "simpo":
            return {
                **common,
                "loss_type": "simpo",
                "simpo_gamma": objective.simpo_gamma,
                "cpo_alpha": 0.0,
                "label_smoothing": objective.label_smoothing,
            }
        case "grpo":
            return _of_rewards(objective, given)


def _of_pairs(objective: ObjectiveConfig) -> dict[str, Any]:
    """Return the losses of DPO with their weights."""
    is_mixed = bool(objective.sft_weight)
    return {
        "loss_type": [objective.loss, *(["sft"] if is_mixed else [])],
        "loss_weights": [1.0, *([objective.sft_weight] if is_mixed else [])],
        "label_smoothing": objective.label_smoothing,
    }


def _of_rewards(objective: ObjectiveConfig, beta: float) -> dict[str, Any]:
    """Return how GRPO draws answers."""
    return {
        "beta": beta,
        "num_generations": objective.num_generations,
        "max_completion_length": objective.max_new_tokens,
        "temperature": objective.temperature,
    }


def check_names(config: CentralConfig) -> None:
    """Refuse optimisers and schedulers that transformers does not have.

    Raises:
        ConfigError: If a name is unknown.
    """
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    training = config.training
    wrong = []
    optimizers = {"adamw", *(name.value for name in OptimizerNames)}
    if training.optimizer not in optimizers:
        wrong.append(f"training.optimizer: {unknown('optimizer', training.optimizer, optimizers)}")
    schedulers = {name.value for name in SchedulerType}
    if training.scheduler not in schedulers:
        wrong.append(f"training.scheduler: {unknown('scheduler', training.scheduler, schedulers)}")
    if wrong:
        raise ConfigError(wrong)
