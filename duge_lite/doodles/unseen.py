"""Pictures of nothing that no judge was trained on: other kinds, other generators, other seeds.

Only the report uses them. The rule is that of :mod:`.negatives`: nothing may pass for an object by eye.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from .draw import _DRAWERS, _PAINTERS, BACKGROUNDS, FIXED_GROUND, OBJECTS, SIZE, STYLES, Part, draw

RED = (216, 38, 44)  # the apple's
COLORED = ("photo", "neon", "mosaic", "watercolor")


def _anywhere(rng: np.random.Generator, styles: tuple[str, ...] = STYLES) -> tuple[str, str]:
    style = str(rng.choice(styles))
    return style, FIXED_GROUND.get(style, str(rng.choice(list(BACKGROUNDS))))


def _painted(parts: list[Part], style: str, ground: str, rng: np.random.Generator) -> Image.Image:
    """Parts in canvas fractions, painted as the world is."""
    return _PAINTERS[style](parts, ground, SIZE, rng).resize((SIZE, SIZE), Image.Resampling.BOX)


def _turned(points: np.ndarray, rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    a, size = rng.uniform(0, 2 * np.pi), rng.uniform(low, high)
    turn = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    return size * points @ turn.T + rng.uniform(0.42, 0.58, 2)


def _shade(rng: np.random.Generator, color: tuple[int, int, int]) -> tuple[int, int, int]:
    return tuple(int(c * rng.uniform(0.85, 1.05)) for c in color)


def red_square(rng: np.random.Generator) -> Image.Image:
    style, ground = _anywhere(rng, COLORED)
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) / np.sqrt(2)
    return _painted([Part(_turned(corners, rng, 0.25, 0.42), _shade(rng, RED))], style, ground, rng)


def red_blob(rng: np.random.Generator) -> Image.Image:
    """A wavy closed curve, r = 1 + sum a_k cos(k t + p_k); at most 0.55 as near as far."""
    style, ground = _anywhere(rng, ("photo", "neon", "watercolor"))  # a mosaic's tiles make it round
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    while True:
        waves = [rng.uniform(0.1, 0.5) * np.cos(k * t + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5)]
        r = 1 + sum(waves)
        if 0.15 < r.min() / r.max() < 0.55:
            break
    curve = (r / r.max())[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1)
    return _painted([Part(_turned(curve, rng, 0.28, 0.42), _shade(rng, RED))], style, ground, rng)


def sign(rng: np.random.Generator) -> Image.Image:
    """A letter, a cross, a stair or a spiral of one stroke or polygon, in a colour of the world."""
    style, ground = _anywhere(rng)
    palette = [p.color for p in _DRAWERS[str(rng.choice(OBJECTS))]()]
    color, w = palette[int(rng.integers(len(palette)))], rng.uniform(0.12, 0.22)
    spiral = np.linspace(0.3, 4 * np.pi, 40)
    lines = {
        "L": [[(-0.6, -0.9), (-0.6, 0.8), (0.6, 0.8)]],
        "T": [[(-0.8, -0.8), (0.8, -0.8)], [(0, -0.8), (0, 0.9)]],
        "N": [[(-0.6, 0.9), (-0.6, -0.9), (0.6, 0.9), (0.6, -0.9)]],
        "Z": [[(-0.7, -0.8), (0.7, -0.8), (-0.7, 0.8), (0.7, 0.8)]],
        "H": [[(-0.6, -0.9), (-0.6, 0.9)], [(0.6, -0.9), (0.6, 0.9)], [(-0.6, 0), (0.6, 0)]],
        "cross": [[(-0.9, 0), (0.9, 0)], [(0, -0.9), (0, 0.9)]],
        "stair": [[(-0.9, 0.8), (-0.3, 0.8), (-0.3, 0.2), (0.3, 0.2), (0.3, -0.4), (0.9, -0.4)]],
        "spiral": [np.stack([np.cos(spiral), np.sin(spiral)], axis=1) * spiral[:, None] / (4 * np.pi)],
    }
    size, center = rng.uniform(0.24, 0.38), rng.uniform(0.43, 0.57, 2)
    strokes = [np.asarray(line) * size + center for line in lines[str(rng.choice(list(lines)))]]
    return _painted([Part(s, color, w * size) for s in strokes], style, ground, rng)


def tiles(rng: np.random.Generator) -> Image.Image:
    """A drawing cut in sixteen tiles, none of which stays where it was."""
    style, ground = _anywhere(rng)
    pixels = np.asarray(draw(str(rng.choice(OBJECTS)), style, ground, int(rng.integers(2**31))))
    cut = pixels.reshape(4, 16, 4, 16, 3).swapaxes(1, 2).reshape(16, 16, 16, 3)
    order = rng.permutation(16)
    while (order == np.arange(16)).any():
        order = rng.permutation(16)
    return Image.fromarray(cut[order].reshape(4, 4, 16, 16, 3).swapaxes(1, 2).reshape(64, 64, 3))


def phases(rng: np.random.Generator) -> Image.Image:
    """A drawing's colours and frequencies, with random phases: the same spectrum, no outline."""
    style, ground = _anywhere(rng)
    pixels = np.asarray(draw(str(rng.choice(OBJECTS)), style, ground, int(rng.integers(2**31))), dtype=float)
    spectrum = np.fft.fft2(pixels, axes=(0, 1))
    turn = np.exp(1j * np.angle(np.fft.fft2(rng.normal(size=(SIZE, SIZE)))))
    turn[0, 0] = 1
    return Image.fromarray(
        np.fft.ifft2(spectrum * turn[..., None], axes=(0, 1)).real.clip(0, 255).astype(np.uint8)
    )


def ghost(rng: np.random.Generator) -> Image.Image:
    """Twelve drawings of different objects laid over one another."""
    style, ground = _anywhere(rng)
    names = rng.choice(OBJECTS, 12, replace=False)
    layers = [np.asarray(draw(str(n), style, ground, int(rng.integers(2**31))), dtype=float) for n in names]
    return Image.fromarray(np.mean(layers, axis=0).astype(np.uint8))


def quarters(rng: np.random.Generator) -> Image.Image:
    """Each quarter of the picture shows a quarter of another object."""
    style, ground = _anywhere(rng)
    names = rng.choice(OBJECTS, 4, replace=False)
    a, b, c, d = (np.asarray(draw(str(n), style, ground, int(rng.integers(2**31)))) for n in names)
    top, bottom = np.hstack([a[:32, :32], b[:32, 32:]]), np.hstack([c[32:, :32], d[32:, 32:]])
    return Image.fromarray(np.vstack([top, bottom]))


UNSEEN: dict[str, Callable[[np.random.Generator], Image.Image]] = {
    "red squares": red_square,
    "red blobs": red_blob,
    "letters and signs": sign,
    "drawings cut in tiles": tiles,
    "drawings with random phases": phases,
    "twelve drawings in one": ghost,
    "quarters of four objects": quarters,
}
"""Kinds of pictures of nothing that training never saw."""


def unseen(kind: str, count: int, seed: int = 31_415_926) -> list[Image.Image]:
    """``count`` pictures of ``kind``; picture i depends on (seed, kind, i) alone."""
    number = list(UNSEEN).index(kind)
    return [UNSEEN[kind](np.random.default_rng((seed, number, i))) for i in range(count)]
