"""Figures: each function takes results and returns a finished :class:`Plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from .doodles.draw import OBJECTS, STYLES, draw
from .plot import Plot
from .viewer import COLORS, layer_label
from .visualize_attention import (
    _color_bar,
    _panels,
    attention_difference,
    concentration,
    denoising,
    heads,
    token_shares,
    word_overlay,
    words_by_layer,
    words_by_step,
)

__all__ = [
    "accuracy_plot", "attention_difference", "concentration", "contact_sheet", "denoising", "heads",
    "image_grid", "loss_curves", "matrices", "pareto_front", "shares_moved", "target_maps", "token_shares",
    "trade_off", "word_overlay", "words_by_layer", "words_by_step",
]  # fmt: skip

KEPT, LOST, ACCENT = "#35618f", "#c8553d", "#5b5b66"  # told apart by lightness too


def image_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    cell: float = 0.9,
) -> Plot:
    """Pictures in rows, with labels; ``cell`` is one picture's side in inches."""
    if not rows or not rows[0]:
        raise ValueError("image_grid got no pictures: expected at least one row with one picture")
    height, width = len(rows), max(len(r) for r in rows)
    left = 0.11 * max((len(s) for s in row_labels), default=0) + 0.05
    top = (0.3 if title else 0.05) + (0.25 if column_labels else 0)
    size = (left + width * cell, top + height * cell)
    figure = Plot(figsize=size, dpi=100)
    figure.colors = 256
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            x, y = left + j * cell, size[1] - top - (i + 1) * cell
            box = (x / size[0], y / size[1], 0.94 * cell / size[0], 0.94 * cell / size[1])
            axes = figure.add_axes(box)
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if i == 0 and j < len(column_labels):
                axes.set_title(column_labels[j], fontsize=8, pad=3)
            if j == 0 and i < len(row_labels):
                axes.set_ylabel(row_labels[i], rotation=0, ha="right", va="center", fontsize=9)
    figure.alt = f"{title or 'Pictures'}: {height} rows of {width}. " + "; ".join(row_labels)
    if title:
        figure.text(
            0.5 * (1 + left / size[0]), 1 - 0.16 / size[1], title, ha="center", va="center", fontsize=11
        )
    return figure


def contact_sheet(styles: Sequence[str] = STYLES, seed: int = 3) -> Plot:
    """Every object of the doodle world in every style, as drawn (not generated)."""
    grounds = ("white", "blue", "yellow", "green", "pink", "black")
    rows = [
        [draw(name, style, grounds[(i + j) % 6], seed=seed + 31 * i + j) for j, style in enumerate(styles)]
        for i, name in enumerate(OBJECTS)
    ]
    half = (len(OBJECTS) + 1) // 2
    columns = [[rows[i + k * half][j] for i in range(half)] for k in range(2) for j in range(len(styles))]
    figure = Plot(figsize=(10.2, 10.4), dpi=100)
    for k in range(2):
        for j, style in enumerate(styles):
            for i in range(half):
                box = (0.055 + i * 0.0942, 0.955 - (k * len(styles) + j + 1) * 0.092 - k * 0.03, 0.09, 0.089)
                axes = figure.add_axes(box)
                axes.imshow(columns[k * len(styles) + j][i], interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if j == 0:
                    axes.set_title(OBJECTS[k * half + i], fontsize=8, pad=3)
                if i == 0:
                    axes.set_ylabel(style, fontsize=8)
    figure.alt = f"Drawings of {', '.join(OBJECTS)}, each in the styles {', '.join(styles)}."
    figure.text(0.5, 0.985, "The doodle world: twenty objects, five styles", ha="center", fontsize=12)
    return figure


def loss_curves(history: pd.DataFrame, title: str = "The three losses while forgetting") -> Plot:
    """One panel per loss (unweighted, log scale), with a running mean; ``history`` as in UnlearningRun."""
    panels = {
        "forget": "attention loss\n(forget: falls)",
        "prior": "prior-preservation loss\n(keep: stays small)",
        "regularization": "regularization loss\n(distance walked)",
    }
    figure = Plot(figsize=(9, 2.6), dpi=100, layout="constrained")
    for axes, (column, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        if len(history):
            floor = 1e-6 * max(0.0, history[column].max())  # two losses start at next to nothing
            values = history[column].where(history[column] > floor)
            axes.plot(history.index, values, color=ACCENT, alpha=0.35, linewidth=1)
            axes.plot(history.index, values.rolling(10, min_periods=1).mean(), color=KEPT, linewidth=2)
            axes.set_yscale("log")
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("iteration", fontsize=8)
        axes.tick_params(labelsize=8, which="both")
        axes.grid(alpha=0.25)
    figure.suptitle(title, fontsize=11)
    ends = {c: (history[c].iloc[0], history[c].iloc[-1]) for c in panels} if len(history) else {}
    figure.alt = f"{title}. " + "; ".join(f"{c} {a:.3g} to {b:.3g}" for c, (a, b) in ends.items())
    return figure


def accuracy_plot(
    before: pd.DataFrame, after: pd.DataFrame, forgotten: Sequence[str] = (), title: str = ""
) -> Plot:
    """The judge's accuracy per concept before (open) and after (filled), with 95 % intervals."""
    names = list(before.index)
    figure = Plot(figsize=(9, 3), dpi=100, layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(names))
    gone = np.array([n in forgotten for n in names])
    axes.plot(at - 0.14, before.accuracy, "o", mfc="none", mec=ACCENT, ms=7, label="before")
    for which, marker, color, label in (
        (~gone, "o", KEPT, "after, to be kept"),
        (gone, "X", LOST, "after, to be forgotten"),
    ):
        x, rows = at[which] + 0.14, after[which]
        axes.vlines(x, rows.low, rows.high, color=color, linewidth=1.5, alpha=0.55)
        axes.plot(x, rows.accuracy, marker, color=color, ms=7, label=label, linestyle="none")
    axes.set_xticks(at, names, rotation=45, ha="right", fontsize=8)
    axes.set_ylim(-0.06, 1.06)
    axes.grid(axis="y", alpha=0.25)
    axes.set_ylabel("named right by the judge", fontsize=8)
    axes.set_title(title or "What the judge recognises, before and after", fontsize=11)
    axes.legend(fontsize=8, ncols=3, loc="center", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.alt = "Judge's accuracy: " + ", ".join(
        f"{n} {before.accuracy[n]:.2f} to {after.accuracy[n]:.2f}" for n in names
    )
    return figure


def target_maps(rows: Mapping[str, Mapping[str, np.ndarray]], title: str = "") -> Plot:
    """One token's maps, (h, w) by layer, a row for each name; below zero there is a cross.

    All share one scale. It spreads out the small shares, where targets differ.
    """
    layers = list(next(iter(rows.values())))
    maps = {name: [np.asarray(row[layer], dtype=float) for layer in layers] for name, row in rows.items()}
    norm = PowerNorm(0.5, 0, max(1e-9, *(heat.max() for row in maps.values() for heat in row)))
    figure, axes = _panels(len(rows), len(layers), 1.15, left=0.1 * max(map(len, rows)))
    for line, (name, row) in zip(axes, maps.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for one, heat in zip(line, row, strict=True):
            h, w = heat.shape
            image = one.imshow(heat.clip(0), cmap=COLORS, norm=norm, extent=(0, w, h, 0))
            y, x = np.nonzero(heat < 0)
            one.plot(x + 0.5, y + 0.5, "x", color="white", ms=30 / max(h, w), mew=6 / max(h, w))
    for one, layer, heat in zip(axes[0], layers, maps[next(iter(rows))], strict=True):
        one.set_title(f"{layer_label(layer)}\n{heat.shape[1]}×{heat.shape[0]}", fontsize=9, pad=3)
    _color_bar(figure, axes, image)
    figure.suptitle(title, fontsize=11)
    figure.alt = f"{title or 'Maps'}, in {len(layers)} layers: " + "; ".join(
        f"{name}: {np.mean([heat.mean() for heat in row]):.1%} on average, "
        f"{sum(int((heat < 0).sum()) for heat in row)} places below zero"
        for name, row in maps.items()
    )
    return figure


def shares_moved(
    names: Sequence[str],
    before: Sequence[float],
    after: Sequence[float],
    labels: tuple[str, str] = ("before", "after"),
    title: str = "Who gains what the others lose",
) -> Plot:
    """Each token's share of attention before (circle) and after (a triangle that points there)."""
    before, after = (np.asarray(x, dtype=float) for x in (before, after))
    figure = Plot(figsize=(6.6, 0.9 + 0.26 * len(names)), dpi=100, layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(names))
    gains = after >= before
    axes.hlines(at, before, after, color=ACCENT, linewidth=2, alpha=0.5)
    axes.plot(before, at, "o", mfc="white", mec=ACCENT, ms=7, label=labels[0])
    for which, marker, color, way in ((gains, ">", KEPT, "more"), (~gains, "<", LOST, "less")):
        axes.plot(after[which], at[which], marker, color=color, ms=8, label=f"{labels[1]}: {way}")
    for y, b, a in zip(at, before, after, strict=True):
        axes.annotate(
            f"{100 * (a - b):+.1f}",
            (max(a, b), y),
            (9, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
        )
    axes.set_yticks(at, names, fontsize=9)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(0, max(before.max(), after.max()) * 1.14)
    axes.set_xlabel("share of all attention; the number is the change in percentage points", fontsize=8)
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8, frameon=False)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.alt = f"{title}: " + ", ".join(
        f"{n} {b:.1%} to {a:.1%}" for n, b, a in zip(names, before, after, strict=True)
    )
    return figure


MATRICES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out": "output"}


def matrices(panels: Mapping[str, Mapping[str, float]], title: str = "") -> Plot:
    """A number for every matrix of every cross-attention layer, by parameter name; a panel per mapping.

    One logarithmic colour scale for all panels; an exact zero has no colour but a hatching.
    """
    names = dict.fromkeys(name.split(".attn2.")[0] for name in next(iter(panels.values())))
    layers = sorted(names, key=lambda n: ("up" in n, "mid" in n))  # down, mid, up: the forward order
    tables = []
    for values in panels.values():
        table = np.zeros((len(MATRICES), len(layers)))
        for name, value in values.items():
            layer, _, matrix = name.partition(".attn2.")
            table[list(MATRICES).index(matrix.split(".")[0]), layers.index(layer)] = value
        tables.append(table)
    known = np.concatenate([t[t > 0] for t in tables])
    low, high = (known.min(), known.max()) if known.size else (0.1, 1.0)
    norm, colors = LogNorm(low, max(high, 1.001 * low)), matplotlib.colormaps["magma"]
    top = 0.35 if title else 0.0
    figure = Plot(figsize=(1.0 + 0.86 * len(layers), top + 1.72 * len(tables)), dpi=100, layout="constrained")
    for axes, name, table in zip(
        figure.subplots(len(tables), squeeze=False).flat, panels, tables, strict=True
    ):
        axes.imshow(np.ma.masked_less_equal(table, 0), cmap=colors, norm=norm, aspect="auto")
        axes.patch.set(hatch="///", facecolor="white", edgecolor="#bbbbbb")
        for (i, j), value in np.ndenumerate(table):
            dark = value > 0 and norm(value) < 0.6
            box = None if value > 0 else dict(facecolor="white", edgecolor="none", pad=1.5)
            text = f"{value:.2g}" if value > 0 else "0"
            axes.text(
                j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black", bbox=box
            )
        axes.set_yticks(range(len(MATRICES)), MATRICES.values(), fontsize=8)
        axes.set_xticks(range(len(layers)), map(layer_label, layers), fontsize=8)
        axes.tick_params(length=0)
        axes.set_title(name, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.alt = f"{title or 'Matrices of cross-attention'}. " + "; ".join(
        f"{name}: {int((t > 0).sum())} of {t.size} above zero, the largest {t.max():.2g}"
        for name, t in zip(panels, tables, strict=True)
    )
    return figure


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

    Rows on the Pareto front (:func:`pareto_front`, of whole percents: less is a picture or two) are filled,
    rows that another one beats are hollow. Both axes span at least twenty percents: noise stays small.
    """
    front = pareto_front(table.round(2))
    figure = Plot(figsize=(9, max(3.4, 0.28 * len(table))), dpi=100, layout="constrained")
    axes = figure.subplots()
    x, y = table.columns
    ranked = table.sort_values([y, x], ascending=False)
    for i, (name, row) in enumerate(ranked.iterrows()):
        on = name in front
        look = dict(marker="o" if on else "s", mfc=KEPT if on else "white", zorder=4 if on else 3)
        axes.plot(row[x], row[y], color=KEPT, ms=8, mew=1.5, **look)
        height = 1 - (i + 0.5) / len(ranked)  # names stand in a column, so that close points stay apart
        axes.annotate(
            f"{name}: {row[y]:.0%} gone, {row[x]:.0%} kept",
            (row[x], row[y]),
            (1.04, height),
            textcoords="axes fraction",
            fontsize=8,
            fontweight="bold" if on else "normal",
            va="center",
            arrowprops=dict(arrowstyle="-", color=ACCENT, lw=0.7, alpha=0.45, relpos=(0, 0.5), shrinkB=5),
        )
    low, high = np.minimum(table.min(), table.max() - 0.2), table.max()
    pad = 0.06 * (high - low)
    axes.set(xlim=(low[x] - pad[x], high[x] + pad[x]), ylim=(low[y] - pad[y], high[y] + pad[y]))
    axes.set_xlabel(axes_labels[0], fontsize=9)
    axes.set_ylabel(axes_labels[1], fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=11)
    figure.alt = f"{title}. " + "; ".join(
        f"{name}{' (on the front)' if name in front else ''}: {row[y]:.2f} {y}, {row[x]:.2f} {x}"
        for name, row in table.iterrows()
    )
    return figure
