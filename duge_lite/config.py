"""Every choice that unlearning leaves open, in one place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from numbers import Real

import pandas as pd

from .losses import TARGET_KINDS

SOLVERS = {"exact": (1.0, 1.0, 1e-3), "gradient": (1.0, 100.0, 10.0)}
"""The solvers, with the weights of the three losses that suit each."""

TRAINABLE: dict[str, Callable[[str], bool]] = {
    "cross_attention": lambda name: ".attn2." in name,
    "kv": lambda name: ".attn2.to_k" in name or ".attn2.to_v" in name,
    "full": lambda name: True,
}
"""Which weights the gradient solver lets learn, by the choice's name: a test of each parameter's name."""


@dataclass(frozen=True)
class UnlearnConfig:
    """How to forget. The paper does not fix these numbers for us: every default is ours.

    Attributes:
        solver: "exact": the losses' minimum at once, in seconds (:mod:`duge_lite.solver`); "gradient": the
            paper's form, step by step through the whole denoiser (:mod:`duge_lite.gradient`): minutes, and
            harder to bring back by a learned word (benchmarks/results).
        lambda_attention, lambda_prior, lambda_regularization: weights of the three losses; None for those
            that suit the solver. The exact solver counts the regularization in units of the mean square of
            what a head hears.
        instead: what is asked in the place of a concept of the model's card: "nearest", the kept concept that
            is nearest by the model's own answers; "nameless", the prompt with the name left out ("a neon
            sign" for "a neon sign of an apple"); or the name of a concept that stays.
        eta: how far past what is asked instead the target lies.
        memory_size: how many prompts are remembered; None for all that the card has.
        solve: which matrix of each layer the exact solver solves for: "output", through which every word has
            to pass, or "values", which a learned word can walk around (benchmarks/results).
        num_inference_steps, places: moments, and places per layer and moment, that the exact solver looks at.
        iterations, batch_size, memory_batch_size, lr, grad_clip: of the gradient solver's AdamW.
        target_size, lessons: of the gradient solver: pictures of the concept, and how many noisy versions of
            them and of the memory the reference answers for before learning starts.
        target, match: what the gradient solver compares: see
            :func:`duge_lite.losses.attention_target`; "output", what each layer writes, or "probs", its maps.
        train: what the gradient solver trains: "cross_attention", "kv" or "full".
        revisit: share of the gradient solver's pictures that show concepts of earlier requests, so that they
            do not come back (ours).
        measure_every: the gradient solver measures each loss's gradient at every so-manieth iteration.
        seed: of pictures, noise and order; one seed, one result.
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
    grad_clip: float = 1.0
    target: str = "negative"
    match: str = "output"
    train: str = "cross_attention"
    revisit: float = 0.5
    measure_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if name == "memory_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r}: expected a whole number, at least 1")
        for name in ("lr", "grad_clip"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 < value < math.inf:
                raise ValueError(f"{name} = {value!r}: expected a number above 0")
        for name in ("lambda_attention", "lambda_prior", "lambda_regularization", "eta"):
            value = getattr(self, name)
            if value is None and name != "eta":
                continue
            if not isinstance(value, Real) or not 0 <= value < math.inf:
                raise ValueError(f"{name} = {value!r}: expected 0 (off) or more")
        if not isinstance(self.revisit, Real) or not 0 <= self.revisit < 1:
            raise ValueError(f"revisit = {self.revisit!r}: expected a share from 0 (never) to below 1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed = {self.seed!r}: expected a whole number")
        if not isinstance(self.instead, str):
            raise ValueError(
                f'instead = {self.instead!r}: expected "nearest", "nameless" or a concept\'s name'
            )
        if not isinstance(self.measure_every, int) or self.measure_every < 0:
            raise ValueError(f"measure_every = {self.measure_every!r}: expected 0 (never) or a whole number")
        choices = {
            "solver": SOLVERS,
            "solve": ("output", "values"),
            "target": TARGET_KINDS,
            "match": ("output", "probs"),
            "train": TRAINABLE,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if self.match == "output" and self.target == "clamped":
            raise ValueError('target = "clamped" makes probabilities: it goes with match = "probs" only')

    @property
    def weights(self) -> tuple[float, float, float]:
        """The weights of the three losses: those that were chosen, or those that suit the solver."""
        chosen = (self.lambda_attention, self.lambda_prior, self.lambda_regularization)
        return tuple(d if c is None else c for c, d in zip(chosen, SOLVERS[self.solver], strict=True))

    def table(self) -> pd.DataFrame:
        """The settings as a table."""
        names = ("lambda_attention", "lambda_prior", "lambda_regularization")
        values = asdict(self) | dict(zip(names, self.weights, strict=True))
        return pd.DataFrame({"value": pd.Series(values, dtype=object)}).rename_axis("setting")

    def to_json(self) -> str:
        """The settings as json; :meth:`from_json` reads them back."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> UnlearnConfig:
        """Raises ValueError for a setting that there is not."""
        values = json.loads(text)
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise ValueError(f"no such setting: {', '.join(sorted(unknown))}; written by another version?")
        return cls(**values)


_COUNTS = (
    "memory_size", "num_inference_steps", "places", "iterations", "batch_size", "memory_batch_size",
    "target_size", "lessons",
)  # fmt: skip
