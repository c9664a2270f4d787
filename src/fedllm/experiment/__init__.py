"""Composition: from a configuration to a run directory."""

from fedllm.experiment.configure import check_config, load_config, make_config

__all__ = ["check_config", "load_config", "make_config"]
