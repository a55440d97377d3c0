"""Apps, thin: controls -> public functions -> figures. No maths here.

An error shows as one sentence in the app and is kept in ``.error``. Everything works with ipywidgets 7 and 8.
What an app shows is there without a kernel, too: the viewer, a figure; the timeline never needs one.
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import ipywidgets as widgets
import pandas as pd
from diffusers import DiffusionPipeline
from IPython.core.formatters import format_display_data
from IPython.display import HTML
from PIL import Image

from . import figures
from .attention import AttentionTrace, trace
from .concepts import ModelCard, UnlearnConfig, model_card
from .evaluation import Judge
from .models import sample
from .unlearning import UnlearningRun, UnlearningSequence, unlearn
from .viewer import Slides, image_html


class App(widgets.VBox):
    """Controls, a button, a sentence, and what it is about.

    Attributes:
        show: is called with the controls' values, by name; returns the sentence and what to display below it.
        controls: by name.
        shown: what is displayed, None before the first time.
        error: the exception behind the sentence, or None.
    """

    def __init__(
        self, show: Callable[..., tuple[str, object]], controls: Mapping[str, widgets.Widget], button: str
    ) -> None:
        self.show, self.controls, self.shown, self.error = show, controls, None, None
        self.button, self.message = widgets.Button(description=button), widgets.HTML()
        layout = widgets.Layout(flex_flow="row wrap", align_items="center")
        row, self.output = widgets.HBox([*controls.values(), self.button], layout=layout), widgets.Output()
        super().__init__([row, self.message, self.output])

    def say(self, text: str, role: str = "status") -> None:
        self.message.value = f'<div role="{role}" style="line-height: 1.5">{html.escape(text)}</div>'

    def act(self, *_: object) -> None:
        """Shows what the controls ask for, or says why it cannot."""
        self.error = None
        self.say("Drawing ...")
        try:
            text, self.shown = self.show(**{name: part.value for name, part in self.controls.items()})
            data, metadata = format_display_data(self.shown)
            shown = {"output_type": "display_data", "data": data, "metadata": metadata}
            self.output.outputs = () if self.shown is None else (shown,)  # at once: nothing flickers
            self.say(text)
        except (Exception, KeyboardInterrupt) as error:  # any: a callback has nobody else to tell
            self.error, text = error, " ".join(str(error).split())
            plain = type(error).__module__ == "duge_lite.errors" or isinstance(error, ValueError | KeyError)
            text = text if plain and text else f"{type(error).__name__}: {text}"
            self.say("⚠ " + ("Interrupted." if isinstance(error, KeyboardInterrupt) else text), "alert")


def _field(kind: type[widgets.Widget], label: str, value: object, **values: object) -> widgets.Widget:
    style, layout = {"description_width": "14em"}, widgets.Layout(width="36em")
    return kind(value=value, description=label, style=style, layout=layout, **values)


def attention_explorer(
    pipe: DiffusionPipeline, prompt: str = "a photo of an apple next to an umbrella", seed: int = 1
) -> App:
    """An app: a prompt, a seed, steps, guidance; *Draw*; then the attention viewer."""
    card = model_card(pipe)
    controls = {
        "prompt": _field(widgets.Text, "Prompt", prompt),
        "seed": _field(widgets.BoundedIntText, "Seed", seed, min=0, max=2**31 - 1),
        "num_inference_steps": _field(widgets.IntSlider, "Steps", card.sampling_steps, min=1, max=50),
        "guidance_scale": _field(widgets.FloatSlider, "Guidance", card.guidance_scale, min=1, max=15),
    }

    def show(**how: object) -> tuple[str, AttentionTrace]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a prompt that is cut: the viewer says so
            return "", trace(pipe, previews=card.name == "doodle", **how)  # a large decoder would take long

    app = App(show, controls, "Draw")
    app.button.on_click(app.act)
    return app


# ---- the studio


def draw_around(pipe: DiffusionPipeline, concept: str, seed: int = 0) -> tuple[list[str], list[Image.Image]]:
    """Three pictures of ``concept`` (a style on different objects), then four of what is to stay, with names.

    What is to stay is what resembles the concept, then others from all over; picture i is from ``seed + i``.
    """
    card = model_card(pipe)
    style = card.check(concept) in card.styles
    related = [c for c in card.related.get(concept, ()) if c != concept]
    others = [c for c in (card.styles if style else card.concepts) if c not in (concept, *related)]
    stay = (related + others[:: max(1, len(others) // 4)])[:4]
    prompts = card.prompts(concept)[:3] if style else [card.prompt(concept)] * 3
    prompts += [card.prompts(name)[0] for name in stay]
    return [concept] * 3 + stay, sample(pipe, prompts, seed, card.sampling_steps)


def studio_figure(
    names: Sequence[str], rows: Sequence[Sequence[Image.Image]], judge: Judge | None, card: ModelCard
) -> tuple[str, figures.Plot]:
    """A sentence about the same seeds before and after, and the pictures with the judge's words."""
    concept, words = names[0], []
    text = f"Same seeds, before and after forgetting “{concept}”"
    if judge is not None and judge.knows(concept):
        among = card.styles if concept in card.styles else card.judged
        words = [judge.names(list(pictures), among) for pictures in rows]
        was, now = ([w == n for w, n in zip(row, names, strict=True)] for row in words)
        text = f"“{concept}”: the judge sees it in {sum(now[:3])} of 3 pictures ({sum(was[:3])} before), "
        text += f"the others in {sum(now[3:])} of {len(names) - 3} ({sum(was[3:])} before)"
    return f"{text}.", figures.image_grid(rows, ("before", "after"), names, text, 1.1, (), words)


def before_and_after(
    pipe: DiffusionPipeline, concept: str, config: UnlearnConfig | None = None, seed: int = 0
) -> tuple[figures.Plot, UnlearningRun]:
    """Forgets ``concept`` in place: the same seeds before and after, and the run (its way back)."""
    names, before = draw_around(pipe, concept, seed)
    run = unlearn(pipe, concept, config)
    _, after = draw_around(pipe, concept, seed)
    return studio_figure(names, [before, after], None, model_card(pipe))[1], run


NOTHING = "(forget nothing)"


def unlearning_studio(
    pipe: DiffusionPipeline, config: UnlearnConfig | None = None, seed: int = 0, judge: Judge | None = None
) -> App:
    """An app: choose what is to go, move the weights of the losses; every change solves anew and shows it.

    Args:
        pipe: the pipeline that forgets, in place; *Undo* and "(forget nothing)" put it back.
        config: what the controls say at first, and all that they do not show; by default the card's.
        seed: of the first picture. Before and after are always drawn from the same seeds.
        judge: says what it sees; by default the shipped one for the doodle model, nobody for other models.

    ``app.run`` is the run whose weights are in the model now, or None. To stop, interrupt the kernel: the
    pipeline is left as it was. The twin without a kernel is :func:`before_and_after`.
    """
    card = model_card(pipe)
    config = config or UnlearnConfig(**card.settings)
    judge = Judge.load(card.judge) if judge is None and card.judge == "doodle" else judge
    attention, prior, regularization = config.weights

    def choice(label: str, value: float, values: Sequence[float] = ()) -> widgets.SelectionSlider:
        parts = values or [k * (value or 1.0) for k in (0, 0.01, 0.1, 0.3, 1, 3, 10, 100)]
        options = [(f"{v:g}", v) for v in sorted({*parts, value})]
        return _field(widgets.SelectionSlider, label, value, options=options, continuous_update=False)

    controls = {
        "concept": _field(widgets.Dropdown, "Forget", NOTHING, options=[NOTHING, *card.forgettable]),
        "lambda_attention": choice("attention: the name goes unheard", attention),
        "lambda_prior": choice("prior: everything else stays", prior),
        "lambda_regularization": choice("regularization: near the start", regularization),
        "eta": choice("η: how far past it", config.eta, (0, 0.25, 0.5, 1, 1.5, 2)),
    }
    base = cache(partial(draw_around, pipe, seed=seed))  # asked for while nothing is forgotten

    def restore() -> None:
        if app.run is not None:
            app.run.restore()
            app.run = None

    def show(concept: str, **weights: float) -> tuple[str, HTML | None]:
        restore()
        if concept == NOTHING:
            return "Nothing is forgotten: the model is as it was.", None
        names, before = base(concept)
        try:
            app.run = unlearn(pipe, concept, replace(config, **weights))
            text, grid = studio_figure(names, [before, draw_around(pipe, concept, seed)[1]], judge, card)
            return text, HTML(image_html(grid.png(), grid.alt))
        except BaseException:  # an interruption too: the model is left as it was
            restore()
            raise

    app = App(show, controls, "Undo")
    app.run = None
    for control in controls.values():
        control.observe(app.act, "value")
    app.button.on_click(lambda _: setattr(controls["concept"], "value", NOTHING))
    app.say("Choose what is to go.")
    return app


# ---- the timeline


@dataclass(frozen=True)
class Timeline:
    """What every model along a sequence draws, the base first; a notebook shows it as a slider."""

    requests: tuple[str, ...]
    names: tuple[str, ...]  # what each column of pictures was asked for
    pictures: list[list[Image.Image]] = field(repr=False)  # a column has the same noise in every row
    matrix: pd.DataFrame = field(repr=False)
    metrics: pd.DataFrame = field(repr=False)

    def about(self, at: int) -> str:
        """Model ``at`` in one sentence."""
        if at == 0:
            return "The base model: nothing was asked to go yet."
        known = self.metrics.loc[at, list(figures.METRICS)].dropna()
        numbers = ", ".join(f"{name} {value:.2f}" for name, value in known.items())
        return f"Asked to go: {', '.join(self.requests[:at])}. {numbers}."

    def _repr_html_(self) -> str:
        every, how = range(len(self.pictures)), (self.pictures, self.names, self.requests, self.matrix)
        frames = [figures.timeline_step(*how, k).png() for k in every]
        return Slides(frames, [self.about(k) for k in every], "After request").data


def erosion_timeline(
    sequence: UnlearningSequence, matrix: pd.DataFrame, concepts: Sequence[str] | None = None, seed: int = 0
) -> Timeline:
    """A slider over the requests: what every model drew, and its row of the accuracy ``matrix``.

    Shows ``concepts`` (by default all of the matrix), each from ``seed``; afterwards the pipeline is the last
    model again. What does not fit raises UnknownConceptError or ValueError before anything is drawn.
    """
    card, metrics = model_card(sequence.pipe), sequence.metrics(matrix)
    names = [card.check(c) for c in concepts or matrix.columns]
    how = [card.prompts(c)[0] for c in names], [seed] * len(names), card.sampling_steps
    every = range(len(sequence.runs) + 1)
    try:
        pictures = [sample(sequence.pipeline(at=k), *how) for k in every]
    finally:
        sequence.pipeline(at=every[-1])
    return Timeline(sequence.concepts, names, pictures, matrix, metrics)
