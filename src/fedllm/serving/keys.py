"""Keys that a server asks for: read and checked at start, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path

from fedllm.errors import ConfigError

ENVIRONMENT = "FEDLLM_API_KEYS"
MIN_LENGTH = 16


class Keys:
    """Named keys; a server without any asks for none.

    Args:
        by_name: Name of a holder to its key.
    """

    def __init__(self, by_name: Mapping[str, str]) -> None:
        self._by_name = {name: key.encode() for name, key in by_name.items()}

    def __bool__(self) -> bool:
        return bool(self._by_name)

    def secrets(self) -> list[str]:
        """Return the keys themselves."""
        return [key.decode() for key in self._by_name.values()]

    def holder(self, given: str) -> str | None:
        """Return whose key this is; every key is compared, whichever fits."""
        found = None
        raw = given.encode()
        for name, key in self._by_name.items():
            if hmac.compare_digest(raw, key):
                found = name
        return found


def read_keys(file: Path | None, environment: str | None = None) -> Keys:
    """Read keys, one `name:key` a line; empty lines and lines that begin with # do not count.

    Args:
        file: Where they are.
        environment: The value of `FEDLLM_API_KEYS`, whose lines may be separated by commas.

    Raises:
        ConfigError: With every line that is wrong; no key is ever shown.
    """
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"cannot be read: {error}"], str(file)) from None
        return _read(text, str(file))
    if environment is None:
        return Keys({})
    return _read(environment.replace(",", "\n"), ENVIRONMENT)


def _read(text: str, source: str) -> Keys:
    found: dict[str, str] = {}
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, key = line.partition(":")
        fault = _fault(name, colon, key)
        if fault is None and name in found:
            fault = f"the name '{name}' is there twice"
        if fault is None and key in found.values():
            fault = f"'{name}' has the key of somebody else"
        if fault is not None:
            problems.append(f"line {number}: {fault}")
        else:
            found[name] = key
    if not found and not problems:
        problems = ["there is no key. Write lines of name:key, or start without keys"]
    if problems:
        raise ConfigError(problems, source)
    return Keys(found)


def _fault(name: str, colon: str, key: str) -> str | None:
    if not colon or not name or name != name.strip():
        return "write name:key, without blanks around the name"
    if len(key) < MIN_LENGTH:
        return f"the key of '{name}' must have {MIN_LENGTH} characters or more (it has {len(key)})"
    if not all("!" <= character <= "~" for character in key):
        return f"the key of '{name}' must be printable ASCII without blanks"
    return None
