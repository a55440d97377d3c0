"""The apps, driven without a browser: their callbacks are plain methods of plain widgets."""

import pytest
import torch

import duge_lite as duge
from duge_lite import widgets

SMALL = duge.UnlearnConfig(
    iterations=10, batch_size=2, memory_batch_size=2, target_size=2, memory_size=2, lessons=4, lr=1e-2
)


@pytest.mark.slow
def test_before_and_after_shows_the_same_seeds_and_comes_back(tiny_pipe):
    base = {k: v.clone() for k, v in tiny_pipe.unet.state_dict().items()}
    figure, run = widgets.before_and_after(tiny_pipe, "car", SMALL)
    assert "before and after forgetting “car”" in figure.alt and len(figure.axes) == 2 * 7
    run.restore()
    assert all(torch.equal(base[k], v) for k, v in tiny_pipe.unet.state_dict().items())


@pytest.mark.slow
def test_a_style_is_forgotten_among_styles(tiny_pipe):
    figure, run = widgets.before_and_after(tiny_pipe, "sketch", SMALL)
    titles = [axes.get_title() for axes in figure.axes[:7]]
    assert titles[:3] == ["sketch"] * 3 and set(titles[3:]) == set(duge.model_card(tiny_pipe).styles) - {
        "sketch"
    }


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
