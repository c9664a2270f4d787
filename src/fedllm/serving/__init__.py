"""A trained model behind a prompt or an HTTP interface: many adapters, one base, one batch."""

from fedllm.serving.sources import Source, find_source, with_adapters

__all__ = ["Source", "find_source", "with_adapters"]
