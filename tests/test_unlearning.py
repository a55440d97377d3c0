"""The loop: what it trains, what it leaves alone, and how it stops."""

import copy
import dataclasses
import gc
import math
import os
import subprocess
import sys
from collections import Counter

import pandas as pd
import pytest
import torch
from conftest import with_own_unet
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from duge_lite.lessons import DUGE, Pictures, draw_pictures, encode_prompts, memory_prompts

import duge_lite as duge
from duge_lite import baselines, unlearning
from duge_lite.attention import cross_attention_layers
from duge_lite.doodles import OBJECTS, STYLES
from duge_lite.errors import DivergedError, UnknownConceptError
from duge_lite.losses import prior_preservation_loss
from duge_lite.models import model_card
from duge_lite.unlearning import (
    TRAINABLE,
    UnlearnConfig,
    plain_parameters,
    trainable_parameters,
    unlearn,
    unlearn_steps,
)

TINY = UnlearnConfig(
    iterations=2, batch_size=2, memory_batch_size=2, target_size=2, memory_size=3, lessons=6, lambda_prior=1.0
)


def tiny(**changes) -> UnlearnConfig:
    return dataclasses.replace(TINY, **changes)


def weights(pipe) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in plain_parameters(pipe.unet).items() if "lora" not in n}


def changed(pipe, before: dict[str, torch.Tensor]) -> set[str]:
    now = weights(pipe)
    return {name for name, value in before.items() if not torch.equal(now[name], value)}


def footprint(pipe) -> list:
    """All that the loop must put back: flags, precision, gradients, processors, mode."""
    unet = pipe.unet
    flags = [(n, p.requires_grad, p.dtype, p.grad) for n, p in unet.named_parameters()]
    return [flags, dict(unet.attn_processors), unet.training]


@pytest.fixture
def forget(tiny_pipe, tiny_memory):
    """Runs the loop on this test's tiny pipeline."""

    def run(concept="apple", memory=tiny_memory, on_step=None, pipe=tiny_pipe, **changes):
        return unlearn(pipe, concept, tiny(**changes), memory, on_step, progress=False)

    return run


# The settings


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("protect", 1.5, "protect = 1.5: expected a share from 0"),
        ("lessons", 0, "lessons = 0: expected a whole number, at least 1"),
        ("rank", 0, "rank = 0: expected a whole number, at least 1"),
        ("reference", "mine", "reference = 'mine': choose one of base, previous"),
        ("anchor", None, "anchor = None: choose one of base, previous"),
        ("iterations", 0, "iterations = 0: expected a whole number, at least 1"),
        ("iterations", 1.5, "iterations = 1.5: expected a whole number"),
        ("batch_size", -1, "batch_size = -1: expected a whole number"),
        ("memory_batch_size", 0, "memory_batch_size = 0"),
        ("target_size", "8", "target_size = '8': expected a whole number"),
        ("memory_size", None, "memory_size = None"),
        ("lr", 0, "lr = 0: expected a number above 0"),
        ("lr", float("nan"), "lr = nan"),
        ("grad_clip", float("inf"), "grad_clip = inf"),
        ("lambda_attention", -1, r"lambda_attention = -1: expected 0 \(off\) or more"),
        ("lambda_prior", float("inf"), "lambda_prior = inf"),
        ("lambda_regularization", float("nan"), "lambda_regularization = nan"),
        ("scale", -0.5, "scale = -0.5: expected 0"),
        ("revisit", 1.0, "revisit = 1.0: expected a share from 0"),
        ("without", "", "without = '': choose one of empty, nameless"),
        ("target", "positive", "target = 'positive': choose one of uncond, negative, clamped"),
        ("match", "maps", "match = 'maps': choose one of output, probs"),
        ("train", "all", "train = 'all': choose one of cross_attention, kv, qk, full, lora"),
    ],
)
def test_config_teaches(name, value, message):
    with pytest.raises(ValueError, match=message):
        UnlearnConfig(**{name: value})


def test_config_refuses_probabilities_as_outputs():
    with pytest.raises(ValueError, match='goes with match = "probs" only'):
        UnlearnConfig(target="clamped")
    assert UnlearnConfig(target="clamped", match="probs").match == "probs"


def test_config_is_frozen_and_prints_as_a_table():
    config = UnlearnConfig(lr=0.5, target="uncond")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0
    table = config.table()
    assert list(table.index) == [f.name for f in dataclasses.fields(UnlearnConfig)]
    assert table.loc["lr", "value"] == 0.5 and table.loc["target", "value"] == "uncond"


# The memory


@pytest.mark.parametrize("size", [1, 16, 19, 95, 128, 300])
@pytest.mark.parametrize("forgotten", [["apple"], ["tree", "apple", "gas pump"]])
def test_memory_is_spread_evenly_and_never_names_the_forgotten(tiny_master, size, forgotten):
    card = model_card(tiny_master)
    prompts = memory_prompts(card, forgotten, size)
    assert len(prompts) == size
    kept = [c for c in OBJECTS if c not in forgotten]
    known = {card.prompt(c, s): (c, s) for c in kept for s in STYLES}
    assert set(prompts) <= set(known)  # nothing else, so nothing forgotten
    concepts = Counter({c: 0 for c in kept})
    concepts.update(known[p][0] for p in prompts)
    styles = Counter({s: 0 for s in STYLES})
    styles.update(known[p][1] for p in prompts)
    assert max(concepts.values()) - min(concepts.values()) <= 1
    assert max(styles.values()) - min(styles.values()) <= 2
    assert len(set(prompts)) == min(size, len(known))


def test_memory_prompts_follow_their_seed(tiny_master):
    card = model_card(tiny_master)
    one, again, two = (memory_prompts(card, ["apple"], 40, seed=s) for s in (1, 1, 2))
    assert one == again != two


def test_no_memory_without_anything_to_keep(tiny_master):
    with pytest.raises(ValueError, match="nothing is left for the memory"):
        memory_prompts(model_card(tiny_master), OBJECTS, 4)


def test_pictures_are_what_the_pipeline_draws_and_reads(tiny_master):
    prompts = ["a photo of a car", "a sketch of a harp", "a photo of a car"]
    pictures = draw_pictures(tiny_master, prompts, seed=4)
    assert pictures.latents.shape == (3, 4, 16, 16)
    assert pictures.encoder_hidden_states.shape == (3, 24, 128)
    latents = duge.sample(tiny_master, prompts, seed=4, steps=10, latents=True)
    assert torch.equal(pictures.latents, latents)
    for prompt, states in zip(prompts, pictures.encoder_hidden_states, strict=True):
        embeds, _ = tiny_master.encode_prompt(prompt, "cpu", 1, False)
        torch.testing.assert_close(states, embeds[0])


def test_pictures_are_drawn_on_seeds_of_their_own(tiny_pipe, monkeypatch):
    """The pictures that unlearning sees are not those that evaluation judges, nor another run's."""
    used = []

    def spy(pipe, prompts, seed, **kwargs):
        used.append(set(range(seed, seed + len(prompts))))
        return torch.zeros(len(prompts), 4, 16, 16)

    monkeypatch.setattr(duge.lessons, "sample", spy)
    for seed in range(3):
        next(unlearn_steps(tiny_pipe, "apple", tiny(seed=seed)))
    used.append(set(range(10_000)))  # evaluation's
    assert len(used) == 7
    assert len(set.union(*used)) == sum(map(len, used))


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """The prompts that were drawn: of the concept, then of the memory. One picture of each is enough."""
    seen = []

    def spy(pipe, prompts, seed):
        seen.append(list(prompts))
        return draw_pictures(pipe, prompts[:1], seed)

    for module in (duge.unlearning, duge.lessons):
        monkeypatch.setattr(module, "draw_pictures", spy)
    return seen


def test_target_pictures_show_the_concept_in_every_style(tiny_pipe, asked):
    next(unlearn_steps(tiny_pipe, "bow tie", tiny(target_size=7, memory_size=30)))
    target, memory = asked
    assert len(target) == 7 and len(memory) == 30
    assert set(target) == set(model_card(tiny_pipe).prompts("bow tie"))
    assert not [text for text in memory if "bow tie" in text]


# What is trained


IN_PLACE = [train for train in TRAINABLE if train != "lora"]


@pytest.mark.parametrize("train", IN_PLACE)
@pytest.mark.parametrize("match", ["output", "probs"])
def test_only_the_chosen_weights_learn(tiny_pipe, forget, train, match):
    before = weights(tiny_pipe)
    names = list(before)
    parts = {"cross_attention": ("to_q", "to_k", "to_v", "to_out"), "full": ()}
    parts |= {"kv": ("to_k", "to_v"), "qk": ("to_q", "to_k")}
    expected = {n for n in names if any(f".attn2.{part}" in n for part in parts[train])}
    # the prior loss reaches the whole UNet, so that what is told to learn does
    forget(train=train, match=match, lambda_prior=1.0, iterations=3)
    moved = changed(tiny_pipe, before)
    if train == "full":
        assert len(moved) > 0.9 * len(names)
    else:
        assert moved == expected
        assert len(expected) == len(cross_attention_layers(tiny_pipe.unet)) * {
            "cross_attention": 5, "kv": 2, "qk": 2
        }[train]  # fmt: skip


def test_the_rest_of_the_pipeline_is_left_alone(tiny_pipe, forget):
    parts = (tiny_pipe.text_encoder, tiny_pipe.vae)
    before = [copy.deepcopy(p.state_dict()) for p in parts]
    config = dict(tiny_pipe.scheduler.config)
    forget(train="full")
    for part, state in zip(parts, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in part.state_dict().items())
        assert all(p.grad is None for p in part.parameters())
    assert dict(tiny_pipe.scheduler.config) == config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("match", "target"),
    [("output", "negative"), ("output", "uncond"), ("probs", "negative"), ("probs", "clamped")],
)
def test_the_attention_loss_falls(forget, match, target):
    run = forget(match=match, target=target, iterations=12, lambda_prior=0.0)
    assert run.history.forget.iloc[-3:].mean() < 0.9 * run.history.forget.iloc[:2].mean()


def test_the_first_iteration_finds_the_model_unchanged(forget):
    first = forget(iterations=1).history.loc[1]
    assert first.prior == pytest.approx(0, abs=1e-9)
    assert first.regularization == pytest.approx(0, abs=1e-9)  # the anchor is kept in 16 bits
    assert first.forget > 0


def test_loss_is_the_weighted_sum(forget):
    run = forget(lambda_attention=2.0, lambda_prior=30.0, lambda_regularization=500.0, iterations=3)
    h = run.history
    total = 2 * h.forget + 30 * h.prior + 500 * h.regularization
    pd.testing.assert_series_equal(h.loss, total, check_names=False, rtol=1e-5)
    assert h.prior.iloc[-1] > 0 and h.regularization.iloc[-1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("off", ["lambda_attention", "lambda_prior", "lambda_regularization"])
def test_each_loss_can_be_switched_off(tiny_pipe, forget, off):
    losses = {"lambda_attention": 0.0, "lambda_prior": 0.0, "lambda_regularization": 0.0}
    before = weights(tiny_pipe)
    forget(**losses)
    assert not changed(tiny_pipe, before)  # nothing pulls
    results = []
    for value in (0.0, 50.0):
        run = forget(**{"lambda_prior": 1.0, off: value}, iterations=3)
        results.append(weights(tiny_pipe))
        run.restore()
    assert any(not torch.equal(results[0][n], results[1][n]) for n in before)


@pytest.mark.slow
def test_without_the_prior_loss_the_memory_does_not_matter(tiny_pipe, tiny_memory, forget):
    other = Pictures(tiny_memory.latents.flip(0) * 2, tiny_memory.encoder_hidden_states, tiny_memory.prompts)
    results = []
    for memory in (tiny_memory, other):
        run = forget(memory=memory, lambda_prior=0.0)
        results.append(weights(tiny_pipe))
        run.restore()
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@pytest.mark.slow
def test_regularization_holds_the_weights(tiny_pipe, forget):
    ends = []
    for pull in (0.0, 1e6):
        run = forget(lambda_regularization=pull, iterations=6, grad_clip=1e9)
        ends.append(run.history.regularization.iloc[-1])
        run.restore()
    assert ends[1] < 0.9 * ends[0]


# One seed, one result; and the way back


@pytest.mark.slow
def test_one_seed_one_result_bit_for_bit(tiny_pipe, forget):
    results = []
    for seed, noise in ((3, 11), (3, 22), (4, 33)):
        torch.manual_seed(noise)  # the global state must not matter
        run = forget(memory=None, seed=seed)
        results.append((weights(tiny_pipe), run.history))
        run.restore()
    (one, h1), (again, h2), (other, _) = results
    pd.testing.assert_frame_equal(h1, h2, check_exact=True)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_global_random_state_is_left_alone(forget):
    before = torch.get_rng_state()
    forget(memory=None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("train", IN_PLACE)
def test_restore_brings_back_every_bit(tiny_pipe, forget, train):
    before = weights(tiny_pipe)
    run = forget(train=train)
    assert changed(tiny_pipe, before)
    run.restore()
    assert not changed(tiny_pipe, before)
    run.restore()  # twice does no harm
    assert not changed(tiny_pipe, before)


def test_the_run_says_what_was_done(tiny_pipe, forget):
    run = forget("star", iterations=3)
    assert run.concept == "star" and run.config.iterations == 3 and run.pipe is tiny_pipe
    assert list(run.history.columns) == [
        "loss",
        "forget",
        "prior",
        "regularization",
        "grad_forget",
        "grad_prior",
        "grad_regularization",
    ]
    assert list(run.history.index) == [1, 2, 3] and run.history.index.name == "step"
    assert run.seconds > 0
    assert "tensor" not in repr(run)  # the weights are no reading matter


def test_states_come_one_by_one(tiny_pipe, tiny_memory):
    states = list(unlearn_steps(tiny_pipe, "apple", tiny(iterations=3), tiny_memory))
    assert [(s.step, s.iterations) for s in states] == [(1, 3), (2, 3), (3, 3)]


def test_the_card_sets_the_sizes(tiny_pipe, tiny_memory, monkeypatch):
    settings = {name: value for name, value in dataclasses.asdict(TINY).items() if name != "iterations"}
    card = dataclasses.replace(model_card(tiny_pipe), settings=settings | {"iterations": 1})
    monkeypatch.setattr(duge.unlearning, "model_card", lambda pipe: card)
    run = unlearn(tiny_pipe, "apple", memory=tiny_memory, progress=False)
    assert run.config == tiny(iterations=1) and len(run.history) == 1


def test_on_step_sees_what_the_history_keeps(forget):
    seen = []
    run = forget(on_step=seen.append, iterations=3)
    assert [s.loss for s in seen] == list(run.history.loss)


@pytest.mark.slow
def test_pictures_can_be_drawn_along_the_way(tiny_pipe, forget):
    """A live preview shows the model that learns, and changes nothing."""

    def look(state=None) -> torch.Tensor:
        previews.append(duge.sample(tiny_pipe, "a photo of a car", steps=2, latents=True))
        return previews[-1]

    previews = []
    run = forget(iterations=3)
    run.restore()
    watched = forget(iterations=3, on_step=look)
    pd.testing.assert_frame_equal(watched.history, run.history, check_exact=True)
    assert torch.equal(previews[-1], look())
    assert not torch.equal(previews[0], previews[1])


# How it stops


def test_unknown_concept_teaches_and_changes_nothing(tiny_pipe, forget):
    before, state = weights(tiny_pipe), footprint(tiny_pipe)
    with pytest.raises(UnknownConceptError, match="'aple' is no concept.*Did you mean 'apple'"):
        forget("aple")
    assert not changed(tiny_pipe, before) and footprint(tiny_pipe) == state


class Stop(Exception):
    pass


@pytest.mark.parametrize("how", ["end", "break", "exception in on_step", "exception inside"])
def test_everything_is_put_back(tiny_pipe, tiny_memory, forget, how, monkeypatch):
    tiny_pipe.unet.conv_in.weight.requires_grad_(False)  # flags of the user's own
    tiny_pipe.unet.down_blocks[0].attentions[0].requires_grad_(False)
    before, state = weights(tiny_pipe), footprint(tiny_pipe)

    def stop(*args):
        raise Stop

    if how == "end":
        forget()
    elif how == "break":
        for _ in unlearn_steps(tiny_pipe, "apple", TINY, tiny_memory):
            break
    elif how == "exception in on_step":
        with pytest.raises(Stop):
            forget(on_step=stop)
    else:
        monkeypatch.setattr(duge.unlearning, "prior_preservation_loss", stop)
        with pytest.raises(Stop):
            forget()
    assert footprint(tiny_pipe) == state
    assert bool(changed(tiny_pipe, before)) == (how in ("end", "break"))


def test_an_exception_while_the_base_is_swapped_in_leaves_the_model(tiny_pipe, tiny_memory):
    base = {n: torch.zeros_like(p) for n, p in trainable_parameters(tiny_pipe.unet, TINY).items()}
    steps = unlearn_steps(tiny_pipe, "apple", TINY, tiny_memory, base=base)
    before, forward = weights(tiny_pipe), tiny_pipe.unet.forward
    calls = []

    def stop(sample, *args, **kwargs):
        if len(sample) == 4:  # not the drawing of pictures: the reference, asked twice about two
            calls.append(base.keys() <= {n for n, p in tiny_pipe.unet.named_parameters() if not p.any()})
            raise Stop
        return forward(sample, *args, **kwargs)

    tiny_pipe.unet.forward = stop
    with pytest.raises(Stop):
        for _ in steps:
            pass
    del tiny_pipe.unet.forward
    assert calls and not changed(tiny_pipe, before)


def test_out_of_memory_says_what_to_lower(tiny_pipe, tiny_memory):
    before, state = weights(tiny_pipe), footprint(tiny_pipe)
    calls = []

    def loss(learner, wanted):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return learner.noise_pred.square().mean()

    objective = dataclasses.replace(DUGE, loss=loss)
    match = r"cpu ran out of memory at iteration 3;.*batch_size \(now 2\).*low_memory=True"
    with pytest.raises(duge.errors.OutOfMemoryError, match=match):
        unlearn(tiny_pipe, "apple", tiny(iterations=5), tiny_memory, progress=False, objective=objective)
    assert not changed(tiny_pipe, before) and footprint(tiny_pipe) == state


def poisoned(pictures: Pictures) -> Pictures:
    return dataclasses.replace(pictures, latents=torch.full_like(pictures.latents, float("nan")))


def test_a_poisoned_memory_is_named_and_undone(tiny_pipe, tiny_memory, forget):
    before, state = weights(tiny_pipe), footprint(tiny_pipe)
    with pytest.raises(DivergedError, match="the prior loss became nan at iteration 1;.*Lower lr"):
        forget(memory=poisoned(tiny_memory))
    assert not changed(tiny_pipe, before) and footprint(tiny_pipe) == state


def test_a_learning_rate_too_high_is_undone(tiny_pipe, forget):
    before, state = weights(tiny_pipe), footprint(tiny_pipe)
    with pytest.raises(DivergedError, match=r"at iteration [2-9];.*\(now 1e\+30\)"):
        forget(lr=1e30, iterations=9)
    assert not changed(tiny_pipe, before) and footprint(tiny_pipe) == state


def test_a_gradient_that_is_not_finite_is_not_applied(tiny_pipe, forget, monkeypatch):
    """A loss can be finite and its gradient not: the square root at zero, for one."""
    before = weights(tiny_pipe)

    def root(noise_pred, target):
        return (noise_pred - noise_pred.detach()).square().sum().sqrt()

    monkeypatch.setattr(duge.unlearning, "prior_preservation_loss", root)
    with pytest.raises(DivergedError, match="the gradient's norm is nan at iteration 1"):
        forget(iterations=1)
    assert not changed(tiny_pipe, before)


def test_the_stop_button_keeps_what_was_learned(tiny_pipe, forget):
    before, state = weights(tiny_pipe), footprint(tiny_pipe)

    def press(step):
        if step.step == 2:
            raise KeyboardInterrupt

    run = forget(iterations=50, on_step=press)
    assert list(run.history.index) == [1, 2]
    stopped = changed(tiny_pipe, before)
    assert stopped and footprint(tiny_pipe) == state
    learned = weights(tiny_pipe)
    run.restore()
    assert not changed(tiny_pipe, before)
    forget(iterations=2)
    assert not changed(tiny_pipe, learned)  # the same as two iterations asked for


def test_the_stop_button_inside_an_iteration(tiny_pipe, forget, monkeypatch):
    before, state = weights(tiny_pipe), footprint(tiny_pipe)

    def press(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(duge.unlearning, "regularization_loss", press)
    run = forget()
    assert len(run.history) == 0
    assert not changed(tiny_pipe, before) and footprint(tiny_pipe) == state


# Precision


@pytest.fixture
def bf16_pipe(tiny_pipe):
    parts = {k: copy.deepcopy(v) for k, v in tiny_pipe.components.items()}
    pipe = type(tiny_pipe)(**parts, requires_safety_checker=False).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_a_bf16_pipeline_learns_and_stays_bf16(bf16_pipe, forget):
    before, state = weights(bf16_pipe), footprint(bf16_pipe)
    run = forget(pipe=bf16_pipe, memory=None)
    assert {p.dtype for p in bf16_pipe.unet.parameters()} == {torch.bfloat16}
    assert footprint(bf16_pipe) == state
    assert all(".attn2." in name for name in changed(bf16_pipe, before))
    run.restore()
    assert not changed(bf16_pipe, before)


@pytest.mark.slow
def test_bf16_follows_the_path_of_fp32(bf16_pipe, tiny_memory, forget):
    """The learner's pass must use the learner's weights, also under autocast, which caches."""
    full = forget(iterations=6).history
    half = forget(pipe=bf16_pipe, iterations=6).history
    assert half.prior.iloc[1:].min() > 0
    assert half.forget.tolist() == pytest.approx(full.forget.tolist(), rel=0.05)
    assert half.prior.iloc[1:].tolist() == pytest.approx(full.prior.iloc[1:].tolist(), rel=0.2)


@pytest.mark.slow
def test_a_callers_autocast_is_used_and_sees_the_new_weights(tiny_pipe, forget):
    def look() -> torch.Tensor:
        return duge.sample(tiny_pipe, "a photo of an apple", steps=2, latents=True)

    full = forget(iterations=6)
    full.restore()
    with torch.autocast("cpu", torch.bfloat16):
        before = look()
        run = forget(iterations=6)
        during = look()
        run.restore()
        assert torch.equal(look(), before)
    assert not torch.equal(during, before)
    assert run.history.forget.tolist() != full.history.forget.tolist()  # 16 bits are not 32
    assert run.history.forget.tolist() == pytest.approx(full.history.forget.tolist(), rel=0.05)


@pytest.mark.slow
def test_a_bf16_pipeline_can_be_watched(bf16_pipe, forget):
    def look(state=None) -> torch.Tensor:
        previews.append(duge.sample(bf16_pipe, "a photo of a car", steps=2, latents=True))
        return previews[-1]

    previews = []
    run = forget(pipe=bf16_pipe, iterations=3)
    run.restore()
    watched = forget(pipe=bf16_pipe, iterations=3, on_step=look)
    pd.testing.assert_frame_equal(watched.history, run.history, check_exact=True)
    assert torch.equal(previews[-1], look())  # the preview is the model that stopping would leave


def test_a_bf16_pipeline_is_restored_after_divergence(bf16_pipe, tiny_memory, forget):
    before = weights(bf16_pipe)
    with pytest.raises(DivergedError):
        forget(pipe=bf16_pipe, memory=poisoned(tiny_memory))
    assert not changed(bf16_pipe, before)


@pytest.fixture
def in_the_last_pass(tiny_pipe, monkeypatch):
    """What the learning denoiser was given, and what the losses compared its answers with."""
    seen = {}

    def spy_on(module):
        def loss(noise_pred, target):
            seen[module] = target.detach()
            return prior_preservation_loss(noise_pred, target)

        monkeypatch.setattr(module, "prior_preservation_loss", loss)

    for module in (unlearning, baselines):
        spy_on(module)
    tiny_pipe.unet.register_forward_pre_hook(lambda _, args: seen.update(noisy=args[0], timesteps=args[1]))
    return seen


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_what_the_model_predicts_is_what_it_is_compared_with(
    tiny_pipe, tiny_memory, in_the_last_pass, sampler, prediction
):
    """Stable Diffusion 2.x answers with the velocity, v = sqrt(a) * noise - sqrt(1 - a) * picture."""
    tiny_pipe.scheduler = sampler.from_config(tiny_pipe.scheduler.config, prediction_type=prediction)
    memory = Pictures(tiny_memory.latents[:1], tiny_memory.encoder_hidden_states[:1], tiny_memory.prompts[:1])
    config = tiny(iterations=1, target_size=1, preserve="noise")
    apple = draw_pictures(tiny_pipe, ["a photo of an apple"], config.picture_seed).latents
    ascent = baselines.gradient_ascent()
    unlearn(tiny_pipe, "apple", config, memory, progress=False, objective=ascent)
    alphas = DDPMScheduler.from_config(tiny_pipe.scheduler.config).alphas_cumprod
    for module, part, picture in ((baselines, slice(2), apple), (unlearning, slice(2, 4), memory.latents)):
        noisy, a = (
            in_the_last_pass["noisy"][part],
            alphas[in_the_last_pass["timesteps"][part]].view(-1, 1, 1, 1),
        )
        noise = (noisy - a.sqrt() * picture) / (1 - a).sqrt()
        velocity = a.sqrt() * noise - (1 - a).sqrt() * picture
        expected = velocity if prediction == "v_prediction" else noise
        torch.testing.assert_close(in_the_last_pass[module], expected, atol=1e-3, rtol=1e-3)


def test_what_the_memorys_words_say_can_be_protected(tiny_pipe, tiny_memory, forget):
    words = tiny_memory.encoder_hidden_states.flatten(0, 1)  # (m*T, D)
    before = weights(tiny_pipe)
    run = forget(iterations=3, train="kv", protect=1.0, lambda_prior=0.0, lambda_regularization=0.0)
    moved = changed(tiny_pipe, before)
    assert moved and all(name.endswith(("to_k.weight", "to_v.weight")) for name in moved)
    other = encode_prompts(tiny_pipe, ["a mosaic of an apple"])[0]
    for name in moved:
        change = weights(tiny_pipe)[name] - before[name]
        assert (words @ change.T).abs().max() < 1e-4
        assert (other @ change.T).abs().max() > 1e-3  # other words may change
    run.restore()
    with pytest.raises(ValueError, match="goes with neither protect nor merge"):
        tiny(train="lora", protect=0.5)


def test_a_memory_must_hold_something_that_is_to_stay(tiny_pipe, tiny_memory, forget):
    before = weights(tiny_pipe)
    shows = dataclasses.replace(tiny_memory, prompts=("a photo of a car", "a neon sign of an apple"))
    with pytest.raises(ValueError, match=r"the memory shows 'apple' \('a neon sign of an apple'\)"):
        forget(memory=shows)
    with pytest.raises(ValueError, match="the memory is empty: expected at least one picture"):
        forget(memory=dataclasses.replace(tiny_memory, prompts=()))
    steps = unlearn_steps(tiny_pipe, "apple", tiny(), tiny_memory, earlier=["harp"])
    with pytest.raises(ValueError, match="the memory shows 'harp'"):
        next(steps)
    assert not changed(tiny_pipe, before)


@pytest.mark.slow  # few processors multiply 16-bit floats quickly
@pytest.mark.parametrize("train", ["cross_attention", "full", "lora"])
def test_an_fp16_pipeline_learns_with_a_scaler(tiny_pipe, forget, train):
    full = forget(iterations=3, train=train, measure_every=1)
    full.restore()
    parts = {k: copy.deepcopy(v) for k, v in tiny_pipe.components.items()}
    pipe = type(tiny_pipe)(**parts, requires_safety_checker=False).to(torch.float16)
    before = weights(pipe)
    run = forget(pipe=pipe, iterations=3, train=train, measure_every=1)
    assert {p.dtype for n, p in pipe.unet.named_parameters() if "lora" not in n} == {torch.float16}
    assert bool(changed(pipe, before)) == (train != "lora")
    assert run.history.forget.tolist() == pytest.approx(full.history.forget.tolist(), rel=0.1)
    norms = run.history.grad_forget[run.history.grad_forget < math.inf]  # some overflow
    assert len(norms) > 0
    assert norms.tolist() == pytest.approx(full.history.grad_forget[norms.index].tolist(), rel=0.1)
    run.restore()
    assert not changed(pipe, before)


@pytest.mark.slow
@pytest.mark.parametrize("match", ["output", "probs"])
def test_gradient_checkpointing_changes_nothing_but_memory(tiny_pipe, forget, match):
    plain = forget(iterations=3, match=match)
    learned = weights(tiny_pipe)
    plain.restore()
    tiny_pipe.unet.enable_gradient_checkpointing()
    again = forget(iterations=3, match=match)
    pd.testing.assert_frame_equal(plain.history, again.history, rtol=1e-5)
    for name, p in tiny_pipe.unet.named_parameters():
        torch.testing.assert_close(p, learned[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"match": "probs", "measure_every": 1}, {"train": "lora"}])
def test_low_memory_changes_no_result(tiny_pipe, forget, changes):
    plain = forget(**changes)
    learned = dict(tiny_pipe.unet.named_parameters())
    learned = {name: p.detach().clone() for name, p in learned.items()}
    plain.restore()
    again = forget(low_memory=True, **changes)
    pd.testing.assert_frame_equal(plain.history, again.history, rtol=1e-4)
    for name, p in tiny_pipe.unet.named_parameters():
        torch.testing.assert_close(p, learned[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize("how", ["end", "break", "exception"])
def test_low_memory_recomputes_offloads_and_tidies_up(tiny_pipe, tiny_memory, forget, how, found):
    """In each iteration every block is computed twice, with its dropout off; then all is as it was."""
    unet, idle = tiny_pipe.unet, (tiny_pipe.vae, tiny_pipe.text_encoder)
    if found:
        unet.enable_gradient_checkpointing()
    state, passes = footprint(tiny_pipe), Counter()
    counter = (
        unet.up_blocks[0]
        .resnets[0]
        .register_forward_pre_hook(
            lambda module, args: passes.update(["train" if module.training else torch.is_grad_enabled()])
        )
    )
    steps = unlearn_steps(tiny_pipe, "apple", tiny(low_memory=True), tiny_memory)
    for done, _ in enumerate(steps, 1):  # noqa: B007
        assert all(hasattr(module, "_hf_hook") for module in idle)  # accelerate's: it would move the module
        duge.sample(tiny_pipe, "a photo of a car", steps=2)
        if how == "exception":
            with pytest.raises(Stop):
                steps.throw(Stop)
        if how != "end":
            break
    steps.close()
    counter.remove()
    assert passes[True] == 2 * done and not passes["train"]
    assert footprint(tiny_pipe) == state and unet.is_gradient_checkpointing == found
    assert not any(hasattr(module, "_hf_hook") for module in idle)


@pytest.mark.slow
def test_no_second_denoiser_in_memory(tiny_pipe, tiny_memory, forget):
    """Only what learns has copies: weights before, the start, the anchor."""
    shape, kinds = tiny_pipe.unet.conv_in.weight.shape, (torch.Tensor, torch.nn.Parameter)

    def count(step=None) -> None:
        copies.append(sum(type(x) in kinds and x.shape == shape for x in gc.get_objects()))

    copies: list[int] = []
    gc.collect()
    count()
    forget(on_step=count)
    assert copies == copies[:1] * 3
    forget(on_step=count, train="full")
    assert min(copies[3:]) > copies[0] + 1  # the counting counts


# Low-rank updates


@pytest.mark.slow
@pytest.mark.parametrize("match", ["output", "probs"])
def test_lora_learns_beside_the_weights(tiny_pipe, forget, match):
    before = weights(tiny_pipe)
    run = forget(train="lora", rank=3, iterations=4, match=match)
    assert run.history.forget.iloc[-1] < run.history.forget.iloc[0]
    assert not changed(tiny_pipe, before)  # the model's own weights
    layers = len(cross_attention_layers(tiny_pipe.unet))
    assert len(run.before) == layers * 4 * 2  # q, k, v and out; A and B
    assert {3} <= {d for w in run.before.values() for d in w.shape}
    run.restore()
    assert not changed(tiny_pipe, before) and set(before) == set(weights(tiny_pipe))
    assert not any("lora" in n for n, _ in tiny_pipe.unet.named_parameters())  # as it was found
    run.restore()  # twice does no harm


@pytest.mark.slow
def test_lora_follows_its_seed_alone(tiny_pipe, forget):
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        run = forget(train="lora")
        assert torch.equal(torch.get_rng_state(), state)
        results.append({n: p.detach().clone() for n, p in tiny_pipe.unet.named_parameters() if "lora" in n})
        run.restore()
    assert results[0] and all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_lora_that_fails_leaves_no_adapter(tiny_pipe, tiny_memory, forget):
    state = footprint(tiny_pipe)
    with pytest.raises(DivergedError):
        forget(train="lora", memory=poisoned(tiny_memory))
    assert footprint(tiny_pipe) == state
    with pytest.raises(UnknownConceptError):
        forget("aple", train="lora")
    assert footprint(tiny_pipe) == state


@pytest.mark.slow
def test_a_second_lora_run_goes_on_from_the_first(tiny_pipe, forget):
    def answer() -> torch.Tensor:
        return duge.sample(tiny_pipe, "a photo of a car", steps=2, latents=True)

    base = answer()
    one = forget(train="lora")
    first = answer()
    two = forget("star", train="lora")
    assert not torch.equal(answer(), first)
    two.restore()
    assert torch.equal(answer(), first)
    one.restore()
    assert torch.equal(answer(), base)


@pytest.mark.slow
def test_runs_of_both_kinds_are_undone_in_order(tiny_pipe, forget):
    before = weights(tiny_pipe)
    one, two = forget(), forget("star", train="lora")
    two.restore()
    one.restore()
    assert not changed(tiny_pipe, before)


@pytest.mark.slow
def test_lora_is_exported_for_plain_diffusers(tiny_pipe, tiny_master, forget, tmp_path):
    def apple(pipe):
        return duge.sample(pipe, "a photo of an apple", steps=3, latents=True)

    base, run = apple(tiny_pipe), forget(train="lora", iterations=4)
    ours = apple(tiny_pipe)
    assert not torch.allclose(ours, base, atol=1e-3)
    plain = with_own_unet(tiny_master)
    plain.load_lora_weights(run.export_lora(tmp_path / "pipeline"))
    torch.testing.assert_close(apple(plain), ours)
    tiny_pipe.unet.save_lora_adapter(tmp_path / "unet", adapter_name="duge")
    plain = with_own_unet(tiny_master)
    plain.unet.load_lora_adapter(tmp_path / "unet", prefix=None, use_safetensors=True)
    torch.testing.assert_close(apple(plain), ours)
    run.restore()
    with pytest.raises(ValueError, match='no LoRA in the pipeline: forget with train="lora"'):
        run.export_lora(tmp_path / "again")


@pytest.mark.slow
def test_a_lora_run_is_saved_and_loaded(tiny_pipe, forget, tmp_path):
    base = duge.sample(tiny_pipe, "a photo of an apple", steps=3, latents=True)
    run = forget(train="lora", rank=5)
    ours = duge.sample(tiny_pipe, "a photo of an apple", steps=3, latents=True)
    folder = run.save(tmp_path / "apple")
    run.restore()
    again = duge.UnlearningRun.load(folder, tiny_pipe)
    assert torch.equal(duge.sample(tiny_pipe, "a photo of an apple", steps=3, latents=True), ours)
    again.restore()
    assert torch.equal(duge.sample(tiny_pipe, "a photo of an apple", steps=3, latents=True), base)


@pytest.mark.slow
def test_what_is_saved_loads_without_this_package(tiny_pipe, forget, tmp_path):
    forget()
    ours = duge.sample(tiny_pipe, "a photo of an apple", steps=3, latents=True)
    tiny_pipe.save_pretrained(tmp_path / "forgotten")
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "forgotten", use_safetensors=True)
    plain.set_progress_bar_config(disable=True)
    assert torch.equal(duge.sample(plain, "a photo of an apple", steps=3, latents=True), ours)


PLAIN = """
import sys
from pathlib import Path
import torch
from diffusers import StableDiffusionPipeline

for folder in Path(sys.argv[1]).glob("pipe_*"):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    if folder.name.endswith("lora"):
        pipe.load_lora_weights(folder.with_name("lora"))
    how = {"num_inference_steps": 3, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(0)}
    latents = pipe("a photo of an apple", output_type="latent", **how).images
    torch.save(latents, folder.with_suffix(".pt"))
assert not [name for name in sys.modules if name.startswith("duge")]
"""


@pytest.mark.slow  # another process, which knows nothing of ours
def test_plain_diffusers_draws_the_same(tiny_pipe, forget, tmp_path):
    ours = {}

    def keep(name):
        tiny_pipe.save_pretrained(tmp_path / f"pipe_{name}")
        ours[name] = duge.sample(tiny_pipe, "a photo of an apple", steps=3, latents=True)

    for train in IN_PLACE:
        run = forget(train=train, lr=1e-2)
        keep(train)
        run.restore()
    tiny_pipe.save_pretrained(tmp_path / "pipe_lora")
    run = forget(train="lora", lr=1e-2)
    run.export_lora(tmp_path / "lora")
    ours["lora"] = duge.sample(tiny_pipe, "a photo of an apple", steps=3, latents=True)
    tiny_pipe.fuse_lora()  # plain diffusers' own way to make one model of the two
    tiny_pipe.unload_lora_weights()
    keep("fused")
    subprocess.run([sys.executable, "-c", PLAIN, tmp_path], check=True, env=os.environ | {"PYTHONPATH": ""})
    assert len(ours) == len(IN_PLACE) + 2
    for name, latents in ours.items():
        plain = torch.load(tmp_path / f"pipe_{name}.pt")
        torch.testing.assert_close(plain, latents, atol=1e-4, rtol=1e-4, msg=name)
    different = [torch.dist(a, b) > 0.1 for a in ours.values() for b in ours.values() if a is not b]
    assert sum(different) >= len(different) - 2  # all but the one that was fused from the other


# Sequences and styles


@pytest.mark.slow
def test_the_base_can_be_the_reference(tiny_pipe, tiny_memory):
    """After one request, the base's answers differ from those of the model as it is."""
    config = tiny(iterations=1)
    base = {n: p.detach().clone() for n, p in trainable_parameters(tiny_pipe.unet, config).items()}
    unlearn(tiny_pipe, "star", tiny(iterations=6), tiny_memory, progress=False)
    after_star, firsts = weights(tiny_pipe), {}
    for name in ("base", "previous"):
        for option in ("reference", "anchor"):
            choice = {"reference": "previous", "anchor": "previous", option: name}
            settings = dataclasses.replace(config, **choice)
            steps = unlearn_steps(tiny_pipe, "apple", settings, tiny_memory, base=base)
            firsts[option, name] = next(steps)
            steps.close()
            assert changed(tiny_pipe, after_star)
            tiny_pipe.unet.load_state_dict(after_star)
    assert firsts["reference", "previous"].prior == pytest.approx(0, abs=1e-9)
    assert firsts["reference", "base"].prior > 1e-6
    assert firsts["anchor", "previous"].regularization == pytest.approx(0, abs=1e-9)
    assert firsts["anchor", "base"].regularization > 1e-7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("concept", "without", "expected"),
    [
        ("apple", "empty", {""}),
        ("apple", "nameless", {"a photo", "a sketch", "a neon sign", "a mosaic", "a watercolor painting"}),
        ("neon", "empty", {""}),
        ("neon", "nameless", {f"a photo of {duge.doodles.captions.with_article(o)}" for o in OBJECTS}),
    ],
)
def test_what_the_reference_is_asked_instead(tiny_pipe, tiny_memory, monkeypatch, concept, without, expected):
    asked = []

    def spy(pipe, prompts):
        asked.append(list(prompts))
        return encode_prompts(pipe, prompts)

    monkeypatch.setattr(duge.unlearning, "encode_prompts", spy)
    next(unlearn_steps(tiny_pipe, concept, tiny(without=without, target_size=20), tiny_memory))
    (others,) = asked
    assert set(others) == expected and len(others) == 20


def test_a_style_can_be_forgotten(tiny_pipe, asked):
    run = unlearn(tiny_pipe, "neon", tiny(target_size=20, memory_size=60), progress=False)
    target, memory = asked
    assert run.concept == "neon"
    card = model_card(tiny_pipe)
    assert sorted(target) == sorted(card.prompt(o, "neon") for o in OBJECTS)
    assert not [text for text in memory if "neon" in text]
    with pytest.raises(UnknownConceptError, match="'photo' is no concept"):  # it is how all else looks
        unlearn(tiny_pipe, "photo", TINY)


def test_passes_are_counted(tiny_pipe, tiny_memory):
    config = tiny(iterations=3)
    run = unlearn(tiny_pipe, "apple", config, tiny_memory, progress=False)
    drawing = 2 * config.target_size * model_card(tiny_pipe).sampling_steps
    asking = 2 * config.lessons + config.lessons
    learning = config.iterations * (config.batch_size + config.memory_batch_size)
    assert run.passes == drawing + asking + learning
    assert not tiny_pipe.unet._forward_pre_hooks


def test_a_run_plots_itself(forget):
    assert "Forgetting “apple”" in forget().plot().alt


# The shipped model


@pytest.mark.slow
@pytest.mark.parametrize("match", ["output", "probs"])
def test_the_shipped_model_starts_to_forget(doodle_pipe, match):
    prompts = ["a photo of a harp", "a photo of a car"]
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    memory = Pictures(latents, encode_prompts(doodle_pipe, prompts), tuple(prompts))
    config = tiny(iterations=15, match=match, lambda_prior=100.0)
    history = unlearn(doodle_pipe, "apple", config, memory, progress=False).history
    assert history.forget.iloc[-3:].mean() < 0.8 * history.forget.iloc[:3].mean()


# Settings that the paper leaves open


def test_config_round_trips_through_json():
    config = UnlearnConfig(lr=0.5, regularizer="mas", seed=3)
    assert UnlearnConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="no such setting: colour"):
        UnlearnConfig.from_json('{"colour": 1}')


@pytest.mark.slow
def test_preserving_the_noise_is_harder_than_preserving_the_reference(forget):
    """The untouched model agrees with itself, but not with noise that it cannot predict."""
    own, true = (forget(preserve=p, iterations=1).history.prior.iloc[0] for p in ("reference", "noise"))
    assert own < 1e-10 and true > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("regularizer", ["fisher", "mas"])
def test_importance_shifts_what_moves(tiny_pipe, forget, regularizer):
    base = weights(tiny_pipe)
    moved = {}
    for kind in ("l2", regularizer):
        run = forget(regularizer=kind, iterations=4, lambda_regularization=1e4, lambda_attention=1.0)
        moved[kind] = {n: (p.detach() - base[n]) for n, p in tiny_pipe.unet.named_parameters()}
        run.restore()
    assert any(not torch.equal(moved["l2"][n], moved[regularizer][n]) for n in base)


@pytest.mark.slow
def test_gradient_norms_are_measured_when_asked(tiny_pipe, forget):
    base = forget(iterations=4)
    assert base.history.filter(like="grad_").isna().all(axis=None)
    base.restore()
    run = forget(iterations=4, measure_every=2)
    assert run.history.grad_forget.notna().tolist() == [True, False, True, False]
    assert run.history.grad_forget.iloc[0] > 0
    assert run.history.grad_regularization.iloc[0] < 0.1 * run.history.grad_regularization.iloc[2]
    for column in ("loss", "forget", "prior", "regularization"):  # to measure is not to disturb
        assert run.history[column].tolist() == base.history[column].tolist()


def test_a_run_is_saved_and_loaded(tiny_pipe, forget, tmp_path):
    base = weights(tiny_pipe)
    run = forget(iterations=2)
    learned = weights(tiny_pipe)
    folder = run.save(tmp_path / "apple")
    assert sorted(p.name for p in folder.iterdir()) == ["history.csv", "run.json", "weights.safetensors"]
    run.restore()
    again = duge.UnlearningRun.load(folder, tiny_pipe)
    assert not changed(tiny_pipe, learned)
    assert (again.concept, again.config, again.objective) == (run.concept, run.config, "DUGE")
    pd.testing.assert_frame_equal(again.history, run.history, check_dtype=False)
    again.restore()
    assert not changed(tiny_pipe, base)


def test_saving_never_overwrites_and_loading_teaches(tiny_pipe, forget, tmp_path):
    run = forget(iterations=1)
    run.save(tmp_path / "apple")
    with pytest.raises(FileExistsError, match="choose another folder"):
        run.save(tmp_path / "apple")
    with pytest.raises(FileNotFoundError, match="run.json"):
        duge.UnlearningRun.load(tmp_path, tiny_pipe)
    other = copy.deepcopy(tiny_pipe.unet)
    other.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k = torch.nn.Linear(7, 7)
    tiny_pipe.unet = other
    with pytest.raises(ValueError, match="belongs to another model"):
        duge.UnlearningRun.load(tmp_path / "apple", tiny_pipe)
