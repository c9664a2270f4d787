"""An adapter of any kind on an ordinary transformers model, outside of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedllm.adapters import Adapter
from fedllm.adapters.reading import load_adapter
from fedllm.engine.assembly import Sources, assembled
from fedllm.engine.buffers import Buffer, head_tensors
from fedllm.engine.lora import Active, ClientHead, LoRALinear, Slot
from fedllm.engine.resident import replace_module
from fedllm.errors import ModelError
from fedllm.models import linear_shape


def attach(model: Any, adapter: Adapter | str | Path) -> Any:
    """Put an exported adapter onto a model; its forward and `generate` then use it.

    >>> import fedllm
    >>> model = AutoModelForCausalLM.from_pretrained(base)        # doctest: +SKIP
    >>> fedllm.attach(model, "runs/demo/checkpoints/10/clients/3/adapter")  # doctest: +SKIP

    Args:
        model: A transformers model that the adapter belongs to; changed in place.
        adapter: The adapter, or a folder in fedllm's own layout or in PEFT's, of any
            writer.

    Returns:
        The same model.

    Raises:
        ModelError: If the folder holds no adapter, or the model lacks one of its layers.
    """
    adapter = adapter if isinstance(adapter, Adapter) else load_adapter(Path(adapter))
    slot, shapes = Slot(), {}
    for index, layer in enumerate(adapter.layers):
        base = _submodule(model, layer)
        size = linear_shape(base)
        if size is None:
            raise ModelError(f"{layer} of {type(model).__name__} is no linear layer")
        shapes[layer] = (size[1], size[0])
        replace_module(model, layer, LoRALinear(base, layer, slot, index))
    heads = sorted({name.rpartition(".")[0] for name in adapter.heads})
    for head in heads:
        replace_module(model, head, ClientHead(_submodule(model, head), head, slot))
    buffer = Buffer([adapter], lambda name: True, model.device)
    layers = assembled(Sources([adapter], [(buffer, buffer.data.to(model.dtype))]), shapes)
    slot.active = Active(
        modules=layers.low_ranks,
        sparse=layers.sparse,
        heads=head_tensors(heads, [(buffer, buffer.data)]),
        is_everything=True,
    )
    return model


def _submodule(model: Any, name: str) -> torch.nn.Module:
    try:
        found: torch.nn.Module = model.get_submodule(name)
    except AttributeError:
        raise ModelError(
            f"{type(model).__name__} has no '{name}', which the adapter was trained on. Give the"
            " base model that the adapter names"
        ) from None
    return found
