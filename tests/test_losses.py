"""The losses: values worked out by hand, gradients against finite differences, facts worth teaching."""

import pytest
import torch
from conftest import random64
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from duge_lite.attention import cross_attention_layers, record_attention
from duge_lite.losses import attention_target as target
from duge_lite.losses import cross_attention_loss, prior_preservation_loss, regularization_loss


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values)


CONCEPT, EMPTY = tensor(0.7, 0.2, 0.1), tensor(0.3, 0.2, 0.5)
NOW, THEN = {"a": tensor(1, 2), "b": tensor(3)}, {"a": tensor(0, 2), "b": tensor(1)}


@pytest.mark.parametrize(("eta", "expected"), [
    (0.5, (0.1, 0.2, 0.7)),
    (1.0, (-0.1, 0.2, 0.9)),  # 0.3 - (0.7 - 0.3), ...
    (0.0, (0.3, 0.2, 0.5)),
])  # fmt: skip
def test_attention_target_by_hand(eta, expected):
    conditional, unconditional = (x.clone().requires_grad_() for x in (CONCEPT, EMPTY))
    found = target(conditional, unconditional, eta)
    torch.testing.assert_close(found, tensor(*expected))
    assert not found.requires_grad
    assert torch.equal(conditional, CONCEPT) and torch.equal(unconditional, EMPTY)


@given(st.integers(0, 2**31), st.floats(0, 5))
def test_targets_of_maps_sum_to_one(seed, eta):
    conditional, unconditional = (6 * random64(2, 5, seed=seed)).softmax(-1)
    assert target(conditional, unconditional, eta).sum().item() == pytest.approx(1)


def test_losses_by_hand():
    maps, targets = [tensor(1, 2), tensor(0, 0, 3)], [tensor(1, 0), tensor(1, 2, 2)]
    # layer 0: (0 + 4) / 2 = 2; layer 1: (1 + 4 + 1) / 3 = 2
    assert cross_attention_loss(maps, targets, relative=False).item() == pytest.approx(2)
    # the targets' mean squares are 1/2 and 9/3: 2 / 0.5 = 4 and 2 / 3
    assert cross_attention_loss(maps, targets).item() == pytest.approx((4 + 2 / 3) / 2)
    loss = prior_preservation_loss(tensor(1, 2, 3, 4), tensor(1, 0, 3, 1))
    assert loss.item() == pytest.approx((0 + 4 + 0 + 9) / 4)
    assert regularization_loss(NOW, THEN).item() == pytest.approx((1 + 0 + 4) / 3)


@given(st.floats(1e-3, 1e3))
def test_relative_loss_does_not_depend_on_the_unit(unit):
    maps, targets = random64(2, 2, 3)
    scaled = cross_attention_loss([maps * unit], [targets * unit])
    torch.testing.assert_close(scaled, cross_attention_loss([maps], [targets]))


@given(st.integers(1, 5))
def test_regularization_does_not_depend_on_how_weights_are_cut_into_tensors(cut):
    weights, anchor = random64(2, 6)
    halves = [{"x": w[:cut], "y": w[cut:]} for w in (weights, anchor)]
    whole = regularization_loss({"w": weights}, {"w": anchor})
    torch.testing.assert_close(regularization_loss(*halves), whole)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: target(CONCEPT, EMPTY[:2]), r"\(3,\).*\(2,\)"),
    (lambda: cross_attention_loss([CONCEPT], [EMPTY, EMPTY]), "got 1 and 2"),
    (lambda: cross_attention_loss([], []), "at least one; got 0 and 0"),
    (lambda: cross_attention_loss([CONCEPT] * 2, [EMPTY, EMPTY[None]]), r"layer 1: map \(3,\) .* \(1, 3\)"),
    (lambda: prior_preservation_loss(torch.ones(2, 4), torch.ones(4)), r"\(2, 4\).*\(4,\)"),
    (lambda: regularization_loss(NOW, {"a": tensor(1, 2)}), "'b'"),
    (lambda: regularization_loss({}, {}), "no parameters"),
    (lambda: regularization_loss({"a": tensor(1, 2)}, {"a": tensor(1)}), r"a \(2,\) and its target \(1,\)"),
])  # fmt: skip
def test_what_does_not_fit_teaches_and_nothing_is_broadcast(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Precision and gradients


LOSSES = {
    "attention": lambda a, b: cross_attention_loss([a], [b]),
    "attention, plain": lambda a, b: cross_attention_loss([a], [b], relative=False),
    "attention, two layers": lambda a, b: cross_attention_loss([a[:1], a[1:]], [b[:1], b[1:]]),
    "prior": prior_preservation_loss,
    "regularization": lambda a, b: regularization_loss({"w": a}, {"w": b}),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_losses_sum_in_32_bits_at_least(loss, dtype):
    x = torch.full((4096,), 300.0, dtype=dtype)  # 300^2 is beyond what float16 can hold
    value = loss(x, torch.ones_like(x))
    assert value.dtype == (dtype if dtype == torch.float64 else torch.float32) and value.shape == ()
    assert value.item() == pytest.approx(299**2)


@each_loss
def test_gradient_agrees_with_finite_differences(loss):
    moving, fixed = random64(3, 2, 4).requires_grad_(), random64(3, 2, 4, seed=1)
    assert gradcheck(lambda x: loss(x, fixed), moving)


# Facts worth teaching


def recorded(unet, kind: str) -> dict[str, torch.Tensor]:
    """One forward pass of the tiny UNet, with gradients: {layer: maps or outputs}."""
    lots = torch.Generator().manual_seed(0)
    latents, text = (torch.randn(*shape, generator=lots) for shape in ((1, 4, 16, 16), (1, 24, 128)))
    with record_attention(unet, probs=kind == "probs", outputs=kind == "outputs") as record:
        unet(latents, torch.tensor([400]), text)
    return getattr(record, kind)


@pytest.mark.parametrize(("kind", "reached"), [("probs", {"q", "k"}), ("outputs", {"q", "k", "v", "out"})])
def test_which_weights_of_its_own_layer_a_match_reaches(tiny_pipe, kind, reached):
    """Matching maps gives no gradient to the same layer's values."""
    for name, layer in cross_attention_layers(tiny_pipe.unet).items():
        seen = recorded(tiny_pipe.unet, kind)[name]
        loss = cross_attention_loss([seen], [torch.full_like(seen, 0.1)])
        own = {"q": layer.to_q, "k": layer.to_k, "v": layer.to_v, "out": layer.to_out[0]}
        slopes = torch.autograd.grad(loss, [part.weight for part in own.values()], allow_unused=True)
        assert {n for n, g in zip(own, slopes, strict=True) if g is not None and g.norm() > 0} == reached


def test_softmax_conserves_mass_so_what_a_word_loses_others_gain(tiny_pipe):
    def shares() -> torch.Tensor:  # of each of 24 words, summed over layers
        return sum(maps.mean((0, 1, 2)) for maps in recorded(tiny_pipe.unet, "probs").values())

    before, word = shares().detach(), 3
    optimizer = torch.optim.SGD(tiny_pipe.unet.parameters(), lr=3.0)
    for _ in range(3):  # push attention off one token
        optimizer.zero_grad()
        shares()[word].backward()
        optimizer.step()
    gained = shares().detach() - before
    lost = -float(gained[word])
    assert lost > 1e-3 and float(gained.sum()) == pytest.approx(0, abs=1e-3 * lost)


@pytest.mark.parametrize(("eta", "out"), [(2.0, True), (0.5, False)])
def test_a_negative_target_that_leaves_the_unit_interval_cannot_be_reached(eta, out):
    wanted, logits = target(CONCEPT, EMPTY, eta), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        loss = cross_attention_loss([logits.softmax(-1)], [wanted], relative=False)
        loss.backward()
        optimizer.step()
    assert bool(wanted.min() < 0) == bool(wanted.max() > 1) == out  # (-0.5, 0.2, 1.3), whose nearest
    assert loss > 0.1 if out else loss < 1e-6  # distribution is (0, 0, 1): (0.25 + 0.04 + 0.09) / 3
