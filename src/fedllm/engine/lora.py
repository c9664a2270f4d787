"""Linear layers with a low-rank path for each client, on that client's stretch of the activation.

The forward pass saves the input and the rank-r activation; the backward pass writes the factors'
gradients straight into the cohort's flat buffers. The base weight is frozen and shared by all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedllm.engine.packing import Segment


@dataclass
class LowRank:
    """The factors of one module for all clients of a cohort, and where their gradients go."""

    a: Tensor
    """(K, R, in), in the compute dtype."""
    b: Tensor
    """(K, out, R)."""
    scaling: Sequence[float]
    """alpha / r of each client."""
    grad_a: Tensor | None = None
    """(K, R, in) fp32; None if A is frozen or nothing is trained."""
    grad_b: Tensor | None = None


@dataclass
class Active:
    """What the adapter layers of a model apply now. Layers hold a reference to one of these."""

    modules: Mapping[str, LowRank] = field(default_factory=dict)
    delta: Mapping[str, tuple[Tensor, Tensor] | Tensor] = field(default_factory=dict)
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
    anchor: Tensor | None = None
    """A scalar that requires a gradient, so that a pass over frozen inputs is differentiated."""

    def segments(self, size: int) -> Sequence[Segment]:
        """Return the clients' stretches of an activation with this many rows.

        An activation has a row a token (packed), a row a sequence (after pooling), or a fixed
        number of rows a sequence (padded).
        """
        if self.by_token and self.by_token[-1].end == size:
            return self.by_token
        total = self.by_sequence[-1].end
        if size % total:
            raise NotImplementedError(
                f"a layer sees {size} rows where the pass has {total} sequences"
            )
        each = size // total
        return [Segment(s.row, s.start * each, s.end * each) for s in self.by_sequence]


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
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the base output plus scaling * B A dropout(x) of the client each row is of."""
        active = self.slot.active
        if active is None:
            return self.base(x)  # type: ignore[no-any-return]
        low_rank, delta = active.modules.get(self.name), active.delta.get(self.name)
        if low_rank is None and delta is None:
            return self.base(x)  # type: ignore[no-any-return]
        flat = x.reshape(-1, x.shape[-1])
        keep = self._dropout_mask(flat, active) if active.dropout else None
        weight, bias = _plain_weight(self.base)
        y: Tensor = _LowRankPath.apply(  # type: ignore[no-untyped-call]
            flat, active.anchor, weight, bias, low_rank, delta, active.segments(len(flat)), keep
        )
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if weight is not None else self.base(x) + y

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


def _plain_weight(base: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return weight (out, in) and bias of a layer whose product we may compute ourselves."""
    found: Any = base
    if type(base) is nn.Linear:
        return found.weight, found.bias
    if type(base).__name__ == "Conv1D":
        return found.weight.T, found.bias
    return None, None


class _LowRankPath(torch.autograd.Function):
    """y = x W^T + bias + x delta^T + scaling (x * keep) A^T B^T, a segment a client."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        low_rank: LowRank | None,
        delta: tuple[Tensor, Tensor] | Tensor | None,
        segments: Sequence[Segment],
        keep: Tensor | None,
    ) -> Tensor:
        """Compute in place on the base layer's output."""
        if weight is not None:
            y = F.linear(x, weight, bias)
        else:
            out = low_rank.b.shape[1] if low_rank is not None else _rows(delta)
            y = x.new_zeros(x.shape[0], out)
        if delta is not None:
            _add_delta(y, x, delta)
        hidden: list[Tensor] = []
        if low_rank is not None:
            dropped = x if keep is None else x * keep
            for row, start, end in segments:
                h = dropped[start:end] @ low_rank.a[row].T
                y[start:end].addmm_(h, low_rank.b[row].T, alpha=low_rank.scaling[row])
                hidden.append(h)
        trains = low_rank is not None and (low_rank.grad_a is not None)
        ctx.save_for_backward(x if trains else None, keep, weight, *hidden)
        ctx.parts = low_rank, delta, segments
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the input's gradient; add the factors' to their buffers."""
        low_rank, delta, segments = ctx.parts
        x, keep, weight, *hidden = ctx.saved_tensors
        dy = grads[0]
        dx = None
        if ctx.needs_input_grad[0]:
            inner = weight.shape[1] if weight is not None else _columns(low_rank, delta)
            dx = dy @ weight if weight is not None else dy.new_zeros(len(dy), inner)
            if delta is not None:
                _add_delta_grad(dx, dy, delta)
        if low_rank is None:
            return dx, *(None,) * 7
        for h, (row, start, end) in zip(hidden, segments, strict=True):
            d = dy[start:end]
            s = low_rank.scaling[row]
            if low_rank.grad_b is not None:
                low_rank.grad_b[row].add_(d.T @ h, alpha=s)
            if low_rank.grad_a is None and dx is None:
                continue
            g = d @ low_rank.b[row]
            if low_rank.grad_a is not None:
                seen = x[start:end] if keep is None else x[start:end] * keep[start:end]
                low_rank.grad_a[row].add_(g.T @ seen, alpha=s)
            if dx is None:
                continue
            if keep is None:
                dx[start:end].addmm_(g, low_rank.a[row], alpha=s)
            else:
                dx[start:end].addcmul_(g @ low_rank.a[row], keep[start:end], value=s)
        return dx, *(None,) * 7


def _rows(delta: tuple[Tensor, Tensor] | Tensor | None) -> int:
    assert delta is not None
    return delta.shape[0] if isinstance(delta, Tensor) else delta[0].shape[0]


def _columns(low_rank: LowRank | None, delta: tuple[Tensor, Tensor] | Tensor | None) -> int:
    if low_rank is not None:
        return low_rank.a.shape[2]
    assert delta is not None
    return delta.shape[1] if isinstance(delta, Tensor) else delta[1].shape[1]


def _add_delta(y: Tensor, x: Tensor, delta: tuple[Tensor, Tensor] | Tensor) -> None:
    if isinstance(delta, Tensor):
        y.addmm_(x, delta.T)
    else:
        y.addmm_(x @ delta[1].T, delta[0].T)


def _add_delta_grad(dx: Tensor, dy: Tensor, delta: tuple[Tensor, Tensor] | Tensor) -> None:
    if isinstance(delta, Tensor):
        dx.addmm_(dy, delta)
    else:
        dx.addmm_(dy @ delta[0], delta[1])


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
            return self.base(x)  # type: ignore[no-any-return]
        outputs = []
        for row, start, end in active.segments(x.shape[0]):
            own = {name: tensor[row] for name, tensor in parameters.items()}
            outputs.append(functional_call(self.base, own, (x[start:end].to(_dtype(own)),)))
        return torch.cat(outputs)


def _dtype(parameters: Mapping[str, Tensor]) -> torch.dtype:
    return next(iter(parameters.values())).dtype
