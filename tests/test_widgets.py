"""The apps, driven without a browser: their callbacks are plain methods of plain widgets."""

import io
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_figures import REQUESTS, table

import duge_lite as duge
from duge_lite import widgets
from duge_lite.errors import UnknownConceptError
from duge_lite.evaluation import sequence_metrics
from duge_lite.widgets import ErosionTimeline, Timeline

SMALL = duge.UnlearnConfig(num_inference_steps=1, places=4, memory_size=4)


def weights(pipe) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in pipe.unet.state_dict().items()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- the explorer


def test_explorer_draws(tiny_pipe, monkeypatch):
    app = widgets.attention_explorer(tiny_pipe, prompt="a photo of an apple", seed=3)
    app.steps.value, app.guidance.value = 2, 2.0
    off, own = [], widgets.trace
    monkeypatch.setattr(widgets, "trace", lambda *a, **k: off.append(app.prompt.disabled) or own(*a, **k))
    app.button.click()
    assert app.error is None, app.error
    assert off == [True] and not app.prompt.disabled and not app.button.disabled
    (shown,) = app.output.outputs
    expected = own(tiny_pipe, "a photo of an apple", seed=3, num_inference_steps=2, guidance_scale=2.0)
    assert np.array_equal(app.result.image, expected.image) and len(app.result.previews) == 2
    assert shown["data"]["text/html"] == app.result._repr_html_()
    app.button.click()
    assert len(app.output.outputs) == 1, "a new picture replaces the old one"


def test_explorer_with_two_pipelines(tiny_pipe, tiny_master):
    app = widgets.attention_explorer(tiny_pipe, tiny_master, labels=("old", "new"))
    app.steps.value = 2
    app.draw()
    assert (
        app.result.labels == ("old", "new") and app.prompt.value == "a photo of an apple next to an umbrella"
    )
    assert np.array_equal(app.result.traces[0].image, app.result.traces[1].image)


def test_explorer_says_errors_in_one_sentence(tiny_pipe, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory:\n <b>17 GB</b>")

    app = widgets.attention_explorer(tiny_pipe, seed=1)
    app.steps.value = 1
    with monkeypatch.context() as patch:
        patch.setattr(tiny_pipe.unet, "forward", broken)
        app.button.click()
    assert "RuntimeError: out of memory: &lt;b&gt;17 GB&lt;/b&gt;" in app.message.value
    assert isinstance(app.error, RuntimeError) and 'role="alert"' in app.message.value
    assert not app.button.disabled and not app.prompt.disabled
    app.button.click()
    assert app.error is None and "alert" not in app.message.value and app.result is not None


# ---- the studio


@pytest.fixture
def studio(tiny_pipe, tiny_judge, monkeypatch):
    card = replace(duge.model_card(tiny_pipe), sampling_steps=2)
    monkeypatch.setattr(widgets, "model_card", lambda pipe: card)
    return widgets.unlearning_studio(tiny_pipe, SMALL, judge=tiny_judge)


def shown(image) -> Image.Image:
    assert image.layout.display == ""
    return Image.open(io.BytesIO(image.value))


def test_choosing_a_concept_forgets_it_and_undo_brings_it_back(studio, tiny_pipe, tiny_master):
    from conftest import with_own_unet

    base, twin = weights(tiny_pipe), with_own_unet(tiny_master)
    assert studio.run is None and studio.concept.value == widgets.NOTHING
    studio.concept.value = "car"
    assert studio.error is None, studio.error
    duge.unlearn(twin, "car", studio.settings())
    assert equal(weights(tiny_pipe), weights(twin)), "what the studio learns is what unlearn learns"
    assert "“car”: the judge sees it in" in studio.message.value and "of 3 pictures" in studio.message.value
    assert all(shown(image).width > 300 for image in (studio.pictures, studio.attention))
    studio.undo.click()
    assert equal(base, weights(tiny_pipe)) and studio.run is None and "as it was" in studio.message.value


@pytest.mark.slow
def test_two_undo_clicks_in_a_row_leave_every_studio_alive(studio, tiny_pipe):
    """The second click used to take a lock and never give it back: every studio of the kernel was dead."""
    base = weights(tiny_pipe)
    studio.concept.value = "car"
    studio.undo.click()
    studio.undo.click()
    assert studio.error is None and equal(base, weights(tiny_pipe))
    for app in (studio, widgets.unlearning_studio(tiny_pipe, SMALL, judge=studio.judge)):
        app.concept.value = "apple"
        assert app.error is None and app.run is not None
        app.undo.click()
    assert equal(base, weights(tiny_pipe))


@pytest.mark.slow
def test_a_slider_solves_again_from_the_base(studio, tiny_pipe, monkeypatch):
    configs, own = [], widgets.unlearn
    monkeypatch.setattr(widgets, "unlearn", lambda pipe, c, how: configs.append(how) or own(pipe, c, how))
    base = weights(tiny_pipe)
    assert [label for label, _ in studio.sliders["lambda_regularization"].options][:3] == [
        "0",
        "1e-05",
        "0.0001",
    ]
    assert studio.settings().weights == SMALL.weights and studio.settings().eta == SMALL.eta
    studio.concept.value = "car"
    first = weights(tiny_pipe)
    studio.sliders["lambda_prior"].value = 0.0
    studio.sliders["eta"].value = 0.5
    assert [(c.lambda_prior, c.eta) for c in configs] == [(1.0, 1.0), (0.0, 1.0), (0.0, 0.5)]
    assert not equal(first, weights(tiny_pipe))
    studio.sliders["eta"].value = 1.0
    studio.sliders["lambda_prior"].value = 1.0
    assert equal(first, weights(tiny_pipe)), "no trace is left of what was tried on the way"
    studio.concept.value = "apple"
    studio.concept.value = widgets.NOTHING
    assert equal(base, weights(tiny_pipe))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["unlearn", "studio_figures"])
@pytest.mark.parametrize(
    "error", [RuntimeError("the disk is <b>on fire</b>"), KeyboardInterrupt(), SystemExit()]
)
def test_whatever_happens_the_model_is_as_it_was(studio, tiny_pipe, monkeypatch, error, moment):
    def fail(*args):
        raise error

    base = weights(tiny_pipe)
    with monkeypatch.context() as patch:
        patch.setattr(widgets, moment, fail)
        if isinstance(error, SystemExit):
            with pytest.raises(SystemExit):
                studio.show() if studio.concept.value == "car" else setattr(studio.concept, "value", "car")
        else:
            studio.concept.value = "car"
            assert studio.error is error and 'role="alert"' in studio.message.value
            assert "<b>" not in studio.message.value
    assert equal(base, weights(tiny_pipe)) and studio.run is None
    studio.show()
    assert studio.error is None and studio.run is not None


def test_without_a_judge_there_is_no_verdict_and_styles_are_judged_among_styles(studio, tiny_pipe):
    studio.judge = None
    studio.concept.value = "car"
    assert studio.error is None and "judge" not in studio.message.value
    assert "apple" in widgets.unlearning_studio(tiny_pipe, SMALL).judge.labels, "the shipped one"


@dataclass
class Parrot:
    """A judge that says what it is told to say."""

    words: list[str]

    def knows(self, name):
        return name != "car"

    def names(self, pictures, among):
        assert all(word in among for word in self.words)
        return self.words


def test_the_judges_words_stand_under_the_pictures(tiny_master):
    card, picture = duge.model_card(tiny_master), duge.doodles.draw("apple")
    trace = duge.trace(tiny_master, "a photo of an apple", num_inference_steps=1)
    before, now = (widgets.Preview(("apple", "apple", "orange"), 2, (picture,) * 3, trace) for _ in range(2))
    grid, maps, text = widgets.studio_figures(before, now, Parrot(["apple", "star", "orange"]), card)
    assert [t.get_text() for t in grid.axes[0].texts] == ["apple", "star", "orange"] * 2
    assert (
        text == "“apple”: the judge sees it in 1 of 2 pictures (1 before), the others in 1 of 1 (1 before)."
    )
    style = widgets.Preview(("neon", "sketch"), 1, (picture,) * 2, trace)
    assert style.named(Parrot(["neon", "photo"]), card) == ["neon", "photo"], "a style among styles"
    assert widgets.Preview(("car",), 1, (picture,), trace).named(Parrot([]), card) == [""]
    assert "“apple” gets" in maps.alt


def test_previews_show_what_resembles_the_concept_first_and_what_sample_draws(tiny_master):
    card = duge.model_card(tiny_master)
    assert widgets.neighbours(card, "tree", 3)[:2] == ("broccoli", "mushroom")
    for concept in card.forgettable:
        others = widgets.neighbours(card, concept, 3)
        assert len(set(others) - {concept}) == 3
    look = widgets.preview(tiny_master, "neon", seed=5, copies=2, others=2)
    prompts = [
        *(card.prompt(c, "neon") for c in card.concepts[:2]),
        *(card.prompts(n)[0] for n in look.names[2:]),
    ]
    assert look.names[:2] == ("neon", "neon") and len(look.pictures) == 4
    for i in (0, 3):
        alone = duge.sample(tiny_master, prompts[i], seed=5 + i, num_inference_steps=card.sampling_steps)[0]
        difference = np.asarray(alone, int) - np.asarray(look.pictures[i], int)
        assert np.abs(difference).max() <= 2  # a batch rounds a little differently


def test_before_and_after_is_the_twin_without_a_kernel(tiny_pipe):
    base = weights(tiny_pipe)
    figure, run = widgets.before_and_after(tiny_pipe, "car", SMALL)
    assert "before and after forgetting “car”" in figure.alt and len(figure.axes[0].images) == 2 * 7
    run.restore()
    assert equal(base, weights(tiny_pipe))
    with pytest.raises(UnknownConceptError, match="'aple'.*Did you mean 'apple'"):
        widgets.before_and_after(tiny_pipe, "aple", SMALL)


# ---- the timeline


@pytest.fixture(scope="module")
def sequence(tiny_master):
    """Two requests; whoever opens an earlier model goes back to the last one."""
    from conftest import with_own_unet

    return duge.unlearn_sequence(with_own_unet(tiny_master), REQUESTS, SMALL, progress=False)


@pytest.fixture
def drawn(tiny_master) -> Timeline:
    """A timeline of drawings, no two alike, that needs no model."""
    names = ("apple", "orange")
    pictures = [[duge.doodles.draw(n, seed=10 * k + j) for j, n in enumerate(names)] for k in range(3)]
    metrics = sequence_metrics(table(), REQUESTS, duge.model_card(tiny_master))
    return Timeline(REQUESTS, names, pictures, table(), metrics)


@pytest.mark.slow
def test_every_model_draws_the_same_seeds(sequence):
    card, last = duge.model_card(sequence.pipe), weights(sequence.pipe)
    app = widgets.erosion_timeline(sequence, table(), ["orange", "neon"], seeds=(4, 9))
    assert equal(last, weights(sequence.pipe))
    assert app.timeline.names == ("orange", "orange", "neon", "neon")
    assert app.timeline.requests == REQUESTS and app.timeline.metrics.UA.tolist() == [1, 0.625]
    prompts = [card.prompt("orange")] * 2 + [card.prompts("neon")[0]] * 2
    first, middle, end = app.timeline.pictures
    expected = duge.sample(sequence.pipeline(at=1), prompts, [4, 9, 4, 9], card.sampling_steps)
    assert all(np.array_equal(a, b) for a, b in zip(middle, expected, strict=True))
    assert not np.array_equal(first[0], middle[0]) and not np.array_equal(middle[0], end[0])
    sequence.pipeline(at=2)


def test_what_does_not_fit_is_refused_before_anything_is_drawn(sequence, monkeypatch):
    monkeypatch.setattr(widgets, "sample", lambda *args: pytest.fail("drawn"))
    with pytest.raises(UnknownConceptError, match="'aple'.*Did you mean 'apple'"):
        widgets.erosion_timeline(sequence, table(), ["aple"])
    with pytest.raises(ValueError, match="no column for car"):
        widgets.erosion_timeline(sequence, table(["apple", "orange"]))
    with pytest.raises(ValueError, match="2 rows for 2 requests"):
        widgets.erosion_timeline(sequence, table()[:2])


def test_after_an_error_the_pipeline_is_the_last_model(sequence, monkeypatch):
    last = weights(sequence.pipe)
    monkeypatch.setattr(widgets, "sample", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        widgets.erosion_timeline(sequence, table())
    assert equal(last, weights(sequence.pipe))


def test_dragging_shows_what_was_drawn_and_draws_it_once(drawn, monkeypatch):
    app, made, own = ErosionTimeline(drawn), [], Timeline.figure
    monkeypatch.setattr(Timeline, "figure", lambda self, at: made.append(at) or own(self, at))
    seen = {app.slider.value: (app.image.value, app.message.value)}
    assert [label for label, _ in app.slider.options] == ["base", "1 apple", "2 car"]
    for at in (1, 2, 1, 0, 2):
        app.slider.value = at
        picture = (app.image.value, app.message.value)
        assert seen.setdefault(at, picture) == picture
    assert made == [1, 2] and len(set(seen.values())) == 3
    assert Image.open(io.BytesIO(app.image.value)).width > 600 and "UA 0.62" in app.message.value
    slides = drawn.slides()
    assert list(slides.pictures) == [seen[at][0] for at in range(3)], (
        "the twin without a kernel shows the same"
    )
    assert slides.labels[0] == "The base model: nothing was asked to go yet."
    assert slides.labels[2].startswith(
        "Asked to go: apple, car. UA 0.62, objects kept 0.25, styles kept 0.50"
    )
    assert "data-duge-slides" in drawn._repr_html_()
    with pytest.raises(ValueError, match=r"at = 3: expected a number from 0 \(the base\) to 2"):
        drawn.figure(3)


def test_an_error_is_one_sentence_and_the_app_goes_on(drawn, monkeypatch):
    app = ErosionTimeline(drawn)
    with monkeypatch.context() as broken:
        broken.setattr(widgets.figures, "timeline_step", lambda *args: [][1:].index("<b>\n"))
        app.slider.value = 1
        assert isinstance(app.error, ValueError) and 'role="alert"' in app.message.value
        assert "\n" not in app.message.value and "<b>" not in app.message.value
    app.slider.value = 2
    app.slider.value = 1
    assert app.error is None and "Asked to go: apple." in app.message.value


def test_live_losses_redraws_every_tenth_step(monkeypatch):
    shown = []

    class Handle:
        def update(self, figure):
            shown.append(figure)

    @dataclass
    class State:
        step: int
        iterations: int = 25
        forget: float = 1.0
        prior: float = 0.1
        regularization: float = 0.01

    monkeypatch.setattr(widgets, "display", lambda figure, display_id: shown.append(figure) or Handle())
    live = widgets.LiveLosses(every=10)
    for step in range(1, 26):
        live(State(step))
    assert len(shown) == 3 and shown[-1].axes[0].lines[0].get_xdata().tolist() == list(range(1, 26))
