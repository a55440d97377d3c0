"""The attention explorer: type a prompt, draw, and see where each word looks; one model or two.

Controls, a call of :func:`duge_lite.attention.trace`, and the viewer. No maths, and nothing that only one
generation of ipywidgets has (7 and 8 both work).
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable, Sequence

import ipywidgets as widgets
from diffusers import DiffusionPipeline

from .attention import AttentionTrace, trace
from .models import model_card
from .viewer import Comparison, compare


def draw_attention(
    pipes: Sequence[DiffusionPipeline],
    labels: Sequence[str],
    prompt: str,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> AttentionTrace | Comparison:
    """What the explorer shows for its settings: the trace of one pipeline, or the comparison of two.

    ``on_step(done, total)`` counts the steps of all pipelines together.
    """
    traces = []
    for i, pipe in enumerate(pipes):

        def counted(done: int, total: int, i: int = i) -> None:
            if on_step is not None:
                on_step(i * total + done, len(pipes) * total)

        cheap = model_card(pipe).name == "doodle"  # decoding every step: not with a large decoder
        settings = dict(on_step=counted, previews=cheap)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a prompt that is cut: the viewer says so
            traces.append(trace(pipe, prompt, seed, steps, guidance_scale, **settings))
    return traces[0] if len(traces) == 1 else compare(*traces, labels=tuple(labels))


class AttentionExplorer(widgets.VBox):
    """The explorer as a widget; see :func:`attention_explorer`.

    Attributes:
        result: what is shown, an AttentionTrace or a Comparison; None before the first picture.
        error: the exception behind the message that is shown, None when all is well.
    """

    def __init__(
        self, pipes: Sequence[DiffusionPipeline], labels: Sequence[str], prompt: str, seed: int
    ) -> None:
        card = model_card(pipes[0])
        self.pipes, self.labels = tuple(pipes), tuple(labels)
        self.result: AttentionTrace | Comparison | None = None
        self.error: BaseException | None = None
        wide, style = widgets.Layout(width="32em", max_width="98%"), {"description_width": "5em"}
        small = widgets.Layout(width="16em")
        self.prompt = widgets.Text(value=prompt, description="Prompt", layout=wide, style=style)
        self.seed = widgets.BoundedIntText(
            value=seed, min=0, max=2**31 - 1, description="Seed", layout=small, style=style
        )
        self.steps = widgets.IntSlider(
            value=card.sampling_steps, min=1, max=50, description="Steps", layout=wide, style=style
        )
        self.guidance = widgets.FloatSlider(
            value=card.guidance_scale,
            min=1,
            max=15,
            step=0.5,
            description="Guidance",
            layout=wide,
            style=style,
        )
        self.button = widgets.Button(description="Draw", button_style="primary", icon="paint-brush")
        self.progress = widgets.IntProgress(value=0, min=0, max=1, layout=widgets.Layout(width="16em"))
        self.message = widgets.HTML()
        self.output = widgets.Output()
        self.button.on_click(lambda _: self.draw())
        row = widgets.HBox([self.button, self.progress])
        super().__init__([self.prompt, self.seed, self.steps, self.guidance, row, self.message, self.output])

    @property
    def controls(self) -> tuple[widgets.Widget, ...]:
        return (self.prompt, self.seed, self.steps, self.guidance, self.button)

    def draw(self) -> None:
        """Draws with the settings that the controls show. An error becomes one sentence in the widget."""
        self.error, self.message.value, self.progress.bar_style = None, "", ""
        for control in self.controls:
            control.disabled = True
        try:
            self.result = draw_attention(
                self.pipes,
                self.labels,
                self.prompt.value,
                self.seed.value,
                self.steps.value,
                self.guidance.value,
                on_step=self._progress,
            )
            self.output.outputs = ()
            self.output.append_display_data(self.result)
        except (Exception, KeyboardInterrupt) as error:  # any: a callback has nobody else to tell
            self.error, self.progress.bar_style = error, "danger"
            self.message.value = f'<span role="alert">⚠ {html.escape(_sentence(error))}</span>'
        finally:
            for control in self.controls:
                control.disabled = False

    def _progress(self, done: int, total: int) -> None:
        self.progress.max, self.progress.value = total, done


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "Stopped. Nothing was changed; press Draw to try again."
    text = " ".join(str(error).split())
    return text if text and isinstance(error, ValueError | KeyError) else f"{type(error).__name__}: {text}"


def attention_explorer(
    pipe: DiffusionPipeline,
    other: DiffusionPipeline | None = None,
    prompt: str = "a photo of an apple next to an umbrella",
    seed: int = 1,
    labels: tuple[str, str] = ("before", "after"),
) -> AttentionExplorer:
    """An app for a notebook: a prompt, a seed, steps and guidance; *Draw*; then the attention viewer.

    Args:
        pipe: the pipeline that draws.
        other: a second pipeline, drawn from the same settings and shown beside the first.
        prompt: what the box holds at first.
        labels: the names of the two pipelines.

    The controls are off while the model runs. Errors appear in the widget as one sentence; the exception
    itself is in ``.error``, and what is shown in ``.result``.
    """
    pipes = (pipe,) if other is None else (pipe, other)
    return AttentionExplorer(pipes, labels, prompt, seed)
