"""Greedy generation for many prompts at once, each under its client's adapter."""

from __future__ import annotations

from collections.abc import Iterator
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


def generate(
    resident: Resident,
    active: Active,
    tokens: TokenSet,
    rows: np.ndarray,
    owners: np.ndarray,
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[dict[int, str]]:
    """Yield the answers to the prompts of some rows at a time, each up to its end of turn.

    Prompts are batched by length, so little is padded; a sequence that has ended leaves the batch.

    Args:
        resident: The model.
        active: Adapters, one a client.
        tokens: The test rows; the first `prompt_lengths` tokens of each are its prompt.
        rows: int (n,): which rows.
        owners: int (n,): the client of each row.
        max_new_tokens: Longest answer.
        batch_size: Prompts at once.
    """
    order = np.argsort(tokens.prompt_lengths[rows], kind="stable")
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        part = part[np.argsort(owners[part], kind="stable")]
        yield _Batch(resident, active, tokens, rows[part], owners[part]).run(max_new_tokens)


class _Batch:
    """Prompts padded on the left, and the cache they share."""

    def __init__(
        self,
        resident: Resident,
        active: Active,
        tokens: TokenSet,
        rows: np.ndarray,
        owners: np.ndarray,
    ) -> None:
        self.resident, self.active = resident, active
        self.rows, self.owners = rows, owners
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
        written: dict[int, list[int]] = {int(row): [] for row in self.rows}
        ids = self.ids
        for _ in range(max_new_tokens):
            token = self._next(ids, place)
            is_end = torch.isin(token, self.stops)
            for row, value, end in zip(self.rows, token.tolist(), is_end.tolist(), strict=True):
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
        self.active.by_token = ()
        self.active.by_sequence = segments(self.owners, np.ones_like(self.owners))
        with self.resident.using(self.active):
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
        chosen = index.cpu().numpy()
        self.rows, self.owners = self.rows[chosen], self.owners[chosen]
        self.cache.batch_select_indices(index)
        self.mask, self.lengths = self.mask[index], self.lengths[index]
        return token[index]
