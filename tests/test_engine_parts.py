"""The parts of the engine alone: packing, attention, normalisation, optimiser, buffers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fedllm.adapters import Adapter, algebra, initial, is_b
from fedllm.config import TrainingConfig
from fedllm.engine.assembly import Sources, assembled
from fedllm.engine.buffers import Buffer, Layout, common_shapes
from fedllm.engine.lora import Active
from fedllm.engine.norm import FrozenRMSNorm, replace_rms_norms
from fedllm.engine.objectives import cross_entropy, is_likeliest
from fedllm.engine.optimizer import FlatOptimizer, clip_rows
from fedllm.engine.packing import (
    Packing,
    Segment,
    Sequences,
    padded,
    positions,
    predicted,
    runs,
    segments,
    split,
)
from fedllm.errors import ModelError

lengths_of = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def cohort_rows(count: int, seed: int) -> np.ndarray:
    """Return the client of each sequence, in ascending order as a cohort gives them."""
    return np.sort(np.random.default_rng(seed).integers(0, 4, size=count))


def sequences_of(lengths: Sequence[int], seed: int = 0) -> Sequences:
    stream = np.random.default_rng(seed)
    total = sum(lengths)
    return Sequences(
        tokens=stream.integers(1, 50, total),
        lengths=np.array(lengths),
        rows=np.zeros(len(lengths), int),
        supervised=stream.random(total) < 0.5,
        classes=None,
    )


# packing


@given(lengths_of, st.integers(0, 99))
def test_segments_cover_a_pass_without_gaps_one_for_each_stretch(
    lengths: list[int], seed: int
) -> None:
    rows = cohort_rows(len(lengths), seed)
    found = segments(rows, np.array(lengths))
    assert [s.start for s in found] == [0, *(s.end for s in found[:-1])]
    assert found[-1].end == sum(lengths)
    owners = np.repeat(rows, lengths)
    assert all((owners[s.start : s.end] == s.row).all() for s in found)
    assert all(a.row != b.row for a, b in itertools.pairwise(found))
    assert all(type(number) is int for segment in found for number in segment)


@given(lengths_of)
def test_runs_are_batches_of_equal_length(lengths: list[int]) -> None:
    found = runs(np.array(lengths))
    assert [r.length for r in found for _ in range(r.sequences)] == lengths
    starts = np.cumsum([0, *(r.sequences * r.length for r in found)])
    assert [r.start for r in found] == starts[:-1].tolist()
    assert all(a.length != b.length for a, b in itertools.pairwise(found))


@given(lengths_of)
def test_positions_restart_at_each_sequence(lengths: list[int]) -> None:
    assert positions(np.array(lengths)).tolist() == [i for n in lengths for i in range(n)]


@given(lengths_of, st.integers(0, 99))
def test_a_token_is_predicted_from_the_one_before_it_in_its_own_sequence(
    lengths: list[int], seed: int
) -> None:
    sequences = sequences_of(lengths, seed)
    at, owners = predicted(sequences)
    wanted = []
    for i, (start, length) in enumerate(zip(sequences.starts, lengths, strict=True)):
        inside = [start + j for j in range(1, length) if sequences.supervised[start + j]]
        wanted += [(place - 1, i) for place in inside]
    assert list(zip(at.tolist(), owners.tolist(), strict=True)) == wanted


@given(lengths_of, st.integers(0, 99))
def test_padding_is_on_the_right_and_masked(lengths: list[int], seed: int) -> None:
    sequences = sequences_of(lengths, seed)
    ids, mask = padded(sequences, 0, torch.device("cpu"))
    assert ids.shape == mask.shape == (len(lengths), max(lengths))
    assert mask.sum(1).tolist() == lengths
    assert (ids[mask.bool()].numpy() == sequences.tokens).all()
    assert (ids[~mask.bool()] == 0).all()
    assert (mask.diff(dim=1) <= 0).all()


@given(lengths_of, st.integers(0, 99), st.integers(1, 40), st.booleans())
def test_passes_cover_each_sequence_once_within_the_limit(
    lengths: list[int], seed: int, limit: int, is_padded: bool
) -> None:
    sizes, rows = np.array(lengths), cohort_rows(len(lengths), seed)
    passes = list(split(sizes, rows, limit, is_padded=is_padded))
    assert sorted(np.concatenate(passes).tolist()) == list(range(len(lengths)))
    for part in passes:
        tokens = len(part) * sizes[part].max() if is_padded else sizes[part].sum()
        assert tokens <= limit or len(part) == 1
        order = list(zip(rows[part].tolist(), sizes[part].tolist(), strict=True))
        assert order == sorted(order)


@given(lengths_of, st.integers(0, 99), st.booleans())
def test_no_two_neighbouring_passes_would_fit_into_one(
    lengths: list[int], seed: int, is_padded: bool
) -> None:
    sizes, rows = np.array(lengths), cohort_rows(len(lengths), seed)
    passes = list(split(sizes, rows, 15, is_padded=is_padded))
    for one, other in itertools.pairwise(passes):
        both = np.concatenate([one, other])
        assert (len(both) * sizes[both].max() if is_padded else sizes[both].sum()) > 15


@given(lengths_of)
def test_a_padded_batch_names_each_token_once_and_repeats_the_last(lengths: list[int]) -> None:
    made = Packing(np.array(lengths), torch.device("cpu"), is_one_batch=True)
    assert made.is_token.sum(1).tolist() == lengths
    assert made.index[made.is_token].tolist() == list(range(sum(lengths)))
    ends = torch.tensor(lengths).cumsum(0) - 1
    assert (made.index == torch.where(made.is_token, made.index, ends[:, None])).all()


def test_no_sequences_make_no_pass() -> None:
    assert list(split(np.array([], int), np.array([], int), 10)) == []


# normalisation


def gain_and_input(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(4)
    gain = 1 + 0.3 * torch.randn(6, generator=stream)
    return gain.to(dtype), (3 * torch.randn(2, 5, 6, generator=stream)).to(dtype)


def reference_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_normalisation_and_its_gradient_follow_the_formula(eps: float) -> None:
    gain, x = gain_and_input()
    layer = FrozenRMSNorm(gain, eps)
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    out, wanted = layer(mine), reference_norm(theirs, gain.double(), eps)
    torch.testing.assert_close(out, wanted.float())
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    out.backward(slope)
    wanted.backward(slope.double())
    torch.testing.assert_close(mine.grad, theirs.grad.float())


def test_normalisation_is_the_same_with_and_without_gradient() -> None:
    gain, x = gain_and_input()
    layer = FrozenRMSNorm(gain, 1e-5)
    with_gradient = layer(x.clone().requires_grad_())
    torch.testing.assert_close(layer(x), with_gradient.detach())
    assert with_gradient.requires_grad
    with torch.no_grad():
        assert not layer(x.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_normalisation_does_not_write_to_its_input(dtype: torch.dtype) -> None:
    gain, x = gain_and_input(dtype)
    mine = x.clone().requires_grad_()
    hidden = mine * 1.0
    # squaring keeps its input for the backward pass, as a model's other layers may
    (FrozenRMSNorm(gain, 1e-5)(hidden) + hidden.square()).sum().backward()
    assert torch.equal(hidden.detach(), x)
    assert mine.grad is not None


def test_normalisation_in_bf16_is_as_close_as_bf16_allows() -> None:
    gain, x = gain_and_input(torch.bfloat16)
    mine = x.clone().requires_grad_()
    out = FrozenRMSNorm(gain, 1e-5)(mine)
    assert out.dtype == torch.bfloat16
    wide = x.double().requires_grad_()
    wanted = reference_norm(wide, gain.double(), 1e-5)
    torch.testing.assert_close(out.double(), wanted, rtol=2e-2, atol=2e-2)
    out.sum().backward()
    wanted.sum().backward()
    assert mine.grad.dtype == torch.bfloat16
    torch.testing.assert_close(mine.grad.double(), wide.grad, rtol=5e-2, atol=2e-2)


class StrangeRMSNorm(nn.Module):
    """Has the name and the fields, but another formula."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(6)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight


def test_only_normalisations_of_a_known_formula_are_replaced() -> None:
    gain, x = gain_and_input()
    llama, gemma = LlamaRMSNorm(6, 1e-5), GemmaRMSNorm(6, 1e-5)
    for layer in (llama, gemma):
        layer.weight.data = gain.clone()
        layer.requires_grad_(False)
    inner = nn.ModuleDict({"gemma": gemma, "strange": StrangeRMSNorm(), "layer": nn.LayerNorm(6)})
    model = nn.ModuleDict({"llama": llama, "inner": inner})
    before = {"llama": llama(x), "gemma": gemma(x)}
    assert replace_rms_norms(model) == 2
    assert type(model["inner"]["strange"]) is StrangeRMSNorm
    for name, owner in (("llama", model), ("gemma", model["inner"])):
        assert isinstance(owner[name], FrozenRMSNorm)
        torch.testing.assert_close(owner[name](x), before[name])
    assert replace_rms_norms(model) == 0


# losses


def test_token_losses_and_their_gradient_are_torchs() -> None:
    stream = torch.Generator().manual_seed(6)
    logits = torch.randn(5000, 7, generator=stream)
    targets = torch.randint(0, 7, (5000,), generator=stream)
    weights = torch.rand(5000, generator=stream)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses = cross_entropy(mine, targets)
    wanted = F.cross_entropy(theirs, targets, reduction="none")
    torch.testing.assert_close(losses, wanted)
    (losses * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


# optimiser


OPTIMISERS = {
    "adamw": TrainingConfig(optimizer="adamw", weight_decay=0.1, betas=(0.8, 0.95), epsilon=1e-5),
    "adamw plain": TrainingConfig(optimizer="adamw"),
    "sgd": TrainingConfig(optimizer="sgd"),
    "sgd with all": TrainingConfig(optimizer="sgd", momentum=0.9, weight_decay=0.1),
}


def torch_optimizer(parameter: Tensor, training: TrainingConfig) -> torch.optim.Optimizer:
    if training.optimizer == "adamw":
        return torch.optim.AdamW(
            [parameter],
            betas=training.betas,
            eps=training.epsilon,
            weight_decay=training.weight_decay,
        )
    return torch.optim.SGD(
        [parameter], lr=1.0, momentum=training.momentum, weight_decay=training.weight_decay
    )


@pytest.mark.parametrize("name", OPTIMISERS)
def test_each_row_moves_as_torch_would_move_it_while_others_drop_out(name: str) -> None:
    training, stream = OPTIMISERS[name], torch.Generator().manual_seed(7)
    steps = (6, 4, 4, 1)
    start = torch.randn(len(steps), 5, generator=stream)
    rows = [start[i].clone().requires_grad_() for i in range(len(steps))]
    theirs = [torch_optimizer(row, training) for row in rows]
    ours = start.clone()
    optimizer = FlatOptimizer(ours, training)
    for step in range(max(steps)):
        count = sum(step < n for n in steps)
        grads = torch.randn(count, 5, generator=stream)
        rates = 0.1 * torch.rand(count, 1, generator=stream)
        for i in range(count):
            rows[i].grad = grads[i].clone()
            theirs[i].param_groups[0]["lr"] = float(rates[i])
            theirs[i].step()
        given = grads.clone()
        optimizer.step(grads, rates)
        assert torch.equal(grads, given)
        torch.testing.assert_close(ours, torch.stack([row.detach() for row in rows]))
    assert not torch.allclose(ours[3], start[3])


@settings(max_examples=30)
@given(st.integers(0, 999), st.floats(0.01, 10.0), st.floats(0.0, 100.0))
def test_rows_are_clipped_one_by_one_as_torch_clips_a_model(
    seed: int, max_norm: float, scale: float
) -> None:
    grads = scale * torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    grads[1] *= 0.01
    wanted = []
    for row in grads:
        parameter = nn.Parameter(torch.zeros(5))
        parameter.grad = row.clone()
        nn.utils.clip_grad_norm_([parameter], max_norm)
        wanted.append(parameter.grad)
    clip_rows(grads, max_norm)
    torch.testing.assert_close(grads, torch.stack(wanted))
    assert (grads.norm(dim=1) <= max_norm * (1 + 1e-5)).all()


def test_a_norm_of_zero_turns_clipping_off() -> None:
    grads = torch.full((2, 3), 1e6)
    clip_rows(grads, 0.0)
    assert (grads == 1e6).all()


# buffers


def adapters(ranks: Sequence[int]) -> list[Adapter]:
    full = initial(
        {"q": (6, 4), "v": (3, 5)}, max(ranks), 2.0, 0, {"score.weight": torch.ones(2, 4)}
    )
    stream = torch.Generator().manual_seed(8)
    full = full.overlaid(
        {n: torch.randn(t.shape, generator=stream) for n, t in full.tensors.items() if is_b(n)}
    )
    return [algebra.truncate(full, rank) for rank in ranks]


def test_a_layout_lies_end_to_end() -> None:
    layout = Layout.of({"x": (2, 3), "y": (4,), "z": ()})
    assert (layout.offsets, layout.size) == ({"x": 0, "y": 6, "z": 10}, 11)
    buffer = torch.arange(22.0).reshape(2, 11)
    assert layout.view(buffer, "x").tolist()[1] == [[11, 12, 13], [14, 15, 16]]
    assert layout.view(buffer, "y").shape == (2, 4)
    layout.view(buffer, "y")[:] = 0
    assert buffer[:, 6:10].abs().sum() == 0


@pytest.mark.parametrize("ranks", [(3, 3), (1, 4, 2)])
def test_a_buffer_holds_every_adapter_padded_with_zeros(ranks: tuple[int, ...]) -> None:
    given_adapters = adapters(ranks)
    buffer = Buffer(given_adapters, lambda name: True, torch.device("cpu"))
    assert buffer.layout.shapes == common_shapes(given_adapters)
    filled = 0
    for row, adapter in enumerate(given_adapters):
        for name, tensor in adapter.tensors.items():
            assert torch.equal(buffer.place(buffer.data, name, row, tensor.shape), tensor)
            filled += float(tensor.double().abs().sum())
    assert float(buffer.data.double().abs().sum()) == pytest.approx(filled)


def test_a_buffer_keeps_what_it_is_told_and_copies_it() -> None:
    (adapter,) = adapters((2,))
    buffer = Buffer([adapter], is_b, torch.device("cpu"))
    assert {n for n in adapter if n in buffer} == {n for n in adapter if is_b(n)}
    digest = adapter.digest()
    buffer.data.zero_()
    assert adapter.digest() == digest


def test_low_rank_factors_are_views_of_the_buffer_with_their_own_scaling() -> None:
    given_adapters = adapters((2, 4))
    buffer = Buffer(given_adapters, lambda name: True, torch.device("cpu"))
    grads = torch.zeros_like(buffer.data)
    sources = Sources(given_adapters, [(buffer, buffer.data)], (buffer, grads))
    found = assembled(sources, {}).low_ranks
    assert set(found) == {"q", "v"}
    for module, low in found.items():
        assert list(low.scaling) == [2.0, 2.0]
        for row, adapter in enumerate(given_adapters):
            product = low.b[row] @ low.a[row]
            wanted = adapter.product(module).dense() / 2.0
            torch.testing.assert_close(product, wanted)
        low.grad_a.fill_(1.0)
        low.b.zero_()
    assert grads.sum() == sum(low.a.numel() for low in found.values())
    assert all(
        buffer.layout.view(buffer.data, n).abs().sum() == 0 for n in given_adapters[0] if is_b(n)
    )


def test_a_layer_that_sees_only_some_tokens_is_a_model_error() -> None:
    active = Active(by_token=[Segment(0, 0, 9)], by_sequence=[Segment(0, 0, 2), Segment(1, 2, 4)])
    assert active.segments(9) == active.by_token
    assert active.segments(8) == [Segment(0, 0, 4), Segment(1, 4, 8)]
    with pytest.raises(ModelError, match=r"adapter\.targets"):
        active.segments(7)


def test_a_model_that_prefers_nothing_is_not_always_right() -> None:
    logits = torch.zeros(4, 3)
    logits[3, 2] = 1.0
    assert is_likeliest(logits, torch.tensor([0, 1, 2, 2])).tolist() == [True, False, False, True]
