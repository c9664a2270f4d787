"""Silence for transformers while it loads: what it would say, our errors say better."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back transformers' warnings and progress bars inside the block, then restore both.

    The hub's own progress bars are left as they are: a download may take an hour.
    """
    verbosity = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    had_hub_bars = not are_progress_bars_disabled()
    restore_hub_bars = enable_progress_bars if had_hub_bars else disable_progress_bars
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    restore_hub_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
            restore_hub_bars()
