"""Figures: right shape, alternative text, and errors that teach."""

import base64
import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import duge_lite as duge
from duge_lite import visualize
from duge_lite.doodles import OBJECTS, STYLES, draw


def _frame(values):
    index = pd.Index(["apple", "orange", "house"], name="concept")
    return pd.DataFrame({"accuracy": values, "low": 0.0, "high": 1.0}, index=index)


def test_image_grid_draws_every_picture_with_its_label():
    pictures = [duge.doodles.draw("apple", seed=i) for i in range(3)]
    figure = visualize.image_grid([pictures, pictures], ("before", "after"), "abc", "A title")
    assert len(figure.axes) == 6
    assert [a.get_title() for a in figure.axes[:3]] == ["a", "b", "c"]
    assert [figure.axes[0].get_ylabel(), figure.axes[3].get_ylabel()] == ["before", "after"]
    shown = figure.axes[4].images[0].get_array()
    assert np.array_equal(shown, np.asarray(pictures[1]))
    assert "A title" in figure.alt and "2 rows of 3" in figure.alt


def test_image_grid_without_pictures_teaches():
    with pytest.raises(ValueError, match="at least one row"):
        visualize.image_grid([])


def test_plot_shows_itself_as_png_with_alternative_text():
    figure = visualize.image_grid([[duge.doodles.draw("star")]], title="One star")
    data, metadata = figure._repr_mimebundle_()
    with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as picture:
        assert picture.width > 60
    assert data["text/plain"] == figure.alt == metadata["image/png"]["alt"]
    assert "One star" in figure.alt


@pytest.mark.slow
def test_contact_sheet_shows_the_whole_world():
    figure = visualize.contact_sheet()
    assert len(figure.axes) == len(duge.doodles.OBJECTS) * len(duge.doodles.STYLES)
    titles = {a.get_title() for a in figure.axes} - {""}
    assert titles == set(duge.doodles.OBJECTS)


def test_loss_curves_leave_out_a_zero_and_report_ends():
    history = pd.DataFrame(
        {"forget": [1.0, 0.5], "prior": [0.1, 0.2], "regularization": [0.0, 1e-4]}, index=[1, 2]
    )
    figure = visualize.loss_curves(history)
    drawn = figure.axes[2].lines[0].get_ydata()
    assert np.isnan(drawn[0]) and drawn[1] == 1e-4
    assert "forget 1 to 0.5" in figure.alt


def test_loss_curves_of_an_empty_history():
    empty = pd.DataFrame(columns=["forget", "prior", "regularization"])
    assert len(visualize.loss_curves(empty).axes) == 3


def test_accuracy_plot_marks_what_was_forgotten():
    figure = visualize.accuracy_plot(_frame([1, 1, 1]), _frame([0, 1, 0.9]), ["apple"])
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["after, to be forgotten"].get_ydata().tolist() == [0]
    assert lines["after, to be kept"].get_ydata().tolist() == [1, 0.9]
    assert lines["after, to be forgotten"].get_marker() != lines["after, to be kept"].get_marker()
    assert "apple 1.00 to 0.00" in figure.alt


LAYERS = [f"{part}.attentions.0.transformer_blocks.0.attn2" for part in ("down_blocks.0", "mid_block")]


def test_target_maps_share_a_scale_and_cross_out_what_is_below_zero():
    plain = {LAYERS[0]: np.full((4, 4), 0.5), LAYERS[1]: np.full((2, 2), 0.25)}
    below = {**plain, LAYERS[1]: np.array([[0.1, -0.2], [0.1, -0.3]])}
    figure = visualize.target_maps({"with the word": plain, "negative": below}, "Apple")
    panels = figure.axes[:4]
    assert [a.get_title() for a in panels[:2]] == ["down 0.0\n4×4", "mid\n2×2"]
    assert [panels[0].get_ylabel(), panels[2].get_ylabel()] == ["with the word", "negative"]
    assert len({a.images[0].norm for a in panels}) == 1 and panels[0].images[0].get_clim() == (0, 0.5)
    assert [len(a.lines[0].get_xdata()) for a in panels] == [0, 0, 0, 2]
    assert panels[3].lines[0].get_xydata().tolist() == [[1.5, 0.5], [1.5, 1.5]]
    assert "negative: 21.2% on average, 2 places below zero" in figure.alt


def test_shares_moved_points_in_the_direction_of_the_change():
    figure = visualize.shares_moved(["apple", "<pad>"], [0.3, 0.7], [0.1, 0.9], ("now", "wanted"))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["wanted: more"].get_xydata().tolist() == [[0.9, 1]]
    assert lines["wanted: less"].get_xydata().tolist() == [[0.1, 0]]
    assert lines["wanted: more"].get_marker() != lines["wanted: less"].get_marker()
    assert [t.get_text() for t in figure.axes[0].texts] == ["-20.0", "+20.0"]
    assert "apple 30.0% to 10.0%" in figure.alt


def test_matrices_show_every_number_and_hatch_a_zero():
    names = [f"{layer}.{m}.weight" for layer in LAYERS for m in ("to_q", "to_k", "to_v", "to_out.0")]
    values = dict(zip(names, (1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 0.0, 0.0), strict=True))
    figure = visualize.matrices({"probs": values, "output": dict.fromkeys(names, 1.0)}, "Gradients")
    first, second = figure.axes
    assert [t.get_text() for t in first.texts] == ["1", "10", "2", "20", "3", "0", "4", "0"]
    assert first.images[0].get_array().mask.tolist() == [[False] * 2] * 2 + [[False, True]] * 2
    assert first.images[0].get_clim() == second.images[0].get_clim() == (1, 20)
    assert [t.get_text() for t in first.get_xticklabels()] == ["down 0.0", "mid"]
    assert "probs: 6 of 8 above zero, the largest 20" in figure.alt


def test_matrices_of_nothing_but_zeros():
    figure = visualize.matrices({"at the anchor": {f"{LAYERS[0]}.to_q.weight": 0.0}})
    assert figure.png() and "0 of 4 above zero" in figure.alt


def test_fewer_colours_take_fewer_bytes_and_look_the_same():
    figure = visualize.image_grid([[draw(o, s, seed=3) for o in OBJECTS[:6]] for s in STYLES])
    assert figure.colors == 256
    few = figure.png()
    figure.colors = None
    full = figure.png()
    small, large = (np.asarray(Image.open(io.BytesIO(p)).convert("RGB"), float) for p in (few, full))
    assert len(few) < 0.7 * len(full) and small.shape == large.shape
    assert np.abs(small - large).mean() < 3


def test_the_front_holds_whoever_nobody_beats():
    table = pd.DataFrame(
        {"kept": [0.2, 0.9, 0.95, 0.9, 0.9], "gone": [1.0, 0.9, 0.8, 0.8, 0.9]}, index=list("abcde")
    )
    assert visualize.pareto_front(table) == ["a", "b", "c", "e"]  # equals stay both; c beats d


def test_trade_off_says_who_is_on_the_front():
    table = pd.DataFrame({"kept": [0.9, 0.8], "gone": [1.0, 0.7]}, index=["ours", "theirs"])
    figure = visualize.trade_off(table)
    assert "ours (on the front): 1.00 gone, 0.90 kept; theirs: 0.70 gone" in figure.alt
    fills = {tuple(line.get_xdata()): line.get_markerfacecolor() for line in figure.axes[0].lines}
    assert fills[(0.8,)] == "white" != fills[(0.9,)]
    assert base64.b64decode(figure._repr_mimebundle_()[0]["image/png"])[:4] == b"\x89PNG"
