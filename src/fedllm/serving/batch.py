"""The sequences that are decoded together, each under its own adapter, one token a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedllm.engine import Resident
from fedllm.engine.lora import Active
from fedllm.engine.packing import Segment, segments
from fedllm.errors import ModelError
from fedllm.serving.cache import RowCache
from fedllm.serving.generation import Generation


class Batch:
    """Sequences between steps; any may join or leave there.

    Args:
        resident: The base with adapter layers in place.
        active: The adapters, one a row; None if there are none.
    """

    def __init__(self, resident: Resident, active: Active | None) -> None:
        self.resident = resident
        self.active = active
        self.num_layers = int(resident.model.config.get_text_config().num_hidden_layers)
        self.rows: list[Generation] = []
        self.cache = RowCache(self.num_layers)
        self.token_bytes = self._measure()

    def _measure(self) -> int:
        """Return the bytes that a token takes in the cache.

        Raises:
            ModelError: If the model keeps something other than keys and values.
        """
        cache = RowCache(self.num_layers)
        try:
            self._forward(torch.zeros(1, 1, dtype=torch.int64), [1], [-1], cache)
            return cache.nbytes
        except Exception as error:
            # whatever a model's own code raises, it cannot be batched in this way
            raise ModelError(
                f"{type(self.resident.model).__name__} cannot be served: its cache is not one of"
                f" keys and values for each layer ({error})"
            ) from error

    @torch.inference_mode()
    def prefill(self, joining: Sequence[Generation]) -> tuple[Tensor, RowCache]:
        """Run prompts; return the logits after each, (rows, vocabulary), and their cache."""
        lengths = [len(one.prompt) for one in joining]
        longest = max(lengths)
        ids = np.full((len(joining), longest), self.resident.forward.pad_id, dtype=np.int64)
        for row, one in enumerate(joining):
            ids[row, longest - lengths[row] :] = one.prompt
        cache = RowCache(self.num_layers)
        owners = [one.adapter for one in joining]
        return self._forward(torch.from_numpy(ids), lengths, owners, cache), cache

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Run the last token of each row; return the logits after it, (rows, vocabulary)."""
        used = self.cache.used
        ids = torch.tensor([[row.tokens[-1]] for row in self.rows])
        lengths = [row.length + 1 for row in self.rows]
        try:
            return self._forward(ids, lengths, [row.adapter for row in self.rows], self.cache)
        except BaseException:
            self.cache.rewind(used)
            raise

    @torch.inference_mode()
    def settle(
        self, joined: Sequence[Generation] = (), joined_cache: RowCache | None = None
    ) -> None:
        """Let go of rows that are done, and take in those whose prompts have just been run."""
        kept = [i for i, row in enumerate(self.rows) if not row.is_done]
        if len(kept) == len(self.rows) and not joined:
            return
        rows = [*(self.rows[i] for i in kept), *joined]
        order = sorted(range(len(rows)), key=lambda i: rows[i].adapter)
        places = [0] * len(rows)
        for place, i in enumerate(order):
            places[i] = place
        other = joined_cache or RowCache(self.num_layers)
        length = max((row.length for row in rows), default=0)
        if rows:
            self.cache = self.cache.take(kept, places, other, length)
        else:
            self.cache = RowCache(self.num_layers)
        self.rows = [rows[i] for i in order]

    def clear(self) -> None:
        """Let go of all rows."""
        self.rows, self.cache = [], RowCache(self.num_layers)

    def _forward(
        self, ids: Tensor, lengths: Sequence[int], owners: Sequence[int], cache: RowCache
    ) -> Tensor:
        """Run ids (rows, new), right-aligned; `lengths` counts each row's tokens up to here."""
        resident, device = self.resident, self.resident.device
        new = ids.shape[1]
        total = cache.used + new
        size = torch.tensor(lengths)[:, None]
        column = torch.arange(total)[None, :]
        mask = (column >= total - size).to(torch.int64)
        place = (column[:, total - new :] - (total - size)).clamp_(min=0)
        last = {"logits_to_keep": 1} if resident.forward.keeps_logits else {}
        resident.slot.active = self._laid_out(owners)
        try:
            out = resident.model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=(place + resident.forward.offset).to(device),
                past_key_values=cache,
                use_cache=True,
                **last,
            )
        finally:
            resident.slot.active = None
        logits: Tensor = out.logits[:, -1]
        return logits

    def _laid_out(self, owners: Sequence[int]) -> Active | None:
        """Tell the layers which rows are whose; rows of the base come first and get no path."""
        if self.active is None or max(owners) < 0:
            return None
        found = segments(np.asarray(owners), np.ones(len(owners), dtype=np.int64))
        self.active.by_sequence = [Segment(*part) for part in found if part.row >= 0]
        self.active.by_token = ()
        self.active.is_wide = self.resident.is_wide and owners[0] >= 0
        return self.active
