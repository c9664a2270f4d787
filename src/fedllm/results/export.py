"""What leaves a run: a new folder, and a model with the training merged into its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.adapters import Adapter, BaseDelta
from fedllm.adapters.peft_format import folded
from fedllm.errors import ModelError, RunError
from fedllm.results.storage import atomic_folder, explained

if TYPE_CHECKING:
    from torch import Tensor, nn


def write_model(model: Any, tokenizer: Any, folder: Path, *, max_shard_size: str = "5GB") -> None:
    """Write a model as safetensors of at most some size each, with its tokenizer and template.

    Args:
        model: A transformers model with everything merged into its weights.
        tokenizer: Its chat template is written with it.
        folder: Where to, such as `new_folder` gives.
        max_shard_size: Like `5GB` or `200MB`.
    """
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)


def merge_into(model: Any, adapter: Adapter, base: BaseDelta | None = None) -> None:
    """Add adapter and base delta to a model's weights, in fp32, and put the trained head in.

    Args:
        model: A freshly loaded transformers model. Each touched weight is replaced by a new one
            of the same dtype; one that was tied to another no longer is.
        adapter: Both factors of every module, and the tensors of a trained head, if any.
        base: What was merged into the base weights during training.

    Raises:
        ModelError: If the model is quantised, or not the one the adapter belongs to.
    """
    whole = folded(adapter, base or BaseDelta())
    for module in whole.modules:
        _add(model, module, whole.product(module).dense().float())
    parameters = dict(model.named_parameters())
    for name in adapter.heads:
        if name not in parameters:
            raise ModelError(_stranger(model, name))
        _check_shape(name, parameters[name], adapter[name])
        parameters[name].data.copy_(adapter[name])


def _add(model: Any, module: str, change: Tensor) -> None:
    """Add an (out, in) matrix to the weight of a linear layer."""
    import torch
    from transformers.pytorch_utils import Conv1D

    layer = _layer(model, module)
    weight = layer.weight
    # GPT-2's Conv1D keeps its weight as (in, out)
    change = change.T if isinstance(layer, Conv1D) else change
    _check_shape(module, weight, change)
    if layer is model.get_output_embeddings() and weight is model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False
    merged = (weight.detach().float() + change.to(weight.device)).to(weight.dtype)
    layer.weight = torch.nn.Parameter(merged, requires_grad=weight.requires_grad)


def _layer(model: Any, module: str) -> nn.Linear:
    """Return a linear layer whose weight can be added to."""
    try:
        layer: nn.Linear = model.get_submodule(module)
    except AttributeError:
        raise ModelError(_stranger(model, module)) from None
    if not layer.weight.is_floating_point():
        raise ModelError(
            f"{module} is quantised, and a quantised weight cannot be added to. Load the model"
            " with model.quantization=none to merge, or export the adapter instead"
        )
    return layer


def _check_shape(name: str, weight: Tensor, change: Tensor) -> None:
    if weight.shape != change.shape:
        raise ModelError(
            f"{name} has shape {tuple(weight.shape)} in the model but {tuple(change.shape)} in the"
            " adapter. Give the base model that the run's config.yaml names"
        )


def _stranger(model: Any, name: str) -> str:
    return (
        f"{type(model).__name__} has no '{name}', which the adapter was trained on. Give the base"
        " model that the run's config.yaml names"
    )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder`, whole, when the block ends.

    Raises:
        RunError: If the folder exists or cannot be written.
    """
    if folder.exists():
        raise RunError(f"{folder} exists and is not overwritten; choose another folder")
    with explained(folder, "The run itself is untouched."), atomic_folder(folder) as temporary:
        yield temporary
