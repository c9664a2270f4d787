"""What is wrong with weights that can be seen only once they are loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedllm.errors import ModelError
from fedllm.models.sources import stored_weights
from fedllm.models.targets import Kind
from fedllm.weights import few


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor is free of NaN and infinities; whole numbers always are.

    A sum is NaN or infinite if a term is, and costs about 0.1 s a gigabyte on one core, a
    twentieth of looking at each value. Only where it is not finite (fp16 may overflow) are the
    values looked at.
    """
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def refuse_nonfinite(model: PreTrainedModel, folder: Path) -> None:
    """Refuse weights that are not numbers.

    Raises:
        ModelError: If one is NaN or infinite.
    """
    for name, tensor in model.named_parameters():
        if not is_finite(tensor.detach()):
            found = stored_weights(folder).get(name)
            count = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{found.file if found else folder}: the tensor '{name}' has {count} values that"
                " are NaN or infinite, so the model cannot be used. Fetch it again; if you trained"
                " it, go back to a checkpoint before its loss went wrong."
            )


def refuse_unexpected(
    model: PreTrainedModel, kind: Kind, names: Iterable[str], source: str
) -> None:
    """Refuse weights that the model has no place for, and that would be left out in silence.

    A classifier made from a checkpoint of another kind leaves that one's own head out, rightly.

    Raises:
        ModelError: If there are such.
    """
    inside = model.base_model_prefix + "."
    left = sorted(n for n in names if kind == "causal-lm" or n.startswith(inside))
    if left:
        raise ModelError(
            f"'{source}' has {len(left)} tensors that a {type(model).__name__} with its config.json"
            f" has no place for ({few(left)}). Check config.json (is a layer count too small?), or"
            " fetch the model again."
        )


def told(model: PreTrainedModel, folder: Path, name: str) -> str:
    """Say of a tensor that does not fit whether it is missing, or which shape it has and needs."""
    found, wanted = stored_weights(folder).get(name), tuple(model.state_dict()[name].shape)
    if found is None:
        return f"{name} is missing"
    return f"{name} in {found.file.name} has {found.shape}, not {wanted}"
