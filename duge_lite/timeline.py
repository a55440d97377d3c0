"""The erosion timeline: drag a slider from request to request; see what goes, and what suffers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import ipywidgets as widgets
import pandas as pd
from PIL import Image

from .models import model_card, sample
from .plot import Plot
from .sequence import UnlearningSequence
from .visualize_sequence import METRICS, draw_drift, draw_matrix, draw_picture, step_labels


@dataclass(frozen=True)
class Timeline:
    """What the widget shows.

    Attributes:
        names: what each column of pictures was asked for.
        pictures: a row per model, the base first; a column has the same noise in every row.
    """

    requests: tuple[str, ...]
    names: tuple[str, ...]
    pictures: list[list[Image.Image]]
    matrix: pd.DataFrame
    metrics: pd.DataFrame
    drift: pd.DataFrame

    def about(self, at: int) -> str:
        """Model ``at`` in one sentence."""
        if at == 0:
            return "The base model: nothing was asked to go yet."
        known = self.metrics.loc[at, list(METRICS)].dropna()
        numbers = ", ".join(f"{name} {value:.2f}" for name, value in known.items())
        return f"Asked to go: {', '.join(self.requests[:at])}. {numbers}."

    def figure(self, at: int) -> Plot:
        """Pictures of the base and of model ``at``, the matrix with its row marked, the drift.

        Raises ValueError for a model that there is not.
        """
        if not 0 <= at < len(self.pictures):
            raise ValueError(f"at = {at}: expected a number from 0 (the base) to {len(self.pictures) - 1}")
        figure = Plot(figsize=(10, 5), dpi=100, layout="constrained")
        figure.colors = 256
        above, below = figure.subfigures(2, 1, height_ratios=(2, 3.4))
        rows = above.subplots(2, len(self.names), squeeze=False)
        for row, k in zip(rows, (0, at), strict=True):
            row[0].set_ylabel(step_labels(self.requests)[k], rotation=0, ha="right", va="center", fontsize=9)
            for axes, picture, name in zip(row, self.pictures[k], self.names, strict=True):
                draw_picture(axes, picture, gone=name in self.requests[:k])
                axes.set_title("" if axes in rows[1] else name, fontsize=8, pad=3)
        left, right = below.subplots(1, 2, width_ratios=(2.7, 1))
        left.set_title("accuracy; what is hatched ought to be 0", fontsize=9)
        right.set_title("how far the weights went", fontsize=9)
        draw_matrix(left, self.matrix, self.requests, at)
        draw_drift(right, self.drift)
        right.axvline(at, color="black", lw=2)
        below.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
        figure.alt = self.about(at)
        return figure


def draw_timeline(
    sequence: UnlearningSequence, matrix: pd.DataFrame, concepts: Sequence[str], seeds: Sequence[int]
) -> Timeline:
    """Lets every model along the sequence draw; afterwards the pipeline is the last one again."""
    card, metrics = model_card(sequence.pipe), sequence.metrics(matrix)
    asks = [(card.check(c), card.prompts(c)[0], s) for c in concepts for s in seeds]
    names, *how = zip(*asks, strict=True)
    every = range(len(sequence.runs) + 1)
    try:
        pictures = [sample(sequence.pipeline(at=k), *how, card.sampling_steps) for k in every]
    finally:
        sequence.pipeline(at=every[-1])
    return Timeline(sequence.concepts, names, pictures, matrix, metrics, sequence.drift())


class ErosionTimeline(widgets.VBox):
    """See :func:`erosion_timeline`; ``error`` is the exception behind the message, None when all is well."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline, self.error, self._seen = timeline, None, {}
        options = [(label, k) for k, label in enumerate(step_labels(timeline.requests))]
        self.slider = widgets.SelectionSlider(options=options, description="After")
        self.message, self.image = widgets.HTML(), widgets.Image(format="png")
        super().__init__([self.slider, self.message, self.image])
        self.slider.observe(lambda _: self.show(), "value")
        self.show()

    def show(self) -> None:
        """Shows where the slider stands. An error becomes one sentence in the widget."""
        at, self.error = self.slider.value, None
        try:
            if at not in self._seen:
                self._seen[at] = self.timeline.figure(at).png()
            self.image.value, text = self._seen[at], html.escape(self.timeline.about(at))
        except Exception as error:  # any: a callback has nobody else to tell
            self.error, reason = error, html.escape(" ".join(str(error).split()))
            text = f'<span role="alert">⚠ {type(error).__name__}: {reason}</span>'
        self.message.value = f'<div style="line-height: 1.5">{text}</div>'


def erosion_timeline(
    sequence: UnlearningSequence,
    matrix: pd.DataFrame,
    concepts: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
) -> ErosionTimeline:
    """An app for a notebook: a slider over the requests; all pictures are drawn once, beforehand.

    Shows ``concepts`` (by default all of the accuracy ``matrix``), each from all ``seeds``. What does not fit
    raises UnknownConceptError or ValueError before anything is drawn.
    """
    return ErosionTimeline(draw_timeline(sequence, matrix, concepts or list(matrix.columns), seeds))
