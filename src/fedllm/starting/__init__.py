"""What makes a start quick: no package that is not needed, nothing looked up twice."""

from fedllm.starting.imports import (
    import_peft,
    import_transformers,
    import_trl,
    uncollected,
    without_bitsandbytes,
)

__all__ = [
    "import_peft",
    "import_transformers",
    "import_trl",
    "uncollected",
    "without_bitsandbytes",
]
