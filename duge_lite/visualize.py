"""Figures: each function takes results and returns a finished :class:`Plot`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from PIL import Image

from .doodles.draw import OBJECTS, STYLES, draw
from .plot import Plot
from .visualize_attention import (
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
    "image_grid", "loss_curves", "token_shares", "word_overlay", "words_by_layer", "words_by_step",
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
            values = history[column].where(history[column] > 0)  # R starts at 0, which has no logarithm
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
