"""How large a model is and how much of it a central run trains, from `config.json` alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedllm.central.tuning import stage_kind
from fedllm.config import CentralConfig
from fedllm.models import Kind, adapter_parameters, estimate_size, position_limit, target_modules
from fedllm.models.architecture import read_architecture, skeleton
from fedllm.models.sources import locate
from fedllm.models.targets import head_tensors


@dataclass(frozen=True)
class Sizes:
    """What is known without a weight."""

    architecture: str
    parameters: int
    base_bytes: int
    trained: int
    layers: int
    hidden: int
    vocabulary: int
    position_limit: int | None


def sizes_of(config: CentralConfig) -> Sizes:
    """Work sizes out.

    Raises:
        ModelError: If the model, its architecture or a target is wrong.
    """
    kind: Kind = stage_kind(config.stage)
    labels = 1 if config.stage == "rm" else 0
    size = estimate_size(
        config.model,
        kind=kind,
        num_labels=labels,
        targets=config.adapter.targets,
        rank=config.adapter.rank,
    )
    folder = locate(config.model, weights=False)
    model = skeleton(read_architecture(folder, config.model, kind, labels), config.model, kind)
    text = model.config.get_text_config()
    return Sizes(
        architecture=size.architecture,
        parameters=size.parameters,
        base_bytes=size.base_bytes,
        trained=_trained(config, model, kind),
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        vocabulary=int(text.vocab_size),
        position_limit=position_limit(model),
    )


def _trained(config: CentralConfig, model: Any, kind: Kind) -> int:
    """Count what is trained."""
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    heads = sum(counts[name] for name in head_tensors(model, kind))
    adapter = config.adapter
    match adapter.method:
        case "full":
            return sum(counts.values())
        case "freeze":
            from fedllm.central.tuning import chosen_layers

            parts = chosen_layers(model, kind, adapter.freeze_layers)
            return sum(p.numel() for _, part in parts for p in part.parameters())
        case "lora":
            names = target_modules(model, adapter.targets)
            count = adapter_parameters(model, names, adapter.rank)
            if adapter.dora:
                count += sum(model.get_submodule(name).weight.shape[0] for name in names)
            return int(count + heads)
