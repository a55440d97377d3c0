"""Other ways to forget, each in its own published form.

ESD-x, concept ablation and gradient ascent are :class:`~duge_lite.gradient.Objective` values, with the
settings that their papers' code has, as far as they carry over; UCE solves for its weights. What differs is
said in each docstring. None of them gets our regularization, our revisits or our prior-preservation loss
unless the caller asks for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from .concepts import Concept, ModelCard, UnlearnConfig
from .gradient import Answer, Objective
from .losses import prior_preservation_loss
from .models import copied, encode_prompts, overwrite
from .solver import PictureBook, cross_attention_weights, solve_matrix
from .unlearning import UnlearningRun, resolve

PLAIN = UnlearnConfig(
    solver="gradient", lambda_attention=1.0, lambda_prior=0.0, lambda_regularization=0.0, revisit=0.0,
    instead="nameless", iterations=150, target_size=32, lessons=256,
)  # fmt: skip


def _error(predicted: Answer, wanted: Answer) -> Tensor:
    return prior_preservation_loss(predicted[0], wanted[0])


def esd(negative_guidance: float = 1.0) -> tuple[Objective, UnlearnConfig]:
    """Erased Stable Diffusion (ESD-x): predict, for the concept, noise that leads away from it.

    Target ``e_u - eta * (e_c - e_u)`` from the frozen reference, with the empty prompt for u, on pictures
    that are caught half-drawn at guidance 3, the first moment included; all of the cross-attention learns
    (Gandikota et al., arXiv 2303.07345, eq. 7 and algorithm 1). Differs from the paper's code: the half-drawn
    pictures are the reference's, not those of the model as it changes, in batches of 8 and not one by one.
    """

    def target(concept: Answer, other: Answer, noise: Tensor, config: UnlearnConfig) -> Answer:
        return (other[0] - negative_guidance * (concept[0] - other[0]),)

    return Objective("ESD-x", target, _error, half_drawn=3.0, empty=True), PLAIN


def concept_ablation(anchor: str, lambda_prior: float = 0.0) -> tuple[Objective, UnlearnConfig]:
    """Ablating concepts: answer for the concept what the model answers for ``anchor``, an object that stays.

    Kumari et al., arXiv 2303.13516, the model-based variant: pictures of the anchor, the prompt names the
    concept, the target is the learning model's own answer for the anchor under a stopped gradient; keys and
    values learn.
    """

    how = {"moving": True, "trains": (".attn2.to_k", ".attn2.to_v")}
    objective = Objective("concept ablation", lambda concept, other, noise, config: other, _error, **how)
    return objective, replace(PLAIN, lambda_prior=lambda_prior, instead=anchor)


def gradient_ascent() -> tuple[Objective, UnlearnConfig]:
    """A straw man (folklore): raise the denoising error on the concept's pictures. Nothing bounds it."""
    objective = Objective(
        "gradient ascent",
        lambda concept, other, noise, config: (noise,),
        lambda predicted, wanted: -_error(predicted, wanted),
    )
    return objective, replace(PLAIN, iterations=75, lessons=128, lr=1e-4)


@torch.no_grad()
def uce(
    pipe: StableDiffusionPipeline, concept: str | Concept | Sequence[str | Concept], anchor: str = "",
    preserve: Sequence[str] | None = None, ridge: float = 0.5, styled: bool = False,
    card: ModelCard | None = None,
) -> UnlearningRun:  # fmt: skip
    """Unified concept editing: K and V of every cross-attention layer, in closed form, in place.

    For token states c of the concept's name the layer is to answer what it answers for the anchor's (the
    empty prompt by default), for states p of ``preserve`` (by default the card's other concepts) what it
    always did::

        W = (sum W0 a c^T + sum W0 p p^T + ridge W0) (sum c c^T + sum p p^T + ridge I)^-1

    Gandikota et al., arXiv 2308.14761, eq. 7: the equation of :func:`~duge_lite.solver.solve_matrix`, of what
    the layer reads and not of what its heads say. Several concepts are one solve, as in the paper. As in its
    code, names stand alone, and the state is that of their last token (of the empty prompt the one before
    its end). ``styled=True`` (ours) takes all tokens of the concept's prompts in every style, and for the
    anchor the empty prompt's or those of the anchor in the same style; a style becomes the plain one. Raises
    UnknownConceptError for unknown names.
    """
    started = time.perf_counter()
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge = {ridge}: expected 0 or more")
    card, config, goes = resolve(pipe, concept, card)
    own = {c.name for c in goes}
    names = [c for c in card.forgettable if c not in own] if preserve is None else list(preserve)
    if styled:
        asked = [p for c in goes for p in c.prompts]
        plain = card.prompts(anchor) if anchor else [""] * len(card.styles)
        others = [p for c in goes for p in c.instead or (plain * len(c.prompts))[: len(c.prompts)]]
        kept = [p for name in names for p in card.prompts(card.check(name)) if p not in asked]
    else:
        asked, others, kept = [c.name for c in goes], [anchor] * len(goes), names
    c, a, p = (_states(pipe, texts, last=not styled) for texts in (asked, others, kept))  # (n, D) each
    heard, wanted = c.T @ c + p.T @ p, a.T @ c + p.T @ p  # (D, D)
    change = solve_matrix(torch.eye(len(heard), dtype=heard.dtype), heard, wanted, ridge)
    book = PictureBook.known(pipe) or PictureBook.of(pipe, card, config)[0]
    gone, weights = book.gone(pipe), cross_attention_weights(pipe.unet)
    weights = {n: w for n, w in weights.items() if n.endswith((".to_k.weight", ".to_v.weight"))}
    before = copied(weights)
    overwrite(weights, {n: w.double().cpu() @ change for n, w in weights.items()})
    book.remember(pipe, (*gone, *goes))
    history, seconds = pd.DataFrame().rename_axis("layer"), time.perf_counter() - started
    return UnlearningRun(pipe, goes, config, history, seconds, before, book.reference, "UCE")


def _states(pipe: StableDiffusionPipeline, texts: Sequence[str], last: bool) -> Tensor:
    """(n, D), of all tokens or of each text's last one; 64 bits."""
    if not texts:
        return torch.zeros(0, pipe.unet.config.cross_attention_dim, dtype=torch.float64)
    states = encode_prompts(pipe, texts).double()  # (n, T, D)
    if not last:
        return states.flatten(0, 1)
    lengths = pipe.tokenizer(list(texts), truncation=True).attention_mask
    return torch.stack([s[sum(mask) - 2] for s, mask in zip(states, lengths, strict=True)])
