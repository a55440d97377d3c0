"""Other ways to forget, on the same loop, with the same pictures, memory and budget.

Each is an :class:`~duge_lite.unlearning.Objective` for ``unlearn(..., objective=...)``; only UCE, which
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

from .losses import prior_preservation_loss
from .models import model_card
from .unlearning import Objective, Passes, UnlearnConfig, UnlearningRun, encode_prompts


def esd(negative_guidance: float = 1.0) -> Objective:
    """Erased Stable Diffusion: predict, for the concept, noise that leads away from it.

    Target ``e_u - eta * (e_c - e_u)`` from the frozen reference (Gandikota et al., arXiv 2303.07345,
    eq. 7). Differs from the paper: noisy pictures are the model's own drawings with noise added, not
    partially denoised samples, and the shared prior loss is on unless ``lambda_prior=0``. ESD-x is this
    with ``train="cross_attention"``.
    """

    def loss(passes: Passes, config: UnlearnConfig) -> Tensor:
        away = passes.concept.noise_pred - passes.other.noise_pred
        return prior_preservation_loss(
            passes.learner.noise_pred, passes.other.noise_pred - negative_guidance * away
        )

    return Objective("ESD", loss, "arXiv 2303.07345")


def concept_ablation(anchor: str) -> Objective:
    """Ablating concepts: answer for the concept what the reference answers for ``anchor``.

    Kumari et al., arXiv 2303.13516, the model-based variant. Differs from the paper: pictures show the
    concept, not the anchor, as for every other method here.
    """

    def loss(passes: Passes, config: UnlearnConfig) -> Tensor:
        return prior_preservation_loss(passes.learner.noise_pred, passes.other.noise_pred)

    return Objective(f"ablation to {anchor}", loss, "arXiv 2303.13516", anchor=anchor)


def gradient_ascent() -> Objective:
    """A straw man: raise the denoising error on the concept's pictures. Nothing bounds it."""

    def loss(passes: Passes, config: UnlearnConfig) -> Tensor:
        return -prior_preservation_loss(passes.learner.noise_pred, passes.noise)

    return Objective("gradient ascent", loss, "folklore")


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
    card.check(concept)
    kept = [c for c in card.concepts if c != concept] if preserve is None else list(preserve)
    targets = card.prompts(concept)
    anchors = card.prompts(card.check(anchor)) if anchor else [""] * len(targets)
    rest = [p for c in kept for p in card.prompts(card.check(c))]
    c, a, p = (encode_prompts(pipe, t).double().flatten(0, 1) for t in (targets, anchors, rest))  # (n*T, D)
    right = c.T @ c + p.T @ p + ridge * torch.eye(c.shape[1], dtype=torch.float64)
    left = a.T @ c + p.T @ p + ridge * torch.eye(c.shape[1], dtype=torch.float64)  # (D, D)
    change = torch.linalg.solve(right, left.T).T  # W = W0 @ left @ right^-1
    names = [
        n for n, _ in pipe.unet.named_parameters() if n.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))
    ]
    parameters = dict(pipe.unet.named_parameters())
    before = {n: parameters[n].detach().cpu().clone() for n in names}
    for n in names:
        w = parameters[n]
        w.copy_((w.double().cpu() @ change).to(w.dtype))
    history = pd.DataFrame(index=pd.Index([], name="step"))
    seconds = time.perf_counter() - started
    return UnlearningRun(pipe, concept, UnlearnConfig(train="kv"), history, seconds, before, "UCE")
