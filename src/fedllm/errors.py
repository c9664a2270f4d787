"""Every error a user can meet, in one tree.

FedLLMError
├── ConfigError       the configuration is wrong; lists every problem at once
├── DataError         a data set cannot be read, recognised or split
├── ModelError        a model or tokenizer cannot be loaded or adapted
├── TrainingError     training went wrong (a loss that is not finite, say)
├── RunError          a run directory exists, is damaged, or cannot be resumed
└── MissingExtraError an optional dependency is not installed

Each message says what is wrong, where, and how to mend it. The command line prints it without a
traceback and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_LIKE = 0.05
"""Names whose similarity to another, from 0 to 1, differs by less are about as near."""


class FedLLMError(Exception):
    """Base class of all errors that are the user's to mend."""


class ConfigError(FedLLMError):
    """The configuration is wrong; `problems` holds one line for each fault.

    Args:
        problems: One sentence a fault: where, what, and how to mend it.
        source: The file the configuration was read from, if any.
    """

    def __init__(self, problems: Sequence[str], source: str | None = None) -> None:
        self.problems = list(problems)
        self.source = source
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} in {source or 'the configuration'}"
        super().__init__("\n".join([head + ":", *(f"  - {line}" for line in self.problems)]))


class DataError(FedLLMError):
    """A data set cannot be read, recognised or split."""


class ModelError(FedLLMError):
    """A model or tokenizer cannot be loaded or adapted."""


class TrainingError(FedLLMError):
    """Training went wrong."""


class RunError(FedLLMError):
    """A run directory exists, is damaged, or cannot be resumed."""


class MissingExtraError(FedLLMError):
    """An optional dependency is not installed.

    Args:
        package: The missing module.
        extra: The extra of `fedllm` that brings it.
        why: What needs it, as a noun phrase.
    """

    def __init__(self, package: str, extra: str, why: str) -> None:
        super().__init__(
            f"{why} needs '{package}', which is not installed. Run: pip install 'fedllm[{extra}]'"
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that suggests the nearest known name, or two about as near, or nothing.

    >>> did_you_mean("flexlroa", ["fedit", "flexlora"])
    " Did you mean 'flexlora'?"
    >>> did_you_mean("max_rows", ["max_train_rows", "max_test_rows", "max_length"])
    " Did you mean 'max_test_rows' or 'max_train_rows'?"
    """
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    ratios = [difflib.SequenceMatcher(None, found, name).ratio() for found in near]
    shown = [f"'{found}'" for found, r in zip(near, ratios, strict=True) if r > ratios[0] - _LIKE]
    return f" Did you mean {' or '.join(shown)}?" if shown else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the sentence for an unknown name: a suggestion, then all that is available.

    >>> unknown("algorithm", "flexlroa", ["fedit", "flexlora"])
    "Unknown algorithm 'flexlroa'. Did you mean 'flexlora'? Available: fedit, flexlora"
    """
    names = sorted(known)
    return f"Unknown {kind} '{name}'.{did_you_mean(name, names)} Available: {', '.join(names)}"
