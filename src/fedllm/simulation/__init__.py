"""The event loop."""

from fedllm.simulation.events import NOBODY, ClientState, Event, EventKind, EventQueue
from fedllm.simulation.flights import Awaited, Flight
from fedllm.simulation.loop import Loop
from fedllm.simulation.population import Population
from fedllm.simulation.reception import Reception
from fedllm.simulation.record import Diary, Round
from fedllm.simulation.schedules import Group, Schedule, SemiSync, Sequential, Sync
from fedllm.simulation.streams import Async, Buffered

STATE_TYPES = (Awaited, ClientState, Diary, Event, EventKind, Flight, Group)
"""What the state of a loop is made of besides the federation's own types."""

__all__ = [
    "NOBODY",
    "STATE_TYPES",
    "Async",
    "Awaited",
    "Buffered",
    "ClientState",
    "Diary",
    "Event",
    "EventKind",
    "EventQueue",
    "Flight",
    "Group",
    "Loop",
    "Population",
    "Reception",
    "Round",
    "Schedule",
    "SemiSync",
    "Sequential",
    "Sync",
]
