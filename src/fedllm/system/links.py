"""How fast a client's link is, and for how long a transfer takes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from fedllm.config import LinkProfile, LinksConfig
from fedllm.config.profiles import INFINITE, LINKS, MEASURED, TRACE
from fedllm.errors import ConfigError
from fedllm.seeding import rng, uniform
from fedllm.system.draws import Choice, correlated, normal
from fedllm.system.traces.own_format import recorded

Way = Literal["up", "down"]
_KILOBYTE = 1024.0
"""FLASH divides model bytes by 1024 before it divides by these speeds."""


class Measured(NamedTuple):
    """Means and deviations of a measured link, in kB/s."""

    down: float
    down_sigma: float
    up: float
    up_sigma: float


@dataclass(frozen=True)
class Links:
    """Draws each client's link from (seed, client), the slowest at small numbers."""

    kinds: tuple[LinkProfile | Measured | None, ...]
    """None is an infinitely fast one."""
    names: tuple[str, ...]
    choice: Choice
    config: LinksConfig
    seed: int
    correlation: float = 0.0

    @classmethod
    def of(cls, config: LinksConfig, seed: int, correlation: float = 0.0) -> Links:
        """Return the links of a configuration.

        Raises:
            ConfigError: If the measured links cannot be read.
        """
        found: list[tuple[str, LinkProfile | Measured | None, float]] = []
        for name, weight in config.of.items():
            if name == MEASURED and config.measured is not None:
                links = read_measured(config.measured)
                found += [(name, link, weight / len(links)) for link in links]
            elif name == TRACE and config.trace is not None:
                traced = read_links(config.trace)
                found += [(name, link, weight / len(traced)) for link in traced]
            elif name == INFINITE:
                found.append((name, None, weight))
            else:
                found.append((name, config.profiles.get(name) or LINKS[name], weight))
        found.sort(key=lambda row: (_mean_mbps(row[1]), row[0]))
        choice = Choice(tuple(weight for *_, weight in found))
        kinds, names = tuple(kind for _, kind, _ in found), tuple(name for name, *_ in found)
        return cls(kinds, names, choice, config, seed, correlation)

    @cached_property
    def is_instant(self) -> bool:
        """Whether no transfer takes any time."""
        return all(kind is None for kind in self.kinds)

    def place(self, cid: int, device_quantile: float) -> tuple[int, float]:
        """Return the kind of a client's link, and where within its rates the client is."""
        u = uniform(self.seed, "link", cid)
        if self.correlation:
            u = correlated(device_quantile, u, self.correlation)
        return self.choice.draw(u)

    def cell(self, cid: int) -> int | None:
        """Return the cell whose rate a client shares."""
        cells = self.config.cells
        return None if cells is None else int(uniform(self.seed, "cell", cid) * cells)

    def transfer_s(
        self, way: Way, cid: int, place: tuple[int, float], nbytes: int, time_s: float, sharing: int
    ) -> float:
        """Return how long a transfer takes that begins at a virtual time; none, for nothing."""
        kind = self.kinds[place[0]]
        if kind is None or not nbytes:
            return 0.0
        interval = int(time_s // self.config.interval_s)
        if isinstance(kind, Measured):
            return nbytes * sharing / (_KILOBYTE * self._speed(way, kind, cid, interval))
        rates = kind.uplink_mbps if way == "up" else kind.downlink_mbps
        mbps = (rates.low + place[1] * (rates.high - rates.low)) * (1.0 - kind.loss)
        if self.config.variation:
            u = uniform(self.seed, "link rate", way, cid, interval)
            mbps *= math.exp(self.config.variation * normal(u))
        delay_ms = kind.latency_ms
        if kind.jitter_ms:
            instant = f"{time_s:.6f}"  # each transfer has its own
            delay_ms += kind.jitter_ms * uniform(self.seed, "jitter", way, cid, instant)
        return delay_ms / 1e3 + nbytes * sharing * 8.0 / (mbps * 1e6)

    def _speed(self, way: Way, kind: Measured, cid: int, interval: int) -> float:
        """Draw a speed in kB/s, again while it is not positive, as FLASH does."""
        stream = rng(self.seed, "measured link", way, cid, interval)
        mean, sigma = (kind.up, kind.up_sigma) if way == "up" else (kind.down, kind.down_sigma)
        while (speed := float(stream.normal(mean, sigma))) <= 0.0:
            continue
        return speed


def _mean_mbps(kind: LinkProfile | Measured | None) -> float:
    if kind is None:
        return math.inf
    if isinstance(kind, Measured):
        return kind.down * _KILOBYTE * 8.0 / 1e6
    return (kind.downlink_mbps.low + kind.downlink_mbps.high) / 2.0


def read_links(path: Path) -> list[LinkProfile]:
    """Return the links of a trace in our own format.

    Raises:
        ConfigError: If it is no such trace, or tells no link with both rates.
    """
    links = []
    for told in recorded(path, "system.links.trace").links.values():
        if told.get("up_bps") and told.get("down_bps"):
            links.append(
                LinkProfile.model_validate(
                    {
                        "uplink_mbps": told["up_bps"] / 1e6,
                        "downlink_mbps": told["down_bps"] / 1e6,
                        "latency_ms": 1e3 * told.get("rtt_s", 0.0),
                        "loss": told.get("loss", 0.0),
                    }
                )
            )
    if not links:
        raise ConfigError([f"system.links.trace: {path} tells no link with up_bps and down_bps"])
    return links


def read_measured(path: Path) -> list[Measured]:
    """Return the links of a file as FLASH publishes them: id to means and deviations in kB/s.

    Raises:
        ConfigError: If the file is no such table.
    """
    where = "system.links.measured"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        links = [
            Measured(row["down_u"], row["down_sigma"], row["up_u"], row["up_sigma"])
            for row in table.values()
        ]
    except FileNotFoundError:
        raise ConfigError([f"{where}: there is no file {path}; check the path"]) from None
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ConfigError(
            [
                f"{where}: {path} is no table of down_u, down_sigma, up_u and up_sigma for each"
                f" link: {type(error).__name__} {error}"
            ]
        ) from None
    if not links or any(link.down <= 0 or link.up <= 0 for link in links):
        raise ConfigError([f"{where}: {path} needs at least one link, and positive mean speeds"])
    return links
