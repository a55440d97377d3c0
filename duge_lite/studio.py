"""The unlearning studio: choose a concept and the losses, run, watch it go, stop, undo, compare runs.

Controls, calls of :func:`duge_lite.unlearning.unlearn`, figures. No maths, and nothing that only one
generation of ipywidgets has (7 and 8 both work).
"""

from __future__ import annotations

import html
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import ipywidgets as widgets
import pandas as pd
from diffusers import StableDiffusionPipeline
from PIL import Image

from . import errors, visualize
from .attention import AttentionTrace, trace
from .evaluation import Judge
from .lessons import Pictures, fill_memory
from .models import ModelCard, model_card, sample
from .plot import Plot
from .unlearning import UnlearnConfig, UnlearningRun, UnlearnState, unlearn

LOSSES = {
    "attention": "the concept's name goes unheard",
    "prior": "everything else stays as it is",
    "regularization": "weights stay near their start",
}
"""What each loss asks for; its weight is ``lambda_<name>`` of UnlearnConfig."""

NOTHING_DONE = "Stopped before the first iteration: nothing was changed."

STYLE = """<style>
.duge-runs { overflow-x: auto; line-height: 1.4 }
.duge-runs table { border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums }
.duge-runs th, .duge-runs td { padding: 3px 6px; text-align: right; white-space: nowrap; border: 0 }
.duge-runs thead tr:first-child th { text-align: center }
.duge-runs thead tr:last-child th { font-weight: normal; opacity: 0.75 }
.duge-runs tbody tr { border-top: 1px solid rgba(128, 128, 128, 0.4) }
</style>"""

# ---------------------------------------------------------------------------- a quick look


def neighbours(card: ModelCard, concept: str, count: int) -> tuple[str, ...]:
    """``count`` names that are to stay: those that resemble ``concept`` first, then others from all over."""
    known = card.styles if concept in card.styles else card.concepts
    related = [c for c in card.related.get(concept, ()) if c != concept]
    others = [c for c in known if c not in (concept, *related)]
    return tuple((related + others[:: max(1, len(others) // count)])[:count])


def preview_prompts(card: ModelCard, concept: str, copies: int, others: Sequence[str]) -> list[str]:
    """The concept ``copies`` times (a style with different objects), and each of ``others`` once."""
    texts = card.prompts(concept) if concept in card.styles else [card.prompt(concept)] * copies
    return texts[:copies] + [card.prompts(other)[0] for other in others]


@dataclass(frozen=True)
class Preview:
    """What the model draws now.

    Attributes:
        names: what was asked for: the concept ``copies`` times, then the bystanders.
        pictures: one of each.
        attention: the trace of the first picture.
    """

    names: tuple[str, ...]
    copies: int
    pictures: tuple[Image.Image, ...]
    attention: AttentionTrace

    def found(self, judge: Judge) -> tuple[str, str]:
        """In how many pictures of the concept, and of the bystanders, the judge sees what was asked for."""

        def count(part: slice) -> str:
            shown = zip(self.pictures[part], self.names[part], strict=True)
            seen = [bool(judge.sees([p], n)[0]) for p, n in shown if judge.knows(n)]
            return f"{sum(seen)} of {len(seen)}"

        return count(slice(self.copies)), count(slice(self.copies, None))


def preview(
    pipe: StableDiffusionPipeline, concept: str, seed: int = 0, steps: int = 10, copies: int = 4
) -> Preview:
    """Draws ``concept`` and three bystanders in few steps; picture i starts from ``seed + i``."""
    card = model_card(pipe)
    others = neighbours(card, concept, 3)
    prompts = preview_prompts(card, concept, copies, others)
    first = trace(pipe, prompts[0], seed, steps)
    rest = sample(pipe, prompts[1:], seed=seed + 1, steps=steps)
    return Preview((concept,) * copies + others, copies, (first.image, *rest), first)


# ---------------------------------------------------------------------------- the app


class UnlearningStudio(widgets.VBox):
    """The studio as a widget; see :func:`unlearning_studio`.

    Attributes:
        runs: the runs whose weights are in the model now, oldest first; *Undo* takes the last one off.
        rows: what the table shows: a row for every run, undone ones too.
        error: the exception behind the message that is shown, None when all is well.
        background: whether a run gets a thread of its own, so that *Stop* is heard.
        preview_every, preview_steps, curves_every: after how many iterations pictures and curves are drawn
            anew, and in how many sampling steps.
    """

    preview_every, preview_steps, curves_every = 25, 10, 10
    _turn: ClassVar = threading.Lock()  # of all studios: two runs at once would tread on each other's weights

    def __init__(
        self, pipe: StableDiffusionPipeline, config: UnlearnConfig, seed: int, judge: Judge | None
    ) -> None:
        card = model_card(pipe)
        self.pipe, self.config, self.seed = pipe, config, seed
        self.judge = Judge.load(card.judge) if judge is None and card.judge == "doodle" else judge
        self.background = "google.colab" not in sys.modules  # it drops what a thread tells a widget
        self.runs: list[UnlearningRun] = []
        self.rows: list[dict[tuple[str, str], object]] = []
        self.error: BaseException | None = None
        self._busy, self._verdict = False, ""
        self._memory: Pictures | None = None  # of the last run: most of it serves the next
        self._stopping, self._thread = threading.Event(), threading.Thread()

        self.concept = _field(widgets.Dropdown, "Forget", "14em", options=card.forgettable)
        self.iterations = _field(widgets.IntText, "Iterations", "10em", value=config.iterations)
        self.lr = _field(widgets.FloatText, "Learning rate", "13em", value=config.lr)
        self.use, self.weight = {}, {}
        for name, text in LOSSES.items():
            value = getattr(config, f"lambda_{name}")
            label = f"{name}: {text}"
            self.use[name] = _field(widgets.Checkbox, label, "25em", value=value > 0, indent=False)
            self.weight[name] = _field(widgets.FloatText, "λ", "7em", value=value or 1.0)
            self.use[name].observe(lambda _: self._refresh(), "value")
        self.run = _button("Run", "play", self._on_run, button_style="primary")
        self.stop = _button("Stop", "stop", self._on_stop)
        self.undo = _button("Undo", "undo", self._on_undo)
        self.progress = widgets.IntProgress(max=config.iterations, layout=widgets.Layout(width="18em"))
        self.message, self.table = widgets.HTML(), widgets.HTML()
        self.pictures, self.attention, self.curves = (
            widgets.Image(format="png", layout=widgets.Layout(max_width="900px", display="none"))
            for _ in range(3)
        )
        rows = [[self.concept, self.iterations, self.lr]]
        rows += [[self.use[name], self.weight[name]] for name in LOSSES]
        rows += [[self.run, self.stop, self.undo, self.progress]]
        wrap = dict(flex_flow="row wrap", align_items="center")
        controls = [widgets.HBox(row, layout=widgets.Layout(**wrap)) for row in rows]
        super().__init__([*controls, self.message, self.pictures, self.attention, self.curves, self.table])
        how = "" if self.background else " To stop one, interrupt the kernel."
        self._say(f"A run starts from the model as it is now; Undo takes the last one back.{how}")
        self._refresh()

    def settings(self) -> UnlearnConfig:
        """What the controls say. Raises ValueError for a number that makes no sense."""
        weights = {f"lambda_{n}": self.weight[n].value if self.use[n].value else 0.0 for n in LOSSES}
        return replace(self.config, iterations=self.iterations.value, lr=self.lr.value, **weights)

    def wait(self, timeout: float | None = None) -> None:
        """Waits for the end of a run: for scripts. In a notebook *Stop* would not be heard meanwhile."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _on_run(self) -> None:
        if not self._take_turn():
            return
        self._busy, self.error = True, None
        self._stopping.clear()
        self._refresh()
        self._thread = threading.Thread(target=self._work, daemon=True)
        (self._thread.start if self.background else self._thread.run)()

    def _on_stop(self) -> None:
        if self._busy:
            self._stopping.set()
            self.stop.disabled = True
            self._say("Stopping after what is at hand ...")

    def _on_undo(self) -> None:
        if not self._take_turn():
            return
        number = self._kept()[-1]
        try:
            self.runs[-1].restore()
            self.runs.pop()
            self.rows[number - 1]["run", "now"] = "undone"
            self._say(f"Run {number} is undone: the weights are as they were before it.")
        except Exception as error:
            self._fail(error)
        finally:
            self._turn.release()
            self._refresh()

    def _take_turn(self) -> bool:
        free = self._turn.acquire(blocking=False)
        if not free:
            self._fail(RuntimeError("another studio is at work: wait for its end, or press its Stop"))
        return free

    def _work(self) -> None:
        try:
            self._forget(self.concept.value, self.settings())
        except (Exception, KeyboardInterrupt) as error:  # any: neither a thread nor a callback has a caller
            self._fail(error)
        finally:
            self._busy = False
            self._turn.release()
            self._refresh()

    def _forget(self, concept: str, config: UnlearnConfig) -> None:
        title, states, failed = f"Run {len(self.rows) + 1}, “{concept}”", [], []
        self._verdict, self.progress.max, self.progress.value = "", config.iterations, 0
        self._say(f"{title}: drawing the pictures of before ...")
        before = preview(self.pipe, concept, self.seed, self.preview_steps)
        self._stop_if_asked()
        self._say(f"{title}: the model draws what is to stay ...")
        gone = [run.concept for run in self.runs]
        self._memory = fill_memory(self.pipe, [*gone, concept], config, self._memory)
        self._stop_if_asked()
        self._say(f"{title}: the model draws what is to go ...")

        def on_step(state: UnlearnState) -> None:
            states.append(vars(state))
            self.progress.value = state.step
            now = f"{title}: iteration {state.step} of {state.iterations}"
            try:
                if state.step % self.curves_every == 0:
                    _show(self.curves, visualize.loss_curves(pd.DataFrame(states).set_index("step"), now))
                if state.step % self.preview_every == 0 and state.step < state.iterations:
                    self._look(before, now)
            except Exception as error:  # as if stopped: what was learned is kept, and Undo stays possible
                failed.append(error)
            if failed or self._stopping.is_set():
                raise KeyboardInterrupt
            self._say(f"{now}, attention loss {state.forget:.3f}.{self._verdict}")

        run = unlearn(self.pipe, concept, config, self._memory, on_step=on_step, progress=False)
        if not states:
            raise KeyboardInterrupt(NOTHING_DONE)
        self.rows.append(self._row(run))
        self.runs.append(run)
        if failed:
            raise failed[0]
        done = f"after {len(states)} of {config.iterations} iterations"
        _show(self.curves, visualize.loss_curves(run.history, f"{title}: {done}"))
        self.rows[-1] |= self._look(before, f"{title}: {done}")
        how = f"stopped {done}" if len(states) < config.iterations else "is done"
        self._say(f"Run {len(self.rows)} {how} ({run.seconds:.0f} s).{self._verdict} Undo takes it back.")

    def _stop_if_asked(self) -> None:
        if self._stopping.is_set():
            raise KeyboardInterrupt(NOTHING_DONE)

    def _look(self, before: Preview, title: str) -> dict[tuple[str, str], object]:
        """Shows the same seeds before and now; returns what the judge finds, as cells of the table."""
        concept, cells = before.names[0], {}
        now = preview(self.pipe, concept, self.seed, self.preview_steps)
        if self.judge is not None:
            (was, _), (found, others) = before.found(self.judge), now.found(self.judge)
            cells = {("judge finds", "before"): was, ("judge finds", "after"): found}
            cells["judge finds", "others"] = others
            self._verdict = f" The judge finds it in {found} pictures ({was} before), the others in {others}."
        rows = [before.pictures, now.pictures]
        _show(self.pictures, visualize.image_grid(rows, ("before", "now"), before.names, title))
        heat = visualize.attention_difference(before.attention, now.attention, concept, ("before", "now"))
        _show(self.attention, heat)
        return cells

    def _row(self, run: UnlearningRun) -> dict[tuple[str, str], object]:
        last, config = run.history.iloc[-1], run.config
        return {
            ("run", "concept"): run.concept,
            ("run", "on top of"): ", ".join(map(str, self._kept())) or "–",
            ("run", "now"): "kept",
            **{("judge finds", what): "–" for what in ("before", "after", "others") if self.judge},
            ("λ", "att."): config.lambda_attention or "off",
            ("λ", "prior"): config.lambda_prior or "off",
            ("λ", "reg."): config.lambda_regularization or "off",
            ("", "lr"): config.lr,
            ("", "iterations"): f"{len(run.history)} of {config.iterations}",
            ("", "s"): f"{run.seconds:.0f}",
            ("loss at the end", "att."): last.forget,
            ("loss at the end", "prior"): last.prior,
            ("loss at the end", "reg."): last.regularization,
        }

    def _kept(self) -> list[int]:
        """The numbers of the runs whose weights are in the model now."""
        return [i for i, row in enumerate(self.rows, 1) if row["run", "now"] == "kept"]

    def _say(self, text: str) -> None:
        self.message.value = f'<div style="line-height: 1.5">{html.escape(text)}</div>'

    def _fail(self, error: BaseException) -> None:
        self.error, text = error, " ".join(str(error).split()) or "Interrupted; what was learned is kept."
        plain = isinstance(error, ValueError | KeyboardInterrupt) or type(error).__module__ == errors.__name__
        text = text if plain else f"{type(error).__name__}: {text}"
        self.message.value = f'<div role="alert" style="line-height: 1.5">⚠ {html.escape(text)}</div>'

    def _refresh(self) -> None:
        """Switches the controls on or off, and writes the table."""
        for control in (self.concept, self.iterations, self.lr, *self.use.values(), self.run):
            control.disabled = self._busy
        for name, weight in self.weight.items():
            weight.disabled = self._busy or not self.use[name].value
        self.undo.disabled = self._busy or not self.runs
        self.stop.disabled = not (self._busy and self.background)
        if self.rows:
            frame = pd.DataFrame(self.rows, index=range(1, len(self.rows) + 1))
            frame.columns = pd.MultiIndex.from_tuples(frame.columns)
            table = frame.to_html(escape=True, border=0, float_format="{:.3g}".format)
            self.table.value = f'{STYLE}<div class="duge-runs">{table}</div>'


def _field(kind: type[widgets.Widget], label: str, width: str, **values: object) -> widgets.Widget:
    style, layout = {"description_width": "initial"}, widgets.Layout(width=width, margin="2px 12px 2px 2px")
    return kind(description=label, style=style, layout=layout, **values)


def _button(label: str, icon: str, action: Callable[[], None], **look: str) -> widgets.Button:
    button = widgets.Button(description=label, icon=icon, layout=widgets.Layout(width="7em"), **look)
    button.on_click(lambda _: action())
    return button


def _show(image: widgets.Image, figure: Plot) -> None:
    image.value, image.layout.display = figure.png(), ""


def unlearning_studio(
    pipe: StableDiffusionPipeline,
    config: UnlearnConfig | None = None,
    seed: int = 0,
    judge: Judge | None = None,
) -> UnlearningStudio:
    """An app for a notebook: choose what is to go and which losses count; run, stop, undo, compare runs.

    Args:
        pipe: the pipeline that forgets, in place. Every run starts from what it is by then.
        config: what the controls say at first, and all that they do not show; by default that of the model's
            card.
        seed: of the previews: the first one's. Before and after are always drawn from the same seeds.
        judge: says in how many previews it finds the concept; by default the shipped judge for the doodle
            model, and nobody for other models.

    While it runs, previews and curves are drawn anew from time to time. *Stop* ends after the iteration at
    hand and keeps what was learned; *Undo* takes back the last run, then the one before it, and so on.

    A run has a thread of its own: leave the pipeline alone until it has ended. Colab does not show what a
    thread tells a widget; there a run keeps the kernel busy, and "Interrupt execution" takes the place of
    *Stop*. Errors appear in the app as one sentence; the exception itself is in ``.error``.
    """
    return UnlearningStudio(pipe, config or model_card(pipe).config(), seed, judge)
