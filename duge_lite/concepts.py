"""What is asked for: a concept, resolved here, once; what a model knows of it; and the settings.

``card.concept("apple")`` looks a name up; on a model that reads any word, ``card.concept("Van Gogh")`` makes
the prompts from templates; :class:`Concept` says it all by itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path

import pandas as pd
import torch
from diffusers import DiffusionPipeline

from .doodles import captions
from .doodles.draw import STYLES
from .errors import UnknownConceptError


def data_dir() -> Path:
    """The folder of the shipped models: inside an installed package, or beside it in a checkout."""
    packaged = Path(__file__).resolve().parent / "data"
    return packaged if packaged.is_dir() else packaged.parents[1] / "data"


@dataclass(frozen=True)
class Concept:
    """Something that is to go. Raises ValueError without prompts, or with another number of ``instead``."""

    name: str  #: what it is called, in tables and in prompts
    prompts: tuple[str, ...]  #: how it is asked for; these are what unlearning sees
    instead: tuple[str, ...] = ()  #: what is asked in the place of each; empty, as the settings say
    labels: tuple[str, ...] = ()  #: what a judge may call it; nothing when no judge knows it

    def __post_init__(self) -> None:
        for part in ("prompts", "instead", "labels"):
            value = getattr(self, part)
            if isinstance(value, str):
                raise ValueError(f"{part} = {value!r} of {self.name!r}: expected a list of texts")
            object.__setattr__(self, part, tuple(value))
        if not self.prompts:
            raise ValueError(f"the concept {self.name!r} has no prompts: expected at least one way to ask")
        if len(self.instead) not in (0, len(self.prompts)):
            counts = f"{len(self.prompts)} prompts and {len(self.instead)} to ask instead"
            raise ValueError(f"{self.name!r} has {counts}: expected one each")

    def named_in(self, prompt: str) -> bool:
        """Whether ``prompt`` asks for it: one of its prompts, or its name as whole words anywhere."""
        whole = rf"(?<!\w){re.escape(self.name)}(?!\w)"
        return prompt in self.prompts or bool(re.search(whole, prompt, re.I))

    def pair(self, others: Sequence[str]) -> Sequence[str]:
        """One of ``others`` for each prompt; the first for all, where the prompts are its own."""
        return others if len(others) == len(self.prompts) else [others[0]] * len(self.prompts)


@dataclass(frozen=True)
class ModelCard:
    """What a model knows and how it likes to be asked."""

    name: str
    concepts: tuple[str, ...]  #: names that can be forgotten and judged
    styles: tuple[str, ...] = STYLES  #: the first is the plain one; a judge need not know the others
    related: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  #: what resembles each concept
    plain: Mapping[str, str] = field(default_factory=dict)  #: the prompt of each, if not "a photo of a ..."
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  #: what the judge may call each
    order: tuple[str, ...] = ()  #: the concepts that a benchmark asks to go
    guidance_scale: float = 8.0  #: that evaluation samples with
    num_inference_steps: int = 50  #: that evaluation samples with
    sampling_steps: int = 25  #: enough for memory pictures and previews
    judge: str = "microsoft/resnet-50"  #: the image classifier of its pictures, "doodle" or a hub id
    open_choice: bool = True  #: whether the judge may say all that it knows, not only what the card lists
    open_words: bool = True  #: whether it reads any word, so that anything can be asked to go
    batch_size: int = 4  #: pictures that are drawn at once
    settings: Mapping[str, object] = field(default_factory=dict)  #: its own defaults of ``UnlearnConfig``

    @classmethod
    def read(cls, name: str, file: str, judged_styles: tuple[str, ...] = (), **facts: object) -> ModelCard:
        """A card whose concepts are the rows of ``file`` in ``data/``: see the data card."""
        rows = pd.read_csv(data_dir() / file).set_index("concept")
        related, labels = (
            rows[column].dropna().str.split("|").map(tuple).to_dict() for column in ("related", "judge_label")
        )
        facts |= {"related": related, "labels": labels | {style: (style,) for style in judged_styles}}
        facts |= {"plain": rows.prompt.to_dict(), "order": tuple(rows.order.dropna().sort_values().index)}
        return cls(name, tuple(rows.index), **facts)

    def subject(self, concept: str) -> str:
        """How a prompt names it: "an apple", "sunglasses", "the Eiffel Tower"."""
        plain = self.plain.get(concept, captions.prompt(concept))
        return plain.removeprefix(f"{captions.nameless()} of ")

    def prompt(self, concept: str | Sequence[str], style: str | None = None) -> str:
        """The plain prompt for ``concept``: "a photo of an apple"; or the one in another ``style``.

        Several concepts stand next to each other: "a photo of an apple next to the Eiffel Tower".
        """
        names = (concept,) if isinstance(concept, str) else concept
        subjects = " next to ".join(self.subject(name) for name in names)
        return f"{captions.nameless(style or self.styles[0])} of {subjects}"

    @property
    def judged(self) -> tuple[str, ...]:
        """The concepts that the judge has a label for, so that they can be counted."""
        return tuple(c for c in self.concepts if c in self.labels)

    @property
    def forgettable(self) -> tuple[str, ...]:
        """What can be asked to go by name, concepts and every style but the plain."""
        return self.concepts + self.styles[1:]

    def prompts(self, concept: str) -> list[str]:
        """The concept in every style, or the style with every concept."""
        if concept in self.styles:
            return [self.prompt(c, concept) for c in self.concepts]
        return [self.prompt(concept, style) for style in self.styles]

    def nameless(self, concept: str) -> list[str]:
        """:meth:`prompts` with the name left out: "a neon sign", or the plain prompt in place of a style."""
        if concept in self.styles:
            return [self.prompt(c) for c in self.concepts]
        return [captions.nameless(style) for style in self.styles]

    def paraphrases(self, concept: str) -> dict[str, list[str]]:
        """Other ways to ask, that unlearning never sees: by "phrasing", and by a "synonym" for an object.

        The doodle model's training held out these phrasings, too, and taught the synonyms: to no other model.
        """
        told = captions.HELD_OUT_TEMPLATES
        if concept in self.styles:
            subjects = map(self.subject, self.concepts)
            return {"phrasing": [text.format(s) for s in subjects for text in told[concept]]}
        ways = {"phrasing": [t.format(self.subject(concept)) for s in self.styles for t in told[s]]}
        if self.name == "doodle":
            ways["synonym"] = [self.prompt(captions.SYNONYMS[concept], style) for style in self.styles]
        return ways

    def check(self, concept: str) -> str:
        """``concept`` itself; raises UnknownConceptError when the card does not list it."""
        if concept not in self.forgettable:
            raise UnknownConceptError(concept, self.forgettable)
        return concept

    def concept(self, what: str | Concept, instead: str = "nearest") -> Concept:
        """The door: a name of the card, a :class:`Concept`, or, on a model of open words, any words.

        ``instead`` is that of the settings, for what does not say itself what is asked in its place. Raises
        UnknownConceptError for a word that the model never read, ValueError where ``instead`` is a style,
        TypeError for anything but a text or a Concept.
        """
        if not isinstance(what, str | Concept):
            raise TypeError(f"{what!r} is no concept: expected a name, or duge.Concept(name, prompts=[...])")
        concept = self._named(what.strip()) if isinstance(what, str) else what
        if concept.instead or instead == "nearest":
            return concept
        if instead in self.styles:
            raise ValueError(f"instead = {instead!r} is a style: expected an object")
        others = self.nameless(concept.name) if instead == "nameless" else self.concept(instead).prompts
        return replace(concept, instead=concept.pair(others))

    def _named(self, words: str) -> Concept:
        name = next((n for n in self.forgettable if n.casefold() == words.casefold()), words)
        if not (self.open_words and name):
            self.check(name)
        prompts, instead = self.prompts(name), self.nameless(name)
        if name in self.styles[1:]:  # it goes where no object is named, too
            prompts, instead = [*prompts, captions.nameless(name)], [*instead, captions.nameless()]
        return Concept(name, prompts, () if name in self.concepts else instead, self.labels.get(name, ()))

    def memory_prompts(self, size: int | None = None, seed: int = 0) -> list[str]:
        """What is to stay: ``size`` prompts, spread over concepts and styles evenly; by default all of them.

        Each round names every concept once, the styles in turn; the prompts without a name stand last.
        """
        generator = torch.Generator().manual_seed(seed)
        names = [self.concepts[i] for i in torch.randperm(len(self.concepts), generator=generator)]
        styles = [self.styles[i] for i in torch.randperm(len(self.styles), generator=generator)]
        named = []
        for turn in range(len(styles)):
            named += [self.prompt(n, styles[(i + turn) % len(styles)]) for i, n in enumerate(names)]
        return [*named, *map(captions.nameless, self.styles), ""] if size is None else named[:size]


def model_card(pipe: DiffusionPipeline) -> ModelCard:
    """The card of ``pipe``: the doodle world's, or that of Stable Diffusion with the paper's concepts.

    The doodle model is known by its text width (128) and its limit of 24 tokens.
    """
    if pipe.unet.config.cross_attention_dim == 128 and pipe.tokenizer.model_max_length == 24:
        how = {"guidance_scale": 4.0, "num_inference_steps": 20, "sampling_steps": 10, "batch_size": 32}
        how |= {"judge": "doodle", "open_choice": False, "open_words": False}
        return ModelCard.read("doodle", "doodle-20.csv", STYLES, **how)
    # ours, untested on real weights: a request is to take minutes on a T4 (see benchmarks/gpu.py)
    sizes = {"memory_size": 40, "num_inference_steps": 10, "places": 16}
    sizes |= {"batch_size": 2, "memory_batch_size": 2, "target_size": 8, "lessons": 64, "lr": 2e-5}
    return ModelCard.read("stable-diffusion", "dec-imagenet-20.csv", settings=sizes)


def wishes(gone: Iterable[Concept], choose: Callable[[Concept], Sequence[str]]) -> dict[str, str]:
    """For every prompt that asks for something gone, what is to be drawn instead; it names nothing gone.

    ``choose`` says what is asked in the place of a concept's prompts. The result depends on what is gone, not
    on the order in which it went. Raises ValueError when something is to be replaced by what goes itself.
    """
    steps: dict[str, str] = {}
    for concept in sorted(gone, key=lambda c: c.name):
        for prompt, other in zip(concept.prompts, choose(concept), strict=True):
            steps.setdefault(prompt, other)
    ends = steps
    for _ in steps:  # "a neon sign of an apple" -> "... of an orange" -> "a photo of an orange"
        ends = {prompt: steps.get(end, end) for prompt, end in ends.items()}
    if circle := [end for end in ends.values() if end in steps]:
        raise ValueError(f"{circle[0]!r} is to go itself: ask for something that stays instead of it")
    return ends


# ---- how to forget

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
        lambda_silence: how much the exact solver's attention loss counts where nothing is said, at pictures
            of the concept under the empty prompt, as a share of its weight. It closes ways back without words
            (benchmarks/results); 0 asks by name only (ours).
        instead: what is asked in the place of a concept that does not say it itself: "nearest", the kept
            concept that is nearest by the model's own answers; "nameless", the prompt with the name left out
            ("a neon sign" for "a neon sign of an apple"); or the name of a concept that stays.
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
    lambda_silence: float = 0.0
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
                value = getattr(self, name)
                if value is None and getattr(type(self), name) is None:
                    continue
                if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
                    raise ValueError(f"{name} = {value!r}: expected {expected}")
        if self.lessons < self.target_size:  # some pictures would never be learned from
            raise ValueError(f"lessons = {self.lessons}: expected at least target_size, {self.target_size}")
        if self.lambda_silence and self.solver != "exact":
            raise ValueError(f"lambda_silence = {self.lambda_silence}: expected 0, or the exact solver")

    @property
    def weights(self) -> tuple[float, float, float]:
        """The weights of the three losses: those that were chosen, or those that suit the solver."""
        chosen = (self.lambda_attention, self.lambda_prior, self.lambda_regularization)
        return tuple(d if c is None else c for c, d in zip(chosen, SOLVERS[self.solver], strict=True))


_COUNTS = "memory_size num_inference_steps places iterations batch_size memory_batch_size target_size lessons"
_WEIGHTS = "lambda_attention lambda_prior lambda_regularization lambda_silence eta"
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
