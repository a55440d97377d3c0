"""The checkers of the exercises: what is right passes, what is wrong gets its own hint, nothing raises."""

import inspect
import math
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

import duge_lite as duge
from duge_lite import baselines, checks, losses
from duge_lite.doodles.draw import Part
from duge_lite.evaluation import sequence_metrics, wilson_interval

# What readers may hand in, whatever the exercise.

FUNCTIONS = [f for name, f in inspect.getmembers(checks, inspect.isfunction) if name != "examine"]
CHECKERS = [f for f in FUNCTIONS if inspect.signature(f).return_annotation == "Verdict"]
each_checker = pytest.mark.parametrize("checker", CHECKERS, ids=lambda c: c.__name__)


@each_checker
@pytest.mark.parametrize("nothing", [None, ...], ids=["None", "..."])
def test_a_stub_is_not_yet(checker, nothing):
    verdict = checker(lambda *args: nothing)
    assert not verdict and "not yet" in verdict.message and repr(verdict).startswith("…")


NO_NUMBERS = "a text", {"a": 1}, [torch.zeros(2), torch.zeros(3)], torch.nn.Linear(1, 1)
NUMBERS = torch.ones(2, 2, requires_grad=True), 10**400, math.nan
ODD = [lambda *args, got=got: got for got in NO_NUMBERS + NUMBERS]
ODD += [lambda *args: {}["a wrong name"], lambda: "takes no arguments", "no function"]


@each_checker
@pytest.mark.parametrize("function", ODD)
def test_checkers_never_raise(checker, function):
    verdict = checker(function)
    assert not verdict and verdict.message


def test_a_tensor_counts_as_its_numbers():
    case = checks.Case((), 0.5, "half")
    for got in (torch.tensor(0.5, requires_grad=True), torch.tensor(0.5, dtype=torch.bfloat16)):
        assert checks.examine(lambda got=got: got, [case], "so it is")
    verdict = checks.examine(lambda: torch.tensor([1.0, 2.0]), [case], "")
    assert verdict.message == "it returned [1.0, 2.0], expected 0.5. half"


def test_what_a_function_does_to_its_arguments_stays_with_it():
    values = torch.ones(2)
    case = checks.Case((values,), 0.0, "")
    assert checks.examine(lambda x: x.zero_().sum(), [case, case], "clean")
    assert values.tolist() == [1, 1]


# What is right: the solutions that are folded under the exercises

FOLDED = re.compile(r"<summary>Solution</summary>\s*```python\n(.*?)```", re.S)


def solution(code):
    name, known = re.search(r"def (\w+)\(", code)[1], {"np": np, "torch": torch}
    exec(code, known)
    return name, known[name]


NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
CELLS = [cell.source for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
SOLUTIONS = [solution(code) for source in CELLS for code in FOLDED.findall(source)]
right = SimpleNamespace(**dict(SOLUTIONS))


def strung_together(parameters, anchor, names=None):
    p, a = (torch.cat([part[n] for n in names or part]) for part in (parameters, anchor))
    return (p - a).square().mean()


OTHERS = [
    ("cross_attention_loss", lambda m, t: losses.cross_attention_loss(m, t, relative=False)),
    ("regularization_loss", losses.regularization_loss),
    ("regularization_loss", lambda p, a: strung_together(p, a, names=list(p))),
]


@pytest.mark.parametrize(("checker", "answer"), SOLUTIONS + OTHERS)
def test_a_right_answer_passes(checker, answer):
    verdict = getattr(checks, checker)(answer)
    assert verdict, verdict


# What is wrong


def asked_once(denoiser, noise, alphas):
    named = denoiser(noise, 0)
    return right.sampling_loop(lambda x, i: named, noise, alphas)


def entropy(heat):
    return float(torch.special.entr(torch.tensor(heat)).sum())


def pooled(*sides):
    return right.cross_attention_loss(*([torch.cat([x.flatten() for x in side])] for side in sides))


def one_after_another(old, S, X, r):
    for s, x in zip(S, X, strict=True):
        old = right.solve_all(old, [s], [x], r)
    return old


def formula(old, edit, anchor, keep, r, wrong):
    wanted, heard = (x.T @ edit + keep.T @ keep + r * np.eye(old.shape[1]) for x in (anchor, edit))
    wanted = {"turned": wanted.T, "free": anchor.T @ edit + keep.T @ keep}.get(wrong, wanted)
    return old @ (np.linalg.inv(heard) @ wanted if wrong == "order" else wanted @ np.linalg.inv(heard))


def tail(a, b, most, both=2):
    return both * sum(math.comb(a + b, k) for k in range(most + 1)) / 2 ** (a + b)


def biased(f, g):
    ours, theirs, across = (((x @ y.T / x.shape[1] + 1) ** 3).mean() for x, y in ((f, f), (g, g), (f, g)))
    return ours + theirs - 2 * across


def ways(name):
    return [f"{way} of {name}" for way in "abcd"], list("abcd")


WRONG = [  # checker, answer, hint
    # notebook 01
    ("add_noise", lambda x, e, a: a * x + (1 - a) * e, "square roots"),
    ("add_noise", lambda x, e, a: np.sqrt(1 - a) * x + np.sqrt(a) * e, "only picture"),
    ("clean_guess", lambda x, e, a: (x - np.sqrt(1 - a) * e) / a, "returned [1.25, -1.25], expected [1.0, "),
    ("ddim_step", lambda x, e, a, b: np.sqrt(b) * x + np.sqrt(1 - b) * e, "guessed picture"),
    ("sampling_loop", asked_once, "each asks anew"),
    ("guided", lambda e, c, g: e + g * c, "At scale 1"),
    ("average_noise", lambda noises: np.mean(noises, 0), "not yet. Of 4 noises the sum has"),
    ("write_loss", lambda m, f, w: ((f @ m - w) ** 2).mean(), "f @ matrix.T"),
    ("write_loss", lambda m, f, w: ((f @ m.T - w) ** 2).sum(1).mean(), "the mean is 3"),
    ("ridge", lambda f, w, o, r: right.ridge(f, w, o, r / len(f)), "divide them by len(f)"),
    ("ridge", lambda f, w, o, r: (w.T @ f + r * o) @ np.linalg.inv(f.T @ f + r), "on the diagonal only"),
    ("new_thing", lambda: [Part(np.zeros((3, 2)), (0, 0, 0))], "It is small"),
    ("nearest_prototype", lambda f, p: (f @ p.T).argmax(1), "Measure all the distances"),
    ("harmonic_mean", np.mean, "number over the sum"),
    ("harmonic_mean", lambda s: 2 * s[0] * s[1] / (s[0] + s[1]), "not always two"),
    ("harmonic_mean", lambda s: len(s) / sum(1 / x for x in s), "before you divide"),
    ("pictures_needed", lambda h, d: math.ceil(math.log(d) / math.log(1 - h)), "logarithm of 0"),
    ("pictures_needed", lambda h, d: 4, "one is enough"),
    # notebooks 02 and 03
    ("word_map", lambda maps, at: maps[0, 0, 0], "the picture maps"),
    ("word_map", lambda maps, at: maps[:, :, at].mean(axis=(0, 1, 2)), "*add* its tokens"),
    ("word_map", lambda maps, at: maps[:, :, at].sum(axis=(0, 1, 2)), "take the *mean*"),
    ("word_map", lambda maps, at: maps[:, :, at[0] : at[-1] + 1].sum(2).mean((0, 1)), "just these"),
    ("overlap", lambda heat, mask: (heat * mask).sum() / heat.sum(), "thing's three"),
    ("overlap", lambda heat, mask: 1.0, "thing's one"),
    ("overlap", lambda heat, mask: 2 - 2 / (1 + right.overlap(heat, mask)), "Shared by both"),  # Dice
    ("concentration", entropy, "Evenly everywhere is 0"),
    ("concentration", lambda p: 1 - entropy(p) / np.log((p > 0).sum() + 1e-9), "number of *all*"),
    ("concentration", lambda p: 1 - entropy(p) / np.log(p.size), "divide it by its sum"),
    ("target", lambda concept, other, eta: concept, "At eta 0"),
    ("target", lambda concept, other, eta: other + eta * (concept - other), "Past it"),
    ("target", lambda concept, other, eta: other - (concept - other) * (eta > 0), "how far past"),
    ("nearest_kept", lambda distances, gone: distances.min(), "smallest distance"),
    ("nearest_kept", lambda distances, gone: distances.idxmin(), "nearest that stays"),
    ("nearest_kept", lambda distances, gone: distances.drop(gone[:1]).idxmin(), "*all* that is gone"),
    ("nearest_kept", lambda distances, gone: distances.drop(gone).idxmin(), "no mistake"),
    ("near_and_far", lambda b, a, name, near: ((b - a)[near].mean(), (b - a).mean()), "Only the apple"),
    ("near_and_far", lambda *args: np.multiply(right.near_and_far(*args), (2, 1)), "in the mean"),  # the sum
    ("near_and_far", lambda *args: np.multiply(right.near_and_far(*args), (1, 0)), "house and star"),
    ("near_and_far", lambda b, a, *who: right.near_and_far(b / b, a / b, *who), "less after"),
    # notebook 04
    ("cross_attention_loss", lambda m, t: 1 + right.cross_attention_loss(m, t), "costs nothing"),
    ("cross_attention_loss", lambda m, t: (m[0] - t[0]).abs().mean(), "square each"),
    ("cross_attention_loss", losses.cross_attention_loss, "square each"),  # divided by the target's size
    ("cross_attention_loss", lambda m, t: len(m) * right.cross_attention_loss(m, t), "Two layers"),
    ("cross_attention_loss", pooled, "Two layers"),
    ("cross_attention_loss", lambda m, t: right.cross_attention_loss(m, t).detach(), "stay in torch"),
    ("regularization_loss", lambda p, a: sum(x.square().sum() for x in p.values()) / 3, "nothing pulls"),
    ("regularization_loss", lambda p, a: sum((p[n] - a[n]).square().mean() for n in p) / 2, "not by the 2"),
    ("regularization_loss", strung_together, "by its name"),
    ("regularization_loss", lambda p, a: right.regularization_loss(p, a).item(), "stay in torch"),
    # notebook 05
    ("wilson", lambda k, n, z: k / n + np.array([-z, z]) * (k * (n - k) / n**3) ** 0.5, "the half width"),
    ("wilson", lambda k, n, z: right.wilson(k, n, 1.96), "z is given"),
    ("wilson", lambda k, n, z: right.wilson(min(k, n - k), n, z), "p is hits / n"),
    ("solve_all", lambda o, S, X, r: o @ sum(X) @ np.linalg.inv(sum(S) + r * np.eye(3)), "Who wants what"),
    ("solve_all", lambda o, S, X, r: o @ (sum(X) + r) @ np.linalg.inv(sum(S) + r), "adds r"),
    ("solve_all", one_after_another, "Two requests"),
    ("take_back", lambda S, X, s, x, back: S - s, "Return both"),
    ("take_back", lambda S, X, s, x, back: (S - s, X - s), "x_gone from X"),
    ("take_back", lambda S, X, s, x, back: (S - s, X - x), "comes back into S"),
    ("take_back", lambda S, X, s, x, back: (S - s + back, X - x), "comes back into X"),
    ("back_door", lambda a, n, gone: np.mean([x in gone for x in n]), "front"),
    ("back_door", lambda a, n, gone: (np.array(a) != np.array(n)).mean(), "they do not count"),
    ("back_door", lambda a, n, gone: len(a) * right.back_door(a, n, gone), "Divide by all"),
    ("gone_and_kept", lambda m, r, k: (1 - m.loc[k, r].mean(), m.loc[k].drop(r).mean()), "still counts"),
    ("gone_and_kept", lambda m, r, k: (m.loc[k, r[:k]].mean(), m.loc[k].drop(r[:k]).mean()), "UA is 1 - 0"),
    ("gone_and_kept", lambda m, r, k: (1 - m.loc[k, r[k - 1]], m.loc[k].drop(r[:k]).mean()), "the old one"),
    ("gone_and_kept", lambda m, r, k: (1 - m.loc[k, r[:k]].mean(), m.loc[k].drop(r[k - 1]).mean()), "three"),
    ("gone_and_kept", lambda m, r, k: (1 - m.iloc[k, :k].mean(), m.iloc[k, k:].mean()), "by their name"),
    ("gone_and_kept", lambda m, r, k: 1 / 0, "it stopped with ZeroDivisionError: division by zero"),
    # notebook 06
    ("above_floor", lambda seen, floor: floor, "Without false alarms"),
    ("above_floor", lambda seen, floor: seen - floor, "All is all"),
    ("above_floor", lambda seen, floor: seen, "As much as the floor"),
    ("above_floor", lambda seen, floor: (seen - floor) / (1 - floor), "not less than nothing"),
    ("above_floor", lambda seen, floor: max(0, (seen - floor) / (1 - floor)), "do not divide"),
    ("gain", lambda e, a, b: 1 - np.mean(e - a) / np.mean(e - b), "Equal errors"),
    ("gain", lambda e, a, b: 1 - np.abs(e - a).mean() / np.abs(e - b).mean(), "quarter"),
    ("gain", lambda *args: max(0, right.gain(*args)), "do not cut"),
    ("gain", lambda *args: 1 - right.gain(*args), "takes all of it"),
    ("recovery_time", lambda c, x: right.recovery_time(c.reset_index(drop=True), x), "not its position"),
    ("recovery_time", lambda c, level: next((i for i, v in c.items() if v > level), math.inf), "reached it"),
    ("recovery_time", lambda c, level: [*c.index, math.inf][(c < level).sum()], "Shares go up and down"),
    ("recovery_time", lambda c, level: next((i for i, v in c.items() if v >= level), 20), "math.inf"),
    ("ask_otherwise", lambda c: "a pippin", "a list of prompts"),
    ("ask_otherwise", lambda c: [1, 2, 3], "a list of prompts"),
    ("ask_otherwise", lambda c: ["a pippin", "a pippin", ""], "at least three"),
    ("ask_otherwise", lambda c: ["a pippin", "a fruit", f"an {c.upper()}"], "says the name"),
    # notebooks 07 and 08
    ("beats", lambda a, b: (a > b[a.index]).all(), "Equal on one count"),
    ("beats", lambda a, b: (a >= b[a.index]).all(), "Two equals"),
    ("beats", lambda a, b: (a > b[a.index]).any(), "neither beats"),
    ("beats", lambda a, b: (a.values >= b.values).all() and (a.values > b.values).any(), "by their name"),
    ("uce_matrix", lambda *args: formula(*args, "turned"), "anchor.T @ edit"),
    ("uce_matrix", lambda *args: formula(*args, "order"), "before the inverse"),
    ("uce_matrix", lambda *args: formula(*args, "free"), "Where each name"),
    ("uce_matrix", lambda *args: right.uce_matrix(*args[:4], 1e-9), "huge r"),
    ("sign_test", lambda a, b: tail(a, b, min(a, b)), "at most 1"),
    ("sign_test", lambda a, b: 1.0 if a == b else tail(a, b, min(a, b), 1), "both sides"),
    ("sign_test", lambda a, b: 1.0 if a == b else 2 / 2 ** (a + b), "the same mirrored"),
    ("sign_test", lambda a, b: min(1.0, tail(a, b, b)), "who is the first"),
    ("unbiased_kid", biased, "leave out each picture"),
    ("unbiased_kid", lambda *fg: right.unbiased_kid(*(x * x.shape[1] ** 0.5 for x in fg)), "of features"),
    ("unbiased_kid", lambda f, g: right.unbiased_kid(f, g) + (len(f) != len(g)), "its own count"),
    ("concept_texts", lambda name: (ways(name)[0], ["a"]), "of the same length"),
    ("concept_texts", lambda name: ([name] * 4, ["a"] * 4), "four different ways"),
    ("concept_texts", lambda name: ways("it"), "has to name it"),
    ("concept_texts", lambda name: (ways(name)[0],) * 2, "must not be named"),
    ("concept_texts", lambda name: ways("Van Gogh"), "the name that is given"),
    ("closer_to_name", lambda a, b: 2.0 * (a < b).mean(), "by picture"),
    ("closer_to_name", lambda a, b: (a >= b).mean(), "A draw"),
    ("closer_to_name", lambda a, b: (a > b).mean() if len(a) < 3 else a.mean() > b.mean(), "outvote"),
    ("book_megabytes", lambda channels, moments, places: 2 * moments * sum(channels) / 1e6, "Two halves"),
    ("book_megabytes", lambda channels, m, p: 4 * m * p * channels[0] / 1e6, "sum them"),
    ("book_megabytes", lambda channels, moments, places: 4 * sum(channels) / 1e6, "Every moment"),
    ("drawing_cost", lambda n, s, t, p: (n * s * t, 0), "divide by 60"),
    ("drawing_cost", lambda n, s, t, p: (n * s * t / 60, n * s * t / 60 * p), "that of an hour"),
    ("lora_loss", lambda s, r: s[:r].sum() / s.sum(), "nothing is lost"),
    ("lora_loss", lambda s, r: s[r:].sum() / s.sum(), "sum of squares"),
    ("lora_loss", lambda s, r: np.append(s, 0)[r] / np.linalg.norm(s) if r else 1.0, "not one direct"),
]


@pytest.mark.parametrize(("checker", "wrong", "hint"), WRONG)
def test_a_wrong_answer_gets_its_own_hint(checker, wrong, hint):
    verdict = getattr(checks, checker)(wrong)
    assert not verdict and hint in verdict.message, verdict


# What the exercises ask for is what the library does


def test_the_formula_of_the_exercise_is_that_of_the_baseline(doodle_pipe):
    texts = ["car"], [""], [c for c in duge.model_card(doodle_pipe).forgettable if c != "car"]
    edit, anchor, keep = (baselines._states(doodle_pipe, part, last=True).numpy() for part in texts)
    run = baselines.uce(doodle_pipe, "car")
    for name, theirs in run.weights().items():
        ours = right.uce_matrix(run.before[name].numpy(), edit, anchor, keep, 0.5)
        assert np.allclose(ours, theirs, atol=1e-4)


def test_gone_and_kept_agrees_with_the_metrics(tiny_master):
    rows = {"orange": [1, 0.5, 0.25], "apple": [1, 0, 0.75], "car": [1, 1, 0]}
    matrix, requests = pd.DataFrame(rows, dtype=float), ["apple", "car"]
    metrics = sequence_metrics(matrix, requests, duge.model_card(tiny_master))[["UA", "objects kept"]]
    for k in (1, 2):
        assert right.gone_and_kept(matrix, requests, k) == pytest.approx(metrics.loc[k].tolist())


@pytest.mark.parametrize(("hits", "count"), [(0, 2), (2, 2), (3, 10)])
def test_the_interval_of_the_exercise_is_the_librarys(hits, count):
    assert right.wilson(hits, count, 1.96) == pytest.approx(wilson_interval(hits, count), abs=1e-12)
