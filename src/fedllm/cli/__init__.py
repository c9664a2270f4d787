"""The command line; importing it brings no torch along."""

from fedllm.starting import uncollected

with uncollected():
    from fedllm.cli.app import app, main

__all__ = ["app", "main"]
