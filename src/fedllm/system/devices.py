"""Which device a client has, and what it can do."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fedllm.config import DeviceProfile, DevicesConfig
from fedllm.config.profiles import AI_BENCHMARK, DEVICES, INFINITE, TRACE
from fedllm.errors import ConfigError
from fedllm.seeding import uniform
from fedllm.system.draws import Choice, normal
from fedllm.system.traces.own_format import recorded

_PIXEL_4_SCORE = 33289.0
"""AI-Benchmark score of the phone that scores are compared with."""
_PIXEL_4_TFLOPS = 1.9
"""fp16 peak of its GPU (Adreno 640)."""


class Device(NamedTuple):
    """What one client's device can do."""

    name: str
    flops_per_s: float
    bytes_per_s: float
    memory_bytes: float
    train_w: float
    transmit_w: float


INFINITE_DEVICE = Device(INFINITE, math.inf, math.inf, math.inf, 0.0, 0.0)


@dataclass(frozen=True)
class Devices:
    """Draws each client's device from (seed, client), the slowest at small numbers."""

    kinds: tuple[Device, ...]
    choice: Choice
    spread: float
    seed: int

    @classmethod
    def of(cls, config: DevicesConfig, seed: int) -> Devices:
        """Return the devices of a configuration.

        Raises:
            ConfigError: If the list of phones cannot be read.
        """
        found: list[tuple[Device, float]] = []
        for name, weight in config.of.items():
            if name == AI_BENCHMARK and config.ai_benchmark is not None:
                phones = read_ai_benchmark(config.ai_benchmark)
                found += [(phone, weight / len(phones)) for phone in phones]
            elif name == TRACE and config.trace is not None:
                traced = read_capacities(config.trace)
                found += [(device, weight / len(traced)) for device in traced]
            elif name == INFINITE:
                found.append((INFINITE_DEVICE, weight))
            else:
                profile = config.profiles.get(name) or DEVICES[name]
                found.append((_device(name, profile), weight))
        found.sort(key=lambda pair: (pair[0].flops_per_s, pair[0].name))
        weights = tuple(weight for _, weight in found)
        return cls(tuple(device for device, _ in found), Choice(weights), config.spread, seed)

    def quantile(self, cid: int) -> float:
        """Return where among all devices a client's is, the slowest at 0."""
        return uniform(self.seed, "device", cid)

    def device(self, cid: int) -> Device:
        """Return a client's device."""
        kind = self.kinds[self.choice.draw(self.quantile(cid))[0]]
        if not self.spread:
            return kind
        factor = math.exp(self.spread * normal(uniform(self.seed, "device speed", cid)))
        return kind._replace(
            flops_per_s=kind.flops_per_s * factor, bytes_per_s=kind.bytes_per_s * factor
        )


def _device(name: str, profile: DeviceProfile) -> Device:
    return Device(
        name=name,
        flops_per_s=profile.tflops * 1e12 * profile.utilization,
        bytes_per_s=profile.bandwidth_gb_s * 1e9 * profile.utilization,
        memory_bytes=profile.memory_gb * 1e9,
        train_w=profile.train_w,
        transmit_w=profile.transmit_w,
    )


def read_ai_benchmark(path: Path) -> Sequence[Device]:
    """Return the phones of an AI-Benchmark list, rows with `Model`, `RAM` and `FP16_Score`.

    A phone is as fast as its FP16 score says against the Pixel 4's, and may use half of its RAM;
    bandwidth and watts are those of `phone-mid`. Rows without a score or RAM are passed over.

    Raises:
        ConfigError: If the file is no such list.
    """
    base = DEVICES["phone-mid"]
    phones = []
    for row in _rows(path):
        score, ram = _number(row.get("FP16_Score")), _number(row.get("RAM"))
        if score and ram:
            tflops = _PIXEL_4_TFLOPS * score / _PIXEL_4_SCORE
            profile = base.model_copy(update={"tflops": tflops, "memory_gb": ram / 2})
            phones.append(_device(str(row.get("Model", "phone")), profile))
    if not phones:
        raise ConfigError(
            [f"system.devices.ai_benchmark: {path} has no row with FP16_Score and RAM"]
        )
    return phones


def read_capacities(path: Path) -> Sequence[Device]:
    """Return the devices of a trace in our own format, as fast as they are told to be.

    `flops_per_s` is taken as what is reached in training; the rest is `phone-mid`'s.

    Raises:
        ConfigError: If it is no such trace, or tells no capacity.
    """
    base = DEVICES["phone-mid"]
    record = recorded(path, "system.devices.trace")
    devices = []
    for name, told in record.capacities.items():
        tflops = base.tflops * told.get("relative_speed", 1.0)
        memory = told.get("memory_bytes", base.memory_gb * 1e9) / 1e9
        profile = base.model_copy(update={"tflops": tflops, "memory_gb": memory})
        device = _device(f"trace {name}", profile)
        devices.append(device._replace(flops_per_s=told.get("flops_per_s", device.flops_per_s)))
    if not devices:
        raise ConfigError([f"system.devices.trace: {path} tells no capacity of a client"])
    return devices


def _rows(path: Path) -> list[dict[str, Any]]:
    where = "system.devices.ai_benchmark"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"{where}: there is no file {path}; check the path"]) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"{where}: {path} cannot be read: {error}"]) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError([f"{where}: {path} is no list of rows, as AI-Benchmark publishes it"])
    return rows


def _number(text: Any) -> float:
    """Return the number that a cell begins with; 0 if it does not begin with one."""
    digits = ""
    for letter in str(text or "").strip():
        if not (letter.isdigit() or (letter == "." and "." not in digits)):
            break
        digits += letter
    return float(digits) if digits.strip(".") else 0.0
