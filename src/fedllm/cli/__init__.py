"""The command line; importing it brings no torch along."""

import gc

from fedllm.starting import uncollected

with uncollected():
    from fedllm.cli.app import app, main

    gc.freeze()  # modules stay to the end; no later search need walk over them

__all__ = ["app", "main"]
