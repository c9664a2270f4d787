"""ILoRA: factors begin at the QR of the weights, and the average product is factored by QR again.

Paper: Zhou et al., "ILoRA: Federated Learning with Low-Rank Adaptation for Heterogeneous Client
       Aggregation", arXiv:2511.16069.
Box:   Q R = qr(W): B = Q[:, :r], A = R[:r], on the base W - s B A for the whole run;
       dW = sum_k p_k s_k B_k A_k,  Q R = qr(dW): client of rank q gets B = Q[:, :q], A = R[:q] / s;
       gradients are corrected by c - c_k, c_k the full gradient at the download.
Fields: the shifted base is W and the frozen path `shift` of scaling -s; c travels as an extra.
Evidence: authors' code read, which leaves s_k out of dW (right only if all are equal), divides
summed batch means by n and rescales the start. A QR cut off is no best fit: `split: svd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedllm.adapters import algebra, factoring, slot_of
from fedllm.federation import ClientId, ControlClient, ControlServer, Job, MixedRank, Part, weighted


@dataclass(kw_only=True)
class Server(ControlServer):
    """Factors the average product by QR."""

    mixed_rank: ClassVar[MixedRank] = "projected"
    recoordinated: ClassVar[str] = "its factors come out of a QR every round"
    late = "products"
    split: Literal["qr", "svd"] = "qr"
    """How the average product is factored."""
    controls: bool = True
    """Correct the drift of clients by control variates."""

    def prepare(self) -> None:
        """Begin at the QR of the weights, with the base shifted by it."""
        self.adapter = factoring.qr_start(self.adapter, self.weight_of, "shift")
        if self.controls:
            super().prepare()

    def is_known(self, name: str, cid: ClientId) -> bool:
        """The shift follows from the base."""
        return slot_of(name) == "shift" or super().is_known(name, cid)

    def aggregate(self, parts: Sequence[Part]) -> None:
        """Factor the average product; average heads and move c."""
        products = algebra.mean_products([(w, a.body) for w, a in weighted(parts)])
        split = factoring.qr_split if self.split == "qr" else algebra.refactor
        factors = split(products, self.ranks.largest, self.adapter.scaling)
        self.adapter = self.adapter.overlaid(factors)
        self.average_heads(parts)
        self.renew(parts)


class Client(ControlClient):
    """Trains A, B and the head, and sends all of them."""

    def trainable(self, name: str, job: Job) -> bool:
        """The shift is frozen."""
        return slot_of(name) != "shift" and super().trainable(name, job)
