"""The world of realistic mode: devices, links and availability of the clients."""

from __future__ import annotations

from fedllm.config.section import Section


class SystemConfig(Section):
    """What `sys.yaml` holds, or `system:` in the configuration."""
