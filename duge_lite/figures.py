"""Every figure: results in, a finished :class:`Plot` (or :class:`~duge_lite.viewer.Slides`) out.

White or grey is what was wished for, colour is a deviation or attention; maps side by side share one scale
from 0; no colour stands alone: a marker, a frame, a cross or a number says the same. The title is the
caller's, who knows what was found.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from .attention import AttentionTrace
from .doodles.draw import OBJECTS, STYLES, draw
from .viewer import COLORS, Slides, layer_label

KEPT, LOST, ACCENT, LEFT = "#35618f", "#c8553d", "#5b5b66", "#6a51a3"  # told apart by lightness too
WISHED = LinearSegmentedColormap.from_list("wished", [LOST, "white", LEFT])
SHARE = "share of a place's attention"
PANELS = 12
Names, Rows = Sequence[str], Sequence[Sequence[Image.Image]]
Words = Names | str | None
SERIES = (KEPT, LOST, ACCENT, "#d9a441", "#3f8f6b", "#1b1b1b", LEFT)
LINES = [dict(marker=m, color=c, ms=6, lw=1.8) for m, c in zip("oXs^DPv", SERIES, strict=True)]
LOOKS = {"base": LINES[2], "unlearned": LINES[1], "oracle": LINES[0]}  # a model keeps its own look
LOOKS |= {"exact": LINES[1], "UCE": LINES[4]}


class Plot(Figure):
    """A matplotlib Figure that shows itself in a notebook, with alternative text for who cannot see it.

    No pyplot, nothing global, nothing left open. A dollar sign is a dollar sign, not mathematics.
    """

    alt: str = ""
    colors: int | None = None
    """How many the PNG has, at most 256; None for all. Grids of noisy pictures take a third of the bytes."""

    def png(self) -> bytes:
        """The figure as PNG bytes, for widgets, sliders and files."""
        with matplotlib.rc_context({"text.parse_math": False}):  # for text that drawing makes
            for text in self.findobj(Text):
                text.set_parse_math(False)
            self.savefig(buffer := io.BytesIO(), format="png", bbox_inches="tight", pad_inches=0.06)
        if self.colors is not None:
            image = Image.open(buffer).convert("RGB").quantize(self.colors, dither=Image.Dither.NONE)
            image.save(buffer := io.BytesIO(), format="png", optimize=True)
        return buffer.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        data = {"image/png": base64.b64encode(self.png()).decode(), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt}}


def _plot(
    width, height, rows=1, columns=1, title="", caption="", bare=False, **how
) -> tuple[Plot, np.ndarray]:
    """A figure of so many inches and its axes (rows, columns); ``bare`` ones are for pictures."""
    figure = Plot(figsize=(width, height), dpi=100, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    if caption:
        figure.supxlabel(caption, fontsize=8, color=ACCENT)
    axes = figure.subplots(rows, columns, squeeze=False, **how)
    if bare:
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
        for one in axes.flat:
            _bare(one)
    return figure, axes


def _said(figure: Plot, title: str, parts: Iterable[str], between: str = "; ") -> Plot:
    """The figure, with its alternative text."""
    figure.alt = f"{title.rstrip('.?!')}: " + between.join(parts)
    return figure


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _tidy(axes: Axes, title: str = "", x: str = "", y: str = "", percent: str = "") -> None:
    """Small type, no frame; ``percent`` says which axes ("x", "y", "xy") count in percents."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=8, which="both")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for name in percent:
        getattr(axes, f"{name}axis").set_major_formatter(PercentFormatter(1.0))
    if x == "requests":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _log(axis) -> None:
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _moves(axes: Axes, names: Iterable[str], before, after, colors=(KEPT, LOST)) -> None:
    """A row per name: a circle before, a triangle after that points the way it went."""
    at, before, after = (np.asarray(x, dtype=float) for x in (range(len(before)), before, after))
    more = ~(after < before)
    axes.hlines(at, before, after, color=ACCENT, linewidth=2, alpha=0.5)
    axes.plot(before, at, "o", mfc="white", mec=ACCENT, ms=7)
    for which, marker, color in ((more, ">", colors[0]), (~more, "<", colors[1])):
        axes.plot(after[which], at[which], marker, color=color, ms=8)
    axes.set_yticks(at, names, fontsize=9)
    axes.set_ylim(len(at) - 0.5, -0.5)


def _name_lines(axes: Axes, ends: Iterable[tuple[float, str, str]]) -> None:
    """Names (height, text, colour) at the right ends of lines, moved apart where they would touch."""
    low, high = axes.get_ylim()
    at = -np.inf
    for y, text, color in sorted(ends):
        at = max(min(max(y, low), high), at + 0.085 * (high - low))
        axes.text(1.03, at, text, color=color, fontsize=8, va="center", transform=axes.get_yaxis_transform())


# ---- pictures


def _grid(axes: Axes, rows, row_labels=(), column_labels=(), framed=(), below=()) -> None:
    """Pictures on one axes, a unit square each; ``framed`` (row, column) get a dashed frame."""
    height, width, pitch = len(rows), max(map(len, rows)), 1.2 if below else 1.0
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            y = pitch * i
            axes.imshow(picture, interpolation="nearest", extent=(j, j + 0.95, y + 0.95, y))
            if (i, j) in framed:
                look = dict(fill=False, ec=LOST, lw=2, ls=(0, (3, 2)), clip_on=False)
                axes.add_patch(Rectangle((j, y), 0.95, 0.95, **look))
            if below:
                axes.text(j + 0.475, y + 0.98, below[i][j], ha="center", va="top", fontsize=8)
    _bare(axes)
    limits = dict(xlim=(-0.03, width - 0.02), ylim=(pitch * height - 0.02, -0.03))
    axes.set(**limits, aspect=np.divide(*np.shape(rows[0][0])[:2]))
    axes.tick_params(length=0, pad=2)
    axes.xaxis.tick_top()
    points = axes.get_figure().get_figwidth() * 72 / width
    tilt = {"rotation": 30, "ha": "left"} if max(map(len, column_labels), default=0) * 4.6 > points else {}
    axes.set_xticks([j + 0.475 for j in range(len(column_labels))], column_labels, fontsize=8, **tilt)
    axes.set_yticks([pitch * i + 0.475 for i in range(len(row_labels))], row_labels, fontsize=9)


def image_grid(
    rows: Rows,
    row_labels: Names = (),
    column_labels: Names = (),
    title: str = "",
    cell: float = 0.9,
    framed: Iterable[tuple[int, int]] = (),
    below: Sequence[Names] = (),
) -> Plot:
    """Pictures in rows, ``cell`` inches each; ``framed`` marks (row, column), ``below`` holds words."""
    if not len(rows) or not len(rows[0]):
        raise ValueError("image_grid got no pictures: expected at least one row with one picture")
    height, width = len(rows), max(map(len, rows))
    left = 0.09 * max(map(len, row_labels), default=0)
    figure, axes = _plot(left + width * cell, 0.35 + height * cell * (1.2 if below else 1), title=title)
    figure.colors = 256
    _grid(axes[0, 0], rows, row_labels, column_labels, set(framed), below)
    names = filter(None, (", ".join(row_labels), ", ".join(dict.fromkeys(column_labels))))
    return _said(figure, f"{title or 'Pictures'}: {height} rows of {width}", names)


def contact_sheet(styles: Names = STYLES, seed: int = 3) -> Plot:
    """Every object of the doodle world in every style, as drawn (not generated)."""
    grounds = ("white", "blue", "yellow", "green", "pink", "black")
    half = (len(OBJECTS) + 1) // 2
    title = f"The doodle world: {len(OBJECTS)} objects, {len(styles)} styles"
    figure, axes = _plot(10.2, 10.4, 2, title=title)
    for k, names in enumerate((OBJECTS[:half], OBJECTS[half:])):
        rows = [
            [draw(n, style, grounds[(i + k * half + j) % 6], seed=seed + 31 * (i + k * half) + j)
             for i, n in enumerate(names)]
            for j, style in enumerate(styles)
        ]  # fmt: skip
        _grid(axes[k, 0], rows, styles, names)
    return _said(figure, title, (*OBJECTS, *styles), ", ")


def step_labels(requests: Names) -> list[str]:
    """A name for every row of the accuracy matrix: "base", "1 apple", "2 umbrella", ..."""
    return ["base", *(f"{k} {concept}" for k, concept in enumerate(requests, 1))]


def picture_history(pictures: Rows, names: Names, requests: Names, title: str = "") -> Plot:
    """Rows are models (base, then after each request), columns ``names``; framed: was to go."""
    gone = {(k, j) for k in range(len(pictures)) for j, name in enumerate(names) if name in requests[:k]}
    return image_grid(pictures, step_labels(requests), names, title, 0.6, gone)


# ---- attention


def _distinct(trace: AttentionTrace, words: Words, most: int) -> list[str]:
    """The words that are asked for, by default every distinct word of the prompt; at most ``most``."""
    words = list({w.lower(): w for w in trace.words}.values()) if words is None else words
    words = [words] if isinstance(words, str) else list(words)
    if not words:
        raise ValueError("no words to show: the prompt is empty; ask for '<start>', '<end>' or '<pad>'")
    return words[:most]


def _heat(axes: Axes, heat: np.ndarray, norm: Normalize, picture=None, smooth: bool = True, title: str = ""):
    """A map, over the picture in grey if one is given, so that only attention has colour."""
    h, w = heat.shape
    if picture is not None:
        axes.imshow(picture.convert("L"), cmap="gray", vmin=0, vmax=255, extent=(0, w, h, 0))
    axes.set_title(title, fontsize=9, pad=3)
    look = dict(interpolation="bilinear" if smooth else "nearest", alpha=1 if picture is None else 0.62)
    return axes.imshow(heat, cmap=COLORS, norm=norm, extent=(0, w, h, 0), **look)


def _maps(
    rows: Mapping[str, Sequence[np.ndarray]],
    columns: Names,
    picture: Image.Image | None = None,
    under: Sequence[Image.Image] = (),
    title: str = "",
    smooth: bool = False,
    power: float = 1.0,
) -> tuple[Plot, np.ndarray]:
    """Maps on one scale; beside them the picture, or above each column the one under its maps."""
    top = max(float(m.max()) for row in rows.values() for m in row)
    norm = PowerNorm(power, 0, max(top, 1e-9))
    down, right = int(bool(under)), int(picture is not None and not under)
    h, w = len(rows) + down, len(columns) + right
    size = (0.09 * max(map(len, rows)) + 1.25 * w + 0.9, 1.25 * h + 0.5)
    figure, axes = _plot(*size, h, w, title, bare=True)
    for one, shown in zip(axes[0], under or [picture][:right], strict=False):
        one.imshow(shown, interpolation="nearest")
    if right:
        axes[0, 0].set_title("the picture", fontsize=9, pad=3)
    for (name, row), line in zip(rows.items(), axes[down:, right:], strict=True):
        for j, (one, heat) in enumerate(zip(line, row, strict=True)):
            image = _heat(one, heat, norm, under[j] if under else None, smooth)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, labelpad=7)
    for one, column in zip(axes[0, right:], columns, strict=True):
        one.set_title(column, fontsize=9, pad=3)
    _color_bar(figure, axes, image)
    return figure, axes[down:, right:]


def _color_bar(figure: Plot, axes: np.ndarray, image, label: str = SHARE) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.05, aspect=25, pad=0.02)
    bar.solids.set_alpha(1)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=8)


def _where(heat: np.ndarray) -> str:
    """In words: "most at the lower left"."""
    y, x = (np.array(np.unravel_index(heat.argmax(), heat.shape)) + 0.5) / heat.shape
    names = ("upper", "middle", "lower")[int(y * 3)], ("left", "centre", "right")[int(x * 3)]
    return f"most at the {' '.join(names)} ({heat.max():.1%})"


def word_overlay(
    trace: AttentionTrace, words: Words = None, columns: int = 4, title: str = "", top: float | None = None
) -> Plot:
    """The picture, and over it where each word looks: the mean over all steps and layers of ``trace``.

    One scale for all, from 0 to ``top``: by default the largest share that there is.
    """
    words = _distinct(trace, words, PANELS - 1)
    maps = [trace.word(w) for w in words]
    norm = Normalize(0, top or max(1e-9, *(float(m.max()) for m in maps)))
    columns = min(columns, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    size = (1.75 * columns + 0.9, 1.75 * rows + 0.5)
    figure, axes = _plot(*size, rows, columns, title or trace.prompt, bare=True)
    axes.flat[0].imshow(trace.image, interpolation="nearest")
    axes.flat[0].set_title("the picture", fontsize=9, pad=3)
    for one, word, heat in zip(axes.flat[1:], words, maps, strict=False):
        image = _heat(one, heat, norm, trace.image, title=f"“{word}” {heat.mean():.1%}")
    _color_bar(figure, axes, image)
    looks = [f"{w}, {_where(m)}" for w, m in zip(words, maps, strict=True)]
    return _said(figure, f"Where words look in the picture of “{trace.prompt}”", looks)


def words_by_step(trace: AttentionTrace, words: Words = None, title: str = "From noise to picture") -> Plot:
    """Words (rows) at some steps from the noisiest to the last, under the half-finished pictures."""
    words = _distinct(trace, words, 5)
    count, columns = len(trace.timesteps), PANELS // (len(words) + 1)
    steps = np.unique(np.linspace(0, count - 1, min(columns, count)).round().astype(int)).tolist()
    parts = [trace.step(s) for s in steps]
    rows = {w: [part.word(w) for part in parts] for w in words}
    under = [part.previews[0] for part in parts] if trace.previews else []
    labels = [f"step {s + 1} of {count}" for s in steps]
    figure, _ = _maps(rows, labels, trace.image, under, title, smooth=True)
    return _said(figure, f"{title}, {', '.join(words)}", labels, ", ")


def words_by_layer(
    trace: AttentionTrace, words: Words = None, title: str = "Where it looks, level by level"
) -> Plot:
    """Words (rows) at every level of the UNet (columns), the mean of its layers, beside the picture."""
    words = _distinct(trace, words, 4)
    for coarse in (False, True):  # by size alone, where there would be too many panels
        levels: dict[str, list[str]] = {}
        for name, maps in trace.maps.items():
            part = "" if coarse else layer_label(name).split()[0] + "\n"
            levels.setdefault(f"{part}{maps.shape[-1]}×{maps.shape[-2]}", []).append(name)
        if len(words) * (len(levels) + 1) <= PANELS:
            break
    parts = [trace.layer(*layers) for layers in levels.values()]
    rows = {word: [part.word(word) for part in parts] for word in words}
    figure, _ = _maps(rows, list(levels), trace.image, (), title)
    return _said(figure, f"{title}, {', '.join(words)}", (level.replace("\n", " ") for level in levels), ", ")


def heads(trace: AttentionTrace, word: str, title: str = "") -> Plot:
    """One word in the heads (columns) of the layers (rows) that give it most; made with ``heads=True``."""
    count = min(m.shape[1] if trace.has_heads else 0 for m in trace.maps.values())
    if not count:
        trace.head(0)  # raises, and says what to do
    share = {name: float(trace.layer(name).word(word).max()) for name in trace.layers}
    best = sorted(share, key=share.get, reverse=True)[: max(1, (PANELS - 1) // count)]
    parts = {name: trace.layer(name) for name in trace.layers if name in best}
    rows = {layer_label(n): [part.head(i).word(word) for i in range(count)] for n, part in parts.items()}
    title = title or f"Each head looks for something of its own: “{word}”"
    figure, _ = _maps(rows, [f"head {i}" for i in range(count)], trace.image, (), title)
    return _said(figure, f"{title}, in {count} heads of each layer", rows, ", ")


def target_maps(
    rows: Mapping[str, Mapping[str, np.ndarray]], title: str = "", picture: Image.Image | None = None
) -> Plot:
    """One token's maps, (h, w) by layer, a row for each name; below zero there is a cross.

    Shown are the layers in which the first row's map is largest. The scale spreads out small shares.
    """
    first = {layer: float(np.asarray(heat).max()) for layer, heat in next(iter(rows.values())).items()}
    most = max(1, PANELS // len(rows) - (picture is not None))
    best = sorted(first, key=first.get, reverse=True)[:most]
    layers = [layer for layer in first if layer in best]
    maps = {name: [np.asarray(row[layer], dtype=float) for layer in layers] for name, row in rows.items()}
    shown = {name: [heat.clip(0) for heat in row] for name, row in maps.items()}
    sizes = ["{1}×{0}".format(*heat.shape) for heat in next(iter(maps.values()))]
    labels = [f"{layer_label(n)}\n{size}" for n, size in zip(layers, sizes, strict=True)]
    figure, axes = _maps(shown, labels, picture, (), title, power=0.5)
    for line, row in zip(axes, maps.values(), strict=True):
        for one, heat in zip(line, row, strict=True):
            y, x = np.nonzero(heat < 0)
            size = max(heat.shape)
            one.plot(x + 0.5, y + 0.5, "x", color="white", ms=30 / size, mew=6 / size)
    below = {name: sum(int((m < 0).sum()) for m in row) for name, row in maps.items()}
    means = {name: float(np.mean([m.mean() for m in row])) for name, row in maps.items()}
    parts = (f"{n}: {mean:.1%} on average, {below[n]} places below zero" for n, mean in means.items())
    return _said(figure, f"{title or 'Maps'}, in {len(layers)} layers", parts)


def attention_difference(
    before: AttentionTrace,
    after: AttentionTrace,
    words: Names | str,
    labels: tuple[str, str] = ("before", "after"),
    title: str = "",
) -> Plot:
    """Per word both pictures, both maps on one scale, and the change: white is none."""
    words = _distinct(before, words, 2)
    pairs = [(before.word(w), after.word(w)) for w in words]
    if pairs[0][0].shape != pairs[0][1].shape:
        raise ValueError(f"maps of {pairs[0][0].shape} and {pairs[0][1].shape}: trace both at the same size")
    norm = Normalize(0, max(1e-9, *(float(m.max()) for pair in pairs for m in pair)))
    most = max(1e-9, *(float(np.abs(b - a).max()) for a, b in pairs))
    size = (9.6, 1.85 * len(words) + 0.45)
    figure, axes = _plot(*size, len(words), 5, title or before.prompt, bare=True)
    for word, pair, row in zip(words, pairs, axes, strict=True):
        for k, (trace, heat) in enumerate(zip((before, after), pair, strict=True)):
            row[2 * k].imshow(trace.image, interpolation="nearest")
            row[2 * k].set_title(labels[k], fontsize=9, pad=3)
            image = _heat(row[2 * k + 1], heat, norm, trace.image, title=f"“{word}” {heat.mean():.1%}")
        change = row[4].imshow(pair[1] - pair[0], cmap="PuOr_r", vmin=-most, vmax=most)
        row[4].set_title("change", fontsize=9, pad=3)
    _color_bar(figure, axes[:, :4], image)
    _color_bar(figure, axes[:, 4:], change, "change of that share")
    means = zip(words, pairs, strict=True)
    parts = (f"“{w}” gets {a.mean():.2%} {labels[0]} and {b.mean():.2%} {labels[1]}" for w, (a, b) in means)
    return _said(figure, title or before.prompt, parts)


def concentration(
    trace: AttentionTrace, words: Words = None, title: str = "How narrowly each word looks"
) -> Plot:
    """How narrowly each word looks, step by step: 0 is evenly over the picture, 1 a single place."""
    values = {word: trace.concentration(word) for word in _distinct(trace, words, len(LINES))}
    figure, axes = _plot(6.4, 3, title=title)
    for look, line in zip(LINES, values.values(), strict=False):
        axes[0, 0].plot(range(1, len(line) + 1), line, **look | {"ms": 4})
    axes[0, 0].set_ylim(bottom=0)
    _tidy(axes[0, 0], "", "step (1 is pure noise)", "concentration\n(1 − entropy, 0 … 1)")
    _name_lines(axes[0, 0], [(v[-1], w, c) for c, (w, v) in zip(SERIES, values.items(), strict=False)])
    return _said(figure, title, (f"{w} from {v[0]:.3f} to {v[-1]:.3f}" for w, v in values.items()))


def token_shares(trace: AttentionTrace, title: str = "Who gets the attention") -> Plot:
    """The share of all attention that each token gets, start, end and padding included (one bar for it)."""
    shares = trace.shares()
    bars = [(t.text, float(s)) for s, t in zip(shares, trace.tokens, strict=True) if t.kind != "pad"]
    pads = [float(s) for s, t in zip(shares, trace.tokens, strict=True) if t.kind == "pad"]
    names, values = zip(*bars, *([(f"<pad> × {len(pads)}", sum(pads))] if pads else []), strict=True)
    figure, axes = _plot(6, 0.6 + 0.24 * len(names), title=title)
    one, colors = axes[0, 0], ["#c9c9d1" if n.startswith("<") else KEPT for n in names]
    bars = one.barh(range(len(names)), values, color=colors)
    one.bar_label(bars, [f"{v:.1%}" for v in values], fontsize=8, padding=3)
    _tidy(one, "", "share of all attention (grey: no words)", percent="x")
    one.grid(False)
    one.set_yticks(range(len(names)), names, fontsize=9)
    one.set(xlim=(0, max(values) * 1.12), ylim=(len(names) - 0.4, -0.6))
    return _said(figure, title, (f"{n} {v:.1%}" for n, v in zip(names, values, strict=True)), ", ")


def denoising(trace: AttentionTrace, word: str, title: str = "") -> Slides:
    """A slider: the picture as it comes out of the noise, beside it where ``word`` looks at that step."""
    if not trace.previews:
        raise ValueError("this trace holds no previews: make it with trace(..., previews=True)")
    steps = [replace(trace.step(i), image=picture) for i, picture in enumerate(trace.previews)]
    maps = [step.word(word) for step in steps]
    top = max(1e-9, *(float(m.max()) for m in maps))
    labels = [
        f"step {i} of {len(maps)}: “{word}” gets {m.mean():.1%}, {_where(m)}" for i, m in enumerate(maps, 1)
    ]
    frames = [word_overlay(step, word, title=" ", top=top) for step in steps]
    return Slides(
        [frame.png() for frame in frames], labels, title or f"“{trace.prompt}” comes out of the noise"
    )


# ---- losses and weights


def loss_curves(history: pd.DataFrame, title: str = "The three losses while forgetting") -> Plot:
    """One panel per loss (unweighted, log scale), with a running mean; ``history`` by iteration."""
    panels = {
        "forget": "attention loss\n(forget: falls)",
        "prior": "prior-preservation loss\n(keep: stays small)",
        "regularization": "regularization loss\n(distance walked)",
    }
    figure, axes = _plot(9, 2.6, 1, 3, title)
    for one, (column, label) in zip(axes[0], panels.items(), strict=True):
        if len(history):
            floor = 1e-6 * max(0.0, history[column].max())  # two losses start at next to nothing
            values = history[column].where(history[column] > floor)
            one.plot(history.index, values, color=ACCENT, alpha=0.35, linewidth=1)
            one.plot(history.index, values.rolling(10, min_periods=1).mean(), color=KEPT, linewidth=2)
            _log(one.yaxis)
        _tidy(one, label, "iteration")
    ends = {c: (history[c].iloc[0], history[c].iloc[-1]) for c in panels} if len(history) else {}
    return _said(figure, title, (f"{c} {a:.3g} to {b:.3g}" for c, (a, b) in ends.items()))


def losses_by_layer(history: pd.DataFrame, title: str = "The three losses, layer by layer") -> Plot:
    """One panel per loss, a line per layer from before (circle) to after (triangle), log scale."""
    names = {"attention": "falls", "prior": "stays small", "regularization": "distance walked"}
    figure, axes = _plot(9, 1.2 + 0.22 * len(history), 1, 3, title, "○ before, ▶ ◀ after; none: 0")
    for one, (name, label) in zip(axes[0], names.items(), strict=True):
        ends = (history[f"{name} {when}"].where(lambda v: v > 0) for when in ("before", "after"))
        _log(one.xaxis)
        _moves(one, map(layer_label, history.index), *ends, colors=(KEPT, KEPT))
        _tidy(one, f"{name} loss\n({label})")
        one.tick_params(labelleft=one is axes[0, 0])
    means = history.mean()
    parts = (f"{name} {means[f'{name} before']:.3g} to {means[f'{name} after']:.3g}" for name in names)
    return _said(figure, f"{title}, means over layers", parts)


def shares_moved(
    names: Names, before: Sequence[float], after: Sequence[float],
    labels: tuple[str, str] = ("before", "after"), title: str = "Who gains what the others lose",
) -> Plot:  # fmt: skip
    """Each token's share of attention before (circle) and after (a triangle that points there)."""
    figure, axes = _plot(6.6, 0.9 + 0.26 * len(names), title=title)
    _moves(axes[0, 0], names, before, after)
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        place = dict(xytext=(9, 0), textcoords="offset points", va="center")
        axes[0, 0].annotate(f"{100 * (a - b):+.1f}", (max(a, b), i), fontsize=8, **place)
    label = f"share of all attention: ○ {labels[0]}, ▶ {labels[1]}; numbers: change in percentage points"
    _tidy(axes[0, 0], "", label, percent="x")
    axes[0, 0].set_xlim(0, max(*before, *after) * 1.14)
    moves = zip(names, before, after, strict=True)
    return _said(figure, title, (f"{n} {b:.1%} to {a:.1%}" for n, b, a in moves), ", ")


MATRICES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out": "output"}


def matrices(panels: Mapping[str, Mapping[str, float]], title: str = "") -> Plot:
    """A number for every matrix of every cross-attention layer, by parameter name; a panel per mapping.

    One logarithmic scale of greys for all panels; an exact zero has no colour but a hatching.
    """
    names = dict.fromkeys(name.split(".attn2.")[0] for name in next(iter(panels.values())))
    layers = sorted(names, key=lambda n: ("up" in n, "mid" in n))  # down, mid, up: the forward order
    tables = np.zeros((len(panels), len(MATRICES), len(layers)))
    for table, values in zip(tables, panels.values(), strict=True):
        for name, value in values.items():
            layer, _, matrix = name.partition(".attn2.")
            table[list(MATRICES).index(matrix.split(".")[0]), layers.index(layer)] = value
    known = tables[tables > 0]
    low, high = (known.min(), known.max()) if known.size else (0.1, 1.0)
    norm = LogNorm(low, max(high, 1.001 * low))
    figure, axes = _plot(1.0 + 0.86 * len(layers), 0.35 + 1.72 * len(tables), len(tables), title=title)
    for one, name, table in zip(axes.flat, panels, tables, strict=True):
        one.imshow(np.ma.masked_less_equal(table, 0), cmap="Purples", norm=norm, aspect="auto")
        one.patch.set(hatch="///", facecolor="white", edgecolor="#bbbbbb")
        for (i, j), value in np.ndenumerate(table):
            box = None if value > 0 else dict(facecolor="white", edgecolor="none", pad=1.5)
            ink = "white" if value > 0 and norm(value) > 0.6 else "black"
            text = f"{value:.2g}" if value > 0 else "0"
            one.text(j, i, text, ha="center", va="center", fontsize=8, color=ink, bbox=box)
        one.set_yticks(range(len(MATRICES)), MATRICES.values(), fontsize=8)
        one.set_xticks(range(len(layers)), map(layer_label, layers), fontsize=8)
        one.tick_params(length=0)
        one.set_title(name, fontsize=9)
    counts = zip(panels, tables, strict=True)
    parts = (f"{n}: {(t > 0).sum()} of {t.size} above zero, the largest {t.max():.2g}" for n, t in counts)
    return _said(figure, title or "Matrices of cross-attention", parts)


def drift_over_requests(drifts: Mapping[str, pd.DataFrame], title: str = "How far the weights went") -> Plot:
    """A panel per sequence, a line per kind of layer; ``drifts`` holds ``sequence.drift()`` by name."""
    figure, axes = _plot(3.3 * len(drifts) + 1, 3.1, 1, len(drifts), title, sharey=True)
    kinds = MATRICES | {"other": "other"}
    far = {name: drift["from base"].unstack() for name, drift in drifts.items()}
    for one, (name, table) in zip(axes[0], far.items(), strict=True):
        shown = [(kind, look) for kind, look in zip([k for k in kinds if k in table], LINES, strict=False)]
        for kind, look in shown:
            one.plot([0, *table.index], [0, *table[kind]], **look)
        _tidy(one, name, "requests", percent="y")
    _name_lines(one, [(float(table[kind].iloc[-1]), kinds[kind], look["color"]) for kind, look in shown])
    axes[0, 0].set_ylabel("distance, as a share of the layer", fontsize=8)
    ends = {n: ", ".join(f"{kinds[k]} {v:.1%}" for k, v in t.iloc[-1].items()) for n, t in far.items()}
    return _said(figure, title, (f"{name}, at the end: {end}" for name, end in ends.items()))


def bowl(far: np.ndarray, losses: np.ndarray, title: str) -> Plot:
    """The loss along ways through a solution: ``far`` (n,) to either side, ``losses`` (ways, n)."""
    figure, axes = _plot(5.6, 3.0, title=title, caption=f"{len(losses)} random directions, both ways")
    one = axes[0, 0]
    one.plot(far, losses.T, color=KEPT, lw=0.8, alpha=0.6)
    one.plot(0, losses[:, len(far) // 2].mean(), "o", color=LOST, ms=8)
    one.annotate(
        "the solution", (0, losses.min()), (0, -14), textcoords="offset points", ha="center", fontsize=8
    )
    one.margins(y=0.2)
    _tidy(one, "", "how far from the solution", "the sum of the losses")
    return _said(figure, title, [f"from {losses.min():.3g} up to {losses.max():.3g}"])


# ---- judged


def accuracy_plot(before: pd.DataFrame, after: pd.DataFrame, forgotten: Names = (), title: str = "") -> Plot:
    """The judge's accuracy per concept before (open) and after (filled), with 95 % intervals."""
    names, title = list(before.index), title or "What the judge recognises, before and after"
    n = f", n = {int(after.images.iloc[0])} pictures each" if "images" in after else ""
    caption = f"○ before; ● after, to be kept; ✕ after, to be forgotten; lines: 95 % intervals{n}"
    figure, axes = _plot(9, 3.2, title=title, caption=caption)
    one, at, gone = axes[0, 0], np.arange(len(names)), np.isin(names, forgotten)
    one.plot(at - 0.14, before.accuracy, "o", mfc="none", mec=ACCENT, ms=7)
    for which, marker, color in ((~gone, "o", KEPT), (gone, "X", LOST)):
        x, rows = at[which] + 0.14, after[which]
        one.vlines(x, rows.low, rows.high, color=color, linewidth=1.5, alpha=0.55)
        one.plot(x, rows.accuracy, marker, color=color, ms=7, linestyle="none")
    _tidy(one, "", "", "named right by the judge", "y")
    labels = [f"✕ {c}" if c in forgotten else c for c in names]
    one.set_xticks(at, labels, rotation=45, ha="right", fontsize=8)
    one.set_ylim(-0.06, 1.06)
    moves = (f"{n} {before.accuracy[n]:.2f} to {after.accuracy[n]:.2f}" for n in names)
    return _said(figure, title, moves, ", ")


def accuracy_matrix(matrix: pd.DataFrame, requests: Names, title: str = "", caption: str = "") -> Plot:
    """The accuracy matrix R[k, j] in percent: rows are models, columns concepts, requests first.

    White is as wished (gone, or there); red is lost, violet is still there although it was to go, which the
    frames tell too. Raises ValueError when a request has no column.
    """
    title = title or "Accuracy of each concept (column) after each request (row)"
    caption = caption or "% named right; white: as wished; framed: was to go"
    figure, axes = _plot(1.5 + 0.46 * matrix.shape[1], 1.6 + 0.34 * len(matrix), title=title, caption=caption)
    draw_matrix(axes[0, 0], matrix, requests)
    last = (f"{name} {value:.2f}" for name, value in matrix.iloc[-1].items())
    return _said(figure, f"{title}. After {', '.join(requests)}", last, ", ")


def draw_matrix(axes: Axes, matrix: pd.DataFrame, requests: Names, at: int | None = None) -> None:
    """:func:`accuracy_matrix` on given axes; ``at`` points at one row."""
    if missing := [c for c in requests if c not in matrix.columns]:
        raise ValueError(f"the matrix has no column for {', '.join(missing)}: evaluate it as well")
    columns = [*requests, *(c for c in matrix.columns if c not in requests)]
    table = matrix[columns].to_numpy(float)
    k, j = np.indices(table.shape)
    gone = (j < len(requests)) & (j < k)
    axes.imshow(np.where(gone, table, table - 1), cmap=WISHED, vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        off = value if gone[row, column] else 1 - value
        ink = "white" if off > 0.6 else "black" if off > 0.02 else "#9a9aa2"
        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=ink)
    for i in range(len(requests)):
        box = Rectangle((i - 0.46, i + 0.54), 0.92, len(table) - i - 1.08, fill=False, ec="#333333", lw=1.4)
        axes.add_patch(box)
    names = [f"✕ {c}" if c in (requests if at is None else requests[:at]) else c for c in columns]
    axes.set_xticks(range(len(columns)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(table)), step_labels(requests), fontsize=8)
    axes.set_ylabel("after request", fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if at is not None:
        look = dict(fill=False, ec="black", lw=2.5, clip_on=False)
        axes.add_patch(Rectangle((-0.5, at - 0.5), len(columns), 1, **look))
        axes.get_yticklabels()[at].set(fontweight="bold")


METRICS = {
    "UA": "gone (UA)\nof all that was to go",
    "objects kept": "objects kept\nof all that are to stay",
    "styles kept": "styles kept\nof all that are to stay",
    "IRA": "kept, same kind (IRA)\nas the last request's",
    "CRA": "kept, other kind (CRA)\nthan the last request's",
    "HM": "harmonic mean (HM)\nsmall when one of them is",
}
"""What columns of a sequence's metrics are called."""


def shown_metrics(table: pd.DataFrame) -> list[str]:
    """The metrics to show: by kinds where there are, for IRA and CRA swap meaning with the last request."""
    swapped = ("IRA", "CRA") if "objects kept" in table else ()
    return [name for name in METRICS if name in table and name not in swapped]


def metrics_over_requests(
    tables: Mapping[str, pd.DataFrame], names: Names | None = None,
    title: str = "What is gone, and what is left", caption: str = "",
) -> Plot:  # fmt: skip
    """A panel per metric (:func:`shown_metrics`), a line per sequence; ``tables`` holds metrics by name."""
    names = shown_metrics(next(iter(tables.values()))) if names is None else names
    figure, axes = _plot(2.4 * len(names) + 1.2, 3.1, 1, len(names), title, caption, sharey=True)
    count = len(LINES)
    looks = [LINES[i % count] | {"ls": ("-", "--", ":")[i // count % 3]} for i in range(len(tables))]
    for one, name in zip(axes[0], names, strict=True):
        for look, table in zip(looks, tables.values(), strict=True):
            one.plot(table[name], **look)
        one.set_ylim(-0.05, 1.05)
        _tidy(one, METRICS.get(name, name), "requests", percent="y")
    ends = {label: table[list(names)].iloc[-1] for label, table in tables.items()}
    _name_lines(
        one, [(end.iloc[-1], n, look["color"]) for (n, end), look in zip(ends.items(), looks, strict=True)]
    )
    texts = {
        label: ", ".join(f"{name} {value:.2f}" for name, value in end.items()) for label, end in ends.items()
    }
    return _said(figure, title, (f"{label}, at the end: {text}" for label, text in texts.items()))


def pareto_front(table: pd.DataFrame) -> list[str]:
    """The rows that no other beats, by being as good in every column and better in one; more is better."""
    values = table.to_numpy(float)
    lead = values[:, None] - values  # (n, n, columns): of each row over each row
    beaten = ((lead >= 0).all(axis=2) & (lead > 0).any(axis=2)).any(axis=0)
    return list(table.index[~beaten])


def trade_off(
    table: pd.DataFrame,
    title: str = "Gone, and kept: further up and to the right is better",
    axes_labels: tuple[str, str] = ("what is left of all other concepts", "what is gone of the concept"),
) -> Plot:
    """A point per row of ``table``, whose two columns are drawn to the right and up; more of both is better.

    Rows on the Pareto front (:func:`pareto_front`, of whole percents: less is a picture or two) are filled;
    rows that are equal in whole percents are one point with one label. Axes span at least twenty percents.
    """
    rounded = table.round(2)
    front, (x, y) = pareto_front(rounded), table.columns
    points = [(a, b, list(group.index)) for (b, a), group in rounded.groupby([y, x])][::-1]
    lines = sum(1 + (len(names) - 1) // 3 for *_, names in points)
    figure, axes = _plot(9, max(3.4, 0.3 * lines), title=title)
    one, done = axes[0, 0], 0
    for a, b, names in points:
        on, mine = names[0] in front, 1 + (len(names) - 1) // 3
        look = dict(marker="o" if on else "s", mfc=KEPT if on else "white", zorder=4 if on else 3)
        one.plot(a, b, color=KEPT, ms=8, mew=1.5, **look)
        text = ",\n".join(", ".join(names[i : i + 3]) for i in range(0, len(names), 3))
        place = (1.04, 1 - (done + mine / 2) / lines)  # in a column, so that close points stay apart
        arrow = dict(arrowstyle="-", color=ACCENT, lw=0.7, alpha=0.45, relpos=(0, 0.5), shrinkB=5)
        look = dict(fontsize=8, fontweight="bold" if on else "normal", va="center", arrowprops=arrow)
        text += f": {b:.0%} gone, {a:.0%} kept"
        one.annotate(text, (a, b), place, textcoords="axes fraction", **look)
        done += mine
    low, high = np.minimum(table.min(), table.max() - 0.2), table.max()
    pad = 0.06 * (high - low)
    one.set(xlim=(low[x] - pad[x], high[x] + pad[x]), ylim=(low[y] - pad[y], high[y] + pad[y]))
    _tidy(one, "", *axes_labels, percent="xy")
    one.locator_params(nbins=6, steps=[1, 2, 5, 10])
    names = {n: f"{n} (on the front)" if n in front else n for n in table.index}
    parts = (f"{names[n]}: {row[y]:.2f} {y}, {row[x]:.2f} {x}" for n, row in table.iterrows())
    return _said(figure, title, parts)


def timeline_step(
    pictures: Rows, names: Names, requests: Names, matrix: pd.DataFrame, at: int, alt: str = ""
) -> Plot:
    """Pictures of the base and of model ``at`` (framed: was to go), and the matrix with its row marked."""
    figure = Plot(figsize=(10, 3.4 + 0.3 * len(matrix)), dpi=100, layout="constrained")
    figure.colors, figure.alt = 256, alt
    above, below = figure.subplots(2, 1, height_ratios=(2, 1.2 + 0.25 * len(matrix)))
    gone = {(1, j) for j, name in enumerate(names) if name in requests[:at]}
    _grid(above, (pictures[0], pictures[at]), ("base", step_labels(requests)[at]), names, gone)
    draw_matrix(below, matrix, requests, at)
    below.set_title("% named right; white: as wished; framed: was to go", fontsize=8, color=ACCENT)
    return figure


# ---- attacks


def _looks(names: Names) -> list[dict]:
    """A model keeps its own marker and colour, also in "unlearned, other pictures"; others get spare ones."""
    heads = [name.split(",")[0] for name in names]
    looks = {head: LOOKS[head] for head in heads if head in LOOKS}
    spare = iter([line for line in LINES[3:] if line not in looks.values()])
    looks |= {head: next(spare, None) for head in dict.fromkeys(heads) if head not in looks}
    if None in looks.values():
        raise ValueError(f"{', '.join(names)}: expected at most {len(LINES) - 3} beside {', '.join(LOOKS)}")
    return [looks[head] for head in heads]


def attack_summary(table: pd.DataFrame, title: str = "Who gets it back?", caption: str = "") -> Plot:
    """Each attack's share of pictures with the concept, a marker per model, with 95 % intervals.

    ``table`` as :func:`duge_lite.attacks.shares` counts it by ``["attack", "model"]``; both in the order in
    which they first come.
    """
    attacks, models = (list(table.index.unique(level)) for level in (0, 1))
    caption = caption or "pictures in which the judge sees the concept, with 95 % intervals"
    between = min(0.22, 0.84 / len(models))
    figure, axes = _plot(
        7.6, 1.1 + max(0.55, 0.16 * len(models)) * len(attacks), title=title, caption=caption
    )
    one = axes[0, 0]
    for k, (model, look) in enumerate(zip(models, _looks(models), strict=True)):
        rows = table.xs(model, level=1)
        at = np.array([attacks.index(a) for a in rows.index]) + between * (k - (len(models) - 1) / 2)
        one.hlines(at, rows.low, rows.high, color=look["color"], linewidth=2, alpha=0.55)
        one.plot(rows.seen, at, **look | {"ls": "", "ms": 8, "mec": "white", "mew": 0.8})
        name = dict(xytext=(9, 0), textcoords="offset points", va="center", fontsize=8, color=look["color"])
        one.annotate(model, (rows.high.iloc[0], at[0]), **name)  # in the first row, beside its interval
    _tidy(one, percent="x")
    one.set_yticks(range(len(attacks)), attacks)
    one.set(xlim=(-0.03, 1.12), ylim=(len(attacks) - 0.45, -0.55))
    return _said(figure, title, (f"{a}, {m}: {s:.0%}" for (a, m), s in table.seen.items()))


def recovery_curves(
    curves: Mapping[str, pd.DataFrame], known: float, title: str = "How fast does it come back?"
) -> Plot:
    """Against fine-tuning steps: what the judge sees (95 % bands), and the denoising error, told the name.

    ``curves`` as :func:`duge_lite.attacks.shares` counts :func:`duge_lite.attacks.relearning` by ``"step"``;
    ``known`` is the base model's error. A name with a comma ("oracle, other pictures") is a control: dotted.
    """
    figure, axes = _plot(9, 3.4, 1, 2, title)
    left, right = axes[0]
    looks = dict(zip(curves, _looks(list(curves)), strict=True))
    for name, curve in curves.items():
        look = looks[name] | ({"ls": ":", "mfc": "white"} if "," in name else {})
        left.fill_between(curve.index, curve.low, curve.high, color=look["color"], alpha=0.12, linewidth=0)
        left.plot(curve.index, curve.seen, **look)
        right.plot(curve.index, curve.told, **look)
    left.set_ylim(-0.03, 1.03)
    right.axhline(known, color=ACCENT, linestyle="--", linewidth=1)
    _tidy(
        left, "The judge: pictures with the concept", "fine-tuning steps; bands are 95 % intervals", "", "y"
    )
    _tidy(right, "No judge: error on new drawings, told the name", "fine-tuning steps")
    ends = [(float(c.told.iloc[-1]), name, looks[name]["color"]) for name, c in curves.items()]
    _name_lines(right, [*ends, (known, "base", ACCENT)])
    told = {
        name: [(k, f"{row.seen:.0%} (error {row.told:.4f})") for k, row in c.iterrows()]
        for name, c in curves.items()
    }
    parts = (f"{name}: " + ", ".join(f"{what} after {k}" for k, what in row) for name, row in told.items())
    return _said(figure, title, parts)
