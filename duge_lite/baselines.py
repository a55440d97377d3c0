"""Other ways to forget, on the same loop, with the same pictures, memory and budget.

Each is an :class:`~duge_lite.lessons.Objective` for ``unlearn(..., objective=...)``; only UCE, which
solves for its weights instead of learning them, is a function of its own. What differs from the papers is
said in each docstring: a comparison is fair only if it is the same race.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from .config import UnlearnConfig
from .lessons import Objective, Pass, encode_prompts
from .losses import prior_preservation_loss
from .models import model_card
from .unlearning import UnlearningRun, overwrite, plain_parameters


def _predicts(learner: Pass, wanted: tuple[Tensor, ...]) -> Tensor:
    return prior_preservation_loss(learner.noise_pred, wanted[0])


def esd(negative_guidance: float = 1.0, partial: bool = True) -> Objective:
    """Erased Stable Diffusion: predict, for the concept, noise that leads away from it.

    Target ``e_u - eta * (e_c - e_u)`` from the frozen reference, on pictures that are caught half-drawn
    (Gandikota et al., arXiv 2303.07345, eq. 7 and algorithm 1). ESD-x is this with
    ``train="cross_attention"``. Differs from the paper: the half-drawn pictures are the reference's, not
    those of the model as it changes, and the shared prior loss is on unless ``lambda_prior=0``.
    ``partial=False`` uses finished pictures with noise added, as the other methods here do.
    """

    def target(concept: Pass, other: Pass, noise: Tensor, config: UnlearnConfig) -> tuple[Tensor, ...]:
        return (other.noise_pred - negative_guidance * (concept.noise_pred - other.noise_pred),)

    return Objective("ESD", target, _predicts, "arXiv 2303.07345", partial=partial)


def concept_ablation(*anchors: str) -> Objective:
    """Ablating concepts: answer for the concept what the reference answers for an anchor of the same kind.

    ``anchors`` are an object, a style, or one of each for a sequence that asks for both; they must stay.
    Kumari et al., arXiv 2303.13516, the model-based variant. Differs from the paper: pictures show the
    concept, not the anchor, as for every other method here.
    """

    def target(concept: Pass, other: Pass, noise: Tensor, config: UnlearnConfig) -> tuple[Tensor, ...]:
        return (other.noise_pred,)

    return Objective(f"ablation to {' or '.join(anchors)}", target, _predicts, "arXiv 2303.13516", anchors)


def gradient_ascent() -> Objective:
    """A straw man: raise the denoising error on the concept's pictures. Nothing bounds it."""
    return Objective(
        "gradient ascent",
        lambda concept, other, noise, config: (noise,),
        lambda learner, wanted: -_predicts(learner, wanted),
        "folklore",
    )


@torch.no_grad()
def uce(
    pipe: StableDiffusionPipeline,
    concept: str,
    anchor: str | None = None,
    preserve: Sequence[str] | None = None,
    ridge: float = 0.1,
) -> UnlearningRun:
    """Unified concept editing: K and V of every cross-attention layer, in closed form, in place.

    For token states c of the concept's prompts the layer is to answer what it answers for the anchor's
    (the empty prompt by default), for states p of ``preserve`` (by default the card's other concepts)
    what it always did::

        W = (sum W0 a c^T + sum W0 p p^T + ridge W0) (sum c c^T + sum p p^T + ridge I)^-1

    Gandikota et al., arXiv 2308.14761, eq. 7; all token positions are used, prompts in every style.

    Returns a run without history (``restore()`` works). Raises UnknownConceptError for unknown names.
    """
    started = time.perf_counter()
    card = model_card(pipe)
    kept = [c for c in card.concepts if c != concept] if preserve is None else list(preserve)
    targets = card.prompts(card.check(concept))
    anchors = card.prompts(card.check(anchor)) if anchor else [""] * len(targets)
    rest = [p for c in kept for p in card.prompts(card.check(c)) if p not in targets]
    c, a, p = (encode_prompts(pipe, t).double().flatten(0, 1) for t in (targets, anchors, rest))  # (n*T, D)
    right = c.T @ c + p.T @ p + ridge * torch.eye(c.shape[1], dtype=torch.float64)
    left = a.T @ c + p.T @ p + ridge * torch.eye(c.shape[1], dtype=torch.float64)  # (D, D)
    change = torch.linalg.solve(right, left.T).T  # W = W0 @ left @ right^-1
    layers = (".attn2.to_k.weight", ".attn2.to_v.weight")
    matrices = {n: w for n, w in plain_parameters(pipe.unet).items() if n.endswith(layers)}
    before = {n: w.detach().cpu().clone() for n, w in matrices.items()}
    overwrite(matrices, {n: w.double().cpu() @ change for n, w in matrices.items()})
    history = pd.DataFrame(index=pd.Index([], name="step"))
    seconds = time.perf_counter() - started
    return UnlearningRun(pipe, concept, UnlearnConfig(train="kv"), history, seconds, before, "UCE")
