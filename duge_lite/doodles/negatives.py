"""Pictures of nothing: what the judge learns "something else" from.

A judge that was only ever shown objects takes any red thing for an apple. These pictures show none of the
twenty objects, in the objects' own colours, on every background and in every style, drawn by the painters
that draw the world. Nothing here may pass for an object by eye. The rule (ours):

- never the whole outline of an object, in whatever colour;
- at most one plain circle in a picture, and only in blue, purple, grey, black or white: a red one could be an
  apple, an orange one an orange, two dark ones sunglasses; none in pencil, which has no colour;
- a polygon or a blob is at most half as wide at its narrowest as at its widest, so that none is nearly round;
  a mosaic's tiles round everything off: there they are never red to green;
- no green triangles: a small step to a tree; in a mosaic, no block in an apple's or an orange's colours with
  pieces on top;
- an object in pieces lacks its largest part, and only objects are taken to pieces whose other parts do not
  say it all (an umbrella's hook and one panel do, so do three lamps);
- halves are left and right ones, of objects that half a picture does not show whole (half a broom is a thin
  broom), and never of two that resemble each other;
- of a denoiser's own pictures only those in which nobody drew anything: a single step without a word,
  decoded noise, weights beyond repair. "Badly guided" is not enough: most of those still show their object,
  and pictures under the empty prompt show objects that nobody labelled.

Where nobody can say what a picture's style or background is (bare white paper: a photo or a sketch?), the
label is nan and is not trained.
"""

from __future__ import annotations

import colorsys
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageFilter

from .draw import (
    _DRAWERS,
    _PAINTERS,
    BACKGROUNDS,
    FIXED_GROUND,
    OBJECTS,
    SIZE,
    STYLES,
    Color,
    Part,
    _ellipse,
    _place,
    _rect,
    _smooth,
)

IN_PIECES: tuple[str, ...] = (
    "apple", "backpack", "goldfish", "bow tie", "sunglasses", "computer mouse", "broom", "harp", "gas pump",
    "car", "airplane", "house", "mushroom",
)  # fmt: skip
"""Objects of which nothing is left when they lie in pieces and the largest is gone."""
IN_HALVES: tuple[str, ...] = (
    "apple", "orange", "umbrella", "parachute", "backpack", "bow tie", "sunglasses", "harp", "gas pump",
    "car", "airplane", "house", "mushroom", "star",
)  # fmt: skip
"""Objects of which half is half."""
ALIKE: tuple[frozenset[str], ...] = (
    frozenset({"apple", "orange", "bow tie"}),
    frozenset({"umbrella", "parachute", "mushroom"}),
    frozenset({"house", "gas pump", "backpack"}),
    frozenset({"car", "airplane"}),
    frozenset({"orange", "star"}),
)
"""Objects whose halves together could pass for one of them."""


@dataclass(frozen=True)
class Nothing:
    """What a picture of nothing is made of; None where nobody can say, "" where it has none."""

    kind: str
    style: str | None
    background: str | None


def hue(color: Color) -> float | None:
    """The hue in degrees, None for a colour that is nearly grey."""
    h, s, _ = colorsys.rgb_to_hsv(*(c / 255 for c in color))
    return 360 * h if s > 0.25 else None


def may_be_round(color: Color, style: str) -> bool:
    """Whether the rule lets a circle have this colour: blue to purple, or grey."""
    h = hue(color)
    return style != "sketch" and (h is None or 190 <= h <= 290)


def _uneven(rng: np.random.Generator, corners: int) -> np.ndarray:
    """Corners around a centre, the nearest at most half as far from it as the farthest, (corners, 2)."""
    angles = np.radians((np.arange(corners) + rng.uniform(-0.25, 0.25, corners)) * 360 / corners)
    radii = rng.uniform(0.45, 1.0, corners)
    near, far = rng.choice(corners, 2, replace=False)
    radii[near], radii[far] = 0.4, 1.0
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def shape(
    rng: np.random.Generator, color: Color, style: str, circles: bool = True, square: bool = True
) -> Part:
    """One plain shape in unit coordinates that the rule allows in this colour and style."""
    h = hue(color)
    kinds = (
        ["stroke"]
        if style == "mosaic" and h is not None and not 180 < h < 300
        else ["polygon", "blob", "stroke"]
    )
    kinds += ["square", "square", "oblong"] if square else []
    kinds += ["circle"] if circles and may_be_round(color, style) else []
    kinds += [] if h is not None and 60 < h < 180 else ["triangle"]
    kind = str(rng.choice(kinds))
    if kind == "circle":
        return Part(_ellipse(0, 0, 0.85, 0.85), color)
    if kind == "square":
        return Part(_rect(-0.75, -0.75, 0.75, 0.75, rng.choice([0.0, 0.0, 0.15])), color)
    if kind == "oblong":
        w = rng.uniform(0.25, 0.6)
        return Part(_rect(-w, -0.95, w, 0.95), color)
    if kind == "triangle":
        angles = np.radians(np.array([0, 120, 240]) + rng.uniform(-35, 35, 3))
        return Part(np.stack([np.cos(angles), np.sin(angles)], axis=1), color)
    if kind == "polygon":
        return Part(_uneven(rng, int(rng.integers(5, 8))), color)
    if kind == "blob":
        return Part(_smooth([tuple(p) for p in _uneven(rng, int(rng.integers(5, 9)))]), color)
    points = rng.uniform(-0.95, 0.95, (int(rng.integers(2, 6)), 2))
    path = _smooth([tuple(p) for p in points], closed=False) if rng.random() < 0.5 else points
    return Part(path, color, rng.uniform(0.08, 0.25))


def _is_circle(part: Part) -> bool:
    return part.width == 0 and len(part.points) == 28


def _somewhere(rng: np.random.Generator, low: float, high: float) -> dict:
    """Where a shape of random size lies: inside the picture."""
    radius = rng.uniform(low, high)
    return {"center": tuple(rng.uniform(radius, 1 - radius, 2)), "radius": radius, "tilt": 180}


def _shapes(rng: np.random.Generator, style: str) -> list[Part]:
    """One plain shape where an object would be, two side by side, or several anywhere."""
    drawn = _DRAWERS[str(rng.choice(OBJECTS))]()
    palette, largest = [p.color for p in drawn], max(drawn, key=_extent).color
    count = int(rng.choice([1, 2, 3, 4, 6], p=[0.5, 0.2, 0.12, 0.1, 0.08]))
    parts: list[Part] = []
    for i in range(count):
        color = largest if rng.random() < 0.5 else palette[int(rng.integers(len(palette)))]
        one = shape(rng, color, style, circles=not any(map(_is_circle, parts)))
        if count == 1:
            at = {"center": tuple(rng.uniform(0.43, 0.57, 2)), "radius": rng.uniform(0.2, 0.4), "tilt": 180}
        elif count == 2 and rng.random() < 0.6:
            at = {"center": ((0.26, 0.74)[i], rng.uniform(0.37, 0.63)), "radius": 0.22, "tilt": 180}
        else:
            at = _somewhere(rng, 0.08, 0.24)
        parts += _place([one], rng, **at)
    return parts


def _is_boxy(part: Part) -> bool:
    """Whether a polygon fills nearly all of the box around it."""
    x, y = part.points.T
    area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
    return area > 0.85 * np.ptp(x) * np.ptp(y)


def _costume(rng: np.random.Generator, style: str) -> list[Part]:
    """One object's arrangement of parts, each in a wrong shape, in another object's colours (or its own)."""
    whose = str(rng.choice(OBJECTS))
    plain = style != "mosaic"  # there a red block with anything on top could be an apple
    colors = str(rng.choice([n for n in OBJECTS if plain or n not in ("apple", "orange", whose)]))
    palette = [p.color for p in _DRAWERS[colors]()]
    loose = 0.4 if whose == colors else 0.2
    parts = []
    for i, part in enumerate(_DRAWERS[whose]()[:8]):
        low, high = part.points.min(0), part.points.max(0)
        size = max(0.12, float((high - low).max()) / 2) * rng.uniform(0.7, 1.1)
        wrong = shape(rng, palette[i % len(palette)], style, circles=False, square=not _is_boxy(part))
        points = size * wrong.points + (low + high) / 2 + rng.normal(0, loose, 2)
        parts.append(Part(points, wrong.color, wrong.width * size))
    center, radius = tuple(rng.uniform(0.43, 0.57, 2)), rng.uniform(0.28, 0.38)
    return _place(parts, rng, center, radius, tilt=rng.choice([14, 180]))


def _extent(part: Part) -> float:
    low, high = part.points.min(0), part.points.max(0)
    return float(np.prod(high - low + part.width))


def _shuffled(rng: np.random.Generator, style: str) -> list[Part]:
    """An object in pieces: its largest part is gone, the others lie turned and anywhere."""
    name = str(rng.choice(IN_PIECES))
    parts = _DRAWERS[name]()
    largest = max(range(len(parts)), key=lambda i: _extent(parts[i]))
    out = []
    for i in rng.permutation([i for i in range(len(parts)) if i != largest]):
        part = parts[i]
        middle = (part.points.min(0) + part.points.max(0)) / 2
        own = Part(part.points - middle, part.color, part.width)
        out += _place([own], rng, tuple(rng.uniform(0.2, 0.8, 2)), rng.uniform(0.25, 0.5), tilt=180)
    return out


def _halves(rng: np.random.Generator, style: str, ground: str) -> Image.Image:
    """The left half of one object and the right half of another that does not resemble it."""
    one, other = (str(n) for n in rng.choice(IN_HALVES, 2, replace=False))
    while any({one, other} <= group for group in ALIKE):
        other = str(rng.choice([n for n in IN_HALVES if n != one]))
    center, radius = tuple(rng.uniform(0.45, 0.55, 2)), rng.uniform(0.31, 0.41)
    same = int(rng.integers(2**31))  # the same light on both grounds: no seam but the objects'
    images = []
    for name in (one, other):
        parts = _place(_DRAWERS[name](), rng, center, radius, tilt=14)
        images.append(_PAINTERS[style](parts, ground, SIZE, np.random.default_rng(same)))
    left = np.arange(images[0].width) < center[0] * images[0].width
    mask = np.broadcast_to(255 * left[None], (len(left), len(left))).astype(np.uint8)
    return Image.composite(*images, Image.fromarray(mask))


def _texture(rng: np.random.Generator, style: str) -> list[Part]:
    """Stripes, checks, scattered crumbs or scribbles all over, in one object's colours."""
    palette = [p.color for p in _DRAWERS[str(rng.choice(OBJECTS))]()]
    colors = [palette[int(i)] for i in rng.integers(len(palette), size=2)]
    kind, n = str(rng.choice(["stripes", "checks", "crumbs", "scribble"])), int(rng.integers(3, 9))
    if kind == "stripes":
        turn = np.array([[0, 1], [1, 0]]) if rng.random() < 0.5 else np.eye(2)
        slant = rng.uniform(-0.4, 0.4)
        bars = [np.array([[x, 0], [x + 0.5 / n, 0], [x + 0.5 / n + slant, 1], [x + slant, 1]])
                for x in np.arange(-0.5, 1.5, 1 / n)]  # fmt: skip
        return [Part(bar @ turn, colors[i % 2]) for i, bar in enumerate(bars)]
    if kind == "checks":
        cells = [(i, j) for i in range(n) for j in range(n) if (i + j) % 2]
        return [Part(_rect(i / n, j / n, (i + 1) / n, (j + 1) / n), colors[i % 2]) for i, j in cells]
    if kind == "crumbs":
        places = rng.uniform(0, 1, (8 * n, 2))
        return [Part(0.05 * _uneven(rng, 5) + p, colors[i % 2]) for i, p in enumerate(places)]
    return [Part(rng.uniform(0, 1, (4, 2)), colors[i % 2], 0.03) for i in range(n)]


def _noise(rng: np.random.Generator) -> Image.Image:
    """Coarse to fine coloured noise, blurred or not, around any colour."""
    cells = int(rng.choice([3, 6, 12, 32, 64]))
    spread = rng.uniform(15, 90) * (1, 3)[int(rng.integers(2))]
    around = rng.uniform(20, 235, 3)
    values = around + spread * rng.normal(0, 1, (cells, cells, int(rng.choice([1, 3]))))
    image = Image.fromarray(np.broadcast_to(values, (cells, cells, 3)).clip(0, 255).astype(np.uint8))
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return image.filter(ImageFilter.GaussianBlur(float(rng.choice([0, 0, 1, 3, 8]))))


_PARTS: dict[str, Callable[[np.random.Generator, str], list[Part]]] = {
    "shapes": _shapes,
    "costume": _costume,
    "shuffled": _shuffled,
    "texture": _texture,
    "blank": lambda rng, style: [],
}
KINDS: dict[str, float] = {
    "shapes": 0.32, "costume": 0.2, "shuffled": 0.14, "halves": 0.14,
    "texture": 0.1, "noise": 0.06, "blank": 0.04,
}  # fmt: skip
"""Kinds of pictures of nothing, and their shares."""


def draw_nothing(
    rng: np.random.Generator, kind: str | None = None, style: str | None = None, background: str | None = None
) -> tuple[Image.Image, Nothing]:
    """One picture, 64 x 64, that shows none of the objects; what is not given is drawn from ``rng``."""
    kind = kind or str(rng.choice(list(KINDS), p=list(KINDS.values())))
    style = style or str(rng.choice(STYLES, p=[0.32, 0.17, 0.17, 0.17, 0.17]))
    ground = FIXED_GROUND.get(style, background or str(rng.choice(list(BACKGROUNDS))))
    if kind == "noise":
        return _noise(rng), Nothing(kind, "", None)
    if kind == "halves":
        image = _halves(rng, style, ground)
    else:
        image = _PAINTERS[style](_PARTS[kind](rng, style), ground, SIZE, rng)
    told = style if kind != "blank" or style == "mosaic" else None
    return image.resize((SIZE, SIZE), Image.Resampling.BOX), Nothing(
        kind, told, None if kind == "texture" else ground
    )


# ---------------------------------------------------------------------------- through the denoiser


@torch.no_grad()
def redrawn(
    pipe: StableDiffusionPipeline,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    moment: int,
    generator: torch.Generator,
    guidance_scale: float = 1.0,
    steps: int = 3,
) -> np.ndarray:
    """``images`` in the model's own hand, (n, 64, 64, 3) uint8: noised to ``moment`` and denoised again.

    As in SDEdit (Meng et al., arXiv 2108.01073): what is where stays, strokes and texture become the model's.
    A drawing under its own caption bears 650 of 1000; a picture of nothing does not: seen from 250 on, the
    denoiser makes an object of it. ``moment`` 0 is the autoencoder's round trip alone.
    """
    pixels = torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2) / 127.5 - 1
    scale = pipe.vae.config.scaling_factor
    x = pipe.vae.encode(pixels).latent_dist.mean * scale  # (n, 4, 16, 16)
    if moment:
        alphas = torch.cumprod(1 - _betas(pipe), dim=0)
        states = pipe.encode_prompt([*captions, *[""] * len(captions)], x.device, 1, False)[0]
        times = [int(moment * (steps - i) / steps) for i in range(steps)]
        x = alphas[moment].sqrt() * x + (1 - alphas[moment]).sqrt() * torch.randn(
            x.shape, generator=generator
        )
        for now, then in zip(times, [*times[1:], None], strict=True):
            noise = pipe.unet(x, now, states[: len(x)]).sample
            if guidance_scale != 1:
                noise += (guidance_scale - 1) * (noise - pipe.unet(x, now, states[len(x) :]).sample)
            clean = (x - (1 - alphas[now]).sqrt() * noise) / alphas[now].sqrt()
            x = clean if then is None else alphas[then].sqrt() * clean + (1 - alphas[then]).sqrt() * noise
    return _decoded(pipe, x)


def _betas(pipe: StableDiffusionPipeline) -> torch.Tensor:
    how = pipe.scheduler.config
    return torch.linspace(how.beta_start**0.5, how.beta_end**0.5, how.num_train_timesteps) ** 2


def _decoded(pipe: StableDiffusionPipeline, latents: torch.Tensor) -> np.ndarray:
    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
    return ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def broken(pipe: StableDiffusionPipeline, count: int, generator: torch.Generator) -> np.ndarray:
    """``count`` pictures of a denoiser that draws nothing, (n, 64, 64, 3) uint8: a third each of

    decoded noise, coarse to fine; one step from noise without a word; and weights with as much noise on them
    as they are large themselves. ``pipe`` stays as it is.
    """
    out: list[np.ndarray] = []
    shares = [len(part) for part in np.array_split(np.arange(count), 3)]
    for cells, part in zip((2, 4, 8, 16), np.array_split(np.arange(shares[0]), 4), strict=True):
        if not len(part):
            continue
        coarse = torch.randn(len(part), 4, cells, cells, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, 16, mode="bicubic")
        out.append(_decoded(pipe, smooth / smooth.std(dim=(1, 2, 3), keepdim=True)))

    def drawn(unet: torch.nn.Module, n: int, steps: int) -> np.ndarray:
        x = torch.randn(n, 4, 16, 16, generator=generator)
        states = pipe.encode_prompt([""] * n, x.device, 1, False)[0]
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, states).sample, t, x).prev_sample
        return _decoded(pipe, x)

    for start in range(0, shares[1], 100):
        out.append(drawn(pipe.unet, min(100, shares[1] - start), steps=1))
    for i, start in enumerate(range(0, shares[2], 16)):
        unet = copy.deepcopy(pipe.unet)
        for name, p in unet.named_parameters():
            if p.ndim > 1 and (i % 2 == 0 or "attn" in name):
                share = (0.8 + 0.2 * (i % 3)) * (1.0 if i % 2 == 0 else 2.0)
                p += share * p.std() * torch.randn(p.shape, generator=generator)
        out.append(drawn(unet, min(16, shares[2] - start), steps=4))
    return np.concatenate(out)
