"""Every choice that unlearning leaves open, in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

SOLVERS = {"exact": (1.0, 1.0, 1e-3), "gradient": (1.0, 100.0, 10.0)}
"""The solvers, with the weights of the three losses that suit each."""


@dataclass(frozen=True)
class UnlearnConfig:
    """How to forget. The paper does not fix these numbers for us: every default is ours.

    Attributes:
        solver: "exact": the losses' minimum at once, in seconds (:mod:`duge_lite.solver`); "gradient": the
            paper's form, step by step through the whole denoiser (:mod:`duge_lite.gradient`): minutes, and
            harder to bring back by a learned word (benchmarks/results).
        solve: which matrix of each layer the exact solver solves for: "output", through which every word has
            to pass, or "values", which a learned word can walk around (benchmarks/results).
        lambda_attention, lambda_prior, lambda_regularization: weights of the three losses; None for those
            that suit the solver. The exact solver counts the regularization in units of the mean square of
            what a head hears.
        instead: what is asked in the place of a concept of the model's card: "nearest", the kept concept that
            is nearest by the model's own answers; "nameless", the prompt with the name left out ("a neon
            sign" for "a neon sign of an apple"); or the name of a concept that stays.
        eta: how far past what is asked instead the target lies.
        memory_size: how many prompts are remembered; None for all that the card has.
        num_inference_steps, places: moments, and places per layer and moment, that the exact solver looks at.
        iterations, batch_size, memory_batch_size, lr: of the gradient solver's AdamW.
        target_size, lessons: of the gradient solver: pictures of the concept, and how many noisy versions of
            them and of the memory the reference answers for before learning starts.
        revisit: share of the gradient solver's pictures that show concepts of earlier requests, so that they
            do not come back (ours).
        seed: of pictures, noise and order; one seed, one result.

    Raises ValueError for what is out of range.
    """

    solver: str = "exact"
    solve: str = "output"
    lambda_attention: float | None = None
    lambda_prior: float | None = None
    lambda_regularization: float | None = None
    instead: str = "nearest"
    eta: float = 1.0
    memory_size: int | None = None
    num_inference_steps: int = 5
    places: int = 32
    iterations: int = 40
    batch_size: int = 8
    memory_batch_size: int = 8
    target_size: int = 10
    lessons: int = 64
    lr: float = 1e-3
    revisit: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for names, kind, fits, expected in _RULES:
            for name in names.split():
                value, optional = getattr(self, name), getattr(type(self), name) is None
                if value is None and optional:
                    continue
                if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
                    raise ValueError(f"{name} = {value!r}: expected {expected}")
        if self.lessons < self.target_size:  # some pictures would never be learned from
            raise ValueError(f"lessons = {self.lessons}: expected at least target_size, {self.target_size}")

    @property
    def weights(self) -> tuple[float, float, float]:
        """The weights of the three losses: those that were chosen, or those that suit the solver."""
        chosen = (self.lambda_attention, self.lambda_prior, self.lambda_regularization)
        return tuple(d if c is None else c for c, d in zip(chosen, SOLVERS[self.solver], strict=True))


_COUNTS = "memory_size num_inference_steps places iterations batch_size memory_batch_size target_size lessons"
_WEIGHTS = "lambda_attention lambda_prior lambda_regularization eta"
_RULES = (  # settings, their type, what fits, in words
    ("solver", str, lambda v: v in SOLVERS, '"exact" or "gradient"'),
    ("solve", str, lambda v: v in ("output", "values"), '"output" or "values"'),
    ("instead", str, bool, '"nearest", "nameless" or a concept\'s name'),
    (_COUNTS, int, lambda v: v >= 1, "a whole number, at least 1"),
    (_WEIGHTS, Real, lambda v: 0 <= v < math.inf, "0 (off) or more"),
    ("lr", Real, lambda v: 0 < v < math.inf, "a number above 0"),
    ("revisit", Real, lambda v: 0 <= v < 1, "a share from 0 (never) to below 1"),
    ("seed", int, lambda v: True, "a whole number"),
)
