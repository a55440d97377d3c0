"""ipywidgets apps, thin: controls -> public functions -> figures. No maths here.

Callbacks are wired with ``observe`` and ``on_click``; an error inside one shows as one sentence in the
app, and the controls come back. Everything works with ipywidgets 7 and 8.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from diffusers import StableDiffusionPipeline
from IPython.display import display

from . import visualize
from .explorer import attention_explorer
from .models import model_card, sample
from .plot import Plot
from .studio import UnlearningStudio, neighbours, preview_prompts, unlearning_studio
from .timeline import erosion_timeline
from .unlearning import UnlearnConfig, UnlearningRun, UnlearnState, unlearn

__all__ = [
    "LiveLosses", "UnlearningStudio", "attention_explorer", "before_and_after", "erosion_timeline",
    "unlearning_studio",
]  # fmt: skip


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
    config: UnlearnConfig | None = None,
    bystanders: tuple[str, ...] | None = None,
    seed: int = 0,
    on_step: Callable[[UnlearnState], None] | None = None,
) -> tuple[Plot, UnlearningRun]:
    """Forgets ``concept`` in place and draws the same seeds before and after.

    The first three columns are the concept, then the bystanders: by default four, those that resemble it
    first. Returns the figure and the run (``run.restore()`` is the way back).
    """
    card = model_card(pipe)
    card.check(concept)
    others = neighbours(card, concept, 4) if bystanders is None else tuple(bystanders)
    shown = (concept,) * 3 + others
    prompts, seeds = preview_prompts(card, concept, 3, others), [seed + i for i in range(len(shown))]
    steps = card.sampling_steps
    before = sample(pipe, prompts, seed=seeds, steps=steps)
    run = unlearn(pipe, concept, config, on_step=on_step, progress=False)
    after = sample(pipe, prompts, seed=seeds, steps=steps)
    title = f"Same seeds, before and after forgetting “{concept}” ({run.seconds:.0f} s)"
    return visualize.image_grid([before, after], ("before", "after"), shown, title), run
