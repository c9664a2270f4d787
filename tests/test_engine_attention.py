"""Attention over sequences that lie end to end, against dense attention with a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedllm.engine.attention import packed_attention
from fedllm.engine.packing import Packing


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend over the whole row with one dense mask, as the textbook writes it."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(owner))
    distance = place[:, None] - place[None, :]
    seen = owner[:, None] == owner[None, :]
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(1, 2)


def heads(lengths: Sequence[int], query: int = 4, shared: int = 2, size: int = 3) -> list[Tensor]:
    stream = torch.Generator().manual_seed(1)
    return [
        torch.randn(1, n, sum(lengths), size, generator=stream, dtype=torch.float64)
        for n in (query, shared, shared)
    ]


SCALE = 0.9
RULES = {
    "causal": {"causal": True},
    "bidirectional": {"causal": False},
    "window": {"causal": True, "window": 2},
    "wide window": {"causal": True, "window": 5},
    "bidirectional window": {"causal": False, "window": 2},
    "softcap": {"causal": True, "softcap": 0.7},
    "window and softcap": {"causal": True, "window": 3, "softcap": 0.7},
    "bidirectional softcap": {"causal": False, "softcap": 0.7},
}
each_rule = pytest.mark.parametrize("rule", RULES)
each_layout = pytest.mark.parametrize("is_one_batch", [False, True], ids=["runs", "one batch"])
# the last are longer than what keeps its attention weights for the backward pass
LENGTHS = [(5, 5, 3, 1, 1, 4), (1,), (14, 14, 2)]


def packing(lengths: Sequence[int], *, is_one_batch: bool = False) -> Packing:
    return Packing(np.array(lengths), torch.device("cpu"), is_one_batch=is_one_batch)


def packed(
    tensors: Sequence[Tensor], lengths: Sequence[int], rule: str, is_one_batch: bool
) -> Tensor:
    settings = RULES[rule]
    out, weights = packed_attention(
        nn.Module(),
        *tensors,
        None,
        packing=packing(lengths, is_one_batch=is_one_batch),
        scaling=SCALE,
        is_causal=settings["causal"],
        sliding_window=settings.get("window"),
        softcap=settings.get("softcap"),
    )
    assert weights is None
    return out


@each_rule
@each_layout
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("query", "shared"), [(4, 4), (4, 2), (4, 1)])
def test_packed_attention_is_dense_attention_with_a_mask(
    rule: str, lengths: tuple[int, ...], query: int, shared: int, is_one_batch: bool
) -> None:
    tensors = [t.requires_grad_() for t in heads(lengths, query, shared)]
    ours = packed(tensors, lengths, rule, is_one_batch)
    theirs = dense_attention(*tensors, lengths, scale=SCALE, **RULES[rule])
    torch.testing.assert_close(ours, theirs)
    stream = torch.Generator().manual_seed(2)
    slope = torch.randn(theirs.shape, generator=stream, dtype=torch.float64)
    wanted = torch.autograd.grad(theirs, tensors, slope)
    found = torch.autograd.grad(ours, tensors, slope)
    for ours_grad, theirs_grad in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad)


@each_rule
@each_layout
@pytest.mark.parametrize("lengths", [(3, 3, 2), (9, 1)])
def test_attentions_gradient_is_its_slope(
    rule: str, is_one_batch: bool, lengths: tuple[int, ...]
) -> None:
    tensors = [t.requires_grad_() for t in heads(lengths, 2, 1, 2)]
    assert torch.autograd.gradcheck(lambda *t: packed(t, lengths, rule, is_one_batch), tensors)


@each_rule
@each_layout
def test_a_sequence_sees_nothing_of_its_neighbours(rule: str, is_one_batch: bool) -> None:
    lengths = (4, 4, 3)
    tensors = heads(lengths)
    before = packed(tensors, lengths, rule, is_one_batch)
    disturbed = [t.clone() for t in tensors]
    for tensor in disturbed:
        tensor[:, :, 4:8] = 100.0
    after = packed(disturbed, lengths, rule, is_one_batch)
    assert torch.equal(after[:, :4], before[:, :4])
    assert torch.equal(after[:, 8:], before[:, 8:])
    assert not torch.equal(after[:, 4:8], before[:, 4:8])


def test_scale_and_direction_default_to_the_layers() -> None:
    tensors, lengths = heads((4, 2)), (4, 2)
    for causal in (True, False):
        layer = nn.Module()
        layer.is_causal = causal
        ours, _ = packed_attention(layer, *tensors, None, packing=packing(lengths))
        theirs = dense_attention(*tensors, lengths, causal=causal, scale=3**-0.5)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rule", ["position_bias", "s_aux", "cache"])
def test_a_rule_that_is_not_honoured_is_refused(rule: str) -> None:
    with pytest.raises(NotImplementedError, match=rule):
        packed_attention(
            nn.Module(), *heads((2,)), None, packing=packing((2,)), **{rule: torch.zeros(1)}
        )


@each_layout
def test_attention_leaves_its_inputs_alone(is_one_batch: bool) -> None:
    tensors = [t.requires_grad_() for t in heads((3, 3))]
    before = [t.detach().clone() for t in tensors]
    packed(tensors, (3, 3), "window", is_one_batch).sum().backward()
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)
