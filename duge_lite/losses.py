r"""The three losses of DUGE: pure functions of tensors.

The total that unlearning minimises is

.. math:: L = \lambda_U L_U + \lambda_{pr} L_{pr} + \lambda_R R_{pr}

(arXiv 2503.13769). The abstract names the three terms; their exact form is known to us only from
reviews of the paper, so what is uncertain is an argument here, and each default is *ours*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

TARGET_KINDS = ("uncond", "negative", "clamped")


def _wide(x: Tensor) -> Tensor:
    """At least 32 bits: 16 are too coarse to sum squares in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention_target(
    conditional: Tensor, unconditional: Tensor, kind: str = "negative", scale: float = 0.5
) -> Tensor:
    """What the concept's attention should become, from the frozen reference's two passes.

    Args:
        conditional: the reference's maps (B, heads, H*W, T) or layer outputs (B, H*W, C) for a
            prompt with the concept.
        unconditional: the same for the empty prompt.
        kind: ``"uncond"``: the unconditional value itself; ``"negative"``: one further step away,
            ``u - scale * (c - u)``, which for maps can leave [0, 1]; ``"clamped"``: the negative one cut
            at zero and renormalised over the last axis (for maps only).
        scale: eta, how far past the unconditional value; not used by ``"uncond"``.

    Returns a tensor shaped like ``conditional``, without gradient. Source: the comparison of the
    concept's map with the unconditional one is the paper's (as reviews report it); the kinds are ours.
    """
    if kind not in TARGET_KINDS:
        raise ValueError(f"target kind {kind!r} is unknown; choose one of {', '.join(TARGET_KINDS)}")
    if conditional.shape != unconditional.shape:
        raise ValueError(
            f"conditional {tuple(conditional.shape)} and unconditional {tuple(unconditional.shape)} "
            "differ in shape"
        )
    if kind == "uncond":
        return unconditional.detach()
    target = (unconditional - scale * (conditional - unconditional)).detach()
    if kind == "negative":
        return target
    target = target.clamp(min=0)
    return target / target.sum(dim=-1, keepdim=True).clamp(min=1e-8)


def mean_squares(tensors: Sequence[Tensor]) -> Tensor:
    """How large the numbers of each tensor are, (n,)."""
    return torch.stack([_wide(x).square().mean() for x in tensors])


def cross_attention_loss(
    maps: Sequence[Tensor], targets: Sequence[Tensor], relative: bool = True, sizes: Tensor | None = None
) -> Tensor:
    r"""Mean over layers of the squared distance to the target: :math:`L_U = \frac1M \sum_i (A_i - A_i^*)^2`.

    Args:
        maps: one tensor per cross-attention layer, of the model that learns.
        targets: same shapes, from :func:`attention_target`.
        relative: divide each layer's term by the target's mean square, so that a layer that writes
            small numbers counts as much as one that writes large ones (ours; ``False`` is the plain form).
        sizes: what ``relative`` divides by instead, (M,), when ``targets`` are part of a larger batch.

    Returns a scalar. Raises ValueError when the lists or the shapes do not fit.
    """
    if len(maps) != len(targets) or not maps:
        raise ValueError(
            f"expected as many targets as maps, at least one; got {len(maps)} and {len(targets)}"
        )
    sizes = mean_squares(targets) if relative and sizes is None else sizes
    terms = []
    for layer, (a, b) in enumerate(zip(maps, targets, strict=True)):
        if a.shape != b.shape:
            raise ValueError(
                f"layer {layer}: map {tuple(a.shape)} and target {tuple(b.shape)} differ in shape"
            )
        term = (_wide(a) - _wide(b)).square().mean()
        terms.append(term / sizes[layer].clamp(min=1e-12) if relative else term)
    return torch.stack(terms).mean()


def prior_preservation_loss(noise_pred: Tensor, target: Tensor) -> Tensor:
    r"""Mean squared error of the predicted noise on memory pictures.

    :math:`L_{pr} = E|\epsilon - \epsilon_\theta|^2`.

    ``target`` (B, 4, h, w) is the true noise (the paper's form) or the frozen reference's own prediction
    (our default: it asks the model to stay itself, not to become better). Returns a scalar.
    """
    if noise_pred.shape != target.shape:
        raise ValueError(
            f"noise_pred {tuple(noise_pred.shape)} and target {tuple(target.shape)} differ in shape"
        )
    return (_wide(noise_pred) - _wide(target)).square().mean()


def regularization_loss(
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor] | None = None,
) -> Tensor:
    r"""Weighted mean squared distance of the trained weights from an anchor.

    :math:`R = \frac1N \sum_j w_j (\theta_j - \bar\theta_j)^2`.

    Args:
        parameters: the trained tensors by name.
        anchor: the same tensors, frozen.
        importance: a non-negative weight for each number (Fisher or MAS); all ones (plain L2) when None.

    Returns a scalar. That there is a regularizer on the parameters is the paper's; its form is ours.
    """
    if parameters.keys() != anchor.keys():
        raise ValueError(f"parameters and anchor name different tensors: {set(parameters) ^ set(anchor)}")
    if not parameters:
        raise ValueError("nothing to regularize: no parameters were given")
    count = sum(p.numel() for p in parameters.values())
    total = 0.0
    for name, p in parameters.items():
        if p.shape != anchor[name].shape:
            raise ValueError(f"{name}: {tuple(p.shape)} here and {tuple(anchor[name].shape)} in the anchor")
        square = (_wide(p) - _wide(anchor[name])).square()
        total = total + (square if importance is None else square * _wide(importance[name])).sum()
    return total / count


def free_directions(states: Tensor, share: float) -> Tensor:
    """Projects onto what text states do not use: a matrix (D, D) for changes of a layer that reads them.

    A change ``W -> W + C @ P`` of a linear layer leaves its answers to the protected directions as they
    were. These are the principal ones of ``states`` (n, D), as many as hold ``share`` of their energy, 0 to
    1 (gradient projection memory, Saha et al., arXiv 2103.09762; for the text that K and V read: ours).
    """
    energy, directions = torch.linalg.eigh(states.double().T @ states.double())  # ascending
    energy, directions = energy.flip(0).clamp(min=0), directions.flip(1)
    before = (energy.cumsum(0) - energy) / energy.sum()  # what the larger ones hold already
    kept = directions[:, before < share - 1e-12]  # (D, k)
    return (torch.eye(len(energy), dtype=torch.float64, device=states.device) - kept @ kept.T).to(
        states.dtype
    )


IMPORTANCE_KINDS = ("fisher", "mas")


def estimate_importance(
    parameters: Mapping[str, Tensor], scalars: Iterable[Tensor], kind: str = "fisher"
) -> dict[str, Tensor]:
    """How much each number matters, from gradients of ``scalars``, one per memory picture or batch.

    Args:
        parameters: tensors by name that the scalars depend on.
        scalars: for ``"fisher"`` the losses, for ``"mas"`` the squared norms of the outputs; computed one
            at a time, so a generator keeps one graph in memory.
        kind: ``"fisher"`` averages squared gradients (elastic weight consolidation, Kirkpatrick et al.,
            arXiv 1612.00796), ``"mas"`` absolute ones (memory aware synapses, Aljundi et al., arXiv
            1711.09601).

    Returns a non-negative tensor per parameter, scaled to mean 1 over all of them, so that one weight of the
    regularization loss fits every kind. Raises ValueError when there is nothing to learn it from.
    """
    if kind not in IMPORTANCE_KINDS:
        raise ValueError(f"importance kind {kind!r} is unknown; choose one of {', '.join(IMPORTANCE_KINDS)}")
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    for scalar in scalars:
        gradients = torch.autograd.grad(scalar, list(parameters.values()), allow_unused=True)
        for total, gradient in zip(totals.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient.float().square() if kind == "fisher" else gradient.float().abs()
    mean = sum(t.sum() for t in totals.values()) / max(1, sum(t.numel() for t in totals.values()))
    if not mean > 0:
        raise ValueError("no gradient reached any parameter: pass scalars that depend on them, at least one")
    return {name: total / mean for name, total in totals.items()}
