"""Gentle checkers for the exercises: they never raise, they say "not yet", what is wrong, or "right"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Verdict:
    """What a checker found; true when the exercise is solved."""

    passed: bool
    message: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return ("✓ right: " if self.passed else "… ") + self.message


@dataclass(frozen=True)
class Case:
    """One call of the reader's function, what it should return, and a hint for when it does not."""

    args: tuple
    expected: Any
    hint: str


def examine(function: Callable, cases: Sequence[Case], praise: str, tolerance: float = 1e-5) -> Verdict:
    """Calls ``function`` on each case and compares; the first difference becomes the hint."""
    for case in cases:
        try:
            got = function(*case.args)
        except Exception as error:
            return Verdict(False, f"it stopped with {type(error).__name__}: {error}. {case.hint}")
        if got is None or got is Ellipsis:
            return Verdict(False, "not yet: replace the `...` with your own line and run the cell again.")
        try:
            fits = np.shape(got) == np.shape(case.expected) and np.allclose(
                np.asarray(got, dtype=float), np.asarray(case.expected, dtype=float), atol=tolerance
            )
        except (TypeError, ValueError):
            return Verdict(False, f"it returned a {type(got).__name__}, expected numbers. {case.hint}")
        if not fits:
            return Verdict(False, f"it returned {got!r}, expected {case.expected!r}. {case.hint}")
    return Verdict(True, praise)


def retention(function: Callable) -> Verdict:
    """Notebook 03: ``retention(before, after, forgotten)``, the kept accuracy of everything else."""
    names = ["apple", "orange", "house"]
    before = pd.Series([1.0, 1.0, 0.8], index=names)
    cases = [
        Case((before, before, "apple"), 1.0, "If nothing changed, everything was kept: 1."),
        Case(
            (before, pd.Series([0.0, 1.0, 0.8], index=names), "apple"),
            1.0,
            "Leave the forgotten concept out: losing it is the point, not damage.",
        ),
        Case(
            (before, pd.Series([0.0, 0.5, 0.4], index=names), "apple"),
            0.5,
            "Divide the mean accuracy after by the mean accuracy before.",
        ),
    ]
    return examine(function, cases, "what is forgotten on purpose does not count as damage.")
