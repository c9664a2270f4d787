"""The command line; importing it brings no torch along."""

import gc
import os

from fedllm.starting import uncollected

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # it would look through all packages

with uncollected():
    from fedllm.cli.app import app, main

    gc.freeze()  # modules stay to the end; no later search need walk over them

__all__ = ["app", "main"]
