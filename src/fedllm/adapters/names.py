"""The names of adapter tensors: `<module>.lora_A`, `<module>.lora_B`, and full tensors as they are.

`<module>` is the dotted name of the adapted layer in the Hugging Face model. A tensor that is
trained in full (a classification head) keeps the name it has there. Nothing outside this package
spells `lora_A` out.
"""

from __future__ import annotations

_A = ".lora_A"
_B = ".lora_B"


def name_a(module: str) -> str:
    """Return the name of the down-projection of a module."""
    return module + _A


def name_b(module: str) -> str:
    """Return the name of the up-projection of a module."""
    return module + _B


def is_a(name: str) -> bool:
    """Tell whether this is a down-projection A (r, in)."""
    return name.endswith(_A)


def is_b(name: str) -> bool:
    """Tell whether this is an up-projection B (out, r)."""
    return name.endswith(_B)


def is_head(name: str) -> bool:
    """Tell whether this is a tensor trained in full, such as a classification head."""
    return not (is_a(name) or is_b(name))


def module_of(name: str) -> str:
    """Return the module a low-rank factor belongs to.

    >>> module_of("model.layers.0.self_attn.q_proj.lora_A")
    'model.layers.0.self_attn.q_proj'
    """
    return name.removesuffix(_A).removesuffix(_B)
