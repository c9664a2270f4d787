"""How a tensor is packed for the way between server and client, and what that costs in bytes.

Arithmetic is in fp32 and rounds to nearest; nothing is drawn. What was NaN or infinite is not
finite after the round trip either, so that a check of uploads still sees it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from fedllm.adapters.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

_FP32_BYTES = _INT32_BYTES = 4

NF4_BLOCK = 64
"""Numbers that share one absmax."""
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""QLoRA (arXiv:2305.14314): quantiles of a normal distribution, with an exact 0."""


@dataclass(frozen=True)
class WireCodec(ABC):
    """A format of tensors under way."""

    is_lossless: ClassVar[bool] = False
    """Whether a round trip returns every bit."""
    needs_reference: ClassVar[bool] = False
    """Whether it is for changes only, with error feedback, because it drops most of a value."""

    @abstractmethod
    def encode(self, tensor: Tensor) -> Mapping[str, Tensor]:
        """Return what is sent; nothing else is needed beside shape and dtype.

        Args:
            tensor: Of a floating dtype. Not modified, though a part may share its memory.
        """

    @abstractmethod
    def decode(
        self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Return what the receiver makes of it: contiguous, in memory of its own."""

    @abstractmethod
    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Return the bytes of all parts of a tensor.

        Args:
            shape: Of the tensor.
            itemsize: Bytes of one of its numbers before it is encoded.
        """

    def round_trip(self, tensor: Tensor) -> Tensor:
        """Return what arrives; a tensor on the meta device, which has no numbers, as it is."""
        if tensor.is_meta:
            return tensor
        return self.decode(self.encode(tensor), tensor.shape, tensor.dtype)


@dataclass(frozen=True)
class AsIs(WireCodec):
    """Every number in the dtype it has, float64 and integers too."""

    is_lossless: ClassVar[bool] = True

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the numbers themselves."""
        return {"values": _flat(tensor)}

    def decode(
        self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Return a copy of the numbers."""
        return parts["values"].to(dtype, copy=True).reshape(tuple(shape))

    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Return the size in memory."""
        return math.prod(shape) * itemsize


AS_IS = AsIs()
"""What travels by no codec at all."""


@dataclass(frozen=True)
class _HalfPrecision(WireCodec):
    """Two bytes a number."""

    precision: ClassVar[str]

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the nearest numbers of two bytes."""
        return {"values": _flat(tensor, floating=True).to(getattr(torch, self.precision))}

    def decode(
        self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Return the numbers in the receiver's dtype."""
        return parts["values"].to(dtype, copy=True).reshape(tuple(shape))

    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Return two bytes a number, whatever it had."""
        return math.prod(shape) * 2


@dataclass(frozen=True)
class Float16(_HalfPrecision):
    """IEEE half precision: 11 bits of precision; beyond 65504 a number becomes infinite."""

    precision: ClassVar[str] = "float16"


@dataclass(frozen=True)
class BFloat16(_HalfPrecision):
    """Brain float: 8 bits of precision and the range of fp32."""

    precision: ClassVar[str] = "bfloat16"


@dataclass(frozen=True)
class Int8(WireCodec):
    """Whole multiples, -127 to 127, of a row's absmax / 127; a vector is one row.

    The fp32 absmax is sent rather than the step: the largest entry then arrives exactly, and a
    second round trip changes nothing. A row that holds NaN or infinity arrives as NaN throughout,
    and so does one beyond the range of fp32.
    """

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return one int8 a number and one fp32 a row."""
        rows = _flat(tensor, floating=True).float().reshape(*_rows(tensor.shape))
        ratios, absmax = _over_absmax(rows)
        codes = (ratios * 127).round().to(torch.int8)
        return {"codes": codes.reshape(-1), "absmax": absmax}

    def decode(
        self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Return code / 127 times absmax."""
        codes, absmax = parts["codes"].reshape(*_rows(shape)).float(), parts["absmax"].unsqueeze(1)
        # by a tensor: CUDA divides by a number through its reciprocal, which rounds once more
        rows = codes / absmax.new_full((1,), 127.0) * absmax
        return rows.to(dtype).reshape(tuple(shape))

    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Return a byte a number and four a row."""
        return math.prod(shape) + _FP32_BYTES * _rows(shape)[0]


@dataclass(frozen=True)
class NormalFloat4(WireCodec):
    """The nearest of 16 levels times the fp32 absmax of its block of 64; of two as near, the lower.

    A block runs over the flat tensor, past the ends of rows. One that holds NaN or infinity arrives
    as NaN throughout, and so does one beyond the range of fp32.
    """

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return one uint8 for two numbers, the first in the high bits, and one fp32 a block."""
        count = tensor.numel()
        blocks = _filled_up(_flat(tensor, floating=True).float(), NF4_BLOCK).reshape(-1, NF4_BLOCK)
        ratios, absmax = _over_absmax(blocks)
        levels = ratios.new_tensor(NF4_LEVELS)
        # a ratio on a boundary belongs to the level below it
        nearest = torch.bucketize(ratios, (levels[1:] + levels[:-1]) / 2)
        codes = _filled_up(nearest.reshape(-1)[:count].to(torch.uint8), 2)
        return {"codes": codes[0::2] << 4 | codes[1::2], "absmax": absmax}

    def decode(
        self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Return level times absmax."""
        packed, absmax = parts["codes"], parts["absmax"]
        codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: math.prod(shape)]
        scale = absmax.repeat_interleave(NF4_BLOCK)[: math.prod(shape)]
        return (absmax.new_tensor(NF4_LEVELS)[codes.long()] * scale).to(dtype).reshape(tuple(shape))

    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Return half a byte a number, rounded up, and four a block."""
        count = math.prod(shape)
        return math.ceil(count / 2) + _FP32_BYTES * math.ceil(count / NF4_BLOCK)


@dataclass(frozen=True)
class TopK(WireCodec):
    """The entries of largest magnitude as fp32, with where they are; all others arrive as 0.

    An entry costs 8 bytes, so a share of 0.5 saves nothing on fp32. Of equal magnitudes the first
    in the flat tensor goes first; NaN counts as infinite. A tensor has fewer than 2**31 entries.
    """

    needs_reference: ClassVar[bool] = True

    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of the entries of each tensor, rounded up: at least one is sent."""

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return places in rising order as int32, and the values there."""
        flat, kept = _flat(tensor, floating=True), self._kept(tensor.shape)
        magnitude = flat.abs().nan_to_num(nan=math.inf, posinf=math.inf)
        places = torch.arange(0, device=flat.device)
        if kept:
            smallest = magnitude.topk(kept, sorted=False).values.amin()
            # topk alone may pick any of several equal entries
            above = (magnitude > smallest).nonzero().reshape(-1)
            equal = (magnitude == smallest).nonzero().reshape(-1)
            places = torch.cat([above, equal[: kept - len(above)]]).sort().values
        return {"places": places.to(torch.int32), "values": flat[places].float()}

    def decode(
        self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Return the values where they belong, and 0 elsewhere."""
        values = parts["values"]
        whole = torch.zeros(math.prod(shape), dtype=dtype, device=values.device)
        whole[parts["places"].long()] = values.to(dtype)
        return whole.reshape(tuple(shape))

    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Return eight bytes an entry that is kept."""
        return self._kept(shape) * (_FP32_BYTES + _INT32_BYTES)

    def _kept(self, shape: Sequence[int]) -> int:
        # as it is written: in binary, 0.07 of 100 would be a little more than 7 and round up to 8
        return math.ceil(Fraction(repr(float(self.share))) * math.prod(shape))


def _flat(tensor: Tensor, *, floating: bool = False) -> Tensor:
    """Return the numbers in a row, without their gradient."""
    if floating and not tensor.is_floating_point():
        raise TypeError(
            f"a tensor of {tensor.dtype} cannot be rounded on its way; send it by"
            " `codec_for(codec, tensor.dtype)`, which leaves whole numbers as they are"
        )
    return tensor.detach().reshape(-1)


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    """Return how many rows there are and how long they are; an empty tensor has no rows."""
    count = math.prod(shape)
    rows = (shape[0] if len(shape) > 1 else 1) if count else 0
    return rows, count // max(rows, 1) or 1


def _filled_up(flat: Tensor, multiple: int) -> Tensor:
    """Return the numbers with zeros behind them up to a multiple of some length."""
    return torch.cat([flat, flat.new_zeros(-len(flat) % multiple)])


def _over_absmax(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row over its largest magnitude, and that; a row that is not finite becomes 0."""
    absmax = rows.abs().amax(dim=1)
    # 0 / 0 in a row of zeros is to be 0. Beside NaN or infinity all ratios are 0 or NaN; as 0 they
    # arrive as NaN, for 0 times either is NaN
    return (rows / absmax.unsqueeze(1)).nan_to_num(nan=0.0), absmax
