"""A PEFT adapter put onto a model, beside its weights or into them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from fedllm.adapters.peft_check import TENSORS_FILE, check_peft, refuse_nonfinite
from fedllm.errors import ModelError
from fedllm.models import linear_shape
from fedllm.starting import import_peft
from fedllm.weights import few, read_header


def with_adapter(model: Any, folder: Path) -> Any:
    """Return a PEFT model that applies an adapter beside the weights.

    Args:
        model: The freshly loaded base; wrapped in place.
        folder: An adapter in PEFT's layout, of any origin.

    Raises:
        ModelError: If the adapter is damaged or belongs to another model.
    """
    import_peft()
    from peft import PeftModel
    from safetensors.torch import load_file

    _, shapes = check_peft(folder)
    _check_fit(model, shapes, folder)
    tensors = load_file(folder / TENSORS_FILE)
    refuse_nonfinite(folder / TENSORS_FILE, tensors)
    _untie(model, list(shapes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT tells of what is checked here
        try:
            wrapped = PeftModel.from_pretrained(model, str(folder)).eval()
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            told = " ".join(str(error).split())
            raise ModelError(
                f"PEFT cannot put {folder} onto {type(model).__name__}: {told}. Give the"
                " base model that the adapter was trained on"
            ) from error
    _check_complete(wrapped, folder)
    return wrapped


def merge_adapter(model: Any, folder: Path) -> Any:
    """Return the model with an adapter added to its weights; see `with_adapter`."""
    wrapped = with_adapter(model, folder)
    return wrapped.merge_and_unload()


def targeted(folder: Path) -> tuple[str, ...]:
    """Return the layers that an adapter changes.

    Raises:
        ModelError: If it is damaged.
    """
    return tuple(check_peft(folder)[1])


def num_labels_of(folder: Path) -> int:
    """Return how many classes the trained head of an adapter tells apart; 0 without one.

    Raises:
        ModelError: If its file is damaged.
    """
    for name, stored in read_header(folder / TENSORS_FILE).items():
        if name.endswith(("score.weight", "classifier.weight", "out_proj.weight")):
            return stored.shape[0]
    return 0


def _check_fit(model: Any, shapes: dict[str, tuple[int, int]], folder: Path) -> None:
    for module, (out, width) in shapes.items():
        try:
            size = linear_shape(model.get_submodule(module))
        except AttributeError:
            raise ModelError(
                f"{type(model).__name__} has no '{module}', which the adapter in {folder} was"
                " trained on. Give the base model that it was trained on"
            ) from None
        if size != (width, out):
            raise ModelError(
                f"{folder}: the adapter of '{module}' is for a weight of shape {(out, width)}, and"
                f" the model's is {size and size[::-1]}. Give the base model that the adapter was"
                " trained on"
            )


def _untie(model: Any, modules: list[str]) -> None:
    """Give an adapted output layer a weight of its own: the input embedding must stay."""
    import torch

    output = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    if tied and any(model.get_submodule(module) is output for module in modules):
        output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _check_complete(wrapped: Any, folder: Path) -> None:
    """Refuse an adapter that PEFT would have completed with fresh tensors, or read only in part."""
    from peft import get_peft_model_state_dict

    stored = set(read_header(folder / TENSORS_FILE))
    loaded = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    absent, left = sorted(loaded - stored), sorted(stored - loaded)
    left = [name for name in left if "embed" not in name and "lm_head" not in name]
    if absent or left:
        what = f"lacks {few(absent)}" if absent else f"has {few(left)}, which has no place"
        raise ModelError(
            f"{folder / TENSORS_FILE} {what} in this model with this adapter_config.json. Export or"
            " fetch the adapter again"
        )
