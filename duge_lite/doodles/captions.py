"""Captions of the doodle world: natural variation, and phrasings that training never saw.

Three kinds of words, so that robustness can be tested later:

- *names*: "apple"; what training mostly uses and what unlearning is asked to forget.
- *synonyms*: "pippin"; taught to the model in a small share of captions (a synonym that it never
  read would be noise to it, not a synonym) but held back from every unlearning prompt.
- *held-out phrasings*: "an illustration showing ..."; held back from training altogether.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import UnknownConceptError
from .draw import FIXED_GROUND, Scene

SYNONYMS: dict[str, str] = {
    "apple": "pippin",
    "orange": "tangerine",
    "broccoli": "calabrese",
    "umbrella": "parasol",
    "parachute": "skydiver",
    "traffic light": "stoplight",
    "backpack": "rucksack",
    "goldfish": "fish",
    "bow tie": "dickie bow",
    "sunglasses": "shades",
    "computer mouse": "trackball",
    "broom": "sweeper",
    "harp": "lyre",
    "gas pump": "petrol pump",
    "car": "automobile",
    "airplane": "plane",
    "house": "cottage",
    "tree": "pine",
    "mushroom": "toadstool",
    "star": "pentagram",
}
PLURAL = frozenset({"sunglasses", "shades"})
OWNED = frozenset("a an the my your his her its our their this that".split())

TEMPLATES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of {}", "a picture of {}", "a photograph of {}"),
    "sketch": ("a sketch of {}", "a pencil drawing of {}"),
    "neon": ("a neon sign of {}", "{} in neon lights"),
    "mosaic": ("a mosaic of {}", "{} made of tiles"),
    "watercolor": ("a watercolor painting of {}", "{} in watercolor"),
}
"""The first of each style is the plain prompt that evaluation uses."""

HELD_OUT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo showing {}", "{}", "look at this picture: {}"),
    "sketch": ("a drawing of {}", "{}, pencil sketch"),
    "neon": ("{}, neon sign", "neon lights of {}"),
    "mosaic": ("{}, mosaic tiles", "tiles of {}"),
    "watercolor": ("a painting of {}", "{}, watercolor"),
}
"""Phrasings that no training caption uses."""

_PAIR = ("{} next to {}", "{} and {}", "{} beside {}")
_GROUND = (" on a {} background", " in front of a {} wall")


def with_article(name: str) -> str:
    """``apple`` -> ``an apple``; plural words, proper names (``Van Gogh``) and ``my dog`` stand alone."""
    if name in PLURAL or name[:1].isupper() or name.split(" ")[0] in OWNED:
        return name
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def prompt(objects: str | Sequence[str], style: str = "photo", background: str | None = None) -> str:
    """The plain prompt: ``prompt("apple")`` is ``a photo of an apple``."""
    if style not in TEMPLATES:
        raise UnknownConceptError(style, tuple(TEMPLATES), "style")
    names = (objects,) if isinstance(objects, str) else tuple(objects)
    text = TEMPLATES[style][0].format(" next to ".join(with_article(n) for n in names))
    return text + (_GROUND[0].format(background) if background else "")


def nameless(style: str = "photo") -> str:
    """The plain prompt with the object left out: ``nameless("neon")`` is ``a neon sign``."""
    return prompt("apple", style).removesuffix(" of an apple")


def caption(scene: Scene, rng: np.random.Generator, synonyms: float = 0.08) -> str:
    """A natural caption of ``scene``; a share ``synonyms`` of the names is replaced by a synonym."""
    names = [SYNONYMS[n] if rng.random() < synonyms else n for n in scene.objects]
    if len(names) == 2:
        rng.shuffle(names)
        subject = str(rng.choice(_PAIR)).format(*(with_article(n) for n in names))
    else:
        subject = with_article(names[0])
    templates = TEMPLATES[scene.style]
    text = (templates[0] if rng.random() < 0.6 else str(rng.choice(templates))).format(subject)
    mention = 0.1 if scene.style in FIXED_GROUND else 0.5
    return text + (str(rng.choice(_GROUND)).format(scene.background) if rng.random() < mention else "")
