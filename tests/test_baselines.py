"""The other methods: the same loop, their own target."""

import dataclasses

import pytest
import torch

from duge_lite import baselines
from duge_lite.errors import UnknownConceptError
from duge_lite.models import model_card
from duge_lite.unlearning import Pass, Passes, UnlearnConfig, encode_prompts, unlearn

TINY = UnlearnConfig(
    iterations=6, batch_size=4, memory_batch_size=2, target_size=5, memory_size=3, lambda_prior=0.0, lr=3e-3
)


def passes(learner: float, concept: float, other: float, noise: float) -> Passes:
    one = lambda v: Pass(torch.full((2, 4, 3, 3), v), ())  # noqa: E731
    return Passes(one(learner), one(concept), one(other), torch.full((2, 4, 3, 3), noise))


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
    assert float(objective.loss(passes(1.0, 0.8, 0.2, 0.5), TINY)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "objective", [baselines.esd(), baselines.concept_ablation("orange"), baselines.gradient_ascent()]
)
def test_each_runs_on_the_loop_and_its_loss_falls(tiny_pipe, tiny_memory, objective):
    run = unlearn(tiny_pipe, "apple", TINY, tiny_memory, progress=False, objective=objective)
    assert run.objective == objective.name
    assert run.history.forget.iloc[-2:].mean() < run.history.forget.iloc[:2].mean()


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


def test_ablation_asks_for_the_anchor_in_the_style_of_the_picture(tiny_pipe, tiny_memory):
    """After learning to answer "apple" as "apple", nothing has moved: the two passes are the same."""
    config = dataclasses.replace(TINY, iterations=2, lambda_regularization=0.0)
    objective = baselines.concept_ablation("apple")
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
