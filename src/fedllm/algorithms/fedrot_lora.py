"""FedRot-LoRA: clients turn their factors towards the global ones before these are averaged.

Paper: Zhang et al., "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA",
       ICML 2026, arXiv:2602.23638.
Box:   R* = argmin over SO(r) of ||R^T A_k - A|| in odd rounds, ||B_k R - B|| in even ones;
       R = polar((1 - lambda) I + lambda R*);  A_k <- R^T A_k,  B_k <- B_k R;  then FedIT.
Fields: lambda is `strength`; (A, B) is the download; round is `version`, and 0 turns nothing.
Evidence: official code read (haoran-zh/FedRot-LoRA), whose default is the hard rotation in O(r),
here `variant: released`; the paper's, here the default, is soft in SO(r). The product never
changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedllm.adapters import Adapter, alignment, lateness
from fedllm.federation import BaseClient, BaseServer, Job, MixedRank, Update


@dataclass(kw_only=True)
class Server(BaseServer):
    """Averages what clients have turned; turns late updates itself."""

    mixed_rank: ClassVar[MixedRank] = "padded"
    recoordinated: ClassVar[str] = "clients turn their factors into another basis before sending"

    strength: Annotated[float, Field(ge=0, le=1)] = 0.5
    """lambda: 0 is FedIT, 1 the rotation that fits best."""
    variant: Literal["paper", "released"] = "paper"
    """Soft rotations, or hard ones that may reflect."""

    def rebase(self, update: Update, job: Job) -> Update | None:
        """Turn a late update and its start towards today's factors, and take the change."""
        now = self.download(update.cid).adapter
        sent, start = update.adapter, job.payload.adapter.select(update.adapter.__contains__)
        late, then = (turned(one, now, self.version, vars(self)) for one in (sent, start))
        return replace(update, adapter=lateness.change_onto(late, then.tensors, now.tensors))


class Client(BaseClient):
    """Trains A, B and the head, and turns A and B before sending them."""

    def finish(self, trained: Adapter, job: Job) -> Adapter:
        """Turn towards the download."""
        sent = super().finish(trained, job)
        return turned(sent, job.payload.adapter, job.version, job.settings)


def turned(sent: Adapter, goal: Adapter, version: int, settings: Mapping[str, Any]) -> Adapter:
    """Bring A (odd versions) or B (even ones) close to the goal's; products stay."""
    if version == 0:
        return sent
    soft = settings["variant"] == "paper"
    strength = settings["strength"] if soft else 1.0
    return alignment.rotated(sent, goal, "a" if version % 2 else "b", strength, proper=soft)
