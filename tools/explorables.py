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
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import duge_lite as duge
from duge_lite import attacks, baselines
from duge_lite.sequence import sequence_steps

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "explorables"
STEPS, SEED = 10, 500
CONCEPT = "apple"
Config = duge.UnlearnConfig


class Workshop:
    """Pictures and numbers that are made once: a file for each name, and a time to stop."""

    def __init__(self, minutes: float) -> None:
        weights = duge.data_dir() / "doodle-sd/unet/diffusion_pytorch_model.safetensors"
        self.folder = ROOT / "build/explorables" / hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
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

    def draw(self, pipe, prompts: Sequence[str], seeds: Sequence[int], **how: object) -> np.ndarray:
        """(n, 64, 64, 3)."""
        with torch.autocast(pipe.device.type, torch.bfloat16):
            pictures = duge.sample(pipe, list(prompts), list(seeds), STEPS, **how)
        return np.stack([np.asarray(p) for p in pictures])

    def prompts(self, names: Sequence[str], seeds: int) -> list[str]:
        """``seeds`` prompts of each name in turn; a style is drawn on different objects."""
        return [self.card.prompts(n)[k if n in self.card.styles else 0] for n in names for k in range(seeds)]

    def look(self, pipe, names: Sequence[str], seeds: int, **how: object) -> np.ndarray:
        """(names * seeds, 64, 64, 3); picture k of every name is from the same noise."""
        return self.draw(
            pipe, self.prompts(names, seeds), [SEED + k for _ in names for k in range(seeds)], **how
        )

    def forgotten(self, config: Config, look: Callable[[], np.ndarray]) -> np.ndarray:
        """What is drawn while the apple is gone; the book is drawn once and kept on disk."""
        run = duge.unlearn(self.pipe, CONCEPT, config, directory=self.folder)
        try:
            return look()
        finally:
            run.restore()


# ---------------------------------------------------------------------------- what is drawn

PRIOR = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
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
        return np.stack([w.draw(w.pipe, prompts, seeds, guidance_scale=g) for g in GUIDANCE])

    return np.stack([w.kept(f"eta-{e:g}", lambda e=e: w.forgotten(Config(eta=e), look)) for e in ETAS])


RELEARN, RELEARN_SEEDS = 20, 2


def draw_relearn(w: Workshop) -> dict[str, np.ndarray]:
    """Of every model (21 steps, 10 pictures, 64, 64, 3): an apple in five styles, twice."""
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
        shown = [w.draw(pipe, asks, seeds)]
        shown += [w.draw(pipe, asks, seeds) for _ in attacks.relearn_steps(pipe, given, RELEARN)]
        return np.stack(shown)

    return {n: w.kept(f"relearn-{n}", lambda n=n: film(n)) for n in ("base", "exact", "UCE", "oracle")}


LISTED = ("apple", "umbrella", "car", "sunglasses", "broccoli", "traffic light", "goldfish", "harp", "house")
LISTED += ("broom", "neon", "mosaic")  # the order of benchmarks/continual.py
ORDERS = {"as listed": LISTED, "backwards": LISTED[::-1]}
ORDERS |= {"shuffled": tuple(np.random.default_rng(1).permutation(LISTED).tolist())}
WATCHED = (
    "apple",
    "umbrella",
    "car",
    "goldfish",
    "neon",
    "orange",
    "parachute",
    "airplane",
    "star",
    "sketch",
)
WATCHED_SEEDS = 3
ALONE = {"lambda_prior": 0.0, "lambda_regularization": 0.0, "revisit": 0.0}  # the attention loss alone
NAIVE = Config(
    solver="gradient", instead="nameless", eta=0.5, iterations=20, memory_size=4, memory_batch_size=1, **ALONE
)
METHODS = {"exact": Config(), "naive": NAIVE, "UCE": None}


def vector(pipe) -> np.ndarray:
    """All cross-attention weights in a row."""
    from duge_lite.solver import cross_attention_weights

    return np.concatenate([p.detach().flatten().numpy() for p in cross_attention_weights(pipe.unet).values()])


def walk(w: Workshop, method: str, order: str, every: bool) -> Iterator[np.ndarray]:
    """The pictures after each request (or the last) of one method in one order; (10 * 3, 64, 64, 3)."""
    names, stem = ORDERS[order], f"{method}-{order.replace(' ', '-')}"
    files = [w.folder / f"{stem}-{k:02d}.npy" for k in range(1, 13)] + [w.folder / f"{stem}-weights.npy"]
    pipe = None if all(f.exists() for f in files[0 if every else 11 :]) else duge.load_pipeline()
    steps = iter(())
    if pipe is not None and METHODS[method] is not None:
        steps = sequence_steps(pipe, names, METHODS[method], w.folder / stem, progress=False)
    for k in range(1, 13):
        if pipe is not None and METHODS[method] is not None:
            if time.monotonic() > w.end:
                raise SystemExit(f"time is up before {stem} {k}: run me again")
            started = time.process_time()
            next(steps)
            print(
                f"{stem} {k} {names[k - 1]}: {time.process_time() - started:.1f} processor seconds",
                flush=True,
            )

        def look(k: int = k) -> np.ndarray:
            if METHODS[method] is None:
                kept = [c for c in w.card.forgettable if c not in names[:k]]
                run = baselines.uce(pipe, list(names[:k]), preserve=kept, styled=True)
            shown = w.look(pipe, WATCHED, WATCHED_SEEDS)
            if METHODS[method] is None:
                run.restore()
            return shown

        if every or k == 12:
            yield w.kept(f"{stem}-{k:02d}", look)
    if METHODS[method] is not None:
        w.kept(f"{stem}-weights", lambda: vector(pipe))


def draw_walks(w: Workshop, orders: Sequence[str], methods: Sequence[str], every: bool) -> dict:
    return {(m, o): list(walk(w, m, o, every)) for m in methods for o in orders}


def draw_timeline(w: Workshop) -> dict:
    w.kept("watched-base", lambda: w.look(w.pipe, WATCHED, WATCHED_SEEDS))
    return draw_walks(w, list(ORDERS)[:2], list(METHODS), True)


def draw_orders(w: Workshop) -> dict:
    w.kept("weights-base", lambda: vector(w.pipe))
    return draw_walks(w, list(ORDERS), ["exact", "naive"], False)


DRAWN = {"prior": draw_prior, "eta": draw_eta, "relearn": draw_relearn}
DRAWN |= {"timeline": draw_timeline, "orders": draw_orders}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(DRAWN), choices=list(DRAWN))
    parser.add_argument("--minutes", type=float, default=1e9)
    args = parser.parse_args()
    w = Workshop(args.minutes)
    for name in args.only:
        DRAWN[name](w)


if __name__ == "__main__":
    main()
