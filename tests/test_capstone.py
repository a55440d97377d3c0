"""The capstone: a new thing is drawn and taught, and the examiner scores all alike."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import EXACT, changed, refused, weights

import duge_lite as duge
from duge_lite import attacks
from duge_lite.doodles import score, teach
from duge_lite.doodles.draw import OBJECTS, STYLES


def test_a_new_thing_is_drawn_in_every_style_and_by_its_seed():
    (one, texts), (again, _), (other, _) = (teach.drawings("cup", teach.cup, 10, seed) for seed in (1, 1, 2))
    assert [p.size for p in one] == [(64, 64)] * 10 and all("a cup" in t for t in texts)
    assert np.array_equal(np.stack(one), np.stack(again)) and not np.array_equal(one[0], other[0])


@pytest.fixture(scope="module")
def drawn(tiny_master):
    (pictures, _), prompts = teach.drawings("cup", teach.cup, 5), [score.prompt("cup", s) for s in STYLES]
    return attacks.encode_pictures(tiny_master, pictures, prompts)


def test_a_lesson_changes_the_denoiser_and_leaves_it_ready_for_use(tiny_pipe, drawn, tiny_memory):
    before = weights(tiny_pipe)
    losses = list(teach.teach_steps(tiny_pipe, drawn, tiny_memory, steps=3, batch_size=4))
    assert len(losses) == 3 and np.isfinite(losses).all() and changed(tiny_pipe, before)
    assert {(p.grad, p.dtype) for p in tiny_pipe.unet.parameters()} == {(None, torch.float32)}


@pytest.mark.slow
def test_a_judge_learns_one_more_label_and_says_of_the_rest_what_it_said():
    judge, (shown, _) = duge.Judge.load("doodle"), teach.drawings("cup", teach.cup, 60)
    wise = teach.teach_judge(judge, "cup", shown, teach.not_it(30))
    fresh, others = teach.drawings("cup", teach.cup, 20, seed=5)[0], teach.world_drawings(40, seed=6)[0]
    assert wise.sees(fresh, "cup").mean() >= 0.8 and wise.sees(others, "cup").mean() <= 0.1
    assert np.allclose(wise.scores(others, judge.labels), judge.scores(others), atol=1e-4)
    assert wise.labels == [*judge.labels, "cup"] and "cup" not in judge.labels


def test_the_number_is_the_harmonic_mean_of_the_worst_order():
    rows = {"a, b": [1.0, 1.0, 1.0, 1.0, 0.5], "b, a": [1.0, 0.5, 1.0, 1.0, 0.5]}
    orders = pd.DataFrame(rows, index=score.PARTS).T
    orders["score"] = [score.total(row) for _, row in orders.iterrows()]
    assert orders.score.tolist() == pytest.approx([5 / 6, 5 / 7])
    card = score.ScoreCard("cup", orders, 1.0)
    assert card.score == pytest.approx(5 / 7) and card.worst.name == "b, a"
    assert "**0.71**" in card._repr_markdown_() and "worst of 2 orders" in card._repr_markdown_()


def test_the_budget_of_prompts_and_the_examiners_phrasings_are_kept():
    check, known = score.check_concept, "'a painting of a cup' is one of the examiner's"
    enough, more = (duge.Concept("cup", ["a photo of a cup"] * count) for count in (10, 11))
    check(enough)
    refused(ValueError, "has 11 prompts: the budget is 10", check, more)
    refused(ValueError, known, check, duge.Concept("cup", ["a painting of a cup"]))


@pytest.mark.slow
def test_the_examiner_scores_and_puts_the_weights_back(tiny_pipe, drawn, monkeypatch):
    monkeypatch.setattr(score, "STEPS", 1)
    monkeypatch.setattr(score, "stays_gone", lambda *args: 0.5)
    shown, before, orders = teach.drawings("cup", teach.cup, 20)[0], weights(tiny_pipe), []
    judge = teach.teach_judge(duge.Judge.load("doodle"), "cup", shown, teach.not_it(5))
    cup = duge.Concept("cup", ["a cup!"], ["a car"])

    def forget(pipe, request):
        orders.append(getattr(request, "name", request))
        return duge.unlearn(pipe, request, EXACT, memory=["a photo of a car"], progress=False)

    card = score.examine(tiny_pipe, judge, cup, forget, drawn, orders=2)
    assert orders == ["cup", "umbrella", "mosaic", "mosaic", "umbrella", "cup"]
    assert list(card.orders.columns) == [*score.PARTS, "score"] and 0 <= card.score <= 1
    assert not changed(tiny_pipe, before)


def test_a_suspect_counts_its_pictures_and_tells_at_the_end(tiny_pipe, monkeypatch):
    monkeypatch.setattr(score, "unlearn", lambda pipe, secret, progress: None)
    suspect = score.hand_over(tiny_pipe, seed=3, budget=3)
    pictures = suspect.draw(["a photo of a car"] * 2)
    refused(ValueError, "2 pictures asked for, 1 left", suspect.draw, ["a photo of a car"] * 2)
    told = suspect.verdict("car", pictures, duge.Judge.load("doodle"))
    assert told["it forgot"] in OBJECTS and told["pictures"] == 2 and told["budget left"] == 1
    assert told["it forgot"] not in repr(suspect)
