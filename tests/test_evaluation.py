"""Pictures on fixed seeds, read by a judge; and the judge itself."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import duge_lite as duge
from duge_lite import evaluation
from duge_lite.doodles import BACKGROUNDS, OBJECTS, STYLES, captions, draw
from duge_lite.doodles.train import LABELS
from duge_lite.doodles.unseen import UNSEEN, unseen
from duge_lite.errors import ModelNotFoundError, UnknownConceptError
from duge_lite.evaluation import OTHER, ClipJudge, Judge, kid, wilson_interval

COLUMNS = ["accuracy", "low", "high", "images", "mostly"]


# Wilson's interval


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [  # (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96
        (0, 10, 0.0, 0.27754),  # z² / (n + z²) = 3.8416 / 13.8416
        (10, 10, 0.72246, 1.0),
        (5, 10, 0.23659, 0.76341),  # 0.5 ± 1.96 * sqrt(1/40 + 3.8416/400) / 1.38416
        (1, 1, 0.20654, 1.0),  # 1 / 4.8416
        (81, 263, 0.25525, 0.36621),  # Newcombe (1998), table I
        (15, 148, 0.06236, 0.16054),
    ],
)
def test_wilson_by_hand(hits, count, low, high):
    assert wilson_interval(hits, count) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share_and_is_symmetric(hits_and_count):
    hits, count = hits_and_count
    low, high = wilson_interval(hits, count)
    assert 0 <= low < high <= 1 and low - 1e-12 <= hits / count <= high + 1e-12
    mirrored = wilson_interval(count - hits, count)
    assert (1 - high, 1 - low) == pytest.approx(mirrored)
    wider, narrower = high - low, np.subtract(*wilson_interval(4 * hits, 4 * count)[::-1])
    assert narrower < wider


@pytest.mark.parametrize(("hits", "count"), [(-1, 3), (4, 3), (0, 0)])
def test_wilson_teaches(hits, count):
    with pytest.raises(ValueError, match=f"{hits} hits of {count}: expected"):
        wilson_interval(hits, count)


# The judge's interface, on random weights


def pictures(count: int) -> list[Image.Image]:
    return [draw(OBJECTS[i % 20], STYLES[i % 5], seed=i) for i in range(count)]


def test_scores_are_the_models_logits_by_name(tiny_judge):
    images = pictures(3)
    scores = tiny_judge.scores(images)
    assert scores.shape == (3, 31) and list(scores.columns) == list(LABELS)
    pixels = np.stack([np.asarray(i) for i in images]).transpose(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        logits = tiny_judge.model(torch.tensor(pixels, dtype=torch.float32)).logits
    np.testing.assert_allclose(scores.to_numpy(), logits.numpy(), atol=1e-5)
    some = tiny_judge.scores(images, ["tree", "apple"])
    pd.testing.assert_frame_equal(some, scores[["tree", "apple"]])


def test_many_pictures_are_scored_in_parts(tiny_judge):
    images = pictures(130)
    whole = tiny_judge.scores(images)
    np.testing.assert_allclose(whole[126:], tiny_judge.scores(images[126:]), atol=1e-5)


def test_names_and_sees_follow_the_scores(tiny_judge):
    images, among = pictures(20), ["car", "harp", "star"]
    scores = tiny_judge.scores(images)
    named = tiny_judge.names(images, among)
    for i, name in enumerate(named):
        assert scores.loc[i, name] == max(scores.loc[i, n] for n in among)
    for label in LABELS:
        np.testing.assert_array_equal(tiny_judge.sees(images, label), scores[label] > 0)
    assert 0 < np.mean([tiny_judge.sees(images, label) for label in LABELS]) < 1


@pytest.mark.parametrize(("temperature", "threshold", "logit"), [(1.0, 0.5, 0.0), (2.0, 0.8, 2.772589)])
def test_the_threshold_comes_from_the_judges_config(tiny_judge, tmp_path, temperature, threshold, logit):
    assert tiny_judge.threshold is None  # never calibrated: it has to choose
    tiny_judge.model.save_pretrained(tmp_path)
    model = type(tiny_judge.model).from_pretrained(tmp_path)
    model.config.calibration = {"temperature": temperature, "threshold": threshold}
    model.save_pretrained(tmp_path), tiny_judge.processor.save_pretrained(tmp_path)
    told = Judge.load(tmp_path)
    assert told.threshold == pytest.approx(logit)  # temperature * log(p / (1 - p))


@pytest.fixture
def strict(tiny_judge, monkeypatch) -> Judge:
    """A judge that sees what has a logit above 1; three pictures: a clear one, a doubtful one, none."""
    scores = pd.DataFrame({"apple": [5.0, 0.9, -3.0], "orange": [1.2, 0.8, -4.0], "car": [-2.0, 0.1, -2.0]})
    monkeypatch.setattr(Judge, "threshold", 1.0)
    monkeypatch.setattr(Judge, "labels", list(scores.columns))
    monkeypatch.setattr(Judge, "scores", lambda _, images, among: scores[: len(images)][list(among)])
    return tiny_judge


def test_below_its_threshold_a_judge_says_something_else(strict):
    assert strict.names(pictures(3), ["apple", "orange", "car"]) == ["apple", OTHER, OTHER]
    assert strict.names(pictures(3), ["orange", "car"]) == ["orange", OTHER, OTHER]
    assert strict.names(pictures(3), ["car"]) == [OTHER] * 3
    assert strict.sees(pictures(3), "orange").tolist() == [True, False, False]
    assert strict.sees(pictures(3), "car").tolist() == [False] * 3


def test_what_is_nothing_counts_as_gone_and_as_lost(tiny_pipe, strict):
    table = duge.evaluate(
        tiny_pipe, ["apple"], images=3, num_inference_steps=1, judge=Oracle(["apple", OTHER, OTHER])
    )
    assert table.accuracy["apple"] == pytest.approx(1 / 3) and table.mostly["apple"] == OTHER


SAID = ["Granny Smith", "convertible", "teapot"]
MEANT = {"apple": ("Granny Smith",), "car": ("sports car, sport car", "convertible"), "harp": ("harp",)}


@pytest.fixture
def told(tiny_judge, monkeypatch):
    """A judge with other words for what it sees; each picture shows the next of SAID."""
    labels = ["harp", "sports car, sport car", "convertible", "Granny Smith", "teapot"]
    scores = pd.DataFrame(
        [[5.0 if label == said else -3.0 for label in labels] for said in SAID], columns=labels
    )
    monkeypatch.setattr(Judge, "labels", labels)
    monkeypatch.setattr(Judge, "scores", lambda _, images, among: scores[: len(images)][list(among)])
    return dataclasses.replace(tiny_judge, words=MEANT)


def test_a_judge_knows_concepts_by_its_own_words(told):
    assert told.names(pictures(3), ["apple", "car", "harp"]) == ["apple", "car", "apple"]  # it has to choose
    assert told.sees(pictures(3), "car").tolist() == [False, True, False]  # by any of its words for it
    assert told.knows("car") and not told.knows("convertible") and not told.knows("fruit")
    with pytest.raises(UnknownConceptError, match="'fruit' is no label of this judge"):
        told.names(pictures(1), ["apple", "fruit"])


def test_a_judge_with_an_open_choice_may_say_something_else(told):
    free = dataclasses.replace(told, open_choice=True)
    assert free.names(pictures(3), ["apple", "car", "harp"]) == ["apple", "car", OTHER]
    assert free.names(pictures(3), ["apple", "harp"]) == ["apple", OTHER, OTHER]
    assert free.sees(pictures(3), "apple").tolist() == [True, False, False]


def test_the_cards_judge_knows_the_cards_concepts(doodle_master):
    card = duge.model_card(doodle_master)
    judge = Judge.load(card)
    assert all(judge.knows(c) for c in card.forgettable) and not judge.open_choice
    drawn = [draw("car", "sketch"), draw("harp", "neon")]
    assert judge.names(drawn, card.judged) == ["car", "harp"] == Judge.load().names(drawn, card.concepts)
    assert judge.names(drawn, card.styles) == ["sketch", "neon"]


def test_what_the_judge_has_no_label_for_cannot_be_counted(tiny_pipe, tiny_judge, monkeypatch):
    card = duge.model_card(tiny_pipe)
    poor = dataclasses.replace(card, labels={c: v for c, v in card.labels.items() if c != "harp"})
    monkeypatch.setattr(evaluation, "model_card", lambda pipe: poor)
    with pytest.raises(ValueError, match="the judge doodle has no label for 'harp': it cannot be counted"):
        duge.evaluate(tiny_pipe, ["harp"], images=1, num_inference_steps=1)
    table = duge.evaluate(tiny_pipe, images=1, num_inference_steps=1, judge=tiny_judge)
    assert "harp" not in table.index and len(table) == 19


def test_a_label_that_the_judge_was_not_taught_teaches(tiny_judge):
    with pytest.raises(UnknownConceptError, match="'corgi' is no label of this judge"):
        tiny_judge.names(pictures(1), ["apple", "corgi"])


def test_judge_survives_saving(tiny_judge, tmp_path):
    tiny_judge.model.save_pretrained(tmp_path)
    tiny_judge.processor.save_pretrained(tmp_path)
    loaded = Judge.load(tmp_path)
    assert loaded.labels == list(LABELS) and not loaded.model.training
    images = pictures(4)
    pd.testing.assert_frame_equal(loaded.scores(images), tiny_judge.scores(images))
    assert Judge.load(str(tmp_path)).labels == list(LABELS)


@pytest.mark.parametrize("missing", ["nowhere", "no/such/folder", "/no/such/folder"])
def test_a_missing_judge_teaches(missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=f"no judge at {missing}.*save_pretrained"):
        Judge.load(missing)


def test_a_judge_goes_where_the_pipeline_is(tiny_pipe, tiny_judge, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "default_device", lambda: torch.device("meta"))
    tiny_judge.model.save_pretrained(tmp_path)
    tiny_judge.processor.save_pretrained(tmp_path)
    assert Judge.load(tmp_path).model.device.type == "meta"
    assert Judge.load(tmp_path, "cpu").pixels(pictures(1)).device.type == "cpu"
    asked = []
    monkeypatch.setattr(Judge, "load", lambda *where: asked.append(where[1]) or tiny_judge)
    duge.evaluate(tiny_pipe, ["apple"], images=1, num_inference_steps=1)
    assert asked == [tiny_pipe.device]


def test_a_missing_doodle_judge_teaches(tmp_path, monkeypatch):
    monkeypatch.setattr(duge.evaluation, "data_dir", lambda: tmp_path)
    with pytest.raises(ModelNotFoundError, match="doodle-judge"):
        Judge.load()


def test_a_broken_judge_teaches(tiny_judge, tmp_path):
    tiny_judge.model.save_pretrained(tmp_path)
    tiny_judge.processor.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelNotFoundError, match="no judge at"):
        Judge.load(tmp_path)


# evaluate


def test_evaluate_returns_what_it_documents(tiny_pipe, tiny_judge):
    table = duge.evaluate(tiny_pipe, ["harp", "apple"], images=3, judge=tiny_judge, num_inference_steps=2)
    assert list(table.columns) == COLUMNS
    assert list(table.index) == ["harp", "apple"] and table.index.name == "concept"
    assert (table.images == 3).all() and set(table.mostly) <= set(OBJECTS)
    for row in table.itertuples():
        hits = round(row.accuracy * 3)
        assert row.accuracy == hits / 3
        assert (row.low, row.high) == wilson_interval(hits, 3)


class Oracle:
    """A judge that knows the answers: it reads the pictures' serial numbers."""

    def __init__(self, answers):
        self.answers = answers

    def knows(self, concept):
        return True

    def names(self, images, among):
        assert list(among) == list(OBJECTS)
        assert len(images) == len(self.answers)
        return self.answers


def test_evaluate_counts_by_hand(tiny_pipe):
    judge = Oracle(["apple", "apple", "orange", "apple", "car", "car", "harp", "apple"])
    table = duge.evaluate(tiny_pipe, ["apple", "harp"], images=4, judge=judge, num_inference_steps=1)
    assert table.accuracy.tolist() == [0.75, 0.25]
    assert table.mostly.tolist() == ["apple", "car"]


def test_evaluate_takes_all_concepts_by_default(tiny_pipe):
    table = duge.evaluate(tiny_pipe, images=1, judge=Oracle(list(OBJECTS)), num_inference_steps=1)
    assert list(table.index) == list(OBJECTS) and (table.accuracy == 1).all()


def test_a_style_is_drawn_with_the_objects_in_turn_and_named_among_styles(tiny_pipe, monkeypatch):
    asked, among_what = [], {}

    def spy(pipe, prompts, *how, **more):
        asked.extend(prompts)
        return [Image.new("RGB", (64, 64))] * len(prompts)

    class Styles:
        def knows(self, concept):
            return True

        def names(self, images, among):
            among_what[tuple(among)] = len(images)
            return (["neon", "photo", "neon"] if "neon" in among else ["apple"] * 3)[: len(images)]

    monkeypatch.setattr(duge.evaluation, "sample", spy)
    table = duge.evaluate(tiny_pipe, ["apple", "neon"], images=3, judge=Styles())
    assert asked[:3] == ["a photo of an apple"] * 3
    assert asked[3:] == ["a neon sign of an apple", "a neon sign of an orange", "a neon sign of a broccoli"]
    assert among_what == {tuple(OBJECTS): 3, tuple(STYLES): 3}
    assert table.accuracy.tolist() == [1.0, pytest.approx(2 / 3)]


def test_same_seeds_same_numbers(tiny_pipe, tiny_judge):
    arguments = dict(concepts=["harp", "apple"], images=2, judge=tiny_judge, num_inference_steps=2)
    torch.manual_seed(1)
    once = duge.evaluate(tiny_pipe, **arguments)
    torch.manual_seed(2)
    pd.testing.assert_frame_equal(once, duge.evaluate(tiny_pipe, **arguments), check_exact=True)


class Collector:
    def __init__(self):
        self.images = []

    def knows(self, concept):
        return True

    def names(self, images, among):
        self.images += [np.asarray(i).astype(int) for i in images]
        return [among[0]] * len(images)


def test_picture_i_is_the_same_whatever_else_is_asked(tiny_pipe):
    calls = []
    for concepts, images in ((["apple"], 2), (["harp", "car", "apple"], 2), (["apple"], 4)):
        calls.append(collector := Collector())
        duge.evaluate(tiny_pipe, concepts, images=images, judge=collector, num_inference_steps=2)
    alone, last_of_three, first_of_four = (c.images for c in calls)
    for i in range(2):
        assert np.abs(alone[i] - last_of_three[4 + i]).max() <= 1  # of 255: batches may round
        assert np.abs(alone[i] - first_of_four[i]).max() <= 1
    assert np.abs(alone[0] - alone[1]).max() > 1


def test_settings_reach_the_sampler(tiny_pipe, tiny_judge, monkeypatch):
    seen = {}

    def spy(pipe, prompts, seed, num_inference_steps, guidance_scale, **settings):
        seen.update(prompts=prompts, seed=seed, steps=num_inference_steps, guidance_scale=guidance_scale)
        return pictures(len(prompts))

    monkeypatch.setattr(duge.evaluation, "sample", spy)
    duge.evaluate(
        tiny_pipe,
        ["apple", "sunglasses"],
        images=2,
        style="sketch",
        judge=tiny_judge,
        num_inference_steps=7,
        guidance_scale=2.5,
        seed=40,
    )
    assert seen["prompts"] == ["a sketch of an apple"] * 2 + ["a sketch of sunglasses"] * 2
    assert seen["seed"] == [40, 41, 40, 41]
    assert seen["steps"] == 7 and seen["guidance_scale"] == 2.5


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        ({"concepts": "apple"}, TypeError, "concepts = 'apple': expected a list of names"),
        ({"concepts": 3}, TypeError, "concepts = 3: expected a list of names"),
        ({"concepts": []}, ValueError, "0 concepts, 10 images: expected at least one of each"),
        ({"concepts": [3]}, UnknownConceptError, "3"),
        ({"images": "4"}, TypeError, "images = '4': expected a whole number"),
        ({"images": 0}, ValueError, "20 concepts, 0 images: expected at least one of each"),
    ],
)
def test_evaluate_says_what_is_of_the_wrong_kind(tiny_pipe, tiny_judge, wrong, error, sentence):
    with pytest.raises(error, match=sentence):
        duge.evaluate(tiny_pipe, judge=tiny_judge, **wrong)


def test_evaluate_teaches(tiny_pipe, tiny_judge):
    with pytest.raises(UnknownConceptError, match="Did you mean 'umbrella'"):
        duge.evaluate(tiny_pipe, ["umbrela"], judge=tiny_judge)
    with pytest.raises(UnknownConceptError, match="'cubism' is no style"):
        duge.evaluate(tiny_pipe, ["apple"], style="cubism", judge=tiny_judge)


# The shipped judge and model


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


@pytest.fixture(scope="module")
def fresh() -> pd.DataFrame:
    """100 drawings that training never saw: every object in every style."""
    rows = [(name, style) for name in OBJECTS for style in STYLES]
    frame = pd.DataFrame(rows, columns=["object", "style"])
    grounds = list(BACKGROUNDS)
    frame["background"] = [grounds[(7 * i) % 6] for i in range(100)]
    frame.loc[frame["style"] == "sketch", "background"] = "white"
    frame.loc[frame["style"] == "neon", "background"] = "black"
    frame["image"] = [
        draw(r.object, r.style, r.background, seed=90_000 + i) for i, r in enumerate(frame.itertuples())
    ]
    return frame


def test_the_judge_names_fresh_drawings(judge, fresh):
    images = list(fresh.image)
    assert np.mean(np.array(judge.names(images, OBJECTS)) == fresh["object"]) >= 0.97
    assert np.mean(np.array(judge.names(images, STYLES)) == fresh["style"]) >= 0.97
    grounds = [f"{b} background" for b in BACKGROUNDS]
    named = np.array(judge.names(images, grounds))
    assert np.mean(named == fresh["background"] + " background") >= 0.97


@pytest.mark.slow
def test_the_judge_sees_what_is_there_and_nothing_else(judge, fresh):
    seen = np.stack([judge.sees(list(fresh.image), name) for name in OBJECTS], axis=1)
    there = np.array([[name == shown for name in OBJECTS] for shown in fresh["object"]])
    assert seen[there].mean() >= 0.95
    assert seen[~there].mean() <= 0.01


def test_the_judge_knows_that_nothing_is_there(judge):
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    blank = [np.full((64, 64, 3), color, dtype=np.uint8) for color in BACKGROUNDS.values()]
    nothing = [Image.fromarray(x) for x in (*noise, *blank)]
    for ground in BACKGROUNDS.values():  # a red square is no apple
        square = Image.new("RGB", (64, 64), ground)
        square.paste((216, 38, 44), (18, 18, 46, 46))
        nothing.append(square)
    assert judge.names(nothing, OBJECTS) == [OTHER] * len(nothing)
    assert not any(judge.sees(nothing, name).any() for name in OBJECTS)


@pytest.mark.parametrize("kind", UNSEEN)
def test_the_judge_takes_nothing_for_nothing(judge, kind):
    """Kinds of pictures that training never saw; the data card holds the numbers of more of them."""
    named = judge.names(unseen(kind, 40, seed=5), OBJECTS)
    assert named.count(OTHER) >= 36


def test_the_judge_finds_both_of_two(judge):
    pairs = [(a, OBJECTS[(i + 7) % 20]) for i, a in enumerate(OBJECTS)]
    images = [draw(pair, seed=91_000 + i) for i, pair in enumerate(pairs)]
    scores = judge.scores(images, OBJECTS)
    found = [set(row.nlargest(2).index) == set(pair) for (_, row), pair in zip(
        scores.iterrows(), pairs, strict=True
    )]  # fmt: skip
    assert np.mean(found) >= 0.9


def test_unlearning_accuracy_alone_rewards_noise(judge, tiny_pipe):
    """A model that never learned anything has "forgotten" nearly everything."""
    concepts = list(OBJECTS)
    table = duge.evaluate(tiny_pipe, concepts, images=2, judge=judge, num_inference_steps=2)
    assert 1 - table.accuracy.mean() >= 0.9


@pytest.mark.slow
def test_the_shipped_model_draws_what_it_is_asked_for(doodle_master, judge):
    concepts = ["apple", "orange", "umbrella", "car"]
    table = duge.evaluate(doodle_master, concepts, images=4, judge=judge, num_inference_steps=10)
    assert table.accuracy.mean() >= 0.9


@pytest.mark.nightly
def test_the_shipped_model_knows_its_whole_world(doodle_master, judge):
    table = duge.evaluate(doodle_master, images=10, judge=judge)
    assert table.accuracy.mean() >= 0.97
    assert table.accuracy.min() >= 0.8
    for style in STYLES[1:]:
        prompts = [duge.doodles.prompt(name, style) for name in OBJECTS]
        images = duge.sample(doodle_master, prompts, seed=500)
        assert np.mean(np.array(judge.names(images, STYLES)) == style) >= 0.9


# Distances between sets of pictures


def drawings(name: str, first: int, count: int = 40) -> list:
    return [draw(name, seed=first + i) for i in range(count)]


def test_kid_tells_the_same_world_from_another(judge):
    same = kid(drawings("apple", 0), drawings("apple", 1000), judge)
    other = kid(drawings("apple", 0), drawings("harp", 1000), judge)
    assert abs(same) < 0.1 * other


def test_kid_is_repeatable_and_leaves_the_global_state_alone(tiny_judge):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    a, b = drawings("apple", 0, 8), drawings("orange", 0, 8)
    assert kid(a, b, tiny_judge) == kid(a, b, tiny_judge)
    assert torch.equal(torch.random.get_rng_state(), state)


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


def test_kid_draws_no_lots(tiny_judge, monkeypatch):
    """Not on CUDA either, whose global generator `torch.manual_seed` would set."""
    for name in ("manual_seed", "randperm", "rand", "randn"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("it drew lots"))
    kid(drawings("apple", 0, 3), drawings("orange", 0, 4), tiny_judge)  # other numbers of pictures, too


def test_kid_wants_more_than_one_picture(tiny_judge):
    with pytest.raises(ValueError, match="1 and 8 pictures: expected at least two"):
        kid(drawings("apple", 0, 1), drawings("apple", 0, 8), tiny_judge)


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
    with pytest.raises(ModelNotFoundError, match="no CLIP at"):
        ClipJudge.of({}, "/nowhere")


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


def test_code_that_comes_with_a_judge_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    folder, ran = tmp_path / "judge", tmp_path / "ran"
    shutil.copytree(duge.data_dir() / "doodle-judge", folder)
    told = {"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "mine.Mine"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Mine: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    with pytest.raises(ModelNotFoundError):
        Judge.load(folder)
    assert not ran.exists()
