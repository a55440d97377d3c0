"""The checkers of the exercises: what is right passes, what is wrong gets its own hint, nothing raises."""

import inspect
import math
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

import duge_lite as duge
from duge_lite import checks, losses
from duge_lite.evaluation import sequence_metrics

# What readers may hand in, whatever the exercise.

CHECKERS = [
    checker
    for name, checker in vars(checks).items()
    if inspect.isfunction(checker)
    and name != "examine"
    and inspect.signature(checker).return_annotation == "Verdict"
]
each_checker = pytest.mark.parametrize("checker", CHECKERS, ids=lambda c: c.__name__)


@each_checker
@pytest.mark.parametrize("nothing", [None, ...], ids=["None", "..."])
def test_a_stub_is_not_yet(checker, nothing):
    verdict = checker(lambda *args: nothing)
    assert not verdict and "not yet" in verdict.message and repr(verdict).startswith("…")


def fail(*args):
    raise KeyError("a wrong name")


@each_checker
@pytest.mark.parametrize(
    "function",
    [
        fail,
        lambda: 1.0,  # takes no arguments
        "no function",
        lambda *args: "a text",
        lambda *args: {"a": 1},
        lambda *args: [torch.zeros(2), torch.zeros(3)],
        lambda *args: torch.ones(2, 2, requires_grad=True),
        lambda *args: torch.nn.Linear(1, 1),
        lambda *args: 10**400,
        lambda *args: float("nan"),
    ],
)
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


# notebooks 02 and 03: what is right, the folded solutions say


def bright(heat, mask):
    return heat >= np.sort(heat, axis=None)[-mask.sum()]


def entropy(heat):
    p = heat[heat > 0]
    return -(p * np.log(p)).sum()


def near_far(near, far=lambda lost, rest: lost[rest].mean()):
    def answer(before, after, name, related):
        lost = before - after
        return near(lost, related, before), far(lost, list(lost.index.drop([name, *related])))

    return answer


@pytest.mark.parametrize(
    ("checker", "wrong", "hint"),
    [
        ("word_map", lambda maps, at: maps[0, 0, 0], "the picture maps"),
        ("word_map", lambda maps, at: maps[:, :, at].mean(axis=(0, 1, 2)), "*add* its tokens"),
        ("word_map", lambda maps, at: maps[:, :, at].sum(axis=(0, 1, 2)), "take the *mean*"),
        ("word_map", lambda maps, at: maps[:, :, at[0] : at[-1] + 1].sum(2).mean((0, 1)), "just these"),
        ("overlap", lambda heat, mask: (heat * mask).sum() / heat.sum(), "thing's three"),
        ("overlap", lambda heat, mask: 1.0, "thing's one"),
        ("overlap", lambda heat, mask: (bright(heat, mask) & mask).sum() / mask.sum(), "Shared by both"),
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
        ("near_and_far", near_far(lambda lost, near, _: lost[near].sum()), "in the mean"),
        ("near_and_far", near_far(lambda lost, near, _: lost[near].mean(), lambda *_: 0.0), "house and star"),
        ("near_and_far", near_far(lambda lost, near, b: (lost / b)[near].mean()), "less after"),
    ],
)
def test_a_wrong_answer_in_02_or_03_gets_its_own_hint(checker, wrong, hint):
    verdict = getattr(checks, checker)(wrong)
    assert not verdict and hint in verdict.message, verdict


# notebook 04: the cross-attention loss


def loop(maps, targets):
    total = 0
    for a, b in zip(maps, targets, strict=True):
        total = total + ((a - b) ** 2).mean()
    return total / len(maps)


@pytest.mark.parametrize(
    "right",
    [
        loop,
        lambda maps, targets: torch.stack(
            [torch.nn.functional.mse_loss(a, b) for a, b in zip(maps, targets, strict=True)]
        ).mean(),
        lambda maps, targets: losses.cross_attention_loss(maps, targets, relative=False),
    ],
)
def test_cross_attention_loss_right(right):
    verdict = checks.cross_attention_loss(right)
    assert verdict, verdict


def pooled(maps, targets):
    differences = [(a - b).flatten() for a, b in zip(maps, targets, strict=True)]
    return torch.cat(differences).square().mean()


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda m, t: 1 + loop(m, t), "costs nothing"),
        (lambda m, t: sum((a - b).abs().mean() for a, b in zip(m, t, strict=True)), "square each"),
        (lambda m, t: sum((a - b).square().sum() for a, b in zip(m, t, strict=True)), "square each"),
        (lambda m, t: sum((a - b).norm() for a, b in zip(m, t, strict=True)), "square each"),
        (losses.cross_attention_loss, "square each"),  # divided by the target's size
        (lambda m, t: (m[0] - t[0]).square().mean(), "Two layers"),
        (lambda m, t: sum((a - b).square().mean() for a, b in zip(m, t, strict=True)), "Two layers"),
        (pooled, "Two layers"),
        (lambda m, t: torch.stack([a - b for a, b in zip(m, t, strict=True)]).square().mean(), "Two layers"),
        (lambda m, t: loop(m, t).item(), "stay in torch"),
        (lambda m, t: loop(m, t).detach(), "stay in torch"),
        (lambda m, t: np.mean([((a - b) ** 2).mean().item() for a, b in zip(m, t, strict=True)]), "in torch"),
    ],
)
def test_cross_attention_loss_wrong(wrong, hint):
    verdict = checks.cross_attention_loss(wrong)
    assert not verdict and hint in verdict.message


# notebook 04: the regularization loss


def by_name(parameters, anchor):
    total = sum(((p - anchor[n]) ** 2).sum() for n, p in parameters.items())
    return total / sum(p.numel() for p in parameters.values())


def concatenated(parameters, anchor):
    p, a = (torch.cat([x[n] for n in parameters]) for x in (parameters, anchor))
    return (p - a).square().mean()


@pytest.mark.parametrize("right", [by_name, concatenated, losses.regularization_loss])
def test_regularization_loss_right(right):
    verdict = checks.regularization_loss(right)
    assert verdict, verdict


def walk(parameters, anchor, each):
    return sum(each(p, anchor[n]) for n, p in parameters.items())


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda p, a: walk(p, a, lambda p, a: p.square().sum()) / 3, "nothing pulls"),
        (lambda p, a: walk(p, a, lambda p, a: (p - a).sum()) / 3, "squared distances"),
        (lambda p, a: walk(p, a, lambda p, a: (p - a).square().sum()), "squared distances"),
        (lambda p, a: walk(p, a, lambda p, a: (p - a).square().mean()) / 2, "not by the 2 tensors"),
        (
            lambda p, a: sum((x - y).square().sum() for x, y in zip(p.values(), a.values(), strict=True)) / 3,
            "by its name",
        ),
        (lambda p, a: by_name(p, a).item(), "stay in torch"),
    ],
)
def test_regularization_loss_wrong(wrong, hint):
    verdict = checks.regularization_loss(wrong)
    assert not verdict and hint.lower() in verdict.message.lower()


def test_beats_knows_equals_and_names():
    right = checks.beats(lambda a, b: (a >= b[a.index]).all() and (a > b[a.index]).any())
    assert right, right
    for wrong, hint in (
        (lambda a, b: (a > b[a.index]).all(), "Equal on one count"),
        (lambda a, b: (a >= b[a.index]).all(), "Two equals"),
        (lambda a, b: (a > b[a.index]).any(), "neither beats"),
        (lambda a, b: (a.values >= b.values).all() and (a.values > b.values).any(), "by their name"),
    ):
        verdict = checks.beats(wrong)
        assert not verdict and hint in verdict.message, verdict


def test_book_megabytes_counts_both_halves_and_all_layers():
    assert checks.book_megabytes(lambda channels, moments, places: 4 * moments * places * sum(channels) / 1e6)
    for wrong, hint in (
        (lambda channels, moments, places: 2 * moments * places * sum(channels) / 1e6, "Two halves"),
        (lambda channels, moments, places: 4 * moments * places * channels[0] / 1e6, "sum them"),
        (lambda channels, moments, places: 4 * sum(channels) / 1e6, "Every moment"),
    ):
        verdict = checks.book_megabytes(wrong)
        assert not verdict and hint in verdict.message


def scores(matrix, requests, k):
    row = matrix.loc[k]
    return 1 - row[requests[:k]].mean(), row.drop(requests[:k]).mean()


def test_gone_and_kept_agrees_with_the_metrics(tiny_master):
    rows = {"orange": [1, 0.5, 0.25], "apple": [1, 0, 0.75], "car": [1, 1, 0]}
    matrix, requests = pd.DataFrame(rows, dtype=float), ["apple", "car"]
    metrics = sequence_metrics(matrix, requests, duge.model_card(tiny_master))
    assert checks.gone_and_kept(scores)
    for k in (1, 2):
        assert scores(matrix, requests, k) == pytest.approx(metrics.loc[k, ["UA", "objects kept"]].tolist())


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda m, r, k: ..., "not yet"),
        (lambda m, r, k: scores(m, r, len(r)), "first k requests"),
        (lambda m, r, k: (1 - m.loc[k, r].mean(), m.loc[k].drop(r).mean()), "the car still counts"),
        (lambda m, r, k: (m.loc[k, r[:k]].mean(), scores(m, r, k)[1]), "UA is 1 - 0"),
        (lambda m, r, k: (1 - m.loc[k, r[k - 1]], scores(m, r, k)[1]), "the old one too"),
        (lambda m, r, k: (scores(m, r, k)[0], m.loc[k].drop(r[k - 1]).mean()), "the other three"),
        (lambda m, r, k: (1 - m.iloc[k, :k].mean(), m.iloc[k, k:].mean()), "by their name"),
        (lambda m, r, k: scores(m, r, k)[0], "four that are to stay"),
        (lambda m, r, k: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_wrong_gone_and_kept_gets_its_own_hint(wrong, hint):
    verdict = checks.gone_and_kept(wrong)
    assert not verdict and hint in verdict.message


# The solutions that are folded under the exercises

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
FOLDED = re.compile(r"<summary>Solution</summary>\s*```python\n(.*?)```", re.S)


def folded_solutions():
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            for code in FOLDED.findall(cell.source):
                name = re.search(r"def (\w+)\(", code)[1]
                yield pytest.param(name, code, id=f"{path.stem[:2]}-{name}")


@pytest.mark.parametrize(("name", "code"), folded_solutions())
def test_a_folded_solution_passes_its_checker(name, code):
    known = {"np": np, "pd": pd, "torch": torch, "math": math}
    exec(code, known)
    verdict = getattr(checks, name)(known[name])
    assert verdict, verdict
