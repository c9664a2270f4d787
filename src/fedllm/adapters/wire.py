"""What travels between server and clients is packed by a codec, chosen by name from a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fedllm.adapters.wire_formats import AsIs, WireCodec
from fedllm.errors import ConfigError, did_you_mean, unknown
from fedllm.registry import Entry, Table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FORMATS = "fedllm.adapters.wire_formats"
WIRE = Table(
    "codec",
    {
        "fp32": Entry(f"{_FORMATS}:AsIs", "as it is: lossless"),
        "fp16": Entry(f"{_FORMATS}:Float16", "half precision; beyond 65504 infinite"),
        "bf16": Entry(f"{_FORMATS}:BFloat16", "half the bytes with the range of fp32"),
        "int8": Entry(f"{_FORMATS}:Int8", "a byte a number, an absmax a row"),
        "nf4": Entry(f"{_FORMATS}:NormalFloat4", "4 bits a number, an absmax for 64 (QLoRA)"),
        "topk": Entry(f"{_FORMATS}:TopK", "the largest entries of a change, with error feedback"),
    },
)


def make(name: str, /, **settings: Any) -> WireCodec:
    """Return a codec.

    >>> make("int8").nbytes((4, 8), itemsize=4)
    48
    >>> make("topk", share=0.25).nbytes((4, 8), itemsize=4)
    64

    Raises:
        ConfigError: If the name or a setting is wrong.
    """
    wrong = problems(name, settings)
    if wrong:
        raise ConfigError(wrong)
    codec: WireCodec = WIRE.load(name)(**settings)
    return codec


def problems(name: str, settings: Mapping[str, Any], where: str = "codec") -> list[str]:
    """Return what is wrong with a codec's name and settings, one sentence each.

    >>> problems("topk", {"share": 2.0})
    ['codec.share: input should be less than or equal to 1 (got 2.0)']

    Args:
        name: A name of the table.
        settings: The keys beside the name.
        where: The place in the configuration, for messages.
    """
    if name not in WIRE:
        return [f"{where}: {unknown(WIRE.kind, name, WIRE)}"]
    cls = WIRE.load(name)
    hints = get_type_hints(cls, include_extras=True)
    known = [f.name for f in fields(cls)]
    wrong = []
    for key, value in settings.items():
        if key not in known:
            has = f" '{name}' has: {', '.join(known)}" if known else f" '{name}' has no settings"
            wrong.append(f"{where}.{key}: unknown key.{did_you_mean(key, known) or has}")
            continue
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            wrong.append(f"{where}.{key}: {error.errors()[0]['msg'].lower()} (got {value!r})")
    return wrong


def codec_for(codec: WireCodec, dtype: torch.dtype) -> WireCodec:
    """Return the codec by which tensors of a dtype travel: whole numbers must not be rounded."""
    return codec if dtype.is_floating_point else AsIs()


def send_change(
    codec: WireCodec, change: Mapping[str, Tensor], residual: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what arrives of a change, and what its sender still owes (error feedback).

    What a codec drops is added to the next change, so the sum of all that was sent differs from the
    sum of all changes by the last residual alone (EF-SGD, Karimireddy et al., arXiv:1901.09847).
    A change that is not finite spoils the residual: whoever refuses one keeps the residual before.

    Args:
        codec: Any; a lossless one owes nothing.
        change: Name to change of the tensor. Best in fp32: the residual has its dtype.
        residual: What was owed before. Names that are missing owe nothing; names that are not in
            the change this time stay owed. Neither is modified.

    Raises:
        ValueError: If a residual has another shape than the change of its name.
    """
    sent, owed = {}, dict(residual)
    for name, tensor in change.items():
        before = residual.get(name)
        if before is not None and before.shape != tensor.shape:
            raise ValueError(
                f"'{name}' is {tuple(tensor.shape)} and its residual {tuple(before.shape)};"
                " drop the residual when a tensor takes another shape"
            )
        total = tensor.detach() if before is None else tensor.detach() + before
        sent[name] = codec_for(codec, total.dtype).round_trip(total)
        owed[name] = total - sent[name]
    return sent, owed
