"""Greedy generation for many prompts at once, each under its client's adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from fedllm.engine.lora import Active
from fedllm.engine.packing import segments
from fedllm.engine.resident import Resident

if TYPE_CHECKING:
    from fedllm.data import TokenSet


@dataclass(frozen=True)
class Asked:
    """Rows of a token set with the adapters they are asked under."""

    active: Active
    """Adapters, one a client."""
    rows: np.ndarray
    """int (n,): which rows."""
    owners: np.ndarray
    """int (n,): the client of each row."""
    mix: Mapping[str, np.ndarray]
    """Slot to the weight of its paths for each row, float (n,)."""

    def at(self, chosen: np.ndarray) -> Asked:
        """Return some of the rows, by their place or as a mask."""
        mix = {slot: weights[chosen] for slot, weights in self.mix.items()}
        return Asked(self.active, self.rows[chosen], self.owners[chosen], mix)

    def weigh(self, device: torch.device) -> None:
        """Hand the weights of these rows to the layers."""
        self.active.mix = {
            slot: torch.from_numpy(weights.astype(np.float32)).to(device)
            for slot, weights in self.mix.items()
        }


def generate(
    resident: Resident,
    asked: Asked,
    tokens: TokenSet,
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[dict[int, str]]:
    """Yield the answers to the prompts of some rows at a time, each up to its end of turn.

    Prompts are batched by length, so little is padded; a sequence that has ended leaves the batch.

    Args:
        resident: The model.
        asked: The rows and their adapters.
        tokens: The test rows; the first `prompt_lengths` tokens of each are its prompt.
        max_new_tokens: Longest answer.
        batch_size: Prompts at once.
    """
    order = np.argsort(tokens.prompt_lengths[asked.rows], kind="stable")
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        part = part[np.argsort(asked.owners[part], kind="stable")]
        yield _Batch(resident, asked.at(part), tokens).run(max_new_tokens)


class _Batch:
    """Prompts padded on the left, and the cache they share."""

    def __init__(self, resident: Resident, asked: Asked, tokens: TokenSet) -> None:
        self.resident, self.asked = resident, asked
        rows = asked.rows
        lengths = tokens.prompt_lengths[rows]
        longest = int(lengths.max())
        visible = np.arange(longest)[None, :] >= longest - lengths[:, None]
        ids = np.full(visible.shape, resident.forward.pad_id, dtype=np.int64)
        begin = tokens.offsets[rows]
        for i, (first, length) in enumerate(zip(begin, lengths, strict=True)):
            ids[i, longest - length :] = tokens.tokens[first : first + length]
        device = resident.device
        self.ids = torch.from_numpy(ids).to(device)
        self.mask = torch.from_numpy(visible.astype(np.int64)).to(device)
        self.lengths = torch.from_numpy(lengths.astype(np.int64)).to(device)
        self.stops = torch.tensor(resident.stop_ids, device=device)
        self.cache = DynamicCache(config=resident.model.config)

    @torch.no_grad()
    def run(self, max_new_tokens: int) -> dict[int, str]:
        """Extend all sequences token by token until each has ended."""
        place = (self.mask.cumsum(1) - 1).clamp_(min=0)
        written: dict[int, list[int]] = {int(row): [] for row in self.asked.rows}
        ids = self.ids
        for _ in range(max_new_tokens):
            token = self._next(ids, place)
            is_end = torch.isin(token, self.stops)
            for row, value, end in zip(
                self.asked.rows, token.tolist(), is_end.tolist(), strict=True
            ):
                if not end:
                    written[int(row)].append(value)
            if bool(is_end.all()):
                break
            if bool(is_end.any()):
                token = self._drop(~is_end, token)
            place = self.lengths[:, None]
            self.lengths = self.lengths + 1
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
            ids = token[:, None]
        decode = self.resident.tokenizer.decode
        return {
            row: str(decode(ids, skip_special_tokens=True)).strip() for row, ids in written.items()
        }

    def _next(self, ids: Tensor, place: Tensor) -> Tensor:
        active, owners = self.asked.active, self.asked.owners
        active.by_token, active.sequence_lengths = (), ()
        active.by_sequence = segments(owners, np.ones_like(owners))
        self.asked.weigh(self.resident.device)
        with self.resident.using(active):
            out = self.resident.model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=place + self.resident.forward.offset,
                past_key_values=self.cache,
                use_cache=True,
                **({"logits_to_keep": 1} if self.resident.forward.keeps_logits else {}),
            )
        choice: Tensor = out.logits[:, -1].argmax(dim=-1)
        return choice

    def _drop(self, keep: Tensor, token: Tensor) -> Tensor:
        """Let the sequences that have ended leave the batch."""
        index = keep.nonzero().squeeze(1)
        self.asked = self.asked.at(index.cpu().numpy())
        self.cache.batch_select_indices(index)
        self.mask, self.lengths = self.mask[index], self.lengths[index]
        return token[index]
