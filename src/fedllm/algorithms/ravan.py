"""RAVAN: several frozen bases in a layer, and between the factors of each a small trained core.

Paper: Raje et al., "RAVAN: Multi-Head Low-Rank Adaptation", NeurIPS 2025, arXiv:2506.05568.
Box:   W + sum_j s_j B_j H_j A_j, only H_j (from 0) and the scalar s_j (from 1) trained;
       H_j <- sum_k p_k s_j^k H_j^k / sum_k p_k over the clients that trained it  (exact).
Fields: head j is the path `head<j>`, H_j its core, s_j its gain, folded in before sending.
Evidence: abstract and a detailed summary; whether absentees `hold` at H_j was not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedllm.adapters import Adapter, bases, is_core, is_gain, is_head, is_on_path
from fedllm.federation import BaseClient, BaseServer, ClientId, Count, Job, Part


@dataclass(kw_only=True)
class Server(BaseServer):
    """Averages each core over those that trained it; bases follow from the seed."""

    chosen_of: ClassVar[tuple[str, str]] = ("trained_heads", "heads")

    heads: Count = 4  # h: how many bases a layer has
    bases: Literal["gram-schmidt", "gaussian"] = "gram-schmidt"  # orthonormal, or normal
    trained_heads: Count | None = None  # in a round; None is all
    choose: Literal["random", "norm"] = "random"  # of them: by lot, or the largest cores
    absent: Literal["exclude", "hold"] = "exclude"  # does not count, or counts as H_j

    def prepare(self) -> None:
        """Replace plain LoRA by bases."""
        self.adapter = bases.with_bases(self.adapter, self.heads, self.bases, self.seed)

    def is_known(self, name: str, cid: ClientId) -> bool:
        """Only cores travel, besides the head."""
        return (is_on_path(name) and not is_core(name)) or super().is_known(name, cid)

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Average core by core."""
        now = self.adapter.select(lambda name: self.absent == "hold" and is_core(name))
        super().aggregate([Part(w, replace(u, adapter=now.joined(u.adapter))) for w, u in parts])


class Client(BaseClient):
    """Trains cores and gains of some heads, and sends the cores with the gains inside."""

    def trainable(self, name: str, job: Job) -> bool:
        """A and B are frozen, and so are heads that are not the job's."""
        is_own = bases.is_chosen(name, job.payload.adapter, job.settings, job.seed)
        return (is_own or is_head(name)) and super().trainable(name, job)

    def shared(self, name: str, job: Job) -> bool:
        """Gains stay, at 1."""
        return not is_gain(name) and super().shared(name, job)

    def finish(self, trained: Adapter, job: Job) -> Adapter:
        """Fold the gains into the cores."""
        return super().finish(bases.gains_folded(trained), job)
