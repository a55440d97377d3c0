"""The apps, driven without a browser: their callbacks are plain methods of plain widgets."""

import io

import pytest
import torch
from PIL import Image

import duge_lite as duge
from duge_lite import checks, widgets

SMALL = duge.UnlearnConfig(
    iterations=10, batch_size=2, memory_batch_size=2, target_size=2, memory_size=2, lr=1e-2
)


def _weights(pipe):
    return {k: v.clone() for k, v in pipe.unet.state_dict().items()}


def _equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_forget_then_undo(tiny_pipe):
    base = _weights(tiny_pipe)
    app = widgets.ForgetControl(tiny_pipe, SMALL)
    assert app.undo.disabled and not app.forget.disabled
    app.concept.value = "car"
    app.forget.click()
    assert "Forgot “car”" in app.message.value
    assert app.progress.value == app.progress.max == 10
    with Image.open(io.BytesIO(app.picture.value)) as picture:
        assert picture.width > 300
    assert not _equal(base, _weights(tiny_pipe)) and not app.undo.disabled
    app.undo.click()
    assert _equal(base, _weights(tiny_pipe)) and app.undo.disabled


def test_an_error_becomes_a_sentence_and_the_controls_come_back(tiny_pipe, monkeypatch):
    app = widgets.ForgetControl(tiny_pipe, SMALL)

    def fail(*args, **kwargs):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(widgets, "before_and_after", fail)
    app.forget.click()
    assert "the disk is on fire" in app.message.value
    assert not app.forget.disabled and not app.concept.disabled and app.undo.disabled


def test_controls_are_off_while_it_runs(tiny_pipe, monkeypatch):
    app, seen = widgets.ForgetControl(tiny_pipe, SMALL), []

    def spy(*args, **kwargs):
        seen.append((app.forget.disabled, app.concept.disabled, app.undo.disabled))
        raise RuntimeError("enough")

    monkeypatch.setattr(widgets, "before_and_after", spy)
    app.forget.click()
    assert seen == [(True, True, True)]


def test_before_and_after_refuses_an_unknown_concept(tiny_pipe):
    with pytest.raises(duge.errors.UnknownConceptError, match="'aple'.*Did you mean 'apple'"):
        widgets.before_and_after(tiny_pipe, "aple", SMALL)


def test_live_losses_redraws_every_tenth_step(monkeypatch):
    shown = []

    class Handle:
        def update(self, figure):
            shown.append(figure)

    monkeypatch.setattr(widgets, "display", lambda figure, display_id: shown.append(figure) or Handle())
    live = widgets.LiveLosses(every=10)
    for step in range(1, 26):
        live(duge.unlearning.UnlearnState(step, 25, 1.0, 1.0, 0.1, 0.01))
    assert len(shown) == 3  # 10, 20 and the last


def test_checks_never_raise_and_tell_right_from_wrong():
    assert not checks.retention(lambda before, after, forgotten: None)
    assert "not yet" in checks.retention(lambda before, after, forgotten: ...).message
    assert "ZeroDivisionError" in checks.retention(lambda *a: 1 / 0).message
    wrong = checks.retention(lambda before, after, forgotten: after.mean() / before.mean())
    assert not wrong and "Leave the forgotten concept out" in wrong.message
    right = checks.retention(
        lambda before, after, forgotten: after.drop(forgotten).mean() / before.drop(forgotten).mean()
    )
    assert right and "right" in repr(right)
