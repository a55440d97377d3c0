"""Figures of attention: each takes a trace and returns a finished Plot (or an Animation).

Maps that are shown side by side share one scale, beginning at 0, in a perceptually even colour map; the
colour bar says the unit. Differences use a diverging map centred on 0.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter
from PIL import Image, ImageDraw

from .attention import AttentionTrace
from .plot import Plot
from .viewer import COLORS, layer_label

SHARE = "share of a place's attention"


def _distinct(trace: AttentionTrace, words: Sequence[str] | str | None) -> list[str]:
    """The words that are asked for; by default every distinct word of the prompt."""
    if words is None:
        words = list({w.lower(): w for w in trace.words}.values())
    words = [words] if isinstance(words, str) else list(words)
    if not words:
        raise ValueError("no words to show: the prompt is empty; ask for '<start>', '<end>' or '<pad>'")
    return words


def _panels(rows: int, columns: int, cell: float, left: float = 0.0) -> tuple[Plot, np.ndarray]:
    """A figure with ``rows`` x ``columns`` bare axes of ``cell`` inches, and room for a colour bar."""
    figure = Plot(figsize=(left + columns * cell + 0.9, rows * cell + 0.5), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.set(xticks=[], yticks=[])
        one.spines[:].set_visible(False)
    return figure, axes


def _heat(
    axes: Axes,
    heat: np.ndarray,
    top: float,
    picture: Image.Image | None = None,
    smooth: bool = True,
    title: str = "",
) -> AxesImage:
    """A map from 0 to ``top``; over ``picture`` (in grey, so that only the map has colour) if given."""
    extent = (0, heat.shape[1], heat.shape[0], 0)
    if picture is not None:
        axes.imshow(picture.convert("L"), cmap="gray", vmin=0, vmax=255, extent=extent)
    axes.set_title(title, fontsize=9, pad=3)
    return axes.imshow(
        heat,
        cmap=COLORS,
        vmin=0,
        vmax=max(top, 1e-9),
        extent=extent,
        alpha=0.62 if picture is not None else 1,
        interpolation="bilinear" if smooth else "nearest",
    )


def _color_bar(figure: Plot, axes: np.ndarray, image: AxesImage, label: str = SHARE) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.05, aspect=25, pad=0.02)
    bar.solids.set_alpha(1)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=8)


def word_overlay(
    trace: AttentionTrace, words: Sequence[str] | str | None = None, columns: int = 5, title: str = ""
) -> Plot:
    """The picture, and over it where each word looks: the mean over all steps and layers of ``trace``."""
    words = _distinct(trace, words)
    maps = [trace.word(w) for w in words]
    top = max(float(m.max()) for m in maps)
    columns = min(columns, len(words) + 1)
    figure, axes = _panels(-(-(len(words) + 1) // columns), columns, 1.75)
    axes.flat[0].imshow(trace.image, interpolation="nearest")
    axes.flat[0].set_title("the picture", fontsize=9, pad=3)
    for one, word, heat in zip(axes.flat[1:], words, maps, strict=False):
        share = f"“{word}” {heat.mean():.1%}"
        image = _heat(one, heat, top, trace.image, title=share)
    for one in axes.flat[len(words) + 1 :]:
        one.set_visible(False)
    _color_bar(figure, axes, image)
    figure.suptitle(title or trace.prompt, fontsize=10)
    figure.alt = f"Where words look in the picture of “{trace.prompt}”: " + "; ".join(
        f"{w}, {_where(m)}" for w, m in zip(words, maps, strict=True)
    )
    return figure


def _where(heat: np.ndarray) -> str:
    """In words: "most at the lower left"."""
    y, x = (np.array(np.unravel_index(heat.argmax(), heat.shape)) + 0.5) / heat.shape
    names = ("upper", "middle", "lower")[int(y * 3)], ("left", "centre", "right")[int(x * 3)]
    return f"most at the {' '.join(names)} ({heat.max():.1%})"


def words_by_step(trace: AttentionTrace, words: Sequence[str] | str | None = None, columns: int = 6) -> Plot:
    """Words (rows) at ``columns`` steps from the noisiest to the last, over the previews if there are any."""
    words = _distinct(trace, words)
    count = len(trace.timesteps)
    steps = np.unique(np.linspace(0, count - 1, min(columns, count)).round().astype(int)).tolist()
    parts = [trace.step(s) for s in steps]
    maps = [[part.word(w) for part in parts] for w in words]
    figure = _table(
        maps,
        words,
        [f"step {s + 1} of {count}" for s in steps],
        [part.previews[0] if part.previews else None for part in parts],
    )
    figure.alt = f"Maps of {', '.join(words)} at steps {', '.join(str(s + 1) for s in steps)} of {count}."
    return figure


def words_by_layer(trace: AttentionTrace, words: Sequence[str] | str | None = None) -> Plot:
    """Words (rows) in every layer (columns), in forward order, at the resolution that the layer has."""
    words = _distinct(trace, words)
    parts = [trace.layer(name) for name in trace.layers]
    maps = [[part.word(w) for part in parts] for w in words]
    labels = [
        f"{layer_label(n)}\n{m.shape[1]}×{m.shape[0]}" for n, m in zip(trace.layers, maps[0], strict=True)
    ]
    figure = _table(maps, words, labels, [None] * len(parts), smooth=False)
    figure.alt = f"Maps of {', '.join(words)} in the layers {', '.join(map(layer_label, trace.layers))}."
    return figure


def heads(trace: AttentionTrace, word: str) -> Plot:
    """One word in every layer (rows) and head (columns); the trace was made with ``heads=True``."""
    count = [m.shape[1] if trace.has_heads else 0 for m in trace.maps.values()]
    parts = [trace.layer(name) for name in trace.layers]
    maps = [[part.head(i).word(word) for i in range(max(count))] for part in parts] if min(count) else []
    if not maps:
        trace.head(0)  # raises, and says what to do
    labels = [f"head {i}" for i in range(max(count))]
    figure = _table(maps, [layer_label(n) for n in trace.layers], labels, [None] * len(labels), smooth=False)
    figure.alt = f"Where “{word}” looks, in {len(maps)} layers and {max(count)} heads."
    return figure


def _table(
    maps: Sequence[Sequence[np.ndarray]],
    rows: Sequence[str],
    columns: Sequence[str],
    pictures: Sequence[Image.Image | None],
    smooth: bool = True,
) -> Plot:
    """Maps in rows and columns, all on one scale."""
    top = max(float(m.max()) for row in maps for m in row)
    figure, axes = _panels(len(rows), len(columns), 1.15, left=0.1 * max(map(len, rows)))
    for i, row in enumerate(maps):
        for j, heat in enumerate(row):
            title = columns[j] if i == 0 else ""
            image = _heat(axes[i, j], heat, top, pictures[j], smooth, title)
        axes[i, 0].set_ylabel(rows[i], rotation=0, ha="right", va="center", fontsize=9)
    _color_bar(figure, axes, image)
    return figure


def concentration(trace: AttentionTrace, words: Sequence[str] | str | None = None) -> Plot:
    """How narrowly each word looks, step by step: 0 is evenly over the picture, 1 a single place."""
    words = _distinct(trace, words)
    figure = Plot(figsize=(6.4, 2.9), dpi=100, layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(words)))
    ends = []
    for word, color in zip(words, colors, strict=True):
        values = trace.concentration(word)
        axes.plot(range(1, len(values) + 1), values, color=color, linewidth=2, marker="o", ms=3, label=word)
        ends.append(f"{word} from {values[0]:.3f} to {values[-1]:.3f}")
    axes.set_xlabel("step (1 is pure noise)", fontsize=9)
    axes.set_ylabel("concentration\n(1 − entropy, 0 … 1)", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.alt = "Concentration of attention over the steps: " + "; ".join(ends)
    return figure


def attention_difference(
    before: AttentionTrace, after: AttentionTrace, word: str, labels: tuple[str, str] = ("before", "after")
) -> Plot:
    """Two traces of the same prompt: both overlays on one scale, and their difference around 0."""
    a, b = before.word(word), after.word(word)
    if a.shape != b.shape:
        raise ValueError(f"maps of {a.shape} and {b.shape} cannot be compared: trace both at the same size")
    change = b - a
    top, most = max(float(a.max()), float(b.max())), max(float(np.abs(change).max()), 1e-9)
    figure, axes = _panels(1, 3, 2.3)
    for one, t, heat, label in zip(axes[0, :2], (before, after), (a, b), labels, strict=True):
        image = _heat(one, heat, top, t.image, title=f"{label}: {heat.mean():.1%}")
    _color_bar(figure, axes[0, :2], image)
    axes[0, 2].set_title("change", fontsize=9, pad=3)
    image = axes[0, 2].imshow(change, cmap="RdBu_r", vmin=-most, vmax=most)
    _color_bar(figure, axes[0, 2:], image, f"change in {SHARE}")
    figure.suptitle(f"Where “{word}” looks in “{before.prompt}”", fontsize=10)
    figure.alt = (
        f"“{word}” gets {a.mean():.2%} {labels[0]} and {b.mean():.2%} {labels[1]}; "
        f"the largest change at one place is {change.flat[np.abs(change).argmax()]:+.1%}"
    )
    return figure


def token_shares(trace: AttentionTrace) -> Plot:
    """The share of all attention that each token gets, start, end and padding included (one bar for it)."""
    shares = trace.shares()
    names = [t.text for t in trace.tokens if t.kind != "pad"]
    values = [float(s) for s, t in zip(shares, trace.tokens, strict=True) if t.kind != "pad"]
    pads = [float(s) for s, t in zip(shares, trace.tokens, strict=True) if t.kind == "pad"]
    if pads:
        names, values = [*names, f"<pad> × {len(pads)}"], [*values, sum(pads)]
    special = [n.startswith("<") for n in names]
    figure = Plot(figsize=(6, 0.5 + 0.24 * len(names)), dpi=100, layout="constrained")
    axes = figure.subplots()
    low, high = (matplotlib.colormaps[COLORS](x) for x in (0.3, 0.65))
    bars = axes.barh(range(len(names)), values, color=[low if s else high for s in special])
    axes.bar_label(bars, [f"{v:.1%}" for v in values], fontsize=8, padding=3)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(0, max(values) * 1.12)
    axes.set_xlabel("share of all attention", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.alt = "Share of all attention: " + ", ".join(
        f"{n} {v:.1%}" for n, v in zip(names, values, strict=True)
    )
    return figure


# ---------------------------------------------------------------------------- moving pictures


@dataclass(frozen=True)
class Animation:
    """A GIF that shows itself in a notebook, with alternative text."""

    gif: bytes = field(repr=False)
    alt: str

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.gif)

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.gif).decode()
        return f'<img src="data:image/gif;base64,{data}" alt="{html.escape(self.alt)}">'


def denoising(trace: AttentionTrace, word: str, side: int = 192, seconds: float = 0.25) -> Animation:
    """The picture as it comes out of the noise, and beside it where ``word`` looks at that step.

    The trace was made with ``previews=True``. The last frame stays for two seconds. All steps share one
    scale. ``side`` is the longer side of each picture in pixels.
    """
    if not trace.previews:
        raise ValueError("this trace holds no previews: make it with trace(..., previews=True)")
    count = len(trace.previews)
    maps = [trace.step(i).word(word) for i in range(count)]
    top = max(float(m.max()) for m in maps)
    table = (matplotlib.colormaps[COLORS](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8)
    w, h = (side * n // max(trace.image.size) for n in trace.image.size)
    frames = []
    for i, (picture, heat) in enumerate(zip(trace.previews, maps, strict=True)):
        heat = Image.fromarray(table[np.rint(255 * heat / max(top, 1e-9)).astype(int)])
        heat = heat.resize((w, h), Image.Resampling.BICUBIC)
        large = picture.resize((w, h), Image.Resampling.NEAREST)
        frame = Image.new("RGB", (2 * w + 6, h + 22), "white")
        frame.paste(large, (0, 0))
        frame.paste(Image.blend(large.convert("L").convert("RGB"), heat, 0.65), (w + 6, 0))
        write = ImageDraw.Draw(frame)
        write.text((2, h + 4), f"step {i + 1} of {count}", fill="black", font_size=13)
        write.text((w + 8, h + 4), f"“{word}”: {maps[i].mean():.1%}", fill="black", font_size=13)
        frames.append(frame.quantize(128))
    buffer = io.BytesIO()
    durations = [round(1000 * seconds)] * (count - 1) + [2000]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return Animation(buffer.getvalue(), f"“{trace.prompt}” in {count} steps, and where “{word}” looks")
