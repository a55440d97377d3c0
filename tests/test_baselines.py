"""The other methods: the same loop, their own target, their own settings."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from conftest import GRADIENT, MEMORY, changed, forget, quick_card, undone, weights
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler

import duge_lite as duge
from duge_lite import baselines
from duge_lite.gradient import Lessons
from duge_lite.models import encode_prompts, model_card
from duge_lite.solver import PictureBook

METHODS = [baselines.esd(), baselines.concept_ablation("orange"), baselines.gradient_ascent()]


@pytest.mark.parametrize(("method", "expected"), [
    (baselines.esd(), (1.0 - (0.2 - (0.8 - 0.2))) ** 2),
    (baselines.esd(3.0), (1.0 - (0.2 - 3 * (0.8 - 0.2))) ** 2),
    (baselines.concept_ablation("orange"), (1.0 - 0.2) ** 2),
    (baselines.gradient_ascent(), -((1.0 - 0.5) ** 2)),
])  # fmt: skip
def test_losses_by_hand(method, expected):
    objective, config = method
    learner, concept, other = ((torch.full((2, 4, 3, 3), v),) for v in (1.0, 0.8, 0.2))
    wanted = objective.target(concept, other, torch.full((2, 4, 3, 3), 0.5), config)
    assert float(objective.loss(learner, wanted)) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=[objective.name for objective, _ in METHODS])
def test_none_gets_our_losses_and_its_own_falls(tiny_pipe, method):
    objective, config = method
    assert config.weights == (1.0, 0.0, 0.0) and config.revisit == 0.0
    small = dict(iterations=15, batch_size=4, memory_batch_size=1, target_size=5, lessons=8, lr=1e-3)
    before, config = weights(tiny_pipe), replace(config, **small)
    run = duge.unlearn(tiny_pipe, "apple", config, MEMORY, False, objective, quick_card(tiny_pipe))
    assert run.objective == objective.name and set(run.before) == changed(tiny_pipe, before)
    assert run.history.forget.iloc[-5:].mean() < run.history.forget.iloc[:3].mean()
    assert not objective.moving or all("to_k" in name or "to_v" in name for name in run.before)


def test_the_anchor_has_to_be_known_and_to_stay(tiny_pipe):
    for anchor, kind in (("pear", duge.errors.UnknownConceptError), ("apple", ValueError)):
        objective, config = baselines.concept_ablation(anchor)
        with pytest.raises(kind, match=anchor):
            duge.unlearn(tiny_pipe, "apple", config, MEMORY, progress=False, objective=objective)


@pytest.mark.parametrize("sampler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_half_drawn_is_what_the_denoiser_met(tiny_pipe, sampler):
    """Also where the sampler keeps its latents in another scale, as Euler's does; the first moment too."""
    tiny_pipe.scheduler = sampler.from_config(tiny_pipe.scheduler.config, skip_prk_steps=True)
    card, met = replace(model_card(tiny_pipe), sampling_steps=4, batch_size=2), defaultdict(list)
    prompts, lots = ["a photo of an apple", "a mosaic", "a sketch of a car"], torch.Generator().manual_seed(0)
    with tiny_pipe.unet.register_forward_pre_hook(lambda _, args: met[int(args[1])].extend(args[0])):
        asked = Lessons.half_drawn(tiny_pipe, prompts, 24, 7, lots, card, 3.0)
    assert asked.noisy.shape == (24, 4, 16, 16) and max(met) > 700
    assert set(asked.timesteps.tolist()) == set(met)
    for noisy, t in zip(asked.noisy, asked.timesteps.tolist(), strict=True):
        assert any(torch.allclose(noisy, x, atol=1e-5) for x in met[t])


def test_esd_asks_a_model_of_velocities_for_the_same_noise():
    """noise = sqrt(a) * v + sqrt(1 - a) * x_t, so what is asked of v asks the same of the noise."""
    noisy, concept, other = torch.randn(3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    a, eta = torch.tensor([0.9, 0.2]).view(-1, 1, 1, 1), 2.0

    def noise(velocity):
        return a.sqrt() * velocity + (1 - a).sqrt() * noisy

    (asked,) = baselines.esd(eta)[0].target((concept,), (other,), torch.zeros(()), GRADIENT)
    torch.testing.assert_close(noise(asked), noise(other) - eta * (noise(concept) - noise(other)))


def answers(pipe, prompt: str, last: bool) -> torch.Tensor:
    """What the values say of all tokens of ``prompt``, or of its last one."""
    end = sum(pipe.tokenizer(prompt).attention_mask) - 2
    states = encode_prompts(pipe, [prompt])[0][slice(end, end + 1) if last else slice(None)]
    values = [p for n, p in pipe.unet.named_parameters() if n.endswith("attn2.to_v.weight")]
    return torch.cat([states @ p.detach().T for p in values], dim=1)


@pytest.mark.parametrize("styled", [False, True])
@pytest.mark.parametrize(("goes", "anchor", "stays"), [("apple", "orange", "house"), ("neon", "", "sketch")])
def test_uce_moves_the_concept_to_the_anchor_and_keeps_the_rest(tiny_pipe, styled, goes, anchor, stays):
    """Bare names or prompts, as the states were that it solved for."""
    card, before, texts = model_card(tiny_pipe), weights(tiny_pipe), [goes, anchor, stays]
    if styled:
        texts = [card.concept(goes).prompts[0], *[card.prompts(t)[0] for t in (anchor or "photo", stays)]]
    was = [answers(tiny_pipe, text, not styled) for text in texts]
    run = baselines.uce(tiny_pipe, goes, anchor, ridge=1e-3, styled=styled)
    now = [answers(tiny_pipe, text, not styled) for text in texts]
    moved = [float((n - w).norm() / w.norm()) for n, w in zip(now, was, strict=True)]
    assert moved[0] > 3 * moved[2] and (run.concept, run.objective) == (goes, "UCE")
    assert changed(tiny_pipe, before) == set(run.before)
    run.restore()
    assert not changed(tiny_pipe, before)


def test_uce_with_the_concept_as_its_own_anchor_changes_nothing(tiny_pipe):
    before = weights(tiny_pipe)
    baselines.uce(tiny_pipe, "apple", anchor="apple")
    torch.testing.assert_close(weights(tiny_pipe), before, atol=1e-5, rtol=0)


def test_uce_counts_as_gone_and_says_no_to_no_number(tiny_pipe):
    forget(tiny_pipe, "car")
    baselines.uce(tiny_pipe, "apple")
    assert {c.name for c in PictureBook.known(tiny_pipe).gone(tiny_pipe)} == {"car", "apple"}
    for ridge in (float("nan"), -1.0):
        with undone(tiny_pipe, ValueError, "ridge = (nan|-1.0): expected 0 or more"):
            baselines.uce(tiny_pipe, "harp", ridge=ridge)
