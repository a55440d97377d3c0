r"""The three losses of DUGE: pure functions of tensors, which both solvers minimise.

.. math:: L = \lambda_U L_U + \lambda_{pr} L_{pr} + \lambda_R R_{pr}

The abstract (arXiv 2503.13769) names the three terms; their exact form is known to us only from reviews of
the paper, so what is uncertain is an argument here, and each default is *ours*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def _squared(a: Tensor, b: Tensor, what: str) -> Tensor:
    """(a - b)^2 in at least 32 bits: 16 are too coarse to sum in. ``what`` is named if the shapes differ."""
    if a.shape != b.shape:
        raise ValueError(f"{what} {tuple(a.shape)} and its target {tuple(b.shape)} differ in shape")
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) - b.to(wide)).square()


def attention_target(conditional: Tensor, unconditional: Tensor, eta: float = 0.5) -> Tensor:
    """What the concept's attention should become, from the frozen reference's two passes.

    Args:
        conditional: the reference's maps (B, heads, H*W, T), layer outputs (B, H*W, C) or what its heads hear
            (heads, R, D), for a prompt with the concept.
        unconditional: the same for what is asked instead.
        eta: how far past the unconditional value u the target lies, ``u - eta * (c - u)``: 0 is u itself,
            and more can leave [0, 1] where maps are given.

    Returns a tensor of the same shape, without gradient. Raises ValueError for shapes that differ. Source:
    the comparison of the concept's map with the unconditional one is the paper's (as reviews report it); the
    way past it is ours.
    """
    if conditional.shape != unconditional.shape:
        shapes = tuple(conditional.shape), tuple(unconditional.shape)
        raise ValueError("conditional {} and unconditional {} differ in shape".format(*shapes))
    return (unconditional - eta * (conditional - unconditional)).detach()


def cross_attention_loss(maps: Sequence[Tensor], targets: Sequence[Tensor], relative: bool = True) -> Tensor:
    r"""Mean over layers of the squared distance to the target: :math:`L_U = \frac1M \sum_i (A_i - A_i^*)^2`.

    ``maps`` are those of the model that learns, one tensor per cross-attention layer, ``targets`` of the same
    shapes, from :func:`attention_target`. ``relative`` divides each layer's term by the target's mean square,
    so that a layer that writes small numbers counts as much as one that writes large ones (ours; ``False`` is
    the plain form). Returns a scalar. Raises ValueError when the lists or the shapes do not fit.
    """
    if len(maps) != len(targets) or not maps:
        raise ValueError(
            f"expected as many targets as maps, at least one; got {len(maps)} and {len(targets)}"
        )
    terms = []
    for layer, (a, b) in enumerate(zip(maps, targets, strict=True)):
        term = _squared(a, b, f"layer {layer}: map").mean()
        size = _squared(b, torch.zeros_like(b), "target").mean().clamp(min=1e-12)
        terms.append(term / size if relative else term)
    return torch.stack(terms).mean()


def prior_preservation_loss(prediction: Tensor, target: Tensor) -> Tensor:
    r"""Mean squared error on memory pictures: :math:`L_{pr} = E|\epsilon - \epsilon_\theta|^2`.

    ``target`` is the true noise (the paper's form) or the frozen reference's own answer (our default: it asks
    the model to stay itself, not to become better): of the whole denoiser, (B, 4, h, w), or of every head of
    a layer. Returns a scalar. Raises ValueError for shapes that differ.
    """
    return _squared(prediction, target, "prediction").mean()


def regularization_loss(parameters: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Tensor:
    r"""Mean squared distance of the weights from the base's: :math:`R = \frac1N |\theta - \theta_0|^2`.

    ``parameters`` are the trained tensors by name, ``base`` the same tensors, frozen. Returns a scalar.
    Raises ValueError when they do not fit. The regularizer is the paper's, its form ours.
    """
    if parameters.keys() != base.keys():
        raise ValueError(f"parameters and base name different tensors: {set(parameters) ^ set(base)}")
    if not parameters:
        raise ValueError("nothing to regularize: no parameters were given")
    total = sum(_squared(p, base[name], name).sum() for name, p in parameters.items())
    return total / sum(p.numel() for p in parameters.values())
