"""The package's log in a run directory, while a run goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from fedllm.results.run_dir import RunDir

logger = logging.getLogger(__name__)


@contextmanager
def logging_to(directory: RunDir) -> Iterator[None]:
    """Write the package's log into a run's log.txt, and the error that ends the block, if any."""
    handler = logging.FileHandler(directory.path / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    package = logging.getLogger("fedllm")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    except Exception:
        logger.exception("the run was stopped by an error")
        raise
    finally:
        package.removeHandler(handler)
        handler.close()
