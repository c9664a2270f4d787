"""A model's `config.json`, checked against what the model is wanted for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from fedllm.config import ModelConfig
from fedllm.errors import ModelError
from fedllm.models.quiet import quiet
from fedllm.models.sources import reported
from fedllm.models.targets import Kind

AUTO_CLASSES: dict[Kind, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
}
_KNOWN_CONFIGS: dict[Kind, Any] = {
    "causal-lm": MODEL_FOR_CAUSAL_LM_MAPPING,
    "sequence-classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}


def resolve_kind(config: ModelConfig, task: str) -> Kind:
    """Return the configured kind; `auto` follows the data's task."""
    if config.kind != "auto":
        return config.kind
    return "sequence-classification" if task == "classification" else "causal-lm"


def read_architecture(
    folder: Path,
    config: ModelConfig,
    kind: Kind,
    num_labels: int = 0,
    label_names: Sequence[str] = (),
) -> PreTrainedConfig:
    """Read `config.json` and set the labels of a classifier in it (the file is not modified).

    Args:
        folder: A folder that `locate` found.
        config: Where the folder came from, and whether its Python code may run.
        kind: What the model will do.
        num_labels: Number of classes; 0 takes the number of names, else what the file says.
        label_names: Name of each class, in the order of the class ids.

    Raises:
        ModelError: If the file is damaged, transformers does not know the architecture, or it
            cannot do what `kind` asks.
    """
    remedy = (
        "Check the file, try a newer transformers, or, if the model comes with Python code that"
        " you have read, set model.trust_remote_code."
    )
    with quiet(), reported(f"read config.json of '{config.path}'", remedy):
        found: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
    _check_kind(found, kind, config)
    if kind == "sequence-classification":
        names = list(label_names) or _default_names(found, num_labels)
        found.id2label = dict(enumerate(names))
        found.label2id = {name: index for index, name in enumerate(names)}
        found.problem_type = (
            # one label is a score: transformers refuses to call that a choice
            "single_label_classification" if len(names) > 1 else "regression"
        )
    return found


def skeleton(architecture: PreTrainedConfig, config: ModelConfig, kind: Kind) -> PreTrainedModel:
    """Build the model without memory for its weights: every tensor is on the meta device.

    Raises:
        ModelError: If the values in `config.json` do not make a model.
    """
    remedy = "Its config.json may be damaged; fetch the model again."
    doing = f"build the {architecture.model_type} model of '{config.path}'"
    with quiet(), reported(doing, remedy), torch.device("meta"):
        model: PreTrainedModel = AUTO_CLASSES[kind].from_config(
            architecture, trust_remote_code=config.trust_remote_code
        )
    return model


def position_limit(model: PreTrainedModel) -> int | None:
    """Return the longest sequence (tokens) of a model with learned positions, else None.

    Longer input makes such a model fail. Models with rotary positions have no hard limit.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(
            ("position_embeddings", "wpe", "embed_positions")
        ):
            # RoBERTa numbers positions from padding_idx + 1, OPT from its `offset`
            start = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - int(getattr(module, "offset", start))
    return None


def _check_kind(found: PreTrainedConfig, kind: Kind, config: ModelConfig) -> None:
    """Raise a `ModelError` when a model of this architecture cannot be of this kind."""
    family = f"'{config.path}' is a {found.model_type} model"
    brings_code = AUTO_CLASSES[kind].__name__ in getattr(found, "auto_map", {})
    if type(found) not in _KNOWN_CONFIGS[kind] and not brings_code:
        raise ModelError(
            f"{family}, which transformers cannot build for {kind}. Choose another model, or"
            " another model.kind."
        )
    if kind == "causal-lm" and found.is_encoder_decoder:
        raise ModelError(f"{family}, an encoder-decoder. Choose a decoder-only model instead.")
    is_encoder = type(found) in MODEL_FOR_MASKED_LM_MAPPING
    if kind == "causal-lm" and is_encoder and not getattr(found, "is_decoder", False):
        raise ModelError(
            f"{family}, an encoder: it reads text but cannot write any. Use it with"
            " model.kind=sequence-classification and data.task=classification, or choose a causal"
            " language model."
        )


def _default_names(found: PreTrainedConfig, num_labels: int) -> list[str]:
    """Keep the file's own names when there are as many as labels, else number them."""
    own = [name for _, name in sorted((found.id2label or {}).items())]
    if num_labels in (0, len(own)):
        return own
    return [f"LABEL_{index}" for index in range(num_labels)]
