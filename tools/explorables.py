"""Draws what the explorables show, and writes them: one self-contained page each in docs/explorables/.

    python tools/explorables.py                      # all of them; goes on where it stopped
    python tools/explorables.py --only prior eta     # these
    python tools/explorables.py --minutes 8          # stops after so long; run it again to go on

What was drawn lies in build/explorables/ (not in git), in a folder of the model's. Pictures take ten steps
of DPM-Solver++ under bfloat16 autocast, as in benchmarks/; seeds are fixed. Every number on a page is
counted here.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import duge_lite as duge
from duge_lite import attacks, baselines
from duge_lite.evaluation import OTHER
from duge_lite.solver import BOOK, cross_attention_weights
from duge_lite.unlearning import sequence_steps
from duge_lite.viewer import Slides

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
from common import draw, model  # noqa: E402
from continual import TWELVE  # noqa: E402

PAGES = ROOT / "docs" / "explorables"
SEED = 500
CONCEPT = "apple"
Config = duge.UnlearnConfig


class Workshop:
    """Pictures and numbers that are made once: a file for each name, and a time to stop."""

    def __init__(self, minutes: float) -> None:
        self.folder = ROOT / "build/explorables" / model()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + 60 * minutes
        self.pipe, self.judge = duge.load_pipeline(), duge.Judge.load()
        self.card = duge.model_card(self.pipe)

    def kept(self, name: str, make: Callable[[], np.ndarray | float]) -> np.ndarray:
        """What ``make`` returned the first time."""
        path = self.folder / f"{name}.npy"
        if not path.exists():
            if time.monotonic() > self.end:
                raise SystemExit(f"time is up before {name}: run me again")
            started = time.process_time()
            np.save(path, make())
            print(f"{name}: {time.process_time() - started:.1f} processor seconds", flush=True)
        return np.load(path)

    def prompts(self, names: Sequence[str], seeds: int) -> list[str]:
        """``seeds`` prompts of each name in turn; a style is drawn on different objects."""
        return [self.card.prompts(n)[k if n in self.card.styles else 0] for n in names for k in range(seeds)]

    def look(self, pipe, names: Sequence[str], seeds: int, **how: object) -> np.ndarray:
        """(names * seeds, 64, 64, 3); picture k of every name is from the same noise."""
        return draw(pipe, self.prompts(names, seeds), [SEED + k for _ in names for k in range(seeds)], **how)

    def forgotten(self, config: Config, look: Callable[[], np.ndarray]) -> np.ndarray:
        """What is drawn while the apple is gone; the book is drawn once and kept on disk."""
        run = duge.unlearn(self.pipe, CONCEPT, config, directory=self.folder)
        try:
            return look()
        finally:
            run.restore()


# ---------------------------------------------------------------------------- what is drawn

PRIOR = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
PRIOR_NAMES, PRIOR_SEEDS = ("apple", "orange", "umbrella", "goldfish"), 6
ETAS, GUIDANCE = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0), (1.0, 2.0, 4.0, 6.0, 8.0, 12.0)
ETA_NAMES = ("apple", "apple", "apple", "orange", "umbrella")


def draw_prior(w: Workshop) -> list[np.ndarray]:
    """Of every prior weight the pictures, (4 * 6, 64, 64, 3); the base model's last."""

    def look() -> np.ndarray:
        return w.look(w.pipe, PRIOR_NAMES, PRIOR_SEEDS)

    found = [w.kept(f"prior-{v:g}", lambda v=v: w.forgotten(Config(lambda_prior=v), look)) for v in PRIOR]
    return [*found, w.kept("prior-base", look)]


def draw_eta(w: Workshop) -> np.ndarray:
    """(etas, guidances, 5, 64, 64, 3): three apples, an orange, an umbrella."""

    def look() -> np.ndarray:
        prompts, seeds = [w.card.prompt(n) for n in ETA_NAMES], [SEED, SEED + 1, SEED + 2, SEED, SEED]
        return np.stack([draw(w.pipe, prompts, seeds, guidance_scale=g) for g in GUIDANCE])

    return np.stack([w.kept(f"eta-{e:g}", lambda e=e: w.forgotten(Config(eta=e), look)) for e in ETAS])


RELEARN, RELEARN_SEEDS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20), 2


def draw_relearn(w: Workshop) -> dict[str, np.ndarray]:
    """Of every model (14 moments, 10 pictures, 64, 64, 3): an apple in five styles, twice."""
    pictures = [
        duge.doodles.draw(CONCEPT, w.card.styles[i % 5], list(duge.doodles.BACKGROUNDS)[i % 6], 10_000 + i)
        for i in range(30)
    ]
    prompts = [w.card.prompts(CONCEPT)[i % 5] for i in range(30)]
    seeds = [SEED + i for i in range(5 * RELEARN_SEEDS)]
    given = attacks.encode_pictures(w.pipe, pictures, prompts)

    def film(name: str) -> np.ndarray:
        pipe = duge.load_pipeline()
        if name == "oracle":
            pipe = duge.load_oracle(pipe, CONCEPT)
        if name == "exact":
            duge.unlearn(pipe, CONCEPT, directory=w.folder)
        if name == "UCE":
            baselines.uce(pipe, CONCEPT, styled=True)
        asks = w.card.prompts(CONCEPT) * RELEARN_SEEDS
        shown = [draw(pipe, asks, seeds)]
        steps = attacks.relearn_steps(pipe, given, max(RELEARN))
        shown += [draw(pipe, asks, seeds) for state in steps if state.step in RELEARN]
        return np.stack(shown)

    return {n: w.kept(f"relearn-{n}", lambda n=n: film(n)) for n in ("base", "exact", "UCE", "oracle")}


ORDERS = {"as listed": TWELVE, "backwards": TWELVE[::-1]}
ORDERS |= {"shuffled": tuple(np.random.default_rng(1).permutation(TWELVE).tolist())}
WATCHED = ("apple", "umbrella", "car", "goldfish", "neon")
WATCHED += ("orange", "parachute", "airplane", "star", "sketch")  # nobody asks for these to go
WATCHED_SEEDS = 3
ALONE = {"lambda_prior": 0.0, "lambda_regularization": 0.0, "revisit": 0.0}  # the attention loss alone
NAIVE = Config(
    solver="gradient", instead="nameless", eta=0.5, iterations=20, memory_size=4, memory_batch_size=1, **ALONE
)
SHOWN_AFTER = (1, 2, 4, 6, 9, 12)
METHODS = {"exact": Config(), "naive": NAIVE, "UCE": None}


def vector(pipe) -> np.ndarray:
    """All cross-attention weights in a row."""
    return np.concatenate([p.detach().flatten().numpy() for p in cross_attention_weights(pipe.unet).values()])


def walk(w: Workshop, method: str, order: str, every: bool) -> Iterator[np.ndarray]:
    """The pictures after requests (some, or the last) of one method in one order; (10 * 3, 64, 64, 3)."""
    names, stem, solved = ORDERS[order], f"{method}-{order.replace(' ', '-')}", METHODS[method] is not None
    files = [f"{k:02d}" for k in (SHOWN_AFTER if every else [12])] + ["weights"] * solved
    pipe, steps = None, iter(())
    if not all((w.folder / f"{stem}-{f}.npy").exists() for f in files):
        pipe = duge.load_pipeline()
        if method == "exact" and not (w.folder / stem).exists() and (w.folder / BOOK).exists():
            (w.folder / stem).mkdir()
            shutil.copy(w.folder / BOOK, w.folder / stem)  # what was drawn for the other explorables
        if solved:
            steps = sequence_steps(pipe, names, METHODS[method], w.folder / stem, progress=False)
    for k in range(1, 13):
        if pipe is not None and solved:
            if time.monotonic() > w.end:
                raise SystemExit(f"time is up before {stem} {k}: run me again")
            started = time.process_time()
            next(steps)
            print(
                f"{stem} {k} {names[k - 1]}: {time.process_time() - started:.1f} processor seconds",
                flush=True,
            )

        def look(k: int = k) -> np.ndarray:
            if not solved:
                kept = [c for c in w.card.forgettable if c not in names[:k]]
                run = baselines.uce(pipe, list(names[:k]), preserve=kept, styled=True)
            shown = w.look(pipe, WATCHED, WATCHED_SEEDS)
            if not solved:
                run.restore()
            return shown

        if k == 12 or (every and k in SHOWN_AFTER):
            yield w.kept(f"{stem}-{k:02d}", look)
    if solved:
        w.kept(f"{stem}-weights", lambda: vector(pipe))


def draw_walks(w: Workshop, orders: Sequence[str], methods: Sequence[str], every: bool) -> dict:
    return {(m, o): list(walk(w, m, o, every)) for m in methods for o in orders}


def draw_timeline(w: Workshop) -> dict:
    w.kept("watched-base", lambda: w.look(w.pipe, WATCHED, WATCHED_SEEDS))
    return draw_walks(w, list(ORDERS)[:2], list(METHODS), True)


def draw_orders(w: Workshop) -> dict:
    w.kept("weights-base", lambda: vector(w.pipe))
    return draw_walks(w, list(ORDERS), ["exact", "naive"], False)


# ---------------------------------------------------------------------------- what is shown

HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{title}</title>
"""


def plain(number: float) -> str:
    return np.format_float_positional(number, trim="-")


def webp(picture: np.ndarray) -> bytes:
    Image.fromarray(picture).save(buffer := io.BytesIO(), "WEBP", quality=82, method=6)
    return buffer.getvalue()


def right(w: Workshop, pictures: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Whether the judge names each picture as it was asked for: the object, or the style."""
    shown = [Image.fromarray(p) for p in pictures]
    objects, styles = (w.judge.names(shown, known) for known in (w.card.concepts, w.card.styles))
    saw = zip(names, objects, styles, strict=True)
    return np.array([n == (style if n in w.card.styles else one) for n, one, style in saw])


def words(w: Workshop, pictures: np.ndarray) -> list[str]:
    return w.judge.names([Image.fromarray(p) for p in pictures], w.card.concepts)


def show_prior(w: Workshop) -> Slides:
    *drawn, _ = draw_prior(w)
    frames, labels, found = [], [], []
    for value, pictures in zip(PRIOR, drawn, strict=True):
        names = [n for n in PRIOR_NAMES for _ in range(PRIOR_SEEDS)]
        hits = right(w, pictures, names).reshape(len(PRIOR_NAMES), -1).sum(1)
        saw = words(w, pictures)
        rows = {}
        for k, head in enumerate(
            ("One noise (bars: share of six that show what was asked)", "Another noise")
        ):
            at = [i * PRIOR_SEEDS + k for i in range(len(PRIOR_NAMES))]
            shares = hits / PRIOR_SEEDS if k == 0 else [None] * len(at)
            rows[head] = [
                (saw[i] if saw[i] == names[i] else f"{names[i]} → {saw[i]}", webp(pictures[i]), s)
                for i, s in zip(at, shares, strict=True)
            ]
        frames.append(rows)
        found.append(hits)
        said = ", ".join(f"{n} {h} of {PRIOR_SEEDS}" for n, h in zip(PRIOR_NAMES, hits, strict=True))
        labels.append(f"Weight {plain(value)}: the judge finds what was asked for, {said}.")
    many, left = 3 * PRIOR_SEEDS, found[-1][0]
    lost = many - found[0][1:].sum()
    title = f"The apple is to go. At weight {plain(PRIOR[0])} it takes {lost} of {many} other things along; "
    title += f"at {plain(PRIOR[-1])}, {left} of {PRIOR_SEEDS} apples stay"
    return Slides(frames, labels, title, {"Weight of the prior loss": PRIOR}, PRIOR.index(1.0))


def show_eta(w: Workshop) -> Slides:
    drawn, frames, labels = draw_eta(w), [], []
    found = {eta: Counter() for eta in ETAS}
    for e, g in np.ndindex(len(ETAS), len(GUIDANCE)):
        saw, hits = words(w, drawn[e, g]), right(w, drawn[e, g], ETA_NAMES)
        tiles = [(s, webp(p), None) for s, p in zip(saw, drawn[e, g], strict=True)]
        frames.append(
            {"asked for an apple, three noises": tiles[:3], "asked for an orange, an umbrella": tiles[3:]}
        )
        found[ETAS[e]].update(saw[:3])
        text = f"η = {ETAS[e]:g}, guidance {GUIDANCE[g]:g}. An apple asked for, seen: {', '.join(saw[:3])}."
        labels.append(f"{text} Of the orange and the umbrella {hits[3:].sum()} of 2 stay.")
    first, one, last = (found[e] for e in (0.0, 1.0, 4.0))
    title = (
        f"Of {3 * len(GUIDANCE)} apples asked for, {first[CONCEPT]} come at η = 0, {one[CONCEPT]} at η = 1; "
    )
    title += f"at η = 4, {last[OTHER]} pictures show nothing that the judge knows"
    controls = {"η (eta): how far past": ETAS, "Guidance": GUIDANCE}
    return Slides(frames, labels, title, controls, ETAS.index(0.5) * len(GUIDANCE) + GUIDANCE.index(4.0))


def show_relearn(w: Workshop) -> Slides:
    films, frames, labels, many = draw_relearn(w), [], [], 5 * RELEARN_SEEDS
    seen = {
        n: [w.judge.sees([Image.fromarray(p) for p in pictures], CONCEPT) for pictures in film]
        for n, film in films.items()
    }
    for k, step in enumerate(RELEARN):
        rows = {}
        for name, film in films.items():
            yes = seen[name][k]
            rows[f"{name}: {yes.sum()} of {many}"] = [
                ("apple" if y else "no apple", webp(p), None)
                for p, y in zip(film[k][:5], yes[:5], strict=True)
            ]
        frames.append(rows)
        said = ", ".join(f"{n} {seen[n][k].sum()}" for n in films)
        labels.append(
            f"After {step} steps on thirty apples the judge sees an apple in so many of {many}: {said}."
        )
    last = {name: yes[-1].sum() for name, yes in seen.items()}
    title = f"After {RELEARN[-1]} steps on apples they are back: exact {last['exact']} of {many} pictures, "
    title += f"UCE {last['UCE']}; the oracle, which never saw one, {last['oracle']}"
    return Slides(frames, labels, title, {"Steps of relearning": RELEARN})


KINDS = {"exact": "exact", "attention loss alone": "naive", "UCE": "UCE"}


def tiles(pictures: np.ndarray, hits: np.ndarray, which: Sequence[str]) -> list[tuple]:
    """A picture of each watched concept that is among ``which``, with the judge's count."""
    counts = hits.reshape(len(WATCHED), -1).sum(1)
    return [
        (f"{n}: {counts[i]} of {WATCHED_SEEDS}", webp(pictures[i * WATCHED_SEEDS]), counts[i] / WATCHED_SEEDS)
        for i, n in enumerate(WATCHED) if n in which
    ]  # fmt: skip


def show_timeline(w: Workshop) -> Slides:
    drawn, frames, labels = draw_timeline(w), [], []
    names, base = np.repeat(WATCHED, WATCHED_SEEDS), w.kept("watched-base", lambda: np.zeros(0))
    ends = {}
    for kind, method in KINDS.items():
        for order in list(ORDERS)[:2]:
            for k, pictures in zip((0, *SHOWN_AFTER), [base, *drawn[method, order]], strict=True):
                gone = ORDERS[order][:k]
                hits, went = right(w, pictures, names), np.isin(names, gone)
                rows = {"to stay (full bars are wished)": [c for c in WATCHED if c not in gone]}
                rows = {
                    "asked to go by now (empty bars are wished)": [c for c in WATCHED if c in gone]
                } | rows
                frames.append({head: tiles(pictures, hits, some) for head, some in rows.items() if some})
                ends[kind, order] = (
                    int(hits[went].sum()),
                    int(hits[~went].sum()),
                    int(went.sum()),
                    int((~went).sum()),
                )
                left, kept, m, n = ends[kind, order]
                text = (
                    f"after {k} request{'s' * (k > 1)}, the last “{gone[-1]}”: "
                    if k
                    else "nothing was asked to go yet: "
                )
                text += f"{left} of {m} pictures show what was to go, " if m else ""
                labels.append(
                    f"{kind[0].upper()}{kind[1:]}, {order}, {text}{kept} of {n} show what was to stay."
                )
    title = "After twelve requests, kept of what was to stay: "
    title += ", ".join(
        f"{kind} {e[1]} of {e[3]}" for (kind, order), e in ends.items() if order == "as listed"
    )
    controls = {"Method": tuple(KINDS), "Order": tuple(ORDERS)[:2], "Requests": (0, *SHOWN_AFTER)}
    return Slides(frames, labels, title, controls)


def show_orders(w: Workshop) -> Slides:
    drawn, frames, labels = draw_orders(w), [], []
    base, names = w.kept("weights-base", lambda: np.zeros(0)), np.repeat(WATCHED, WATCHED_SEEDS)
    far: dict[str, list[float]] = {"exact": [], "naive": []}
    for order, listed in ORDERS.items():
        rows = {}
        for kind, method in list(KINDS.items())[:2]:
            first, now = (
                np.load(w.folder / f"{method}-{o.replace(' ', '-')}-weights.npy")
                for o in ("as listed", order)
            )
            far[method].append(float(np.linalg.norm(now - first) / np.linalg.norm(first - base)))
            pictures = drawn[method, order][-1]
            head = (
                f"{kind}: {far[method][-1]:.0%} of the way from the base away from the first order's weights"
            )
            rows[head] = tiles(pictures, right(w, pictures, names), WATCHED)
        frames.append(rows)
        labels.append(f"{order[0].upper()}{order[1:]}: {', '.join(listed)}.")
    title = f"Twelve requests in {len(ORDERS)} orders: exact weights differ by {max(far['exact']):.1g}, "
    title += f"those of the attention loss alone by up to {max(far['naive']):.0%} of their way"
    return Slides(frames, labels, title, {"Order of the requests": tuple(ORDERS)})


SHOWN = {"timeline": show_timeline, "eta": show_eta, "prior": show_prior, "orders": show_orders}
SHOWN |= {"relearn": show_relearn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(SHOWN), choices=list(SHOWN))
    parser.add_argument("--minutes", type=float, default=1e9)
    args = parser.parse_args()
    w = Workshop(args.minutes)
    PAGES.mkdir(exist_ok=True)
    for name in args.only:
        slides = SHOWN[name](w)
        title = re.search("<b>(.*?)</b>", slides.data)[1]
        path = PAGES / f"{name}.html"
        path.write_text(HEAD.format(title=title) + slides.data + "\n", "utf-8")
        print(f"{path.name}, {path.stat().st_size} bytes: {title}")


if __name__ == "__main__":
    main()
