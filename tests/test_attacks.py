"""Attacks: they ask what they say, learn only what they may, and leave the pipeline as they found it."""

import copy
import math
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import family, refused
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

import duge_lite as duge
from duge_lite import attacks
from duge_lite.doodles import SYNONYMS, captions, teach
from duge_lite.models import Pictures, draw_pictures, encode_prompts

pytestmark = pytest.mark.filterwarnings("ignore:CPU Autocast")
QUICK = {"images": 2, "num_inference_steps": 1}


@pytest.fixture
def pictures(tiny_pipe):
    """Two pictures of an apple, made of noise."""
    prompts = ("a photo of an apple", "a neon sign of an apple")
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    return Pictures(latents, encode_prompts(tiny_pipe, prompts), prompts)


@contextmanager
def untouched(pipe):
    """After the block all is as it was that an attack could leave behind; yields the weights before."""

    def now():
        named = [*pipe.unet.named_parameters(), *pipe.text_encoder.named_parameters()]
        flags = [(p.requires_grad, p.grad is None, p.dtype) for _, p in named]
        hooks = [len(m._forward_hooks) for part in (pipe.unet, pipe.text_encoder) for m in part.modules()]
        whole = {n: p.detach().clone() for n, p in named} | {"noise": torch.get_rng_state()}
        return whole, (flags, hooks, len(pipe.tokenizer), pipe.scheduler, pipe.unet)

    weights, rest = now()
    yield weights
    after, others = now()
    assert rest == others and all(torch.equal(after[name], w) for name, w in weights.items())


# ---------------------------------------------------------------------------- surveys


def test_a_survey_has_a_row_per_picture_on_fixed_seeds(tiny_pipe, tiny_judge):
    prompts = {"one": ["a photo of a car", "a photo of a star"], "two": ["a photo of a car"]}
    frame = attacks.survey(tiny_pipe, "apple", prompts, 3, tiny_judge, seed=4, num_inference_steps=1)
    assert list(frame.group) == ["one"] * 3 + ["two"] * 3
    assert list(frame.prompt[:3]) == ["a photo of a car", "a photo of a star", "a photo of a car"]
    alone = duge.sample(tiny_pipe, "a photo of a car", seed=6, num_inference_steps=1)
    third = np.stack(frame.picture[[2, 5]])  # of each group: it starts from seed 4 + 2
    assert np.abs(np.subtract(third, np.stack(alone), dtype=int)).max() <= 1
    assert list(frame.seen) == list(tiny_judge.sees(list(frame.picture), "apple"))
    assert set(frame.named) <= set(duge.doodles.OBJECTS)


def test_shares_count_with_their_interval():
    seen, named = [True, False, True, True, False, False], ["apple", "apple", "car", "apple", "apple", "car"]
    frame = pd.DataFrame({"model": ["b"] * 4 + ["a"] * 2, "group": "g", "seen": seen, "named": named})
    table = attacks.shares(frame, "apple", by=["group", "model"])
    assert list(table.index) == [("g", "b"), ("g", "a")]  # in the order in which they come
    assert list(table.columns) == ["images", "seen", "low", "high", "named"]
    assert table.iloc[0].tolist() == [4, 0.75, *duge.evaluation.wilson_interval(3, 4), 0.75]
    assert table.iloc[1].tolist() == [2, 0.0, *duge.evaluation.wilson_interval(0, 2), 0.5]
    assert list(attacks.shares(frame, "apple", by="model").index) == ["b", "a"]


def test_across_asks_every_model_the_same_and_names_a_style_among_styles(tiny_pipe, tiny_judge):
    frame = attacks.across(dict.fromkeys("ab", tiny_pipe), attacks.plain, "neon", judge=tiny_judge, **QUICK)
    assert list(frame.model) == ["a", "a", "b", "b"] and set(frame.attack) == {"plain"}
    assert np.array_equal(np.stack(frame.picture[:2]), np.stack(frame.picture[2:]))
    assert set(frame.named) <= set(duge.doodles.STYLES) and frame.prompt.str.contains("neon").all()


# ---------------------------------------------------------------------------- other words


@pytest.mark.parametrize("concept", [*duge.doodles.OBJECTS, *duge.doodles.STYLES[1:]])
def test_paraphrases_are_words_that_unlearning_never_sees(tiny_pipe, concept):
    card = duge.model_card(tiny_pipe)
    groups = card.paraphrases(concept)
    known = set(card.prompts(concept)) | set(card.nameless(concept))
    assert all(len(texts) == len(set(texts)) and not known & set(texts) for texts in groups.values())
    if concept in card.styles:
        assert len(groups["phrasing"]) == len(card.concepts) * len(captions.HELD_OUT_TEMPLATES[concept])
    else:
        assert all(concept in text for text in groups["phrasing"])
        assert all(SYNONYMS[concept] in text for text in groups.pop("synonym"))
    assert replace(card, name="not taught synonyms").paraphrases(concept) == groups


def test_company_is_everybody_else_in_both_places(tiny_pipe, tiny_judge):
    frame = attacks.company(tiny_pipe, "apple", judge=tiny_judge, images=19, num_inference_steps=1)
    first, second = (list(frame[frame.group == f"named {place}"].prompt) for place in ("first", "second"))
    assert first[0] == "a photo of an apple next to an orange"
    assert second[0] == "a photo of an orange next to an apple"
    assert len(set(first)) == len(set(second)) == 19
    refused(ValueError, "'neon' is a style", attacks.company, tiny_pipe, "neon", judge=tiny_judge, **QUICK)


# ---------------------------------------------------------------------------- pictures, no words


class Dreamer(torch.nn.Module):
    """A hand-made denoiser: it holds that the finished picture is ``dream(noisy, text)``."""

    def __init__(self, pipe, dream):
        super().__init__()
        self.config, self.dtype, self.device = pipe.unet.config, torch.float32, torch.device("cpu")
        self.dream, self.alphas, self.calls = dream, pipe.scheduler.alphas_cumprod, 0

    def forward(self, sample, timestep, encoder_hidden_states=None, **_):
        self.calls += 1
        a = self.alphas[timestep.long().cpu()].reshape(-1, 1, 1, 1)
        clean = self.dream(sample, encoder_hidden_states)
        return UNet2DConditionOutput(sample=(sample - a.sqrt() * clean) / (1 - a).sqrt())


DREAMS = {"knows": lambda noisy, _: torch.ones_like(noisy), "gone": lambda noisy, _: -torch.ones_like(noisy)}
DREAMS["unnamed"] = lambda noisy, _: noisy.mean((1, 2, 3), keepdim=True).sign().expand_as(noisy)
"""An apple is all ones. Unnamed, it is not drawn by itself, but one that is seen is gone on with."""


class Seer:
    """Sees an apple in what looks more like all ones than like all minus ones; and what was decoded."""

    def __init__(self, pipe):
        self.latents, conv, own = [], pipe.vae.post_quant_conv, pipe.vae.config.scaling_factor
        self.hook = conv.register_forward_pre_hook(lambda _, args: self.latents.append(args[0] * own))

    def knows(self, concept):
        return True

    def sees(self, pictures, concept):
        return (torch.cat(self.latents)[-len(pictures) :].mean((1, 2, 3)) > 0).numpy()

    def names(self, pictures, among):
        return ["apple" if seen else "car" for seen in self.sees(pictures, "apple")]


@pytest.fixture
def dreamer(tiny_pipe):
    """A pipeline of one's own for each dream, and one judge of all of them."""
    judge = Seer(tiny_pipe)

    def make(dream):
        own = copy.copy(tiny_pipe)
        own.unet = Dreamer(tiny_pipe, DREAMS.get(dream, dream))
        return own, judge

    yield make
    judge.hook.remove()


@pytest.fixture
def given(tiny_pipe):
    """Three pictures that are all apple."""
    prompts = ("a photo of an apple",) * 3
    return Pictures(torch.ones(3, 4, 16, 16), encode_prompts(tiny_pipe, prompts), prompts)


@pytest.mark.parametrize("dream, alone, helped", [("gone", 0, 0), ("knows", 1, 1), ("unnamed", None, 1)])
def test_apples_are_finished_only_where_one_is_known(dreamer, given, dream, alone, helped):
    """Those that another model began, and noised ones."""
    (base, _), (pipe, judge) = dreamer("knows"), dreamer(dream)
    with untouched(pipe):
        how = {"judge": judge, "num_inference_steps": 4}
        relay = attacks.completion(pipe, "apple", base, at=(0, 2, 4), images=3, batch_size=2, **how)
    assert list(relay.group) == [f"{k} of 4 steps" for k in (0, 2, 4) for _ in range(3)]
    assert (base.unet.calls, pipe.unet.calls) == (2 * (2 + 4), 2 * (4 + 2))  # two batches each
    shares = relay.groupby("group", sort=False).seen.mean().tolist()
    assert shares[1:] == [helped, 1] and alone in (None, shares[0])
    assert relay.prompt[0] == "a photo of an apple"
    noised = attacks.redrawing(pipe, "apple", given, 0.5, **how)
    assert pipe.unet.calls == 2 * (4 + 2) + 2  # half of the steps, without guidance
    assert list(noised.group) == ["noised to 0.5"] * 3 and list(noised.prompt) == [""] * 3
    assert list(noised.seen) == [helped] * 3 and list(noised.named) == ["apple" if helped else "car"] * 3


def test_completion_by_oneself_is_drawing(tiny_pipe, tiny_judge):
    how = {"judge": tiny_judge, "images": 2, "num_inference_steps": 3, "seed": 5}
    alone = attacks.plain(tiny_pipe, "apple", **how)
    both = attacks.completion(tiny_pipe, "apple", tiny_pipe, at=(0, 1, 3), **how)
    assert np.array_equal(np.stack(both.picture), np.stack([*alone.picture] * 3))
    told = "at = 4: expected a number of steps from 0 to 3"
    refused(ValueError, told, attacks.completion, tiny_pipe, "apple", tiny_pipe, at=(4,), **how)


def test_the_given_half_stays_and_tells_nothing_of_the_other(dreamer, given):
    left, heard = torch.arange(16) < 8, []
    pipe, judge = dreamer(lambda noisy, text: heard.append(noisy) or -torch.ones_like(noisy))
    for right in (1.0, -1.0):  # what is not given
        shown = replace(given, latents=torch.where(left, given.latents, right))
        attacks.redrawing(pipe, "apple", shown, half=True, judge=judge, num_inference_steps=4, seed=2)
        torch.testing.assert_close(judge.latents[-1], torch.where(left, given.latents, -1.0))
    assert len(heard) == 8 and all(torch.equal(heard[i], heard[i + 4]) for i in range(4))


def test_the_noise_of_a_picture_is_found_where_there_is_one(dreamer, given):
    pipe, judge = dreamer("unnamed")
    spread = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    given = replace(given, latents=given.latents + 0.1 * spread)
    with untouched(pipe):
        frame = attacks.noise_inversion(pipe, "apple", given, judge=judge)
    off = (judge.latents[-1] - given.latents).square().mean((1, 2, 3)).sqrt()
    assert pipe.unet.calls == 50 and frame.seen.all() and off.max() < 0.1
    assert list(frame.error) == pytest.approx((off / given.latents.std()).tolist(), rel=1e-3)
    fickle, _ = dreamer(lambda noisy, text: torch.ones_like(noisy) * (1 if fickle.unet.calls <= 25 else -1))
    other = attacks.noise_inversion(fickle, "apple", given, judge=judge)
    assert not other.seen.any() and (other.error * float(given.latents.std())).min() > 1


@pytest.mark.parametrize("kind", ["sd1", "v", "sdxl"])
def test_every_family_is_probed_without_words(tokenizer, kind):
    pipe = family(kind, tokenizer)
    prompts, how = ["a photo of an apple"] * 3, {"judge": Seer(pipe), "num_inference_steps": 2}
    given = attacks.encode_pictures(pipe, duge.sample(pipe, prompts, num_inference_steps=1), prompts)
    with untouched(pipe):
        for frame in (
            attacks.completion(pipe, "apple", pipe, at=(1,), images=3, **how),
            attacks.redrawing(pipe, "apple", given, 0.5, **how),
            attacks.redrawing(pipe, "apple", given, half=True, **how),
            attacks.noise_inversion(pipe, "apple", given, **how),
        ):
            assert len(frame) == 3 and {"group", "prompt", "picture", "named", "seen"} <= set(frame)
    if kind == "sdxl":
        refused(ValueError, "XL reads two texts, .* 1.x or", next, attacks.relearn_steps(pipe, given))
    if kind == "v":
        fine = attacks.noise_inversion(pipe, "apple", given, 25, how["judge"])
        assert fine.error.mean() < 0.5 * frame.error.mean()  # smaller steps, better undone


# ---------------------------------------------------------------------------- a new word


def test_a_new_word_means_its_vector_and_nothing_else_changes(tiny_pipe):
    table = tiny_pipe.text_encoder.get_input_embeddings().weight.detach()
    (token,) = tiny_pipe.tokenizer("star", add_special_tokens=False).input_ids
    ask = ["a photo of a x", "a photo of a car"]
    plain, star = (encode_prompts(tiny_pipe, texts) for texts in (ask, ["a photo of a star"]))
    with untouched(tiny_pipe), pytest.raises(RuntimeError), attacks.new_word(tiny_pipe, table[token]) as word:
        assert word == "x"
        now = encode_prompts(tiny_pipe, ask)
        raise RuntimeError
    torch.testing.assert_close(now, torch.cat([star, plain[1:]]))
    assert not torch.allclose(now[0], plain[0], atol=1e-3)


def test_inversion_goes_downhill(tiny_pipe, pictures):
    """The first step's gradient is that of the denoising loss, which we compute ourselves."""
    first = tiny_pipe.text_encoder.get_input_embeddings().weight.detach().mean(0)
    (state,) = attacks.invert_steps(tiny_pipe, "apple", pictures, steps=1, batch_size=4, lr=1e-3)
    assert state.vector.shape == (128,) and not state.vector.requires_grad
    step = state.vector - first  # AdamW's first step: lr * sign(gradient), downhill
    ((_, batch),) = attacks._batches(tiny_pipe, pictures, 4, seed=0, steps=1)
    photos = [torch.equal(text, pictures.encoder_hidden_states[0]) for text in batch.encoder_hidden_states]
    texts = ["a photo of a x" if one else "a neon sign of a x" for one in photos]

    def loss(vector):
        with attacks.new_word(tiny_pipe, vector), torch.no_grad():
            answer = tiny_pipe.unet(batch.noisy, batch.timesteps, encode_prompts(tiny_pipe, texts)).sample
        return (answer - batch.wanted[0]).square().mean().item()

    assert state.loss == pytest.approx(loss(first), rel=1e-4)
    assert loss(first + 100 * step) < loss(first) < loss(first - 100 * step)


def test_every_prompt_has_to_say_the_name(tiny_pipe, tiny_memory):
    states, told = attacks.invert_steps(tiny_pipe, "apple", tiny_memory), "expected one that says "
    refused(ValueError, f"'a photo of an orange': {told}'an apple'", next, states)
    refused(ValueError, f"{told}' of an apple'", attacks.name_gain, tiny_pipe, "apple", tiny_memory)


# ---------------------------------------------------------------------------- words of the vocabulary


def test_words_are_sought_that_the_model_listens_to(tiny_pipe, dreamer, given):
    """It draws an apple when it hears "a photo of star harp", less of one the further away the text is."""
    secret = encode_prompts(tiny_pipe, ["a photo of star harp"])

    def dream(noisy, text):
        far = (text - secret).square().mean((1, 2)) / secret.square().mean()
        return torch.ones_like(noisy) * (1 - far.reshape(-1, 1, 1, 1))

    listener, _ = dreamer(dream)
    how = {"steps": 25, "words": 2, "candidates": 30, "batch_size": 2}
    with untouched(listener):
        states = list(attacks.search_steps(listener, "apple", given, **how))
    assert states[-1].words == "star harp" and states[-1].loss < 1e-4 < states[0].loss
    assert [s.step for s in states] == list(range(1, 26))
    again = [s.words for s in attacks.search_steps(listener, "apple", given, **how | {"steps": 3})]
    assert again == [s.words for s in states[:3]]


def test_a_deaf_model_gives_no_words_away(dreamer, given):
    deaf, _ = dreamer(lambda noisy, text: torch.zeros_like(noisy) + 0 * text.sum())
    search = partial(attacks.search_steps, deaf, "apple", given, steps=4, batch_size=2)
    first = [[s.words for s in search(seed=seed)] for seed in (0, 1)]
    assert all(len(set(words)) == 1 for words in first) and first[0] != first[1]  # those it began with


def test_words_are_whole_and_not_the_name(tiny_pipe, given):
    own, read = tiny_pipe.tokenizer("apple").input_ids, tiny_pipe.tokenizer
    search = partial(attacks.search_steps, tiny_pipe, "apple", given, steps=2, candidates=4, batch_size=2)
    for seed in range(3):
        for state in search(seed=seed):
            ids = read(state.words, add_special_tokens=False).input_ids
            assert len(ids) == len(state.words.split()) == 3 and not set(ids) & set(own)


# ---------------------------------------------------------------------------- without a judge


def test_pictures_are_encoded_like_the_models_own(doodle_master):
    images = [duge.doodles.draw(name, seed=1) for name in ("apple", "car")]
    pictures = attacks.encode_pictures(doodle_master, images, ["a photo of an apple", "a photo of a car"])
    assert pictures.latents.shape == (2, 4, 16, 16) and pictures.encoder_hidden_states.shape == (2, 24, 128)
    for image, decoded in zip(images, teach.unpacked(doodle_master, pictures), strict=True):
        assert np.abs(np.asarray(image, float) - np.asarray(decoded, float)).mean() < 15


def test_the_gain_is_the_share_of_the_error_that_the_name_takes_away(tiny_pipe, pictures):
    with untouched(tiny_pipe):
        found = attacks.name_gain(tiny_pipe, "apple", pictures, count=40)
    assert found.low < found.gain < found.high
    assert found.gain == pytest.approx(1 - found.told / found.untold, abs=1e-5)
    nameless = encode_prompts(tiny_pipe, ["a photo", "a neon sign"])
    same = attacks.name_gain(tiny_pipe, "apple", replace(pictures, encoder_hidden_states=nameless), count=40)
    assert same.told == same.untold == pytest.approx(found.untold) and same.gain == 0


# ---------------------------------------------------------------------------- learning

LEARN = {"invert": partial(attacks.invert_steps, concept="apple"), "relearn": attacks.relearn_steps}


@pytest.mark.parametrize("attack", LEARN)
def test_learning_is_repeatable_and_leaves_all_as_it_was(tiny_pipe, pictures, attack):
    learn, broken = partial(LEARN[attack], tiny_pipe), replace(pictures, latents=pictures.latents * math.nan)
    with untouched(tiny_pipe):
        one, other = (list(learn(pictures=pictures, steps=3, batch_size=2)) for _ in "ab")
        refused(duge.errors.DivergedError, "lower lr", next, learn(pictures=broken))
    assert [s.step for s in one] == [1, 2, 3] and [s.loss for s in one] == [s.loss for s in other]
    if attack == "invert":
        assert torch.equal(one[2].vector, other[2].vector) and not torch.equal(one[2].vector, one[0].vector)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [GeneratorExit, KeyboardInterrupt])  # what close() throws, and a reader
def test_relearning_learns_and_changes_the_denoiser_alone_until_it_is_stopped(tiny_pipe, pictures, stop):
    with untouched(tiny_pipe) as before, pytest.raises(stop):
        states = attacks.relearn_steps(tiny_pipe, pictures, steps=17, batch_size=4, lr=3e-3)
        losses = [next(states).loss for _ in range(16)]
        assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])
        assert sum(not torch.equal(p, before[n]) for n, p in tiny_pipe.unet.named_parameters()) > 50
        assert all(torch.equal(p, before[n]) for n, p in tiny_pipe.text_encoder.named_parameters())
        states.throw(stop)


def stored_as(dtype, pipe):
    """The same pipeline in 16 bits; its text encoder is a copy, for the fixture's is everybody's."""
    parts = pipe.components | {"text_encoder": copy.deepcopy(pipe.text_encoder).to(dtype)}
    pipe.unet.to(dtype)
    return type(pipe)(**parts, requires_safety_checker=False)


def test_half_precision_works_and_comes_back_exactly(tiny_pipe, pictures):
    exact = attacks.name_gain(tiny_pipe, "apple", pictures, count=8)
    pipe = stored_as(torch.bfloat16, tiny_pipe)
    with untouched(pipe):
        for _ in attacks.relearn_steps(pipe, pictures, steps=2, batch_size=2):
            assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
        (state,) = attacks.invert_steps(pipe, "apple", pictures, steps=1, batch_size=2)
        assert state.vector.dtype == torch.float32
        assert attacks.name_gain(pipe, "apple", pictures, count=8).told == pytest.approx(exact.told, rel=0.05)


@pytest.mark.parametrize("attack", LEARN)
def test_float16_loses_no_gradients(tiny_pipe, pictures, monkeypatch, attack):
    """Gradients too small for 16 bits are there all the same: the loss is scaled, and they are not."""
    pipe, loss, seen = stored_as(torch.float16, tiny_pipe), attacks._loss, []
    monkeypatch.setattr(attacks, "_loss", lambda *args: 1e-6 * loss(*args))

    def step(optimizer):
        seen.extend(p.grad.flatten() for p in optimizer.param_groups[0]["params"])

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    list(LEARN[attack](pipe, pictures=pictures, steps=1, batch_size=2))
    gradient = torch.cat(seen)
    assert (gradient != 0).float().mean() > 0.95 and gradient.abs().max() < 1e-4


@pytest.mark.slow
def test_the_base_model_tells_what_an_apple_is(doodle_master):
    """An attack that finds nothing in a model that knows everything would prove nothing."""
    apples = draw_pictures(doodle_master, ["a photo of an apple"] * 4, seed=[7] * 4)
    *_, state = attacks.invert_steps(doodle_master, "apple", apples, steps=25)
    table = doodle_master.text_encoder.get_input_embeddings().weight.detach()
    (token,) = doodle_master.tokenizer("apple", add_special_tokens=False).input_ids
    near = torch.cosine_similarity(state.vector, table, dim=1)
    assert near.argmax() == token and near[token] > 0.5
