"""The whole state of a loop, as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedllm.federation import MemoryStore, restore_server, server_state
from fedllm.simulation.events import EventQueue
from fedllm.simulation.tiers import Tiers

if TYPE_CHECKING:
    from fedllm.simulation.loop import Loop


def taken(loop: Loop) -> dict[str, object]:
    """Return what `put_back` needs to go on as if nothing had happened."""
    schedule, fleet, tiers = loop.schedule, loop.fleet, loop.recruiter.tiers
    return {
        "server": server_state(loop.server),
        "clock_s": loop.queue.now_s,
        "pending": loop.queue.snapshot(),
        "groups": schedule.groups,
        "made": schedule.made,
        "walked": schedule.walked,
        "awaited": fleet.awaited,
        "flights": fleet.flights,
        "dispatched": fleet.dispatched,
        "cells": fleet.cells,
        "results": loop.computation.results,
        "answered": loop.answered,
        "deadlines": loop.deadlines,
        "losses": loop.losses,
        "ended": loop.ended,
        "is_stirred": loop.is_stirred,
        "tiers": None if tiers is None else tiers.bounds,
        "kept": {cid: loop.store.get(cid) for cid in loop.store.clients()},
        "diary": loop.diary,
    }


def put_back(loop: Loop, state: Mapping[str, Any]) -> None:
    """Set a loop of the same configuration to a state that was taken."""
    restore_server(loop.server, state["server"])
    loop.queue = EventQueue(state["clock_s"], state["pending"])
    loop.store, loop.diary = MemoryStore(state["kept"]), state["diary"]
    schedule, fleet = loop.schedule, loop.fleet
    schedule.groups, schedule.made = dict(state["groups"]), dict(state["made"])
    schedule.walked = state["walked"]
    fleet.queue, fleet.store, fleet.diary = loop.queue, loop.store, loop.diary
    fleet.awaited, fleet.flights = dict(state["awaited"]), dict(state["flights"])
    fleet.dispatched, fleet.cells = state["dispatched"], dict(state["cells"])
    loop.computation.results = dict(state["results"])
    loop.answered, loop.deadlines = dict(state["answered"]), dict(state["deadlines"])
    loop.losses, loop.ended = state["losses"], state["ended"]
    loop.is_stirred = state["is_stirred"]
    if state["tiers"] is not None:
        loop.recruiter.tiers = Tiers(loop.seed, fleet.pace_s, list(state["tiers"]))
