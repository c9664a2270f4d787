"""The world of realistic mode, put together from devices, links and availability."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from fedllm.config import SystemConfig
from fedllm.seeding import derive
from fedllm.system.availability import Window, leaves_after_s, windows_of
from fedllm.system.cost import ModelCost
from fedllm.system.devices import Device, Devices
from fedllm.system.links import Links
from fedllm.system.world import Work

_KNOWN = 4096
"""Clients whose devices and links are remembered."""


class SimulatedWorld:
    """Implements `World` from a configuration; a client costs no memory.

    Args:
        config: Devices, links, availability.
        cost: What training costs a device.
        seed: Root of all draws.

    Raises:
        ConfigError: If a file that the configuration names cannot be read.
    """

    def __init__(self, config: SystemConfig, cost: ModelCost, seed: int) -> None:
        self.config, self.cost = config, cost
        self.seed = derive(seed, "world")
        self.devices = Devices.of(config.devices, self.seed)
        self.links = Links.of(config.links, self.seed, config.correlation)
        self._windows = windows_of(config.availability, self.seed)
        self._has_dropout = bool(config.dropout.per_job or config.dropout.per_hour)
        self.device = lru_cache(_KNOWN)(self.devices.device)
        self._place = lru_cache(_KNOWN)(self._placed)
        self.cell = lru_cache(_KNOWN)(self.links.cell)

    @property
    def presence(self) -> float:
        """About which share of the clients is there at any time."""
        return self._windows.presence

    def window(self, cid: int, time_s: float) -> Window | None:
        """Return the first availability window that ends after `time_s`."""
        return self._windows.window(cid, time_s)

    def windows(self, cids: Sequence[int], time_s: float) -> Iterable[Window | None]:
        """Return the same of several clients."""
        return self._windows.windows(cids, time_s)

    def fit_s(self, cid: int, work: Work) -> float:
        """Return the seconds that local training takes."""
        device: Device = self.device(cid)
        seconds = self.cost.fit_s(
            work, device.flops_per_s, device.bytes_per_s, self.config.devices.overhead_s
        )
        return self.config.time_scale * seconds

    def download_s(self, cid: int, nbytes: int, time_s: float, sharing: int) -> float:
        """Return the seconds that receiving takes."""
        place, scale = self._place(cid), self.config.time_scale
        return scale * self.links.transfer_s("down", cid, place, nbytes, time_s, sharing)

    def upload_s(self, cid: int, nbytes: int, time_s: float, sharing: int) -> float:
        """Return the seconds that sending takes."""
        place, scale = self._place(cid), self.config.time_scale
        return scale * self.links.transfer_s("up", cid, place, nbytes, time_s, sharing)

    def drops_after_s(self, cid: int, job: int, busy_s: float) -> float:
        """Return after how many seconds of work a client leaves."""
        if not self._has_dropout:
            return float("inf")
        return leaves_after_s(self.config.dropout, self.seed, cid, job, busy_s)

    def energy_j(self, cid: int, train_s: float, download_s: float, upload_s: float) -> float:
        """Return the joules that so many seconds cost."""
        device: Device = self.device(cid)
        return device.train_w * train_s + device.transmit_w * (download_s + upload_s)

    def link_name(self, cid: int) -> str:
        """Return the name of a client's link."""
        return self.links.names[self._place(cid)[0]]

    def _placed(self, cid: int) -> tuple[int, float]:
        return self.links.place(cid, self.devices.quantile(cid))
