"""ipywidgets apps, thin: controls -> public functions -> figures. No maths here.

Callbacks are wired with ``observe`` and ``on_click``; an error inside one shows as one sentence in the
app, and the controls come back. Everything works with ipywidgets 7 and 8.
"""

from __future__ import annotations

import html
from dataclasses import replace

import ipywidgets as w
import pandas as pd
from diffusers import StableDiffusionPipeline
from IPython.display import display

from . import visualize
from .explorer import attention_explorer
from .models import model_card, sample
from .plot import Plot
from .unlearning import UnlearnConfig, UnlearningRun, UnlearnState, unlearn

__all__ = ["ForgetControl", "LiveLosses", "attention_explorer", "before_and_after"]


class LiveLosses:
    """An ``on_step`` callback that redraws the loss curves in the cell's output while a run goes on."""

    def __init__(self, every: int = 10) -> None:
        self.every, self.rows, self._handle = every, [], None

    def __call__(self, state: UnlearnState) -> None:
        self.rows.append(vars(state))
        if state.step % self.every and state.step != state.iterations:
            return
        history = pd.DataFrame(self.rows).set_index("step")
        figure = visualize.loss_curves(history, f"iteration {state.step} of {state.iterations}")
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)


def before_and_after(
    pipe: StableDiffusionPipeline,
    concept: str,
    config: UnlearnConfig = UnlearnConfig(),  # noqa: B008 (frozen)
    bystanders: tuple[str, ...] | None = None,
    seed: int = 0,
    on_step=None,
) -> tuple[Plot, UnlearningRun]:
    """Forgets ``concept`` in place and draws the same seeds before and after.

    The first three columns are the concept, then its related concepts and others. Returns the figure and
    the run (``run.restore()`` is the way back).
    """
    card = model_card(pipe)
    card.check(concept)
    if bystanders is None:
        related = [c for c in card.related.get(concept, ()) if c != concept]
        others = [c for c in card.concepts if c not in (concept, *related)]
        bystanders = tuple((related + others[:: max(1, len(others) // 4)])[:4])
    shown = [concept] * 3 + list(bystanders)
    prompts, seeds = [card.prompt(c) for c in shown], [seed + i for i in range(len(shown))]
    steps = card.sampling_steps
    before = sample(pipe, prompts, seed=seeds, steps=steps)
    run = unlearn(pipe, concept, config, on_step=on_step, progress=False)
    after = sample(pipe, prompts, seed=seeds, steps=steps)
    title = f"Same seeds, before and after forgetting “{concept}” ({run.seconds:.0f} s)"
    return visualize.image_grid([before, after], ("before", "after"), shown, title), run


class ForgetControl(w.VBox):
    """Pick a concept, press the button, see it go; "Undo" brings it back.

    Attributes of use in tests: ``concept``, ``iterations``, ``forget``, ``undo``, ``picture``, ``message``.
    """

    def __init__(self, pipe: StableDiffusionPipeline, config: UnlearnConfig = UnlearnConfig()) -> None:  # noqa: B008
        card = model_card(pipe)
        self.pipe, self.config, self.run = pipe, config, None
        self.concept = w.Dropdown(options=card.concepts, value=card.concepts[0], description="Forget")
        self.iterations = w.IntSlider(
            value=config.iterations, min=10, max=300, step=10, description="iterations"
        )
        self.forget = w.Button(description="Forget it", button_style="primary", icon="eraser")
        self.undo = w.Button(description="Undo", icon="undo", disabled=True)
        self.progress = w.IntProgress(min=0, max=config.iterations, layout=w.Layout(width="100%"))
        self.message = w.HTML("Choose a concept. Every press starts from the model as it is now.")
        self.picture = w.Image(format="png", layout=w.Layout(max_width="100%", display="none"))
        self.forget.on_click(self._on_forget)
        self.undo.on_click(self._on_undo)
        controls = w.HBox([self.concept, self.iterations, self.forget, self.undo])
        super().__init__([controls, self.progress, self.message, self.picture])

    def _busy(self, busy: bool) -> None:
        for control in (self.concept, self.iterations, self.forget):
            control.disabled = busy
        self.undo.disabled = busy or self.run is None

    def _on_step(self, state: UnlearnState) -> None:
        self.progress.max, self.progress.value = state.iterations, state.step
        self.message.value = (
            f"iteration {state.step} of {state.iterations}: attention loss {state.forget:.3f}"
        )

    def _on_forget(self, _) -> None:
        self._busy(True)
        self.message.value = "Drawing the pictures to learn from ..."
        try:
            config = replace(self.config, iterations=self.iterations.value)
            figure, self.run = before_and_after(self.pipe, self.concept.value, config, on_step=self._on_step)
            self.picture.value, self.picture.layout.display = figure.png(), ""
            self.message.value = f"Forgot “{self.concept.value}” in {self.run.seconds:.0f} seconds."
        except Exception as error:  # shown, not swallowed: a traceback inside a callback goes nowhere
            self.message.value = f"<b>That did not work:</b> {html.escape(str(error))}"
        finally:
            self._busy(False)

    def _on_undo(self, _) -> None:
        self.run.restore()
        self.message.value = f"“{self.run.concept}” is back: the weights are as they were before that run."
        self.run, self.progress.value = None, 0
        self._busy(False)
