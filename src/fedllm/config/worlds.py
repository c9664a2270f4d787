"""Whole worlds by name: what `system.preset` stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORLDS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "devices": {"of": ["paper-tx2", "paper-nano", "paper-rpi"]},
        "links": {"of": ["wifi", "4g", "5g"]},
        "dropout": {"per_job": 0.1},
    },
    "phones-overnight": {
        "devices": {
            "of": {"phone-low": 3, "phone-mid": 4, "phone-high": 2, "iphone-15-pro": 1},
            "spread": 0.2,
            "precision": "nf4",
            "checkpointing": True,
        },
        "links": {"of": {"wifi": 4, "5g": 1}, "variation": 0.3, "cells": 50},
        "availability": {
            "kind": "diurnal",
            "start_hour": 22,
            "hours": 7,
            "chance": 0.8,
            "time_zones": [-8, -5, 0, 1, 8, 9],
        },
        "dropout": {"per_hour": 0.05},
        "correlation": 0.5,
    },
    "hospitals": {
        "devices": {"of": {"a100": 1, "rtx-4090": 2}},
        "links": {"of": "wired"},
        "availability": "always",
    },
    "edge-boxes": {
        "devices": {
            "of": {"raspberry-pi-5": 2, "jetson-nano": 2, "jetson-tx2": 1, "jetson-orin-nano": 1},
            "spread": 0.1,
        },
        "links": {"of": {"4g": 2, "wired": 1}, "variation": 0.5},
        "availability": {"kind": "intermittent", "on_s": 14400, "off_s": 3600},
        "dropout": {"per_job": 0.02},
    },
    "cross-silo": {
        "devices": {"of": {"h100": 1, "a100": 2, "rtx-4090": 1}, "spread": 0.1},
        "links": {"of": "wired", "variation": 0.3},
        "availability": {"kind": "intermittent", "on_s": 28800, "off_s": 3600},
    },
}
"""Name to the parts of `system`."""

SUMMARIES: Mapping[str, str] = {
    "paper": "relative speeds 1, 1.8125 and 11.625, drawn links, one job in ten dropped",
    "phones-overnight": "phones of all classes on Wi-Fi at night, in six time zones",
    "hospitals": "a few servers on wired links, always there",
    "edge-boxes": "small boards on mobile or wired links, now and then away",
    "cross-silo": "data centres with GPUs of different age, wired",
}
