"""The loss of answers, with logits only where a label is."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedllm.central.examples import IGNORED
from fedllm.engine.objectives import cross_entropy
from fedllm.engine.packing import Packing

if TYPE_CHECKING:
    from fedllm.engine.forward import Forward


class AnswerLoss:
    """Next-token loss, summed and divided by the number of labels of the whole step.

    It is what TRL's trainer computes, without the entropy and accuracy that it logs beside, which
    cost a sixth of a step of a small model. Logits are made at the positions at which some row of
    the batch has a label. A batch may come as one row of all its examples, told apart by their
    `lengths`.
    """

    flat: Forward | None = None
    """What keeps examples in one row apart; None if each has a row of its own."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on a batch; activations that are not kept are computed again within it."""
        with nullcontext() if self.flat is None else self.flat.packed_attention():
            loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]  # a mixin
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, and the model's outputs if they are wanted."""
        labels = inputs["labels"]
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        kept = (following != IGNORED).any(0).nonzero().squeeze(1)
        rest = {name: value for name, value in inputs.items() if name not in ("labels", "lengths")}
        if "lengths" in inputs:
            lengths, device = np.asarray(inputs["lengths"]), labels.device
            rest["packing"] = Packing(lengths, device, is_one_batch=device.type == "cuda")
        outputs = model(**{**rest, "use_cache": False, "logits_to_keep": kept})
        targets = following[:, kept]
        is_learned = targets != IGNORED
        losses = cross_entropy(outputs.logits[is_learned], targets[is_learned])
        count = is_learned.sum() if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / torch.as_tensor(count).clamp(min=1)
        if num_items_in_batch is not None:
            # labels are counted over all processes, whose gradients are then averaged
            loss = loss * self.accelerator.num_processes  # type: ignore[attr-defined]  # a mixin
        return (loss, outputs) if return_outputs else loss


def fits(stage: str, body: Any) -> bool:
    """Tell whether a stage has this loss, and a model can be asked for some logits alone.

    Models that balance experts have a loss of their own besides, which TRL adds.
    """
    balances = getattr(body.config.get_text_config(), "output_router_logits", None) is not None
    asks = "logits_to_keep" in inspect.signature(type(body).forward).parameters
    return stage in ("sft", "pt") and asks and not balances
