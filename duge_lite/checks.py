"""Gentle checkers for the exercises: they never raise, they say "not yet", what is wrong, or "right"."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """What a checker found; true when the exercise is solved."""

    passed: bool
    message: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return ("✓ right: " if self.passed else "… ") + self.message


@dataclass(frozen=True)
class Case:
    """One call of the reader's function, what it should return, and a hint for when it does not."""

    args: tuple
    expected: Any
    hint: str


def examine(
    function: Callable, cases: Sequence[Case], praise: str, tolerance: float = 1e-5, numbers: bool = True
) -> Verdict:
    """Calls ``function`` on each case and compares; the first difference becomes the hint.

    Without ``numbers`` the hint stands alone: ``function`` measures what the reader's own one returned.
    """
    for case in cases:
        try:
            got = function(*copy.deepcopy(case.args))  # a function may change what it is given
        except Exception as error:
            return Verdict(False, f"it stopped with {type(error).__name__}: {error}. {case.hint}")
        if got is None or got is Ellipsis:
            return Verdict(False, "not yet: replace the `...` with your own line and run the cell again.")
        try:
            got = got.tolist() if isinstance(got, Tensor) else got  # also on a GPU, also with a gradient
            fits = np.shape(got) == np.shape(case.expected) and np.allclose(
                np.asarray(got, dtype=float), np.asarray(case.expected, dtype=float), atol=tolerance
            )
        except Exception:  # whatever it is, it is not numbers
            return Verdict(False, f"it returned a {type(got).__name__}, expected numbers. {case.hint}")
        if not fits:
            told = (
                f"it returned {_plain(got)}, expected {_plain(case.expected)}. " if numbers else "not yet. "
            )
            return Verdict(False, told + case.hint)
    return Verdict(True, praise)


def _plain(value: Any) -> Any:
    """Numbers as Python writes them, four digits are enough."""
    array = np.asarray(value)
    return (array.round(4) if array.dtype.kind == "f" else array).tolist()


# ---------------------------------------------------------------------------- notebook 01


def add_noise(function: Callable) -> Verdict:
    """Notebook 01: ``add_noise(clean, noise, alpha)``, a noisy picture from its two parts."""
    clean, noise = np.array([1.0, -1.0]), np.array([0.5, 2.0])
    cases = [
        Case((clean, noise, 1.0), clean, "At alpha 1 there is only picture."),
        Case((clean, noise, 0.0), noise, "At alpha 0 there is only noise: it gets the root of 1 - alpha."),
        Case((clean, noise, 0.64), 0.8 * clean + 0.6 * noise, "Take the square roots: 0.8 and 0.6 here."),
    ]
    return examine(function, cases, "one dial, from picture to noise.")


def clean_guess(function: Callable) -> Verdict:
    """Notebook 01: ``clean_guess(noisy, noise, alpha)``, the picture that is left without the noise."""
    clean, noise = np.array([1.0, -1.0]), np.array([0.5, 2.0])
    cases = [
        Case((clean, noise, 1.0), clean, "At alpha 1 there is no noise to take away."),
        Case(
            (0.8 * clean + 0.6 * noise, noise, 0.64),
            clean,
            "Take away the noise that was mixed in, its root of 1 - alpha; divide by the root of alpha.",
        ),
    ]
    return examine(function, cases, "whoever knows the noise knows the picture.")


def ddim_step(function: Callable) -> Verdict:
    """Notebook 01: ``ddim_step(noisy, noise, alpha, alpha_next)``, one step of drawing."""
    clean, noise = np.array([1.0, -1.0]), np.array([0.5, 2.0])
    noisy = 0.6 * clean + 0.8 * noise
    cases = [
        Case((noisy, noise, 0.36, 1.0), clean, "At alpha_next = 1 the step ends at the guessed picture."),
        Case((noisy, noise, 0.36, 0.36), noisy, "A step to where one is changes nothing."),
        Case(
            (noisy, noise, 0.36, 0.64),
            0.8 * clean + 0.6 * noise,
            "Guess the clean picture with alpha, then mix it with the same noise at alpha_next.",
        ),
    ]
    return examine(function, cases, "small steps, each with a new look: that is all of sampling.")


def sampling_loop(function: Callable) -> Verdict:
    """Notebook 01: ``sampling_loop(denoiser, noise, alphas)``, from noise to a picture."""
    wish, noise = np.array([0.5, -1.0]), np.array([2.0, 1.0])
    asked: list[int] = []

    def ask(x: np.ndarray, i: int, alphas: Sequence[float]) -> np.ndarray:  # it knows one picture only
        asked.append(i)
        return (x - np.sqrt(alphas[i]) * wish) / np.sqrt(1 - alphas[i])

    def drawn(alphas: Sequence[float], ask: Callable = ask) -> np.ndarray:
        asked.clear()
        picture = function(lambda x, i: ask(x, i, alphas), noise.copy(), alphas)
        return picture if picture is None or picture is Ellipsis else np.append(picture, asked)

    def doubtful(x: np.ndarray, i: int, alphas: Sequence[float]) -> np.ndarray:
        asked.append(i)
        return 0.5 * x

    cases = [
        Case(([0.36, 1.0],), np.append(wish, [0]), "With two alphas there is one step: ask once, at i = 0."),
        Case(
            ([0.04, 0.36, 0.64, 1.0],),
            np.append(wish, [0, 1, 2]),
            "With four alphas there are three steps, and each asks anew: at i = 0, 1 and 2.",
        ),
        Case(
            ([0.36, 0.64, 1.0], doubtful),
            np.append(0.9625 * noise, [0, 1]),
            "In each step use what was named in this step, and the picture as it is by now.",
        ),
    ]
    return examine(drawn, cases, "that is a sampler. Stable Diffusion's does nothing else.", numbers=False)


def guided(function: Callable) -> Verdict:
    """Notebook 01: ``guided(empty, prompted, scale)``, classifier-free guidance."""
    empty, prompted = np.array([1.0, 2.0]), np.array([2.0, 0.0])
    cases = [
        Case(
            (empty, prompted, 1.0), prompted, "At scale 1 it is what the prompt says, neither more nor less."
        ),
        Case((empty, prompted, 0.0), empty, "At scale 0 the prompt is not heard."),
        Case((empty, prompted, 3.0), [4.0, -4.0], "Begin at `empty`; go 3 times the way to `prompted`."),
    ]
    return examine(function, cases, "what the prompt adds, exaggerated.")


def average_noise(function: Callable) -> Verdict:
    """Notebook 01: ``average_noise(noises)``, the mean of independent noises, as strong as one of them."""

    def strength(count: int) -> list[float] | None:
        got = function(list(np.eye(count)))  # as independent as noises can be: at right angles
        return got if got is None or got is Ellipsis else [float(np.square(got).sum()), np.ptp(got)]

    cases = [
        Case((1,), [1.0, 0.0], "The average of one noise is that noise."),
        Case((4,), [1.0, 0.0], "Of 4 noises the sum has the squared strength 4, the plain mean 1/4: hit 1."),
        Case((9,), [1.0, 0.0], "Of 9 noises the sum has the strength 3."),
    ]
    praise = "noise of the right strength is noise that the denoiser knows."
    return examine(strength, cases, praise, numbers=False)


# ---------------------------------------------------------------------------- notebook 02


def attention_weights(function: Callable) -> Verdict:
    """Notebook 02: ``attention_weights(query, keys)``, the softmax of the scaled dot products."""
    keys = np.array([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    even = np.full(3, 1 / 3)
    scores = np.array([2.0, 0.0, 0.0]) / np.sqrt(2)
    cases = [
        Case((np.zeros(2), keys), even, "A place that asks nothing listens to every token alike."),
        Case(
            (np.array([1.0, 0.0]), keys),
            np.exp(scores) / np.exp(scores).sum(),
            "Divide the dot products by the square root of the query's length before the exponential.",
        ),
        Case(
            (np.array([0.0, 2000.0]), keys),
            np.array([0.0, 1.0, 0.0]),
            "Large scores overflow: subtract the largest score first, the softmax stays the same.",
        ),
    ]
    return examine(function, cases, "that is what each place of the picture does, in every layer and head.")


def word_map(function: Callable) -> Verdict:
    """Notebook 02: ``word_map(maps, tokens)``, one picture from a layer's maps (steps, heads, T, h, w)."""
    maps = np.arange(1.0, 97.0).reshape(2, 2, 4, 2, 3) ** 2 / 1e4
    first = maps[:1, :1]
    cases = [
        Case((first, [1]), first[0, 0, 1], "One step, one head, one token: the picture maps[0, 0, 1]."),
        Case(
            (first, [1, 2]),
            first[0, 0, 1] + first[0, 0, 2],
            "A word in two pieces is listened to as much as both together: *add* its tokens.",
        ),
        Case(
            (maps, [1, 2]),
            (maps[:, :, 1] + maps[:, :, 2]).mean(axis=(0, 1)),
            "Over steps and heads take the *mean*: axes 0 and 1. What is left is (h, w).",
        ),
        Case((maps, [0, 3]), (maps[:, :, 0] + maps[:, :, 3]).mean(axis=(0, 1)), "Take just these tokens."),
    ]
    return examine(function, cases, "every map in this course is that, over one layer or several.")


def overlap(function: Callable) -> Verdict:
    """Notebook 02: ``overlap(word_map, mask)``, the shared part of the brightest places and a thing's."""
    word_map = np.array([[0.9, 0.8, 0.1], [0.7, 0.2, 0.3]])

    def mask(*rows: str) -> np.ndarray:
        return np.array([[c == "#" for c in row] for row in rows])

    cases = [
        Case((word_map, mask("##.", "#..")), 1.0, "The three brightest places are the thing's three: 1."),
        Case((word_map, mask("..#", "...")), 0.0, "The one brightest place is not the thing's one: 0."),
        Case((word_map, mask("#..", "#..")), 1 / 3, "Shared by both: 1 place. In one or both: 3. So 1/3."),
        Case(
            (word_map / 100, mask("##.", ".##")),
            0.6,
            "Choose the brightest by their order, as many as the mask has; how bright they are is no matter.",
        ),
    ]
    return examine(function, cases, "one number, and you need not squint at a map.")


def concentration(function: Callable) -> Verdict:
    """Notebook 02: ``concentration(word_map)``, 0 for an even map, 1 for a single place."""
    quarter = np.zeros((4, 4))
    quarter[:2, :2] = 0.25
    uneven = np.array([[0.75, 0.25], [0.0, 0.0]])
    value = 1 + (0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4)
    cases = [
        Case((np.full((2, 2), 0.25),), 0.0, "Evenly everywhere is 0: the entropy is as large as it can be."),
        Case(
            (np.array([[0.0, 1.0], [0.0, 0.0]]),),
            1.0,
            "A single place is 1. Empty places count 0, but np.log(0) does not: leave them out.",
        ),
        Case(
            (quarter,),
            0.5,
            "Divide the entropy by the largest possible one, the log of the number of *all* places, then "
            "take it from 1.",
        ),
        Case((uneven,), value, "The entropy is -sum(p * log p), with the shares p themselves."),
        Case((uneven * 8,), value, "A map need not sum to 1: divide it by its sum first."),
    ]
    return examine(function, cases, "the same number as in the figure below.")


def scaled_share(function: Callable) -> Verdict:
    """Notebook 02: ``scaled_share(share, factor)``, one word's new share when its weight is scaled."""
    cases = [
        Case((0.2, 1.0), 0.2, "A factor of 1 changes nothing."),
        Case((0.2, 0.0), 0.0, "A factor of 0 removes the word."),
        Case((0.5, 3.0), 0.75, "Weights 3 and 1: the word gets 3 of 4 parts, because all shares sum to 1."),
        Case((0.2, 4.0), 0.5, "All others keep 1 - share; divide the word's part by the new total."),
    ]
    return examine(function, cases, "however large the factor, a share never passes 1.")


# ---------------------------------------------------------------------------- notebook 03


def retention(function: Callable) -> Verdict:
    """Notebook 03: ``retention(before, after, forgotten)``, the kept accuracy of everything else."""
    names = ["apple", "orange", "house"]
    before = pd.Series([1.0, 1.0, 0.8], index=names)
    cases = [
        Case((before, before, "apple"), 1.0, "If nothing changed, everything was kept: 1."),
        Case(
            (before, pd.Series([0.0, 1.0, 0.8], index=names), "apple"),
            1.0,
            "Leave the forgotten concept out: losing it is the point, not damage.",
        ),
        Case(
            (before, pd.Series([0.0, 0.5, 0.4], index=names), "apple"),
            0.5,
            "Divide the mean accuracy after by the mean accuracy before.",
        ),
    ]
    return examine(function, cases, "what is forgotten on purpose does not count as damage.")


def target(function: Callable) -> Verdict:
    """Notebook 03: ``target(f_concept, f_other, eta)``, what ought to be said for the concept."""
    concept, other = np.array([1.0, 2.0, 0.0]), np.array([0.0, 3.0, 0.0])
    cases = [
        Case((concept, other, 0.0), other, "At eta 0 it is the other answer, exactly."),
        Case(
            (concept, other, 1.0),
            [-1.0, 4.0, 0.0],
            "Past it: from `f_concept` to `f_other`, and on in the same direction, away from the concept.",
        ),
        Case((concept, other, 0.5), [-0.5, 3.5, 0.0], "Eta says how far past: here half of the way again."),
    ]
    return examine(function, cases, "eta 0 lands on the other answer; eta 1 goes as far again.")


def nearest_kept(function: Callable) -> Verdict:
    """Notebook 03: ``nearest_kept(distances, gone)``, the name of the nearest concept that stays."""
    distances = pd.Series({"car": 0.9, "orange": 0.4, "tree": 0.7, "mushroom": 0.5})

    def number(distances: pd.Series, gone: list[str]) -> float | None:
        got = function(distances, gone)
        return got if got is None or got is Ellipsis else float(list(distances.index).index(got))

    cases = [
        Case((distances, []), 1.0, "Return the name with the smallest distance; names stand in the index."),
        Case((distances, ["orange"]), 3.0, "The orange is to go as well: take the nearest that stays."),
        Case((distances, ["mushroom", "orange"]), 2.0, "Leave out *all* that is gone, then look."),
        Case((distances, ["apple"]), 1.0, "Something gone need not be in the list: that is no mistake."),
    ]
    return examine(number, cases, "nothing that is to go is ever drawn instead of something else.")


def near_and_far(function: Callable) -> Verdict:
    """Notebook 03: ``near_and_far(before, after, forgotten, related)``, what neighbours and others lost."""
    names = ["apple", "orange", "broccoli", "house", "star"]
    before = pd.Series([1.0, 1.0, 0.5, 1.0, 1.0], index=names)

    def after(*values: float) -> pd.Series:
        return pd.Series(values, index=names)

    near = ["orange", "broccoli"]
    cases = [
        Case((before, after(0, 1, 0.5, 1, 1), "apple", near), (0.0, 0.0), "Only the apple went: no damage."),
        Case(
            (before, after(0, 0.5, 0.5, 1, 1), "apple", near),
            (0.25, 0.0),
            "The neighbours lost 0.5 and 0, that is 0.25 in the mean; the others nothing.",
        ),
        Case(
            (before, after(0, 1, 0.5, 0.5, 1), "apple", near),
            (0.0, 0.25),
            "The others are all but the forgotten one and its neighbours: here house and star.",
        ),
        Case((before, after(0, 0.5, 0, 1, 1), "apple", near), (0.5, 0.0), "Lost is *before less after*."),
    ]
    return examine(function, cases, "a mean over everything hides a single lost neighbour; this does not.")


# ---------------------------------------------------------------------------- notebook 04


def cross_attention_loss(function: Callable) -> Verdict:
    """Notebook 04: ``cross_attention_loss(maps, targets)``, the plain form, from two lists of tensors."""
    small, target = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 0.0])
    large, silent = torch.tensor([[0.0, 0.0, 3.0]]), torch.zeros(1, 3)
    cases = [
        Case(([small], [small]), 0.0, "A layer that is where it should be costs nothing."),
        Case(
            ([small], [target]),
            8.0,
            "One layer, differences 0 and 4: square each, then take the mean over the layer's entries.",
        ),
        Case(
            ([small, large], [target, silent]),
            5.5,
            "Two layers: first the mean inside each layer, 8 and 3, then the mean of those. So a layer with "
            "many places counts no more than one with few.",
        ),
    ]
    slope = Case(
        ([torch.tensor([3.0, 1.0])], [torch.tensor([1.0, 1.0])]),
        [[2.0, 0.0]],
        "The number is right, its gradient is not: stay in torch from beginning to end. After `.item()`, "
        "`.detach()` or numpy nobody knows what to change.",
    )
    praise = "a layer is one term, however many places it has."
    return examine(function, cases, praise) and examine(_gradient(function), [slope], praise)


def write_loss(function: Callable) -> Verdict:
    """Notebook 04: ``write_loss(matrix, f, wanted)``, how far a layer is from what it ought to write."""
    matrix, f = np.array([[2.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    written = np.array([[2.0, 1.0], [0.0, 2.0], [2.0, 2.0]])
    off = written + np.array([[3.0, 0.0], [0.0, 0.0], [0.0, -3.0]])
    cases = [
        Case(
            (matrix, f, written),
            0.0,
            "At each place the layer writes `matrix @ f`; with f in rows: f @ matrix.T.",
        ),
        Case((matrix, f, off), 3.0, "Two of six numbers are off by 3: the squares sum to 18, the mean is 3."),
    ]
    return examine(function, cases, "the first wish and the second, at other places and with other aims.")


def ridge(function: Callable) -> Verdict:
    """Notebook 04: ``ridge(f, wanted, start, r)``, the lowest point of fitting and staying close."""
    rng = np.random.default_rng(0)
    start, f, wanted = (rng.standard_normal(shape) for shape in ((2, 3), (12, 3), (12, 2)))
    fits = f @ np.array([[1.0, 0.0], [2.0, -1.0], [0.0, 0.5]])  # a matrix can write exactly this
    left = f.T @ f / 12 + 0.5 * np.eye(3)
    best = np.linalg.solve(left, (wanted.T @ f / 12 + 0.5 * start).T).T
    cases = [
        Case(
            (f, f @ start.T, start, 0.3),
            start,
            "If it already writes what is wanted, nothing has to change. Does r stand twice, on the right "
            "with `start`, and on the left on the diagonal only (`r * np.eye(...)`)?",
        ),
        Case(
            (f, fits, start, 0.0), [[1.0, 2.0, 0.0], [0.0, -1.0, 0.5]], "Without r it is plain least squares."
        ),
        Case(
            (f, wanted, start, 1e6),
            start,
            "With a huge r the answer stays at `start`: r * start on the right.",
        ),
        Case((f, wanted, start, 0.5), best, "Both sums are *means* over the places: divide them by len(f)."),
    ]
    return examine(function, cases, "that line is what `duge.unlearn` does in every layer.", tolerance=1e-3)


def regularization_loss(function: Callable) -> Verdict:
    """Notebook 04: ``regularization_loss(parameters, base)``, from two dicts of tensors."""

    def weights(a: tuple, b: tuple) -> dict[str, Tensor]:
        return {"a": torch.tensor(a), "b": torch.tensor(b)}

    now, start = weights((1.0, 2.0), (3.0,)), weights((0.0, 2.0), (5.0,))
    cases = [
        Case((start, start), 0.0, "At the base weights nothing pulls."),
        Case(
            (now, start),
            5 / 3,
            "The squared distances are 1, 0 and 4: add them all up, then divide once by how many numbers "
            "there are, 3 (not by the 2 tensors, and not tensor by tensor).",
        ),
        Case(
            (now, dict(reversed(start.items()))),
            5 / 3,
            "Look each tensor up by its name: dictionaries need not have the same order.",
        ),
    ]
    slope = Case(
        ({"a": torch.tensor([1.0, 3.0])}, {"a": torch.zeros(2)}),
        [[1.0, 3.0]],
        "The number is right, its gradient is not: stay in torch from beginning to end.",
    )
    praise = "the square makes a long way dear and a short one cheap."
    return examine(function, cases, praise) and examine(_gradient(function), [slope], praise)


def _gradient(function: Callable) -> Callable:
    """Instead of a loss, its gradient in the tensors (a list or a dict of them) of the first argument."""

    def slopes(first: Sequence[Tensor] | dict[str, Tensor], *rest: Any) -> list[list[float]]:
        tensors = list(first.values() if isinstance(first, dict) else first)
        for tensor in tensors:
            tensor.requires_grad_()
        return [gradient.tolist() for gradient in torch.autograd.grad(function(first, *rest), tensors)]

    return slopes


# ---------------------------------------------------------------------------- notebook 05


def gone_and_kept(function: Callable) -> Verdict:
    """Notebook 05: ``gone_and_kept(matrix, requests, k)``, UA and objects kept after request ``k``."""
    names = ["apple", "car", "orange", "house", "star"]
    rows = [[1, 1, 1, 1, 1], [0, 1, 0.5, 1, 1], [0.75, 0, 0.5, 0.25, 0.75]]
    matrix = pd.DataFrame(rows, columns=names, dtype=float).rename_axis("after")
    requests = ["apple", "car"]
    cases = [
        Case(
            (matrix, requests, 1),
            (1.0, 0.875),
            "After request 1 only the first request was made: UA is 1 - 0, and the car still counts among "
            "the four that are to stay. Look at row k, and at the first k requests.",
        ),
        Case(
            (matrix, requests, 2),
            (0.625, 0.5),
            "After request 2, UA is the mean over both requests, the old one too: 1 - (0.75 + 0) / 2. "
            "What is kept is the mean over the other three.",
        ),
        Case(
            (matrix[["house", "star", "car", "orange", "apple"]], requests, 2),
            (0.625, 0.5),
            "Look concepts up by their name: the matrix may have its columns in any order.",
        ),
    ]
    return examine(function, cases, "what came back counts against UA, and nothing that went counts as kept.")


def wilson(function: Callable) -> Verdict:
    """Notebook 05: ``wilson(hits, n, z)``, both ends of the interval of a share."""
    z = 1.96
    cases = [
        Case(
            (0, 4, z),
            (0.0, z**2 / (4 + z**2)),
            "With 0 of 4 the middle and the half width are equal, so the lower end is 0. Divide both by "
            "1 + z**2 / n.",
        ),
        Case((2, 4, z), (0.1500357, 0.8499643), "Under the root stands p (1 - p) / n + z**2 / (4 n**2)."),
        Case(
            (9, 10, z),
            (0.5958436, 0.9821243),
            "p is hits / n. The middle is p, drawn a little towards one half.",
        ),
        Case(
            (2, 4, 1.0),
            (0.2763932, 0.7236068),
            "z is given: 1.96 is the one for 95 %, others stand for others.",
        ),
    ]
    return examine(
        function, cases, "honest at 0 and at 1, where the school formula says plus or minus nothing."
    )


def solve_all(function: Callable) -> Verdict:
    """Notebook 05: ``solve_all(old, S, X, r)``, the one matrix for many requests, from lists of sums."""
    rng = np.random.default_rng(0)
    old = rng.standard_normal((2, 3))
    f, g = rng.standard_normal((2, 2, 9, 3))
    heard, wanted = f.transpose(0, 2, 1) @ f / 9, g.transpose(0, 2, 1) @ f / 9  # (2, 3, 3) each
    eye = np.eye(3)

    def best(s: np.ndarray, x: np.ndarray, r: float) -> np.ndarray:
        return old @ (x + r * eye) @ np.linalg.inv(s + r * eye)

    cases = [
        Case((old, [heard[0]], [heard[0]], 0.1), old, "Who wants what is heard already changes nothing."),
        Case(
            (old, [heard[0]], [wanted[0]], 0.1),
            best(heard[0], wanted[0], 0.1),
            "For one request it is the formula: r times the identity is added to both. `matrix + r` adds r "
            "to every entry.",
        ),
        Case(
            (old, list(heard), list(wanted), 0.1),
            best(heard.sum(0), wanted.sum(0), 0.1),
            "Two requests: add the S, add the X, then solve once. r is added once, too.",
        ),
        Case(
            (old, list(heard[::-1]), list(wanted[::-1]), 0.1),
            best(heard.sum(0), wanted.sum(0), 0.1),
            "The same two in the other order: the same sums, so the same matrix.",
        ),
    ]
    return examine(
        function, cases, "a sum has no memory of its order, and so the model has none.", tolerance=1e-4
    )


def take_back(function: Callable) -> Verdict:
    """Notebook 05: ``take_back(S, X, s_gone, x_gone, s_kept)``, both sums as if it had not been asked."""
    S, X = np.array([[9.0, 2.0], [2.0, 7.0]]), np.array([[5.0, 1.0], [0.0, 6.0]])
    s, x, none = np.array([[4.0, 1.0], [1.0, 2.0]]), np.array([[1.0, 3.0], [2.0, 0.0]]), np.zeros((2, 2))
    back = np.array([[3.0, 0.0], [0.0, 1.0]])
    cases = [
        Case((S, X, none, none, none), [S, X], "Return both, S and X. Nothing taken back changes neither."),
        Case(
            (S, X, s, x, none),
            [S - s, X - x],
            "Subtract what the request had added: s_gone from S, x_gone from X.",
        ),
        Case(
            (S, X, s, x, back),
            [S - s + back, X - x + back],
            "It counts among what stays again, so its sum comes back into S. What stays is to be written "
            "as it was, f* = f: so the same sum comes back into X.",
        ),
    ]
    return examine(function, cases, "no walk back through the later requests: a subtraction.")


def back_door(function: Callable) -> Verdict:
    """Notebook 05: ``back_door(asked, named, gone)``, the share that shows another thing that went."""
    gone = ["apple", "car", "harp"]
    cases = [
        Case(
            (["apple", "car"], ["orange", "tree"], gone),
            0.0,
            "Things that stay may be shown: they do not count.",
        ),
        Case(
            (["apple", "car"], ["apple", "tree"], gone),
            0.0,
            "Its own name is no back door: that one came through the front. Count only *another* one.",
        ),
        Case(
            (["apple", "car", "harp", "harp"], ["car", "star", "apple", "harp"], gone),
            0.5,
            "Divide by all pictures, not by those that show something that went.",
        ),
    ]
    return examine(function, cases, "the accuracy matrix has no cell for this.")


# ---------------------------------------------------------------------------- notebook 06


def recovery_time(function: Callable) -> Verdict:
    """Notebook 06: ``recovery_time(curve, level)``, the first step at which a share reaches a level."""
    steps = [0, 5, 10, 20]
    rising = pd.Series([0.0, 0.2, 0.6, 1.0], index=steps)
    cases = [
        Case(
            (rising, 0.5),
            10,
            "Return the step, which stands in the index, not its position and not the share.",
        ),
        Case((rising, 0.6), 10, "A share that equals the level has reached it."),
        Case((rising, 0.0), 0, "Before the first step counts too, as step 0."),
        Case(
            (pd.Series([0.1, 0.7, 0.3, 0.9], index=steps), 0.5),
            5,
            "Shares go up and down: take the first step that reaches the level, even if it sinks once more.",
        ),
        Case(
            (rising / 2, 0.9),
            np.inf,
            "When no step reaches the level, return math.inf: later than all steps.",
        ),
    ]
    return examine(function, cases, "the longer it takes, the less was left to find.")


def above_floor(function: Callable) -> Verdict:
    """Notebook 06: ``above_floor(seen, floor)``, the share that is left when false alarms are taken off."""
    cases = [
        Case((0.4, 0.0), 0.4, "Without false alarms nothing has to be taken off."),
        Case((0.2, 0.2), 0.0, "As much as the floor is nothing."),
        Case((1.0, 0.2), 1.0, "All is all: divide by what was left to find, 1 - floor."),
        Case((0.6, 0.2), 0.5, "0.4 above the floor, of 0.8 that were left to find: 0.5."),
        Case((0.1, 0.2), 0.0, "Below the floor is not less than nothing: never below 0."),
        Case(
            (1.0, 1.0),
            0.0,
            "Where the floor is 1 the probe cannot show anything: return 0, and do not divide.",
        ),
    ]
    return examine(function, cases, "what is left is what the model had to add to chance.")


def gain(function: Callable) -> Verdict:
    """Notebook 06: ``gain(noise, told, untold)``, the share of the error that the name takes away."""
    noise = np.array([[1.0, -1.0], [0.0, 2.0]])
    off = np.array([[2.0, 0.0], [0.0, 0.0]])
    cases = [
        Case((noise, noise, noise + 1), 1.0, "Told and without any error: the name takes all of it away."),
        Case(
            (noise, noise + 1, noise - 1),
            0.0,
            "Equal errors, though in other directions: 0. Square before the mean.",
        ),
        Case(
            (noise, noise + off / 2, noise + off), 0.75, "Half as far off is a quarter of the squared error."
        ),
        Case(
            (noise, noise + off, noise + off / 2),
            -3.0,
            "A name that misleads has a gain below 0: do not cut it off.",
        ),
    ]
    return examine(function, cases, "no judge was asked.")


def ask_otherwise(function: Callable) -> Verdict:
    """Notebook 06: ``ask_otherwise(concept)``, at least three different prompts that do not say its name."""

    def about(concept: str, what: str) -> float | None:
        texts = function(concept)
        if texts is None or texts is Ellipsis:
            return None
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            return 0.0
        if what == "texts":
            return 1.0
        if what == "several":
            return float(len({text.strip().lower() for text in texts} - {""}) >= 3)
        return float(not any(concept in text.lower() for text in texts))

    cases = [
        Case(("apple", "texts"), 1.0, "Return a list of prompts, each of them a text."),
        Case(("apple", "several"), 1.0, "One is soon refused. Return at least three that differ."),
        Case(("apple", "silent"), 1.0, "One of them says the name. That would be no attack."),
    ]
    return examine(about, cases, "now ask the model.")


# ---------------------------------------------------------------------------- notebook 07


def beats(function: Callable) -> Verdict:
    """Notebook 07: ``beats(a, b)``, whether method a beats b; each is a Series of numbers, more is better."""

    def method(**numbers: float) -> pd.Series:
        return pd.Series(numbers)

    good, same = method(gone=0.9, kept=0.9), method(gone=0.9, kept=0.9)
    cases = [
        Case((good, method(gone=0.8, kept=0.7)), True, "Better on every count: that beats."),
        Case(
            (good, method(gone=1.0, kept=0.2)),
            False,
            "The other one is better at forgetting: neither beats the other.",
        ),
        Case(
            (method(gone=0.9, kept=0.95), good), True, "Equal on one count and better on the other: beaten."
        ),
        Case((good, same), False, "Two equals do not beat each other: one has to be better somewhere."),
        Case(
            (method(gone=0.9, kept=0.8), method(kept=0.85, gone=0.75)),
            False,
            "Look the numbers up by their name: the two may have different orders.",
        ),
    ]
    return examine(function, cases, "who is beaten on both counts need not be discussed further.")


def uce_matrix(function: Callable) -> Verdict:
    """Notebook 07: ``uce_matrix(old, edit, anchor, keep, r)``, names read as their anchors were read."""
    rng = np.random.default_rng(1)
    old, one = rng.standard_normal((2, 3)), np.eye(3)
    edit, anchor, keep = (rng.standard_normal((n, 3)) for n in (2, 2, 4))
    left = anchor.T @ edit + keep.T @ keep + 0.5 * one
    right = edit.T @ edit + keep.T @ keep + 0.5 * one
    cases = [
        Case((old, edit, edit, keep, 0.5), old, "Where each name is its own anchor nothing has to change."),
        Case(
            (old, one[:1], one[1:2], one[1:], 1e-9),
            old[:, [1, 1, 2]],
            "The first vector is to be read as the second was: anchor.T @ edit, and `left` stands before the "
            "inverse of `right`.",
        ),
        Case(
            (old, edit, anchor, keep, 1e9),
            old,
            "With a huge r nothing moves: r times the identity in both sums.",
        ),
        Case(
            (old, edit, anchor, keep, 0.5),
            old @ left @ np.linalg.inv(right),
            "What stays is in both sums; `left` stands before the inverse of `right`.",
        ),
    ]
    return examine(function, cases, "no picture, no training: only words.", tolerance=1e-3)


def sign_test(function: Callable) -> Verdict:
    """Notebook 07: ``sign_test(a, b)``, how likely a fair coin is at least so lopsided, to either side."""
    cases = [
        Case((3, 3), 1.0, "A draw is no news: double the tail, but a chance is at most 1."),
        Case((0, 0), 1.0, "Without a single difference nothing speaks against luck: 1."),
        Case((5, 0), 0.0625, "Five of five, or none of five: 2 / 2**5. Count both sides."),
        Case((4, 1), 0.375, "As lopsided or more: none or one of five, (1 + 5) / 32, and the same mirrored."),
        Case((1, 4), 0.375, "It must not matter who is the first: the tail ends at the smaller count."),
    ]
    return examine(function, cases, "so few flips prove little, and you can say how little.")


def unbiased_kid(function: Callable) -> Verdict:
    """Notebook 07: ``unbiased_kid(f, g)``, the kernel inception distance from two arrays of features."""
    two = np.array([[1.0], [-1.0]])
    f, g = np.array([[1.0, 1.0], [0.0, 2.0], [1.0, -1.0]]), np.array([[2.0, 0.0], [0.0, 2.0]])
    cases = [
        Case(
            (two, two),
            -8.0,
            "Pairs: 8 of equal, 0 of different pictures. Within a heap leave out each picture with itself "
            "(mean 0, twice), across keep all (mean 4): 0 + 0 - 2 * 4.",
        ),
        Case(
            (f, f[::-1]),
            -68 / 9,
            "Divide the product by the number of features, f.shape[1]; within, divide by n * (n - 1).",
        ),
        Case((f, g), -40 / 3, "The heaps may differ in size: each mean has its own count."),
    ]
    return examine(function, cases, "below zero is no error: on average it is fair.")


# ---------------------------------------------------------------------------- notebook 08


def concept_texts(function: Callable) -> Verdict:
    """Notebook 08: ``concept_texts(name)``, how it is asked for, and what is drawn instead."""

    def about(what: str, name: str) -> float | None:
        got = function(name)
        if got is None or got is Ellipsis:
            return None
        prompts, instead = got
        named, other = ([name.casefold() in text.casefold() for text in part] for part in (prompts, instead))
        lists = not isinstance(prompts, str) and not isinstance(instead, str)
        found = {"lists": lists and len(prompts) == len(instead), "several": len(set(prompts)) >= 4}
        return float((found | {"named": all(named), "unnamed": not any(other)})[what])

    cases = [
        Case(
            ("lists", "Van Gogh"),
            1.0,
            "Return two lists of texts of the same length: prompts, and what is to be drawn instead of each.",
        ),
        Case(
            ("several", "Van Gogh"), 1.0, "Ask in at least four different ways: one phrasing is not enough."
        ),
        Case(("named", "Van Gogh"), 1.0, "Every prompt has to name it: these are the ways to ask for it."),
        Case(
            ("unnamed", "Van Gogh"), 1.0, "It must not be named in what is drawn instead: then it would stay."
        ),
        Case(("named", "corgi"), 1.0, "Use the name that is given, not one of your own: f-strings help."),
    ]
    return examine(about, cases, "that is all that a request needs to know.")


def closer_to_name(function: Callable) -> Verdict:
    """Notebook 08: ``closer_to_name(named, instead)``, the share of pictures that fit the name better."""
    cases = [
        Case(
            (np.array([30.0, 20.0]), np.array([10.0, 25.0])), 0.5, "Compare picture by picture, then a mean."
        ),
        Case((np.array([20.0, 20.0]), np.array([20.0, 20.0])), 0.0, "A draw is not closer: `>`, not `>=`."),
        Case(
            (np.array([90.0, 10.0, 10.0, 10.0]), np.array([0.0, 20.0, 20.0, 20.0])),
            0.25,
            "One picture with a large score must not outvote the others: count pictures, not points.",
        ),
    ]
    return examine(function, cases, "a judge for anything that can be said.")


def book_megabytes(function: Callable) -> Verdict:
    """Notebook 08: ``book_megabytes(channels, moments, places)``, MB that the solver notes of a prompt."""
    cases = [
        Case(([1_000_000], 1, 1), 4.0, "Two halves of guidance, and two bytes for each number."),
        Case(([1_000_000, 500_000], 1, 1), 6.0, "Each layer has its own channels: sum them."),
        Case(([320, 640, 1280], 10, 16), 1.4336, "Every moment and every place is noted."),
    ]
    return examine(function, cases, "so you can count before you start, for any model.")


def drawing_cost(function: Callable) -> Verdict:
    """Notebook 08: ``drawing_cost(pictures, steps, seconds, price)``, minutes, and what they cost."""
    cases = [
        Case((1, 60, 1.0, 0.0), (1.0, 0.0), "Pictures times steps times seconds are seconds: divide by 60."),
        Case((60, 10, 1.0, 6.0), (10.0, 1.0), "Return two numbers. The price is that of an hour."),
        Case((120, 5, 0.5, 1.2), (5.0, 0.1), "Every picture needs every step."),
    ]
    return examine(function, cases, "so you can say no before you start.")


def lora_loss(function: Callable) -> Verdict:
    """Notebook 08: ``lora_loss(sizes, rank)``, the share of a change that a cut to ``rank`` leaves out."""
    cases = [
        Case((np.array([4.0, 3.0]), 2), 0.0, "With all directions nothing is lost."),
        Case((np.array([4.0, 3.0]), 0), 1.0, "With none of them everything is: divide by the whole."),
        Case((np.array([4.0, 3.0]), 1), 0.6, "Norms: the root of a sum of squares, 3 against 5 here."),
        Case(
            (np.array([2.0, 2.0, 1.0]), 1), np.sqrt(5) / 3, "All that is left out counts, not one direction."
        ),
    ]
    return examine(function, cases, "the same number that `export_lora` returns.")


# ---------------------------------------------------------------------------- notebook 09


def new_thing(function: Callable) -> Verdict:
    """Notebook 09: ``new_thing()``, a list of the world's parts, inside [-1, 1]^2 and not too small."""

    def about(what: str) -> float | None:
        parts = function()
        if parts is None or parts is Ellipsis:
            return None
        points = np.concatenate([np.asarray(part.points, dtype=float) for part in parts])  # (n, 2)
        if what == "inside":
            return float(np.abs(points).max() <= 1.1)
        if what == "large":
            return float(np.ptp(points, axis=0).max() >= 1)
        return float(all(len(p.color) == 3 and 0 <= min(p.color) <= max(p.color) <= 255 for p in parts))

    cases = [
        Case(("inside",), 1.0, "Return a list of Part(points, color), points (n, 2), x and y from -1 to 1."),
        Case(("large",), 1.0, "It is small: let it reach over half of the way from -1 to 1 at least."),
        Case(("colours",), 1.0, "A colour is three whole numbers from 0 to 255: red, green, blue."),
    ]
    return examine(about, cases, "that can be drawn in every style.", numbers=False)


def nearest_prototype(function: Callable) -> Verdict:
    """Notebook 09: ``nearest_prototype(features, prototypes)``, the number of each row's nearest one."""
    prototypes = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    cases = [
        Case((prototypes, prototypes), [0, 1, 2], "A prototype is nearest to itself."),
        Case((np.array([[2.0, 0.5]]), prototypes), [1], "One picture: still a list, of one number."),
        Case(
            (np.array([[1.0, 2.4], [1.4, 0.0], [0.2, 2.6]]), prototypes),
            [0, 0, 2],
            "Measure all the distances, features[:, None] - prototypes, and take argmin over the prototypes.",
        ),
    ]
    return examine(function, cases, "the simplest judge that there is.")


def harmonic_mean(function: Callable) -> Verdict:
    """Notebook 09: ``harmonic_mean(shares)``; 0 when one of them is 0."""
    cases = [
        Case(([0.5, 0.5],), 0.5, "Of equal shares it is that share."),
        Case(([1.0, 0.25],), 0.4, "Here 2 / (1/1 + 1/0.25) = 0.4: their number over the sum of 1 / share."),
        Case(([1.0, 0.0, 1.0],), 0.0, "A share of 0 makes it 0: look for that before you divide."),
        Case(([1.0, 1.0, 1.0, 0.1],), 4 / 13, "Use as many shares as there are, not always two."),
    ]
    return examine(function, cases, "one bad part cannot hide behind four good ones.")


def pictures_needed(function: Callable) -> Verdict:
    """Notebook 09: ``pictures_needed(hit_rate, doubt)``, how many misses in a row are enough."""
    cases = [
        Case(
            (0.9, 0.5), 1, "A model that draws it 9 times in 10 misses once with chance 0.1: one is enough."
        ),
        Case(
            (0.5, 0.1), 4, "n misses in a row have the chance (1 - hit_rate) ** n: 0.5, 0.25, 0.125, 0.0625."
        ),
        Case((0.8, 0.03), 3, "0.2, 0.04, 0.008: the first that is not above the doubt is the third."),
        Case((1.0, 0.05), 1, "Who never misses is caught by one miss: beware of the logarithm of 0."),
    ]
    return examine(function, cases, "so you know what a picture of the budget buys.")
