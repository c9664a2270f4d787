"""Devices and links that the package knows by name, with where their figures come from.

Peaks and memories are those of the makers' data sheets, in the precision that one would train in.
What a data sheet does not tell is an assumption of ours: the share of the peak that training
reaches, the watts of phones, and all of the links but their downlink rates.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedllm.config.system import DeviceProfile, LinkProfile

_BOARD = 0.3
_SERVER = 0.4
"""Shares of the peak: what fine-tuning in bf16 is commonly seen to reach. Assumptions."""


def _device(
    tflops: float, memory: float, bandwidth: float, watts: float, sending: float, share: float
) -> DeviceProfile:
    return DeviceProfile(
        tflops=tflops,
        memory_gb=memory,
        bandwidth_gb_s=bandwidth,
        train_w=watts,
        transmit_w=sending,
        utilization=share,
    )


def _relative(factor: float) -> DeviceProfile:
    """Return a Jetson TX2 that takes so many times as long; its memory is no obstacle."""
    return _device(1.33 / factor, 1e3, 1e6, 15.0, 5.0, _BOARD)


DEVICES: Mapping[str, DeviceProfile] = {
    # Raspberry Pi 5 product brief: four Cortex-A76 at 2.4 GHz, 8 GB of LPDDR4X-4267 (32 bits);
    # two 128-bit FMA units a core make 16 fp32 operations a cycle
    "raspberry-pi-5": _device(0.154, 8.0, 17.1, 10.0, 4.0, 0.5),
    # NVIDIA Jetson modules' data sheets: fp16, dense (without sparsity), highest power mode
    "jetson-nano": _device(0.472, 4.0, 25.6, 10.0, 4.0, _BOARD),
    "jetson-tx2": _device(1.33, 8.0, 59.7, 15.0, 5.0, _BOARD),
    "jetson-orin-nano": _device(10.0, 8.0, 68.0, 15.0, 5.0, _BOARD),
    "jetson-agx-orin": _device(42.5, 64.0, 204.8, 60.0, 10.0, _BOARD),
    # phones: fp16 peak of the GPU from clock and lanes as published by reviewers, memory from the
    # makers; training may use half of it; watts are what a case can give off for long
    "phone-low": _device(0.5, 2.0, 14.9, 3.0, 1.5, 0.2),  # Adreno 610 class, 4 GB
    "phone-mid": _device(1.8, 4.0, 25.6, 4.0, 1.5, 0.2),  # Adreno 644 class, 8 GB
    "phone-high": _device(5.5, 6.0, 76.8, 6.0, 2.0, 0.2),  # Adreno 750 class, 12 GB
    "iphone-15-pro": _device(4.3, 4.0, 51.2, 6.0, 2.0, 0.2),  # Apple A17 Pro, 8 GB
    # Apple M2, technical specifications: 3.6 TFLOP/s of fp32, 16 GB, 100 GB/s
    "laptop": _device(3.6, 12.0, 100.0, 20.0, 3.0, _BOARD),
    # NVIDIA Ada whitepaper: 165 TFLOP/s of bf16 with fp32 accumulation, dense
    "rtx-4090": _device(165.2, 24.0, 1008.0, 450.0, 20.0, _SERVER),
    # NVIDIA A100 80 GB SXM and H100 SXM data sheets, bf16, dense
    "a100": _device(312.0, 80.0, 2039.0, 400.0, 20.0, _SERVER),
    "h100": _device(989.4, 80.0, 3350.0, 700.0, 20.0, _SERVER),
    # FedLLM-Factory's relative training times of TX2, Nano and Raspberry Pi, from a CNN benchmark
    "paper-tx2": _relative(1.0),
    "paper-nano": _relative(1.8125),
    "paper-rpi": _relative(11.625),
}
"""Name to profile."""

LINKS: Mapping[str, LinkProfile] = {
    # ranges that the published reference (through AFL-Lib) draws from, there in both directions;
    # uplinks, latency, jitter and loss are assumptions
    "wifi": LinkProfile(
        downlink_mbps=(150, 600), uplink_mbps=(75, 300), latency_ms=5, jitter_ms=5, loss=0.01
    ),
    "4g": LinkProfile(
        downlink_mbps=(20, 100), uplink_mbps=(5, 25), latency_ms=50, jitter_ms=30, loss=0.02
    ),
    "5g": LinkProfile(
        downlink_mbps=(50, 1000), uplink_mbps=(15, 150), latency_ms=20, jitter_ms=10, loss=0.01
    ),
    "wired": LinkProfile(downlink_mbps=(500, 1000), uplink_mbps=(500, 1000), latency_ms=2),
}
"""Name to profile."""

INFINITE = "infinite"
"""Of devices and links that take no time and no energy."""
AI_BENCHMARK = "ai-benchmark"
MEASURED = "measured"
TRACE = "trace"
