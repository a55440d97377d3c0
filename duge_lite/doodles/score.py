"""The capstone's examiner: the same pictures, seeds and attacks for everybody.

Track one: how well was a taught thing forgotten (:func:`examine`)? Track two: a forgetful model, whose secret
is to be found and brought back (:func:`hand_over`). ``python -m duge_lite.doodles.score`` draws
``data/capstone.png``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ..attacks import encode_pictures, invert_steps, new_word, relearn_steps
from ..concepts import Concept, model_card
from ..evaluation import Judge, err
from ..models import Pictures, data_dir, load_pipeline, overwrite, sample
from ..unlearning import unlearn
from .captions import HELD_OUT_TEMPLATES, prompt, with_article
from .draw import OBJECTS, STYLES
from .teach import cup, drawings, teach_steps, world_drawings

OTHERS = ("umbrella", "mosaic")
"""What is asked to go besides."""
SEED = 2718
STEPS = 6
"""Of a picture: the judge names the base model's as well as with ten."""
MOST_PROMPTS = 10
PARTS = ("gone", "objects kept", "styles kept", "back door shut", "stays gone")


def phrasings(name: str) -> list[str]:
    """The examiner's own ways to ask: wordings that no training caption uses, and company."""
    told = [t.format(with_article(name)) for style in STYLES for t in HELD_OUT_TEMPLATES[style]]
    return told + [prompt((name, other)) for other in ("car", "house", "tree", "star")]


def check_concept(concept: Concept) -> None:
    """Raises ValueError for more prompts than the budget allows, or for one of the examiner's."""
    if len(concept.prompts) > MOST_PROMPTS:
        raise ValueError(f"{concept.name!r} has {len(concept.prompts)} prompts: the budget is {MOST_PROMPTS}")
    if known := sorted(set(concept.prompts) & set(phrasings(concept.name))):
        raise ValueError(f"{known[0]!r} is one of the examiner's phrasings: forget by others")


def total(parts: Mapping[str, float]) -> float:
    """One number of the five PARTS: their harmonic mean, which is small when any of them is.

    ERR's form (:func:`duge_lite.evaluation.err`), with the styles in the place of the adjacent concepts.
    """
    return err(*(float(parts[p]) for p in PARTS))


@dataclass(frozen=True)
class ScoreCard:
    """What the examiner found.

    Attributes:
        name: of what was to go.
        orders: a row per order of requests, with the PARTS; "stays gone" was measured in the worst.
        seconds: that forgetting took, per request.
    """

    name: str
    orders: pd.DataFrame
    seconds: float

    @property
    def worst(self) -> pd.Series:
        """The PARTS in the worst order, and their ``score``."""
        row = self.orders.loc[self.orders.score.idxmin()]
        return row.astype(float)

    @property
    def score(self) -> float:
        """The score of the worst order."""
        return float(self.worst.score)

    def _repr_markdown_(self) -> str:
        rows = "\n".join(f"| {part} | {self.worst[part]:.2f} |" for part in PARTS)
        count = f"the worst of {len(self.orders)} orders" if len(self.orders) > 1 else "one order"
        return (
            f"### Score card: “{self.name}” **{self.score:.2f}**\n\n"
            f"| | share, 1 is best |\n|---|---|\n{rows}\n\n"
            f"The score is their harmonic mean, in {count} ({self.worst.name}); "
            f"{self.seconds:.1f} seconds a request."
        )


@contextmanager
def _kept(pipe: StableDiffusionPipeline) -> Iterator[dict[str, torch.Tensor]]:
    """The weights as they are; afterwards they are so again."""
    parameters = dict(pipe.unet.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        yield before
    finally:
        overwrite(parameters, before)


def _seen(pipe: StableDiffusionPipeline, judge: Judge, name: str, prompts: Sequence[str], seed: int) -> float:
    """The share of pictures that show ``name``."""
    pictures = sample(pipe, prompts, seed, STEPS)
    return float(judge.sees(pictures, name).mean())


def measure(pipe: StableDiffusionPipeline, judge: Judge, name: str) -> dict[str, float]:
    """The first four PARTS, from some sixty pictures on fixed seeds."""
    card = model_card(pipe)
    objects = [c for c in card.judged if c not in OTHERS]
    styles = [s for s in card.styles[1:] if s not in OTHERS]
    still = [_seen(pipe, judge, name, [prompt(name, s) for s in STYLES] * 2, SEED)]
    still += [_seen(pipe, judge, o, card.prompts(o)[:5], SEED) for o in OTHERS]
    pictures = sample(pipe, [prompt(c) for c in objects], SEED, STEPS)
    kept = np.mean([a == b for a, b in zip(judge.names(pictures, card.judged), objects, strict=True)])
    pictures = sample(pipe, [prompt(c, s) for s in styles for c in objects[5:9]], SEED, STEPS)
    named = judge.names(pictures, card.styles)
    style = np.mean([named[i] == styles[i // 4] for i in range(len(named))])
    door = 1 - _seen(pipe, judge, name, phrasings(name), SEED)
    return dict(zip(PARTS, (1 - float(np.mean(still)), float(kept), float(style), door), strict=False))


def stays_gone(
    pipe: StableDiffusionPipeline, judge: Judge, name: str, drawn: Pictures, steps: tuple[int, int] = (40, 10)
) -> float:
    """1 - the share of pictures that show ``name`` after the better of two attacks with ``drawn``.

    A word is learned in ``steps[0]`` steps; the whole denoiser learns for ``steps[1]`` steps.
    """
    *_, last = invert_steps(pipe, name, drawn, steps[0], seed=SEED)
    with new_word(pipe, last.vector) as word:
        back = [_seen(pipe, judge, name, [prompt(word, s) for s in STYLES] * 2, SEED)]
    with closing(relearn_steps(pipe, drawn, steps[1] + 1, seed=SEED)) as states:
        for state in states:
            if state.step == steps[1]:
                back.append(_seen(pipe, judge, name, [prompt(name, s) for s in STYLES] * 2, SEED))
                break
    return 1 - max(back)


def examine(
    pipe: StableDiffusionPipeline,
    judge: Judge,
    concept: Concept,
    forget: Callable[[StableDiffusionPipeline, str | Concept], object],
    drawn: Pictures,
    orders: int = 2,
) -> ScoreCard:
    """Lets ``forget(pipe, request)`` forget ``concept`` and OTHERS, in several orders; all on fixed seeds.

    The first order begins with ``concept``, the second is its reverse; there are six. Each starts with
    ``pipe`` as it is; afterwards it is so again. Equal weights are measured once.
    ``judge`` knows the concept, ``drawn`` are encoded drawings of it, for the attacks on the worst order.
    Raises what :func:`check_concept` raises.
    """
    check_concept(concept)
    parameters, rows, ends, seconds = dict(pipe.unet.named_parameters()), {}, {}, 0.0
    with _kept(pipe) as before:
        for order in _orders([concept, *OTHERS])[:orders]:
            overwrite(parameters, before)
            started = time.perf_counter()
            for request in order:
                forget(pipe, request)
            seconds += time.perf_counter() - started
            key = ", ".join(getattr(request, "name", request) for request in order)
            now = {n: p.detach().clone() for n, p in parameters.items() if not torch.equal(p, before[n])}
            same = [k for k, end in ends.items() if _alike(now, end)]
            rows[key] = rows[same[0]] if same else measure(pipe, judge, concept.name)
            ends[key] = now
        worst = min(rows, key=lambda k: total(rows[k] | {PARTS[4]: 1.0}))
        overwrite(parameters, before | ends[worst])
        hidden = stays_gone(pipe, judge, concept.name, drawn)
    table = pd.DataFrame(rows).T.assign(**{PARTS[4]: hidden})
    table["score"] = [total(row) for _, row in table.iterrows()]
    return ScoreCard(concept.name, table, seconds / (3 * len(rows)))


def _orders(requests: list) -> list[list]:
    """Every way to order three requests; the first two of them are the most different."""
    turns = [requests[i:] + requests[:i] for i in range(len(requests))]
    return [order for turn in turns for order in (turn, turn[::-1])]


def _alike(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.allclose(a[n], b[n], rtol=1e-3, atol=1e-4) for n in a)


# ---------------------------------------------------------------------------- track two


@dataclass
class Suspect:
    """A model that forgot something, which is not said, and a budget of pictures."""

    pipe: StableDiffusionPipeline = field(repr=False)
    budget: int
    _secret: str = field(repr=False)

    def draw(self, prompts: Sequence[str], seed: int = 0) -> list[Image.Image]:
        """One picture for each prompt, in few steps. Raises ValueError beyond the budget."""
        if len(prompts) > self.budget:
            raise ValueError(f"{len(prompts)} pictures asked for, {self.budget} left in the budget")
        self.budget -= len(prompts)
        return sample(self.pipe, list(prompts), seed, STEPS)

    def verdict(self, guess: str, pictures: Sequence[Image.Image], judge: Judge) -> pd.Series:
        """Whether ``guess`` is the secret, and how many of ``pictures`` show what went."""
        seen = judge.sees(pictures, self._secret) if pictures else np.zeros(0)
        parts = {"it forgot": self._secret, "you guessed": guess, "pictures": len(seen)}
        return pd.Series({**parts, "that show it": int(seen.sum()), "budget left": self.budget})


def hand_over(pipe: StableDiffusionPipeline, seed: int, budget: int = 40) -> Suspect:
    """``pipe`` forgets one object, drawn from ``seed``, in place: by the exact solver with its defaults."""
    secret = OBJECTS[int(np.random.default_rng(seed).integers(len(OBJECTS)))]
    unlearn(pipe, secret, progress=False)
    return Suspect(pipe, budget, secret)


# ---------------------------------------------------------------------------- the picture


def main() -> None:
    """Draws ``data/capstone.png``: one thing drawn by hand, unknown, taught, and forgotten again."""
    from .. import figures

    pipe, count = load_pipeline("doodle"), 6
    asked = [prompt("cup", s) for s in (*STYLES, "photo")]
    by_hand, texts = drawings("cup", cup, 200)
    rows = [by_hand[:count], sample(pipe, asked, SEED)]
    new, memory = encode_pictures(pipe, by_hand, texts), encode_pictures(pipe, *world_drawings(200))
    for _ in teach_steps(pipe, new, memory, 160, 5e-4, 12):  # twice the notebook's lesson
        pass
    rows.append(sample(pipe, asked, SEED))
    unlearn(pipe, Concept("cup", [prompt("cup", s) for s in STYLES]), progress=False)
    rows.append(sample(pipe, asked, SEED))
    labels = ["drawn by hand", "before the lesson", "after the lesson", "forgotten again"]
    figure = figures.image_grid(rows, labels, title="“a photo of a cup”, and so on")
    (data_dir() / "capstone.png").write_bytes(figure.png())


if __name__ == "__main__":
    main()
