"""Finding the clients that a schedule asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedllm.federation import BaseServer, ClientId
from fedllm.seeding import rng
from fedllm.simulation.fleet import Fleet
from fedllm.simulation.schedules import Order, Schedule
from fedllm.simulation.selection import Chosen, Selection
from fedllm.simulation.tiers import Tiers


@dataclass
class Recruiter:
    """Draws clients for orders, from the random stream that the schedule names."""

    server: BaseServer
    schedule: Schedule
    fleet: Fleet
    selection: Selection
    tiers: Tiers | None = None
    """Made when they are first needed."""

    def recruit(self, order: Order, now_s: float) -> list[Chosen]:
        """Return the clients of an order, with their windows."""
        schedule, seed = self.schedule, self.selection.seed
        if schedule.is_in_order and self.server.is_random_cohort:
            walked, chosen = self.selection.walk(schedule.walked, now_s, schedule.is_reshuffled)
            schedule.walked = walked
            return chosen
        name = schedule.stream_name(order.group, self.server.version, self.fleet.dispatched)
        return self.selection.choose(
            self.server,
            order.size,
            now_s,
            rng(seed, *name),
            self._is_free(order.group),
        )

    def _is_free(self, group: int) -> Callable[[ClientId], bool] | None:
        """Return what tells who may be sent for; None: everyone, because nobody is at work."""
        if self.schedule.tiers > 1:
            tiers = self._divided()
            return lambda cid: tiers.of(cid) == group
        if self.schedule.is_stream:
            waiting = {update.cid for update in self.schedule.groups[group].arrived}
            return lambda cid: cid not in self.fleet and cid not in waiting
        return None

    def _divided(self) -> Tiers:
        if self.tiers is None:
            pool, seed = self.selection.pool, self.selection.seed
            self.tiers = Tiers.found(self.schedule.tiers, pool, seed, self.fleet.pace_s)
        return self.tiers
