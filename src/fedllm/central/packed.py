"""Several examples in one row as a model takes them, and whether it keeps them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedllm.central.answer_loss import fits
from fedllm.central.examples import IGNORED, places_of
from fedllm.central.measuring import inference
from fedllm.central.tuning import Tuned
from fedllm.config import CentralConfig
from fedllm.errors import ConfigError

if TYPE_CHECKING:
    from fedllm.engine.forward import Forward

_LENGTHS = (7, 5, 4)
"""Of the examples of the trial; the last is a pack of its own, which is padded."""
_TOLERANCE = 1e-3


def layout(config: CentralConfig, tuned: Tuned) -> Forward | None:
    """Return what keeps the examples of a batch apart in one row; None if they stay in rows.

    Then nothing is padded, and attention is that of federated runs.

    Raises:
        ConfigError: If packs are asked for, and the examples of one would see each other.
    """
    found = _flat(config, tuned)
    if found is None and config.is_packed:
        check_packing(tuned)
    return found


def _flat(config: CentralConfig, tuned: Tuned) -> Forward | None:
    is_dealt = config.data.streaming and config.training.processes > 1
    # noise is scaled by the length of rows, and streamed batches are dealt out row by row
    if config.training.neftune_alpha is not None or is_dealt:
        return None
    if not fits(config.stage, tuned.body):
        return None
    from fedllm.engine.forward import Forward

    with inference(tuned):
        forward = Forward(
            tuned.body, "causal-lm", None, int(tuned.loaded.tokenizer.pad_token_id or 0)
        )
    return forward if forward.is_packed else None


class FlatCollator:
    """Puts all examples of a batch end to end, short ones first, so that equal lengths meet."""

    def __call__(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
        """Return `input_ids`, `labels` and `position_ids` of shape (1, tokens), and `lengths`."""
        own = [example.get("seq_lengths", [len(example["input_ids"])]) for example in examples]
        lengths = np.concatenate(own).astype(np.int64)
        order = np.argsort(lengths, kind="stable")
        take = places_of((np.cumsum(lengths) - lengths)[order], lengths[order])
        ids, labels = (
            torch.from_numpy(np.concatenate([example[name] for example in examples])[take])
            for name in ("input_ids", "labels")
        )
        places = torch.cat([torch.arange(length) for length in lengths[order].tolist()])
        # the first token of an example would be predicted from the example before it
        labels[places == 0] = IGNORED
        return {
            "input_ids": ids[None],
            "labels": labels[None],
            "position_ids": places[None],
            "lengths": lengths[order].tolist(),
        }


class PackCollator:
    """Puts packs below one another, each example's positions from 0.

    Without an attention mask, transformers lets a token see those before it back to position 0,
    and no further. TRL would put all packs of a batch into one row instead, which is good where a
    kernel skips what is masked; elsewhere attention over n packs then costs n times as much.

    Args:
        pad_token_id: Fills shorter packs; what is filled counts as an example without labels.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, packs: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels` and `position_ids`, each of shape (packs, longest)."""
        shape = len(packs), max(len(pack["input_ids"]) for pack in packs)
        ids = torch.full(shape, self._pad)
        labels = torch.full(shape, IGNORED)
        places = torch.zeros(shape, dtype=torch.int64)
        for i, pack in enumerate(packs):
            length = len(pack["input_ids"])
            ids[i, :length] = torch.tensor(pack["input_ids"])
            labels[i, :length] = torch.tensor(pack["labels"])
            lengths = [*pack["seq_lengths"], shape[1] - length]
            places[i] = torch.cat([torch.arange(own) for own in lengths])
        # the first token of an example would be predicted from the example before it
        labels[places == 0] = IGNORED
        return {"input_ids": ids, "labels": labels, "position_ids": places}


def check_packing(tuned: Tuned) -> None:
    """Try short examples together and apart.

    Raises:
        ConfigError: If one sees the other: then packed training would learn something else.
    """
    body, device = tuned.body, tuned.body.device
    vocabulary = int(body.config.get_text_config().vocab_size)
    rows = [
        [(17 + 31 * (i + 3 * k)) % vocabulary for i in range(n)] for k, n in enumerate(_LENGTHS)
    ]
    packs = [
        {"input_ids": [t for row in own for t in row], "labels": [t for row in own for t in row],
         "seq_lengths": [len(row) for row in own]}
        for own in (rows[:2], rows[2:])
    ]  # fmt: skip
    batch = PackCollator(0)(packs)
    was_training = body.training
    body.eval()
    with torch.no_grad(), tuned.arithmetic():
        apart = [body(input_ids=torch.tensor([row]).to(device)).logits[0] for row in rows]
        padded = body(
            input_ids=batch["input_ids"].to(device),
            position_ids=batch["position_ids"].to(device),
            use_cache=False,
        ).logits
    body.train(was_training)
    alone = torch.cat(apart)
    together = torch.cat([padded[0], padded[1, : _LENGTHS[2]]])
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
