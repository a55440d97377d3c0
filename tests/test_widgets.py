"""The apps, driven without a browser: their callbacks are plain functions of plain widgets."""

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import changed, interrupted, quick_card, refused, weights, with_own_unet
from test_figures import REQUESTS, table
from test_viewer import NASTY, payload

import duge_lite as duge
from duge_lite import widgets
from duge_lite.errors import UnknownConceptError
from duge_lite.evaluation import sequence_metrics

SMALL = duge.UnlearnConfig(num_inference_steps=1, places=4, memory_size=4)


# ---- the explorer


def test_the_explorer_draws_and_says_errors_in_one_sentence(tiny_pipe):
    app = widgets.attention_explorer(tiny_pipe, prompt="a photo of an apple", seed=3)
    app.controls["num_inference_steps"].value, app.controls["guidance_scale"].value = 2, 2.0
    with interrupted(tiny_pipe, RuntimeError("out of memory:\n <b>17 GB</b>"), when=1):
        app.button.click()
    assert "RuntimeError: out of memory: &lt;b&gt;17 GB&lt;/b&gt;" in app.message.value
    assert isinstance(app.error, RuntimeError) and 'role="alert"' in app.message.value
    for _ in range(2):  # a new picture replaces the old one
        app.button.click()
        assert app.error is None and "alert" not in app.message.value
        (shown,) = app.output.outputs
    expected = duge.trace(tiny_pipe, "a photo of an apple", 3, num_inference_steps=2, guidance_scale=2.0)
    assert np.array_equal(app.shown.image, expected.image) and len(app.shown.previews) == 2
    assert shown["data"]["text/html"] == app.shown._repr_html_()


# ---- the studio


@pytest.fixture
def studio(tiny_pipe, tiny_judge, monkeypatch):
    monkeypatch.setattr(widgets, "model_card", quick_card)
    return widgets.unlearning_studio(tiny_pipe, SMALL, judge=tiny_judge)


@pytest.mark.slow
def test_choosing_a_concept_forgets_it_and_undo_brings_it_back(studio, tiny_pipe, tiny_master):
    base, twin = weights(tiny_pipe), with_own_unet(tiny_master)
    concept, eta = studio.controls["concept"], studio.controls["eta"]
    assert studio.run is None and concept.value == widgets.NOTHING and not studio.output.outputs
    prior = [label for label, _ in studio.controls["lambda_regularization"].options]
    assert prior[:3] == ["0", "1e-05", "0.0001"] and studio.controls["lambda_prior"].value == 1.0
    for value in (1.0, 0.5, 1.0):  # every change solves anew, from the base, what unlearn solves
        eta.value = value
        concept.value = "car"
        assert studio.error is None, studio.error
        run = duge.unlearn(twin, "car", replace(SMALL, eta=value))
        assert not changed(tiny_pipe, weights(twin))
        run.restore()
    assert "“car”: the judge sees it in" in studio.message.value and "of 3 pictures" in studio.message.value
    (shown,) = studio.output.outputs
    assert 'alt="“car”: the judge sees it in' in shown["data"]["text/html"]
    for _ in range(2):  # a second click used to take a lock for good: every studio of the kernel was dead
        studio.button.click()
        assert not changed(tiny_pipe, base) and studio.run is None and studio.error is None
    assert "as it was" in studio.message.value and not studio.output.outputs
    for app in (studio, widgets.unlearning_studio(tiny_pipe, SMALL, judge=studio)):
        app.controls["concept"].value = "apple" if app is studio else widgets.NOTHING
        assert app.error is None and (app.run is not None) == (app is studio)
    studio.button.click()
    assert not changed(tiny_pipe, base)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["unlearn", "studio_figure"])
@pytest.mark.parametrize("error", [RuntimeError("<b>fire</b>"), KeyboardInterrupt(), SystemExit("bye")])
def test_whatever_happens_the_model_is_as_it_was(studio, tiny_pipe, monkeypatch, error, moment):
    base, concept = weights(tiny_pipe), studio.controls["concept"]
    with monkeypatch.context() as patch:
        patch.setattr(widgets, moment, Mock(side_effect=error))
        if isinstance(error, SystemExit):
            refused(SystemExit, "bye", setattr, concept, "value", "car")
        else:
            concept.value = "car"
            assert studio.error is error and 'role="alert"' in studio.message.value
            assert "<b>" not in studio.message.value
    assert not changed(tiny_pipe, base) and studio.run is None
    studio.act()
    assert studio.error is None and studio.run is not None


def parrot(*words: str) -> Mock:
    """A judge that knows nothing of cars, and says what it is told to say."""
    return Mock(knows=lambda name: name != "car", names=lambda _, among: [w for w in words if w in among])


def test_the_judges_words_stand_under_the_pictures(tiny_master):
    card, rows = duge.model_card(tiny_master), [[duge.doodles.draw("apple")] * 4] * 2
    names = ["apple"] * 3 + ["orange"]
    text, grid = widgets.studio_figure(names, rows, parrot("apple", "star", "apple", "orange"), card)
    assert [t.get_text() for t in grid.axes[0].texts] == ["apple", "star", "apple", "orange"] * 2
    assert "judge sees it in 2 of 3 pictures (2 before), the others in 1 of 1 (1 before)." in text
    said = parrot("neon", "photo", "neon", "sketch")  # a style among styles
    assert "in 2 of 3 pictures" in widgets.studio_figure(["neon"] * 3 + ["sketch"], rows, said, card)[0]
    for judge, name in ((None, "apple"), (parrot(), "car")):  # nobody who could say it
        text, grid = widgets.studio_figure([name] * 4, rows, judge, card)
        assert "judge" not in text and not grid.axes[0].texts


def test_around_a_concept_stands_what_resembles_it(tiny_master, monkeypatch):
    card = duge.model_card(tiny_master)
    monkeypatch.setattr(widgets, "sample", lambda _, *how: how)
    around = {concept: widgets.draw_around(tiny_master, concept, 5) for concept in card.forgettable}
    for concept, (names, _) in around.items():
        assert names[:3] == [concept] * 3 and len({*names}) == 5
    prompts, *how = around["tree"][1]
    assert prompts[:3] == [card.prompt("tree")] * 3 and how == [5, card.sampling_steps]
    assert prompts[3:5] == [card.prompt("broccoli"), card.prompt("mushroom")]
    style = card.styles[-1]
    assert around[style][1][0][:3] == card.prompts(style)[:3], "a style on different objects"


@pytest.mark.slow
def test_before_and_after_is_the_twin_without_a_kernel(tiny_pipe):
    base = weights(tiny_pipe)
    figure, run = widgets.before_and_after(tiny_pipe, "car", SMALL)
    assert "before and after forgetting “car”" in figure.alt and len(figure.axes[0].images) == 2 * 7
    run.restore()
    assert not changed(tiny_pipe, base)
    refused(UnknownConceptError, "'aple'.*mean 'apple'", widgets.before_and_after, tiny_pipe, "aple", SMALL)


# ---- the timeline


@pytest.fixture(scope="module")
def sequence(tiny_master):
    return duge.unlearn_sequence(with_own_unet(tiny_master), REQUESTS, SMALL, progress=False)


@pytest.mark.slow
def test_every_model_draws_the_same_seeds(sequence):
    card, last = duge.model_card(sequence.pipe), weights(sequence.pipe)
    timeline = widgets.erosion_timeline(sequence, table(), ["orange", "neon"], seed=4)
    assert not changed(sequence.pipe, last)
    assert timeline.requests == REQUESTS and timeline.metrics.UA.tolist() == [1, 0.625]
    prompts = [card.prompt("orange"), card.prompts("neon")[0]]
    first, middle, end = timeline.pictures
    expected = duge.sample(sequence.pipeline(at=1), prompts, [4, 4], card.sampling_steps)
    assert all(np.array_equal(a, b) for a, b in zip(middle, expected, strict=True))
    assert not np.array_equal(first[0], middle[0]) and not np.array_equal(middle[0], end[0])
    sequence.pipeline(at=2)


def test_what_does_not_fit_is_refused_before_anything_is_drawn(sequence, monkeypatch):
    monkeypatch.setattr(widgets, "sample", lambda *args: pytest.fail("drawn"))
    draw, last = widgets.erosion_timeline, weights(sequence.pipe)
    refused(UnknownConceptError, "'aple'.*Did you mean 'apple'", draw, sequence, table(), ["aple"])
    refused(ValueError, "no column for car", draw, sequence, table(["apple", "orange"]))
    refused(ValueError, "2 rows for 2 requests", draw, sequence, table()[:2])
    monkeypatch.setattr(widgets, "sample", lambda *args: 1 / 0)
    refused(ZeroDivisionError, "division by zero", draw, sequence, table())
    assert not changed(sequence.pipe, last), "after an error the pipeline is the last model"


def test_a_timeline_is_a_slider_of_its_figures(tiny_master):
    names = ("apple", NASTY)
    pictures = [[duge.doodles.draw("apple", seed=10 * k + j) for j in range(2)] for k in range(3)]
    metrics = sequence_metrics(table(), REQUESTS, duge.model_card(tiny_master))
    timeline = widgets.Timeline(REQUESTS, names, pictures, table(), metrics)
    data = payload(timeline._repr_html_())
    assert len(data["pictures"]) == len(data["labels"]) == 3
    assert data["labels"][0] == "The base model: nothing was asked to go yet."
    told = "Asked to go: apple, car. UA 0.62, objects kept 0.25, styles kept 0.5"
    assert data["labels"][2].startswith(told)
