"""What fine-tuning a language model costs a device: operations, bytes and memory, by its shapes.

No clock is asked: the same model on the same device takes the same time everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedllm.system.world import Work

WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.5}
"""Bytes of a frozen weight; scales of quantised blocks (about 3 % more) are left out."""
_TRAINED_BYTES = 16
"""fp32 parameter, gradient and two moments of AdamW."""
_STEP_BYTES = 28
"""Read parameter, gradient and moments, write parameter and moments."""
_ACTIVATION_BYTES = 2
_LOGIT_BYTES = 12
"""Logits in fp32, their softmax and its gradient."""


@dataclass(frozen=True)
class ModelCost:
    """A language model with adapters, as far as its cost goes."""

    body_parameters: int
    """Frozen parameters that every token is multiplied with."""
    table_parameters: int
    """Of the embedding and, where it is another, the output matrix."""
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    rank_parameters: int
    """Of an adapter of rank 1: sum of (out + in) over the adapted layers."""
    head_parameters: int = 0
    """Trained in full, whatever the rank."""
    supervised: float = 1.0
    """Share of the tokens that logits are needed for."""
    length: float = 1.0
    """Mean tokens of a sequence."""
    batch_tokens: float = 1.0
    """Tokens that lie in memory at once: of one batch, padding not counted."""
    forward_passes: int = 0
    """Over the same tokens without a gradient, beside each pass with one: DPO and KTO ask the base,
    and KTO scores mismatched answers."""
    precision: Literal["fp32", "bf16", "int8", "nf4"] = "bf16"
    checkpointing: bool = False

    def step_flops(self, tokens: float, rank: int) -> float:
        """Return the operations of one optimiser step over so many tokens.

        A frozen weight takes 2 a token forward and 2 backward, none for its own gradient; an
        adapter 2 and 4; the output matrix counts where a token is supervised. Attention takes
        2 x length x hidden a token and layer forward (a causal mask halves it), twice that
        backward. Checkpointing does the forward pass of the body once more. Passes without a
        gradient are forward ones; that some go without the adapter is left out.
        """
        again = 1 if self.checkpointing else 0
        body = (4 + 2 * again) * self.body_parameters
        adapter = 6 * self.trained(rank)
        attention = (3 + again) * 2 * self.layers * self.length * self.hidden
        output = 4 * self.vocabulary * self.hidden * self.supervised
        trained = body + adapter + attention + output
        forward = (
            2 * (self.body_parameters + self.trained(rank))
            + 2 * self.layers * self.length * self.hidden
            + output / 2
        )
        return tokens * (trained + self.forward_passes * forward)

    def step_bytes(self, rank: int) -> float:
        """Return the bytes that one step moves at least: weights once a pass, and the optimiser."""
        passes = (3 if self.checkpointing else 2) + self.forward_passes
        weights = self.body_parameters * WEIGHT_BYTES[self.precision]
        return passes * weights + _STEP_BYTES * self.trained(rank)

    def fixed_bytes(self) -> float:
        """Return the memory that does not depend on the rank: weights, activations, logits."""
        weights = self.body_parameters + self.table_parameters
        per_layer = 10 * self.hidden + 4 * self.intermediate
        if self.checkpointing:
            kept = self.layers * self.hidden + per_layer  # one layer at a time is whole
        else:
            kept = self.layers * per_layer
        logits = _LOGIT_BYTES * self.vocabulary * self.supervised
        activations = self.batch_tokens * (kept * _ACTIVATION_BYTES + logits)
        return weights * WEIGHT_BYTES[self.precision] + activations

    def memory_bytes(self, rank: int) -> float:
        """Return the memory that training at a rank takes."""
        return self.fixed_bytes() + _TRAINED_BYTES * self.trained(rank)

    def trained(self, rank: int) -> int:
        """Return the parameters that are trained."""
        return rank * self.rank_parameters + self.head_parameters

    def fit_s(
        self, work: Work, flops_per_s: float, bytes_per_s: float, overhead_s: float = 0.0
    ) -> float:
        """Return the seconds of local training at these rates, whichever of the two is slower."""
        computing = self.step_flops(work.tokens_per_step, work.rank) / flops_per_s
        moving = self.step_bytes(work.rank) / bytes_per_s
        return work.steps * work.passes * (max(computing, moving) + overhead_s)
