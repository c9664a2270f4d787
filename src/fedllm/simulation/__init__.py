"""The event loop."""

from fedllm.simulation.events import ClientState, Event, EventKind, EventQueue
from fedllm.simulation.loop import Loop, Population, Round
from fedllm.simulation.reception import Reception
from fedllm.simulation.schedules import Sync

__all__ = [
    "ClientState",
    "Event",
    "EventKind",
    "EventQueue",
    "Loop",
    "Population",
    "Reception",
    "Round",
    "Sync",
]
