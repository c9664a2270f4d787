"""What travels: sizes known beforehand, errors within their bounds, nothing lost by feedback."""

from __future__ import annotations

import doctest
import itertools
import math
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError
from fractions import Fraction
from types import ModuleType

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.adapters import wire
from fedllm.adapters.wire import WIRE, codec_for, make, problems, send_change
from fedllm.adapters.wire_formats import NF4_BLOCK, NF4_LEVELS, TopK, WireCodec
from fedllm.errors import ConfigError

NAMES = list(WIRE)
LOSSY = [name for name in NAMES if name != "fp32"]
QUANTISERS = ["fp16", "bf16", "int8", "nf4"]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(), (1,), (2,), (63,), (64,), (65,), (129,), (1, 1), (3, 5), (8, 64), (65, 3), (2, 3, 7)]
EMPTY = [(0,), (0, 4), (4, 0), (2, 0, 3)]
FP32_EPS = 2.0**-23

quick = settings(deadline=None, max_examples=60)
shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple) | st.sampled_from(SHAPES)
# from far below what fp16 can hold to near its end
scales = st.integers(-30, 12).map(lambda power: 2.0**power)
seeds = st.integers(0, 2**31)


def drawn(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    """Return normal numbers in fp32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors agree in dtype, shape and every bit; NaN equals NaN."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def sent_bytes(codec: WireCodec, tensor: Tensor) -> int:
    """Count the bytes of the packed tensors."""
    return sum(part.numel() * part.element_size() for part in codec.encode(tensor).values())


# sizes


@quick
@given(st.sampled_from(NAMES), shapes, st.sampled_from(FLOATS))
def test_the_size_known_beforehand_is_what_is_sent(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = drawn(shape, 1).to(dtype)
    assert make(name).nbytes(shape, dtype.itemsize) == sent_bytes(make(name), tensor)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_odd_and_empty_shapes_are_sized_and_arrive(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    codec, tensor = make(name), drawn(shape, 2).to(dtype)
    assert codec.nbytes(shape, dtype.itemsize) == sent_bytes(codec, tensor)
    arrived = codec.round_trip(tensor)
    assert (arrived.shape, arrived.dtype) == (tensor.shape, dtype)


@given(shapes, st.floats(0.001, 1.0))
@quick
def test_the_share_decides_the_size(shape: tuple[int, ...], share: float) -> None:
    codec = make("topk", share=share)
    assert codec.nbytes(shape, 4) == sent_bytes(codec, drawn(shape, 3))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("fp32", (3, 5), 60),
        ("fp16", (3, 5), 30),
        ("bf16", (3, 5), 30),
        ("int8", (3, 5), 15 + 3 * 4),
        ("int8", (15,), 15 + 4),
        ("int8", (), 1 + 4),
        ("int8", (2, 3, 5), 30 + 2 * 4),
        ("nf4", (), 1 + 4),
        ("nf4", (64,), 32 + 4),
        ("nf4", (13, 5), 33 + 2 * 4),
        ("topk", (3, 5), 2 * 8),
        ("topk", (), 8),
        *[(name, (0, 4), 0) for name in NAMES],
    ],
)
def test_sizes_worked_out_by_hand(name: str, shape: tuple[int, ...], expected: int) -> None:
    assert make(name).nbytes(shape, 4) == expected


def test_a_size_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from fedllm.adapters.wire import WIRE, make, problems\n"
        "sizes = [make(name).nbytes((4, 8), 4) for name in WIRE]\n"
        "assert len(sizes) == len(WIRE) and problems('topk', {'share': 2.0})\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "torch was imported"


# what arrives


@quick
@given(st.sampled_from(FLOATS), shapes, seeds)
def test_as_it_is_keeps_every_bit(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    tensor = drawn(shape, seed).to(dtype)
    if dtype == torch.float64:
        tensor = tensor + 1e-12  # needs more bits than fp32 has
    assert same(make("fp32").round_trip(tensor), tensor)


@quick
@given(shapes, seeds, st.integers(-12, 12), st.sampled_from([torch.float32, torch.float64]))
def test_half_precision_errs_by_half_an_epsilon(
    shape: tuple[int, ...], seed: int, power: int, dtype: torch.dtype
) -> None:
    tensor = drawn(shape, seed, 2.0**power).to(dtype)
    for name, half in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        error = (make(name).round_trip(tensor) - tensor).abs()
        # below the smallest normal number the step is absolute: at most one of these
        floor = torch.finfo(half).smallest_normal * torch.finfo(half).eps
        relative = torch.finfo(half).eps / 2 + FP32_EPS  # a float64 is rounded twice
        assert (error <= tensor.abs() * relative + floor).all()


@quick
@given(shapes, seeds, scales, st.sampled_from([torch.float32, torch.float64]))
def test_int8_errs_by_half_a_step_of_the_row(
    shape: tuple[int, ...], seed: int, scale: float, dtype: torch.dtype
) -> None:
    tensor = drawn(shape, seed, scale).to(dtype)
    rows = tensor.reshape(shape[0] if len(shape) > 1 else 1, -1) if tensor.numel() else tensor
    arrived = make("int8").round_trip(tensor).reshape(rows.shape)
    largest = rows.abs().amax(dim=1, keepdim=True) if tensor.numel() else rows
    step = largest / 127
    assert ((arrived - rows).abs() <= step / 2 + 2 * FP32_EPS * largest).all()


@quick
@given(shapes, seeds, scales, st.sampled_from([torch.float32, torch.float64]))
def test_nf4_errs_by_half_the_widest_gap_of_the_block(
    shape: tuple[int, ...], seed: int, scale: float, dtype: torch.dtype
) -> None:
    tensor = drawn(shape, seed, scale).to(dtype)
    widest = max(b - a for a, b in itertools.pairwise(NF4_LEVELS))
    blocks = tensor.reshape(-1).split(NF4_BLOCK)
    arrived = make("nf4").round_trip(tensor).reshape(-1).split(NF4_BLOCK)
    for block, other in zip(blocks, arrived, strict=True):
        if block.numel():
            largest = block.abs().amax()
            assert (block - other).abs().amax() <= (widest / 2 + 2 * FP32_EPS) * largest


@quick
@given(st.sampled_from([*QUANTISERS, "topk"]), shapes, seeds, scales, st.sampled_from(FLOATS))
@example("int8", (40, 40), 0, 1.0, torch.bfloat16)
@example("int8", (40, 40), 0, 2.0**-24, torch.float16)
@example("nf4", (40, 40), 0, 2.0**-24, torch.float16)
def test_a_second_trip_changes_nothing(
    name: str, shape: tuple[int, ...], seed: int, scale: float, dtype: torch.dtype
) -> None:
    codec = make(name)
    once = codec.round_trip(drawn(shape, seed, scale).to(dtype))
    assert same(codec.round_trip(once), once)


@pytest.mark.parametrize("name", QUANTISERS)
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 3e-44, 1e-39, 1e-38])
def test_the_smallest_numbers_do_not_blow_up(name: str, tiny: float) -> None:
    tensor = torch.tensor([[tiny, -tiny], [0.0, tiny / 3]])
    arrived = make(name).round_trip(tensor)
    assert ((arrived - tensor).abs() <= tiny).all()


def test_int8_worked_out_by_hand() -> None:
    tensor = torch.tensor([[127.0, 1.4, -63.6], [0.0, -2.0, 0.5]])
    parts = make("int8").encode(tensor)
    assert parts["codes"].dtype == torch.int8
    # 0.5 of 2 is 31.75 of 127
    assert parts["codes"].tolist() == [127, 1, -64, 0, -127, 32]
    assert parts["absmax"].tolist() == [127.0, 2.0]
    expected = torch.tensor([[127.0, 1.0, -64.0], [0.0, -2.0, 2 * 32 / 127]])
    torch.testing.assert_close(make("int8").round_trip(tensor), expected)


def test_a_vector_shares_one_scale_and_rows_do_not() -> None:
    flat = torch.tensor([1000.0, 1.0, 0.001, 0.002])
    assert make("int8").round_trip(flat)[2:].tolist() == [0.0, 0.0]
    assert make("int8").round_trip(flat.reshape(2, 2))[1].all()


def test_nf4_worked_out_by_hand() -> None:
    # over the absmax of 4: -1, 0.45, 0, 0.2, 1; the nearest levels are 0, 12, 7, 9 and 15
    tensor = torch.tensor([-4.0, 1.8, 0.0, 0.8, 4.0])
    parts = make("nf4").encode(tensor)
    assert parts["codes"].dtype == torch.uint8
    assert parts["codes"].tolist() == [0 << 4 | 12, 7 << 4 | 9, 15 << 4]
    assert parts["absmax"].tolist() == [4.0]
    expected = torch.tensor([-1.0, 0.44070982933044434, 0.0, 0.16093020141124725, 1.0]) * 4
    assert same(make("nf4").round_trip(tensor), expected)


def test_nf4_takes_a_new_scale_every_64_numbers() -> None:
    tensor = torch.cat([torch.full((64,), 1000.0), torch.full((3,), 0.001)])
    assert make("nf4").encode(tensor)["absmax"].tolist() == [1000.0, pytest.approx(0.001)]
    assert same(make("nf4").round_trip(tensor), tensor)


def test_a_number_midway_between_two_levels_goes_to_the_lower() -> None:
    levels = torch.tensor(NF4_LEVELS)
    midway = torch.cat([torch.ones(1), (levels[1:] + levels[:-1]) / 2])
    assert same(make("nf4").round_trip(midway)[1:], levels[:-1])


def test_the_levels_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    if not hasattr(functional, "get_4bit_type"):
        pytest.skip("this bitsandbytes does not show its levels")
    assert same(functional.get_4bit_type("nf4", device="cpu"), torch.tensor(NF4_LEVELS))


@pytest.mark.parametrize("seed", range(3))
def test_nf4_sends_the_bytes_that_bitsandbytes_stores(seed: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    tensor = drawn((128, 65), seed)
    try:
        codes, state = functional.quantize_4bit(tensor, blocksize=NF4_BLOCK, quant_type="nf4")
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this bitsandbytes does not quantise on the CPU: {error}")
    parts = make("nf4").encode(tensor)
    assert same(parts["absmax"], state.absmax)
    assert same(parts["codes"], codes.reshape(-1))


@pytest.mark.parametrize("row", [[0.0] * 4, [math.nan, 1.0, -1.0, 0.0], [1.0, math.inf, -2.0, 0.0]])
def test_a_row_without_a_scale_is_sent_as_zeros(row: list[float]) -> None:
    # the codes would otherwise be whatever a machine makes of NaN as an integer
    zero_level = NF4_LEVELS.index(0.0)
    assert make("int8").encode(torch.tensor(row))["codes"].tolist() == [0] * 4
    packed = zero_level << 4 | zero_level
    assert make("nf4").encode(torch.tensor(row))["codes"].tolist() == [packed] * 2


def test_half_precision_worked_out_by_hand() -> None:
    # 2049 needs 12 bits and lies midway: to even. 257 needs 9.
    assert make("fp16").round_trip(torch.tensor([2049.0, 2051.0])).tolist() == [2048.0, 2052.0]
    assert make("bf16").round_trip(torch.tensor([257.0, 259.0])).tolist() == [256.0, 260.0]


# the largest entries


@quick
@given(st.integers(1, 200), st.floats(0.001, 1.0), seeds, st.sampled_from(FLOATS))
def test_topk_keeps_the_share_rounded_up_and_none_that_is_smaller(
    count: int, share: float, seed: int, dtype: torch.dtype
) -> None:
    tensor = drawn((count,), seed).to(dtype)
    places = make("topk", share=share).encode(tensor)["places"]
    assert places.dtype == torch.int32
    kept = torch.zeros(count, dtype=torch.bool)
    kept[places.long()] = True
    assert kept.sum() == len(places) == max(1, math.ceil(Fraction(repr(share)) * count))
    if not kept.all():
        assert tensor[kept].abs().amin() >= tensor[~kept].abs().amax()


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_of_equal_magnitudes_the_first_are_kept(numbers: list[int], share: float) -> None:
    kept = math.ceil(Fraction(repr(share)) * len(numbers))
    ranking = sorted(range(len(numbers)), key=lambda place: (-abs(numbers[place]), place))
    parts = make("topk", share=share).encode(torch.tensor(numbers, dtype=torch.float32))
    assert parts["places"].tolist() == sorted(ranking[:kept])


def test_topk_worked_out_by_hand() -> None:
    tensor = torch.tensor([[1.0, -5.0, 2.0], [0.5, 5.0, -2.0]])
    parts = make("topk", share=0.5).encode(tensor)
    assert parts["places"].tolist() == [1, 2, 4]
    assert parts["values"].tolist() == [-5.0, 2.0, 5.0]
    expected = torch.tensor([[0.0, -5.0, 2.0], [0.0, 5.0, 0.0]])
    assert same(make("topk", share=0.5).round_trip(tensor), expected)


def test_a_share_is_taken_as_it_is_written() -> None:
    assert math.ceil(0.07 * 100) == 8
    assert make("topk", share=0.07).nbytes((100,), 4) == 7 * 8


def test_a_whole_share_keeps_all() -> None:
    tensor = drawn((7, 9), 4)
    assert same(make("topk", share=1.0).round_trip(tensor), tensor)
    assert same(make("topk", share=1).round_trip(tensor), tensor)


# what every codec promises


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(), (1,), (130,), (7, 19)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_still_is_not(
    name: str, bad: float, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = drawn(shape, 5).to(dtype)
    tensor.view(-1)[-1] = bad
    assert not make(name).round_trip(tensor).view(-1)[-1].isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_all_nan_is_seen(name: str) -> None:
    arrived = make(name).round_trip(torch.full((6, 70), math.nan))
    assert not arrived.isfinite().all()
    if name != "topk":
        assert arrived.isnan().all()


def test_a_bad_number_does_not_reach_other_rows_and_blocks() -> None:
    tensor = drawn((3, NF4_BLOCK), 6)
    tensor[1, 5] = math.inf
    for name in ("int8", "nf4"):
        arrived = make(name).round_trip(tensor)
        assert arrived[1].isnan().all()
        assert arrived[[0, 2]].isfinite().all()


def test_what_is_beyond_the_range_is_not_finite() -> None:
    assert make("fp16").round_trip(torch.tensor([65504.0, -65536.0])).tolist() == [65504, -math.inf]
    far = torch.tensor([1e300, 1.0], dtype=torch.float64)
    for name in LOSSY:
        assert not make(name).round_trip(far)[0].isfinite()
    assert same(make("fp32").round_trip(far), far)


@pytest.mark.parametrize("largest", [torch.finfo(torch.float32).max, -3.3e38])
def test_the_largest_number_of_a_row_arrives_exactly(largest: float) -> None:
    tensor = torch.tensor([largest, 1e38])
    for name in ("int8", "nf4", "topk"):
        assert make(name).round_trip(tensor)[0] == tensor[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("view", ["whole", "transposed", "strided", "slice", "repeated", "number"])
def test_what_arrives_is_contiguous_in_memory_of_its_own(
    name: str, dtype: torch.dtype, view: str
) -> None:
    whole = drawn((6, 10), 7).to(dtype)
    tensor = {
        "whole": whole,
        "transposed": whole.T,
        "strided": whole[::2, ::3],
        "slice": whole[2],
        "repeated": whole[:1].expand(4, 10),
        "number": whole[1, 1],
    }[view]
    codec, before = make(name), whole.clone()
    arrived = codec.round_trip(tensor)
    assert arrived.is_contiguous()
    assert arrived.untyped_storage().nbytes() == tensor.numel() * dtype.itemsize
    assert same(arrived, codec.round_trip(tensor.clone(memory_format=torch.contiguous_format)))
    arrived.fill_(3)
    assert same(whole, before)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_leaves_what_was_received_alone(name: str) -> None:
    codec, tensor = make(name), drawn((5, 13), 8)
    parts = {key: part.clone() for key, part in codec.encode(tensor).items()}
    before = {key: part.clone() for key, part in parts.items()}
    codec.decode(parts, tensor.shape, tensor.dtype).fill_(9)
    assert all(same(parts[key], before[key]) for key in before)


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_arrives_without_its_gradient(name: str) -> None:
    arrived = make(name).round_trip(torch.nn.Parameter(drawn((3, 4), 9)))
    assert type(arrived) is Tensor
    assert not arrived.requires_grad


def test_a_parameter_is_owed_without_its_gradient() -> None:
    change = {"w": torch.nn.Parameter(drawn((3, 4), 9))}
    sent, owed = send_change(make("topk"), change, {"w": torch.ones(3, 4)})
    assert not send_change(make("topk"), change, {})[1]["w"].requires_grad
    assert not sent["w"].requires_grad
    assert not owed["w"].requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_without_numbers_passes(name: str) -> None:
    tensor = torch.empty((4, 5), device="meta")
    assert make(name).round_trip(tensor) is tensor
    sent, owed = send_change(make(name), {"w": tensor}, {"w": tensor})
    assert sent["w"].is_meta
    assert owed["w"].shape == (4, 5)


@pytest.mark.parametrize("name", LOSSY)
def test_whole_numbers_are_refused_by_what_would_round_them(name: str) -> None:
    places = torch.tensor([3, 70_000, 2**40])
    with pytest.raises(TypeError, match="codec_for"):
        make(name).round_trip(places)
    assert same(codec_for(make(name), places.dtype).round_trip(places), places)
    assert codec_for(make(name), torch.bfloat16) == make(name)


def test_only_what_keeps_every_bit_is_called_lossless() -> None:
    tensor = drawn((9, 33), 10).double() + 1e-12
    kept = [name for name in NAMES if same(make(name).round_trip(tensor), tensor)]
    assert kept == [name for name in NAMES if make(name).is_lossless] == ["fp32"]
    assert [name for name in NAMES if make(name).needs_reference] == ["topk"]


@pytest.mark.parametrize("name", NAMES)
def test_a_codec_is_a_value(name: str) -> None:
    codec = make(name)
    assert codec == make(name)
    assert pickle.loads(pickle.dumps(codec)) == codec
    assert issubclass(WIRE.load(name), WireCodec)


def test_a_share_cannot_be_changed_afterwards() -> None:
    codec = TopK(0.5)
    with pytest.raises(FrozenInstanceError):
        codec.share = 0.1  # type: ignore[misc]


# the table


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"codec 'int9'\. Did you mean 'int8'"):
        make("int9")


@pytest.mark.parametrize("share", [0, 0.0, -0.1, 1.5, math.nan, math.inf, "0.1", True, None])
def test_a_share_outside_its_range_is_refused(share: object) -> None:
    with pytest.raises(ConfigError, match=r"codec\.share: input should be"):
        make("topk", share=share)


def test_problems_name_the_key_and_what_there_is() -> None:
    assert problems("topk", {"share": 1.0}) == []
    assert problems("topk", {}) == []
    assert problems("topk", {"shar": 0.1}, where="wire.up") == [
        "wire.up.shar: unknown key. Did you mean 'share'?"
    ]
    assert problems("topk", {"x": 1}) == ["codec.x: unknown key. 'topk' has: share"]
    assert problems("int8", {"share": 0.1}) == ["codec.share: unknown key. 'int8' has no settings"]
    assert len(problems("topk", {"share": 3.0, "x": 1})) == 2


def test_the_default_share_is_a_tenth() -> None:
    assert make("topk") == TopK(share=0.1)


def test_the_examples_in_the_docstrings_run() -> None:
    module: ModuleType = wire
    result = doctest.testmod(module)
    assert result.attempted >= 3
    assert result.failed == 0


# error feedback


@quick
@given(st.sampled_from(NAMES), seeds, st.integers(1, 12))
def test_nothing_is_lost_over_many_rounds(name: str, seed: int, rounds: int) -> None:
    changes = [drawn((9, 13), seed + r).double() for r in range(rounds)]
    residual: dict[str, Tensor] = {}
    arrived = torch.zeros(9, 13, dtype=torch.float64)
    for change in changes:
        sent, residual = send_change(make(name), {"w": change}, residual)
        arrived += sent["w"]
    torch.testing.assert_close(arrived + residual["w"], sum(changes), rtol=0, atol=1e-12)


def test_feedback_makes_up_for_what_a_codec_drops() -> None:
    change = torch.tensor([1.0, 0.3, 0.3, 0.1])
    codec, rounds = make("topk", share=0.25), 40
    alone = rounds * codec.round_trip(change)
    assert alone.tolist() == [40.0, 0.0, 0.0, 0.0]
    residual: dict[str, Tensor] = {}
    arrived = torch.zeros(4)
    for _ in range(rounds):
        sent, residual = send_change(codec, {"w": change}, residual)
        arrived += sent["w"]
    # each entry lags by what it waits for its turn, however many rounds there are
    assert (arrived - rounds * change).abs().amax() < 4


def test_what_is_owed_worked_out_by_hand() -> None:
    codec = make("topk", share=0.5)
    sent, owed = send_change(codec, {"w": torch.tensor([3.0, 2.0])}, {})
    assert (sent["w"].tolist(), owed["w"].tolist()) == ([3.0, 0.0], [0.0, 2.0])
    sent, owed = send_change(codec, {"w": torch.tensor([3.0, 2.0])}, owed)
    assert (sent["w"].tolist(), owed["w"].tolist()) == ([0.0, 4.0], [3.0, 0.0])


@pytest.mark.parametrize("name", NAMES)
def test_a_lossless_codec_owes_nothing_and_others_what_they_rounded(name: str) -> None:
    change = drawn((4, 70), 11).double()
    sent, owed = send_change(make(name), {"w": change}, {})
    assert same(sent["w"], make(name).round_trip(change))
    assert same(owed["w"], change - sent["w"])
    assert owed["w"].any().item() is not make(name).is_lossless


def test_what_does_not_travel_this_time_stays_owed() -> None:
    residual = {"a": torch.ones(3), "b": torch.ones(2)}
    sent, owed = send_change(make("topk"), {"a": torch.ones(3)}, residual)
    assert set(sent) == {"a"}
    assert same(owed["b"], residual["b"])


@pytest.mark.parametrize("name", NAMES)
def test_sending_modifies_no_argument(name: str) -> None:
    change = {"w": drawn((5, 6), 12), "places": torch.arange(4)}
    residual = {"w": drawn((5, 6), 13), "other": torch.ones(2)}
    copies = [{key: t.clone() for key, t in given.items()} for given in (change, residual)]
    sent, owed = send_change(make(name), change, residual)
    for tensor in (*sent.values(), owed["w"], owed["places"]):
        tensor.fill_(7)
    for given_, copy in zip((change, residual), copies, strict=True):
        assert given_.keys() == copy.keys()
        assert all(same(given_[key], copy[key]) for key in copy)


def test_whole_numbers_are_sent_as_they_are() -> None:
    places = torch.tensor([5, 2**40])
    sent, owed = send_change(make("int8"), {"places": places}, {})
    assert same(sent["places"], places)
    assert not owed["places"].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_change_that_is_not_finite_is_seen_by_the_receiver(name: str) -> None:
    change = drawn((3, 40), 14)
    change[1, 1] = math.nan
    sent, _ = send_change(make(name), {"w": change}, {"w": drawn((3, 40), 15)})
    assert not sent["w"].isfinite().all()


def test_a_residual_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'w' is \(4, 3\) and its residual \(1, 3\)"):
        send_change(make("topk"), {"w": torch.ones(4, 3)}, {"w": torch.ones(1, 3)})
