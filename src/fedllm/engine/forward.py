"""One pass through the resident model, packed where the model allows it and padded where not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedllm.engine import attention
from fedllm.engine.objectives import PassOutput, cross_entropy, is_likeliest
from fedllm.engine.packing import Packing, Sequences, padded, positions, predicted


class Forward:
    """Runs passes through one model.

    Args:
        model: A causal LM or sequence classifier, frozen, in eval mode.
        kind: `causal-lm` or `sequence-classification`.
        head: Dotted name of the classification head, if there is one.
        pad_id: Token id that fills padded batches.
        layout: `packed`, `padded`, or `auto`: packed if that gives the same outputs on a probe.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kind: str,
        head: str | None,
        pad_id: int,
        layout: str = "auto",
    ) -> None:
        self.model = model
        self.kind = kind
        self.head = head
        self.pad_id = pad_id
        self.device = model.device
        self.is_one_batch = self.device.type == "cuda"
        self.offset = _position_offset(model)
        accepted = inspect.signature(model.forward).parameters
        self.keeps_logits = "logits_to_keep" in accepted
        self._own_attention = model.config._attn_implementation
        attention.register()
        self.is_packed = layout == "packed" or (layout == "auto" and self._packs_alike())

    def run(self, sequences: Sequences) -> PassOutput:
        """Return the losses and choices of a pass; differentiable with respect to adapters."""
        if self.kind == "causal-lm":
            at, owners = predicted(sequences)
            targets = torch.from_numpy(sequences.tokens[at + 1].astype(np.int64))
            logits = self.token_logits(sequences, at)
        else:
            assert sequences.classes is not None
            owners = np.arange(len(sequences.lengths))
            targets = torch.from_numpy(sequences.classes.astype(np.int64))
            logits = self.class_logits(sequences)
        targets = targets.to(self.device)
        trains = torch.is_grad_enabled()
        return PassOutput(
            losses=cross_entropy(logits, targets),
            owners=torch.from_numpy(owners).to(self.device),
            correct=None if trains else is_likeliest(logits, targets),
            choices=None if trains or self.kind == "causal-lm" else logits.argmax(dim=-1),
        )

    def token_logits(self, sequences: Sequences, at: np.ndarray) -> Tensor:
        """Return the logits (n, vocabulary) after the tokens at these places of the pass."""
        if not self.is_packed:
            ids, mask = padded(sequences, self.pad_id, self.device)
            out = self.model(input_ids=ids, attention_mask=mask, use_cache=False)
            logits: Tensor = out.logits
            return logits[mask.bool()][torch.from_numpy(at).to(self.device)]
        index = torch.from_numpy(at).to(self.device)
        with self.packed_attention():
            if self.keeps_logits:
                out = self.model(**self._packed(sequences), use_cache=False, logits_to_keep=index)
                kept: Tensor = out.logits
                return kept[0]
            every: Tensor = self.model(**self._packed(sequences), use_cache=False).logits
            return every[0, index]

    def class_logits(self, sequences: Sequences) -> Tensor:
        """Return the class logits (N, classes) of a pass."""
        if not self.is_packed:
            ids, mask = padded(sequences, self.pad_id, self.device)
            found: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
            return found
        body = self.model.base_model
        with self.packed_attention():
            hidden = body(**self._packed(sequences)).last_hidden_state[0]
        starts = sequences.starts
        is_decoder = self.head is not None and self.head.split(".")[-1] == "score"
        places = starts + sequences.lengths - 1 if is_decoder else starts
        first = hidden[torch.from_numpy(places).to(self.device)][:, None]
        head = self.model.get_submodule(self.head or "classifier")
        pooler = getattr(body, "pooler", None)
        if pooler is not None:
            pooled: Tensor = head(pooler(first))
            return pooled
        logits: Tensor = head(first)
        return logits[:, 0] if logits.ndim == 3 else logits

    def last_hidden(self, sequences: Sequences) -> Tensor:
        """Return the last layer's hidden state (N, hidden) of each sequence's last token."""
        body = self.model.base_model
        if not self.is_packed:
            ids, mask = padded(sequences, self.pad_id, self.device)
            hidden: Tensor = body(input_ids=ids, attention_mask=mask).last_hidden_state
            return hidden[torch.arange(len(ids), device=self.device), mask.sum(dim=1) - 1]
        with self.packed_attention():
            hidden = body(**self._packed(sequences)).last_hidden_state[0]
        places = sequences.starts + sequences.lengths - 1
        return hidden[torch.from_numpy(places).to(self.device)]

    def _packed(self, sequences: Sequences) -> dict[str, object]:
        ids = torch.from_numpy(sequences.tokens.astype(np.int64))[None].to(self.device)
        place = torch.from_numpy(positions(sequences.lengths) + self.offset)[None].to(self.device)
        return {
            "input_ids": ids,
            "position_ids": place,
            "packing": Packing(sequences.lengths, self.device, is_one_batch=self.is_one_batch),
        }

    @contextmanager
    def packed_attention(self) -> Iterator[None]:
        """Let the model attend within sequences inside the block; it then takes `packing`."""
        self._set_attention(attention.NAME)
        try:
            yield
        finally:
            self._set_attention(self._own_attention)

    def _set_attention(self, name: str) -> None:
        """Choose the attention of all submodules, without transformers' checks on each pass."""
        self.model.config._attn_implementation_internal = name

    def _packs_alike(self) -> bool:
        """Try both layouts on two short sequences; any difference or refusal means padded."""
        if getattr(self.model.config, "attention_chunk_size", None):
            return False
        stream = np.random.default_rng(0)
        lengths = np.array([7, 4])
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        probe = Sequences(
            tokens=stream.integers(0, vocabulary, size=11),
            lengths=lengths,
            rows=np.zeros(2, dtype=np.int64),
            supervised=np.ones(11, dtype=bool),
            classes=np.zeros(2, dtype=np.int64),
        )
        probe.tokens[probe.tokens == self.pad_id] = (self.pad_id + 1) % vocabulary
        tolerance = 1e-4 if self.model.dtype == torch.float32 else 5e-2
        outputs = []
        for self.is_packed in (False, True):
            try:
                with torch.no_grad():
                    if self.kind == "causal-lm":
                        outputs.append(self.token_logits(probe, predicted(probe)[0]))
                    else:
                        outputs.append(self.class_logits(probe))
            except Exception:
                # whatever a model's own code raises on the packed layout, padded is the answer
                return False
        if outputs[0].shape != outputs[1].shape:
            return False
        scale = float(outputs[0].abs().max())
        return torch.allclose(outputs[0], outputs[1], rtol=tolerance, atol=tolerance * scale)


def _position_offset(model: nn.Module) -> int:
    """Return the position id of a sequence's first token: RoBERTa counts from padding_idx + 1."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0
