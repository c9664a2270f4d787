"""How large a model and its adapters are, without loading a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from fedllm.config import ModelConfig
from fedllm.models.architecture import position_limit, read_architecture, skeleton
from fedllm.models.hardware import resolve_device, resolve_dtype
from fedllm.models.sources import locate
from fedllm.models.targets import Kind, head_tensors, linear_shape, output_embedding, target_modules

_QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""Bytes of a parameter of a quantised layer; 4 bits go with a float32 scale for each 64."""


@dataclass(frozen=True)
class SizeEstimate:
    """Sizes of a model and of what one client trains, for `fedllm check`."""

    architecture: str
    """The class transformers builds."""
    parameters: int
    """Number of base parameters, tied ones once, without a classification head."""
    base_bytes: int
    """Memory of all weights as held (dtype and quantisation), without activations."""
    target_names: tuple[str, ...]
    """Modules that get an adapter."""
    adapter_parameters: int
    """Number of LoRA parameters of one client."""
    head_parameters: int
    """Number of parameters of the classification head."""
    position_limit: int | None
    """Longest sequence in tokens, None without a hard limit."""


def estimate_size(
    config: ModelConfig,
    *,
    kind: Kind,
    num_labels: int = 0,
    targets: str | Sequence[str] = "auto",
    rank: int = 8,
) -> SizeEstimate:
    """Work out sizes from `config.json` alone (for a hub id, only small files are fetched).

    Args:
        config: The model, with its dtype, device and quantisation.
        kind: What the model will do.
        num_labels: Number of classes; 0 takes what the model's own config says.
        targets: As for `target_modules`.
        rank: LoRA rank r of the client.

    Raises:
        ModelError: If the model, its architecture or a target is wrong.
    """
    folder = locate(config, weights=False)
    model = skeleton(read_architecture(folder, config, kind, num_labels), config, kind)
    dtype = resolve_dtype(config.dtype, resolve_device(config.device))
    head = set(head_tensors(model, kind))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    names = target_modules(model, targets)
    return SizeEstimate(
        architecture=type(model).__name__,
        parameters=sum(size for name, size in sizes.items() if name not in head),
        base_bytes=_base_bytes(model, dtype, config.quantization, kind),
        target_names=names,
        adapter_parameters=adapter_parameters(model, names, rank),
        head_parameters=sum(sizes[name] for name in head),
        position_limit=position_limit(model),
    )


def adapter_parameters(model: PreTrainedModel, names: Sequence[str], rank: int) -> int:
    """Count the LoRA parameters r (in + out) over the named linear layers."""
    shapes = [linear_shape(model.get_submodule(name)) for name in names]
    return sum(rank * sum(shape) for shape in shapes if shape is not None)


def _base_bytes(model: PreTrainedModel, dtype: torch.dtype, quantization: str, kind: Kind) -> int:
    """Add up the bytes of all parameters; quantisation shrinks the weights of linear layers."""
    kept = {*head_tensors(model, kind)}
    output = output_embedding(model)
    total = 0.0
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            shrinks = linear_shape(module) is not None and own == "weight"
            shrinks = shrinks and name != output and f"{name}.{own}" not in kept
            per_item = _QUANTIZED_BYTES.get(quantization) if shrinks else None
            total += parameter.numel() * (per_item or dtype.itemsize)
    return int(total)
