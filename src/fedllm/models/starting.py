"""What makes a start quick: no package that is not needed, no search for garbage in imports."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Let bitsandbytes look as if it were not installed, inside the block.

    PEFT imports it on import and when it wraps a layer, whether or not anything is quantised,
    and it draws in torch's compiler: two seconds, a fifth of the time to the first step. None in
    `sys.modules` is Python's own sign for "not to be found", which `import` and `find_spec` heed.
    Afterwards it can be imported as ever, and PEFT looks for it anew. If it is imported already,
    nothing is done. What stays is that `peft.helpers`, if imported inside, cannot measure
    condition numbers of quantised layers, which we never ask for.
    """
    name = "bitsandbytes"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # as the import system allows
    try:
        yield
    finally:
        sys.modules.pop(name, None)
        # PEFT remembers what it found
        checks = sys.modules.get("peft.import_utils")
        for check in ("is_bnb_available", "is_bnb_4bit_available"):
            forget = getattr(getattr(checks, check, None), "cache_clear", None)
            if forget is not None:
                forget()


@contextmanager
def uncollected() -> Iterator[None]:
    """Search for no garbage inside the block, for imports and loading.

    Both make millions of objects that stay, and Python walks over all of them again and again in
    search of cycles: a tenth of the time to the first step. Memory is freed as ever when the last
    reference goes; only cycles wait for the end of the block.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def import_peft() -> None:
    """Import PEFT ahead of transformers' trainer, which would import it with bitsandbytes."""
    with without_bitsandbytes():
        import peft  # noqa: F401
