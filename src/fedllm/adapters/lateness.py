"""What a client changed, put onto a model that others have changed meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from fedllm.adapters.adapter import Adapter
from fedllm.adapters.lazy import LazyModule
from fedllm.adapters.names import is_on_path, name_a, name_b

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


def change_onto(sent: Adapter, start: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> Adapter:
    """Return now + (sent - start) for each tensor that was sent.

    Where `now` is of a larger rank, the change goes to its leading part and the rest stays; where
    `start` has none of a tensor, it counts as zero.
    """
    tensors = {}
    for name, tensor in sent.tensors.items():
        if name not in now:
            continue
        place = tuple(slice(length) for length in tensor.shape)
        change = tensor - start[name][place] if name in start else tensor
        result = now[name].clone()
        result[place] += change
        tensors[name] = result
    return replace(sent, tensors=tensors)


def products_onto(sent: Adapter, start: Adapter, now: Adapter) -> Adapter:
    """Return an adapter whose products are s B A of `now` + `sent` - `start`, exactly.

    Its rank is the sum of the three: [B_now, B_sent, -B_start] and [A_now; A_sent; A_start]. What
    is on no path (heads) is changed tensor by tensor.
    """
    others = sent.select(lambda name: not is_on_path(name))
    tensors = dict(change_onto(others, start.tensors, now.tensors).tensors)
    scaling = {}
    for path in sent.modules:
        scale = scaling[path] = now.scaling[path]
        a, b = name_a(path), name_b(path)
        tensors[a] = torch.cat(
            [
                now[a],
                sent[a] * (sent.scaling[path] / scale),
                start[a] * (-start.scaling[path] / scale),
            ]
        )
        tensors[b] = torch.cat([now[b], sent[b], start[b]], dim=1)
    return replace(sent, tensors=tensors, scaling={**sent.scaling, **scaling})
