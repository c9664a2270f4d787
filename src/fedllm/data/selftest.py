"""At the start of a run: the prompts of training are the prompts of inference, token by token."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.data.rows import Row
from fedllm.data.tokens import Encoded
from fedllm.data.writer import Writer
from fedllm.errors import DataError

_TRIED = 3  # rows of a split


def check_prompts(writer: Writer, made: Encoded, rows: Sequence[Row]) -> None:
    """Compare some rows' prompts with what a server would send to the model for them.

    Args:
        writer: Tokenised the rows.
        made: Their tokens.
        rows: The rows that `made` was made from, in its order.

    Raises:
        DataError: If a prompt differs; gives both texts.
    """
    if writer.renderer is None:
        return
    whole = [i for i, is_cut in enumerate(made.truncated.tolist()) if not is_cut]
    tried = whole[:: max(len(whole) // _TRIED, 1)][:_TRIED]
    talks = writer.conversations([rows[i] for i in tried])
    for i, talk in zip(tried, talks, strict=True):
        start = int(made.offsets[i])
        trained = made.tokens[start : start + int(made.prompt_lengths[i])].tolist()
        before = talk[: int(made.answers[i])]
        inferred = writer.renderer.prompt_ids(before, rows[i].tools, where=rows[i].where)
        if trained != inferred:
            decode = writer.tokenizer.decode
            raise DataError(
                f"{rows[i].where}: the model would be trained on another prompt than it is asked "
                f"with:\\n  trained: {decode(trained)!r}\\n  asked:   {decode(inferred)!r}\\n"
                "The chat template writes a conversation in another way once it is answered; set "
                "model.chat_template to one that does not"
            )
