"""Figures of a sequence of requests: what is gone, what is left, and how far the weights went.

What was asked to go is marked by more than colour: a cross at its name, hatching, a dashed frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from .plot import Plot
from .visualize import ACCENT, KEPT, LOST, image_grid

METRICS = {
    "UA": "unlearning accuracy (UA)\nof all that was to go",
    "IRA": "retained, same domain (IRA)\nobjects for an object",
    "CRA": "retained, other domain (CRA)\nstyles for an object",
    "HM": "harmonic mean (HM)\nsmall when one of them is",
}
"""What the columns of ``sequence.metrics(matrix)`` are called in a figure."""

KINDS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out": "output", "other": "other"}
LINES = [  # the first is the plain one; told apart by marker and lightness too
    dict(marker=marker, color=color, ms=6)
    for marker, color in zip("oX^sDP", (KEPT, LOST, ACCENT, "#d9a441", "#3f8f6b", "#1b1b1b"), strict=True)
]


def step_labels(requests: Sequence[str]) -> list[str]:
    """A name for every row of the accuracy matrix: "base", "1 apple", "2 umbrella", ..."""
    return ["base", *(f"{k} {concept}" for k, concept in enumerate(requests, 1))]


def accuracy_matrix(matrix: pd.DataFrame, requests: Sequence[str], title: str = "") -> Plot:
    """The accuracy matrix R[k, j] as a heat map: rows are models, columns concepts, requests first.

    A thick frame is around the request of each row; what ought to be 0 is hatched. Raises ValueError when a
    request has no column.
    """
    size = (1.5 + 0.46 * matrix.shape[1], 1.5 + 0.36 * len(matrix))
    figure = Plot(figsize=size, dpi=100, layout="constrained")
    draw_matrix(figure.subplots(), matrix, requests)
    title = title or "Accuracy of each concept (column) after each request (row)"
    figure.suptitle(title, fontsize=11)
    last = ", ".join(f"{name} {value:.2f}" for name, value in matrix.iloc[-1].items())
    figure.alt = f"{title} After {', '.join(requests)}: {last}"
    return figure


def draw_matrix(axes: Axes, matrix: pd.DataFrame, requests: Sequence[str], at: int | None = None) -> None:
    """:func:`accuracy_matrix` on given axes; ``at`` points at one row."""
    if missing := [c for c in requests if c not in matrix.columns]:
        raise ValueError(f"the matrix has no column for {', '.join(missing)}: evaluate it as well")
    columns = [*requests, *(c for c in matrix.columns if c not in requests)]
    table = matrix[columns].to_numpy(float)
    axes.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (k, j), value in np.ndenumerate(table):
        ink = "black" if value > 0.55 else "white"
        axes.text(j, k, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=ink)
        if j < min(k, len(requests)):
            look = dict(fill=False, hatch="////", ec=ink, lw=0, alpha=0.35)
            axes.add_patch(Rectangle((j - 0.5, k - 0.5), 1, 1, **look))
        if j + 1 == k:
            axes.add_patch(Rectangle((j - 0.45, k - 0.45), 0.9, 0.9, fill=False, ec=LOST, lw=2.5, zorder=4))
    axes.axvline(len(requests) - 0.5, color="white", lw=4)
    gone = requests if at is None else requests[:at]
    names = [f"✕ {c}" if c in gone else c for c in columns]
    axes.set_xticks(range(len(columns)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(table)), step_labels(requests), fontsize=8)
    axes.set_ylabel("after request", fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if at is not None:
        row = Rectangle((-0.5, at - 0.5), len(columns), 1, fill=False, ec="black", lw=2, clip_on=False)
        axes.add_patch(row)
        axes.get_yticklabels()[at].set(fontweight="bold")


def metrics_over_requests(
    tables: Mapping[str, pd.DataFrame],
    names: Sequence[str] = tuple(METRICS),
    title: str = "What is gone, and what is left",
) -> Plot:
    """A panel per metric, a line per sequence; ``tables`` holds ``sequence.metrics(matrix)`` by name."""
    figure = Plot(figsize=(2.5 * len(names) + 0.4, 3.1), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for i, (label, table) in enumerate(tables.items()):
            axes.plot(table[name], label=label, ls=("-", "--", ":", "-.")[i % 4], **LINES[i % len(LINES)])
        axes.set_title(METRICS.get(name, name), fontsize=9)
        axes.set_ylim(-0.05, 1.05)
        _requests_below(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.alt = f"{title}. " + "; ".join(
        f"{label}, at the end: " + ", ".join(f"{name} {table[name].iloc[-1]:.2f}" for name in names)
        for label, table in tables.items()
    )
    return figure


def drift_over_requests(drifts: Mapping[str, pd.DataFrame], title: str = "How far the weights went") -> Plot:
    """A panel per sequence, two lines per kind of layer; ``drifts`` holds ``sequence.drift()`` by name."""
    figure = Plot(figsize=(3.3 * len(drifts) + 1.5, 3.1), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(drifts), sharey=True, squeeze=False)[0]
    for axes, (name, drift) in zip(panels, drifts.items(), strict=True):
        draw_drift(axes, drift)
        axes.set_title(name, fontsize=9)
    panels[0].set_ylabel("distance, as a share of the layer's size", fontsize=8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(title, fontsize=11)
    ends = {name: drift["from base"].unstack().iloc[-1] for name, drift in drifts.items()}
    figure.alt = f"{title}. " + "; ".join(
        f"{name}, from base at the end: " + ", ".join(f"{KINDS[k]} {v:.1%}" for k, v in end.items())
        for name, end in ends.items()
    )
    return figure


def draw_drift(axes: Axes, drift: pd.DataFrame) -> None:
    """One panel of :func:`drift_over_requests`: from the base (filled), and in each request (open)."""
    far, step = (drift[column].unstack() for column in ("from base", "this request"))
    for kind, look in zip([k for k in KINDS if k in far], LINES, strict=False):
        axes.plot([0, *far.index], [0, *far[kind]], label=f"{KINDS[kind]}, from base", **look)
        axes.plot(step[kind], ls=":", mfc="white", label=f"{KINDS[kind]}, this request", **look)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _requests_below(axes)


def _requests_below(axes: Axes) -> None:
    axes.set_xlabel("requests", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_picture(axes: Axes, picture: Image.Image, gone: bool) -> None:
    """A picture on given axes, in a dashed frame when its concept was asked to go."""
    axes.imshow(picture, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=gone, color=LOST, linewidth=2, linestyle=(0, (3, 2)))


def picture_history(
    pictures: Sequence[Sequence[Image.Image]], names: Sequence[str], requests: Sequence[str], title: str = ""
) -> Plot:
    """Rows are models (base, then after each request), columns concepts ``names`` on fixed seeds."""
    figure = image_grid(pictures, step_labels(requests), names, title, cell=0.6)
    for i, axes in enumerate(figure.axes):
        k, j = divmod(i, len(names))
        draw_picture(axes, pictures[k][j], gone=names[j] in requests[:k])
    return figure
