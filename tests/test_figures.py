"""Figures: what they show, their scales, their alternative text, and errors that teach."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
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


# ---- the figure itself


def test_a_plot_shows_itself_with_alternative_text_and_few_colours():
    figure = figures.image_grid([[draw(o, s, seed=3) for o in OBJECTS[:6]] for s in STYLES], title="Thirty")
    data, metadata = figure._repr_mimebundle_()
    few = base64.b64decode(data["image/png"])
    assert data["text/plain"] == figure.alt == metadata["image/png"]["alt"] and "Thirty" in figure.alt
    figure.colors = None
    full = figure.png()
    small, large = (np.asarray(Image.open(io.BytesIO(p)).convert("RGB"), float) for p in (few, full))
    assert len(few) < 0.8 * len(full) and small.shape == large.shape and np.abs(small - large).mean() < 3


@pytest.mark.parametrize("title", ["$5 and $6", r"an $\apple$", "$", r"$\frac{$"])
def test_a_dollar_is_a_dollar(noise, title):
    """In titles, labels, and what drawing itself writes; mathematics would fail, or swallow the signs."""
    cheap = replace(noise, prompt=title, words=(title, *noise.words[1:]))
    plain = figures.image_grid([[draw("star")]], [title], [title], title)
    plain.png()
    assert all(not text.get_parse_math() for text in plain.findobj(figures.Text))
    assert figures.word_overlay(cheap, title).png() and figures.token_shares(cheap).png()
    frame = pd.DataFrame({"kept": [0.5], "gone": [0.7]}, index=[title])
    assert figures.trade_off(frame).png() and figures.metrics_over_requests({title: frame}, ["kept"]).png()


# ---- pictures


def test_image_grid_draws_every_picture_with_its_label():
    pictures = [draw("apple", seed=i) for i in range(3)]
    figure = figures.image_grid(
        [pictures, pictures[:2]], ("before", "after"), "abc", "A title", framed=[(1, 0)], below=["xyz", "uv"]
    )
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["a", "b", "c"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["before", "after"]
    assert np.array_equal(axes.images[4].get_array(), np.asarray(pictures[1])) and len(axes.images) == 5
    assert texts(axes) == ["x", "y", "z", "u", "v"]
    (frame,) = axes.patches
    left, right, bottom, top = axes.images[3].get_extent()
    assert frame.get_xy() == (left, top) and frame.get_width() == right - left
    assert "A title: 2 rows of 3: before, after; a, b, c" in figure.alt and figure.png()


def test_image_grid_without_pictures_teaches():
    with pytest.raises(ValueError, match="at least one row"):
        figures.image_grid([])


def test_contact_sheet_shows_the_whole_world():
    figure = figures.contact_sheet()
    assert sum(len(axes.images) for axes in figure.axes) == len(OBJECTS) * len(STYLES)
    assert [t.get_text() for axes in figure.axes for t in axes.get_xticklabels()] == list(OBJECTS)


def framed(axes) -> set[tuple[int, int]]:
    return {tuple(round(v) for v in p.get_xy())[::-1] for p in axes.patches}


def test_a_history_frames_what_was_asked_to_go():
    pictures = [[draw(n, seed=10 * k + j) for j, n in enumerate(("apple", "orange"))] for k in range(3)]
    (axes,) = figures.picture_history(pictures, ("apple", "orange"), REQUESTS, "The same seeds").axes
    assert framed(axes) == {(1, 0), (2, 0)}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["base", "1 apple", "2 car"]
    assert np.array_equal(axes.images[3].get_array(), np.asarray(pictures[1][1]))


# ---- attention


def test_word_overlay_shares_one_scale_and_says_where(noise):
    figure = figures.word_overlay(noise, ["apple", "umbrella", "apple next"])
    maps = heat_maps(figure)
    largest = max(noise.word(w).max() for w in ("apple", "umbrella", "apple next"))
    assert len(maps) == 3 and {m.get_clim() for m in maps} == {(0, largest)}
    np.testing.assert_array_equal(maps[1].get_array(), noise.word("umbrella"))
    assert "share of a place's attention" in [axes.get_ylabel() for axes in figure.axes]
    assert len(heat_maps(figures.word_overlay(noise))) == len({w.lower() for w in noise.words})
    assert len(heat_maps(figures.word_overlay(noise, "<start>"))) == 1
    maps = {k: np.zeros_like(v) for k, v in noise.maps.items()}
    for m in maps.values():
        m[:, noise.positions("apple"), -1, 0] = 0.5
    lit = replace(noise, maps=maps)
    assert "apple, most at the lower left (50.0%)" in figures.word_overlay(lit, "apple").alt


def panels(figure) -> list:
    return [axes for axes in figure.axes if axes.images]


def test_maps_by_step_layer_and_head_have_a_picture_and_at_most_twelve_panels(noise):
    figure = figures.words_by_step(noise, ["apple", "umbrella"])
    maps = heat_maps(figure)
    assert len(maps) == 8 and len({m.get_clim() for m in maps}) == 1 and len(panels(figure)) == 12
    for column, step in enumerate((0, 1, 3, 4)):
        np.testing.assert_array_equal(maps[column].get_array(), noise.step(step).word("apple"))
    assert len(heat_maps(figures.words_by_step(replace(noise, previews=()), "apple"))) == 5

    figure = figures.words_by_layer(noise, ["apple", "umbrella"])
    titles = [axes.get_title() for axes in figure.axes[1:6]]
    assert titles == ["down\n16×16", "down\n8×8", "mid\n8×8", "up\n8×8", "up\n16×16"]
    maps = heat_maps(figure)
    assert [m.get_array().shape[0] for m in maps] == [16, 8, 8, 8, 16] * 2 and len(
        {m.get_clim() for m in maps}
    ) == 1
    np.testing.assert_array_equal(maps[4].get_array(), noise.layer("up_blocks.1").word("apple"))
    assert len(heat_maps(figures.words_by_layer(noise))) == 4 * 2, "more words: by size alone"

    by_head = replace(noise, maps={k: np.stack([v, v * 0, v, v], axis=1) for k, v in noise.maps.items()})
    maps = heat_maps(figures.heads(by_head, "apple"))
    assert len(maps) == 8 and maps[0].get_array().max() > 0 and maps[1].get_array().max() == 0
    with pytest.raises(ValueError, match="heads=True"):
        figures.heads(noise, "apple")


def test_a_difference_has_one_scale_and_is_white_where_nothing_changed(noise):
    fainter = replace(noise, maps={k: v * np.float16(0.25) for k, v in noise.maps.items()})
    figure = figures.attention_difference(noise, fainter, ["apple", "umbrella"])
    maps = heat_maps(figure)
    assert (
        len({m.get_clim() for m in (*maps[:2], *maps[3:5])}) == 1 and maps[2].get_clim() == maps[5].get_clim()
    )
    low, high = maps[2].get_clim()
    assert low == -high and maps[2].cmap(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.05)
    np.testing.assert_allclose(maps[2].get_array(), -0.75 * noise.word("apple"), rtol=0.02)
    with pytest.raises(ValueError, match=r"\(16, 16\) and \(8, 8\)"):
        figures.attention_difference(noise, noise.at(8), "apple")


def test_concentration_and_shares_show_the_numbers(noise):
    (axes,) = figures.concentration(noise, ["apple", "umbrella"]).axes
    np.testing.assert_allclose(axes.lines[1].get_ydata(), noise.concentration("umbrella"))
    assert sorted(texts(axes)) == ["apple", "umbrella"]
    figure = figures.token_shares(noise)
    assert sum(patch.get_width() for patch in figure.axes[0].patches) == pytest.approx(1, abs=0.01)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[0] == "<start>" and names[-1] == f"<pad> × {sum(t.kind == 'pad' for t in noise.tokens)}"


def test_denoising_is_a_slider_of_all_steps(noise):
    slides = figures.denoising(noise, "apple")
    assert len(set(slides.pictures)) == 5 and slides.labels[4].startswith("step 5 of 5: “apple” gets")
    with pytest.raises(ValueError, match="previews=True"):
        figures.denoising(replace(noise, previews=()), "apple")


def test_figures_of_an_empty_prompt(tokenizer):
    empty = noise_trace("", tokenizer, steps=2)
    with pytest.raises(ValueError, match="the prompt is empty"):
        figures.word_overlay(empty)
    assert len(heat_maps(figures.word_overlay(empty, ["<start>", "<pad>"]))) == 2


def test_target_maps_share_a_scale_and_cross_out_what_is_below_zero():
    plain = {LAYERS[0]: np.full((4, 4), 0.5), LAYERS[1]: np.full((2, 2), 0.25)}
    below = {**plain, LAYERS[1]: np.array([[0.1, -0.2], [0.1, -0.3]])}
    figure = figures.target_maps({"with the word": plain, "negative": below}, "Apple")
    shown = figure.axes[:4]
    assert [a.get_title() for a in shown[:2]] == ["down 0.0\n4×4", "mid\n2×2"]
    assert [shown[0].get_ylabel(), shown[2].get_ylabel()] == ["with the word", "negative"]
    assert len({a.images[0].norm for a in shown}) == 1 and shown[0].images[0].get_clim() == (0, 0.5)
    assert [len(a.lines[0].get_xdata()) for a in shown] == [0, 0, 0, 2]
    assert shown[3].lines[0].get_xydata().tolist() == [[1.5, 0.5], [1.5, 1.5]]
    assert "negative: 21.2% on average, 2 places below zero" in figure.alt
    many = {f"down_blocks.{i}.attentions.0.x": np.full((2, 2), i / 9) for i in range(9)}
    figure = figures.target_maps({"a": many, "b": many, "c": many}, picture=draw("apple"))
    assert [t.split("\n")[0] for a in figure.axes if (t := a.get_title())][1:] == [
        "down 6.0",
        "down 7.0",
        "down 8.0",
    ]


# ---- losses and weights


def test_losses_over_iterations_and_by_layer():
    history = pd.DataFrame(
        {"forget": [1.0, 0.5], "prior": [0.1, 0.2], "regularization": [0.0, 1e-4]}, index=[1, 2]
    )
    figure = figures.loss_curves(history)
    drawn = figure.axes[2].lines[0].get_ydata()
    assert np.isnan(drawn[0]) and drawn[1] == 1e-4 and "forget 1 to 0.5" in figure.alt and figure.png()
    assert len(figures.loss_curves(history[:0]).axes) == 3
    names = [f"{n} {w}" for n in ("attention", "prior", "regularization") for w in ("before", "after")]
    layers = pd.DataFrame(
        [[0.5, 0.1, 0, 0.2, 0, 0.3], [0.7, 0.3, 0, 0.2, 0, 0.1]], columns=names, index=LAYERS
    )
    figure = figures.losses_by_layer(layers)
    before, _, after = figure.axes[0].lines
    assert before.get_xdata().tolist() == [0.5, 0.7] and after.get_xdata().tolist() == [0.1, 0.3]
    assert after.get_marker() == "<" and figure.axes[1].lines[1].get_xdata().tolist() == [0.2, 0.2]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["down 0.0", "mid"]
    assert "attention 0.6 to 0.2; prior 0 to 0.2" in figure.alt and figure.png()


def test_shares_moved_points_in_the_direction_of_the_change():
    figure = figures.shares_moved(["apple", "<pad>"], [0.3, 0.7], [0.1, 0.9], ("now", "wanted"))
    lines = {line.get_marker(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines[">"] == [[0.9, 1]] and lines["<"] == [[0.1, 0]] and lines["o"] == [[0.3, 0], [0.7, 1]]
    assert texts(figure.axes[0]) == ["-20.0", "+20.0"] and "apple 30.0% to 10.0%" in figure.alt
    assert "○ now, ▶ wanted" in figure.axes[0].get_xlabel()


def test_matrices_show_every_number_and_hatch_a_zero():
    names = [f"{layer}.{m}.weight" for layer in LAYERS for m in ("to_q", "to_k", "to_v", "to_out.0")]
    values = dict(zip(names, (1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 0.0, 0.0), strict=True))
    figure = figures.matrices({"probs": values, "output": dict.fromkeys(names, 1.0)}, "Gradients")
    first, second = figure.axes
    assert texts(first) == ["1", "10", "2", "20", "3", "0", "4", "0"]
    assert first.images[0].get_array().mask.tolist() == [[False] * 2] * 2 + [[False, True]] * 2
    assert first.images[0].get_clim() == second.images[0].get_clim() == (1, 20)
    assert [t.get_text() for t in first.get_xticklabels()] == ["down 0.0", "mid"]
    assert "probs: 6 of 8 above zero, the largest 20" in figure.alt
    nothing = figures.matrices({"at the anchor": {f"{LAYERS[0]}.to_q.weight": 0.0}})
    assert nothing.png() and "0 of 4 above zero" in nothing.alt


def test_drift_starts_at_the_base_and_shares_a_scale():
    index = pd.MultiIndex.from_product([(1, 2), ("to_q", "to_out")], names=["request", "kind"])
    walk = pd.DataFrame({"from base": [0.1, 0.2, 0.15, 0.3], "this request": [0.1, 0.2, 0.05, 0.1]}, index)
    figure = figures.drift_over_requests({"naive": walk, "DUGE": 0.1 * walk})
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim() and [left.get_title(), right.get_title()] == ["naive", "DUGE"]
    assert left.lines[0].get_xydata().tolist() == [[0, 0], [1, 0.1], [2, 0.15]]
    assert (
        texts(right) == ["query", "output"] and "naive, at the end: output 30.0%, query 15.0%" in figure.alt
    )


# ---- judged


def test_accuracy_plot_marks_what_was_forgotten():
    index = pd.Index(["apple", "orange", "house"], name="concept")
    before, after = (
        pd.DataFrame({"accuracy": v, "low": 0.0, "high": 1.0, "images": 7}, index=index)
        for v in ([1, 1, 1], [0, 1, 0.9])
    )
    figure = figures.accuracy_plot(before, after, ["apple"])
    lines = {line.get_marker(): line.get_ydata().tolist() for line in figure.axes[0].lines[1:]}
    assert lines == {"o": [1, 0.9], "X": [0]}
    assert figure.axes[0].get_xticklabels()[0].get_text() == "✕ apple"
    assert "n = 7 pictures" in figure.get_supxlabel() and "apple 1.00 to 0.00" in figure.alt


def test_the_matrix_is_white_where_all_is_as_wished_and_frames_what_was_to_go():
    figure = figures.accuracy_matrix(table(), REQUESTS, "Naive")
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["✕ apple", "✕ car", "orange", "neon"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["base", "1 apple", "2 car"]
    (image,) = axes.images
    assert image.get_array().tolist() == [[0, 0, 0, 0], [0, 0, -0.5, 0], [0.75, 0, -0.75, -0.5]]
    assert image.get_clim() == (-1, 1) and image.cmap(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.01)
    boxes = [(p.get_x(), p.get_y(), p.get_height()) for p in axes.patches]
    assert boxes == [pytest.approx((-0.46, 0.54, 1.92)), pytest.approx((0.54, 1.54, 0.92))]
    assert texts(axes)[8:] == ["75", "0", "25", "50"]
    assert "Naive. After apple, car: orange 0.25, apple 0.75" in figure.alt and figure.png()
    with pytest.raises(ValueError, match="no column for car: evaluate it as well"):
        figures.accuracy_matrix(table(["apple", "orange"]), REQUESTS)


def test_a_step_of_the_timeline_marks_its_row_and_only_what_is_gone_by_then():
    pictures = [[draw(n, seed=10 * k + j) for j, n in enumerate(("apple", "orange"))] for k in range(3)]
    above, below = figures.timeline_step(pictures, ("apple", "orange"), REQUESTS, table(), 1, "words").axes
    shown = [np.asarray(image.get_array()) for image in above.images]
    assert all(
        np.array_equal(a, np.asarray(b)) for a, b in zip(shown, pictures[0] + pictures[1], strict=True)
    )
    assert framed(above) == {(1, 0)}
    assert [t.get_text() for t in below.get_xticklabels()] == ["✕ apple", "car", "orange", "neon"]
    assert below.patches[-1].get_xy() == (-0.5, 0.5) and below.patches[-1].get_edgecolor() == to_rgba("black")


def test_metrics_have_a_panel_each_and_a_line_per_sequence():
    naive = pd.DataFrame(
        {"UA": [1, 0.625], "IRA": 0.5, "CRA": 0.5, "HM": 0.5, "revival": [0.1, 0.75]}, index=[1, 2]
    )
    figure = figures.metrics_over_requests({"naive": naive, "DUGE": naive.assign(UA=1.0)}, ["UA", "revival"])
    first, second = figure.axes
    assert first.get_title().startswith("gone (UA)") and second.get_title() == "revival"
    assert [line.get_ydata().tolist() for line in first.lines] == [[1, 0.625], [1, 1]]
    assert len({line.get_marker() for line in first.lines}) == 2 and sorted(texts(second)) == [
        "DUGE",
        "naive",
    ]
    heights = sorted(t.get_position()[1] for t in second.texts)
    assert heights[1] - heights[0] > 0.08, "two names at one height stand apart"
    assert "naive, at the end: UA 0.62, revival 0.75; DUGE, at the end: UA 1.00" in figure.alt
    kinds = naive.assign(**{"objects kept": 0.9, "styles kept": 0.8})
    for frame, second in ((naive, "kept, same kind"), (kinds, "objects kept")):
        titles = [axes.get_title() for axes in figures.metrics_over_requests({"x": frame}).axes]
        assert len(titles) == 4 and titles[1].startswith(second)


def test_the_front_holds_whoever_nobody_beats():
    points = pd.DataFrame(
        {"kept": [0.2, 0.9, 0.95, 0.9, 0.9], "gone": [1.0, 0.9, 0.8, 0.8, 0.9]}, index=list("abcde")
    )
    assert figures.pareto_front(points) == ["a", "b", "c", "e"]  # equals stay both; c beats d


def test_trade_off_says_who_is_on_the_front_and_equals_share_a_label():
    points = pd.DataFrame(
        {"kept": [0.9, 0.8, 0.901], "gone": [1.0, 0.7, 1.0]}, index=["ours", "theirs", "twin"]
    )
    figure = figures.trade_off(points)
    assert "ours (on the front): 1.00 gone, 0.90 kept; theirs: 0.70 gone" in figure.alt
    fills = {tuple(line.get_xdata()): line.get_markerfacecolor() for line in figure.axes[0].lines}
    assert fills[(0.8,)] == "white" != fills[(0.9,)] and figure.png()
    assert texts(figure.axes[0]) == ["ours, twin: 100% gone, 90% kept", "theirs: 70% gone, 80% kept"]


# ---- attacks


def test_attacks_keep_each_models_look():
    index = pd.MultiIndex.from_product(
        [["plain", "leakage"], ["base", "unlearned"]], names=["attack", "model"]
    )
    seen = pd.DataFrame({"seen": [0.9, 0.1, 0.2, 0.3], "low": 0.0, "high": 1.0}, index=index)
    figure = figures.attack_summary(seen)
    base, unlearned = figure.axes[0].lines
    assert base.get_xdata().tolist() == [0.9, 0.2] and unlearned.get_marker() == "X"
    assert texts(figure.axes[0]) == ["base", "unlearned"] and "leakage, unlearned: 30%" in figure.alt
    curve = pd.DataFrame({"seen": [0, 0.5], "low": 0.0, "high": 1.0, "told": [0.2, 0.1]}, index=[0, 10])
    figure = figures.recovery_curves({"unlearned": curve, "unlearned, other pictures": curve}, 0.08)
    main, control = figure.axes[0].lines
    assert main.get_color() == control.get_color() and (main.get_linestyle(), control.get_linestyle()) == (
        "-",
        ":",
    )
    assert set(texts(figure.axes[1])) == {"unlearned", "unlearned, other pictures", "base"}
    assert "unlearned: 0% (error 0.2000) after 0, 50% (error 0.1000) after 10" in figure.alt
    with pytest.raises(ValueError, match="expected at most 4 beside base, unlearned, oracle"):
        figures.recovery_curves(dict.fromkeys("abcde", curve), 0.1)


def test_every_figure_is_reached_lazily_and_named_in_one_place():
    assert duge.figures is figures and re.search("Plot", str(duge.figures.Plot))
    with pytest.raises(AttributeError, match="no attribute 'visualize'"):
        _ = duge.visualize
