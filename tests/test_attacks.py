"""Attacks: they ask what they say, learn only what they may, and leave the pipeline as they found it."""

import copy
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import duge_lite as duge
from duge_lite import attacks, checks
from duge_lite.doodles import SYNONYMS, captions
from duge_lite.errors import DivergedError, UnknownConceptError
from duge_lite.evaluation import wilson_interval
from duge_lite.models import Pictures, encode_prompts

QUICK = {"images": 2, "num_inference_steps": 1}


@pytest.fixture
def pictures(tiny_pipe):
    """Two pictures of an apple, made of noise."""
    prompts = ("a photo of an apple", "a neon sign of an apple")
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    return Pictures(latents, encode_prompts(tiny_pipe, prompts), prompts)


def fingerprint(pipe):
    """All weights, gradients, flags and hooks that an attack could leave behind."""
    modules = [m for part in (pipe.unet, pipe.text_encoder) for m in part.modules()]
    named = [*pipe.unet.named_parameters(), *pipe.text_encoder.named_parameters()]
    weights = {n: p.detach().clone() for n, p in named}
    flags = [(p.requires_grad, p.grad is None, p.dtype) for _, p in named]
    return weights, flags, [len(m._forward_hooks) for m in modules], len(pipe.tokenizer)


def unchanged(pipe, before):
    weights, *rest = fingerprint(pipe)
    return rest == list(before[1:]) and all(torch.equal(w, before[0][n]) for n, w in weights.items())


# ---------------------------------------------------------------------------- surveys


def test_a_survey_has_a_row_per_picture_on_fixed_seeds(tiny_pipe, tiny_judge):
    prompts = {"one": ["a photo of a car", "a photo of a star"], "two": ["a photo of a car"]}
    frame = attacks.survey(
        tiny_pipe, "apple", prompts, images=3, judge=tiny_judge, seed=4, num_inference_steps=1
    )
    assert list(frame.group) == ["one"] * 3 + ["two"] * 3
    assert list(frame.prompt[:3]) == ["a photo of a car", "a photo of a star", "a photo of a car"]
    alone = duge.sample(tiny_pipe, "a photo of a car", seed=6, num_inference_steps=1)[0]
    for i in (2, 5):  # the third of each group starts from seed 4 + 2
        assert np.abs(np.asarray(frame.picture[i], int) - np.asarray(alone, int)).max() <= 1
    assert list(frame.seen) == list(tiny_judge.sees(list(frame.picture), "apple"))
    assert set(frame.named) <= set(duge.doodles.OBJECTS)


def test_a_style_is_named_among_styles(tiny_pipe, tiny_judge):
    frame = attacks.plain(tiny_pipe, "neon", judge=tiny_judge, **QUICK)
    assert set(frame.named) <= set(duge.doodles.STYLES)
    assert all("neon" in prompt for prompt in frame.prompt)


def test_what_is_unknown_is_said(tiny_pipe, tiny_judge):
    with pytest.raises(UnknownConceptError, match="apple"):
        attacks.plain(tiny_pipe, "aple", judge=tiny_judge, **QUICK)


def test_shares_count_with_their_interval():
    frame = pd.DataFrame(
        {
            "model": ["b"] * 4 + ["a"] * 2,
            "group": "g",
            "seen": [True, False, True, True, False, False],
            "named": ["apple", "apple", "car", "apple", "apple", "car"],
        }
    )
    table = attacks.shares(frame, "apple", by=["group", "model"])
    assert list(table.index) == [("g", "b"), ("g", "a")]  # in the order in which they come
    assert list(table.images) == [4, 2] and list(table.seen) == [0.75, 0.0]
    assert list(table.named) == [0.75, 0.5]
    assert (table.low.iloc[0], table.high.iloc[0]) == wilson_interval(3, 4)
    assert (table.low.iloc[1], table.high.iloc[1]) == wilson_interval(0, 2)
    assert list(attacks.shares(frame, "apple", by="model").index) == ["b", "a"]


def test_compare_asks_every_model_the_same(tiny_pipe, tiny_judge):
    frame = attacks.compare({"a": tiny_pipe, "b": tiny_pipe}, attacks.plain, "car", judge=tiny_judge, **QUICK)
    one, two = (frame[frame.model == name] for name in "ab")
    assert len(one) == len(two) == 2 and set(frame.attack) == {"plain"}
    assert all(
        np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(one.picture, two.picture, strict=True)
    )


# ---------------------------------------------------------------------------- other words


@pytest.mark.parametrize("concept", [*duge.doodles.OBJECTS, *duge.doodles.STYLES[1:]])
def test_paraphrases_are_words_that_unlearning_never_sees(tiny_pipe, concept):
    card = duge.model_card(tiny_pipe)
    groups = card.paraphrases(concept)
    known = set(card.prompts(concept)) | set(card.nameless(concept))
    assert all(len(texts) == len(set(texts)) and not known & set(texts) for texts in groups.values())
    if concept in card.styles:
        assert list(groups) == ["phrasing"]
        assert len(groups["phrasing"]) == len(card.concepts) * len(captions.HELD_OUT_TEMPLATES[concept])
    else:
        assert list(groups) == ["phrasing", "synonym"]
        assert all(concept in text for text in groups["phrasing"])
        assert all(SYNONYMS[concept] in text for text in groups["synonym"])


def test_synonyms_are_those_that_a_model_was_taught(tiny_pipe):
    card = replace(duge.model_card(tiny_pipe), name="some other model")
    groups = card.paraphrases("apple")
    assert list(groups) == ["phrasing"] and not any("pippin" in text for text in groups["phrasing"])


def test_company_is_everybody_else_in_both_places(tiny_pipe, tiny_judge):
    frame = attacks.company(tiny_pipe, "apple", judge=tiny_judge, images=19, num_inference_steps=1)
    first, second = (list(frame[frame.group == f"named {place}"].prompt) for place in ("first", "second"))
    assert first[0] == "a photo of an apple next to an orange"
    assert second[0] == "a photo of an orange next to an apple"
    assert len(set(first)) == len(set(second)) == 19


def test_a_style_keeps_no_company(tiny_pipe, tiny_judge):
    with pytest.raises(ValueError, match="'neon' is a style"):
        attacks.company(tiny_pipe, "neon", judge=tiny_judge, **QUICK)


def test_leakage_never_says_the_name_and_dreams_are_unguided(tiny_pipe, tiny_judge):
    sizes = []
    hook = tiny_pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    frame = attacks.leakage(tiny_pipe, "apple", judge=tiny_judge, **QUICK)
    hook.remove()
    assert not any("apple" in prompt for prompt in frame.prompt)
    assert list(frame.prompt[:2]) == ["", ""] and len(set(frame.prompt[2:])) == 2
    assert sizes == [2, 4]  # two pictures, without guidance; two with it


# ---------------------------------------------------------------------------- a new word


def test_a_new_word_means_its_vector_and_nothing_else_changes(tiny_pipe):
    table = tiny_pipe.text_encoder.get_input_embeddings().weight.detach()
    (token,) = tiny_pipe.tokenizer("star", add_special_tokens=False).input_ids
    ask = ["a photo of a x", "a photo of a car"]
    plain = encode_prompts(tiny_pipe, ask)
    before = fingerprint(tiny_pipe)
    with attacks.new_word(tiny_pipe, table[token]) as word:
        assert word == "x"
        now = encode_prompts(tiny_pipe, ask)
    star = encode_prompts(tiny_pipe, ["a photo of a star"])
    torch.testing.assert_close(now[:1], star)
    torch.testing.assert_close(now[1], plain[1])
    assert not torch.allclose(now[0], plain[0], atol=1e-3)
    assert unchanged(tiny_pipe, before)


def test_a_new_word_is_forgotten_after_an_error(tiny_pipe):
    before = fingerprint(tiny_pipe)
    with pytest.raises(RuntimeError), attacks.new_word(tiny_pipe, torch.zeros(128)):
        raise RuntimeError
    assert unchanged(tiny_pipe, before)


def test_inversion_learns_a_vector_and_only_that(tiny_pipe, pictures):
    before, noise = fingerprint(tiny_pipe), torch.get_rng_state()
    states = list(attacks.invert_steps(tiny_pipe, "apple", pictures, steps=3, batch_size=2))
    assert [s.step for s in states] == [1, 2, 3]
    assert states[-1].vector.shape == (128,) and not states[-1].vector.requires_grad
    assert not torch.equal(states[0].vector, states[1].vector)
    assert unchanged(tiny_pipe, before) and torch.equal(noise, torch.get_rng_state())
    again = list(attacks.invert_steps(tiny_pipe, "apple", pictures, steps=3, batch_size=2))
    assert torch.equal(states[-1].vector, again[-1].vector)


def test_inversion_goes_downhill(tiny_pipe, pictures):
    """The first step's gradient is that of the denoising loss, which we compute ourselves."""
    table = tiny_pipe.text_encoder.get_input_embeddings().weight.detach()
    (token,) = tiny_pipe.tokenizer("star", add_special_tokens=False).input_ids
    settings = {"steps": 1, "batch_size": 4, "lr": 1e-3, "start": "star"}
    (state,) = attacks.invert_steps(tiny_pipe, "apple", pictures, **settings)
    step = state.vector - table[token]  # AdamW's first step: lr * sign(gradient), downhill
    batch = next(attacks._batches(tiny_pipe, pictures, 4, seed=0))
    first = [torch.equal(text, pictures.encoder_hidden_states[0]) for text in batch.encoder_hidden_states]
    texts = ["a photo of a x" if one else "a neon sign of a x" for one in first]

    def loss(vector):
        with attacks.new_word(tiny_pipe, vector), torch.no_grad():
            text = encode_prompts(tiny_pipe, texts)
            answer = tiny_pipe.unet(batch.noisy, batch.timesteps, text).sample
        return (answer - batch.wanted[0]).square().mean().item()

    assert state.loss == pytest.approx(loss(table[token]), rel=1e-4)
    assert loss(table[token] + 100 * step) < loss(table[token]) < loss(table[token] - 100 * step)


def test_inversion_needs_the_name_in_every_prompt(tiny_pipe, tiny_memory):
    with pytest.raises(ValueError, match="'a photo of an orange': expected one that says 'an apple'"):
        next(attacks.invert_steps(tiny_pipe, "apple", tiny_memory))


# ---------------------------------------------------------------------------- without a judge


def test_pictures_are_encoded_like_the_models_own(doodle_master):
    images = [duge.doodles.draw(name, seed=1) for name in ("apple", "car")]
    pictures = attacks.encode_pictures(doodle_master, images, ["a photo of an apple", "a photo of a car"])
    assert pictures.latents.shape == (2, 4, 16, 16) and pictures.encoder_hidden_states.shape == (2, 24, 128)
    with torch.no_grad():
        scaled = pictures.latents / doodle_master.vae.config.scaling_factor
        again = doodle_master.image_processor.postprocess(doodle_master.vae.decode(scaled).sample)
    for image, decoded in zip(images, again, strict=True):
        assert np.abs(np.asarray(image, float) - np.asarray(decoded, float)).mean() < 15


def test_the_gain_is_the_share_of_the_error_that_the_name_takes_away(tiny_pipe, pictures):
    before = fingerprint(tiny_pipe)
    found = attacks.name_gain(tiny_pipe, "apple", pictures, count=40)
    assert found.gain == pytest.approx(1 - found.told / found.untold, abs=1e-5)
    assert found.low < found.gain < found.high
    nameless = Pictures(
        pictures.latents, encode_prompts(tiny_pipe, ["a photo", "a neon sign"]), pictures.prompts
    )
    same = attacks.name_gain(tiny_pipe, "apple", nameless, count=40)
    assert same.told == same.untold == pytest.approx(found.untold) and same.gain == 0
    assert unchanged(tiny_pipe, before)
    with pytest.raises(ValueError, match="expected one that says ' of a car'"):
        attacks.name_gain(tiny_pipe, "car", pictures)


# ---------------------------------------------------------------------------- relearning


def test_relearning_changes_the_denoiser_and_puts_it_back(tiny_pipe, pictures):
    before, noise = fingerprint(tiny_pipe), torch.get_rng_state()
    losses = []
    for state in attacks.relearn_steps(tiny_pipe, pictures, steps=3, batch_size=2):
        now = fingerprint(tiny_pipe)[0]
        changed = [n for n, w in now.items() if not torch.equal(w, before[0][n])]
        assert len(changed) > 50  # not the text encoder's
        assert not set(changed) & {n for n, _ in tiny_pipe.text_encoder.named_parameters()}
        losses.append(state.loss)
    assert unchanged(tiny_pipe, before) and torch.equal(noise, torch.get_rng_state())
    again = [s.loss for s in attacks.relearn_steps(tiny_pipe, pictures, steps=3, batch_size=2)]
    assert losses == again and len(losses) == 3


def test_relearning_learns(tiny_pipe, pictures):
    losses = [s.loss for s in attacks.relearn_steps(tiny_pipe, pictures, steps=16, batch_size=4, lr=3e-3)]
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])


@pytest.mark.parametrize("how", ["close", "throw"])
def test_relearning_puts_back_what_it_had_when_it_is_stopped(tiny_pipe, pictures, how):
    before = fingerprint(tiny_pipe)
    states = attacks.relearn_steps(tiny_pipe, pictures, steps=5, batch_size=2)
    next(states)
    if how == "close":
        states.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            states.throw(KeyboardInterrupt())
    assert unchanged(tiny_pipe, before)


@pytest.mark.filterwarnings("ignore:CPU Autocast only supports")
def test_half_precision_works_and_comes_back_exactly(tiny_pipe, pictures):
    exact = attacks.name_gain(tiny_pipe, "apple", pictures, count=8)
    own = copy.deepcopy(tiny_pipe.text_encoder)  # the fixture's is everybody's
    pipe = type(tiny_pipe)(**tiny_pipe.components | {"text_encoder": own}, requires_safety_checker=False)
    pipe.unet.to(torch.bfloat16)
    own.to(torch.bfloat16)
    before = fingerprint(pipe)
    for _ in attacks.relearn_steps(pipe, pictures, steps=2, batch_size=2):
        assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
    (state,) = attacks.invert_steps(pipe, "apple", pictures, steps=1, batch_size=2)
    assert state.vector.dtype == torch.float32
    assert attacks.name_gain(pipe, "apple", pictures, count=8).told == pytest.approx(exact.told, rel=0.05)
    assert unchanged(pipe, before)


@pytest.mark.parametrize("attack", ["invert", "relearn"])
def test_what_is_no_number_stops_the_attack(tiny_pipe, pictures, attack):
    broken = Pictures(pictures.latents * math.nan, pictures.encoder_hidden_states, pictures.prompts)
    before = fingerprint(tiny_pipe)
    with pytest.raises(DivergedError, match="lower lr"):
        if attack == "invert":
            next(attacks.invert_steps(tiny_pipe, "apple", broken))
        else:
            next(attacks.relearn_steps(tiny_pipe, broken))
    assert unchanged(tiny_pipe, before)


@pytest.mark.slow
def test_a_relearning_survey_looks_before_and_along_the_way(tiny_pipe, tiny_judge, pictures):
    before = fingerprint(tiny_pipe)
    frame = attacks.relearning(
        tiny_pipe, "apple", pictures, pictures, at=(0, 1, 3), lr=1e-2, judge=tiny_judge, **QUICK
    )
    assert list(frame.step) == [0, 0, 1, 1, 3, 3]
    one, _, _, other = (np.asarray(frame.picture[i], int) for i in (0, 1, 2, 4))
    assert np.abs(one - other).max() > 1
    assert unchanged(tiny_pipe, before)
    late = attacks.relearning(
        tiny_pipe, "apple", pictures, pictures, at=(1,), lr=1e-2, judge=tiny_judge, **QUICK
    )
    gain = attacks.name_gain(tiny_pipe, "apple", pictures).gain
    assert frame.gain[0] == frame.gain[1] == gain != frame.gain[2] == late.gain[0]
    counts = attacks.shares(frame, "apple", "step")
    assert counts.gain[0] == pytest.approx(gain) and counts.told[3] == pytest.approx(frame.told[4])
    assert np.array_equal(np.asarray(late.picture[0]), np.asarray(frame.picture[2]))


@pytest.mark.slow
def test_the_base_model_tells_what_an_apple_is(doodle_master):
    """An attack that finds nothing in a model that knows everything would prove nothing."""
    card = duge.model_card(doodle_master)
    drawn = duge.sample(
        doodle_master, card.prompt("apple"), seed=[7], num_inference_steps=10, output_type="latent"
    )
    prompts = (card.prompt("apple"),) * 4
    apples = Pictures(drawn.repeat(4, 1, 1, 1), encode_prompts(doodle_master, prompts), prompts)
    *_, state = attacks.invert_steps(doodle_master, "apple", apples, steps=25)
    table = doodle_master.text_encoder.get_input_embeddings().weight.detach()
    (token,) = doodle_master.tokenizer("apple", add_special_tokens=False).input_ids
    near = torch.cosine_similarity(state.vector, table, dim=1)
    assert near.argmax() == token and near[token] > 0.5


# ---------------------------------------------------------------------------- the exercise


def test_recovery_time_knows_right_from_wrong():
    def right(curve, level):
        reached = curve.index[curve >= level]
        return reached[0] if len(reached) else math.inf

    assert checks.recovery_time(right)
    wrong = {
        "position": lambda curve, level: next((i for i, v in enumerate(curve) if v >= level), math.inf),
        "equals": lambda curve, level: next((i for i, v in curve.items() if v > level), math.inf),
        "last": lambda curve, level: max((i for i, v in curve.items() if v < level), default=0) + 5,
        "math.inf": lambda curve, level: next((i for i, v in curve.items() if v >= level), 20),
    }
    hints = {name: checks.recovery_time(function) for name, function in wrong.items()}
    assert not any(hints.values())
    assert "not its position" in hints["position"].message and "math.inf" in hints["math.inf"].message
    assert "reached it" in hints["equals"].message
    assert "not yet" in checks.recovery_time(lambda curve, level: ...).message
