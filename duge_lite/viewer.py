"""The attention viewer, and pictures under sliders: self-contained HTML, shown wherever a notebook is shown.

A trace shows itself by it, and :func:`compare` shows two. The page fetches nothing: pictures and maps travel
as PNG inside the HTML, and one script (``viewer.js``) puts the controls into a shadow root, so that the
notebook's styles and ours leave each other alone. Where scripts do not run, the pictures remain.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import HTML
from PIL import Image

from .attention import AttentionTrace, mean_map
from .models import course_dir

BUDGET = 900_000  # numbers that the maps of one page may hold, a byte each before compression
COLORS = "inferno"  # perceptually even: equal steps of attention look equally far apart, also in grey
# The keys pressed inside are no commands of JupyterLab's, and no dollar sign is mathematics.
OURS = 'data-lm-suppress-shortcuts="true" class="mathjax_ignore tex2jax_ignore"'


def compare(
    before: AttentionTrace, after: AttentionTrace, labels: tuple[str, str] = ("before", "after")
) -> HTML:
    """Two traces in one viewer, on one scale; usually of the same prompt and seed.

    Words are matched by their text: a word that only one prompt holds is lit in that one only.
    """
    return HTML(viewer_html((before, after), labels))


def image_html(picture: bytes | Image.Image, alt: str, style: str = "max-width: 100%") -> str:
    """A picture that carries its alternative text, which notebooks leave out of what a cell displays."""
    return f'<img src="{_uri(picture)}" alt="{html.escape(alt)}" style="{style}">'


class Slides(HTML):
    """Pictures under controls, each with a label that says in words what it shows.

    Args:
        pictures: one for each state: PNG or WebP bytes, an image, or rows of small pictures, by heading:
            (caption, picture, share), where a share from 0 to 1 is drawn as a bar and None is none.
        labels: a sentence for each state.
        controls: by name what can be chosen; words are buttons, numbers lie under a slider. The states are
            all combinations, the last control changing fastest. By default one slider.
        start: the state that is shown first.

    Needs no kernel; without scripts the first picture remains.
    """

    def __init__(
        self, pictures: Sequence[bytes | Image.Image | Mapping[str, Sequence[tuple]]], labels: Sequence[str],
        title: str = "", controls: Mapping[str, Sequence[str | float]] | None = None, start: int = 0,
    ) -> None:  # fmt: skip
        alone = controls is None  # the sentence says it all
        controls = controls or {title or "picture": range(len(labels))}
        if not len(pictures) == len(labels) == math.prod(map(len, controls.values())):
            raise ValueError(f"{len(pictures)} pictures, {len(labels)} labels: expected one for each state")
        frames = [p if isinstance(p, Mapping) else {"": [("", p, None)]} for p in pictures]
        known: dict[str, int] = {}  # equal pictures travel once

        def number(picture: bytes | Image.Image) -> int:
            return known.setdefault(_uri(picture), len(known))

        def numbered(frame: Mapping[str, Sequence[tuple]]) -> list[tuple]:
            return [
                (head, [(text, number(p), share) for text, p, share in row]) for head, row in frame.items()
            ]

        rows = list(map(numbered, frames))
        decimal = partial(np.format_float_positional, trim="-")
        first = np.unravel_index(start, [len(values) for values in controls.values()])
        told = [
            {"name": name, "words": isinstance(values[0], str), "start": int(k),
             "values": ["" if alone else v if isinstance(v, str) else decimal(v) for v in values]}
            for (name, values), k in zip(controls.items(), first, strict=True)
        ]  # fmt: skip
        data = {"title": "" if alone else title, "labels": list(labels), "controls": told}
        shown = "".join(
            image_html(p, f"{head}: {caption}" if caption else labels[start])
            for head, tiles in frames[start].items() for caption, p, _ in tiles
        )  # fmt: skip
        text = f"<p><b>{html.escape(title)}</b></p><p>{html.escape(labels[start])}</p>{shown}"
        super().__init__(_page("slides", data | {"frames": rows, "pictures": list(known)}, text))


def explorable(name: str) -> HTML:
    """What docs/explorables/ holds under ``name``, to play with: ``duge.viewer.explorable("prior")``."""
    folder = course_dir() / "docs" / "explorables"
    if not (folder / f"{name}.html").is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.html")))
        raise ValueError(f"explorable {name!r}: expected one of {known}")
    page = (folder / f"{name}.html").read_text("utf-8")
    return HTML(page[page.index("<div data-duge-slides") :])


def layer_label(name: str) -> str:
    """``down_blocks.0.attentions.1.transformer_blocks.0.attn2`` -> ``down 0.1``."""
    part = next((p for p in ("down", "mid", "up") if p in name), name)
    numbers = re.findall(r"\.(\d+)", name.split(".transformer_blocks")[0])
    return part if part == "mid" or not numbers else f"{part} {'.'.join(numbers)}"


def _groups(trace: AttentionTrace) -> list[dict]:
    """What can be lit, in reading order: words (``nth`` of the same text), then special positions."""
    known, groups = [word.lower() for word in trace.words], []
    for i, text in enumerate(trace.words):
        at = [k for k, token in enumerate(trace.tokens) if token.word == i]
        groups.append({"text": text, "kind": "word", "nth": known[:i].count(known[i]), "at": at})
    for kind in ("start", "end", "pad"):
        if at := [k for k, token in enumerate(trace.tokens) if token.kind == kind]:
            groups.append({"text": f"<{kind}>", "kind": kind, "nth": 0, "at": at})
    return groups


def _layers(
    trace: AttentionTrace, groups: list[dict], budget: int
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Maps per attention block (steps, G, h, w), their mean under "" first, and the steps that are kept.

    Sub-tokens are summed, heads and layers of one block averaged; maps finer than 16 are means over cells.
    Of the steps as many are kept as the budget allows, evenly spread, always with the last.
    """
    blocks: dict[str, list[np.ndarray]] = {}
    for name, maps in trace.maps.items():
        maps = maps.mean(axis=1, dtype=np.float32)  # (steps, T, h, w)
        summed = np.stack([maps[:, g["at"]].sum(axis=1) for g in groups], axis=1)
        part = max(1, math.ceil(max(summed.shape[-2:]) / 16))
        size = [math.ceil(side / part) for side in summed.shape[-2:]]
        coarse = F.interpolate(torch.from_numpy(summed), size, mode="area").numpy()
        blocks.setdefault(name.split(".transformer_blocks")[0], []).append(coarse)
    merged = {name: np.mean(parts, axis=0) for name, parts in blocks.items()}
    merged = {"": mean_map(list(merged.values())), **merged}
    count = len(trace.timesteps)
    fits = budget * count // max(1, sum(maps.size for maps in merged.values()))
    kept = np.linspace(count - 1, 0, min(count, max(4, fits))).round().astype(int)[::-1].tolist()
    return {name: maps[kept] for name, maps in merged.items()}, kept


def _uri(picture: bytes | Image.Image, side: int = 512) -> str:
    """A small picture exactly (PNG), a large one smaller and compressed; bytes as they are."""
    kind = "webp" if isinstance(picture, bytes) and picture.startswith(b"RIFF") else "png"
    if isinstance(picture, Image.Image):
        buffer, large = io.BytesIO(), picture.mode == "RGB" and max(picture.size) > 128
        if large:
            picture, kind = picture.copy(), "jpeg"
            picture.thumbnail((side, side))
        picture.save(buffer, kind, **({"quality": 88} if large else {"optimize": True}))
        picture = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _sprite(maps: np.ndarray) -> dict:
    """(steps, G, h, w) as one grey PNG: groups down, steps across, each group up to its own white."""
    steps, groups, h, w = maps.shape
    scale = maps.max(axis=(0, 2, 3)).clip(min=1e-9)  # (G,)
    sheet = np.rint(maps / scale[:, None, None] * 255).astype(np.uint8).transpose(1, 2, 0, 3)
    image = Image.fromarray(sheet.reshape(groups * h, steps * w))
    return {"sprite": _uri(image), "scale": [float(f"{s:.5g}") for s in scale], "h": h, "w": w}


def _view(trace: AttentionTrace, budget: int) -> tuple[dict, list[str]]:
    """What the script is given about one trace, and notes for the reader."""
    groups = _groups(trace)
    layers, steps = _layers(trace, groups, budget)
    count, notes = len(trace.timesteps), []
    if trace.cut:
        notes.append(f"The model never read the end of this prompt: {trace.cut!r}.")
    if max(trace.resolutions) > 16:
        notes.append("Maps finer than 16x16 are shown as means over cells.")
    if len(steps) < count:
        notes.append(f"{len(steps)} of {count} steps are shown.")
    # Begin with the word that looks most sharply: articles look everywhere.
    sharp = layers[""].mean(axis=0).max(axis=(1, 2)) / layers[""].mean(axis=(0, 2, 3))  # (G,)
    start = max(range(len(groups)), key=lambda i: (groups[i]["kind"] == "word", sharp[i]))
    side = 64 if max(trace.image.size) <= 128 else 128
    return {
        "prompt": trace.prompt,
        "words": [{k: g[k] for k in ("text", "kind", "nth")} for g in groups],
        "start": start,
        "steps": [i + 1 for i in steps],
        "total": count,
        "layers": [
            {"label": f"{layer_label(name)} ({maps.shape[2]}×{maps.shape[3]})" if name else "all layers",
             "name": name, **_sprite(maps)}
            for name, maps in layers.items()
        ],
        "previews": [_uri(trace.previews[i].convert("RGB"), side) for i in steps if trace.previews],
    }, notes  # fmt: skip


def viewer_html(traces: Sequence[AttentionTrace], labels: Sequence[str] = ("",)) -> str:
    """The viewer of one trace or two as HTML: below 2 MB, whatever the traces."""
    views, notes = zip(*(_view(t, BUDGET // len(traces)) for t in traces), strict=True)
    table = matplotlib.colormaps[COLORS](np.linspace(0, 1, 64))[:, :3]
    data = {
        "views": views,
        "labels": list(labels),
        "notes": list(dict.fromkeys(note for part in notes for note in part)),
        "colors": "".join(f"{round(255 * c):02x}" for color in table for c in color),
    }
    pictures = "".join(
        image_html(t.image.convert("RGB"), f"{label} picture drawn from: {t.prompt}".strip(), "width: 256px")
        for t, label in zip(traces, labels, strict=True)
    )
    text = f"<p><b>{html.escape(traces[0].prompt)}</b></p>{pictures}"
    return _page("viewer", data, text + "<p>Run this cell to see where each word looks.</p>")


def _page(kind: str, data: Mapping[str, object], without: str) -> str:
    """What is there ``without`` scripts, and the script that puts controls in its place."""
    name = {"viewer": "duge", "slides": "duge-slides"}[kind]
    ident = hashlib.sha256((_script(data) + without).encode()).hexdigest()[:16]
    css, *parts = (
        files(__package__).joinpath(file).read_text("utf-8")
        for file in (f"{kind}.css", "element.js", f"{kind}.js")
    )
    given = f"const ID = {_script(ident)}, DATA = {_script(data)};\nconst CSS = {_script(css)};"
    js = "\n".join([given, *parts])
    return f'<div data-{name}="{ident}" {OURS}>{without}</div><script>(() => {{\n{js}\n}})();</script>'


def _script(value: object) -> str:
    """JSON that can stand inside a script element: no text of a prompt can end it."""
    text = json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


AttentionTrace._repr_html_ = lambda trace: viewer_html((trace,))  # a trace shows itself by this viewer
