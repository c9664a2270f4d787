"""The world of realistic mode: devices, links and availability of the clients, all in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, PositiveFloat, Tag, model_validator

from fedllm.config.section import Section
from fedllm.errors import did_you_mean

Share = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Hour = Annotated[float, Field(ge=0.0, le=24.0)]


TimeZones = Annotated[list[Annotated[float, Field(ge=-12.0, le=14.0)]], Field(min_length=1)]


class DeviceProfile(Section):
    """A kind of device, by the figures of its data sheet and what it reaches of them."""

    tflops: PositiveFloat
    """Peak of matrix products in the precision that is trained in, in 10^12 operations a second."""
    utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Share of that peak, and of the memory's, that training reaches."""
    memory_gb: PositiveFloat
    """Memory that training may use, in 10^9 bytes."""
    bandwidth_gb_s: PositiveFloat
    """Of that memory, in 10^9 bytes a second."""
    train_w: NonNegative = 0.0
    """Watts while training."""
    transmit_w: NonNegative = 0.0
    """Watts while receiving or sending."""


class Range(Section):
    """Drawn evenly from an interval, once for each client."""

    low: PositiveFloat
    high: PositiveFloat

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}; exchange them")
        return self


def _range(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"low": value, "high": value}
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return {"low": value[0], "high": value[1]}
    return value


Rate = Annotated[Range, BeforeValidator(_range)]
"""A number, `[low, high]`, or the mapping."""


class LinkProfile(Section):
    """A kind of link."""

    downlink_mbps: Rate
    """Rate towards the client, in 10^6 bits a second: a number or `[low, high]`."""
    uplink_mbps: Rate
    """Rate towards the server."""
    latency_ms: NonNegative = 0.0
    """Before the first byte arrives."""
    jitter_ms: NonNegative = 0.0
    """Up to so much is added to the latency, drawn for each transfer."""
    loss: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of packets that is sent again: the rate is multiplied by 1 - loss."""


def _weights(value: Any) -> Any:
    if isinstance(value, str):
        return {value: 1.0}
    if isinstance(value, (list, tuple)):
        return dict.fromkeys(value, 1.0)
    return value


Mixture = Annotated[dict[str, PositiveFloat], Field(min_length=1), BeforeValidator(_weights)]
"""A name, a list of names (each as likely), or a mapping of names to weights."""


class DevicesConfig(Section):
    """What clients train on."""

    of: Mixture = Field(default_factory=lambda: {"infinite": 1.0})
    """Names of profiles, see the reference; each client draws one by weight."""
    profiles: dict[str, DeviceProfile] = Field(default_factory=dict)
    """Profiles of your own, by name."""
    spread: NonNegative = 0.0
    """Clients of one profile differ in speed by a lognormal factor of this standard deviation."""
    overhead_s: NonNegative = 0.0
    """Seconds that every optimiser step takes besides its arithmetic."""
    precision: Literal["fp32", "bf16", "int8", "nf4"] = "bf16"
    """In which the frozen weights lie in memory."""
    checkpointing: bool = False
    """Keep no activations inside layers, and compute them once more: slower, with less memory."""
    too_small: Literal["error", "exclude"] = "error"
    """What happens to clients whose device cannot hold the training: the run is refused, or goes
    on without them."""
    trace: Path | None = None
    """A trace with capacities: `of` may then name `trace`, devices as fast against `phone-mid` as
    their relative speed says, with the memory that is told."""
    ai_benchmark: Path | None = None
    """A list of phones as AI-Benchmark publishes it (JSON): `of` may then name `ai-benchmark`, the
    phones of that list, as fast as their FP16 score says."""


class LinksConfig(Section):
    """How clients and server reach each other."""

    of: Mixture = Field(default_factory=lambda: {"infinite": 1.0})
    """Names of profiles, see the reference; each client draws one by weight."""
    profiles: dict[str, LinkProfile] = Field(default_factory=dict)
    """Profiles of your own, by name."""
    variation: NonNegative = 0.0
    """Rates change over time by a lognormal factor of this standard deviation."""
    interval_s: PositiveFloat = 600.0
    """Virtual seconds after which that factor is drawn anew."""
    cells: Annotated[int, Field(ge=1)] | None = None
    """Clients are spread over so many cells, and transfers that go on at once in a cell share its
    rate; absent: nobody shares."""
    trace: Path | None = None
    """A trace with links: `of` may then name `trace`, links of its rates."""
    measured: Path | None = None
    """Measured links as FLASH publishes them (JSON: means and deviations in kB/s): `of` may then
    name `measured`; each client has one of them, and each interval draws its rates."""


class Always(Section):
    """Clients are there all the time."""

    kind: Literal["always"] = "always"
    """Name of the kind."""


class Intermittent(Section):
    """Clients come and go."""

    kind: Literal["intermittent"]
    """Name of the kind."""
    on_s: PositiveFloat = 3600.0
    """Mean seconds of a window."""
    off_s: PositiveFloat = 3600.0
    """Mean seconds between windows."""
    distribution: Literal["exponential", "constant", "lognormal"] = "exponential"
    """Of both; the lognormal has a standard deviation of 1 in the logarithm."""


class Diurnal(Section):
    """Clients are there at some hours of their day."""

    kind: Literal["diurnal"]
    """Name of the kind."""
    start_hour: Hour = 22.0
    """Local hour at which the window of a day opens."""
    hours: Annotated[float, Field(gt=0.0, lt=24.0)] = 8.0
    """Mean length of a window; each differs by up to a quarter."""
    spread_hours: Annotated[float, Field(ge=0.0, le=6.0)] = 1.0
    """Each opening differs by up to so much."""
    chance: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Probability that a client comes on a working day."""
    weekend_chance: Share | None = None
    """Probability on a Saturday or Sunday; absent: as on a working day."""
    time_zones: TimeZones = Field(default_factory=lambda: [0.0])
    """Hours ahead of UTC; each client draws one."""
    start_weekday: Annotated[int, Field(ge=0, le=6)] = 0
    """Weekday on which virtual time begins at 0:00 UTC; 0 is a Monday."""


class Traced(Section):
    """Clients are there as traces say."""

    kind: Literal["trace"]
    """Name of the kind."""
    path: Path
    """A trace in our own format; `fedllm trace import` makes one of others."""
    assignment: Literal["drawn", "in-order"] = "drawn"
    """Each client draws a trace, or client k has trace k, and after the last the first again."""


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return f"kind={value.get('kind', '')}"
    return f"kind={getattr(value, 'kind', value)}"


def _of_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Availability = Annotated[
    Annotated[Always, Tag("kind=always")]
    | Annotated[Intermittent, Tag("kind=intermittent")]
    | Annotated[Diurnal, Tag("kind=diurnal")]
    | Annotated[Traced, Tag("kind=trace")],
    Discriminator(_kind),
    BeforeValidator(_of_kind),
]


class DropoutConfig(Section):
    """Clients that leave in the middle of their work."""

    per_job: Share = 0.0
    """Probability that a client leaves during a job, at an even draw of its time."""
    per_hour: NonNegative = 0.0
    """Rate at which clients leave while they work, in expected departures an hour."""


class SystemConfig(Section):
    """What `sys.yaml` holds, or `system:` in the configuration."""

    preset: str | None = None
    """A whole world by its name (see `fedllm list worlds`); what is given beside it takes the place
    of its part."""
    devices: DevicesConfig = Field(default_factory=DevicesConfig)
    links: LinksConfig = Field(default_factory=LinksConfig)
    availability: Availability = Field(default_factory=Always)
    """`always`, or a mapping with `kind`: `intermittent`, `diurnal` or `trace`."""
    dropout: DropoutConfig = Field(default_factory=DropoutConfig)
    time_scale: PositiveFloat = 1.0
    """Training and transfers take so many times as long: a small model stands for a larger one."""
    correlation: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.0
    """Of the speeds of devices and links: at 1 the slowest device has the slowest link."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, tree: Any) -> Any:
        """Lay what is given over the parts of the preset."""
        from fedllm.config.worlds import WORLDS

        if not isinstance(tree, Mapping) or tree.get("preset") is None:
            return tree
        name = tree["preset"]
        if name not in WORLDS:
            raise ValueError(_unknown("preset", str(name), WORLDS))
        return {**WORLDS[name], **tree}

    @model_validator(mode="after")
    def _known_names(self) -> SystemConfig:
        from fedllm.config.profiles import (
            AI_BENCHMARK,
            DEVICES,
            INFINITE,
            LINKS,
            MEASURED,
            TRACE,
        )

        devices, links = self.devices, self.links
        extra = [AI_BENCHMARK] if devices.ai_benchmark else []
        extra += [TRACE] if devices.trace else []
        _check_names("devices.of", devices.of, [INFINITE, *DEVICES, *devices.profiles, *extra])
        extra = [MEASURED] if links.measured else []
        extra += [TRACE] if links.trace else []
        _check_names("links.of", links.of, [INFINITE, *LINKS, *links.profiles, *extra])
        return self


def _check_names(where: str, chosen: Iterable[str], known: Sequence[str]) -> None:
    for name in chosen:
        if name not in known:
            raise ValueError(_unknown(where, name, known))


def _unknown(where: str, name: str, known: Iterable[str]) -> str:
    hint = did_you_mean(name, known) or f" Known: {', '.join(known)}"
    return f"{where}: no such name '{name}'.{hint}"
