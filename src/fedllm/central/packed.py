"""Whether a model keeps packed examples apart."""

from __future__ import annotations

import torch

from fedllm.central.tuning import Tuned
from fedllm.errors import ConfigError

_LENGTHS = (7, 5)
_TOLERANCE = 1e-3


def check_packing(tuned: Tuned) -> None:
    """Try two short examples together and apart.

    Raises:
        ConfigError: If one sees the other: then packed training would learn something else.
    """
    body = tuned.body
    vocabulary = int(body.config.get_text_config().vocab_size)
    places = [torch.arange(length) for length in _LENGTHS]
    ids = [(17 + 31 * (place + 3 * i)) % vocabulary for i, place in enumerate(places)]
    was_training = body.training
    body.eval()
    with torch.no_grad(), tuned.arithmetic():
        apart = [body(input_ids=own[None].to(body.device)).logits[0] for own in ids]
        together = body(
            input_ids=torch.cat(ids)[None].to(body.device),
            position_ids=torch.cat(places)[None].to(body.device),
            use_cache=False,
        ).logits[0]
    body.train(was_training)
    alone = torch.cat(apart)
    scale = float(alone.abs().max())
    is_exact = alone.dtype == torch.float32 and body.dtype == torch.float32
    tolerance = _TOLERANCE if is_exact else 5e-2
    if not torch.allclose(alone, together, atol=tolerance * scale, rtol=tolerance):
        raise ConfigError(
            [
                f"training.packing: in {type(body).__name__} packed examples would see each other;"
                " set it to false"
            ]
        )
