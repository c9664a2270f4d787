"""Linear layers with a low-rank path for each client, on that client's stretch of the activation.

The base weight is frozen and shared by all; see `low_rank` for the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedllm.engine.low_rank import Delta, LowRank, LowRankPath
from fedllm.engine.packing import Segment
from fedllm.engine.sparse import Sparse, SparsePath
from fedllm.errors import ModelError


@dataclass
class Active:
    """What the adapter layers of a model apply now. Layers hold a reference to one of these."""

    modules: Mapping[str, LowRank] = field(default_factory=dict)
    delta: Mapping[str, Delta] = field(default_factory=dict)
    """What was merged into the base: factors (b, a), or a dense (out, in) matrix."""
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Head module to its parameters (K, ...), or (K, ...) leaves that require a gradient."""
    by_token: Sequence[Segment] = ()
    """Clients' stretches of the packed row; empty in padded layout."""
    by_sequence: Sequence[Segment] = ()
    """Clients' stretches of the batch of sequences."""
    dropout: float = 0.0
    sequence_seeds: Sequence[int] = ()
    """Seed of each sequence's dropout."""
    sequence_lengths: Sequence[int] = ()
    """Tokens of each sequence in the packed row; empty in padded layout."""
    sparse: Mapping[str, Sparse] = field(default_factory=dict)
    """Layer to the clients' sparse changes of its weight."""
    mix: Mapping[str, Tensor] = field(default_factory=dict)
    """Slot to the weight of its paths for each sequence of the pass, fp32 (N,)."""
    is_everything: bool = False
    """Whether every row of any activation is the first client's (one model, outside of passes)."""
    is_wide: bool = False
    """Whether all clients' paths form one wide product (see `LowRankPath`)."""
    anchor: Tensor | None = None
    """A scalar that requires a gradient, so that a pass over frozen inputs is differentiated."""

    def segments(self, size: int) -> Sequence[Segment]:
        """Return the clients' stretches of an activation with this many rows.

        An activation has a row a token (packed), a row a sequence (after pooling), or a fixed
        number of rows a sequence (padded).
        """
        if self.is_everything:
            return [Segment(0, 0, size)]
        if self.by_token and self.by_token[-1].end == size:
            return self.by_token
        total = self.by_sequence[-1].end
        if size % total:
            raise ModelError(
                f"an adapted layer sees {size} rows where the pass has {total} sequences, as layers"
                " inside routed experts do. Set adapter.targets to layers outside of them"
            )
        each = size // total
        return [Segment(s.row, s.start * each, s.end * each) for s in self.by_sequence]

    def column_weights(self, low_rank: LowRank | None, x: Tensor) -> Tensor | None:
        """Return how much each row of x (rows, in) weighs each column of the factors, (rows, R)."""
        if not self.mix or low_rank is None or low_rank.columns is None:
            return None
        ones = torch.ones_like(next(iter(self.mix.values())))
        by_path = torch.stack([self.mix.get(slot, ones) for slot in low_rank.paths], dim=1)
        by_sequence = by_path[:, low_rank.columns].to(x.dtype)
        lengths = self.sequence_lengths
        if sum(lengths) == len(x):
            return by_sequence.repeat_interleave(torch.tensor(lengths, device=x.device), dim=0)
        return by_sequence.repeat_interleave(len(x) // len(by_sequence), dim=0)


class Slot:
    """Holds what is active; shared by all adapter layers of a model."""

    def __init__(self) -> None:
        self.active: Active | None = None


class LoRALinear(nn.Module):
    """Wraps a frozen linear layer; adds the low-rank paths that are active.

    Args:
        base: `nn.Linear`, transformers' `Conv1D`, or a quantised linear layer.
        name: Dotted name of the layer in the model.
        slot: Where the active adapters are.
        index: Number of the layer, for its dropout stream.
    """

    def __init__(self, base: nn.Module, name: str, slot: Slot, index: int) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.slot = slot
        self.index = index

    @property
    def weight(self) -> Tensor:
        """The base weight: some models look at their layers' dtype or device."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]  # a module may hold another
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the base output plus scaling * B A dropout(x) of the client each row is of."""
        active = self.slot.active
        if active is None:
            return cast("Tensor", self.base(x))
        low_rank, delta = active.modules.get(self.name), active.delta.get(self.name)
        flat = x.reshape(-1, x.shape[-1])
        if low_rank is None and delta is None:
            return self._with_sparse(self.base(x), flat, active)
        keep = self._dropout_mask(flat, active) if active.dropout else None
        weight, bias = plain_weight(self.base)
        y: Tensor = LowRankPath.apply(  # type: ignore[no-untyped-call]  # untyped in torch
            flat,
            active.anchor,
            weight,
            bias,
            low_rank,
            delta,
            active.segments(len(flat)),
            keep,
            active.is_wide,
            active.column_weights(low_rank, flat),
        )
        y = y.view(*x.shape[:-1], y.shape[-1])
        return self._with_sparse(y if weight is not None else self.base(x) + y, flat, active)

    def _with_sparse(self, y: Tensor, flat: Tensor, active: Active) -> Tensor:
        """Add the clients' sparse changes, if the layer has some."""
        sparse = active.sparse.get(self.name)
        if sparse is None:
            return y
        path: Tensor = SparsePath.apply(  # type: ignore[no-untyped-call]  # untyped in torch
            flat, active.anchor, sparse, active.segments(len(flat))
        )
        return y + path.view_as(y)

    def _dropout_mask(self, flat: Tensor, active: Active) -> Tensor:
        """Draw each sequence's mask from its own stream, so packing does not change it."""
        lengths = active.sequence_lengths
        if not lengths:
            lengths = [len(flat) // len(active.sequence_seeds)] * len(active.sequence_seeds)
        keep = torch.empty_like(flat)
        start = 0
        for seed, length in zip(active.sequence_seeds, lengths, strict=True):
            stream = torch.Generator(flat.device).manual_seed((seed + 7919 * self.index) % 2**63)
            keep[start : start + length].bernoulli_(1 - active.dropout, generator=stream)
            start += length
        return keep.div_(1 - active.dropout)


def plain_weight(base: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return weight (out, in) and bias of a layer whose product we may compute ourselves."""
    found: Any = base
    if type(base) is nn.Linear:
        return found.weight, found.bias
    if type(base).__name__ == "Conv1D":
        return found.weight.T, found.bias
    return None, None


class ClientHead(nn.Module):
    """Wraps a classification head; each client's sequences go through that client's own weights.

    Args:
        base: The head module, any number of layers.
        name: Dotted name of the head in the model.
        slot: Where the active adapters are.
    """

    def __init__(self, base: nn.Module, name: str, slot: Slot) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.slot = slot

    def forward(self, x: Tensor) -> Tensor:
        """Return the head's output, of shape (sequences, ...)."""
        active = self.slot.active
        parameters = active.heads.get(self.name) if active is not None else None
        if active is None or not parameters:
            return cast("Tensor", self.base(x))
        outputs = []
        for row, start, end in active.segments(x.shape[0]):
            own = {name: tensor[row] for name, tensor in parameters.items()}
            outputs.append(functional_call(self.base, own, (x[start:end].to(_dtype(own)),)))
        return torch.cat(outputs)


def _dtype(parameters: Mapping[str, Tensor]) -> torch.dtype:
    return next(iter(parameters.values())).dtype
