"""The names of adapter tensors: a path through a layer, and which of its tensors it is.

    <layer>[:<slot>]<kind>      model.layers.0.self_attn.q_proj.lora_A
                                model.layers.0.self_attn.q_proj:local.lora_B

A *layer* is the dotted name of the adapted layer in the Hugging Face model. It may carry several
low-rank *paths* side by side (a global and a local adapter, several experts); each has a slot, the
plain one an empty one. Kinds: `.lora_A` (r, in), `.lora_B` (out, r), `.core` (r, r) between them,
`.gain` () on a path, `.router` (slots, in) that weighs the paths of a layer, `.values` (n,) of a
sparse change and `.index` (n,), where they are. A tensor trained in full (a classification head)
keeps the name it has in the model, with `:<slot>` behind it if need be. What a client or server
keeps beside the model (control variates) is a note, `~<kind>/<name>`.

Nothing outside this package spells a kind out.
"""

from __future__ import annotations

_A, _B = ".lora_A", ".lora_B"
_CORE, _GAIN, _ROUTER = ".core", ".gain", ".router"
_VALUES, _INDEX = ".values", ".index"
_KINDS = (_A, _B, _CORE, _GAIN, _ROUTER, _VALUES, _INDEX)
_PATH_KINDS = (_A, _B, _CORE, _GAIN)


def _split(name: str) -> tuple[str, str]:
    """Return path and kind; the kind of a head is empty."""
    stem, dot, last = name.rpartition(".")
    kind = dot + last
    return (stem, kind) if kind in _KINDS else (name, "")


def name_a(path: str) -> str:
    """Return the name of the down-projection of a path."""
    return path + _A


def name_b(path: str) -> str:
    """Return the name of the up-projection of a path."""
    return path + _B


def name_core(path: str) -> str:
    """Return the name of the square matrix between B and A (RAVAN)."""
    return path + _CORE


def name_gain(path: str) -> str:
    """Return the name of the scalar on a path (RAVAN)."""
    return path + _GAIN


def name_router(layer: str) -> str:
    """Return the name of a layer's router."""
    return layer + _ROUTER


def name_values(layer: str) -> str:
    """Return the name of the values of a layer's sparse change."""
    return layer + _VALUES


def name_index(layer: str) -> str:
    """Return the name of the places of a layer's sparse change, flat in (out, in)."""
    return layer + _INDEX


def is_a(name: str) -> bool:
    """Tell whether this is a down-projection A (r, in)."""
    return name.endswith(_A)


def is_b(name: str) -> bool:
    """Tell whether this is an up-projection B (out, r)."""
    return name.endswith(_B)


def is_core(name: str) -> bool:
    """Tell whether this is the matrix between B and A."""
    return name.endswith(_CORE)


def is_gain(name: str) -> bool:
    """Tell whether this is the scalar on a path."""
    return name.endswith(_GAIN)


def is_router(name: str) -> bool:
    """Tell whether this is a router."""
    return name.endswith(_ROUTER)


def is_values(name: str) -> bool:
    """Tell whether these are the values of a sparse change."""
    return name.endswith(_VALUES)


def is_index(name: str) -> bool:
    """Tell whether these are the places of a sparse change: integers, never trained."""
    return name.endswith(_INDEX)


def is_head(name: str) -> bool:
    """Tell whether this is a tensor trained in full, such as a classification head."""
    return not _split(name)[1] and not is_note(name)


def is_on_path(name: str) -> bool:
    """Tell whether the tensor belongs to a low-rank path: A, B, core or gain."""
    return _split(name)[1] in _PATH_KINDS and not is_note(name)


def module_of(name: str) -> str:
    """Return the path a tensor belongs to, slot included; a head's own name.

    >>> module_of("model.layers.0.self_attn.q_proj:local.lora_A")
    'model.layers.0.self_attn.q_proj:local'
    """
    return _split(name)[0]


def layer_of(name: str) -> str:
    """Return the layer of a tensor or path, without slot and kind.

    >>> layer_of("model.layers.0.self_attn.q_proj:local.lora_A")
    'model.layers.0.self_attn.q_proj'
    """
    return _split(name)[0].partition(":")[0]


def slot_of(name: str) -> str:
    """Return the slot of a tensor or path; empty for the plain one.

    >>> slot_of("q_proj:local.lora_A"), slot_of("q_proj.lora_A"), slot_of("score.weight:own")
    ('local', '', 'own')
    """
    return _split(name)[0].partition(":")[2]


def in_slot(name: str, slot: str) -> str:
    """Return the same tensor's or path's name in another slot; "" is the plain one.

    >>> in_slot("q_proj.lora_A", "local"), in_slot("q_proj:local", ""), in_slot("score.weight", "x")
    ('q_proj:local.lora_A', 'q_proj', 'score.weight:x')
    """
    path, kind = _split(name)
    layer = path.partition(":")[0]
    return f"{layer}:{slot}{kind}" if slot else layer + kind


def note(kind: str, name: str) -> str:
    """Return the name of a tensor that is kept or sent beside the model.

    >>> note("control", "q_proj.lora_A")
    '~control/q_proj.lora_A'
    """
    return f"~{kind}/{name}"


def is_note(name: str) -> bool:
    """Tell whether a tensor is kept beside the model and never part of it."""
    return name.startswith("~")
