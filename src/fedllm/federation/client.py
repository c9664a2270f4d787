"""The client class that an algorithm overrides: by default it trains and sends all (FedIT)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from fedllm.adapters import Adapter, is_head, is_note
from fedllm.federation.messages import FitResult, Job, Update
from fedllm.federation.protocols import Engine

if TYPE_CHECKING:
    from torch import Tensor

HeadPolicy = Literal["shared", "local", "frozen"]


class BaseClient:
    """Client side of an algorithm: behaviour only, no data, no weights, no identity.

    Args:
        head: What happens to tensors trained in full.
    """

    def __init__(self, head: HeadPolicy = "shared") -> None:
        self.head = head

    def trainable(self, name: str, job: Job) -> bool:
        """Tell whether a tensor is trained; it gets no gradient and no decay otherwise."""
        return not (is_head(name) and self.head == "frozen")

    def shared(self, name: str, job: Job) -> bool:
        """Tell whether a tensor is uploaded: by default what is trainable and not kept."""
        return self.trainable(name, job) and not self.kept(name, job)

    def kept(self, name: str, job: Job) -> bool:
        """Tell whether a tensor stays with the client: by default only a local head."""
        return is_head(name) and self.head == "local"

    def extra_names(self, job: Job) -> Iterable[str]:
        """Return the tensors beside which something else is uploaded, of the same size."""
        return ()

    def num_passes(self, job: Job, rows_per_step: int) -> float:
        """Return how many times the steps of a job are trained, for the cost model.

        A gradient over all rows counts as the part of a pass that it goes over.
        """
        return 1.0

    def penalty(self, live: Mapping[str, Tensor], job: Job) -> Tensor | None:
        """Return a differentiable term added to the task loss, from the trainable tensors."""
        return None

    def correct(self, grads: Mapping[str, Tensor], job: Job) -> Mapping[str, Tensor] | None:
        """Return changed gradients of the trainable tensors, or None to leave them."""
        return None

    def start(self, job: Job) -> Adapter:
        """Return the adapter training starts from: the download, private tensors over it."""
        return held(job.payload.adapter, job.state)

    def finish(self, trained: Adapter, job: Job) -> Adapter:
        """Return what is uploaded of the trained adapter."""
        return trained.select(lambda name: self.shared(name, job))

    async def run(self, job: Job, engine: Engine) -> Update:
        """Train once and return what is shared; what is kept goes into the private state."""
        result = await engine.fit(job, self.start(job), self)
        return self.update(result, job)

    def update(self, result: FitResult, job: Job) -> Update:
        """Divide what was trained into what is sent and what is kept."""
        kept = result.adapter.select(lambda name: self.kept(name, job))
        return Update(
            cid=job.cid,
            version=job.version,
            stage=job.stage,
            adapter=self.finish(result.adapter, job),
            num_samples=job.num_samples,
            num_steps=result.num_steps,
            state=dict(kept.tensors),
            metrics=result.metrics,
        )


def held(adapter: Adapter, state: Mapping[str, Tensor]) -> Adapter:
    """Lay private tensors over an adapter: not the notes, nor what an earlier stage kept."""
    return adapter.overlaid({name: t for name, t in state.items() if name in adapter})


def visible(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the private tensors that are part of the model, not notes beside it."""
    return {name: tensor for name, tensor in state.items() if not is_note(name)}
