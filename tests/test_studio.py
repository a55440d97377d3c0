"""The studio, driven without a browser: runs, stops, undoes, and what it says about each."""

import io
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import duge_lite as duge
from duge_lite import studio as module
from duge_lite.studio import UnlearningStudio, neighbours, preview, preview_prompts, unlearning_studio
from duge_lite.unlearning import unlearn

SMALL = duge.UnlearnConfig(
    iterations=4, batch_size=2, memory_batch_size=2, target_size=2, memory_size=2, lessons=4, lr=1e-2
)


@pytest.fixture
def app(tiny_pipe, tiny_judge) -> UnlearningStudio:
    """A studio whose runs are over in a moment."""
    app = unlearning_studio(tiny_pipe, SMALL, judge=tiny_judge)
    app.preview_every, app.preview_steps, app.curves_every = 2, 1, 2
    yield app
    app.stop.click()
    app.wait(60)


def weights(app: UnlearningStudio) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in app.pipe.unet.state_dict().items()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run(app: UnlearningStudio, concept: str) -> None:
    app.concept.value = concept
    app.run.click()
    app.wait(120)


def picture(image) -> Image.Image:
    assert image.layout.display == ""
    return Image.open(io.BytesIO(image.value))


def settings_of(app: UnlearningStudio) -> list:
    return [app.concept, app.iterations, app.lr, *app.use.values(), *app.weight.values(), app.run]


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


# ---------------------------------------------------------------------------- run, stop, undo


@pytest.mark.slow
def test_a_run_learns_what_unlearn_learns(app, tiny_master):
    from conftest import with_own_unet

    base, twin = weights(app), with_own_unet(tiny_master)
    assert app.undo.disabled and app.stop.disabled and not app.run.disabled
    run(app, "car")
    assert app.error is None and "Run 1 is done" in app.message.value
    assert app.progress.value == app.progress.max == 4
    assert all(picture(p).width > 300 for p in (app.pictures, app.attention, app.curves))
    unlearn(twin, "car", SMALL, progress=False)
    assert equal(weights(app), dict(twin.unet.state_dict())), "the previews must not change what is learned"
    app.undo.click()
    assert equal(base, weights(app)) and app.undo.disabled and "Run 1 is undone" in app.message.value


@pytest.mark.slow
def test_two_runs_and_two_undos_walk_back(app):
    start = weights(app)
    run(app, "apple")
    first = weights(app)
    run(app, "sketch")
    assert len(app.runs) == 2 and not equal(first, weights(app)) and not equal(start, first)
    app.undo.click()
    assert equal(first, weights(app)) and not app.undo.disabled
    app.undo.click()
    assert equal(start, weights(app)) and app.undo.disabled
    assert [r["run", "now"] for r in app.rows] == ["undone", "undone"]


@pytest.mark.slow
def test_stop_ends_after_the_iteration_and_keeps_what_was_learned(app):
    base = weights(app)
    app.iterations.value = 100_000
    app.run.click()
    until(lambda: app.progress.value >= 2)
    assert not app.stop.disabled and all(c.disabled for c in [*settings_of(app), app.undo])
    app.stop.click()
    assert app.stop.disabled and "Stopping" in app.message.value
    app.wait(60)
    done = app.progress.value
    assert 2 <= done < 100_000 and f"stopped after {done} of 100000 iterations" in app.message.value
    assert len(app.runs[0].history) == done and not equal(base, weights(app))
    assert app.error is None and app.stop.disabled and not any(c.disabled for c in settings_of(app))
    app.undo.click()
    assert equal(base, weights(app))


def test_stop_before_the_first_iteration_changes_nothing(app, monkeypatch):
    base = weights(app)

    def stop_meanwhile(*args):
        app.stop.click()
        return preview(*args)

    monkeypatch.setattr(module, "preview", stop_meanwhile)
    run(app, "car")
    assert "nothing was changed" in app.message.value and equal(base, weights(app))
    assert not app.rows and not app.run.disabled and app.undo.disabled


@pytest.mark.slow
def test_the_kernel_stays_free_and_two_studios_take_turns(app, tiny_judge):
    other = unlearning_studio(app.pipe, SMALL, judge=tiny_judge)
    app.iterations.value = 100_000
    app.run.click()
    assert app._thread is not threading.current_thread()
    until(lambda: app.progress.value >= 1)
    other.run.click()
    assert "another studio is at work" in other.message.value and 'role="alert"' in other.message.value
    assert not other.run.disabled and other._thread is not app._thread and not other.runs
    app.stop.click()
    app.wait(60)
    other.preview_steps = 1
    run(other, "car")
    assert other.error is None and len(other.runs) == 1


@pytest.mark.slow
def test_in_the_foreground_an_interruption_takes_the_place_of_stop(app, monkeypatch):
    app.background = False
    base, looks = weights(app), []

    def interrupted(*args):
        looks.append(app.stop.disabled)
        if len(looks) == 2:  # the first preview of the run
            raise KeyboardInterrupt
        return preview(*args)

    monkeypatch.setattr(module, "preview", interrupted)
    app.run.click()
    assert "stopped after 2 of 4 iterations" in app.message.value and looks == [True, True, True]
    app.undo.click()
    assert equal(base, weights(app))


# ---------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("error", [RuntimeError("the disk is <b>on fire</b>"), KeyboardInterrupt()])
@pytest.mark.slow
def test_an_error_becomes_a_sentence_and_the_controls_come_back(app, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(module, "unlearn", fail)
    run(app, "car")
    assert 'role="alert"' in app.message.value and "<b>" not in app.message.value
    assert app.error is error
    assert not any(c.disabled for c in settings_of(app)) and app.undo.disabled and app.stop.disabled
    monkeypatch.undo()
    run(app, "car")
    assert app.error is None and "alert" not in app.message.value


def test_a_run_that_diverges_says_so_and_leaves_no_trace(app):
    base = weights(app)
    app.weight["attention"].value = 1e38
    app.lr.value = 1e6
    run(app, "car")
    assert isinstance(app.error, duge.errors.DivergedError)
    assert "the weights are back as they were" in app.message.value and equal(base, weights(app))
    assert not app.runs and not app.rows and app.undo.disabled


def test_a_number_that_makes_no_sense_is_explained(app):
    app.iterations.value = 0
    run(app, "car")
    assert "iterations = 0: expected a whole number, at least 1" in app.message.value and not app.rows
    assert "ValueError" not in app.message.value


@pytest.mark.slow
def test_when_a_preview_fails_what_was_learned_can_be_undone(app, monkeypatch):
    base, looks = weights(app), []

    def fail_later(*args):
        looks.append(0)
        if len(looks) > 1:
            raise RuntimeError("no memory left")
        return preview(*args)

    monkeypatch.setattr(module, "preview", fail_later)
    run(app, "car")
    assert "no memory left" in app.message.value and app.rows[0]["", "iterations"] == "2 of 4"
    assert not equal(base, weights(app))
    app.undo.click()
    assert equal(base, weights(app))


# ---------------------------------------------------------------------------- settings, table, previews


@pytest.mark.slow
def test_a_loss_that_is_off_weighs_nothing(app):
    assert app.settings() == SMALL
    app.use["prior"].value = False
    assert app.weight["prior"].disabled and not app.weight["attention"].disabled
    app.weight["attention"].value = 3.5
    assert (app.settings().lambda_prior, app.settings().lambda_attention) == (0, 3.5)
    run(app, "car")
    assert app.runs[0].config.lambda_prior == 0 and app.weight["prior"].disabled


@pytest.mark.slow
def test_the_table_compares_runs_and_escapes_text(app):
    run(app, "apple")
    app.undo.click()
    app.use["prior"].value = False
    run(app, "apple")
    run(app, "car")
    first, second, third = app.rows
    assert [r["run", "now"] for r in app.rows] == ["undone", "kept", "kept"]
    assert [r["run", "on top of"] for r in app.rows] == ["–", "–", "2"]
    assert (first["λ", "prior"], second["λ", "prior"]) == (100.0, "off")
    assert first["", "iterations"] == "4 of 4"
    assert third["loss at the end", "att."] == app.runs[1].history.forget.iloc[-1]
    assert third["judge finds", "after"].endswith("of 4")
    assert third["judge finds", "others"].endswith("of 3")
    assert app.table.value.count("<tr>") >= 3 and "loss at the end" in app.table.value
    third["run", "concept"] = "<script>alert(1)</script>"
    app.undo.click()
    assert "<script>" not in app.table.value and "&lt;script&gt;" in app.table.value


@pytest.mark.slow
def test_without_a_judge_there_is_no_verdict(app):
    app.judge = None
    run(app, "apple")
    assert app.error is None and "judge" not in app.message.value + app.table.value


def test_the_shipped_judge_reads_the_doodle_model(tiny_pipe):
    assert "apple" in unlearning_studio(tiny_pipe, SMALL).judge.labels


def test_previews_show_what_resembles_the_concept_first(tiny_master):
    card = duge.model_card(tiny_master)
    assert neighbours(card, "tree", 3)[:2] == ("broccoli", "mushroom")
    for concept in card.forgettable:
        others = neighbours(card, concept, 3)
        assert len(set(others) - {concept}) == 3
        assert len(preview_prompts(card, concept, 4, others)) == 7
    assert preview_prompts(card, "neon", 2, ("sketch", "photo")) == [
        *(card.prompt(c, "neon") for c in card.concepts[:2]),
        card.prompt(card.concepts[0], "sketch"),
        card.prompt(card.concepts[0]),
    ]


def test_a_preview_is_what_sample_draws(tiny_master):
    look = preview(tiny_master, "car", seed=5, steps=2)
    prompts = [duge.model_card(tiny_master).prompts(name)[0] for name in look.names]
    assert look.names == ("car",) * 4 + ("airplane", *look.names[5:]) and len(look.pictures) == 7
    for i in (0, 6):
        alone = duge.sample(tiny_master, prompts[i], seed=5 + i, steps=2)[0]
        difference = np.asarray(alone, int) - np.asarray(look.pictures[i], int)
        assert np.abs(difference).max() <= 2  # a batch rounds a little differently
    assert look.attention.word("car").shape == (16, 16)
