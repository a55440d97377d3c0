"""Figures of a sequence, the erosion timeline and its exercise."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import with_own_unet
from matplotlib.colors import to_rgba
from PIL import Image

import duge_lite as duge
from duge_lite import checks, timeline, widgets
from duge_lite import visualize_sequence as figures
from duge_lite.errors import UnknownConceptError
from duge_lite.evaluation import sequence_metrics
from duge_lite.timeline import ErosionTimeline, Timeline
from duge_lite.unlearning import UnlearnConfig, plain_parameters
from duge_lite.visualize import LOST

SIZES = dict(batch_size=2, memory_batch_size=2, target_size=2, memory_size=2, lessons=4)
TINY = UnlearnConfig(iterations=2, lr=1e-2, **SIZES)
REQUESTS = ("apple", "car")


def table(columns=("orange", "apple", "car", "neon")) -> pd.DataFrame:
    rows = {"orange": [1, 0.5, 0.25], "apple": [1, 0, 0.75], "car": [1, 1, 0], "neon": [1, 1, 0.5]}
    return pd.DataFrame(rows, dtype=float)[list(columns)].rename_axis("after")


@pytest.fixture(scope="module")
def sequence(tiny_master) -> duge.UnlearningSequence:
    """Two requests; whoever opens an earlier model goes back to the last one."""
    return duge.unlearn_sequence(with_own_unet(tiny_master), REQUESTS, TINY, progress=False)


def weights(sequence) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in plain_parameters(sequence.pipe.unet).items()}


def unchanged(sequence, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[n]) for n, value in weights(sequence).items())


@pytest.fixture
def drawn(tiny_master) -> Timeline:
    """A timeline of drawings, no two alike, that needs no model."""
    names = ("apple", "orange")
    pictures = [[duge.doodles.draw(n, seed=10 * k + j) for j, n in enumerate(names)] for k in range(3)]
    metrics = sequence_metrics(table(), REQUESTS, duge.model_card(tiny_master))
    return Timeline(REQUESTS, names, pictures, table(), metrics, walk())


def walk() -> pd.DataFrame:
    index = pd.MultiIndex.from_product([(1, 2), ("to_q", "to_out")], names=["request", "kind"])
    return pd.DataFrame({"from base": [0.1, 0.2, 0.15, 0.3], "this request": [0.1, 0.2, 0.05, 0.1]}, index)


def rectangles(axes) -> tuple[set, set, set]:
    """The cells (row, column) with hatching, those in the frame of a request, and rows in a black frame."""
    hatched, framed, rows = set(), set(), set()
    for patch in axes.patches:
        x, y = (round(v + 0.25) for v in patch.get_xy())
        if patch.get_hatch():
            hatched.add((y, x))
        elif patch.get_edgecolor() == to_rgba(LOST):
            framed.add((y, x))
        else:
            rows.add(y)
    return hatched, framed, rows


# ---------------------------------------------------------------------------- figures


def test_the_matrix_marks_requests_and_what_is_gone():
    figure = figures.accuracy_matrix(table(), REQUESTS, "Naive")
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["✕ apple", "✕ car", "orange", "neon"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["base", "1 apple", "2 car"]
    hatched, framed, rows = rectangles(axes)
    assert hatched == {(1, 0), (2, 0), (2, 1)} and framed == {(1, 0), (2, 1)} and not rows
    numbers = [t.get_text() for t in axes.texts]
    assert numbers[8:] == ["0.75", "0.00", "0.25", "0.50"]
    assert "Naive After apple, car: orange 0.25, apple 0.75" in figure.alt and figure.png()


def test_hatching_is_seen_on_dark_and_on_light_cells():
    (axes,) = figures.accuracy_matrix(table(), REQUESTS).axes
    inks = {p.get_edgecolor()[:3] for p in axes.patches if p.get_hatch()}
    assert inks == {(0, 0, 0), (1, 1, 1)}  # the apple came back: that cell is light


def test_a_matrix_without_a_request_teaches():
    with pytest.raises(ValueError, match="no column for car: evaluate it as well"):
        figures.accuracy_matrix(table(["apple", "orange"]), REQUESTS)


def test_metrics_have_a_panel_each_and_a_line_per_sequence(drawn):
    better = drawn.metrics.assign(UA=1.0)
    figure = figures.metrics_over_requests({"naive": drawn.metrics, "DUGE": better}, ["UA", "revival"])
    first, second = figure.axes
    assert first.get_title().startswith("unlearning accuracy (UA)") and second.get_title() == "revival"
    naive, ours = first.lines
    assert naive.get_ydata().tolist() == [1, 0.625] and ours.get_ydata().tolist() == [1, 1]
    assert naive.get_marker() != ours.get_marker() and naive.get_linestyle() != ours.get_linestyle()
    assert "naive, at the end: UA 0.62, revival 0.75; DUGE, at the end: UA 1.00" in figure.alt


def test_drift_starts_at_the_base_and_shares_a_scale():
    figure = figures.drift_over_requests({"naive": walk(), "DUGE": 0.1 * walk()})
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim() and [left.get_title(), right.get_title()] == ["naive", "DUGE"]
    lines = {line.get_label(): line for line in left.lines}
    assert lines["query, from base"].get_xydata().tolist() == [[0, 0], [1, 0.1], [2, 0.15]]
    assert lines["output, this request"].get_xydata().tolist() == [[1, 0.2], [2, 0.1]]
    assert "naive, from base at the end: output 30.0%, query 15.0%" in figure.alt


def framed_pictures(axes) -> list[bool]:
    return [all(spine.get_visible() for spine in one.spines.values()) for one in axes]


def test_a_history_frames_what_was_asked_to_go(drawn):
    figure = figures.picture_history(drawn.pictures, drawn.names, REQUESTS, "The same seeds")
    assert framed_pictures(figure.axes) == [False, False, True, False, True, False]
    assert [a.get_ylabel() for a in figure.axes[::2]] == ["base", "1 apple", "2 car"]
    assert np.array_equal(figure.axes[3].images[-1].get_array(), np.asarray(drawn.pictures[1][1]))


def test_a_position_of_the_slider_is_one_figure(drawn):
    figure = drawn.figure(at=2)
    pictures, (matrix, drift) = figure.axes[:4], figure.axes[4:]
    shown = [np.asarray(axes.images[0].get_array()) for axes in pictures]
    expected = [*drawn.pictures[0], *drawn.pictures[2]]
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(shown, expected, strict=True))
    assert framed_pictures(pictures) == [False, False, True, False]
    assert rectangles(matrix)[2] == {2} and list(drift.lines[-1].get_xdata()) == [2, 2]
    assert figure.alt == "Asked to go: apple, car. UA 0.62, IRA 0.25, CRA 0.50, HM 0.39." and figure.png()
    names = [t.get_text() for t in drawn.figure(at=1).axes[4].get_xticklabels()]
    assert names == ["✕ apple", "car", "orange", "neon"]  # the car is not yet gone
    assert "nothing was asked to go yet" in drawn.figure(at=0).alt
    for at in (-1, 3):
        with pytest.raises(ValueError, match=rf"at = {at}: expected a number from 0 \(the base\) to 2"):
            drawn.figure(at)


# ---------------------------------------------------------------------------- the timeline


@pytest.mark.slow
def test_every_model_draws_the_same_seeds(sequence):
    card, last = duge.model_card(sequence.pipe), weights(sequence)
    app = widgets.erosion_timeline(sequence, table(), ["orange", "neon"], seeds=(4, 9))
    assert unchanged(sequence, last)
    assert app.timeline.names == ("orange", "orange", "neon", "neon")
    assert app.timeline.requests == REQUESTS and app.timeline.metrics.UA.tolist() == [1, 0.625]
    prompts = [card.prompt("orange")] * 2 + [card.prompts("neon")[0]] * 2
    first, middle, end = app.timeline.pictures
    expected = duge.sample(sequence.pipeline(at=1), prompts, [4, 9, 4, 9], card.sampling_steps)
    assert all(np.array_equal(a, b) for a, b in zip(middle, expected, strict=True))
    assert not np.array_equal(first[0], middle[0]) and not np.array_equal(middle[0], end[0])
    sequence.pipeline(at=2)


def test_what_does_not_fit_is_refused_before_anything_is_drawn(sequence, monkeypatch):
    monkeypatch.setattr(timeline, "sample", lambda *args: pytest.fail("drawn"))
    with pytest.raises(UnknownConceptError, match="'aple'.*Did you mean 'apple'"):
        widgets.erosion_timeline(sequence, table(), ["aple"])
    with pytest.raises(ValueError, match="no column for car"):
        widgets.erosion_timeline(sequence, table(["apple", "orange"]))
    with pytest.raises(ValueError, match="2 rows for 2 requests"):
        widgets.erosion_timeline(sequence, table()[:2])


def test_after_an_error_the_pipeline_is_the_last_model(sequence, monkeypatch):
    last = weights(sequence)
    monkeypatch.setattr(timeline, "sample", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        widgets.erosion_timeline(sequence, table())
    assert unchanged(sequence, last)


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


def test_an_error_is_one_sentence_and_the_app_goes_on(drawn, monkeypatch):
    app = ErosionTimeline(drawn)
    with monkeypatch.context() as broken:
        broken.setattr(timeline, "draw_matrix", lambda *args: [][1:].index("<b>\n"))
        app.slider.value = 1
        assert isinstance(app.error, ValueError) and 'role="alert"' in app.message.value
        assert "\n" not in app.message.value and "<b>" not in app.message.value
    app.slider.value = 2
    app.slider.value = 1
    assert app.error is None and "Asked to go: apple." in app.message.value


# ---------------------------------------------------------------------------- the exercise


def scores(matrix, requests, k):
    row = matrix.loc[k]
    return 1 - row[requests[:k]].mean(), row.drop(requests[:k]).mean()


def test_the_exercise_agrees_with_the_metrics(drawn):
    assert checks.gone_and_kept(scores)
    for k in (1, 2):
        mine = scores(drawn.matrix.drop(columns="neon"), list(REQUESTS), k)
        assert mine == pytest.approx(drawn.metrics.loc[k, ["UA", "IRA"]].tolist())


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda m, r, k: ..., "not yet"),
        (lambda m, r, k: scores(m, r, len(r)), "first k requests"),
        (lambda m, r, k: (1 - m.loc[k, r].mean(), m.loc[k].drop(r).mean()), "the car still counts"),
        (lambda m, r, k: (m.loc[k, r[:k]].mean(), scores(m, r, k)[1]), "UA is 1 - 0"),
        (lambda m, r, k: (1 - m.loc[k, r[k - 1]], scores(m, r, k)[1]), "the old one too"),
        (lambda m, r, k: (scores(m, r, k)[0], m.loc[k].drop(r[k - 1]).mean()), "the other three"),
        (lambda m, r, k: (1 - m.iloc[k, :k].mean(), m.iloc[k, k:].mean()), "by their name"),
        (lambda m, r, k: scores(m, r, k)[0], "four that are to stay"),
        (lambda m, r, k: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_wrong_answer_gets_its_own_hint(wrong, hint):
    verdict = checks.gone_and_kept(wrong)
    assert not verdict and hint in verdict.message
