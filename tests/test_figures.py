"""Figures: what they show, their scales, their alternative text, and errors that teach."""

import base64
import io
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import refused
from matplotlib.colors import to_rgba
from PIL import Image
from test_viewer import noise_trace

import duge_lite as duge
from duge_lite import figures
from duge_lite.doodles import OBJECTS, STYLES, draw

LAYERS = [f"{part}.attentions.0.transformer_blocks.0.attn2" for part in ("down_blocks.0", "mid_block")]
REQUESTS = ("apple", "car")


@pytest.fixture(scope="module")
def noise(tokenizer):
    return noise_trace("a photo of an apple next to an umbrella", tokenizer, steps=5, previews=True)


def table(columns=("orange", "apple", "car", "neon")) -> pd.DataFrame:
    rows = {"orange": [1, 0.5, 0.25], "apple": [1, 0, 0.75], "car": [1, 1, 0], "neon": [1, 1, 0.5]}
    return pd.DataFrame(rows, dtype=float)[list(columns)].rename_axis("after")


def heat_maps(figure) -> list:
    """The images of attention in a figure, without pictures and colour bars."""
    return [i for axes in figure.axes for i in axes.images if i.get_array().dtype == np.float32]


def texts(axes) -> list[str]:
    return [t.get_text() for t in axes.texts]


def labels(axis) -> list[str]:
    return [t.get_text() for t in axis.get_ticklabels()]


# ---- the figure itself


def test_a_plot_shows_itself_with_alternative_text_and_few_colours():
    rows = [[draw(name, style, seed=3) for name in OBJECTS] for style in STYLES]
    figure = figures.image_grid(rows, STYLES, OBJECTS, "20 objects")
    assert len(figure.axes[0].images) == len(OBJECTS) * len(STYLES)
    data, metadata = figure._repr_mimebundle_()
    few = base64.b64decode(data["image/png"])
    assert data["text/plain"] == figure.alt == metadata["image/png"]["alt"] and "20 objects" in figure.alt
    figure.colors = None
    full = figure.png()
    small, large = (np.asarray(Image.open(io.BytesIO(p)).convert("RGB"), float) for p in (few, full))
    assert len(few) < 0.8 * len(full) and small.shape == large.shape and np.abs(small - large).mean() < 3


@pytest.mark.slow
@pytest.mark.parametrize("title", ["$5 and $6", r"an $\apple$", "$", r"$\frac{$"])
def test_a_dollar_is_a_dollar(noise, title):
    """In titles, labels, and what drawing itself writes; mathematics would fail, or swallow the signs."""
    cheap = replace(noise, prompt=title, words=(title, *noise.words[1:]))
    plain = figures.image_grid([[draw("star")]], [title], [title], title)
    assert plain.png() and all(not text.get_parse_math() for text in plain.findobj(figures.Text))
    assert figures.word_overlay(cheap, [title]).png() and figures.token_shares(cheap).png()
    assert figures.concentration(cheap, [title]).png()
    one = pd.DataFrame({"kept": [0.5], "gone": [0.7]}, index=[title])
    assert figures.trade_off(one, title, ("kept", "gone")).png()


def test_figures_are_reached_lazily():
    assert duge.figures is figures
    refused(AttributeError, "no attribute 'visualize'", getattr, duge, "visualize")


# ---- pictures


def framed(axes) -> set[tuple[int, int]]:
    return {tuple(round(v) for v in p.get_xy())[::-1] for p in axes.patches}


def test_image_grid_draws_every_picture_with_its_label():
    pictures = [draw("apple", seed=i) for i in range(3)]
    rows, below = [pictures, pictures[:2]], ["xyz", "uv"]
    (axes,) = figures.image_grid(rows, ("before", "after"), "abc", "A title", 0.9, [(1, 0)], below).axes
    assert labels(axes.xaxis) == ["a", "b", "c"] and labels(axes.yaxis) == ["before", "after"]
    assert np.array_equal(axes.images[4].get_array(), np.asarray(pictures[1])) and len(axes.images) == 5
    assert texts(axes) == ["x", "y", "z", "u", "v"]
    (frame,) = axes.patches
    left, right, bottom, top = axes.images[3].get_extent()
    assert frame.get_xy() == (left, top) and frame.get_width() == right - left
    assert "A title: 2 rows of 3: before, after; a, b, c" in axes.figure.alt and axes.figure.png()
    refused(ValueError, "at least one row", figures.image_grid, [])


def test_a_history_and_a_step_of_it_frame_what_was_asked_to_go_by_then():
    names = ("apple", "orange")
    pictures = [[draw(n, seed=10 * k + j) for j, n in enumerate(names)] for k in range(3)]
    (axes,) = figures.picture_history(pictures, names, REQUESTS, "The same seeds").axes
    assert framed(axes) == {(1, 0), (2, 0)} and labels(axes.yaxis) == ["base", "1 apple", "2 car"]
    assert np.array_equal(axes.images[3].get_array(), np.asarray(pictures[1][1]))
    above, below = figures.timeline_step(pictures, names, REQUESTS, table(), 1).axes
    for shown, picture in zip(above.images, pictures[0] + pictures[1], strict=True):
        assert np.array_equal(shown.get_array(), np.asarray(picture))
    assert framed(above) == {(1, 0)} and labels(below.xaxis) == ["✕ apple", "car", "orange", "neon"]
    assert below.patches[-1].get_xy() == (-0.5, 0.5) and below.patches[-1].get_edgecolor() == to_rgba("black")


# ---- attention


def test_word_overlay_shares_one_scale_and_says_where(noise, tokenizer):
    figure = figures.word_overlay(noise, ["apple", "umbrella", "apple next"])
    maps = heat_maps(figure)
    largest = max(noise.word(w).max() for w in ("apple", "umbrella", "apple next"))
    assert len(maps) == 3 and {m.get_clim() for m in maps} == {(0, largest)}
    np.testing.assert_array_equal(maps[1].get_array(), noise.word("umbrella"))
    assert "share of a place's attention" in [axes.get_ylabel() for axes in figure.axes]
    lit = replace(noise, maps={k: np.zeros_like(v) for k, v in noise.maps.items()})
    for m in lit.maps.values():
        m[:, :, noise.positions("apple"), -1, 0] = 0.5
    assert "apple, most at the lower left (50.0%)" in figures.word_overlay(lit, "apple").alt
    empty = noise_trace("", tokenizer, steps=2)
    assert len(heat_maps(figures.word_overlay(empty, ["<start>", "<pad>"]))) == 2
    refused(ValueError, "no words to show: expected at least one", figures.word_overlay, empty, empty.words)


def test_maps_by_step_layer_and_head_lie_beside_the_picture_in_at_most_twelve_panels(noise):
    heads = {name: np.concatenate([m, 0 * m, m, m], axis=1) for name, m in noise.maps.items()}
    levels = ["down_blocks.0", "down_blocks.1", "mid", "up_blocks.0", "up_blocks.1"]
    expected = {"step": map(noise.step, range(5)), "layer": map(noise.layer, levels)}
    for by in ("step", "layer", "head"):
        figure = figures.words_by(replace(noise, maps=heads), by, ["apple", "umbrella"])
        maps, panels = heat_maps(figure), [axes for axes in figure.axes if axes.images]
        assert len(panels) == len(maps) + 2 <= 12 and len({m.get_clim() for m in maps}) == 1
        assert panels[0].images[0].get_array().shape == (64, 64, 3) and "apple, umbrella" in figure.alt
        for shown, part in zip(maps, expected.get(by, []), strict=False):
            np.testing.assert_allclose(shown.get_array(), 0.75 * part.word("apple"), rtol=1e-3)
    assert len(maps) == 8 and [m.get_array().max() > 0 for m in maps[:4]] == [True, False, True, True]
    refused(ValueError, "by = 'time': .* step, layer, head", figures.words_by, noise, "time", "apple")
    refused(IndexError, "heads=True", figures.words_by, noise, "head", "apple")


def test_a_difference_has_one_scale_and_is_white_where_nothing_changed(noise):
    fainter = replace(noise, maps={k: v * np.float16(0.25) for k, v in noise.maps.items()})
    figure = figures.attention_difference(noise, fainter, "apple")
    before, after, change = heat_maps(figure)
    assert before.get_clim() == after.get_clim() and "“apple” gets" in figure.alt
    low, high = change.get_clim()
    assert low == -high and change.cmap(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.05)
    np.testing.assert_allclose(change.get_array(), -0.75 * noise.word("apple"), rtol=0.02)
    refused(ValueError, r"\(16, 16\) and \(8, 8\)", figures.attention_difference, noise, noise.at(8), "apple")


def test_concentration_and_shares_show_the_numbers(noise):
    (axes,) = figures.concentration(noise, ["apple", "umbrella"]).axes
    np.testing.assert_allclose(axes.lines[1].get_ydata(), noise.concentration("umbrella"))
    assert sorted(texts(axes)) == ["apple", "umbrella"]
    (axes,) = figures.token_shares(noise).axes
    assert sum(patch.get_width() for patch in axes.patches) == pytest.approx(1, abs=0.01)
    pads = sum(t.kind == "pad" for t in noise.tokens)
    assert (labels(axes.yaxis)[0], labels(axes.yaxis)[-1]) == ("<start>", f"<pad> × {pads}")


# ---- losses, judged, attacks


def test_losses_over_iterations_and_by_layer():
    losses = pd.DataFrame({"forget": [1, 0.5], "prior": [0.1, 0.2], "regularization": [0, 1e-4]}, [1, 2])
    figure = figures.loss_curves(losses)
    assert figure.axes[2].lines[0].get_ydata().tolist() == [0, 1e-4]
    assert "attention loss 1 to 0.5" in figure.alt and len(figures.loss_curves(losses[:0]).axes) == 3
    names = [f"{n} {w}" for n in ("attention", "prior", "regularization") for w in ("before", "after")]
    rows = [[0.5, 0.1, 0, 0.2, 0, 0.3], [0.7, 0.3, 0, 0.2, 0, 0.1]]
    figure = figures.losses_by_layer(pd.DataFrame(rows, columns=names, index=LAYERS))
    before, after = figure.axes[0].lines
    assert before.get_ydata().tolist() == [0.5, 0.7] and after.get_ydata().tolist() == [0.1, 0.3]
    assert np.isnan(figure.axes[1].lines[0].get_ydata()).all(), "a log scale has no zero"
    assert labels(figure.axes[0].xaxis) == ["down 0.0", "mid"] and texts(figure.axes[2])
    assert "attention before 0.6; attention after 0.2" in figure.alt and figure.png()


def test_accuracy_plot_marks_what_was_forgotten():
    names, how = pd.Index(["apple", "orange", "house"], name="concept"), dict(low=0.0, high=1.0, images=7)
    before, after = (pd.DataFrame({"accuracy": v} | how, names) for v in ([1, 1, 1], [0, 1, 0.9]))
    (axes,) = figures.accuracy_plot(before, after, ["apple"]).axes
    open_, kept, gone = axes.lines
    assert open_.get_xdata().tolist() == [1, 1, 1] and open_.get_markerfacecolor() == "white"
    assert (kept.get_xdata().tolist(), gone.get_xdata().tolist(), gone.get_marker()) == ([1, 0.9], [0], "X")
    assert labels(axes.yaxis) == ["✕ apple", "orange", "house"]
    assert "n = 7 pictures" in axes.figure.get_supxlabel() and "apple 1.00 to 0.00" in axes.figure.alt


def test_the_matrix_is_white_where_all_is_as_wished_and_frames_what_was_to_go():
    (axes,) = figures.accuracy_matrix(table(), REQUESTS, "Naive").axes
    assert labels(axes.xaxis) == ["✕ apple", "✕ car", "orange", "neon"]
    assert labels(axes.yaxis) == ["base", "1 apple", "2 car"]
    (image,) = axes.images
    assert image.get_array().tolist() == [[0, 0, 0, 0], [0, 0, -0.5, 0], [0.75, 0, -0.75, -0.5]]
    assert image.get_clim() == (-1, 1) and image.cmap(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.01)
    boxes = [(p.get_x(), p.get_y(), p.get_height()) for p in axes.patches]
    assert boxes == [pytest.approx((-0.46, 0.54, 1.92)), pytest.approx((0.54, 1.54, 0.92))]
    assert texts(axes)[8:] == ["75", "0", "25", "50"]
    assert "Naive. After apple, car: orange 0.25, apple 0.75" in axes.figure.alt and axes.figure.png()
    refused(ValueError, "for car: evaluate it", figures.accuracy_matrix, table(["apple", "orange"]), REQUESTS)


def test_metrics_have_a_panel_each_and_a_line_per_sequence():
    rows = {"UA": [1, 0.625], "HM": [0.5, 0.75], "objects kept": 0.9, "styles kept": 0.8, "IRA": 0.1}
    naive = pd.DataFrame(rows, index=[1, 2])
    figure = figures.metrics_over_requests({"naive": naive, "DUGE": naive.assign(UA=1.0)})
    first, second, _, last = figure.axes
    assert first.get_title().startswith("gone (UA)") and second.get_title().startswith("objects kept")
    assert [line.get_ydata().tolist() for line in first.lines] == [[1, 0.625], [1, 1]]
    assert len({line.get_marker() for line in first.lines}) == 2 and sorted(texts(last)) == ["DUGE", "naive"]
    heights = sorted(t.get_position()[1] for t in last.texts)
    assert heights[1] - heights[0] > 0.08, "two names at one height stand apart"
    assert "gone (UA) of all that was to go naive 1 to 0.625" in figure.alt


def test_trade_off_says_who_is_on_the_front_and_equals_share_a_label():
    rows = {"kept": [0.2, 0.9, 0.95, 0.9, 0.9], "gone": [1.0, 0.9, 0.8, 0.8, 0.9]}
    assert figures.pareto_front(pd.DataFrame(rows, [*"abcde"])) == [*"abce"], "equals stay both; c beats d"
    rows = {"kept": [0.9, 0.8, 0.901], "gone": [1.0, 0.7, 1.0]}
    figure = figures.trade_off(pd.DataFrame(rows, index=["ours", "theirs", "twin"]), "", ("kept", "gone"))
    assert "ours (on the front): 1.00 gone, 0.90 kept; theirs: 0.70 gone" in figure.alt
    fills = {tuple(line.get_xdata()): line.get_markerfacecolor() for line in figure.axes[0].lines}
    assert fills[(0.8,)] == "white" != fills[(0.9,)] and figure.png()
    assert texts(figure.axes[0]) == ["ours · twin: 100% gone, 90% kept", "theirs: 70% gone, 80% kept"]


def test_attacks_keep_each_models_look():
    index = pd.MultiIndex.from_product([["plain", "leakage"], ["base", "exact"]], names=["attack", "model"])
    seen = pd.DataFrame({"seen": [0.9, 0.1, 0.2, 0.3], "low": 0.0, "high": 1.0}, index=index)
    figure = figures.attack_summary(seen)
    base, exact = figure.axes[0].lines
    assert base.get_xdata().tolist() == [0.9, 0.2] and exact.get_marker() == "X"
    assert texts(figure.axes[0]) == ["base", "exact"] and "leakage, exact: 30%" in figure.alt


def test_a_name_with_a_comma_is_dotted_in_the_look_of_the_name_before_it():
    main, control, other = figures._looks(["exact", "exact, other pictures", "odd"]).values()
    assert main["color"] == control["color"] != other["color"]
    assert (main.get("ls"), control["ls"], control["mfc"]) == (None, ":", "white")
    refused(ValueError, "8 names .*: expected at most 7", figures._looks, [*"abcdefgh"])
