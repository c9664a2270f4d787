"""Where a model is held, and in which number format."""

from __future__ import annotations

import torch

from fedllm.errors import ModelError

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1`, `mps` into a device that is there.

    `auto` is the first CUDA device if there is one, else the CPU. A CUDA device always has an
    index, so it can be compared with `tensor.device`.

    Raises:
        ModelError: If there is no such device; it names those there are.
    """
    available = _available_devices()
    if name == "auto":
        return torch.device("cuda:0" if "cuda:0" in available else "cpu")
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in available:
        raise ModelError(
            f"model.device '{name}' is not available here. Available: auto, {', '.join(available)}"
        )
    return torch.device(wanted)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn `auto`, `float32`, `bfloat16`, `float16` into a torch dtype.

    `auto` is bfloat16 where the hardware multiplies it fast (CUDA with native support, CPUs with
    AMX or AVX512-BF16), else float32.

    Raises:
        ModelError: If the name is none of these.
    """
    if name == "auto":
        return torch.bfloat16 if _multiplies_bfloat16_fast(device) else torch.float32
    if name not in _DTYPES:
        raise ModelError(f"Unknown model.dtype '{name}'. Available: auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _available_devices() -> list[str]:
    """Name the CPU, then the CUDA devices, then Apple's."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cuda = [f"cuda:{index}" for index in range(count)]
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def _multiplies_bfloat16_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    # torch has no public name for these yet, and other versions may lack one of them
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)
