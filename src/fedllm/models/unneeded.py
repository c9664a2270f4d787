"""Optional packages that libraries import because they are there, not because they are needed."""

from __future__ import annotations

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


def import_peft() -> None:
    """Import PEFT ahead of transformers' trainer, which would import all it can find."""
    with without_bitsandbytes():
        import peft  # noqa: F401
