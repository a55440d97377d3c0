"""The door: what can be asked to go, by name, in any words, or spelled out."""

import pytest
from conftest import family, forget, undone

import duge_lite as duge
from duge_lite.concepts import Concept, model_card, wishes
from duge_lite.doodles import OBJECTS, STYLES, captions
from duge_lite.errors import UnknownConceptError


@pytest.fixture
def card(tiny_master):
    return model_card(tiny_master)


@pytest.fixture(scope="module")
def open_pipe(tokenizer):
    """Another Stable Diffusion: it reads any word."""
    return family("sd1", tokenizer)


def test_the_card_of_the_doodle_model(card):
    assert (card.name, card.concepts, card.styles) == ("doodle", OBJECTS, STYLES)
    related = {(name, other) for name, others in card.related.items() for other in others}
    assert set(card.related) <= set(OBJECTS) and all(a != b and (b, a) in related for a, b in related)
    for pair in ("apple/orange", "umbrella/parachute", "broccoli/tree", "car/airplane", "bow tie/sunglasses"):
        assert tuple(pair.split("/")) in related
    assert sorted(card.order) == sorted(OBJECTS) and card.order[:2] == ("apple", "broccoli")
    assert card.plain == {c: captions.prompt(c) for c in OBJECTS}
    assert card.labels == {c: (c,) for c in OBJECTS + STYLES}
    assert not card.settings and not card.open_words
    assert card.prompts("apple")[:3] == [f"a {way} of an apple" for way in ("photo", "sketch", "neon sign")]


def test_the_card_of_another_stable_diffusion(open_pipe):
    card = model_card(open_pipe)
    assert (card.name, card.styles, card.open_words) == ("stable-diffusion", STYLES, True)
    assert (card.guidance_scale, card.num_inference_steps) == (8.0, 50)
    assert len(card.concepts) == len(set(card.concepts)) == 21
    assert card.prompts("harp") == [captions.prompt("harp", style) for style in STYLES]
    assert card.prompt("English springer") == "a photo of an English springer"
    assert card.prompts("Eiffel Tower")[2] == "a neon sign of the Eiffel Tower"  # as its plain prompt says it
    assert card.prompts("neon")[1] == "a neon sign of broccoli" and card.nameless("harp")[2] == "a neon sign"
    (ways,) = card.paraphrases("corgi").values()  # phrasings: nobody taught it synonyms
    assert "a corgi, neon sign" in ways
    assert {*card.related, *sum(card.related.values(), ())} <= set(card.concepts)
    assert card.order[0] == "apple" and card.order[-1] == "English springer" and len(card.order) == 15
    known = set(card.concepts) - {"Eiffel Tower", "girl", "fruit"}  # ImageNet has none of these, nor styles
    assert set(card.judged) == set(card.labels) == known
    with pytest.raises(UnknownConceptError):
        card.check("mushroom")
    config = duge.UnlearnConfig(**card.settings)
    assert (config.batch_size, config.memory_batch_size, config.solver) == (2, 2, "exact")


def test_a_name_of_the_card(card):
    apple, neon = card.concept(" apple "), card.concept("neon")
    assert (apple.prompts, apple.instead, apple.labels) == (tuple(card.prompts("apple")), (), ("apple",))
    assert card.concept(apple) is apple == card.concept("Apple")
    pairs = dict(zip(neon.prompts, neon.instead, strict=True))
    assert pairs["a neon sign of a car"] == "a photo of a car" and pairs["a neon sign"] == "a photo"
    nameless, house = (card.concept("apple", instead) for instead in ("nameless", "house"))
    at = apple.prompts.index("a sketch of an apple")
    assert (nameless.instead[at], house.instead[at]) == ("a sketch", "a sketch of a house")


@pytest.mark.parametrize("word", ["brocoli", "Van Gogh", "", "photo"])
def test_a_word_that_the_doodle_model_never_read(tiny_pipe, word):
    hint = "Did you mean 'broccoli'" if word == "brocoli" else ""
    with pytest.raises(UnknownConceptError, match=f"is no concept.*{hint}.*Choose one of: apple, orange"):
        duge.unlearn(tiny_pipe, word)


def test_free_words_where_any_word_is_read(open_pipe):
    card = model_card(open_pipe)
    gogh = card.concept("Van Gogh")
    assert len(gogh.prompts) == len(gogh.instead) and not gogh.labels
    assert all(gogh.named_in(p) for p in gogh.prompts) and not any(map(gogh.named_in, gogh.instead))
    assert card.concept("APPLE") == Concept("apple", card.prompts("apple"), labels=["Granny Smith"])
    with pytest.raises(ValueError, match="a concept comes twice"):
        duge.unlearn(open_pipe, ["Van Gogh", "van gogh"])


@pytest.mark.parametrize(("name", "prompt", "named"), [
    ("apple", "a photo of an Apple next to a car", True),
    ("apple", "a photo of a pineapple", False),
    ("gas pump", "the gas pumps", False),
    ("C++", "code in C++ on a screen", True),
    ("dog", "his best friend", True),  # one of its prompts
])  # fmt: skip
def test_named_in(name, prompt, named):
    assert Concept(name, ["his best friend"]).named_in(prompt) is named


def test_wishes_lead_to_what_stays_whatever_the_order():
    apple = Concept("apple", ["an apple", "a neon apple"], ["a pear", "a neon pear"])
    neon = Concept("neon", ["a neon pear", "a neon apple"], ["a pear", "an apple"])
    ends = wishes([apple, neon], lambda c: c.instead)
    assert ends == wishes([neon, apple], lambda c: c.instead)
    assert set(ends) == {"an apple", "a neon apple", "a neon pear"} and set(ends.values()) == {"a pear"}


CIRCLE = [Concept("one", ["a"], ["b"]), Concept("two", ["b"], ["a"])]


@pytest.mark.parametrize(("call", "told"), [
    (lambda _: Concept("dog", []), "'dog' has no prompts"),
    (lambda _: Concept("dog", "my dog"), "prompts = 'my dog' of 'dog': expected a list"),
    (lambda _: Concept("dog", ["a dog"], "a cat"), "instead = 'a cat'"),
    (lambda _: Concept("dog", ["a dog"], ["a", "b"]), "'dog' has 1 prompts and 2 to .* expected one each"),
    (lambda _: wishes(CIRCLE, lambda c: c.instead), "is to go itself: ask for something that stays"),
    (lambda pipe: forget(pipe, ["star", "apple"], instead="star"), "is to go itself"),
    (lambda pipe: forget(pipe, "apple", instead="pear"), "'pear'"),
    (lambda pipe: forget(pipe, "apple", instead="sketch"), "'sketch' is a style"),
])  # fmt: skip
def test_what_is_no_concept_or_cannot_be_asked_instead_teaches(tiny_pipe, call, told):
    with undone(tiny_pipe, ValueError, told):
        call(tiny_pipe)


@pytest.mark.parametrize("instead", ["nearest", "nameless", "star"])
def test_a_concept_spelled_out_needs_no_instead(tiny_pipe, instead):
    mine = Concept("apple", ["a photo of an apple", "a photo of an apple next to a car"])
    history = forget(tiny_pipe, mine, instead=instead).history
    assert (history["attention after"] < history["attention before"]).all()


def test_memory_prompts_are_spread_over_concepts_and_styles(card):
    assert len(set(card.memory_prompts())) == len(card.concepts) * len(card.styles) + len(card.styles) + 1
    some = card.memory_prompts(20, seed=3)
    assert some == card.memory_prompts(20, seed=3) != card.memory_prompts(20, seed=4)
    assert all(sum(Concept(name, ["-"]).named_in(p) for p in some) == 1 for name in card.concepts)


def test_a_card_of_ones_own(tiny_pipe):
    mine = duge.ModelCard("mine", ("apple", "pear"), guidance_scale=2.0, settings={"memory_size": 5})
    run = duge.unlearn(tiny_pipe, "apple", card=mine, progress=False)
    assert run.config == duge.UnlearnConfig(memory_size=5)
    assert duge.solver.PictureBook.known(tiny_pipe).card is mine
