"""What happens to updates between a client's link and the algorithm."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedllm.errors import TrainingError
from fedllm.federation import BaseClient, ClientId, Job, Part, Update
from fedllm.federation.privacy import ClientPrivacy
from fedllm.federation.robust import Mean, Robust
from fedllm.federation.transport import Transport
from fedllm.federation.validation import reject_reason

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reception:
    """Codecs, validation, robust aggregation and privacy, in this order."""

    transport: Transport = field(default_factory=Transport)
    max_norm: float | None = None
    """Largest norm of a client's change; None for any."""
    robust: Robust = field(default_factory=Mean)
    privacy: ClientPrivacy | None = None

    def receive(self, update: Update, job: Job, client: BaseClient) -> tuple[Update, int, str]:
        """Return an update as it arrives, its bytes, and why it is rejected (empty: it is not)."""
        arrived, nbytes = self.transport.send_up(update, job)
        start = job.payload.adapter
        expected = {name: start[name] for name in start if client.shared(name, job)}
        reason = reject_reason(arrived, job, expected, self.max_norm) or ""
        if reason:
            at = update.metrics.get("diverged_at")
            reason += "" if at is None else f" (not finite from local step {int(at)} on)"
            logger.warning("round %d: rejected: %s", job.version + 1, reason)
        return arrived, nbytes, reason

    def parts(
        self,
        parts: Sequence[Part],
        jobs: Mapping[ClientId, Job],
        rejected: Sequence[Mapping[str, object]],
        cohort_size: int,
    ) -> list[Part]:
        """Return what the algorithm aggregates.

        Args:
            parts: The updates that were accepted.
            jobs: Client to the job it has answered.
            rejected: The others, for the message.
            cohort_size: How many clients were asked.

        Raises:
            TrainingError: If every update of the cohort was rejected, or what clients sent cannot
                be compared.
        """
        if not parts:
            raise TrainingError(_all_rejected(rejected))
        given = list(jobs.values())
        try:
            kept = self.robust(parts, given)
            if self.privacy is None:
                return kept
            return self.privacy.parts(kept, given, parts[0].update.version, cohort_size)
        except ValueError as error:
            raise TrainingError(
                f"updates.robust or updates.privacy is not defined for what clients sent: {error}."
                " Take it out, or have all clients train the same tensors"
            ) from error


def _all_rejected(rejected: Sequence[Mapping[str, object]]) -> str:
    ordered = sorted(rejected, key=lambda row: str(row["client"]))
    reasons = [str(row["reason"]) for row in ordered[:3]]
    more = f"; and {len(rejected) - 3} more" if len(rejected) > 3 else ""
    return (
        f"the server rejected every update of the round: {'; '.join(reasons)}{more}. Lower"
        " training.learning_rate or set training.max_grad_norm, check the data with `fedllm check`,"
        " and see whether updates.max_norm is too small"
    )
