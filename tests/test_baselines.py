"""The other methods: the same loop, their own target."""

import dataclasses

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from duge_lite.lessons import Noised, Pass, encode_prompts

from duge_lite import baselines, unlearning
from duge_lite.errors import UnknownConceptError
from duge_lite.models import model_card, sample
from duge_lite.unlearning import UnlearnConfig, unlearn

TINY = UnlearnConfig(
    iterations=30,
    batch_size=4,
    memory_batch_size=2,
    target_size=5,
    memory_size=3,
    lessons=8,
    lambda_prior=0.0,
    lr=2e-4,
)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (baselines.esd(), (1.0 - (0.2 - (0.8 - 0.2))) ** 2),
        (baselines.esd(3.0), (1.0 - (0.2 - 3 * (0.8 - 0.2))) ** 2),
        (baselines.concept_ablation("orange"), (1.0 - 0.2) ** 2),
        (baselines.gradient_ascent(), -((1.0 - 0.5) ** 2)),
    ],
)
def test_losses_by_hand(objective, expected):
    learner, concept, other = (Pass(torch.full((2, 4, 3, 3), v)) for v in (1.0, 0.8, 0.2))
    wanted = objective.target(concept, other, torch.full((2, 4, 3, 3), 0.5), TINY)
    assert float(objective.loss(learner, wanted)) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [baselines.esd(), baselines.concept_ablation("orange"), baselines.gradient_ascent()]
)
def test_each_runs_on_the_loop_and_its_loss_falls(tiny_pipe, tiny_memory, objective):
    run = unlearn(tiny_pipe, "apple", TINY, tiny_memory, progress=False, objective=objective)
    assert run.objective == objective.name
    assert run.history.forget.iloc[-10:].mean() < run.history.forget.iloc[:5].mean()


def test_the_anchor_has_to_be_known(tiny_pipe, tiny_memory):
    with pytest.raises(UnknownConceptError, match="'pear'"):
        unlearn(
            tiny_pipe,
            "apple",
            TINY,
            tiny_memory,
            progress=False,
            objective=baselines.concept_ablation("pear"),
        )


def test_asking_the_same_in_its_place_changes_nothing(tiny_pipe, tiny_memory, monkeypatch):
    """After learning to answer "apple" as "apple", nothing has moved: the two passes are the same."""
    prompts = model_card(tiny_pipe).prompts("apple")[: TINY.target_size]
    monkeypatch.setattr(unlearning, "_questions", lambda *_: (prompts, prompts))
    config = dataclasses.replace(TINY, iterations=2, lambda_regularization=0.0)
    objective = baselines.concept_ablation("orange")
    run = unlearn(tiny_pipe, "apple", config, tiny_memory, progress=False, objective=objective)
    assert run.history.forget.max() < 1e-10


def answers(pipe, prompt: str) -> dict[str, torch.Tensor]:
    states = encode_prompts(pipe, [prompt])[0]
    return {
        n: (states @ p.detach().T) for n, p in pipe.unet.named_parameters() if n.endswith("attn2.to_v.weight")
    }


def test_uce_moves_the_concept_to_the_anchor_and_keeps_the_rest(tiny_pipe):
    card = model_card(tiny_pipe)
    apple, orange, house = (card.prompt(c) for c in ("apple", "orange", "house"))
    before = {p: answers(tiny_pipe, p) for p in (apple, orange, house)}
    run = baselines.uce(tiny_pipe, "apple", anchor="orange", ridge=1e-3)
    for name, now in answers(tiny_pipe, apple).items():
        gap = (before[orange][name] - before[apple][name]).norm()
        assert (now - before[orange][name]).norm() < 0.5 * gap
    for name, now in answers(tiny_pipe, house).items():
        assert (now - before[house][name]).norm() < 0.1 * before[house][name].norm()
    run.restore()
    assert all(torch.equal(now, before[apple][n]) for n, now in answers(tiny_pipe, apple).items())


def test_uce_with_the_concept_as_its_own_anchor_changes_nothing(tiny_pipe):
    before = {n: p.detach().clone() for n, p in tiny_pipe.unet.named_parameters()}
    baselines.uce(tiny_pipe, "apple", anchor="apple")
    for name, p in tiny_pipe.unet.named_parameters():
        assert torch.allclose(p, before[name], atol=1e-5), name


def test_esd_asks_a_model_of_velocities_for_the_same_noise():
    """noise = sqrt(a) * v + sqrt(1 - a) * x_t, so what is asked of v asks the same of the noise."""
    g = torch.Generator().manual_seed(0)
    noisy, concept, other = (torch.randn(2, 4, 3, 3, generator=g) for _ in range(3))
    a, eta = torch.tensor([0.9, 0.2]).view(-1, 1, 1, 1), 2.0

    def noise(velocity):
        return a.sqrt() * velocity + (1 - a).sqrt() * noisy

    (asked,) = baselines.esd(eta).target(Pass(concept), Pass(other), torch.zeros(()), TINY)
    torch.testing.assert_close(noise(asked), noise(other) - eta * (noise(concept) - noise(other)))


@pytest.mark.parametrize("sampler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_half_drawn_is_what_the_denoiser_met(tiny_pipe, sampler):
    """Also where the sampler keeps its latents in another scale, as Euler's does."""
    tiny_pipe.scheduler = sampler.from_config(tiny_pipe.scheduler.config, skip_prk_steps=True)
    met = []
    hook = tiny_pipe.unet.register_forward_pre_hook(lambda _, args: met.append((args[0][1], int(args[1]))))
    asked = Noised.half_drawn(tiny_pipe, ["a photo of an apple"], 12, 7, torch.Generator().manual_seed(0))
    hook.remove()
    for noisy, t in zip(asked.noisy, asked.timesteps.tolist(), strict=True):
        assert any(t == then and torch.allclose(noisy, latents, atol=1e-5) for latents, then in met[1:])


def test_esd_meets_pictures_half_drawn(tiny_pipe):
    """Each noisy picture is a moment of the sampler's own way, with that moment's timestep."""
    generator = torch.Generator().manual_seed(0)
    prompts = ["a photo of an apple", "a sketch of an apple"]
    asked = Noised.half_drawn(tiny_pipe, prompts, 200, 7, generator)
    steps = model_card(tiny_pipe).sampling_steps
    assert asked.noisy.shape == (200, 4, 16, 16) and asked.encoder_hidden_states.shape == (200, 24, 128)
    assert set(asked.timesteps.tolist()) <= set(tiny_pipe.scheduler.timesteps[1:].tolist())
    assert len(set(asked.timesteps.tolist())) == steps - 1
    late, early = asked.timesteps.min(), asked.timesteps.max()
    ended = sample(tiny_pipe, prompts, 7, steps, latents=True)[asked.index]
    gap = (asked.noisy - ended).flatten(1).norm(dim=1)
    assert gap[asked.timesteps == late].max() < gap[asked.timesteps == early].min()


def test_a_style_needs_a_style_as_anchor(tiny_pipe, tiny_memory):
    with pytest.raises(ValueError, match="anchor 'car' for 'neon': choose a style for a style"):
        objective = baselines.concept_ablation("car")
        unlearn(tiny_pipe, "neon", TINY, tiny_memory, progress=False, objective=objective)


def test_an_anchor_of_each_kind_serves_a_sequence_of_both(tiny_pipe):
    card, objective = model_card(tiny_pipe), baselines.concept_ablation("star", "watercolor")
    for concept, anchor in (("apple", "star"), ("neon", "watercolor")):
        prompts, others = unlearning._questions(card, concept, [], objective, TINY)
        pairs = dict(zip(card.prompts(concept), card.prompts(anchor), strict=True))
        assert [pairs[p] for p in prompts] == others


def test_the_plain_style_can_be_an_anchor(tiny_pipe):
    card, objective = model_card(tiny_pipe), baselines.concept_ablation("photo")
    _, others = unlearning._questions(card, "neon", [], objective, TINY)
    assert others == [card.prompt(c) for c in card.concepts[: TINY.target_size]]


def test_looking_back_asks_for_the_anchor_too(tiny_pipe):
    card, objective = model_card(tiny_pipe), baselines.concept_ablation("star", "watercolor")
    prompts, others = unlearning._questions(
        card, "car", ["apple"], objective, dataclasses.replace(TINY, revisit=0.5)
    )
    looked_back = [o for p, o in zip(prompts, others, strict=True) if p in card.prompts("apple")]
    assert looked_back and set(looked_back) <= set(card.prompts("star"))


@pytest.mark.parametrize(("concept", "earlier"), [("star", ()), ("car", ("star",))])
def test_an_anchor_that_is_to_go_is_refused(tiny_pipe, concept, earlier):
    objective = baselines.concept_ablation("star")
    with pytest.raises(ValueError, match="anchor 'star' is to go itself: choose one that stays"):
        unlearning._questions(model_card(tiny_pipe), concept, earlier, objective, TINY)


def test_uce_forgets_a_style_without_holding_on_to_it(tiny_pipe):
    neon, photo = "a neon sign of a car", "a photo of a car"
    before = {p: answers(tiny_pipe, p) for p in (neon, photo)}
    baselines.uce(tiny_pipe, "neon", anchor="sketch")
    after = {p: answers(tiny_pipe, p) for p in (neon, photo)}
    for name in before[neon]:
        moved, held = (
            (after[p][name] - before[p][name]).norm() / before[p][name].norm() for p in (neon, photo)
        )
        assert moved > 3 * held
