"""Reading of tiny-cuda-nn's JSON configs: a key has a valid value, or an error names it; a key that
tiny-cuda-nn has not is ignored, as there, with a warning that names it."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Mapping


class Settings:
    """A config that is read key by key; `close` warns of the keys that nobody read.

    Args:
        config: a mapping from names to values.
        name: what errors call it, such as "encoding_config" or "encoding_config.nested[1]".
    Raises:
        TypeError: config is not a mapping.
    """

    def __init__(self, config: Mapping, name: str):
        if not isinstance(config, Mapping):
            raise TypeError(f"argument `{name}`: expected a dict, got {type(config).__name__}")
        self.config, self.name, self.known = config, name, []

    def has(self, key: str) -> bool:
        self._know(key)
        return key in self.config

    def integer(self, key: str, default: int, low: int = 1, high: int = 2**31 - 1) -> int:
        """An integer from low to high, also one held by a float."""
        value = self._value(key, default)
        whole = value
        if isinstance(whole, float) and whole.is_integer():
            whole = int(whole)
        try:
            whole = operator.index(whole)
        except TypeError:
            raise self._error(TypeError, key, "an integer", value) from None
        if isinstance(value, bool) or not low <= whole <= high:
            raise self._error(ValueError, key, f"an integer from {low} to {high}", value)
        return whole

    def number(self, key: str, default: float, above: float = -math.inf) -> float:
        """A finite number larger than `above`."""
        value = self._value(key, default)
        if isinstance(value, bool | str) or not hasattr(value, "__float__"):
            raise self._error(TypeError, key, "a number", value)
        found = float(value)
        if not (math.isfinite(found) and found > above):
            limit = "" if above == -math.inf else f" above {above:g}"
            raise self._error(ValueError, key, f"a finite number{limit}", value)
        return found

    def choice(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        """One of the choices; the case of letters does not matter, as in tiny-cuda-nn."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._error(TypeError, key, "a string", value)
        for choice in choices:
            if choice.lower() == value.lower():
                return choice
        raise self._error(ValueError, key, "one of " + ", ".join(choices), value)

    def only(self, key: str, value, why: str) -> None:
        """An option of tiny-cuda-nn of which one value is supported."""
        found = self._value(key, value)
        same = isinstance(found, type(value)) and (
            found.lower() == value.lower() if isinstance(value, str) else found == value
        )
        if not same:
            raise self._error(ValueError, key, f"{value!r}: {why}", found)

    def sequence(self, key: str) -> list:
        value = self._value(key, None)
        if not isinstance(value, list | tuple) or not value:
            raise self._error(TypeError, key, "a list of at least one config", value)
        return list(value)

    def close(self) -> None:
        """Programs keep keys of their own in a config, so that unknown ones are no error."""
        unknown = [repr(key) for key in self.config if key not in self.known]
        if unknown:
            warnings.warn(
                f"config `{self.name}`: ignored unknown keys: {', '.join(unknown)}; known: "
                + ", ".join(sorted(self.known)),
                stacklevel=2,
            )

    def _know(self, key):
        if key not in self.known:
            self.known.append(key)

    def _value(self, key, default):
        self._know(key)
        return self.config.get(key, default)

    def _error(self, kind, key, expected, value):
        return kind(f"config `{self.name}.{key}`: expected {expected}, got {value!r}")
