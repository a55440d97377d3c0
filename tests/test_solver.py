"""The exact solver: what its minimum is by hand and by theory, that order is nothing to it, and its book."""

import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from conftest import EXACT, MEMORY, changed, distance, family, forget, interrupted, random64, undone, weights
from diffusers.models.attention_processor import Attention
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

import duge_lite as duge
from duge_lite import losses, model_card
from duge_lite.models import encode_prompts
from duge_lite.solver import PictureBook, Sums, heard, solve_matrix, solved_matrix

# The maths


def test_ridge_by_hand():
    """z = (1, 0) is to be heard as (0, 1): what V says of it, (1, 3), goes half the way to (2, 4)."""
    base = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]).double()  # one head, two channels, two numbers of text
    z, wanted = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    new = solve_matrix(base, torch.outer(z, z)[None], torch.outer(wanted, z)[None], ridge=1.0)
    torch.testing.assert_close(new, torch.tensor([[[1.5, 2.0], [3.5, 4.0]]]).double())


@given(st.integers(0, 2**31), st.integers(1, 7) | st.just(50))
def test_without_ridge_the_least_change_that_fits(seed, heard):
    """Where fewer directions are heard than the 8 that there are, the others stay; else least squares."""
    base, z, wanted = random64(1, 3, 8, seed=seed), *random64(2, heard, 8, seed=seed + 1)
    new = solve_matrix(base, z.T @ z[None], wanted.T @ z[None], ridge=0.0)[0]
    if heard > 8:
        torch.testing.assert_close(new.T, torch.linalg.lstsq(z, wanted @ base[0].T).solution)
    else:
        torch.testing.assert_close(new @ z.T, base[0] @ wanted.T, rtol=1e-4, atol=1e-4)
        aside = torch.linalg.svd(z)[2][heard:]  # (8 - heard, 8)
        torch.testing.assert_close(new @ aside.T, base[0] @ aside.T, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=["output", "values"])
def layer(request):
    """What a layer's matrix reads of three texts (it goes, it is asked instead, it stays), and the matrix."""
    torch.manual_seed(0)
    attn = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=5).double()
    hidden, texts = random64(3, 7, 16), random64(3, 3, 6, 12, seed=1)
    with torch.no_grad():
        rows = [heard(attn, hidden, text, request.param).double() for text in texts]
    return rows, solved_matrix(attn, request.param).detach()


@torch.no_grad()
def test_what_is_read_makes_what_the_layer_writes():
    """Output times what the heads say: diffusers' own answer. Values times what they hear: what they say."""
    torch.manual_seed(1)
    attn = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=5)
    hidden, text = torch.randn(3, 7, 16), torch.randn(3, 6, 12)
    said, z = heard(attn, hidden, text, "output"), heard(attn, hidden, text, "values")
    wrote = (said @ solved_matrix(attn, "output").mT)[:, 0] + attn.to_out[0].bias
    torch.testing.assert_close(wrote, attn(hidden, encoder_hidden_states=text))
    spoken = (z @ solved_matrix(attn, "values").mT).transpose(1, 2).flatten(2)
    torch.testing.assert_close(spoken, said[:, 0])


@torch.no_grad()
@given(st.integers(0, 2**31), st.sampled_from([1e-3, 1e-1]), st.sampled_from([0.0, 0.5, 0.7]))
def test_the_sums_hold_the_losses_and_no_step_from_the_solution_lowers_them(layer, seed, size, eta):
    """From the sums alone, what losses.py says of every place, at any values."""
    (f, other, stay), base = layer
    target, step = losses.attention_target(f, other, eta=eta), random64(*base.shape, seed=seed)
    went, kept, lambdas = Sums(f, target), Sums(stay), torch.tensor([0.7, 1.3, 0.05]).double()

    def three(v) -> torch.Tensor:
        forget = losses.cross_attention_loss([f @ v.mT], [target @ base.mT], relative=False)
        prior = losses.prior_preservation_loss(stay @ v.mT, stay @ base.mT)
        pull = losses.regularization_loss({"v": v}, {"v": base}) * v.shape[-1]  # per channel, as the others
        return torch.stack([forget, prior, pull])

    away = base + 0.3 * step
    assert [went.loss(away, base), kept.loss(away, base)] == pytest.approx(three(away)[:2].tolist(), rel=1e-6)
    a, b, r = lambdas
    best = solve_matrix(base, a * went.heard + b * kept.heard, a * went.wanted + b * kept.wanted, r)
    lowest, near, first = (float(lambdas @ three(v)) for v in (best, best + size * step / step.norm(), base))
    assert lowest <= near and lowest < first


# Whole models


def gone(pipe) -> list[str]:
    return [c.name for c in PictureBook.known(pipe).gone(pipe)]


def test_every_layer_hears_less_of_it_and_the_rest_is_left_alone(tiny_pipe):
    history = forget(tiny_pipe).history
    assert (history["attention after"] < 0.2 * history["attention before"]).all()
    assert (history["prior after"] < 0.1 * history["attention before"]).all()
    assert (history["prior before"] == 0).all() and (history.change > 0.01).all()


def test_without_the_attention_loss_the_base_weights_stay(tiny_pipe):
    before = weights(tiny_pipe)
    for what, others in (("apple", {}), ("car", {"lambda_prior": 0.0})):
        forget(tiny_pipe, what, lambda_attention=0.0, **others)
        assert distance(weights(tiny_pipe), before) < 1e-6


def test_without_the_prior_loss_only_the_ridge_holds(tiny_pipe):
    base, free = weights(tiny_pipe), {"lambda_prior": 0.0}
    far = [forget(tiny_pipe, lambda_regularization=r, **free).history.mean() for r in (1e-2, 1.0, 1e6)]
    assert far[0].change > far[1].change > far[2].change and far[2].change < 1e-4
    assert distance(weights(tiny_pipe), base) < 1e-4
    kept = forget(tiny_pipe, lambda_regularization=1e-2).history.mean()
    assert kept["prior after"] < 0.5 * far[0]["prior after"]


def test_the_order_of_requests_is_nothing(tiny_pipe):
    base, ends = weights(tiny_pipe), []
    for order in (["apple", "neon", "car"], ["car", "apple", "neon"], [["neon", "apple"], "car"]):
        runs = [forget(tiny_pipe, what) for what in order]
        ends.append(weights(tiny_pipe))
        for run in reversed(runs):
            run.restore()
        assert not changed(tiny_pipe, base)
    assert distance(ends[1], ends[0]) < 1e-4 and distance(ends[2], ends[0]) < 1e-4


def test_requests_add_up_and_the_last_is_undone_exactly(tiny_pipe):
    first, one = forget(tiny_pipe), weights(tiny_pipe)
    second, both = forget(tiny_pipe, "car"), weights(tiny_pipe)
    gap = [float(run.history["attention after"].mean()) for run in (first, second)]
    assert gap[1] < 3 * gap[0] and changed(tiny_pipe, one)
    again = forget(tiny_pipe)  # what went is asked for again
    assert not changed(tiny_pipe, both) and not again.before
    second.restore()
    assert not changed(tiny_pipe, one) and gone(tiny_pipe) == ["apple"]


@pytest.mark.parametrize("how", [{"lambda_attention": 0.0, "lambda_prior": 0.0}, {"solver": "gradient"}])
def test_what_did_not_change_the_model_did_not_go(tiny_pipe, how):
    """Without effect, or stopped at once: the base weights are those of a model that forgot nothing."""
    with interrupted(tiny_pipe, KeyboardInterrupt, 1) if "solver" in how else nullcontext():
        forget(tiny_pipe, **how)
    assert gone(tiny_pipe) == []


@pytest.mark.parametrize("kind", ["sd1", "v", "sdxl"])
def test_any_word_goes_from_any_family(kind, tokenizer):
    pipe = family(kind, tokenizer)
    before = weights(pipe)
    history = forget(pipe, "Van Gogh", instead="nameless").history
    assert (history["attention after"] < history["attention before"]).all()
    moved = changed(pipe, before)
    assert len(moved) >= len(history) and all(".attn2." in name for name in moved)
    if kind == "sdxl":
        with pytest.raises(ValueError, match='leave solver="exact"'):
            forget(pipe, "apple", solver="gradient")
        with pytest.raises(ValueError, match="which only drawing and the exact solver know"):
            forget(pipe, "car", instead="nameless").noise_loss()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype, tokenizer):
    """From the start; and ``pipe.to(dtype)`` after forgetting: what went is known, and goes on being gone."""
    full, pipe = family("sd1", tokenizer), family("sd1", tokenizer).to(dtype)
    forget(full, instead="nameless")
    base, wanted, book = weights(pipe), weights(full), PictureBook.known(full)
    run, now = forget(pipe, instead="nameless"), weights(pipe)
    assert {p.dtype for p in pipe.unet.parameters()} == {dtype}
    moved = changed(pipe, base)
    for name in moved:
        torch.testing.assert_close(now[name].float(), wanted[name], rtol=0.1, atol=0.05)
    run.restore()
    assert moved and not changed(pipe, base)
    assert gone(full.to(dtype)) == ["apple"]
    forget(full, "car", instead="nameless")
    assert gone(full) == ["apple", "car"] and PictureBook.known(full) is book


def test_numbers_that_are_none_teach(tiny_pipe):
    tiny_pipe.unet.conv_in.bias.data[0] = float("nan")
    before = weights(tiny_pipe)
    del before["conv_in.bias"]
    with pytest.raises(duge.errors.DivergedError, match="down_blocks.*not finite"):
        forget(tiny_pipe)
    assert not changed(tiny_pipe, before)


# The book


def passes(pipe, what="apple", **how) -> int:
    """How often the denoiser is asked while the pipeline forgets."""
    with patch.object(pipe.unet, "forward", wraps=pipe.unet.forward) as spy:
        forget(pipe, what, **how)
    return spy.call_count


def test_every_prompt_is_drawn_once(tiny_pipe):
    memory = [*MEMORY, *model_card(tiny_pipe).prompts("car")]
    assert passes(tiny_pipe, memory=memory) > 0
    assert passes(tiny_pipe, "car", memory=memory) == 0  # its pictures were memory: they only change sides
    tiny_pipe.unet.conv_in.weight.data *= 1.01  # another base has another book
    assert passes(tiny_pipe, "harp", memory=memory) > 0 and gone(tiny_pipe) == ["harp"]


@pytest.mark.parametrize("other", [{"guidance_scale": 2.0}, {"concepts": ("apple", "car", "star")}])
def test_another_card_has_another_book(tiny_pipe, other):
    card = model_card(tiny_pipe)
    forget(tiny_pipe, card=card)
    run = forget(tiny_pipe, "car", card=replace(card, **other))
    assert PictureBook.known(tiny_pipe).card == replace(card, **other) and gone(tiny_pipe) == ["apple", "car"]
    run.restore()
    assert gone(tiny_pipe) == ["apple"], "it knows the weights that the old one knew"


@pytest.mark.slow
def test_the_book_on_disk(tiny_pipe, fresh, tmp_path):
    """Read by a model of the same weights, unless it is damaged: then it is drawn and written anew."""
    drawn, file = passes(tiny_pipe, directory=tmp_path), tmp_path / "book.safetensors"
    whole, flipped = file.read_bytes(), bytearray(file.read_bytes())
    flipped[-1000] ^= 0x40
    for content in (None, b"", b"not a book", whole[:-9], flipped, None):
        if content is not None:
            file.write_bytes(content)
        other = fresh()
        assert passes(other, directory=tmp_path) == (0 if content is None else drawn)
        assert not changed(other, weights(tiny_pipe))
    stranger = fresh()
    stranger.unet.conv_in.weight.data *= 1.01
    assert passes(stranger, directory=tmp_path) == drawn


def test_each_request_keeps_what_it_asked_instead(tiny_pipe, fresh):
    """A later request with other settings does not change what is asked in the place of an earlier one."""
    forget(tiny_pipe, "apple", instead="house")
    forget(tiny_pipe, "car", instead="nameless")
    asked = {c.name: c.instead[0] for c in PictureBook.known(tiny_pipe).gone(tiny_pipe)}
    assert asked == {"apple": "a photo of a house", "car": "a photo"}
    other = fresh()
    forget(other, "car", instead="nameless")
    forget(other, "apple", instead="house")
    assert distance(weights(other), weights(tiny_pipe)) < 1e-4


def test_a_full_disk_says_so_and_leaves_nothing_half(tiny_pipe, tmp_path, monkeypatch):
    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(duge.solver, "save_file", full)
    with undone(tiny_pipe, OSError, "could not write .*book.safetensors .*No space left"):
        forget(tiny_pipe, directory=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_memory_names_nothing_that_is_gone(tiny_pipe):
    card, shows = model_card(tiny_pipe), "a photo of an apple next to a car"
    book = PictureBook(tiny_pipe, card, EXACT, ["a sketch of an Apple", shows, "a mosaic"])
    ends, kept = book.wishes(tiny_pipe, [card.concept("apple", "star")])
    assert kept == ["a mosaic"] and ends["a sketch of an apple"] == "a sketch of a star"
    wrong = "expected prompts of what is to stay"
    for memory, told in (([shows], "every picture .* shows what is to go"), ([], wrong), ([3], wrong)):
        with pytest.raises(ValueError, match=told):
            forget(tiny_pipe, memory=memory)


def test_the_nearest_that_stays_is_asked_instead(tiny_pipe):
    card = model_card(tiny_pipe)
    book = PictureBook(tiny_pipe, card, replace(EXACT, instead="nearest"), MEMORY)
    apple, star = card.concept("apple"), card.concept("star")
    ranking = book.ranking(tiny_pipe, apple)
    assert set(ranking.index) == set(card.concepts) - {"apple"} and ranking.is_monotonic_increasing
    near = card.concept(ranking.index[0])
    assert book.wishes(tiny_pipe, [apple])[0] == dict(zip(apple.prompts, near.prompts, strict=True))
    ends, _ = book.wishes(tiny_pipe, [near, star, apple])
    assert ends == book.wishes(tiny_pipe, [apple, near, star])[0]
    assert not any(c.named_in(end) for c in (near, star, apple) for end in ends.values())


def test_the_book_goes_with_its_pipeline(fresh):
    pipe = fresh()
    forget(pipe)
    book = weakref.ref(PictureBook.known(pipe))
    del pipe
    gc.collect()
    assert book() is None


def test_silence_takes_the_step_of_the_name_where_nothing_is_said(tiny_pipe):
    off = {}
    for weight in (0.0, 1.0):
        run = forget(tiny_pipe, lambda_silence=weight)
        book, now = PictureBook.known(tiny_pipe), dict(tiny_pipe.unet.named_parameters())
        ends, _ = book.wishes(tiny_pipe, run.concepts)
        texts = [
            encode_prompts(tiny_pipe, part) for part in (list(ends), list(ends.values()), [""] * len(ends))
        ]
        for name, attn in book.layers.items():
            own, other, untold = (heard(attn, book._rows(name, list(ends)), text, "output") for text in texts)
            matrix = f"{name}.to_out.0.weight"
            wrote, wanted = untold @ now[matrix].T, (untold + other - own) @ book.reference[matrix].T
            off[weight] = off.get(weight, 0) + float((wrote - wanted).detach().square().mean())
        run.restore()
    assert off[1.0] < off[0.0] / 2
