"""Attention over sequences that lie end to end in one row, for any model transformers knows.

transformers lets a model's attention be replaced through `AttentionInterface`; the bounds of the
sequences travel to it as a keyword of the model's forward. Each run of equally long sequences is
one batch, so nothing is padded. In full precision torch's scaled dot-product attention does both
passes. In half precision, and for rules that it lacks, short sequences keep their attention weights
for the backward pass and longer ones have them computed anew: memory stays linear in all cases.
On a GPU, where a loop over sequences is bound by its launches, all of a pass become one batch,
padded inside the attention only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from fedllm.engine.packing import Packing, Run

NAME = "fedllm_packed"
_KEEP = 4
"""Weights are kept up to this many times head_dim tokens: as much memory as a few activations."""

_FAST = (torch.float32, torch.float64)
"""In others, torch's backward pass on a CPU takes up to six times as long as ours, while sequences
are shorter than about 300 tokens; in these, ours takes up to twice as long as torch's."""


def register() -> None:
    """Make the packed attention known to transformers under `NAME`."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: object, **kwargs: object) -> None:
    """Return no mask: sequences are kept apart by their bounds."""


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rules: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence; return (1, T, heads, head_dim), and no weights.

    Args:
        module: The attention layer, which knows whether it is causal.
        query: (1, heads, T, head_dim); `key` and `value` may have fewer heads.
        packing: Where the sequences are.
        scaling: Factor on the scores; default 1 / sqrt(head_dim).
        is_causal: Overrides what the layer says.
        **rules: `sliding_window` (tokens) and `softcap` are honoured.

    Raises:
        NotImplementedError: If the model needs another rule; its batches are then padded.
    """
    _refuse(rules)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window, softcap = rules.get("sliding_window"), rules.get("softcap")
    # under autocast, rotary positions leave queries and keys in float32
    query, key = query.to(value.dtype), key.to(value.dtype)
    if packing.is_one_batch and softcap is None:
        return _one_batch(query, key, value, packing, scale, causal, window), None
    is_plain = softcap is None and (window is None or window >= packing.longest)
    if is_plain and value.dtype in _FAST:
        return _by_runs(query, key, value, packing.runs, scale, causal), None
    rest = packing.runs, scale, causal, window, softcap
    # one dtype throughout, as the backward pass, which is written by hand, has it
    with torch.autocast(query.device.type, enabled=False):
        return PackedAttention.apply(query, key, value, *rest), None  # type: ignore[no-untyped-call]  # untyped in torch


def _refuse(rules: Mapping[str, Any]) -> None:
    for name in ("position_bias", "s_aux", "cache"):
        if rules.get(name) is not None:
            raise NotImplementedError(f"packing does not know the attention rule '{name}'")


def _one_batch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scale: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Attend in one padded batch; what is padded lies after a sequence's last token."""
    count, length = packing.index.shape
    q, k, v = (
        t[0]
        .index_select(1, packing.index.flatten())
        .reshape(-1, count, length, t.shape[-1])
        .transpose(0, 1)
        for t in (query, key, value)
    )
    groups = query.shape[1] // key.shape[1]
    mask = None
    if window is not None or not causal:
        # a causal query never sees what lies behind it, so only other rules need a mask
        hidden = _hidden(length, causal, window, query.device)
        mask = ~hidden[None, None] & packing.is_token[:, None, None, :]
        mask = mask | torch.eye(length, dtype=torch.bool, device=query.device)
    out = F.scaled_dot_product_attention(
        q,
        _repeat(k, groups),
        _repeat(v, groups),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out.transpose(1, 2)[packing.is_token][None]


def _by_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed_runs: Sequence[Run],
    scale: float,
    causal: bool,
) -> Tensor:
    """Attend in one batch for each run, with torch's attention."""
    sizes, is_grouped = [run.tokens for run in packed_runs], query.shape[1] > key.shape[1]
    found = []
    for run, *parts in zip(
        packed_runs, *(torch.split(t, sizes, dim=2) for t in (query, key, value)), strict=True
    ):
        q, k, v = (_batch(part, run) for part in parts)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=is_grouped
        )
        found.append(out.transpose(1, 2).reshape(1, run.tokens, *query.shape[1::2]))
    return torch.cat(found, dim=1)


class PackedAttention(torch.autograd.Function):
    """softmax(scale q k^T + mask) v within each sequence."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packed_runs: Sequence[Run],
        scale: float,
        causal: bool,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Run scaled dot-product attention on each run of sequences."""
        ctx.rules = packed_runs, scale, causal, window, softcap
        kept: list[Tensor | None] = []
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        groups = query.shape[1] // key.shape[1]
        for run in packed_runs:
            q, k, v = (_part(t, run) for t in (query, key, value))
            k, v = _repeat(k, groups), _repeat(v, groups)
            is_plain = softcap is None and (window is None or window >= run.length)
            if is_plain and run.length > _KEEP * query.shape[-1]:
                kept.append(None)
                o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
            else:
                weights = _weights(q, k, scale, causal, window, softcap)[0]
                kept.append(weights if softcap is None else None)
                o = weights @ v
            _part(out.transpose(1, 2), run).copy_(o)
        ctx.save_for_backward(query, key, value, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Recompute the weights of each run, then differentiate by hand."""
        query, key, value, *kept = ctx.saved_tensors
        packed_runs, scale, causal, window, softcap = ctx.rules
        d_out = grads[0].transpose(1, 2)
        d_query, d_key, d_value = (
            torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
                1, 2
            )
            for t in (query, key, value)
        )
        groups = query.shape[1] // key.shape[1]
        for run, weights in zip(packed_runs, kept, strict=True):
            q, k, v, d_o = (_part(t, run) for t in (query, key, value, d_out))
            k, v = _repeat(k, groups), _repeat(v, groups)
            p, slope = weights, None
            if p is None:
                p, slope = _weights(q, k, scale, causal, window, softcap)
            d_p = d_o @ v.transpose(-1, -2)
            d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype)
            if slope is not None:
                d_s = d_s * slope
            _part(d_query, run).copy_((d_s @ k).mul_(scale))
            _part(d_key, run).copy_(_fold(d_s.transpose(-1, -2) @ q, groups).mul_(scale))
            _part(d_value, run).copy_(_fold(p.transpose(-1, -2) @ d_o, groups))
        return d_query, d_key, d_value, *(None,) * 5


def _part(tensor: Tensor, run: Run) -> Tensor:
    """View the tokens of a run among all, (1, heads, T, d), as a batch; see `_batch`."""
    return _batch(tensor[:, :, run.start : run.start + run.tokens], run)


def _batch(part: Tensor, run: Run) -> Tensor:
    """View the tokens of a run, (1, heads, count * length, d), as (count, heads, length, d)."""
    _, heads, _, size = part.shape
    return part.reshape(heads, run.sequences, run.length, size).transpose(0, 1)


def _repeat(tensor: Tensor, groups: int) -> Tensor:
    """Give each query head its key or value head."""
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def _fold(grad: Tensor, groups: int) -> Tensor:
    """Sum a gradient over the query heads that share a key or value head."""
    if groups == 1:
        return grad
    count, heads, length, size = grad.shape
    return grad.reshape(count, heads // groups, groups, length, size).sum(dim=2)


def _weights(
    q: Tensor, k: Tensor, scale: float, causal: bool, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return attention weights, and the slope of the soft cap if there is one."""
    scores = (q @ k.transpose(-1, -2)).mul_(scale)
    slope = None
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = bent * softcap, 1 - bent * bent
    length = scores.shape[-1]
    if causal or window is not None:
        scores.masked_fill_(_hidden(length, causal, window, scores.device), float("-inf"))
    return torch.softmax(scores, dim=-1), slope


def _hidden(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Return True where query (row) must not see key (column), (length, length)."""
    # the rule depends on distance alone, so a corner of a larger mask is the mask of a shorter one
    size = 1 << max(length - 1, 63).bit_length()
    return _square(size, causal, window, device)[:length, :length]


@lru_cache(maxsize=8)
def _square(size: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    position = torch.arange(size, device=device)
    ahead = position[None, :] - position[:, None]
    hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (ahead <= -window)
        if not causal:
            hidden = hidden | (ahead >= window)
    return hidden
