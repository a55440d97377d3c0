"""Runs: what they change, how they stop, the way back, and what is on disk. The gradient solver's loop."""

import asyncio
import copy
import hashlib
import json
from dataclasses import replace
from unittest.mock import Mock

import conftest
import pandas as pd
import pytest
import torch
from conftest import BOTH, EXACT, GRADIENT, MEMORY, changed, distance, forget, interrupted, undone, weights
from safetensors.torch import load, load_file, save

import duge_lite as duge
from duge_lite import UnlearnConfig, UnlearningRun, baselines, gradient, solver, unlearn, unlearn_steps
from duge_lite.errors import DivergedError, OutOfMemoryError, UnknownConceptError
from duge_lite.models import draw_pictures


def copy_of(pipe, dtype: torch.dtype):
    parts = {k: copy.deepcopy(v) for k, v in pipe.components.items()}
    own = type(pipe)(**parts, requires_safety_checker=False).to(dtype)
    own.set_progress_bar_config(disable=True)
    return own


def look(pipe) -> torch.Tensor:
    return duge.sample(pipe, "a photo of an apple", num_inference_steps=2, output_type="latent")


# The settings, and one clear sentence for what is most often mixed up


def test_the_weights_suit_the_solver_unless_they_are_chosen():
    assert UnlearnConfig(solver="gradient").weights == (1.0, 100.0, 10.0)
    assert UnlearnConfig(lambda_prior=0.0).weights == (1.0, 0.0, 1e-3)


WRONG = {
    TypeError: [
        (lambda pipe: unlearn(None, "apple"), "pipe is NoneType: expected a pipeline"),
        (lambda pipe: duge.unlearn_sequence("apple", ["apple"]), "pipe is str: expected a pipeline"),
        (lambda pipe: unlearn(pipe, "apple", {}), r"config is dict: expected duge.UnlearnConfig"),
        (lambda pipe: duge.unlearn_sequence(pipe, ["apple"], {"lr": 1}), "config is dict"),
        (lambda pipe: unlearn(pipe, None), "None is no concept: expected a name"),
        (lambda pipe: unlearn(pipe, 3), "3 is no concept"),
        (lambda pipe: unlearn(pipe, ["apple", None]), "None is no concept"),
        (lambda pipe: duge.sample(None, "a car"), "pipe is NoneType: expected a pipeline"),
        (lambda pipe: duge.sample(pipe, None), "a prompt is None: expected a text"),
        (lambda pipe: duge.sample(pipe, "a car", seed="3"), "seed = '3': expected a whole number"),
        (lambda pipe: duge.sample(pipe, "a car", seed=1.5), "seed = 1.5: expected a whole number"),
        (lambda pipe: duge.sample(pipe, "a car", steps=3), "unexpected keyword argument 'steps'"),
    ],
    UnknownConceptError: [(lambda pipe: duge.unlearn_sequence(pipe, ("car", "aple")), "'aple'")],
    ValueError: [
        (lambda pipe: unlearn(pipe, []), "no concept: expected at least one"),
        (lambda pipe: next(unlearn_steps(pipe, "apple", EXACT)), "exact solver has no steps"),
        (lambda pipe: unlearn(pipe, ["apple", "car", "harp"], GRADIENT), "= 2, .* for each of 3 concepts"),
        (lambda pipe: unlearn(pipe, "apple", EXACT, objective=baselines.esd()[0]), "'ESD-x' goes with"),
        (lambda _: UnlearnConfig(solver="magic"), "solver = 'magic': expected \"exact\" or"),
        (lambda _: UnlearnConfig(solve="outptu"), "solve = 'outptu': expected"),
        (lambda _: UnlearnConfig(iterations=1.5), "iterations = 1.5: expected a whole number, at least 1"),
        (lambda _: UnlearnConfig(memory_size=0), "memory_size = 0"),
        (lambda _: UnlearnConfig(places=True), "places = True"),
        (lambda _: UnlearnConfig(seed="3"), "seed = '3': expected a whole number"),
        (lambda _: UnlearnConfig(lr=0), "lr = 0: expected a number above 0"),
        (lambda _: UnlearnConfig(lambda_attention=-1), r"lambda_attention = -1: expected 0 \(off\) or more"),
        (lambda _: UnlearnConfig(lambda_regularization=torch.nan), "lambda_regularization = nan"),
        (lambda _: UnlearnConfig(eta="1"), "eta = '1': expected 0"),
        (lambda _: UnlearnConfig(revisit=1.0), "revisit = 1.0: expected a share"),
        (lambda _: UnlearnConfig(lessons=9), "lessons = 9: expected at least target_size, 10"),
        (lambda _: UnlearnConfig("gradient", lambda_silence=1), "lambda_silence = 1: expected 0, or the"),
        (lambda _: UnlearnConfig(instead=None), "instead = None: expected"),
    ],
}


@pytest.mark.parametrize(("kind", "call", "told"), [(k, *row) for k, rows in WRONG.items() for row in rows])
def test_what_does_not_fit_teaches(tiny_pipe, kind, call, told):
    with undone(tiny_pipe, kind, told):
        call(tiny_pipe)


# What a run changes, and the way back


@BOTH
def test_a_run_its_undo_and_its_seed(tiny_pipe, config):
    others = torch.nn.ModuleList([tiny_pipe.text_encoder, tiny_pipe.vae])
    state, before = copy.deepcopy(others.state_dict()), weights(tiny_pipe)
    put_back, random = conftest.footprint(tiny_pipe), torch.get_rng_state()
    run, learned = forget(tiny_pipe, config=config), weights(tiny_pipe)
    moved, attention = changed(tiny_pipe, before), {n for n in before if ".attn2." in n}
    assert moved == set(run.before) and (moved < attention if config is EXACT else moved == attention)
    assert conftest.footprint(tiny_pipe) == put_back and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in others.state_dict().items())
    assert run.concept == "apple" and run.seconds > 0 and "tensor" not in repr(run)
    for _ in range(2):  # twice does no harm
        run.restore()
        assert not changed(tiny_pipe, before)
    torch.manual_seed(22)  # the global state must not matter
    again = forget(tiny_pipe, config=config)
    assert not changed(tiny_pipe, learned)
    pd.testing.assert_frame_equal(again.history, run.history, check_exact=True)
    again.restore()
    forget(tiny_pipe, config=config, seed=4)
    assert changed(tiny_pipe, learned)


@BOTH
def test_a_callers_autocast_sees_the_new_weights(tiny_pipe, config):
    with torch.autocast("cpu", torch.bfloat16):
        before = look(tiny_pipe)
        run = forget(tiny_pipe, config=config, lr=1e-2)
        assert not torch.equal(look(tiny_pipe), before)
        run.restore()
        assert torch.equal(look(tiny_pipe), before)


def test_the_noise_is_checked_that_nobody_optimised(tiny_pipe):
    run = forget(tiny_pipe)
    loss = run.noise_loss(count=4)
    assert loss.prior > 0 and 0 < loss.share < 1 and run.noise_loss(count=4).equals(loss)
    tiny_pipe.unet.conv_in.weight.data *= 2
    with pytest.raises(ValueError, match="not this run's any more"):
        run.noise_loss()


# The gradient solver


def test_the_history_adds_up(tiny_pipe):
    lambdas = dict(lambda_attention=2.0, lambda_prior=30.0, lambda_regularization=500.0)
    h = forget(tiny_pipe, config=GRADIENT, iterations=4, **lambdas).history
    total = 2 * h.forget + 30 * h.prior + 500 * h.regularization
    pd.testing.assert_series_equal(h.loss, total, check_names=False, rtol=1e-5)
    assert list(h.index) == [1, 2, 3, 4] and h.prior[1] < 1e-9 < h.prior[4]  # it begins unchanged
    assert h.regularization[1] < 1e-9 < h.regularization[4]


@pytest.mark.slow
@pytest.mark.parametrize("off", ["lambda_attention", "lambda_prior", "lambda_regularization"])
def test_each_loss_counts_and_can_be_switched_off(tiny_pipe, off):
    before, pulls = weights(tiny_pipe), dict(lambda_attention=1, lambda_prior=1, lambda_regularization=0)
    forget(tiny_pipe, config=GRADIENT, **dict.fromkeys(pulls, 0))
    assert not changed(tiny_pipe, before)  # nothing pulls
    run = forget(tiny_pipe, config=GRADIENT, iterations=3, **pulls | {off: 0})
    without = weights(tiny_pipe)
    run.restore()
    forget(tiny_pipe, config=GRADIENT, iterations=3, **pulls | {off: 50})
    assert changed(tiny_pipe, without)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pictures_can_be_drawn_along_the_way_in_any_precision(tiny_pipe, tiny_master, dtype):
    """A preview shows the model that learns, in 32 bits whatever is stored, and changes nothing."""
    pipe, config = copy_of(tiny_master, dtype), replace(GRADIENT, iterations=4)
    full, before = forget(tiny_pipe, config=config).history.forget.tolist(), weights(pipe)
    state = conftest.footprint(pipe)
    steps = unlearn_steps(pipe, "apple", config, MEMORY, card=conftest.quick_card(pipe))
    losses, previews = zip(*[(now.forget, look(pipe)) for now in steps], strict=True)
    assert conftest.footprint(pipe) == state and torch.equal(previews[-1], look(pipe))
    assert not torch.equal(previews[0], previews[1]) and all(".attn2." in n for n in changed(pipe, before))
    assert list(losses) == (full if dtype == torch.float32 else pytest.approx(full, rel=0.1))


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_memory(tiny_pipe):
    plain, learned = forget(tiny_pipe, config=GRADIENT, iterations=3), weights(tiny_pipe)
    plain.restore()
    tiny_pipe.unet.enable_gradient_checkpointing()
    again = forget(tiny_pipe, config=GRADIENT, iterations=3)
    pd.testing.assert_frame_equal(plain.history, again.history, rtol=1e-5)
    assert distance(weights(tiny_pipe), learned) < 1e-4


@pytest.mark.slow
def test_earlier_requests_are_looked_back_at(tiny_pipe, monkeypatch):
    monkeypatch.setattr(gradient, "draw_pictures", spy := Mock(side_effect=draw_pictures))
    forget(tiny_pipe)
    forget(tiny_pipe, "car", GRADIENT, target_size=6, lessons=6, revisit=0.5)
    prompts = spy.call_args[0][1]
    assert [sum("car" in p for p in prompts), sum("apple" in p for p in prompts)] == [3, 3]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_truth_is_what_the_model_predicts(tiny_pipe, prediction):
    """Stable Diffusion 2.x answers with the velocity, v = sqrt(a) * noise - sqrt(1 - a) * picture."""
    scheduler = gradient.DDPMScheduler(prediction_type=prediction)
    pictures = draw_pictures(tiny_pipe, ["a photo of a car"], 0)
    asked = gradient.Lessons.of(pictures, 5, scheduler, torch.Generator().manual_seed(0))
    a, clean = scheduler.alphas_cumprod[asked.timesteps].view(-1, 1, 1, 1), pictures.latents
    noise = (asked.noisy - a.sqrt() * clean) / (1 - a).sqrt()
    expected = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * clean
    torch.testing.assert_close(asked.wanted[0], expected, rtol=1e-3, atol=1e-3)


# How it stops

KINDS = [RuntimeError, SystemExit, asyncio.CancelledError, GeneratorExit]
IN_THE_LOOP = [(2, torch.float32), (10, torch.float32), (10, torch.bfloat16)]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "when", "dtype", "kind"), [
    *((EXACT, when, torch.float32, kind) for when in (1, 2) for kind in (*KINDS, KeyboardInterrupt)),
    *((GRADIENT, *moment, kind) for moment in IN_THE_LOOP for kind in KINDS),
])  # fmt: skip
def test_an_interruption_takes_it_back(tiny_master, config, when, dtype, kind):
    """While pictures are drawn, or in the tenth pass, the second iteration."""
    pipe = copy_of(tiny_master, dtype)
    pipe.unet.conv_in.weight.requires_grad_(False)  # a flag of the user's own
    before = weights(pipe)
    with undone(pipe, kind), interrupted(pipe, kind, when):
        forget(pipe, config=config)
    forget(pipe, config=config)  # and it works as if nothing had been
    assert changed(pipe, before)


@pytest.mark.parametrize(("when", "kept"), [(1, 0), (2, 0), pytest.param(11, 2, marks=pytest.mark.slow)])
def test_the_stop_button_keeps_what_was_learned(tiny_pipe, when, kept):
    """Nothing while pictures are drawn; in the third iteration, what two that were asked for learn."""
    before, state = weights(tiny_pipe), conftest.footprint(tiny_pipe)
    with interrupted(tiny_pipe, KeyboardInterrupt, when):
        run = forget(tiny_pipe, config=GRADIENT, iterations=50)
    learned = weights(tiny_pipe)
    assert list(run.history.index) == [1, 2][:kept] and conftest.footprint(tiny_pipe) == state
    run.restore()
    assert not changed(tiny_pipe, before)
    if kept:
        forget(tiny_pipe, config=GRADIENT, iterations=2)
    assert not changed(tiny_pipe, learned)


@pytest.mark.parametrize("config", [EXACT, GRADIENT])
def test_an_interruption_after_the_weights_were_written(tiny_pipe, config, monkeypatch):
    """There is no run yet to undo it with."""
    before, now = weights(tiny_pipe), solver.fingerprints

    def stop(pipe):
        if changed(tiny_pipe, before):
            raise KeyboardInterrupt
        return now(pipe)

    monkeypatch.setattr(solver, "fingerprints", stop)
    with undone(tiny_pipe, KeyboardInterrupt):
        forget(tiny_pipe, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_suspended_loop_overwrites_nothing_when_it_is_closed(tiny_master, dtype):
    pipe = copy_of(tiny_master, dtype)
    steps = unlearn_steps(pipe, "apple", GRADIENT, MEMORY)
    next(steps)
    for p in pipe.unet.parameters():
        p.data.fill_(0.5)
    steps.close()
    assert all(bool((p == 0.5).all()) and p.dtype == dtype for p in pipe.unet.parameters())


def test_out_of_memory_says_what_to_lower(tiny_pipe):
    told = r"cpu ran out of memory at iteration 2;.*batch_size \(now 2\).*enable_gradient_checkpointing"
    with undone(tiny_pipe, OutOfMemoryError, told), interrupted(tiny_pipe, torch.OutOfMemoryError, 10):
        forget(tiny_pipe, config=GRADIENT)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("iterations", [1, 5])
def test_a_learning_rate_too_high_is_undone(tiny_master, iterations, dtype):
    """Also in the last iteration, after which no loss is taken."""
    pipe = copy_of(tiny_master, dtype)
    with undone(pipe, DivergedError, r"at iteration \d;.*\(now 1e\+30\)"):
        forget(pipe, config=GRADIENT, lr=1e30, iterations=iterations)


@pytest.mark.parametrize("loss", [lambda x: x * torch.nan, lambda x: (x - x.detach()).square().sum().sqrt()])
def test_a_loss_or_gradient_that_is_not_finite_is_not_applied(tiny_pipe, monkeypatch, loss):
    """A loss can be finite and its gradient not: the square root at zero, for one."""
    monkeypatch.setattr(gradient, "prior_preservation_loss", lambda now, was: loss(now).mean())
    with undone(tiny_pipe, DivergedError, "(prior loss|gradient) is nan at iteration 1.*Lower lr"):
        forget(tiny_pipe, config=GRADIENT)


# On disk


@BOTH
def test_a_run_is_saved_and_loaded(tiny_pipe, fresh, config, tmp_path):
    base, run, learned = weights(tiny_pipe), forget(tiny_pipe, config=config), weights(tiny_pipe)
    folder = run.save(tmp_path / "apple")
    assert sorted(p.name for p in folder.iterdir()) == ["history.csv", "run.json", "weights.safetensors"]
    assert set(load_file(folder / "weights.safetensors")) == set(run.before)  # what changed, alone
    with pytest.raises(FileExistsError, match="choose another folder"):
        run.save(folder)
    for pipe in (tiny_pipe, fresh()):
        run.restore()
        again = UnlearningRun.load(folder, pipe)
        assert not changed(pipe, learned)
        assert (again.concepts, again.config, again.objective) == (run.concepts, run.config, "DUGE")
        pd.testing.assert_frame_equal(again.history, run.history, check_dtype=False)
        again.restore()
        assert not changed(pipe, base)
    with pytest.raises(FileNotFoundError, match="run.json"):
        UnlearningRun.load(tmp_path, tiny_pipe)


@pytest.mark.slow
def test_a_loaded_run_remembers_what_went_before(tiny_pipe, fresh, tmp_path):
    forget(tiny_pipe)
    forget(tiny_pipe, "car").save(tmp_path / "both")
    again = UnlearningRun.load(tmp_path / "both", fresh()).pipe
    for pipe in (tiny_pipe, again):
        forget(pipe, "neon")
    assert distance(weights(again), weights(tiny_pipe)) < 1e-4


def damage(folder, how: str) -> None:
    about, data = json.loads((folder / "run.json").read_text()), (folder / "weights.safetensors").read_bytes()
    name, tensor = next(iter(load(data).items()))
    odd = {"nan": tensor * torch.nan, "another model": tensor[:1]}
    if how in odd:  # as if it had been saved so
        data = save(load(data) | {name: odd[how]})
        about["sha256"] = hashlib.sha256(data).hexdigest()
    elif how == "a field too many":
        about["colour"] = 1
    elif how == "a field too few":
        del about["seconds"]
    elif how == "empty history":
        (folder / "history.csv").write_text("")
    text, parts = json.dumps(about), {"one tensor": save({name: tensor}), "cut": data[:-20]}
    (folder / "weights.safetensors").write_bytes(parts.get(how, data))
    (folder / "run.json").write_text(text[:20] if how == "no json" else text)


DAMAGES = "one tensor|cut|empty history|no json|nan|another model|a field too many|a field too few"


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES.split("|"))
def test_a_damaged_run_changes_nothing(tiny_pipe, how, tmp_path):
    run = forget(tiny_pipe)
    damage(run.save(tmp_path / "apple"), how)
    run.restore()
    with undone(tiny_pipe, ValueError, "apple (is damaged|belongs to another model)"):
        UnlearningRun.load(tmp_path / "apple", tiny_pipe)


@BOTH
def test_plain_diffusers_loads_a_saved_pipeline_and_lora(tiny_pipe, fresh, config, tmp_path):
    run, plain = forget(tiny_pipe, config=config, lr=1e-2), fresh()
    ours, base = look(tiny_pipe), look(plain)
    tiny_pipe.save_pretrained(tmp_path / "all")
    assert torch.equal(look(type(plain).from_pretrained(tmp_path / "all")), ours)
    lost = [run.export_lora(tmp_path / f"lora{rank}", rank) for rank in (1, 32)]
    assert 0.1 < lost[0] < 1
    plain.load_lora_weights(tmp_path / "lora32")  # of full rank
    off = float((look(plain) - ours).norm() / (base - ours).norm())
    assert off < 1e-2 if config is EXACT else lost[1] > 0 and off < 0.5  # biases have no place in it
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file: expected a folder"):
        run.export_lora(tmp_path / "file")
    run.restore()
    with pytest.raises(ValueError, match="forget something first"):
        run.export_lora(tmp_path / "again")


@pytest.mark.slow
def test_the_shipped_model_forgets_the_apple_and_little_else(doodle_pipe):
    run = unlearn(doodle_pipe, "apple")
    after = duge.evaluate(doodle_pipe, images=5, num_inference_steps=10).accuracy
    assert after["apple"] == 0 and after.drop("apple").mean() >= 0.95
    run.restore()
    assert duge.evaluate(doodle_pipe, ["apple"], images=5).accuracy["apple"] >= 0.8


@pytest.mark.slow
def test_the_shipped_model_starts_to_forget_by_gradient(doodle_pipe):
    history = forget(doodle_pipe, config=GRADIENT, iterations=15, lambda_prior=100.0, lr=2e-4).history
    assert history.forget.iloc[-3:].mean() < 0.8 * history.forget.iloc[:3].mean()
