"""The doodle world: drawings, captions, the tokenizer, and worlds without a concept."""

import itertools
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training import miniature_world
from transformers import CLIPTokenizer

from duge_lite.doodles import BACKGROUNDS, OBJECTS, STYLES, draw, negatives, prompt, train
from duge_lite.doodles.captions import HELD_OUT_TEMPLATES, SYNONYMS, TEMPLATES, caption, with_article
from duge_lite.doodles.draw import Scene, draw_scene, sample_scene
from duge_lite.doodles.negatives import KINDS, Nothing, draw_nothing
from duge_lite.doodles.train import COMPOUNDS, LABELS, MAX_TOKENS, World, _render, nothing_labels, tokenize
from duge_lite.doodles.unseen import UNSEEN, unseen
from duge_lite.errors import UnknownConceptError

seeds = st.integers(0, 2**32 - 1)


def pixels(*args, **kwargs) -> np.ndarray:
    return np.asarray(draw(*args, **kwargs)).astype(int)


def border(image: np.ndarray) -> np.ndarray:
    """The outermost ring of pixels, where no object reaches, (252, 3)."""
    return np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])


@pytest.fixture(scope="module")
def world() -> World:
    """400 pictures, drawn in this process."""
    return miniature_world(World, 400, 7)


def global_states() -> tuple:
    """Of the generators of Python, NumPy and torch that all share: none of this world may draw from them."""
    _, keys, position, *_ = np.random.get_state()
    return random.getstate(), keys.tolist(), position, torch.get_rng_state().tolist()


# Drawings


def test_the_world_has_what_was_promised_and_each_object_looks_like_itself_in_each_style():
    assert len(OBJECTS) == len(set(OBJECTS)) == 20 and len(BACKGROUNDS) == 6
    assert len(STYLES) == 5 and {"photo", "sketch", "neon", "mosaic"} < set(STYLES)
    assert [draw("harp", size=size).size for size in (32, 100)] == [(32, 32), (100, 100)]
    for style in STYLES:
        images = [draw(name, style=style, background="blue", seed=3) for name in OBJECTS]
        assert {(image.size, image.mode) for image in images} == {((64, 64), "RGB")}
        for i, name in enumerate(OBJECTS):  # another object is another picture
            difference = np.abs(np.subtract(images[i], images[i - 1], dtype=int)).max(-1)
            assert (difference > 24).mean() > 0.04, (name, style)


@given(st.sampled_from(OBJECTS), st.sampled_from(STYLES), st.sampled_from(list(BACKGROUNDS)), seeds)
def test_one_seed_one_picture(name, style, background, seed):
    before = global_states()
    once, again = (pixels(name, style, background, seed) for _ in range(2))
    assert global_states() == before and np.array_equal(once, again)
    assert not np.array_equal(once, pixels(name, style, background, seed + 1))


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_photo_lies_on_its_background_a_sketch_is_grey_on_white_and_neon_glows_on_black(background):
    for name, seed in itertools.product(OBJECTS, range(2)):
        ring = border(pixels(name, "photo", background, seed)).mean(0)
        assert min(BACKGROUNDS, key=lambda b: np.abs(ring - BACKGROUNDS[b]).sum()) == background
        sketch = pixels(name, "sketch", background, seed)
        assert border(sketch).min() > 200 and np.median(sketch) > 200
        assert np.ptp(sketch, axis=-1).max() < 24  # no colour
        neon = pixels(name, "neon", background, seed)
        assert np.median(border(neon)) < 60 and neon.max() > 180


def test_an_object_stays_inside_the_picture():
    pairs = itertools.product(OBJECTS, range(10))
    grazed = [(border(pixels(n, "sketch", seed=seed)).min(-1) < 200).mean() for n, seed in pairs]
    assert np.mean(np.array(grazed) > 0) < 0.1 and max(grazed) < 0.05  # a tip may graze the edge


def test_two_objects_stand_side_by_side():
    sides = set()
    for seed in range(12):
        image = pixels(["apple", "car"], seed=seed)
        redness = image[..., 0] - image[..., 2]  # the apple's, the car is blue
        red, blue = np.argwhere(redness > 90)[:, 1], np.argwhere(redness < -90)[:, 1]
        assert min(len(red), len(blue)) > 60
        left, right = sorted([red, blue], key=np.median)
        assert np.quantile(left, 0.95) < np.quantile(right, 0.05)
        sides.add(left is red)
    assert sides == {True, False}  # either may stand on the left


@pytest.mark.parametrize("call, arguments, message", [
    (draw, ["aple"], "'aple' is no object that is known here. Did you mean 'apple'"),
    (draw, ["apple", "fresco"], "'fresco' is no style.*photo, sketch, neon"),
    (draw, ["apple", "photo", "grene"], "'grene' is no background.*Did you mean 'green'"),
    (draw, [["apple", "appel"]], "Did you mean 'apple'"),
    (prompt, ["apple", "cubism"], "'cubism' is no style.*photo, sketch"),
    (draw, [[]], "one or two objects, not 0"),
    (draw, [["apple", "car", "harp"]], "one or two objects, not 3"),
])  # fmt: skip
def test_what_is_unknown_or_too_much_teaches(call, arguments, message):
    with pytest.raises(ValueError if "one or two" in message else UnknownConceptError, match=message):
        call(*arguments)


def test_sampled_scenes_cover_the_world_as_promised():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(4000)]
    objects, styles = Counter(n for s in scenes for n in s.objects), Counter(s.style for s in scenes)
    assert set(objects) == set(OBJECTS) and min(objects.values()) > 0.7 * max(objects.values())
    assert set(styles) == set(STYLES) and styles.most_common(1)[0][0] == "photo"
    grounds = {style: {s.background for s in scenes if s.style == style} for style in STYLES}
    assert grounds == dict.fromkeys(STYLES, set(BACKGROUNDS)) | {"sketch": {"white"}, "neon": {"black"}}
    pairs = [s for s in scenes if len(s.objects) == 2]
    assert 0.2 < len(pairs) / len(scenes) < 0.3 and all(len(set(s.objects)) == 2 for s in pairs)
    for chosen in (["apple"], ["apple", "car"]):
        assert {n for _ in range(50) for n in sample_scene(rng, chosen).objects} == set(chosen)


# Pictures of nothing, and the rule that none of them may pass for an object

COLORS = [part.color for name in OBJECTS for part in negatives._DRAWERS[name]()]


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_one_picture_of_nothing(kind):
    before = global_states()
    (one, told), again, (other, _) = (draw_nothing(np.random.default_rng(s), kind) for s in (3, 3, 4))
    assert global_states() == before and told == again[1] and told.kind == kind
    assert one.size == (64, 64) and one.mode == "RGB"
    assert np.array_equal(one, again[0]) and not np.array_equal(one, other)


@given(seeds, st.sampled_from(STYLES), st.sampled_from(COLORS))
def test_shapes_and_objects_in_pieces_keep_the_rule(seed, style, color):
    part = negatives.shape(np.random.default_rng(seed), color, style)
    h = negatives.hue(color)
    if negatives._is_circle(part):
        assert style != "sketch" and (h is None or 190 <= h <= 290)  # no apple, no orange
    elif part.width == 0 and len(part.points) == 3:
        assert h is None or not 60 < h < 180  # no tree
    elif part.width == 0 and not negatives._is_boxy(part):
        reach = np.linalg.norm(part.points, axis=1)
        assert reach.min() <= 0.55 * reach.max()  # nothing nearly round
        assert style != "mosaic" or h is None or 180 < h < 300
    parts = negatives._shapes(np.random.default_rng(seed), style)
    assert 1 <= len(parts) <= 6 and sum(map(negatives._is_circle, parts)) <= 1
    pieces = negatives._shuffled(np.random.default_rng(seed), "photo")  # all but the largest
    assert len(pieces) + 1 in {len(negatives._DRAWERS[name]()) for name in negatives.IN_PIECES}


def test_only_halves_that_differ_are_joined():
    halves = set(negatives.IN_HALVES)
    assert set().union(*negatives.ALIKE) <= halves and halves | set(negatives.IN_PIECES) <= set(OBJECTS)
    for name in halves:  # each finds a partner
        assert [n for n in halves if not any({n, name} <= group for group in negatives.ALIKE)]


def test_nothing_has_no_object_but_a_style_where_one_can_say():
    rng = np.random.default_rng(0)
    told = [draw_nothing(rng, style=style)[1] for style in STYLES for _ in range(20)]
    labels = nothing_labels(told)
    assert (labels[:, :20] == 0).all()
    for n, row in zip(told, labels, strict=True):
        assert row[20:25].nansum() == bool(n.style) and row[20:25].isnan().any() == (n.style is None)
        assert row[25:].nansum() == bool(n.background) and row[25:].isnan().any() == (n.background is None)
    (square,) = nothing_labels([Nothing("shapes", "neon", "black")])
    assert {LABELS[i] for i in square.nonzero()[:, 0]} == {"neon", "black background"}
    white = draw_nothing(rng, "blank", "photo", "white")[1]
    assert white.style is None and white.background == "white"  # a photo or a sketch? nobody can say


@pytest.mark.parametrize("kind", UNSEEN)
def test_the_report_has_kinds_of_its_own(kind):
    one, other = unseen(kind, 2)
    assert one.size == other.size == (64, 64) and not np.array_equal(one, other)
    assert np.array_equal(one, unseen(kind, 1)[0]) and kind not in KINDS


# Captions


@pytest.mark.parametrize("arguments, text", [
    (["apple"], "a photo of an apple"), (["umbrella", "neon"], "a neon sign of an umbrella"),
    (["broom", "sketch"], "a sketch of a broom"), (["sunglasses", "mosaic"], "a mosaic of sunglasses"),
    (["Eiffel Tower"], "a photo of Eiffel Tower"), (["my dog"], "a photo of my dog"),
    (["house", "watercolor"], "a watercolor painting of a house"),
    ([["apple", "bow tie"]], "a photo of an apple next to a bow tie"),
    (["car", "photo", "blue"], "a photo of a car on a blue background"),
])  # fmt: skip
def test_prompt(arguments, text):
    assert prompt(*arguments) == text


@given(seeds, st.sampled_from([0.0, 0.08, 1.0]))
def test_a_caption_names_its_objects(seed, share):
    before, rng = global_states(), np.random.default_rng(seed)
    draw_scene(scene := sample_scene(rng), rng)
    text = caption(scene, rng, synonyms=share)
    assert global_states() == before
    for name in scene.objects:
        by_name, by_synonym = (with_article(n) in text for n in (name, SYNONYMS[name]))
        assert {0.0: by_name, 1.0: by_synonym}.get(share, by_name or by_synonym)
    assert not [n for n in set(OBJECTS) - set(scene.objects) if re.search(rf"\b{n}\b", text)]


def test_captions_vary_and_mostly_use_the_name_and_synonyms_are_other_words():
    rng = np.random.default_rng(0)
    texts = [caption(Scene(("apple",)), rng) for _ in range(300)]
    assert len(set(texts)) > 8 and 0.85 < np.mean(["an apple" in t for t in texts]) < 0.98
    assert {t for t in texts if " background" in t} and {t for t in texts if " wall" in t}
    others = set(SYNONYMS.values())
    assert set(SYNONYMS) == set(OBJECTS) and len(others) == len(SYNONYMS)
    assert others.isdisjoint([*OBJECTS, *" ".join(OBJECTS).split()])


def test_held_out_phrasings_are_never_trained():
    assert set(HELD_OUT_TEMPLATES) == set(TEMPLATES) == set(STYLES)
    held_out, rng = {t for group in HELD_OUT_TEMPLATES.values() for t in group}, np.random.default_rng(0)
    for style in STYLES:
        texts = {caption(Scene(("harp",), style), rng, synonyms=0) for _ in range(200)}
        bare = {re.sub(" (on|in front of) a .*", "", text) for text in texts}
        assert bare <= {t.format("a harp") for t in TEMPLATES[style]}
        assert bare.isdisjoint(t.format("a harp") for t in held_out) and held_out.isdisjoint(TEMPLATES[style])


# The world that training sees


@pytest.mark.slow
def test_world_is_drawn_picture_by_picture(world):
    assert world.images.shape == (400, 64, 64, 3) and world.images.dtype == np.uint8
    images, scenes, captions = _render((7, 250, 252))  # another job draws the same picture 250
    assert np.array_equal(images, world.images[250:252]) and tuple(scenes) == world.scenes[250:252]
    assert tuple(map(tuple, captions)) == world.captions[250:252]
    assert not np.array_equal(_render((8, 250, 251))[0], images[:1])
    assert {len(c) for c in world.captions} == {train.CAPTIONS_PER_IMAGE}


@pytest.mark.slow
@pytest.mark.parametrize("concept", ["apple", "bow tie", "neon"])
def test_a_world_without_a_concept(world, concept):
    kept = [i for i, s in enumerate(world.scenes) if concept not in (*s.objects, s.style)]
    less = world.without([concept])
    assert 0 < len(less.captions) == len(kept) < 400 and np.array_equal(less.images, world.images[kept])
    assert less.scenes == tuple(world.scenes[i] for i in kept)
    unwanted = re.compile(rf"\b({concept}|{SYNONYMS.get(concept, concept)})\b")
    assert not [t for texts in less.captions for t in texts if unwanted.search(t)]
    with pytest.raises(ValueError, match="no scene shows 'unicorn'"):
        world.without([concept, "unicorn"])


def test_labels_say_what_is_there_and_a_batch_is_scaled_to_the_unit_interval(world):
    labels = world.labels()
    assert labels.shape == (400, len(LABELS)) and len(LABELS) == len(set(LABELS)) == 31
    for scene, row in zip(world.scenes, labels, strict=True):
        names = {name for name, value in zip(LABELS, row, strict=True) if value == 1}
        assert names == {*scene.objects, scene.style, f"{scene.background} background"}
        assert row.sum() == len(scene.objects) + 2
    back = ((world.batch([3, 1]) + 1) * 127.5).round().permute(0, 2, 3, 1)  # (2, 64, 64, 3)
    assert np.array_equal(back.numpy(), world.images[[3, 1]])


# The tokenizer


def test_tokenizer_splits_compounds_in_two_reads_every_caption_and_survives_saving(
    tokenizer, captions_of_the_world, tmp_path
):
    for first, second in COMPOUNDS:
        assert tokenizer.tokenize(first + second) == [first, second + "</w>"]
        assert tokenizer.tokenize(f"a {first}{second}")[1:] == [first, second + "</w>"]
    for text in captions_of_the_world:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert len(ids) <= MAX_TOKENS  # no caption is cut
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer) and loaded.model_max_length == MAX_TOKENS
    texts = [*captions_of_the_world, *map("".join, COMPOUNDS), "Zyx ☃", ""]
    assert torch.equal(tokenize(loaded, texts), tokenize(tokenizer, texts))


def test_tokenizer_reads_any_case_and_unknown_words_and_pads(tokenizer):
    assert tokenizer("A PHOTO of an Apple").input_ids == tokenizer("a photo of an apple").input_ids
    strange = tokenizer("zyx, 42 naïve ☃").input_ids
    assert tokenizer.decode(strange, skip_special_tokens=True).strip() == "zyx , 4 2 naïve ☃"
    ids = tokenize(tokenizer, ["a photo of a car", "", "car " * 60])
    assert ids.shape == (3, MAX_TOKENS) and ids[2, -1] == tokenizer.eos_token_id
    assert ids[1].tolist() == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * (MAX_TOKENS - 1)
