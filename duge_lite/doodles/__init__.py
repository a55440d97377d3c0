"""The doodle world: what it shows, how it is captioned, how its models were trained."""

from .captions import SYNONYMS, prompt
from .draw import BACKGROUNDS, OBJECTS, STYLES, Scene, draw, draw_scene, sample_scene

__all__ = [
    "BACKGROUNDS", "OBJECTS", "STYLES", "SYNONYMS", "Scene",
    "draw", "draw_scene", "prompt", "sample_scene",
]  # fmt: skip
