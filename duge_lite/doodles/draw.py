"""The doodle world: twenty objects, five styles and six backgrounds, drawn with vector shapes.

A drawing is a list of :class:`Part` (polygons and strokes in unit coordinates, x to the right,
y down, the object inside [-1, 1]^2). Each object is one small function that returns its parts;
each style is one function that paints parts on a canvas. Everything random (position, size,
rotation, shade) comes from the generator that is passed in, so one seed gives one picture.

The world is ours, not the paper's. The objects follow the paper's object benchmark as far as
they can be drawn in 64 pixels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from ..errors import UnknownConceptError

SIZE = 64
SUPERSAMPLE = 4

Color = tuple[int, int, int]

STYLES: tuple[str, ...] = ("photo", "sketch", "neon", "mosaic", "watercolor")
BACKGROUNDS: dict[str, Color] = {
    "white": (246, 246, 244),
    "black": (26, 26, 30),
    "blue": (112, 164, 232),
    "green": (158, 212, 136),
    "yellow": (250, 224, 112),
    "pink": (246, 172, 196),
}
FIXED_GROUND: dict[str, str] = {"sketch": "white", "neon": "black"}
"""A pencil sketch lies on white paper and a neon sign glows on black, whatever is asked."""


@dataclass(frozen=True)
class Part:
    """A polygon (``width == 0``) or a stroke (``width > 0``, in units) of one colour."""

    points: np.ndarray  # (n, 2) in unit coordinates
    color: Color
    width: float = 0.0


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one or two objects, a style and a background."""

    objects: tuple[str, ...]
    style: str = "photo"
    background: str = "white"


# ---------------------------------------------------------------------------- small geometry


def _ellipse(
    cx: float, cy: float, rx: float, ry: float, a0: float = 0, a1: float = 360, n: int = 28
) -> np.ndarray:
    a = np.radians(np.linspace(a0, a1, n))
    return np.stack([cx + rx * np.cos(a), cy + ry * np.sin(a)], axis=1)


def _smooth(points: Sequence[tuple[float, float]], n: int = 6, closed: bool = True) -> np.ndarray:
    """A Catmull-Rom curve through ``points``."""
    p = np.asarray(points, dtype=float)
    if closed:
        p0, p1, p2, p3 = np.roll(p, 1, 0), p, np.roll(p, -1, 0), np.roll(p, -2, 0)
    else:
        q = np.vstack([2 * p[0] - p[1], p, 2 * p[-1] - p[-2]])
        p0, p1, p2, p3 = q[:-3], q[1:-2], q[2:-1], q[3:]
    t = np.linspace(0, 1, n, endpoint=False)[:, None, None]
    curve = 0.5 * (
        2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3
    )  # (n, segments, 2)
    curve = curve.transpose(1, 0, 2).reshape(-1, 2)
    return curve if closed else np.vstack([curve, p[-1:]])


def _poly(*points: tuple[float, float]) -> np.ndarray:
    return np.asarray(points, dtype=float)


def _rect(x0: float, y0: float, x1: float, y1: float, r: float = 0.0) -> np.ndarray:
    """A rectangle, its corners rounded by ``r``."""
    if r <= 0:
        return _poly((x0, y0), (x1, y0), (x1, y1), (x0, y1))
    corners = ((x1 - r, y1 - r, 0), (x0 + r, y1 - r, 90), (x0 + r, y0 + r, 180), (x1 - r, y0 + r, 270))
    return np.vstack([_ellipse(x, y, r, r, a, a + 90, 6) for x, y, a in corners])


def _scallops(x0: float, x1: float, y: float, n: int, depth: float) -> np.ndarray:
    """The wavy lower edge of a canopy, from right to left."""
    w = (x1 - x0) / n
    arcs = [_ellipse(x1 - w * (i + 0.5), y, w / 2, depth, 0, -180, 9) for i in range(n)]
    return np.vstack(arcs)


def _darker(color: Color, f: float) -> Color:
    return tuple(int(c * f) for c in color)


def _lighter(color: Color, f: float) -> Color:
    return tuple(int(c + (255 - c) * f) for c in color)


# ---------------------------------------------------------------------------- the twenty objects

BROWN, LEAF, WHITE, STEEL, INK = (121, 82, 50), (72, 150, 60), (250, 250, 250), (170, 176, 186), (62, 64, 76)


def _apple() -> list[Part]:
    red = (216, 38, 44)
    body = _smooth(
        [(0, -0.42), (0.34, -0.58), (0.74, -0.38), (0.8, 0.12), (0.56, 0.66), (0.22, 0.84), (0, 0.76)]
        + [(-0.22, 0.84), (-0.56, 0.66), (-0.8, 0.12), (-0.74, -0.38), (-0.34, -0.58)]
    )
    return [
        Part(_smooth([(0, -0.4), (0.02, -0.66), (0.12, -0.9)], closed=False), BROWN, 0.13),
        Part(body, red),
        Part(_smooth([(0.06, -0.6), (0.3, -0.95), (0.68, -0.92), (0.42, -0.6)]), LEAF),
        Part(_ellipse(-0.4, -0.1, 0.13, 0.24), _lighter(red, 0.55)),
    ]


def _orange() -> list[Part]:
    orange = (248, 146, 22)
    pores = [(-0.3, -0.1), (0.15, 0.1), (0.42, -0.25), (-0.1, 0.45), (0.4, 0.42), (-0.5, 0.3)]
    calyx = [
        (0.3 * r * np.cos(a), -0.62 + 0.2 * r * np.sin(a))
        for a, r in zip(np.radians(np.arange(0, 360, 36)), [1, 0.45] * 5, strict=True)
    ]
    return [
        Part(_ellipse(0, 0.06, 0.82, 0.82), orange),
        *[Part(_ellipse(x, y, 0.07, 0.07, n=8), _darker(orange, 0.72)) for x, y in pores],
        Part(_poly(*calyx), LEAF),
    ]


def _broccoli() -> list[Part]:
    stem, head = (168, 206, 108), (44, 132, 58)
    puffs = [(-0.55, -0.05, 0.33), (0.55, -0.05, 0.33), (-0.33, -0.42, 0.36), (0.33, -0.42, 0.36)]
    puffs += [(0, -0.6, 0.34), (0, -0.12, 0.38)]
    trunk = [(-0.2, 0.9), (-0.17, 0.4), (-0.55, 0.1), (0.55, 0.1), (0.17, 0.4), (0.2, 0.9)]
    return [
        Part(_poly(*trunk), stem),
        *[
            Part(_ellipse(x, y, r, r, n=18), _lighter(head, 0.16 * (i % 3)))
            for i, (x, y, r) in enumerate(puffs)
        ],
    ]


def _umbrella() -> list[Part]:
    cloth = (126, 62, 178)
    dome = _ellipse(0, 0.02, 0.95, 0.82, 180, 360)
    canopy = np.vstack([dome, _scallops(-0.95, 0.95, 0.02, 4, 0.16)])
    middle = np.vstack([_ellipse(0, 0.02, 0.475, 0.82, 180, 360), _scallops(-0.475, 0.475, 0.02, 2, 0.16)])
    hook = np.vstack([_poly((0, -0.1), (0, 0.7)), _ellipse(-0.17, 0.72, 0.17, 0.2, 0, 180, 10)])
    return [
        Part(hook, BROWN, 0.11),
        Part(canopy, cloth),
        Part(middle, _lighter(cloth, 0.35)),
        Part(_poly((0, -0.8), (0, -0.98)), BROWN, 0.1),
    ]


def _parachute() -> list[Part]:
    cloth = (236, 92, 52)
    parts = [Part(_poly((x, -0.22), (0, 0.66)), STEEL, 0.05) for x in (-0.92, -0.34, 0.34, 0.92)]
    for half, color in ((0.95, cloth), (0.6, WHITE), (0.25, cloth)):
        panel = _ellipse(0, -0.2, half, 0.74, 180, 360)
        parts.append(Part(np.vstack([panel, _scallops(-half, half, -0.2, 1, -0.08)]), color))
    return [
        *parts,
        Part(_ellipse(0, 0.62, 0.12, 0.12, n=12), (236, 190, 150)),
        Part(_rect(-0.15, 0.7, 0.15, 0.98, 0.06), (58, 84, 160)),
    ]


def _traffic_light() -> list[Part]:
    box = (72, 76, 84)
    lamps = ((-0.62, (232, 48, 44)), (-0.12, (250, 200, 40)), (0.38, (50, 190, 84)))
    return [
        Part(_poly((0, 0.6), (0, 1.0)), STEEL, 0.16),
        Part(_rect(-0.36, -0.96, 0.36, 0.7, 0.14), box),
        *[Part(_ellipse(0, y, 0.22, 0.22, n=18), color) for y, color in lamps],
    ]


def _backpack() -> list[Part]:
    cloth = (46, 122, 170)
    return [
        Part(_ellipse(0, -0.72, 0.24, 0.22, 180, 360, 12), _darker(cloth, 0.6), 0.1),
        Part(_rect(-0.84, 0.05, -0.5, 0.7, 0.12), _darker(cloth, 0.7)),
        Part(_rect(0.5, 0.05, 0.84, 0.7, 0.12), _darker(cloth, 0.7)),
        Part(_rect(-0.62, -0.76, 0.62, 0.9, 0.3), cloth),
        Part(_rect(-0.44, 0.14, 0.44, 0.74, 0.1), _lighter(cloth, 0.35)),
        Part(_poly((-0.42, -0.16), (0.42, -0.16)), (246, 200, 60), 0.09),
        Part(_rect(-0.08, 0.26, 0.08, 0.44), (246, 200, 60)),
    ]


def _goldfish() -> list[Part]:
    gold = (252, 158, 36)
    tail = [(0.36, 0.0), (0.7, -0.42), (0.98, -0.5), (0.84, 0.0), (0.98, 0.5), (0.7, 0.42)]
    return [
        Part(_smooth(tail, 4), _darker(gold, 0.84)),
        Part(_smooth([(-0.3, -0.36), (0.05, -0.74), (0.3, -0.62), (0.25, -0.3)]), _darker(gold, 0.84)),
        Part(_ellipse(-0.22, 0, 0.68, 0.46), gold),
        Part(_smooth([(-0.15, 0.1), (0.2, 0.02), (0.22, 0.34), (-0.02, 0.34)]), _darker(gold, 0.74)),
        Part(_ellipse(-0.58, -0.12, 0.13, 0.13, n=14), WHITE),
        Part(_ellipse(-0.6, -0.12, 0.07, 0.07, n=10), (20, 20, 24)),
    ]


def _bow_tie() -> list[Part]:
    silk = (176, 30, 66)
    wing = [(0.08, -0.1), (0.5, -0.42), (0.94, -0.54), (0.9, 0.0), (0.94, 0.54), (0.5, 0.42), (0.08, 0.1)]
    right = _smooth(wing, 4)
    fold = _poly((0.2, 0), (0.62, 0))
    return [
        Part(right, silk),
        Part(right * (-1, 1), silk),
        Part(fold, _darker(silk, 0.6), 0.07),
        Part(fold * (-1, 1), _darker(silk, 0.6), 0.07),
        Part(_rect(-0.17, -0.22, 0.17, 0.22, 0.08), _lighter(silk, 0.3)),
    ]


def _sunglasses() -> list[Part]:
    frame, lens = (44, 46, 58), (84, 92, 120)
    glass = _smooth([(0.12, -0.26), (0.5, -0.34), (0.88, -0.26), (0.84, 0.2), (0.5, 0.42), (0.2, 0.24)])
    glint = _poly((0.34, 0.12), (0.54, -0.16))
    arm = _poly((0.86, -0.22), (1.0, -0.4))
    return [
        Part(arm, frame, 0.1),
        Part(arm * (-1, 1), frame, 0.1),
        Part(_smooth([(-0.16, -0.16), (0, -0.25), (0.16, -0.16)], closed=False), frame, 0.12),
        Part(glass, lens),
        Part(glass * (-1, 1), lens),
        Part(np.vstack([glass, glass[:1]]), frame, 0.1),
        Part(np.vstack([glass, glass[:1]]) * (-1, 1), frame, 0.1),
        Part(glint, WHITE, 0.07),
        Part(glint + (-1.02, 0), WHITE, 0.07),
    ]


def _computer_mouse() -> list[Part]:
    shell = (206, 210, 218)
    cable = [(0, -0.4), (0.06, -0.62), (0.34, -0.66), (0.44, -0.84), (0.3, -0.98)]
    return [
        Part(_smooth(cable, closed=False), INK, 0.08),
        Part(_smooth([(0, -0.46), (0.4, -0.32), (0.5, 0.2), (0.36, 0.78), (0, 0.94)]
                     + [(-0.36, 0.78), (-0.5, 0.2), (-0.4, -0.32)]), shell),
        Part(_smooth([(-0.48, 0.1), (0, 0.2), (0.48, 0.1)], closed=False), INK, 0.06),
        Part(_poly((0, -0.44), (0, 0.18)), INK, 0.06),
        Part(_rect(-0.09, -0.22, 0.09, 0.06, 0.07), (88, 150, 236)),
    ]  # fmt: skip


def _broom() -> list[Part]:
    straw = (226, 178, 78)
    hairs = [Part(_poly((x * 0.5, 0.36), (x, 0.92)), _darker(straw, 0.62), 0.05) for x in (-0.26, 0, 0.26)]
    return [
        Part(_poly((0, -0.98), (0, 0.2)), BROWN, 0.13),
        Part(_smooth([(-0.16, 0.12), (0.16, 0.12), (0.34, 0.6), (0.5, 0.96), (0, 0.98), (-0.5, 0.96)]
                     + [(-0.34, 0.6)], 4), straw),
        *hairs,
        Part(_poly((-0.24, 0.3), (0.24, 0.3)), (196, 54, 50), 0.1),
    ]  # fmt: skip


def _harp() -> list[Part]:
    gold = (206, 150, 40)
    neck = [(-0.62, -0.9), (-0.3, -0.62), (0.12, -0.74), (0.46, -0.9), (0.66, -0.62)]
    strings = [
        Part(_poly((x, -0.66 + 0.02 * i), (x, 0.78 - 0.3 * i)), STEEL, 0.045)
        for i, x in enumerate((-0.36, -0.1, 0.16, 0.4))
    ]
    return [
        *strings,
        Part(_smooth([(-0.6, 0.94), (-0.1, 0.62), (0.4, 0.06), (0.66, -0.62)], closed=False), gold, 0.2),
        Part(_poly((-0.62, -0.92), (-0.6, 0.94)), _darker(gold, 0.82), 0.16),
        Part(_smooth(neck, closed=False), gold, 0.16),
    ]


def _gas_pump() -> list[Part]:
    paint = (208, 44, 48)
    hose = [(0.32, -0.1), (0.56, 0.1), (0.54, 0.56), (0.76, 0.62), (0.84, 0.2), (0.82, -0.4)]
    return [
        Part(_smooth(hose, closed=False), INK, 0.1),
        Part(_poly((0.84, -0.3), (0.76, -0.62), (0.58, -0.66)), INK, 0.14),
        Part(_rect(-0.66, -0.94, 0.36, 0.9, 0.12), paint),
        Part(_rect(-0.46, -0.72, 0.16, -0.24, 0.05), (214, 238, 246)),
        Part(_poly((-0.34, -0.48), (0.04, -0.48)), INK, 0.08),
        Part(_ellipse(-0.15, 0.24, 0.2, 0.2, n=18), WHITE),
        Part(_rect(-0.78, 0.8, 0.48, 0.98), _darker(paint, 0.6)),
    ]


def _car() -> list[Part]:
    paint, glass = (42, 104, 204), (196, 226, 244)
    body = [(-0.98, 0.1), (-0.74, -0.1), (-0.5, -0.16), (-0.28, -0.56), (0.36, -0.56), (0.62, -0.14)]
    body += [(0.94, -0.04), (0.98, 0.36), (-0.98, 0.36)]
    wheels = [Part(_ellipse(x, 0.38, 0.24, 0.24, n=18), INK) for x in (-0.52, 0.52)]
    hubs = [Part(_ellipse(x, 0.38, 0.1, 0.1, n=12), STEEL) for x in (-0.52, 0.52)]
    return [
        Part(_poly(*body), paint),
        Part(_poly((-0.3, -0.14), (-0.16, -0.44), (0.02, -0.44), (0.02, -0.14)), glass),
        Part(_poly((0.12, -0.14), (0.12, -0.44), (0.3, -0.44), (0.46, -0.14)), glass),
        *wheels,
        *hubs,
    ]


def _airplane() -> list[Part]:
    metal, trim = (212, 220, 230), (54, 120, 204)
    wing = _poly((0.1, -0.2), (0.98, 0.26), (0.98, 0.44), (0.1, 0.2))
    fin = _poly((0.06, 0.62), (0.4, 0.84), (0.4, 0.98), (0.04, 0.88))
    hull = [(0, -0.98), (0.14, -0.7), (0.15, 0.3), (0.06, 0.96), (-0.06, 0.96), (-0.15, 0.3), (-0.14, -0.7)]
    return [
        Part(wing, trim),
        Part(wing * (-1, 1), trim),
        Part(fin, trim),
        Part(fin * (-1, 1), trim),
        Part(_smooth(hull, 4), metal),
        Part(_ellipse(0, -0.68, 0.08, 0.12, n=12), INK),
    ]


def _house() -> list[Part]:
    wall, roof = (240, 214, 168), (178, 70, 52)
    return [
        Part(_rect(0.34, -0.86, 0.56, -0.4), _darker(roof, 0.7)),
        Part(_rect(-0.68, -0.2, 0.68, 0.88), wall),
        Part(_poly((-0.92, -0.16), (0, -0.96), (0.92, -0.16)), roof),
        Part(_rect(-0.16, 0.3, 0.2, 0.88), BROWN),
        Part(_rect(-0.54, 0.02, -0.26, 0.32), (130, 190, 236)),
        Part(_rect(0.32, 0.02, 0.58, 0.32), (130, 190, 236)),
    ]


def _tree() -> list[Part]:
    crown = (56, 142, 62)
    tiers = [((0, -0.98), 0.44, -0.36), ((0, -0.68), 0.6, 0.06), ((0, -0.34), 0.76, 0.54)]
    return [
        Part(_rect(-0.14, 0.46, 0.14, 0.98), BROWN),
        *[
            Part(_poly((x - w, low), (x, top), (x + w, low)), _lighter(crown, 0.1 * i))
            for i, ((x, top), w, low) in reversed(list(enumerate(tiers)))
        ],
    ]


def _mushroom() -> list[Part]:
    cap, stem = (206, 44, 40), (240, 228, 204)
    stalk = [(-0.24, 0.0), (0.24, 0.0), (0.24, 0.5), (0.36, 0.88), (0, 0.96), (-0.36, 0.88), (-0.24, 0.5)]
    spots = [(-0.5, -0.22, 0.13), (0.02, -0.5, 0.17), (0.5, -0.2, 0.13), (0.0, -0.08, 0.1)]
    return [
        Part(_smooth(stalk, 4), stem),
        Part(
            np.vstack([_ellipse(0, 0.08, 0.92, 0.86, 180, 360), _ellipse(0, 0.08, 0.92, 0.14, 0, 180)]), cap
        ),
        *[Part(_ellipse(x, y, r, r * 0.85, n=14), WHITE) for x, y, r in spots],
    ]


def _star() -> list[Part]:
    gold = (250, 192, 30)
    a = np.radians(np.arange(10) * 36 - 90)
    r = np.where(np.arange(10) % 2 == 0, 0.98, 0.42)
    outline = np.stack([r * np.cos(a), r * np.sin(a)], axis=1)
    return [Part(outline, gold), Part(outline * 0.5, _lighter(gold, 0.45))]


_DRAWERS: dict[str, Callable[[], list[Part]]] = {
    "apple": _apple,
    "orange": _orange,
    "broccoli": _broccoli,
    "umbrella": _umbrella,
    "parachute": _parachute,
    "traffic light": _traffic_light,
    "backpack": _backpack,
    "goldfish": _goldfish,
    "bow tie": _bow_tie,
    "sunglasses": _sunglasses,
    "computer mouse": _computer_mouse,
    "broom": _broom,
    "harp": _harp,
    "gas pump": _gas_pump,
    "car": _car,
    "airplane": _airplane,
    "house": _house,
    "tree": _tree,
    "mushroom": _mushroom,
    "star": _star,
}
OBJECTS: tuple[str, ...] = tuple(_DRAWERS)


# ---------------------------------------------------------------------------- placing parts


def _shift_hue(color: Color, hue: float, light: float) -> Color:
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in color))
    rgb = colorsys.hsv_to_rgb((h + hue) % 1.0, s, min(1.0, v * light))
    return tuple(int(round(255 * c)) for c in rgb)


def _place(
    parts: list[Part], rng: np.random.Generator, center: tuple[float, float], radius: float, tilt: float
) -> list[Part]:
    """Jitters shade, shape and rotation, and moves unit coordinates to canvas fractions."""
    hue, light = rng.uniform(-0.02, 0.02), rng.uniform(0.85, 1.1)
    angle = np.radians(rng.uniform(-tilt, tilt))
    stretch = np.diag([rng.uniform(0.92, 1.08) * rng.choice([-1, 1]), rng.uniform(0.92, 1.08)])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = radius * turn @ stretch
    return [
        replace(
            part,
            points=part.points @ matrix.T + center,
            color=_shift_hue(part.color, hue, light),
            width=part.width * radius,
        )
        for part in parts
    ]


# ---------------------------------------------------------------------------- painting styles


class _Canvas:
    """A supersampled RGB image that fills polygons and draws strokes with round ends."""

    def __init__(self, size: int, color: Color) -> None:
        self.pixels = size * SUPERSAMPLE
        self.image = Image.new("RGB", (self.pixels, self.pixels), color)
        self.pen = ImageDraw.Draw(self.image)

    def fill(self, points: np.ndarray, color: Color) -> None:
        self.pen.polygon([tuple(p) for p in points * self.pixels], fill=color)

    def stroke(self, points: np.ndarray, color: Color, width: float) -> None:
        w = max(1, int(round(width * self.pixels)))
        xy = [tuple(p) for p in points * self.pixels]
        self.pen.line(xy, fill=color, width=w, joint="curve")
        for x, y in (xy[0], xy[-1]):
            self.pen.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill=color)

    def outline(self, points: np.ndarray, color: Color, width: float) -> None:
        self.stroke(np.vstack([points, points[:1]]), color, width)


def _ground(size: int, color: Color, rng: np.random.Generator) -> _Canvas:
    """A plain background with a soft vertical light."""
    canvas = _Canvas(size, color)
    top, bottom = rng.uniform(0.96, 1.06), rng.uniform(0.88, 0.98)
    ramp = np.linspace(top, bottom, canvas.pixels)[:, None, None] * np.asarray(color, dtype=float)
    pixels = np.broadcast_to(ramp, (canvas.pixels, canvas.pixels, 3)).clip(0, 255).astype(np.uint8)
    canvas.image.paste(Image.fromarray(np.ascontiguousarray(pixels)))
    return canvas


def _paint_photo(parts: list[Part], ground: str, size: int, rng: np.random.Generator) -> Image.Image:
    canvas = _ground(size, BACKGROUNDS[ground], rng)
    edge = (lambda c: _lighter(c, 0.45)) if ground == "black" else (lambda c: _darker(c, 0.55))
    for part in parts:
        if part.width:
            canvas.stroke(part.points, edge(part.color), part.width + 0.016)
            canvas.stroke(part.points, part.color, part.width)
        else:
            canvas.fill(part.points, part.color)
            canvas.outline(part.points, edge(part.color), 0.012)
    return canvas.image


def _paint_sketch(parts: list[Part], ground: str, size: int, rng: np.random.Generator) -> Image.Image:
    paper = tuple(int(c * rng.uniform(0.985, 1.0)) for c in BACKGROUNDS["white"])
    pencil = tuple(int(c) for c in np.full(3, rng.uniform(40, 90)))
    canvas = _Canvas(size, paper)
    for part in parts:
        if part.width:
            canvas.stroke(part.points, pencil, part.width + 0.03)
            canvas.stroke(part.points, paper, max(part.width - 0.012, 0.004))
        else:
            canvas.fill(part.points, paper)
            for _ in range(2):  # a pencil goes over its line twice
                canvas.outline(part.points + rng.normal(0, 0.003, 2), pencil, 0.015)
    return canvas.image


def _paint_neon(parts: list[Part], ground: str, size: int, rng: np.random.Generator) -> Image.Image:
    night = (12, 10, 18)
    tubes = _Canvas(size, night)
    for part in parts:
        h, s, _ = colorsys.rgb_to_hsv(*(c / 255 for c in part.color))
        s = s * 0.4 + 0.5 if s > 0.2 else 0.35
        glow = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(h, s, 1.0))
        if part.width:
            tubes.stroke(part.points, glow, max(0.02, part.width * 0.4))
        else:
            tubes.fill(part.points, night)
            tubes.outline(part.points, glow, 0.024)
    halo = tubes.image.filter(ImageFilter.GaussianBlur(SUPERSAMPLE * size * 0.03))
    halo = halo.point(lambda v: min(255, int(v * 1.5)))
    return ImageChops.lighter(tubes.image, halo)


def _paint_mosaic(parts: list[Part], ground: str, size: int, rng: np.random.Generator) -> Image.Image:
    tiles = 16
    small = _paint_photo(parts, ground, size, rng).resize((tiles, tiles), Image.Resampling.BOX)
    shades = np.asarray(small, dtype=float) * rng.uniform(0.93, 1.06, (tiles, tiles, 1))
    small = Image.fromarray(shades.clip(0, 255).astype(np.uint8))
    image = small.resize((size * SUPERSAMPLE,) * 2, Image.Resampling.NEAREST)
    joints = Image.new("L", image.size, 0)
    pen = ImageDraw.Draw(joints)
    for i in range(tiles + 1):
        at = i * image.width / tiles
        pen.line((at, 0, at, image.height), fill=90, width=SUPERSAMPLE)
        pen.line((0, at, image.width, at), fill=90, width=SUPERSAMPLE)
    grout = WHITE if ground == "black" else (70, 70, 76)
    return Image.composite(Image.new("RGB", image.size, grout), image, joints)


def _paint_watercolor(parts: list[Part], ground: str, size: int, rng: np.random.Generator) -> Image.Image:
    wet = tuple(int(0.82 * a + 0.18 * b) for a, b in zip(BACKGROUNDS[ground], WHITE, strict=True))
    image = _ground(size, wet, rng).image
    for part in parts:  # each wash: a soft, uneven, half-transparent stain that darkens at its rim
        mask = _Canvas(size, (0, 0, 0))
        wobble = part.points + rng.normal(0, 0.006, part.points.shape)
        if part.width:
            mask.stroke(wobble, WHITE, part.width + 0.02)
        else:
            mask.fill(wobble, WHITE)
        stain = mask.image.convert("L").filter(ImageFilter.GaussianBlur(SUPERSAMPLE * size * 0.012))
        core = stain.filter(ImageFilter.GaussianBlur(SUPERSAMPLE * size * 0.035))
        rim = ImageChops.subtract(stain, core).point(lambda v: v * 2)
        pale = Image.new("RGB", image.size, _lighter(part.color, 0.3))
        image = Image.composite(pale, image, stain.point(lambda v: int(v * 0.8)))
        dark = Image.new("RGB", image.size, _darker(part.color, 0.8))
        image = Image.composite(dark, image, rim)
    blots = Image.fromarray(rng.normal(0, 6, (12, 12)).astype(np.float32))  # uneven paper
    grain = np.asarray(blots.resize(image.size, Image.Resampling.BICUBIC))[..., None]
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


_PAINTERS: dict[str, Callable[[list[Part], str, int, np.random.Generator], Image.Image]] = {
    "photo": _paint_photo,
    "sketch": _paint_sketch,
    "neon": _paint_neon,
    "mosaic": _paint_mosaic,
    "watercolor": _paint_watercolor,
}


# ---------------------------------------------------------------------------- public


def _check(value: str, known: Sequence[str], what: str) -> None:
    if value not in known:
        raise UnknownConceptError(value, known, what)


def draw_scene(scene: Scene, rng: np.random.Generator, size: int = SIZE) -> Image.Image:
    """Draws ``scene``; position, size, rotation and shade are drawn from ``rng``.

    Returns an RGB image of ``size`` x ``size`` pixels.
    Raises UnknownConceptError for a name outside OBJECTS, STYLES or BACKGROUNDS, ValueError for
    anything but one or two objects.
    """
    if len(scene.objects) not in (1, 2):
        raise ValueError(f"a scene shows one or two objects, not {len(scene.objects)}: {scene.objects}")
    for name in scene.objects:
        _check(name, OBJECTS, "object")
    _check(scene.style, STYLES, "style")
    _check(scene.background, tuple(BACKGROUNDS), "background")
    parts: list[Part] = []
    if len(scene.objects) == 1:
        spots = [(0.5 + rng.uniform(-0.07, 0.07), 0.5 + rng.uniform(-0.07, 0.07))]
        radii = [rng.uniform(0.31, 0.41)]
    else:
        left_first = rng.random() < 0.5
        xs = (0.26, 0.74) if left_first else (0.74, 0.26)
        spots = [(x + rng.uniform(-0.02, 0.02), 0.5 + rng.uniform(-0.13, 0.13)) for x in xs]
        radii = [rng.uniform(0.205, 0.24) for _ in scene.objects]
    for name, spot, radius in zip(scene.objects, spots, radii, strict=True):
        parts += _place(_DRAWERS[name](), rng, spot, radius, tilt=14)
    ground = FIXED_GROUND.get(scene.style, scene.background)
    image = _PAINTERS[scene.style](parts, ground, size, rng)
    return image.resize((size, size), Image.Resampling.BOX)


def draw(
    objects: str | Sequence[str],
    style: str = "photo",
    background: str = "white",
    seed: int = 0,
    size: int = SIZE,
) -> Image.Image:
    """One drawing of one object, or of two side by side: ``draw("apple", style="neon", seed=3)``."""
    names = (objects,) if isinstance(objects, str) else tuple(objects)
    return draw_scene(Scene(names, style, background), np.random.default_rng(seed), size)


def sample_scene(rng: np.random.Generator, objects: Sequence[str] = OBJECTS) -> Scene:
    """A random scene: a quarter show two objects, and photo is the commonest style."""
    style = str(rng.choice(STYLES, p=[0.3, 0.2, 0.2, 0.14, 0.16]))
    pair = len(objects) > 1 and style != "mosaic" and rng.random() < 0.29  # 16 tiles hold one object
    names = tuple(str(n) for n in rng.choice(np.asarray(objects), size=1 + pair, replace=False))
    background = FIXED_GROUND.get(style, str(rng.choice(list(BACKGROUNDS))))
    return Scene(names, style, background)
