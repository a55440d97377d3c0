"""Pictures on fixed seeds, read by a judge; and the judge itself."""

import dataclasses
import json
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import duge_lite as duge
from duge_lite import evaluation
from duge_lite.doodles import BACKGROUNDS, OBJECTS, STYLES, captions, draw
from duge_lite.doodles.draw import FIXED_GROUND
from duge_lite.doodles.train import LABELS
from duge_lite.doodles.unseen import UNSEEN, unseen
from duge_lite.errors import ModelNotFoundError, UnknownConceptError
from duge_lite.evaluation import OTHER, ClipJudge, Judge, kid, wilson_interval


def pictures(count: int) -> list[Image.Image]:
    return [draw(OBJECTS[i % 20], STYLES[i % 5], seed=i) for i in range(count)]


# Wilson's interval


def test_wilson_by_hand():
    known = {  # (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96
        (0, 10): (0.0, 0.27754),  # z² / (n + z²) = 3.8416 / 13.8416
        (1, 1): (0.20654, 1.0),  # 1 / 4.8416
        (81, 263): (0.25525, 0.36621),  # Newcombe (1998), table I
        (15, 148): (0.06236, 0.16054),
    }
    for (hits, count), interval in known.items():
        assert wilson_interval(hits, count) == pytest.approx(interval, abs=1e-4)
    for hits, count in ((-1, 3), (4, 3), (0, 0)):
        refused(ValueError, f"{hits} hits of {count}: expected", wilson_interval, hits, count)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share_and_is_symmetric(hits_and_count):
    hits, count = hits_and_count
    low, high = wilson_interval(hits, count)
    assert 0 <= low < high <= 1 and low - 1e-12 <= hits / count <= high + 1e-12
    assert (1 - high, 1 - low) == pytest.approx(wilson_interval(count - hits, count))
    assert np.subtract(*wilson_interval(4 * hits, 4 * count)[::-1]) < high - low


# The judge's interface, on random weights


def test_scores_are_the_models_logits_however_many_pictures_and_names_follow_them(tiny_judge):
    images, among = pictures(130), ["car", "harp", "star"]
    scores = tiny_judge.scores(images)
    assert scores.shape == (130, 31) and list(scores.columns) == list(LABELS)
    pixels = np.stack([np.asarray(i) for i in images[126:]]).transpose(0, 3, 1, 2) / 127.5 - 1
    logits = tiny_judge.model(torch.tensor(pixels, dtype=torch.float32)).logits.detach()
    np.testing.assert_allclose(scores[126:], logits.numpy(), atol=1e-5)
    pd.testing.assert_frame_equal(tiny_judge.scores(images, ["tree", "apple"]), scores[["tree", "apple"]])
    unknown = "'corgi' is no label of this judge"
    refused(UnknownConceptError, unknown, tiny_judge.scores, images, ["apple", "corgi"])
    assert tiny_judge.threshold is None  # never calibrated: it has to choose
    assert tiny_judge.names(images, among) == list(scores[among].idxmax(axis=1))
    seen = pd.DataFrame({label: tiny_judge.sees(images[:8], label) for label in LABELS})
    pd.testing.assert_frame_equal(seen, scores[:8] > 0)
    assert 0 < seen.mean(axis=None) < 1


@pytest.fixture
def judge_with(tiny_judge, monkeypatch):
    """Makes judges that look at nothing: they have their scores by heart, a row for each picture."""

    def make(scores: pd.DataFrame, threshold: float | None = None, **how) -> Judge:
        monkeypatch.setattr(Judge, "threshold", threshold)
        monkeypatch.setattr(Judge, "labels", list(scores))
        monkeypatch.setattr(Judge, "scores", lambda _, images, among: scores[: len(images)][list(among)])
        return dataclasses.replace(tiny_judge, **how)

    return make


def test_below_its_threshold_a_judge_says_something_else(judge_with):
    clear, doubtful, nothing = (5.0, 1.2, -2.0), (0.9, 0.8, 0.1), (-3.0, -4.0, -2.0)
    scores = pd.DataFrame([clear, doubtful, nothing], columns=["apple", "orange", "car"])
    strict = judge_with(scores, threshold=1.0)
    assert strict.names(pictures(3), ["apple", "orange", "car"]) == ["apple", OTHER, OTHER]
    assert strict.names(pictures(3), ["orange", "car"]) == ["orange", OTHER, OTHER]
    assert strict.names(pictures(3), ["car"]) == [OTHER] * 3
    assert strict.sees(pictures(3), "orange").tolist() == [True, False, False]


def test_a_judge_knows_concepts_by_its_own_words(judge_with):
    labels = ["harp", "sports car, sport car", "convertible", "Granny Smith", "teapot"]
    shown = ["Granny Smith", "convertible", "teapot"]
    scores = pd.DataFrame([[5.0 if label == s else -3.0 for label in labels] for s in shown], columns=labels)
    words = {"apple": ("Granny Smith",), "car": ("sports car, sport car", "convertible"), "harp": ("harp",)}
    told = judge_with(scores, words=words)
    assert told.names(pictures(3), ["apple", "car", "harp"]) == ["apple", "car", "apple"]  # it has to choose
    assert told.sees(pictures(3), "car").tolist() == [False, True, False]  # by any of its words for it
    assert told.knows("car") and not told.knows("convertible") and not told.knows("fruit")
    refused(UnknownConceptError, "'fruit' is no label", told.names, pictures(1), ["apple", "fruit"])
    free = judge_with(scores, words=words, open_choice=True)  # it may say something else
    assert free.names(pictures(3), ["apple", "car", "harp"]) == ["apple", "car", OTHER]
    assert free.names(pictures(3), ["apple", "harp"]) == ["apple", OTHER, OTHER]
    assert free.sees(pictures(3), "apple").tolist() == [True, False, False]


def test_the_cards_judge_knows_the_cards_concepts(doodle_master):
    card, drawn = duge.model_card(doodle_master), [draw("car", "sketch"), draw("harp", "neon")]
    judge = Judge.load(card)
    assert all(judge.knows(c) for c in card.forgettable) and not judge.open_choice
    assert judge.names(drawn, card.judged) == ["car", "harp"] == Judge.load().names(drawn, card.concepts)
    assert judge.names(drawn, card.styles) == ["sketch", "neon"]


# Where judges come from


@pytest.fixture
def saved(tiny_judge, tmp_path):
    folder = tmp_path / "judge"
    tiny_judge.model.save_pretrained(folder)
    tiny_judge.processor.save_pretrained(folder)
    return folder


def test_a_judge_survives_saving_and_goes_where_the_pipeline_is(saved, tiny_judge, tiny_pipe, monkeypatch):
    loaded, images = Judge.load(str(saved), "cpu"), pictures(4)
    assert loaded.labels == list(LABELS) and not loaded.model.training
    pd.testing.assert_frame_equal(loaded.scores(images), tiny_judge.scores(images))
    monkeypatch.setattr(evaluation, "default_device", lambda: torch.device("meta"))
    assert Judge.load(saved).model.device.type == "meta"
    assert Judge.load(saved, "cpu").pixels(images).device.type == "cpu"
    monkeypatch.setattr(Judge, "load", load := Mock(return_value=tiny_judge))
    duge.evaluate(tiny_pipe, ["apple"], images=1, num_inference_steps=1)
    load.assert_called_once_with(duge.model_card(tiny_pipe), tiny_pipe.device)


@pytest.mark.parametrize(("temperature", "threshold", "logit"), [(1.0, 0.5, 0.0), (2.0, 0.8, 2.772589)])
def test_the_threshold_comes_from_the_judges_config(saved, temperature, threshold, logit):
    config = json.loads((saved / "config.json").read_text("utf-8"))
    config["calibration"] = {"temperature": temperature, "threshold": threshold}
    (saved / "config.json").write_text(json.dumps(config), "utf-8")
    assert Judge.load(saved).threshold == pytest.approx(logit)  # temperature * log(p / (1 - p))


@pytest.mark.parametrize("missing", ["nowhere", "no/such/folder", "/no/such/folder", "doodle", "broken"])
def test_a_missing_or_broken_judge_teaches(missing, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "data_dir", lambda: tmp_path)
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:1000])
    source = saved.rename(tmp_path / "broken") if missing == "broken" else missing
    refused(ModelNotFoundError, f"no judge at .*{missing}.*save_pretrained", Judge.load, source)
    refused(ModelNotFoundError, "no CLIP at", ClipJudge.of, {}, missing)


def test_code_that_comes_with_a_judge_is_neither_run_nor_asked_about(saved, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    told = {"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "mine.Mine"}}
    (saved / "preprocessor_config.json").write_text(json.dumps(told))
    (saved / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Mine: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    refused(ModelNotFoundError, "no judge at", Judge.load, saved)
    assert not ran.exists()


# evaluate


class Oracle:
    """A judge that knows the answers, picture by picture; it remembers what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked, self.images = list(answers), {}, []

    def knows(self, concept):
        return True

    def names(self, images, among):
        self.asked[tuple(among)] = len(images)
        self.images += [np.asarray(i).astype(int) for i in images]
        return [self.answers.pop(0) if self.answers else among[0] for _ in images]


def test_evaluate_counts_by_hand(tiny_pipe):
    judge = Oracle("apple", "apple", "orange", "apple", OTHER, OTHER, "harp", "apple")
    table = duge.evaluate(tiny_pipe, ["apple", "harp"], images=4, judge=judge, num_inference_steps=1)
    assert list(table.columns) == ["accuracy", "low", "high", "images", "mostly"]
    assert list(table.index) == ["apple", "harp"] and table.index.name == "concept"
    assert table.accuracy.tolist() == [0.75, 0.25] and table.images.tolist() == [4, 4]
    assert (table.low["apple"], table.high["apple"]) == wilson_interval(3, 4)
    assert judge.asked == {OBJECTS: 8}
    assert table.mostly.tolist() == ["apple", OTHER]  # what is nothing counts as gone, and as lost


def test_a_style_is_drawn_with_the_objects_in_turn_and_named_among_styles(tiny_pipe, monkeypatch):
    monkeypatch.setattr(evaluation, "sample", spy := Mock(return_value=pictures(6)))
    judge, card = Oracle("apple", "apple", "apple", "neon", "photo", "neon"), duge.model_card(tiny_pipe)
    how = {"num_inference_steps": 7, "guidance_scale": 2.5}
    table = duge.evaluate(tiny_pipe, ["neon", "apple"], 3, judge, 40, **how)
    (((_, prompts, seeds), options),) = spy.call_args_list
    assert prompts[:3] == ["a neon sign of an apple", "a neon sign of an orange", "a neon sign of a broccoli"]
    assert prompts[3:] == ["a photo of an apple"] * 3 and seeds == [40, 41, 42] * 2
    assert options == how | {"card": card}
    assert judge.asked == {tuple(OBJECTS): 3, tuple(STYLES): 3}
    assert table.accuracy.to_dict() == {"neon": pytest.approx(2 / 3), "apple": 1.0}


def test_picture_i_is_the_same_whatever_else_is_asked(tiny_pipe):
    judge = Oracle()
    for concepts, images in ((["apple"], 2), (["harp", "car", "apple"], 2), (["apple"], 4)):
        torch.manual_seed(images)
        duge.evaluate(tiny_pipe, concepts, images=images, judge=judge, num_inference_steps=2)
    alone, last_of_three, first_of_four = (judge.images[i : i + 2] for i in (0, 2 + 4, 2 + 6))
    for same in (last_of_three, first_of_four):
        assert np.abs(np.subtract(alone, same)).max() <= 1  # of 255: batches may round
    assert np.abs(alone[0] - alone[1]).max() > 1


WRONG = [
    ({"concepts": 3}, TypeError, "concepts = 3: expected a list of names"),
    ({"concepts": []}, ValueError, "0 concepts, 10 images: expected at least one of each"),
    ({"concepts": [3]}, UnknownConceptError, "3"),
    ({"concepts": ["umbrela"]}, UnknownConceptError, "Did you mean 'umbrella'"),
    ({"images": "4"}, TypeError, "images = '4': expected a whole number"),
    ({"images": 0}, ValueError, "20 concepts, 0 images: expected at least one of each"),
]


@pytest.mark.parametrize(("wrong", "error", "sentence"), WRONG)
def test_evaluate_says_what_is_wrong(tiny_pipe, tiny_judge, wrong, error, sentence):
    refused(error, sentence, duge.evaluate, tiny_pipe, judge=tiny_judge, **wrong)


# The shipped judge and model


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def test_the_judge_names_drawings_that_training_never_saw_and_sees_nothing_else(judge):
    frame = pd.DataFrame([(name, style) for name in OBJECTS for style in STYLES], columns=["object", "style"])
    grounds = [list(BACKGROUNDS)[(7 * i) % 6] for i in range(100)]
    frame["background"] = frame["style"].map(FIXED_GROUND).fillna(pd.Series(grounds))
    images = [draw(*row, seed=90_000 + i) for i, row in enumerate(frame.itertuples(index=False))]
    frame["background"] += " background"
    for column in frame:
        named = np.array(judge.names(images, frame[column].unique()))
        assert np.mean(named == frame[column]) >= 0.97
    seen = judge.scores(images, OBJECTS).to_numpy() > judge.threshold
    there = frame["object"].to_numpy()[:, None] == np.array(OBJECTS)
    assert seen[there].mean() >= 0.95 and seen[~there].mean() <= 0.01


def test_the_judge_knows_that_nothing_is_there(judge):
    nothing = list(map(Image.fromarray, np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)))
    for ground in BACKGROUNDS.values():  # a blank page; and a red square is no apple
        square = Image.new("RGB", (64, 64), ground)
        nothing.append(square.copy())
        square.paste((216, 38, 44), (18, 18, 46, 46))
        nothing.append(square)
    assert judge.names(nothing, OBJECTS) == [OTHER] * len(nothing)
    assert not any(judge.sees(nothing, name).any() for name in OBJECTS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", UNSEEN)
def test_the_judge_takes_nothing_for_nothing(judge, kind):
    """Kinds of pictures that training never saw; the data card holds the numbers of more of them."""
    assert judge.names(unseen(kind, 40, seed=5), OBJECTS).count(OTHER) >= 36


def test_the_judge_finds_both_of_two(judge):
    pairs = [(a, OBJECTS[(i + 7) % 20]) for i, a in enumerate(OBJECTS)]
    scores = judge.scores([draw(pair, seed=91_000 + i) for i, pair in enumerate(pairs)], OBJECTS)
    found = [set(scores.loc[i].nlargest(2).index) == set(pair) for i, pair in enumerate(pairs)]
    assert np.mean(found) >= 0.9


def test_unlearning_accuracy_alone_rewards_noise(judge, tiny_pipe):
    """A model that never learned anything has "forgotten" nearly everything."""
    assert duge.evaluate(tiny_pipe, OBJECTS, 2, judge, num_inference_steps=2).accuracy.mean() <= 0.1


@pytest.mark.nightly
def test_the_shipped_model_knows_its_whole_world(doodle_master, judge):
    table = duge.evaluate(doodle_master, images=10, judge=judge)
    assert table.accuracy.mean() >= 0.97 and table.accuracy.min() >= 0.8
    assert duge.evaluate(doodle_master, STYLES[1:], 20, judge, seed=500).accuracy.min() >= 0.9


# Distances between sets of pictures


def drawings(name: str, first: int, count: int = 40) -> list:
    return [draw(name, seed=first + i) for i in range(count)]


def test_kid_tells_the_same_world_from_another(judge):
    same, other = (kid(drawings("apple", 0), drawings(name, 1000), judge) for name in ("apple", "harp"))
    assert abs(same) < 0.1 * other


def test_kid_is_torchmetrics_own(tiny_judge):
    """Of as many pictures on both sides, which is all that it compares at once."""
    metrics = pytest.importorskip("torchmetrics.image.kid")
    a, b = drawings("apple", 0, 8), drawings("orange", 0, 8)
    features = torch.nn.Module()
    features.forward = lambda pictures: tiny_judge.features([a, b][int(pictures[0])])
    features.num_features = 8
    metric = metrics.KernelInceptionDistance(features, subsets=1, subset_size=8)
    for i in (0, 1):
        metric.update(torch.tensor([i]), real=not i)
    assert kid(a, b, tiny_judge) == pytest.approx(float(metric.compute()[0]), rel=1e-3, abs=1e-6)


def test_kid_draws_no_lots_and_wants_more_than_one_picture(tiny_judge, monkeypatch):
    """No lots on CUDA either, whose global generator `torch.manual_seed` would set."""
    for name in ("manual_seed", "randperm", "rand", "randn"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("it drew lots"))
    kid(drawings("apple", 0, 3), drawings("orange", 0, 4), tiny_judge)  # other numbers of pictures, too
    one, more = drawings("apple", 0, 1), drawings("apple", 0, 8)
    refused(ValueError, "1 and 8 pictures: expected at least two", kid, one, more, tiny_judge)


# A judge of any words


@pytest.fixture(scope="module")
def clip():
    return ClipJudge.of({o: [captions.prompt(o)] for o in OBJECTS}, "doodle")


def test_clip_names_what_is_there_and_has_a_text_for_what_is_not(clip):
    drawn = [draw(o, "photo", seed=i) for i, o in enumerate(OBJECTS)]
    assert np.mean([a == b for a, b in zip(clip.names(drawn, OBJECTS), OBJECTS, strict=True)]) > 0.9
    assert clip.sees(drawn, "apple").tolist() == [o == "apple" for o in OBJECTS]
    assert clip.names(drawn[:1], ["car"]) == [OTHER] and clip.threshold is None
    assert clip.labels[-1] == "a photo" and clip.features(drawn).shape == (20, 128)
    both, other = {"fruit": ["a photo of an apple", "a photo of an orange"]}, ["a photo of broccoli"]
    two = ClipJudge.of(both, "doodle", others=other)
    assert two.names(drawn[:3], ["fruit"]) == ["fruit", "fruit", OTHER]


def test_a_judge_of_ones_own_counts_what_the_card_cannot(tiny_pipe, clip, monkeypatch):
    card = dataclasses.replace(duge.model_card(tiny_pipe), open_words=True)
    monkeypatch.setattr(evaluation, "model_card", lambda pipe: card)
    told = ClipJudge.of({"a red hat": ["a photo of a red hat"], "apple": ["a photo of an apple"]}, "doodle")
    how = {"images": 2, "num_inference_steps": 1}
    table = duge.evaluate(tiny_pipe, ["a red hat", "apple"], judge=told, **how)
    assert set(table.mostly) <= {"a red hat", "apple", OTHER}
    for judge, known in ((None, "doodle"), (clip, "that was given")):
        with pytest.raises(ValueError, match=f"the judge {known} has no label for 'a red hat': .*ClipJudge"):
            duge.evaluate(tiny_pipe, ["a red hat"], judge=judge, **how)
