"""Whether an export does what was trained: logits beside logits, weight beside weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedllm.errors import ModelError
from fedllm.models import base_hash
from fedllm.weights import few

if TYPE_CHECKING:
    from torch import Tensor

    from fedllm.models import Kind

PROMPTS = (
    "Tom has 3 apples and buys 4 more. How many apples does Tom have?",
    "Translate into French: the weather is fine today.",
    "def add(a, b):",
    "Once upon a time",
)
"""Asked where no test rows are at hand."""
TOLERANCE: Mapping[str, float] = {
    "float32": 1e-4,
    "float16": 2e-2,
    "bfloat16": 1e-1,
    "q8_0": 1e-1,
}
"""Largest difference of logits, as a share of the largest logit, that rounding may make."""


@dataclass(frozen=True)
class Verified:
    """What a verification found."""

    prompts: int
    difference: float
    """Largest difference of a logit between adapter and export."""
    share: float
    """The same as a share of the largest logit."""
    effect: float
    """Largest difference of a logit that the training made."""
    modules: int
    """Layers that were targeted; the weight of each has changed."""


def check_base(model: Any, kind: Kind, recorded: str | None, source: str) -> None:
    """Refuse a base model that is not the one an adapter was trained on.

    Args:
        model: The base as loaded, before anything is put onto it.
        kind: What it does.
        recorded: The hash that the adapter came with; None where it came without.
        source: Where the base came from, for the message.

    Raises:
        ModelError: If the hash differs, in whichever format the training held the weights.
    """
    if recorded is None or recorded == base_hash(model, kind):
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if base_hash(model, kind, dtype) == recorded:
            return
    raise ModelError(
        f"'{source}' is not the base model that the adapter was trained on: its weights have"
        f" another hash than the recorded {recorded[:12]}.... Give that model (put"
        " it where the adapter names it; eval and export take --base MODEL, too); on another one"
        " the adapter means nothing"
    )


def logits_of(model: Any, prompts: Iterable[Sequence[int]]) -> list[Tensor]:
    """Return the logits (tokens, vocabulary) of each prompt, or (1, classes), in fp32."""
    found = []
    with torch.no_grad():
        for ids in prompts:
            tokens = torch.tensor([list(ids)], device=model.device)
            found.append(model(input_ids=tokens).logits[0].float().cpu())
    return found


def compare(
    adapted: Sequence[Tensor],
    exported: Sequence[Tensor],
    plain: Sequence[Tensor] | None,
    *,
    dtype: str,
    modules: int,
) -> Verified:
    """Compare logits of base and adapter with those of the export.

    Args:
        adapted: Of the base with the adapter beside it.
        exported: Of what was written, loaded again.
        plain: Of the base alone; None where there is no such.
        dtype: In which the export is stored.
        modules: How many layers were targeted.

    Raises:
        ModelError: If they differ by more than rounding, or the export is nearer to the base.
    """
    away = [a - e for a, e in zip(adapted, exported, strict=True)]
    difference = max(float(d.abs().max()) for d in away)
    share = difference / max(max(float(a.abs().max()) for a in adapted), 1e-12)
    effect = 0.0
    if not share <= TOLERANCE[dtype]:
        raise ModelError(
            "verification failed: the export's logits differ from the adapter's by"
            f" {difference:.3g}, {share:.1%} of the largest; {dtype} explains"
            f" {TOLERANCE[dtype]:.2%}. Nothing was written. Try --dtype float32"
        )
    if plain is not None:
        moved = [a - p for a, p in zip(adapted, plain, strict=True)]
        effect = max(float(m.abs().max()) for m in moved)
        if not _size(away) < 0.5 * _size(moved):
            raise ModelError(
                f"verification failed: rounding to {dtype} moves the logits by {difference:.3g},"
                f" about as far as the training did ({effect:.3g}), so the export would behave like"
                " the base model. Nothing was written. Use --dtype float32, or export the adapter"
            )
    return Verified(len(adapted), difference, share, effect, modules)


def check_changed(
    before: Mapping[str, Tensor], weight_of: Callable[[str], Tensor], dtype: torch.dtype
) -> None:
    """Require that the weight of every targeted layer has changed.

    Args:
        before: Layer to its weight in the base model.
        weight_of: Returns the weight of a layer after the merge.
        dtype: In which the export is stored.

    Raises:
        ModelError: If one has not.
    """
    same = [
        layer
        for layer, weight in before.items()
        if torch.equal(weight.to(dtype).float().cpu(), weight_of(layer).float().cpu())
    ]
    if same:
        raise ModelError(
            f"verification failed: {len(same)} of {len(before)} targeted layers have the base's"
            f" weights after the merge ({few(same)}). Either they were not trained, or"
            f" {str(dtype).removeprefix('torch.')} is too coarse for what was learned: then use"
            " --dtype float32. Nothing was written"
        )


def _size(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))
