"""Every figure: results in, a finished :class:`Plot` out.

White or grey is what was wished for, colour is a deviation or attention; maps side by side share one scale
from 0; no colour stands alone: a marker, a frame, a cross or a number says the same. The title is the
caller's, who knows what was found.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from .attention import AttentionTrace
from .viewer import COLORS, layer_label

KEPT, LOST, ACCENT, LEFT = "#35618f", "#c8553d", "#5b5b66", "#6a51a3"  # told apart by lightness too
WISHED = LinearSegmentedColormap.from_list("wished", [LOST, "white", LEFT])
SERIES = {"o": KEPT, "X": LOST, "s": ACCENT, "^": "#d9a441", "D": "#3f8f6b", "P": "#1b1b1b", "v": LEFT}
LOOKS = [dict(marker=marker, color=color, ms=6, lw=1.8) for marker, color in SERIES.items()]
OWN = {"oracle": 0, "exact": 1, "unlearned": 1, "base": 2}  # which of the looks is kept for whom
Names, Rows = Sequence[str], Sequence[Sequence[Image.Image]]


class Plot(Figure):
    """A matplotlib Figure that shows itself in a notebook, with alternative text for who cannot see it.

    No pyplot, nothing global, nothing left open. A dollar sign is a dollar sign, not mathematics.
    """

    alt: str = ""
    colors: int | None = None
    """How many the PNG has, at most 256; None for all. Grids of noisy pictures take a third of the bytes."""

    def savefig(self, *args, **kwargs) -> None:
        """As matplotlib's, with every dollar sign as it is."""
        with matplotlib.rc_context({"text.parse_math": False}):  # for text that drawing makes
            for text in self.findobj(Text):
                text.set_parse_math(False)
            super().savefig(*args, **kwargs)

    def png(self) -> bytes:
        """The figure as PNG bytes, for widgets, sliders and files."""
        self.savefig(buffer := io.BytesIO(), format="png", bbox_inches="tight", pad_inches=0.06)
        if self.colors is not None:
            image = Image.open(buffer).convert("RGB").quantize(self.colors, dither=Image.Dither.NONE)
            image.save(buffer := io.BytesIO(), format="png", optimize=True)
        return buffer.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        data = {"image/png": base64.b64encode(self.png()).decode(), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt}}


def canvas(width, height, rows=1, columns=1, title="", caption="", **how) -> tuple[Plot, np.ndarray]:
    """A figure of so many inches and its axes (rows, columns)."""
    figure = Plot(figsize=(width, height), dpi=100, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    if caption:
        figure.supxlabel(caption, fontsize=8, color=ACCENT)
    return figure, figure.subplots(rows, columns, squeeze=False, **how)


def _said(figure: Plot, title: str, parts: Iterable[str], between: str = "; ") -> Plot:
    """The figure, with its alternative text."""
    figure.alt = ": ".join(filter(None, (title.rstrip(".?!"), between.join(parts))))
    return figure


def tidy(axes: Axes, title: str = "", x: str = "", y: str = "", percent: str = "") -> None:
    """Small type, no frame; ``percent`` says which axes ("x", "y", "xy") count in percents."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=8, which="both")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for name in percent:
        getattr(axes, f"{name}axis").set_major_formatter(PercentFormatter(1.0))


def _looks(names: Names) -> dict[str, dict]:
    """A look for each name. Beside "oracle", "oracle, other pictures" is open and dotted: a control."""
    first = {n.split(",")[0]: n for n in sorted(names, key=lambda n: "," in n)[::-1]}.values()
    heads = list(dict.fromkeys(name.split(",")[0] for name in names))
    rest = iter([k for k in range(len(LOOKS)) if k not in {OWN.get(h) for h in heads}])
    try:
        mine = {h: LOOKS[OWN[h] if h in OWN else next(rest)] for h in heads}
    except StopIteration:
        raise ValueError(f"{len(heads)} names ({', '.join(heads)}): expected at most {len(LOOKS)}") from None
    return {n: mine[n.split(",")[0]] | ({} if n in first else {"ls": ":", "mfc": "white"}) for n in names}


def _lines(
    panels: Mapping[str, Mapping[str, pd.Series]], title: str, x: str, caption: str = "", share: bool = True
) -> Plot:
    """A panel per heading, a line per name, which stands at its right end in the last panel.

    ``share``: all panels show shares, from 0 to 100 %.
    """
    looks = _looks([name for lines in panels.values() for name in lines])
    figure, ((*axes,),) = canvas(2.4 * len(panels) + 2.4, 3.1, 1, len(panels), title, caption, sharey=share)
    said = []
    for one, (heading, lines) in zip(axes, panels.items(), strict=True):
        for name, line in lines.items():
            one.plot(line.index, line, **looks[name])
            if len(line):
                ends = f"{line.iloc[0]:.3g} to {line.iloc[-1]:.3g}"
                said.append(" ".join(f"{heading} {name} {ends}".split()))
        one.set_ylim(*((-0.04, 1.04) if share else (min(0, one.get_ylim()[0]), None)))
        tidy(one, heading, x, percent="y" if share else "")
        one.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    at, (low, high) = -np.inf, one.get_ylim()
    last = ((float(line.dropna().iloc[-1]), name) for name, line in lines.items() if line.notna().any())
    for y, name in sorted(last):
        at = max(min(max(y, low), high), at + 0.085 * (high - low))  # apart, where they would touch
        how = dict(color=looks[name]["color"], fontsize=8, va="center", transform=one.get_yaxis_transform())
        one.text(1.03, at, name, **how)
    return _said(figure, title, said)


def _dots(axes: Axes, rows: Names, series: Sequence[tuple[pd.DataFrame, dict]]) -> None:
    """A row per name; of each series value, low and high by name, each a little below the one before."""
    apart = min(0.24, 0.8 / len(series))
    for k, (table, look) in enumerate(series):
        at = np.array([rows.index(name) for name in table.index]) + apart * (k - (len(series) - 1) / 2)
        axes.hlines(at, table.low, table.high, color=look["color"], linewidth=2, alpha=0.5)
        axes.plot(table.value, at, **look | {"ls": ""})
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.set_ylim(len(rows) - 0.45, -0.55)


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
    axes.spines[:].set_visible(False)
    limits = dict(xlim=(-0.03, width - 0.02), ylim=(pitch * height - 0.02, -0.03))
    axes.set(**limits, aspect=np.divide(*np.shape(rows[0][0])[:2]))
    axes.tick_params(length=0, pad=2)
    axes.xaxis.tick_top()
    points = axes.get_figure().get_figwidth() * 72 / width
    tilt = {"rotation": 30, "ha": "left"} if max(map(len, column_labels), default=0) * 4.6 > points else {}
    axes.set_xticks([j + 0.475 for j in range(len(column_labels))], column_labels, fontsize=8, **tilt)
    axes.set_yticks([pitch * i + 0.475 for i in range(len(row_labels))], row_labels, fontsize=9)


def image_grid(
    rows: Rows, row_labels: Names = (), column_labels: Names = (), title: str = "", cell: float = 0.9,
    framed: Iterable[tuple[int, int]] = (), below: Sequence[Names] = (),
) -> Plot:  # fmt: skip
    """Pictures in rows, ``cell`` inches each; ``framed`` marks (row, column), ``below`` holds words."""
    if not len(rows) or not len(rows[0]):
        raise ValueError("image_grid got no pictures: expected at least one row with one picture")
    height, width = len(rows), max(map(len, rows))
    left = 0.09 * max(map(len, row_labels), default=0)
    figure, axes = canvas(left + width * cell, 0.35 + height * cell * (1.2 if below else 1), title=title)
    figure.colors = 256
    _grid(axes[0, 0], rows, row_labels, column_labels, set(framed), below)
    names = filter(None, (", ".join(row_labels), ", ".join(dict.fromkeys(column_labels))))
    return _said(figure, f"{title or 'Pictures'}: {height} rows of {width}", names)


def step_labels(requests: Names) -> list[str]:
    """A name for every row of the accuracy matrix: "base", "1 apple", "2 umbrella", ..."""
    return ["base", *(f"{k} {concept}" for k, concept in enumerate(requests, 1))]


def picture_history(pictures: Rows, names: Names, requests: Names, title: str = "") -> Plot:
    """Rows are models (base, then after each request), columns ``names``; framed: was to go."""
    gone = {(k, j) for k in range(len(pictures)) for j, name in enumerate(names) if name in requests[:k]}
    return image_grid(pictures, step_labels(requests), names, title, 0.6, gone)


# ---- attention


def _some(words: Names | str) -> list[str]:
    words = [words] if isinstance(words, str) else list(words)
    if not words:
        raise ValueError("no words to show: expected at least one, such as '<start>'")
    return words


def _maps(rows, title: str) -> Plot:
    """Panels (title, picture, map) in rows: a picture alone, or in grey under a map; maps share one scale."""
    largest = max(float(heat.max()) for row in rows for *_, heat in row if heat is not None)
    norm = Normalize(0, max(1e-9, largest))
    height, width = len(rows), max(map(len, rows))
    figure, axes = canvas(1.45 * width + 0.9, 1.5 * height + 0.5, height, width, title)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    for one in axes.flat:
        one.set_axis_off()
    for line, row in zip(axes, rows, strict=True):
        for one, (name, picture, heat) in zip(line, row, strict=False):
            one.set_title(name, fontsize=9, pad=3)
            if heat is None:
                one.imshow(picture, interpolation="nearest")
                continue
            h, w = heat.shape
            one.imshow(picture.convert("L"), cmap="gray", vmin=0, vmax=255, extent=(0, w, h, 0))
            how = dict(interpolation="bilinear", alpha=0.62, extent=(0, w, h, 0))
            shown = one.imshow(heat, cmap=COLORS, norm=norm, **how)
    bar = figure.colorbar(shown, ax=axes, fraction=0.05, aspect=25, pad=0.02, format=PercentFormatter(1.0))
    bar.solids.set_alpha(1)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("share of a place's attention", fontsize=8)
    return figure


def _where(heat: np.ndarray) -> str:
    """In words: "most at the lower left"."""
    y, x = (np.array(np.unravel_index(heat.argmax(), heat.shape)) + 0.5) / heat.shape
    names = ("upper", "middle", "lower")[int(y * 3)], ("left", "centre", "right")[int(x * 3)]
    return f"most at the {' '.join(names)} ({heat.max():.1%})"


def word_overlay(trace: AttentionTrace, words: Names | str, title: str = "") -> Plot:
    """The picture, and over it where each word looks: the mean over all steps and layers of ``trace``."""
    maps = {word: trace.word(word) for word in _some(words)}
    panels = [("the picture", trace.image, None)]
    panels += [(f"“{word}” {heat.mean():.1%}", trace.image, heat) for word, heat in maps.items()]
    figure = _maps([panels[i : i + 4] for i in range(0, len(panels), 4)], title or trace.prompt)
    looks = (f"{word}, {_where(heat)}" for word, heat in maps.items())
    return _said(figure, f"Where words look in the picture of “{trace.prompt}”", looks)


def _parts(trace: AttentionTrace, by: str, word: str, most: int) -> dict[str, AttentionTrace]:
    """The trace in parts, by name: in at most ``most`` steps or heads, or in all its levels."""
    if by == "step":
        count = len(trace.timesteps)
        steps = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()
        return {f"step {i + 1} of {count}": trace.step(i) for i in steps}
    if by == "head":
        best = max(trace.layers, key=lambda name: trace.layer(name).word(word).max())
        count, where = trace.maps[best].shape[1], layer_label(best)
        if count == 1:
            trace.head(1)  # raises, and says what to do
        return {f"{where}, head {i}": trace.layer(best).head(i) for i in range(min(count, most))}
    if by != "layer":
        raise ValueError(f"by = {by!r}: expected one of step, layer, head")
    levels: dict[str, list[str]] = {}
    for name, maps in trace.maps.items():
        level = f"{layer_label(name).split()[0]} {maps.shape[-1]}×{maps.shape[-2]}"
        levels.setdefault(level, []).append(name)
    return {level: trace.layer(*layers) for level, layers in levels.items()}


def words_by(trace: AttentionTrace, by: str, words: Names | str, title: str = "") -> Plot:
    """Words (rows) by "step", by "layer" (the levels of the UNet) or by "head", the picture beside them.

    Heads are those of the layer that gives the first word most, of a trace made with ``heads=True``; steps
    lie on the half-finished pictures, where the trace has previews. Raises ValueError for another ``by``,
    IndexError when the heads are not apart.
    """
    words, rows = _some(words), []
    parts = _parts(trace, by, words[0], max(1, 12 // len(words) - 1))
    for word in words:
        rows.append([(f"“{word}” →", trace.image, None)])
        for name, part in parts.items():
            under = part.previews[0] if by == "step" and part.previews else trace.image
            rows[-1].append((name, under, part.word(word)))
    figure = _maps(rows, title)
    return _said(figure, f"{title}, {', '.join(words)}", parts, ", ")


def attention_difference(before: AttentionTrace, after: AttentionTrace, word: str, title: str = "") -> Plot:
    """Both pictures, where ``word`` looks in each on one scale, and the change: white is none."""
    row, maps = [], [trace.word(word) for trace in (before, after)]
    if maps[0].shape != maps[1].shape:
        raise ValueError(f"maps of {maps[0].shape} and {maps[1].shape}: trace both at the same size")
    for label, trace, heat in zip(("before", "after"), (before, after), maps, strict=True):
        row += [(label, trace.image, None), (f"“{word}” {heat.mean():.1%}", trace.image, heat)]
    change = maps[1] - maps[0]
    most = max(1e-9, float(np.abs(change).max()))
    row.append((f"change, up to {100 * most:.1f} points", after.image, None))
    figure = _maps([row], title or before.prompt)
    figure.axes[len(row) - 1].imshow(
        change, cmap="PuOr_r", vmin=-most, vmax=most, extent=(0, *after.image.size, 0)
    )
    means = zip(("before", "after"), maps, strict=True)
    return _said(figure, title or before.prompt, (f"“{word}” gets {m.mean():.2%} {n}" for n, m in means))


def concentration(trace: AttentionTrace, words: Names | str, title: str = "") -> Plot:
    """How narrowly each word looks, step by step: 0 is evenly over the picture, 1 a single place."""
    steps = range(1, len(trace.timesteps) + 1)
    lines = {word: pd.Series(trace.concentration(word), steps) for word in _some(words)}
    return _lines({"1 − entropy of where it looks": lines}, title, "step (1 is pure noise)", share=False)


def token_shares(trace: AttentionTrace, title: str = "") -> Plot:
    """The share of all attention that each token gets, start, end and padding included (one bar for it)."""
    shares, pad = trace.shares(), np.array([t.kind == "pad" for t in trace.tokens])
    names, values = [t.text for t in trace.tokens if t.kind != "pad"], list(shares[~pad])
    if pad.any():
        names, values = [*names, f"<pad> × {pad.sum()}"], [*values, shares[pad].sum()]
    figure, ((one,),) = canvas(6, 0.6 + 0.24 * len(names), title=title)
    bars = one.barh(range(len(names)), values, color=["#c9c9d1" if n[0] == "<" else KEPT for n in names])
    one.bar_label(bars, [f"{v:.1%}" for v in values], fontsize=8, padding=3)
    tidy(one, "", "share of all attention (grey: no words)", percent="x")
    one.grid(False)
    one.set_yticks(range(len(names)), names, fontsize=9)
    one.set(xlim=(0, max(values) * 1.12), ylim=(len(names) - 0.4, -0.6))
    return _said(figure, title, (f"{n} {v:.1%}" for n, v in zip(names, values, strict=True)), ", ")


# ---- losses

LOSSES = {"forget": "attention", "prior": "prior", "regularization": "regularization"}


def loss_curves(history: pd.DataFrame, title: str = "The three losses while forgetting") -> Plot:
    """One panel per loss (unweighted); ``history`` by iteration."""
    panels = {f"{label} loss": {"": history[name]} for name, label in LOSSES.items()}
    return _lines(panels, title, "iteration", share=False)


def losses_by_layer(history: pd.DataFrame, title: str = "The three losses, layer by layer") -> Plot:
    """One panel per loss, log scale, before and after, over the layers in forward order."""
    layers, panels = list(map(layer_label, history.index)), {}
    for name in LOSSES.values():
        ends = {when: history[f"{name} {when}"].set_axis(range(len(layers))) for when in ("before", "after")}
        panels[f"{name} loss"] = {when: end.where(end > 0) for when, end in ends.items()}
    figure = _lines(panels, title, "layer", "● before, ✕ after; none: 0", share=False)
    for one in figure.axes:
        one.set_yscale("log")
        one.autoscale(axis="y")
        one.yaxis.set_major_formatter("{x:g}")
        one.yaxis.set_minor_formatter("")
        one.set_xticks(range(len(layers)), layers, rotation=45, ha="right")
    means = (f"{name} {end:.3g}" for name, end in history.mean().items())
    return _said(figure, f"{title}, means over layers", means)


def bowl(far: np.ndarray, losses: np.ndarray, title: str = "") -> Plot:
    """The loss along ways through a solution: ``far`` (n,) to either side, ``losses`` (ways, n)."""
    figure, axes = canvas(5.6, 3.0, title=title, caption=f"{len(losses)} random directions, both ways")
    one = axes[0, 0]
    one.plot(far, losses.T, color=KEPT, lw=0.8, alpha=0.6)
    one.plot(0, losses[:, len(far) // 2].mean(), "o", color=LOST, ms=8)
    one.annotate(
        "the solution", (0, losses.min()), (0, -14), textcoords="offset points", ha="center", fontsize=8
    )
    one.margins(y=0.2)
    tidy(one, "", "how far from the solution", "the sum of the losses")
    return _said(figure, title, [f"from {losses.min():.3g} up to {losses.max():.3g}"])


# ---- judged


def accuracy_plot(before: pd.DataFrame, after: pd.DataFrame, forgotten: Names = (), title: str = "") -> Plot:
    """The judge's accuracy per concept before (open) and after (filled), with 95 % intervals."""
    names, gone = list(before.index), after.index.isin(forgotten)
    n = f", n = {int(after.images.iloc[0])} pictures each" if "images" in after else ""
    caption = f"○ before; ● after, to be kept; ✕ after, to be forgotten; lines: 95 % intervals{n}"
    figure, ((one,),) = canvas(6.4, 0.9 + 0.25 * len(names), title=title, caption=caption)
    looks = (LOOKS[2] | {"marker": "o", "mfc": "white"}, LOOKS[0], LOOKS[1])
    tables = [t.rename(columns={"accuracy": "value"}) for t in (before, after[~gone], after[gone])]
    _dots(one, names, list(zip(tables, looks, strict=True)))
    one.set_yticks(range(len(names)), [f"✕ {c}" if c in forgotten else c for c in names])
    tidy(one, "", "named right by the judge", "", "x")
    one.set_xlim(-0.04, 1.04)
    moves = (f"{n} {before.accuracy[n]:.2f} to {after.accuracy[n]:.2f}" for n in names)
    return _said(figure, title, moves, ", ")


WHITE = "% named right; white: as wished; framed: was to go"


def accuracy_matrix(matrix: pd.DataFrame, requests: Names, title: str = "") -> Plot:
    """The accuracy matrix R[k, j] in percent: rows are models, columns concepts, requests first.

    White is as wished (gone, or there); red is lost, violet is still there although it was to go, which the
    frames tell too. Raises ValueError when a request has no column.
    """
    width, height = 1.5 + 0.46 * matrix.shape[1], 1.6 + 0.34 * len(matrix)
    figure, ((axes,),) = canvas(width, height, title=title, caption=WHITE)
    _matrix(axes, matrix, requests)
    last = (f"{name} {value:.2f}" for name, value in matrix.iloc[-1].items())
    return _said(figure, f"{title}. After {', '.join(requests)}", last, ", ")


def _matrix(axes: Axes, matrix: pd.DataFrame, requests: Names, at: int | None = None) -> None:
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


def timeline_step(pictures: Rows, names: Names, requests: Names, matrix: pd.DataFrame, at: int) -> Plot:
    """Pictures of the base and of model ``at`` (framed: was to go), and the matrix with its row marked."""
    heights = (2, 1.2 + 0.25 * len(matrix))
    figure, ((above,), (below,)) = canvas(10, 3.4 + 0.3 * len(matrix), 2, 1, height_ratios=heights)
    figure.colors = 256
    gone = {(1, j) for j, name in enumerate(names) if name in requests[:at]}
    _grid(above, (pictures[0], pictures[at]), ("base", step_labels(requests)[at]), names, gone)
    _matrix(below, matrix, requests, at)
    below.set_title(WHITE, fontsize=8, color=ACCENT)
    return figure


METRICS = {
    "UA": "gone (UA)\nof all that was to go",
    "objects kept": "objects kept\nof all that are to stay",
    "styles kept": "styles kept\nof all that are to stay",
    "HM": "harmonic mean (HM)\nsmall when one of them is",
}
"""What is shown of a sequence's metrics, and what it is called."""


def metrics_over_requests(tables: Mapping[str, pd.DataFrame], title: str = "", caption: str = "") -> Plot:
    """A panel per metric, a line per sequence; ``tables`` holds metrics by name."""
    lines = {name: {label: table[name] for label, table in tables.items()} for name in METRICS}
    return _lines({METRICS[n]: line for n, line in lines.items()}, title, "requests", caption)


def pareto_front(table: pd.DataFrame) -> list[str]:
    """The rows that no other beats, by being as good in every column and better in one; more is better."""
    values = table.to_numpy(float)
    lead = values[:, None] - values  # (n, n, columns): of each row over each row
    beaten = ((lead >= 0).all(axis=2) & (lead > 0).any(axis=2)).any(axis=0)
    return list(table.index[~beaten])


def trade_off(table: pd.DataFrame, title: str, axes_labels: tuple[str, str]) -> Plot:
    """A point per row of ``table``, whose two columns are drawn to the right and up; more of both is better.

    Rows on the Pareto front (:func:`pareto_front`, of whole percents: less is a picture or two) are filled;
    rows that are equal in whole percents are one point with one label.
    """
    rounded, (x, y) = table.round(2), table.columns
    front, groups = pareto_front(rounded), list(rounded.groupby([y, x]).groups.items())[::-1]
    labels = [
        textwrap.wrap(f"{' · '.join(map(str.strip, n))}: {b:.0%} gone, {a:.0%} kept", 44)
        for (b, a), n in groups
    ]
    lines = sum(map(len, labels))
    figure, ((one,),) = canvas(9, max(3.4, 0.3 * lines), title=title)
    done = 0
    for ((b, a), names), label in zip(groups, labels, strict=True):
        on = names[0] in front
        look = dict(marker="o" if on else "s", mfc=KEPT if on else "white", zorder=4 if on else 3)
        one.plot(a, b, color=KEPT, ms=8, mew=1.5, **look)
        place = (1.04, 1 - (done + len(label) / 2) / lines)  # in a column, so that close points stay apart
        arrow = dict(arrowstyle="-", color=ACCENT, lw=0.7, alpha=0.45, relpos=(0, 0.5), shrinkB=5)
        look = dict(fontsize=8, fontweight="bold" if on else "normal", va="center", arrowprops=arrow)
        one.annotate("\n".join(label), (a, b), place, textcoords="axes fraction", **look)
        done += len(label)
    one.margins(0.08)
    tidy(one, "", *axes_labels, percent="xy")
    one.locator_params(nbins=6, steps=[1, 2, 5, 10])
    names = {n: f"{n} (on the front)" if n in front else n for n in table.index}
    parts = (f"{names[n]}: {row[y]:.2f} {y}, {row[x]:.2f} {x}" for n, row in table.iterrows())
    return _said(figure, title, parts)


# ---- attacks


def attack_summary(table: pd.DataFrame, title: str = "") -> Plot:
    """Each attack's share of pictures with the concept, a marker per model, with 95 % intervals.

    ``table`` as :func:`duge_lite.attacks.shares` counts it by ``["attack", "model"]``; both in the order in
    which they first come.
    """
    attacks, models = (list(table.index.unique(level)) for level in (0, 1))
    caption = "pictures in which the judge sees the concept, with 95 % intervals"
    height = 1.1 + max(0.55, 0.16 * len(models)) * len(attacks)
    figure, ((one,),) = canvas(7.6, height, title=title, caption=caption)
    parts = {m: table.xs(m, level=1).rename(columns={"seen": "value"}) for m in models}
    looks = _looks(models)
    _dots(one, attacks, [(parts[m], looks[m]) for m in models])
    for model, line in zip(models, one.lines, strict=True):  # in the first row, beside its interval
        place = (parts[model].high.iloc[0], line.get_ydata()[0])
        look = dict(va="center", fontsize=8, color=line.get_color())
        one.annotate(model, place, (9, 0), textcoords="offset points", **look)
    tidy(one, percent="x")
    one.set_xlim(-0.03, 1.12)
    return _said(figure, title, (f"{a}, {m}: {s:.0%}" for (a, m), s in table.seen.items()))
