"""Errors that teach: each says what was given, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UnknownConceptError(ValueError):
    """A name outside the world; lists what there is and the nearest match."""

    def __init__(self, value: str, known: Sequence[str], what: str = "concept") -> None:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        choices = ", ".join([*known[:40], "..."] if len(known) > 40 else known)
        super().__init__(f"{value!r} is no {what} that is known here.{hint} Choose one of: {choices}.")


class WordNotInPromptError(KeyError):
    """A word that the prompt does not hold; lists the words that it does."""

    def __init__(self, word: str, words: Sequence[str]) -> None:
        super().__init__(f"{word!r} is not in the prompt, whose words are: {', '.join(words) or '(none)'}.")

    def __str__(self) -> str:  # a KeyError shows it in quotes
        return self.args[0]


class ModelNotFoundError(OSError):
    """Weights that are missing, broken or out of reach."""


class NoCrossAttentionError(ValueError):
    """A UNet without cross-attention: there is nothing to record or to steer."""


class DivergedError(RuntimeError):
    """A loss became NaN or infinite; the weights were put back."""


class OutOfMemoryError(RuntimeError):
    """The device's memory is too small; says which settings to lower."""
