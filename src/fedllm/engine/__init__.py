"""Many clients in one pass over one frozen model."""

from fedllm.engine.attach import attach
from fedllm.engine.engine import CohortEngine, clients_at_once
from fedllm.engine.resident import TOKENS_PER_PASS, Resident

__all__ = ["TOKENS_PER_PASS", "CohortEngine", "Resident", "attach", "clients_at_once"]
