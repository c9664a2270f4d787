"""What is learned from: where the rows are, and how they become tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from fedllm.config.section import Section


class DataConfig(Section):
    """What the clients learn from."""

    path: str | Annotated[list[str], Field(min_length=1)] = "builtin:skills"
    """`builtin:skills`, a file or folder (JSON, JSONL, CSV, TSV, Parquet), a hub id, a name in
    `registry`, or a list of these, mixed as `mix` says."""
    registry: Path | None = None
    """LLaMA-Factory's `dataset_info.json`, or the folder that holds it: names in `path` are
    looked up there first."""
    mix: Literal["concat", "interleave-under", "interleave-over"] = "concat"
    """How several paths are mixed: one after another, or drawn in turn until the first
    (`under`) or the last (`over`, shorter ones repeat) runs out."""
    mix_weights: list[PositiveFloat] | None = None
    """How often each path is drawn when interleaving; default all alike."""
    max_rows_per_source: PositiveInt | None = None
    """Use at most this many training rows of each path (drawn from the seed)."""
    streaming: bool = False
    """Read and tokenise training rows while central training goes on, instead of before it; needs
    a number of steps. A federation counts its clients' rows first, so it cannot stream."""
    test_path: str | None = None
    """A file with the official test split, when `path` is one file."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    train_split: str = "train"
    """Split of a folder or hub data set that clients train on."""
    test_split: str = "auto"
    """Split to evaluate on; `auto` takes `test`, then `validation`, then holds out rows."""
    holdout: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the training rows held out when there is no test split."""
    task: Literal["auto", "classification", "qa", "math", "chat", "text", "preference", "rated"] = (
        "auto"
    )
    """What the rows are; decides rendering and metrics. `auto` recognises it from the columns.
    `chat` on preference pairs learns the better answers."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our name to the file's column name, e.g. `{prompt: question, completion: answer}`."""
    system_prompt: str | None = None
    """Put before every conversation that has no system message of its own."""
    reasoning: Literal["as-template", "keep", "strip"] = "as-template"
    """Thoughts before an answer (a `<think>` block or `reasoning_content`): left to the chat
    template as the file has them; learned in the last answer, or an error; or taken out."""
    train_on_prompt: bool = False
    """Learn the prompts, too, instead of answers alone."""
    mask_history: bool = False
    """Learn the last answer of a conversation alone."""
    max_broken_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Leave out broken rows up to this share, and count them; more of them are an error."""
    max_length: PositiveInt = 512
    """Longest sequence in tokens, prompt and answer together."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What happens to longer rows; `truncate` keeps the end-of-turn token."""
    max_train_rows: PositiveInt | None = None
    """Use at most this many training rows (drawn from the seed)."""
    max_test_rows: PositiveInt | None = None
    """Use at most this many test rows (drawn from the seed)."""
    cache: bool = True
    """Keep tokenised rows in the user's cache folder, by content hash."""

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths."""
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)

    @property
    def source(self) -> str:
        """All paths in one line."""
        return ", ".join(self.paths)

    @model_validator(mode="after")
    def _settings_agree(self) -> DataConfig:
        if self.train_on_prompt and self.mask_history:
            raise ValueError("train_on_prompt and mask_history exclude each other; give one")
        if self.mix_weights is not None:
            if self.mix == "concat":
                raise ValueError(
                    "mix_weights say how often paths are drawn, and mix: concat draws none; set"
                    " mix: interleave-under or interleave-over"
                )
            if len(self.mix_weights) != len(self.paths):
                raise ValueError(
                    f"mix_weights has {len(self.mix_weights)} numbers for {len(self.paths)} paths;"
                    " give one a path"
                )
        return self
