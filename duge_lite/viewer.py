"""The attention viewer: one self-contained piece of HTML, shown wherever a notebook is shown.

``AttentionTrace._repr_html_`` and :func:`compare` are the doors. The page fetches nothing: pictures and
maps travel as PNG inside the HTML, and one script (``viewer.js``) puts the controls into a shadow root, so
that the notebook's styles and ours leave each other alone. Where scripts do not run, the picture remains.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .attention import AttentionTrace

BUDGET = 1_000_000
"""How many numbers the maps of one page may hold, a byte each before compression."""
COLORS = "inferno"
"""Perceptually even: equal steps of attention look equally far apart, also in grey."""


@dataclass(frozen=True)
class Comparison:
    """Two traces, to be seen side by side or in turns; a notebook shows it as the viewer."""

    traces: tuple[AttentionTrace, AttentionTrace]
    labels: tuple[str, str]

    def _repr_html_(self) -> str:
        return _page(self.traces, self.labels)


def compare(
    before: AttentionTrace, after: AttentionTrace, labels: tuple[str, str] = ("before", "after")
) -> Comparison:
    """Two traces in one viewer, on one scale; usually of the same prompt and seed.

    Words are matched by their text: a word that only one prompt holds is lit in that one only.
    """
    return Comparison((before, after), tuple(labels))


def viewer_html(trace: AttentionTrace) -> str:
    """The viewer of one trace as HTML: below 2 MB, whatever the trace."""
    return _page((trace,), ("",))


def layer_label(name: str) -> str:
    """``down_blocks.0.attentions.1.transformer_blocks.0.attn2`` -> ``down 0.1``."""
    part = next((p for p in ("down", "mid", "up") if p in name), name)
    numbers = re.findall(r"\.(\d+)", name.split(".transformer_blocks")[0])
    return part if part == "mid" or not numbers else f"{part} {'.'.join(numbers)}"


# ---------------------------------------------------------------------------- numbers


def _groups(trace: AttentionTrace) -> list[dict]:
    """What can be lit, in reading order: the words and the special positions.

    ``nth`` counts the occurrences of a word, ``at`` lists its token positions.
    """
    groups: list[dict] = []
    seen: dict[str, int] = {}
    for kind in ("word", "start", "end", "pad"):
        at = [i for i, t in enumerate(trace.tokens) if t.kind == kind]
        if kind != "word":
            groups += [{"text": trace.tokens[at[0]].text, "kind": kind, "nth": 0, "at": at}] if at else []
            continue
        for index, text in enumerate(trace.words):
            nth = seen[text.lower()] = seen.get(text.lower(), -1) + 1
            own = [i for i in at if trace.tokens[i].word == index]
            groups.append({"text": text, "kind": kind, "nth": nth, "at": own})
    return groups


def _shrink(maps: np.ndarray, side: int) -> np.ndarray:
    """Block means of (..., h, w) until the larger side is at most ``side``."""
    while max(maps.shape[-2:]) > side:
        pad = [(0, 0)] * (maps.ndim - 2) + [(0, n % 2) for n in maps.shape[-2:]]
        maps = np.pad(maps, pad, mode="edge")
        h, w = maps.shape[-2:]
        maps = maps.reshape(*maps.shape[:-2], h // 2, 2, w // 2, 2).mean(axis=(-3, -1))
    return maps


def _layers(trace: AttentionTrace, groups: Sequence[dict], budget: int) -> tuple[dict, range, int]:
    """Maps per attention block (steps, G, h, w), the steps that are kept, and the largest side.

    Sub-tokens are summed, heads and the layers of one block averaged; then, until the budget holds, sides
    are halved down to 16, steps halved down to 12, and so on.
    """
    blocks: dict[str, list[np.ndarray]] = {}
    for name, maps in trace.maps.items():
        maps = maps.mean(axis=1, dtype=np.float32) if trace.has_heads else maps  # (steps, T, h, w)
        summed = [maps[:, g["at"]].sum(axis=1, dtype=np.float32) for g in groups]
        blocks.setdefault(name.split(".transformer_blocks")[0], []).append(np.stack(summed, axis=1))
    merged = {name: np.mean(parts, axis=0) for name, parts in blocks.items()}
    side, stride, count = max(trace.resolutions), 1, len(trace.timesteps)

    def cost() -> int:
        sizes = [math.prod(_size(m.shape[-2:], side)) for m in merged.values()]
        return (sum(sizes) + max(sizes)) * len(groups) * len(range(count)[::-stride])

    while cost() > budget and (side > 4 or count // stride > 4):
        if side > 16 or (side > 4 and count // stride <= 12):
            side = (side + 1) // 2
        else:
            stride *= 2
    steps = range(count)[::-1][::stride][::-1]  # the last one always stays
    kept = {name: _shrink(m[list(steps)], side) for name, m in merged.items()}
    largest = max((m.shape[-2:] for m in kept.values()), key=math.prod)
    enlarged = [F.interpolate(torch.from_numpy(m), size=largest, mode="bilinear") for m in kept.values()]
    mean = torch.stack(enlarged).mean(dim=0).numpy()  # as AttentionTrace.word does it
    return {"": mean, **kept}, steps, side


def _size(size: tuple[int, int], side: int) -> tuple[int, int]:
    h, w = size
    while max(h, w) > side:
        h, w = (h + 1) // 2, (w + 1) // 2
    return h, w


# ---------------------------------------------------------------------------- pictures


def _uri(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"optimize": True} if kind == "PNG" else {"quality": 88}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _picture(image: Image.Image, side: int = 512) -> str:
    """A small picture exactly (PNG), a large one smaller and compressed."""
    image = image.convert("RGB")
    if max(image.size) <= 128:
        return _uri(image)
    image.thumbnail((side, side))
    return _uri(image, "JPEG")


def _sprite(maps: np.ndarray) -> dict:
    """(steps, G, h, w) as one grey PNG: groups down, steps across, each group up to its own white."""
    steps, groups, h, w = maps.shape
    scale = maps.max(axis=(0, 2, 3)).clip(min=1e-9)  # (G,)
    bytes_ = np.rint(maps / scale[:, None, None] * 255).astype(np.uint8)
    sheet = bytes_.transpose(1, 2, 0, 3).reshape(groups * h, steps * w)
    return {
        "sprite": _uri(Image.fromarray(sheet)),
        "scale": [float(f"{s:.5g}") for s in scale],
        "h": h,
        "w": w,
    }


# ---------------------------------------------------------------------------- the page


def _view(trace: AttentionTrace, budget: int) -> tuple[dict, list[str]]:
    groups = _groups(trace)
    layers, steps, side = _layers(trace, groups, budget)
    notes = []
    if trace.cut:
        notes.append(f"The model never read the end of this prompt: {trace.cut!r}.")
    if side < max(trace.resolutions):
        notes.append(f"Maps finer than {side}x{side} are shown as means over {side}x{side} cells.")
    if len(steps) < len(trace.timesteps):
        notes.append(f"{len(steps)} of {len(trace.timesteps)} steps are shown.")
    words = [i for i, g in enumerate(groups) if g["kind"] == "word"]
    # Begin with the word that looks most sharply: articles look everywhere.
    sharpness = [layers[""][:, i].mean(axis=0).max() / layers[""][:, i].mean() for i in words]
    small = max(trace.image.size) <= 128
    return {
        "prompt": trace.prompt,
        "words": [{k: g[k] for k in ("text", "kind", "nth")} for g in groups],
        "start": words[int(np.argmax(sharpness))] if words else 0,
        "steps": [{"index": i + 1, "t": trace.timesteps[i]} for i in steps],
        "total": len(trace.timesteps),
        "layers": [
            {"label": layer_label(name) if name else "all layers", "name": name, **_sprite(maps)}
            for name, maps in layers.items()
        ],
        "previews": [_picture(trace.previews[i], 64 if small else 128) for i in steps if trace.previews],
    }, notes


def _page(traces: Sequence[AttentionTrace], labels: Sequence[str]) -> str:
    views, notes = zip(*(_view(t, BUDGET // len(traces)) for t in traces), strict=True)
    for view in views:
        for layer in view["layers"]:
            layer["label"] += "" if layer["name"] == "" else f" ({layer['h']}×{layer['w']})"
    table = matplotlib.colormaps[COLORS](np.linspace(0, 1, 64))[:, :3]
    data = {
        "views": views,
        "labels": list(labels),
        "notes": list(dict.fromkeys(note for part in notes for note in part)),
        "colors": "".join(f"{round(255 * c):02x}" for color in table for c in color),
    }
    pictures = "".join(
        f'<img src="{_picture(t.image)}" width="256" style="margin-right: 8px" '
        f'alt="{html.escape(f"{label} picture drawn from: {t.prompt}".strip())}">'
        for t, label in zip(traces, labels, strict=True)
    )
    text = json.dumps(data, ensure_ascii=False)
    ident = hashlib.sha256((text + pictures).encode()).hexdigest()[:16]
    code = files(__package__)
    script = "\n".join(
        [
            "(() => {",
            f"const ID = {_script(ident)}, DATA = {_script(data)};",
            f"const CSS = {_script(code.joinpath('viewer.css').read_text('utf-8'))};",
            code.joinpath("viewer.js").read_text("utf-8"),
            "})();",
        ]
    )
    return (
        f'<div data-duge="{ident}" data-lm-suppress-shortcuts="true">'
        f"<p><b>{html.escape(traces[0].prompt)}</b></p>{pictures}"
        "<p>Run this cell to see where each word looks.</p></div>"
        f"<script>{script}</script>"
    )


def _script(value: object) -> str:
    """JSON that can stand inside a script element: no text of a prompt can end it."""
    text = json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
