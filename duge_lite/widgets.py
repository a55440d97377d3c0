"""ipywidgets apps, thin: controls -> public functions -> figures. No maths here.

An error inside a callback shows as one sentence in the app and is kept in ``.error``. Everything works with
ipywidgets 7 and 8, and what an app shows is there without a kernel, too: the viewer,
:class:`~duge_lite.viewer.Slides`, a figure.
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import ipywidgets as widgets
import pandas as pd
from diffusers import DiffusionPipeline
from IPython.display import display
from PIL import Image

from . import figures
from .attention import AttentionTrace, trace
from .concepts import ModelCard, model_card
from .config import UnlearnConfig
from .evaluation import Judge
from .models import sample
from .sequence import UnlearningSequence
from .unlearning import UnlearningRun, unlearn
from .viewer import Comparison, Slides, compare


class _App(widgets.VBox):
    """Controls over an output; ``error`` is the exception behind the message, None when all is well."""

    def __init__(self, *rows: Sequence[widgets.Widget]) -> None:
        self.error: BaseException | None = None
        self.message = widgets.HTML()
        layout = widgets.Layout(flex_flow="row wrap", align_items="center")
        super().__init__([*(widgets.HBox(row, layout=layout) for row in rows), self.message])

    def say(self, text: str, role: str = "status") -> None:
        self.message.value = f'<div role="{role}" style="line-height: 1.5">{html.escape(text)}</div>'

    def attempt(self, act: Callable[[], str]) -> None:
        """Says what ``act`` has to say, or why it failed."""
        self.error = None
        try:
            self.say(act())
        except (Exception, KeyboardInterrupt) as error:  # any: a callback has nobody else to tell
            self.error, text = error, " ".join(str(error).split())
            plain = type(error).__module__ == "duge_lite.errors" or isinstance(error, ValueError | KeyError)
            text = text if plain and text else f"{type(error).__name__}: {text}"
            self.say("⚠ " + ("Interrupted." if isinstance(error, KeyboardInterrupt) else text), "alert")


def _field(kind: type[widgets.Widget], label: str, value: object, **values: object) -> widgets.Widget:
    style, layout = {"description_width": "initial"}, widgets.Layout(width="30em", margin="2px 12px 2px 2px")
    return kind(value=value, description=label, style=style, layout=layout, **values)


def _choice(label: str, value: float, values: Sequence[float] = ()) -> widgets.SelectionSlider:
    """A slider over ``values``, by default over parts and multiples of ``value``, and 0."""
    values = sorted({*(values or (k * (value or 1.0) for k in (0, 0.01, 0.1, 0.3, 1, 3, 10, 100))), value})
    return _field(
        widgets.SelectionSlider,
        label,
        value,
        options=[(f"{v:g}", v) for v in values],
        continuous_update=False,
    )


# ---- the explorer: its kernel-free twin is the viewer


def draw_attention(
    pipes: Sequence[DiffusionPipeline], labels: Sequence[str], prompt: str, **how: object
) -> AttentionTrace | Comparison:
    """What the explorer shows for its settings: the trace of one pipeline, or the comparison of two."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a prompt that is cut: the viewer says so
        # decoding every step costs too much with a large decoder
        traces = [trace(p, prompt, previews=model_card(p).name == "doodle", **how) for p in pipes]
    return traces[0] if len(traces) == 1 else compare(*traces, labels=tuple(labels))


class AttentionExplorer(_App):
    """See :func:`attention_explorer`; ``result`` is what is shown, None before the first picture."""

    def __init__(
        self, pipes: Sequence[DiffusionPipeline], labels: Sequence[str], prompt: str, seed: int
    ) -> None:
        card, self.pipes, self.labels, self.result = model_card(pipes[0]), tuple(pipes), tuple(labels), None
        self.prompt = _field(widgets.Text, "Prompt", prompt)
        self.seed = _field(widgets.BoundedIntText, "Seed", seed, min=0, max=2**31 - 1)
        self.steps = _field(widgets.IntSlider, "Steps", card.sampling_steps, min=1, max=50)
        self.guidance = _field(widgets.FloatSlider, "Guidance", card.guidance_scale, min=1, max=15, step=0.5)
        self.button = widgets.Button(description="Draw", button_style="primary", icon="paint-brush")
        super().__init__([self.prompt, self.seed], [self.steps, self.guidance], [self.button])
        self.output = widgets.Output()
        self.children = (*self.children, self.output)
        self.button.on_click(lambda _: self.draw())

    def draw(self) -> None:
        """Draws with the settings that the controls show."""
        controls = (self.prompt, self.seed, self.steps, self.guidance, self.button)
        for control in controls:
            control.disabled = True
        self.say("Drawing ...")
        self.attempt(self._draw)
        for control in controls:
            control.disabled = False

    def _draw(self) -> str:
        how = {"num_inference_steps": self.steps.value, "guidance_scale": self.guidance.value}
        self.result = draw_attention(self.pipes, self.labels, self.prompt.value, seed=self.seed.value, **how)
        self.output.outputs = ()
        self.output.append_display_data(self.result)
        return ""


def attention_explorer(
    pipe: DiffusionPipeline,
    other: DiffusionPipeline | None = None,
    prompt: str = "a photo of an apple next to an umbrella",
    seed: int = 1,
    labels: tuple[str, str] = ("before", "after"),
) -> AttentionExplorer:
    """An app: a prompt, a seed, steps, guidance; *Draw*; then the attention viewer of one pipeline or two."""
    return AttentionExplorer((pipe,) if other is None else (pipe, other), labels, prompt, seed)


# ---- the studio


@dataclass(frozen=True)
class Preview:
    """What the model draws now: ``names`` says what was asked for, the concept ``copies`` times first."""

    names: tuple[str, ...]
    copies: int
    pictures: tuple[Image.Image, ...]
    attention: AttentionTrace  # of the first picture

    def named(self, judge: Judge | None, card: ModelCard) -> list[str]:
        """What the judge calls each picture; "" without a judge, or when it does not know the concept."""
        if judge is None or not judge.knows(self.names[0]):
            return [""] * len(self.names)
        return judge.names(list(self.pictures), card.styles if self.names[0] in card.styles else card.judged)


def neighbours(card: ModelCard, concept: str, count: int) -> tuple[str, ...]:
    """``count`` names that are to stay: those that resemble ``concept`` first, then others from all over."""
    known = card.styles if concept in card.styles else card.concepts
    related = [c for c in card.related.get(concept, ()) if c != concept]
    others = [c for c in known if c not in (concept, *related)]
    return tuple((related + others[:: max(1, len(others) // count)])[:count])


def preview(
    pipe: DiffusionPipeline, concept: str, seed: int = 0, copies: int = 3, others: int = 4
) -> Preview:
    """Draws ``concept`` (a style on different objects) and bystanders, picture i from ``seed + i``."""
    card = model_card(pipe)
    names = neighbours(card, concept, others)
    texts = card.prompts(concept) if concept in card.styles else [card.prompt(concept)] * copies
    prompts = texts[:copies] + [card.prompts(name)[0] for name in names]
    first = trace(pipe, prompts[0], seed, card.sampling_steps)
    rest = sample(pipe, prompts[1:], [seed + i for i in range(1, len(prompts))], card.sampling_steps)
    return Preview((concept,) * copies + names, copies, (first.image, *rest), first)


def before_and_after(
    pipe: DiffusionPipeline, concept: str, config: UnlearnConfig | None = None, seed: int = 0
) -> tuple[figures.Plot, UnlearningRun]:
    """Forgets ``concept`` in place: the same seeds before and after, and the run (its way back)."""
    model_card(pipe).check(concept)
    was = preview(pipe, concept, seed)
    run = unlearn(pipe, concept, config)
    now = preview(pipe, concept, seed)
    title = f"Same seeds, before and after forgetting “{concept}”"
    return figures.image_grid([was.pictures, now.pictures], ("before", "after"), was.names, title), run


NOTHING = "(forget nothing)"


class UnlearningStudio(_App):
    """See :func:`unlearning_studio`; ``run`` is the one whose weights are in the model now, or None."""

    def __init__(
        self, pipe: DiffusionPipeline, config: UnlearnConfig, seed: int, judge: Judge | None
    ) -> None:
        self.pipe, self.config, self.seed, self.judge, self.run = pipe, config, seed, judge, None
        self._before: dict[str, Preview] = {}
        options = [NOTHING, *model_card(pipe).forgettable]
        self.concept = _field(widgets.Dropdown, "Forget", NOTHING, options=options)
        attention, prior, regularization = config.weights
        self.sliders = {
            "lambda_attention": _choice("attention: the name goes unheard", attention),
            "lambda_prior": _choice("prior: everything else stays", prior),
            "lambda_regularization": _choice("regularization: near the start", regularization),
            "eta": _choice("η: how far past it", config.eta, (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)),
        }
        self.undo = widgets.Button(description="Undo", icon="undo", layout=widgets.Layout(width="7em"))
        hidden = dict(max_width="900px", display="none")
        self.pictures, self.attention = (
            widgets.Image(format="png", layout=widgets.Layout(**hidden)) for _ in range(2)
        )
        a, b, c, d = self.sliders.values()
        super().__init__([self.concept, self.undo], [a, b], [c, d])
        self.children = (*self.children, self.pictures, self.attention)
        for control in (self.concept, *self.sliders.values()):
            control.observe(lambda _: self.show(), "value")
        self.undo.on_click(lambda _: setattr(self.concept, "value", NOTHING))
        self.say("Choose what is to go.")

    def settings(self) -> UnlearnConfig:
        """What the controls say."""
        return replace(self.config, **{name: slider.value for name, slider in self.sliders.items()})

    def show(self) -> None:
        """Solves for what the controls say, from the base, and shows the same seeds before and after."""
        self.attempt(self._show)

    def restore(self) -> None:
        """Puts the model back as it was before the studio."""
        if self.run is not None:
            self.run.restore()
            self.run = None

    def _show(self) -> str:
        concept = self.concept.value
        self.restore()
        if concept == NOTHING:
            return "Nothing is forgotten: the model is as it was."
        if concept not in self._before:
            self._before[concept] = preview(self.pipe, concept, self.seed)
        before = self._before[concept]
        try:
            self.run = unlearn(self.pipe, concept, self.settings())
            now = preview(self.pipe, concept, self.seed)
            grid, maps, text = studio_figures(before, now, self.judge, model_card(self.pipe))
        except BaseException:  # an interruption too: the model is left as it was
            self.restore()
            raise
        for image, figure in ((self.pictures, grid), (self.attention, maps)):
            image.value, image.layout.display = figure.png(), ""
        return text


def studio_figures(
    before: Preview, now: Preview, judge: Judge | None, card: ModelCard
) -> tuple[figures.Plot, figures.Plot, str]:
    """Pictures with the judge's words, maps before and after, and one sentence about them."""
    concept, copies, names = before.names[0], before.copies, before.names
    words = [shown.named(judge, card) for shown in (before, now)]
    was, found = ([w == n for w, n in zip(row, names, strict=True)] for row in words)
    text = f"Same seeds, before and after forgetting “{concept}”"
    if any(words[0]):
        text = f"“{concept}”: the judge sees it in {sum(found[:copies])} of {copies} pictures "
        text += f"({sum(was[:copies])} before), the others in {sum(found[copies:])} of {len(names) - copies} "
        text += f"({sum(was[copies:])} before)"
    rows, below = [before.pictures, now.pictures], words if any(words[0]) else ()
    grid = figures.image_grid(rows, ("before", "after"), names, text, 1.1, (), below)
    title = f"Where “{concept}” looks: before and after, on one scale"
    return (
        grid,
        figures.attention_difference(before.attention, now.attention, concept, title=title),
        text + ".",
    )


def unlearning_studio(
    pipe: DiffusionPipeline, config: UnlearnConfig | None = None, seed: int = 0, judge: Judge | None = None
) -> UnlearningStudio:
    """An app: choose what is to go, move the weights of the losses; every change solves anew and shows it.

    Args:
        pipe: the pipeline that forgets, in place; *Undo* and "(forget nothing)" put it back.
        config: what the controls say at first, and all that they do not show; by default the card's.
        seed: of the first picture. Before and after are always drawn from the same seeds.
        judge: says what it sees; by default the shipped one for the doodle model, nobody for other models.

    To stop, interrupt the kernel: the pipeline is left as it was. The twin without a kernel is
    :func:`before_and_after`, or the figures of :func:`studio_figures`.
    """
    card = model_card(pipe)
    if judge is None and card.judge == "doodle":
        judge = Judge.load(card.judge)
    return UnlearningStudio(pipe, config or UnlearnConfig(**card.settings), seed, judge)


# ---- the timeline


@dataclass(frozen=True)
class Timeline:
    """What every model along a sequence draws, the base first; a notebook shows it as a slider."""

    requests: tuple[str, ...]
    names: tuple[str, ...]  # what each column of pictures was asked for
    pictures: list[list[Image.Image]]  # a column has the same noise in every row
    matrix: pd.DataFrame
    metrics: pd.DataFrame

    def about(self, at: int) -> str:
        """Model ``at`` in one sentence."""
        if at == 0:
            return "The base model: nothing was asked to go yet."
        known = self.metrics.loc[at, figures.shown_metrics(self.metrics)].dropna()
        numbers = ", ".join(f"{name} {value:.2f}" for name, value in known.items())
        return f"Asked to go: {', '.join(self.requests[:at])}. {numbers}."

    def figure(self, at: int) -> figures.Plot:
        """Pictures of the base and of model ``at``, and the matrix with its row marked."""
        if not 0 <= at < len(self.pictures):
            raise ValueError(f"at = {at}: expected a number from 0 (the base) to {len(self.pictures) - 1}")
        return figures.timeline_step(
            self.pictures, self.names, self.requests, self.matrix, at, self.about(at)
        )

    def slides(self) -> Slides:
        """The slider without a kernel."""
        every = range(len(self.pictures))
        return Slides(
            [self.figure(at).png() for at in every], [self.about(at) for at in every], "After request"
        )

    def _repr_html_(self) -> str:
        return self.slides()._repr_html_()


def draw_timeline(
    sequence: UnlearningSequence, matrix: pd.DataFrame, concepts: Sequence[str], seeds: Sequence[int] = (0,)
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
    return Timeline(sequence.concepts, names, pictures, matrix, metrics)


class ErosionTimeline(_App):
    """See :func:`erosion_timeline`; ``timeline`` is what it shows."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline, self._seen = timeline, {}
        options = [(label, k) for k, label in enumerate(figures.step_labels(timeline.requests))]
        self.slider = widgets.SelectionSlider(options=options, description="After")
        self.image = widgets.Image(format="png")
        super().__init__([self.slider])
        self.children = (*self.children, self.image)
        self.slider.observe(lambda _: self.show(), "value")
        self.show()

    def show(self) -> None:
        """Shows where the slider stands; each position is drawn once."""
        self.attempt(self._show)

    def _show(self) -> str:
        at = self.slider.value
        if at not in self._seen:
            self._seen[at] = self.timeline.figure(at).png()
        self.image.value = self._seen[at]
        return self.timeline.about(at)


def erosion_timeline(
    sequence: UnlearningSequence,
    matrix: pd.DataFrame,
    concepts: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
) -> ErosionTimeline:
    """An app: a slider over the requests; all pictures are drawn once, beforehand.

    Shows ``concepts`` (by default all of the accuracy ``matrix``), each from all ``seeds``. What does not fit
    raises UnknownConceptError or ValueError before anything is drawn. ``app.timeline`` is its twin without a
    kernel: a notebook shows it as a slider in plain HTML.
    """
    return ErosionTimeline(draw_timeline(sequence, matrix, concepts or list(matrix.columns), seeds))


class LiveLosses:
    """An ``on_step`` callback that redraws the loss curves in the cell's output while a run goes on."""

    def __init__(self, every: int = 10) -> None:
        self.every, self.rows, self._handle = every, [], None

    def __call__(self, state: object) -> None:
        self.rows.append(vars(state))
        if state.step % self.every and state.step != state.iterations:
            return
        history = pd.DataFrame(self.rows).set_index("step")
        figure = figures.loss_curves(history, f"iteration {state.step} of {state.iterations}")
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)
