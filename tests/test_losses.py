"""The losses: values worked out by hand, gradients against finite differences, facts worth teaching."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.autograd import gradcheck

from duge_lite.attention import cross_attention_layers, record_attention
from duge_lite.losses import (
    TARGET_KINDS,
    attention_target,
    cross_attention_loss,
    prior_preservation_loss,
    regularization_loss,
)


def tensor(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def random64(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


CONCEPT, EMPTY = tensor(0.7, 0.2, 0.1), tensor(0.3, 0.2, 0.5)


# Targets


@pytest.mark.parametrize(
    ("kind", "eta", "expected"),
    [
        ("uncond", 0.5, (0.3, 0.2, 0.5)),
        ("uncond", 7.0, (0.3, 0.2, 0.5)),  # eta says nothing to "uncond"
        ("negative", 0.5, (0.1, 0.2, 0.7)),
        ("negative", 1.0, (-0.1, 0.2, 0.9)),  # 0.3 - (0.7 - 0.3), ...
        ("negative", 0.0, (0.3, 0.2, 0.5)),
        ("clamped", 0.5, (0.1, 0.2, 0.7)),
        ("clamped", 1.0, (0.0, 2 / 11, 9 / 11)),  # (0, 0.2, 0.9) / 1.1
    ],
)
def test_attention_target_by_hand(kind, eta, expected):
    torch.testing.assert_close(attention_target(CONCEPT, EMPTY, kind, eta), tensor(*expected))


@pytest.mark.parametrize("kind", TARGET_KINDS)
def test_attention_target_carries_no_gradient_and_changes_nothing(kind):
    conditional, unconditional = (x.clone().requires_grad_() for x in (CONCEPT, EMPTY))
    target = attention_target(conditional, unconditional, kind)
    assert not target.requires_grad
    assert torch.equal(conditional, CONCEPT) and torch.equal(unconditional, EMPTY)


def test_attention_target_teaches():
    with pytest.raises(ValueError, match="'positive' is unknown; choose one of uncond, negative"):
        attention_target(CONCEPT, EMPTY, "positive")
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        attention_target(CONCEPT, EMPTY[:2])


def distributions() -> st.SearchStrategy:
    logits = hnp.arrays(np.float64, (2, 5), elements=st.floats(-6, 6))
    return logits.map(lambda x: torch.from_numpy(x).softmax(-1))


@given(distributions(), st.floats(0, 5))
def test_targets_of_maps_sum_to_one(maps, eta):
    conditional, unconditional = maps
    for kind in TARGET_KINDS:
        target = attention_target(conditional, unconditional, kind, eta)
        assert target.sum().item() == pytest.approx(1)
    assert target.min() >= 0  # of "clamped", the last


# The cross-attention loss


def test_cross_attention_loss_by_hand():
    maps = [tensor(1, 2), tensor(0, 0, 3)]
    targets = [tensor(1, 0), tensor(1, 2, 2)]
    # layer 0: (0 + 4) / 2 = 2; layer 1: (1 + 4 + 1) / 3 = 2
    assert cross_attention_loss(maps, targets, relative=False).item() == pytest.approx(2)
    # the targets' mean squares are 1/2 and 9/3: 2 / 0.5 = 4 and 2 / 3
    assert cross_attention_loss(maps, targets).item() == pytest.approx((4 + 2 / 3) / 2)


@given(st.floats(1e-3, 1e3))
def test_relative_loss_does_not_depend_on_the_unit(unit):
    maps, targets = [random64(2, 3)], [random64(2, 3, seed=1)]
    scaled = cross_attention_loss([maps[0] * unit], [targets[0] * unit])
    torch.testing.assert_close(scaled, cross_attention_loss(maps, targets))


def test_cross_attention_loss_teaches():
    with pytest.raises(ValueError, match="got 1 and 2"):
        cross_attention_loss([CONCEPT], [EMPTY, EMPTY])
    with pytest.raises(ValueError, match="at least one; got 0 and 0"):
        cross_attention_loss([], [])
    with pytest.raises(ValueError, match=r"layer 1: map \(3,\) and its target \(1, 3\)"):
        cross_attention_loss([CONCEPT, CONCEPT], [EMPTY, EMPTY[None]])


# Prior preservation


def test_prior_preservation_by_hand():
    loss = prior_preservation_loss(tensor(1, 2, 3, 4), tensor(1, 0, 3, 1))
    assert loss.item() == pytest.approx((0 + 4 + 0 + 9) / 4)


def test_prior_preservation_teaches():
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(4,\)"):
        prior_preservation_loss(torch.ones(2, 4), torch.ones(4))  # would broadcast


# Regularization

NOW = {"a": tensor(1, 2), "b": tensor(3)}
THEN = {"a": tensor(0, 2), "b": tensor(1)}


def test_regularization_by_hand():
    assert regularization_loss(NOW, THEN).item() == pytest.approx((1 + 0 + 4) / 3)


@given(st.integers(1, 5))
def test_regularization_does_not_depend_on_how_weights_are_cut_into_tensors(cut):
    weights, anchor = random64(6), random64(6, seed=1)
    halves = [{"x": w[:cut], "y": w[cut:]} for w in (weights, anchor)]
    whole = regularization_loss({"w": weights}, {"w": anchor})
    torch.testing.assert_close(regularization_loss(*halves), whole)


def test_regularization_teaches():
    with pytest.raises(ValueError, match="'b'"):
        regularization_loss(NOW, {"a": tensor(1, 2)})
    with pytest.raises(ValueError, match="no parameters"):
        regularization_loss({}, {})
    with pytest.raises(ValueError, match=r"a \(2,\) and its target \(1,\)"):  # no silent broadcasting
        regularization_loss({"a": tensor(1, 2)}, {"a": tensor(1)})


# Precision and gradients


LOSSES = {
    "attention": lambda a, b: cross_attention_loss([a], [b]),
    "attention, plain": lambda a, b: cross_attention_loss([a], [b], relative=False),
    "prior": prior_preservation_loss,
    "regularization": lambda a, b: regularization_loss({"w": a}, {"w": b}),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@each_loss
def test_losses_sum_in_32_bits_at_least(loss):
    dtypes = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
    dtypes |= {torch.float32: torch.float32, torch.float64: torch.float64}
    for given_dtype, expected in dtypes.items():
        x = torch.full((4096,), 300.0, dtype=given_dtype)  # 300^2 is beyond what float16 can hold
        value = loss(x, torch.ones_like(x))
        assert value.dtype == expected and value.shape == ()
        assert value.item() == pytest.approx(299**2)


@each_loss
def test_gradient_agrees_with_finite_differences(loss):
    moving, fixed = random64(2, 3, 4).requires_grad_(), random64(2, 3, 4, seed=1)
    assert gradcheck(lambda x: loss(x, fixed), moving)


def test_gradient_of_several_layers():
    a, b = random64(2, 3).requires_grad_(), random64(4).requires_grad_()
    targets = [random64(2, 3, seed=1), random64(4, seed=2)]
    assert gradcheck(lambda *maps: cross_attention_loss(maps, targets), (a, b))


# Facts worth teaching


def recorded(unet, seed: int = 0, kind: str = "probs"):
    """One forward pass of the tiny UNet, with gradients: {layer: maps or outputs}."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    text = torch.randn(1, 24, 128, generator=generator)
    wanted = {"probs": kind == "probs", "outputs": kind == "outputs"}
    with record_attention(unet, **wanted) as record:
        unet(latents, torch.tensor([400]), text)
    return getattr(record, kind)


def own_gradients(unet, layer: str, kind: str) -> dict[str, float]:
    """Gradient norms of a layer's own weights when only that layer's record is matched."""
    seen = recorded(unet, kind=kind)[layer]
    loss = cross_attention_loss([seen], [torch.full_like(seen, 0.1)])
    attn = cross_attention_layers(unet)[layer]
    weights = {n: getattr(attn, n).weight for n in ("to_q", "to_k", "to_v")}
    weights["to_out"] = attn.to_out[0].weight
    grads = torch.autograd.grad(loss, weights.values(), allow_unused=True)
    norms = (0.0 if g is None else g.norm().item() for g in grads)
    return dict(zip(weights, norms, strict=True))


def test_matching_probs_gives_no_gradient_to_the_same_layers_values(tiny_pipe):
    for layer in cross_attention_layers(tiny_pipe.unet):
        grads = own_gradients(tiny_pipe.unet, layer, "probs")
        assert grads["to_v"] == grads["to_out"] == 0
        assert grads["to_q"] > 0 and grads["to_k"] > 0


def test_matching_outputs_reaches_every_weight_of_the_layer(tiny_pipe):
    for layer in cross_attention_layers(tiny_pipe.unet):
        assert min(own_gradients(tiny_pipe.unet, layer, "outputs").values()) > 0


def test_softmax_conserves_mass_so_what_a_word_loses_others_gain(tiny_pipe):
    before = {name: maps.detach() for name, maps in recorded(tiny_pipe.unet).items()}
    word = 3
    optimizer = torch.optim.SGD(tiny_pipe.unet.parameters(), lr=3.0)
    for _ in range(3):  # push attention off one token
        optimizer.zero_grad()
        sum(maps[..., word].mean() for maps in recorded(tiny_pipe.unet).values()).backward()
        optimizer.step()
    after = recorded(tiny_pipe.unet)
    lost = sum((before[n] - after[n])[..., word].mean().item() for n in before)
    others = [i for i in range(24) if i != word]
    gained = sum((after[n] - before[n])[..., others].sum(-1).mean().item() for n in before)
    assert lost > 1e-3
    assert gained == pytest.approx(lost, rel=1e-3)


def test_a_negative_target_leaves_the_unit_interval_and_cannot_be_reached():
    target = attention_target(CONCEPT, EMPTY, "negative", eta=2.0)  # (-0.5, 0.2, 1.3)
    assert target.min() < 0 and target.max() > 1

    def best_loss(target: torch.Tensor) -> float:
        logits = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.3)
        for _ in range(300):
            optimizer.zero_grad()
            loss = cross_attention_loss([logits.softmax(-1)], [target], relative=False)
            loss.backward()
            optimizer.step()
        return loss.item()

    assert best_loss(target) > 0.1  # the nearest distribution is (0, 0, 1): (0.25 + 0.04 + 0.09) / 3
    assert best_loss(attention_target(CONCEPT, EMPTY, "negative", eta=0.5)) < 1e-6
    assert best_loss(attention_target(CONCEPT, EMPTY, "clamped", eta=2.0)) < 1e-4
