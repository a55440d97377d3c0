"""Figures of the attacks: what came back, in which model, and how fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from .plot import Plot
from .visualize import ACCENT, KEPT, LOST

LOOKS = {"base": ("o", ACCENT), "unlearned": ("X", LOST), "oracle": ("D", KEPT)}
SPARE = (("s", "#b58a2c"), ("^", "#7a4b8c"), ("v", "#2c7a5b"))


def _looks(names: Sequence[str]) -> list[tuple[str, str]]:
    """A marker and a colour each: a model keeps its own, also in "unlearned, other pictures"."""
    spare = iter(SPARE)
    looks = [LOOKS.get(name.split(",")[0]) or next(spare, None) for name in names]
    if None in looks:
        raise ValueError(f"{', '.join(names)}: expected at most {len(SPARE)} beside {', '.join(LOOKS)}")
    return looks


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=9)
    axes.set_xlabel(label, fontsize=8)


def attack_summary(table: pd.DataFrame, title: str = "Who gets it back?") -> Plot:
    """Each attack's share of pictures with the concept, a marker per model, with 95 % intervals.

    ``table`` as :func:`duge_lite.attacks.shares` counts it by ``["attack", "model"]``; both in the order in
    which they first come.
    """
    attacks, models = (list(table.index.unique(level)) for level in (0, 1))
    figure = Plot(figsize=(7.6, 1.1 + 0.55 * len(attacks)), dpi=100, layout="constrained")
    axes = figure.subplots()
    for k, (model, (marker, color)) in enumerate(zip(models, _looks(models), strict=True)):
        rows = table.xs(model, level=1)
        at = np.array([attacks.index(a) for a in rows.index]) + 0.2 * (k - (len(models) - 1) / 2)
        axes.hlines(at, rows.low, rows.high, color=color, linewidth=2, alpha=0.55)
        axes.plot(rows.seen, at, marker, color=color, ms=8, mec="white", mew=0.8, label=model)
    axes.set_yticks(range(len(attacks)), attacks)
    axes.set_ylim(len(attacks) - 0.45, -0.55)
    axes.set_xlim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(fontsize=9, ncols=len(models), loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)
    _finish(axes, title, "pictures in which the judge sees the concept, with 95 % intervals")
    figure.alt = f"{title} " + "; ".join(f"{a}, {m}: {s:.0%}" for (a, m), s in table.seen.items())
    return figure


def recovery_curves(
    curves: Mapping[str, pd.DataFrame], known: float, title: str = "How fast does it come back?"
) -> Plot:
    """Against fine-tuning steps: what the judge sees (95 % bands), and the denoising error, told the name.

    ``curves`` as :func:`duge_lite.attacks.shares` counts :func:`duge_lite.attacks.relearning` by ``"step"``;
    ``known`` is the base model's error. A name with a comma ("oracle, other pictures") is a control: dotted.
    """
    figure = Plot(figsize=(9, 3.4), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, curve), (marker, color) in zip(curves.items(), _looks(list(curves)), strict=True):
        line, face = (":", "white") if "," in name else ("-", color)
        left.fill_between(curve.index, curve.low, curve.high, color=color, alpha=0.12, linewidth=0)
        for axes, column in ((left, "seen"), (right, "told")):
            axes.plot(curve.index, curve[column], line + marker, color=color, mfc=face, lw=2, label=name)
    left.set_ylim(-0.03, 1.03)
    right.axhline(known, color=ACCENT, linestyle="--", linewidth=1)
    right.text(1, known, "base ", transform=right.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
    _finish(left, "The judge: pictures with the concept", "fine-tuning steps; bands are 95 % intervals")
    _finish(right, "No judge: error on new drawings, told the name", "fine-tuning steps")
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    left.legend(fontsize=8, frameon=False, loc="upper left")
    figure.suptitle(title, fontsize=11)
    figure.alt = f"{title} " + "; ".join(
        f"{name}: "
        + ", ".join(f"{row.seen:.0%} (error {row.told:.4f}) after {row.Index}" for row in c.itertuples())
        for name, c in curves.items()
    )
    return figure
