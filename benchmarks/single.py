"""One concept forgotten: five targets, every method, ours with three seeds; what it takes.

    python benchmarks/single.py                  # everything; goes on where it stopped
    python benchmarks/single.py --only ours UCE  # these rows, in this order
    python benchmarks/single.py --cells          # only what is gone and what is kept
    python benchmarks/single.py --timing         # processor seconds: all methods in turns, in one run
    python benchmarks/single.py --sweep          # the exact solver's settings: quality against seconds
    python benchmarks/single.py --table          # only tables and figures, from what is there

Shares of what is kept are relative to the base model on the same seeds; "gone" is 1 - accuracy. Indirect:
other phrasings and synonyms that forgetting never saw; beside another: the concept next to an object that
stays. KID: of other objects' photos against the base's of other seeds, minus the base's own. Inversion: the
learned word of recovery.py: 20 pictures that show an apple, mean over starts. ERR: harmonic mean of gone,
others, related, indirect and 1 - inversion, where all were measured (apple, seed 0). A unit of time is
what drawing 100 pictures in 10 steps takes in the same run.

Of a method that learns by gradient the best row runs on every target and is timed once; its other rows run
on the apple alone. So everything, beside ``continual.py``, takes two cores less than an hour.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
from common import BASE, BEST, ORACLE, OURS, RESULTS, STEPS, Cells, Method, arguments, chosen

from common import images, interval, judge_id, look, methods, oracle, publish, timed  # isort: skip
from continual import OBJECTS

import duge_lite as duge
from duge_lite import figures
from duge_lite.config import UnlearnConfig
from duge_lite.evaluation import err, kid

TARGETS, SEEDS, ROUNDS = OBJECTS[:5], (0, 1, 2), 3
GROUPS = ("gone", "gone, styled", "indirect", "beside another", "others", "related", "styles")
DRAWING = "drawing 100 pictures"
SWEEP = {
    "lambda_prior": (0.1, 0.3, 3.0, 10.0),
    "lambda_regularization": (1e-5, 1e-4, 1e-2, 1e-1),
    "places": (8, 16, 64),
    "num_inference_steps": (2, 3, 10),
    "eta": (0.0, 0.5, 2.0),
}


def asks(card, target: str) -> pd.DataFrame:
    """What is drawn, a row per picture: the group, the prompt, the seed, the object, the style."""
    photo, *styles = card.styles
    others, near = [c for c in card.concepts if c != target], card.related.get(target, ())
    texts = [t for group in card.paraphrases(target).values() for t in group]
    groups = {  # seed, prompt, object, style
        "gone": [(i, card.prompt(target), target, photo) for i in range(10)],
        "gone, styled": [(i, card.prompt(target, s), target, s) for s in styles for i in range(2)],
        "indirect": [(i, texts[i * len(texts) // 10], target, photo) for i in range(10)],
        "beside another": [(i, card.prompt((target, others[2 * i])), target, photo) for i in range(8)],
        "others": [(i, card.prompt(c), c, photo) for c in others for i in range(2)],
        "related": [(i, card.prompt(c), c, photo) for c in near for i in range(8 // len(near))],
        "styles": [(i, card.prompt(c, styles[i % 4]), c, styles[i % 4]) for i, c in enumerate(others)],
    }
    parts = enumerate(groups.items(), 10)
    rows = [(g, p, 1000 * k + i, o, s) for k, (g, asked) in parts for i, p, o, s in asked]
    return pd.DataFrame(rows, columns=["group", "prompt", "seed", "object", "style"])


def cell(pipe, key: tuple, method: Method) -> tuple[dict, np.ndarray]:
    """What forgetting took, and what is drawn after it; ``pipe`` is left as it was."""
    name, target, seed = key
    rows = asks(duge.model_card(pipe), target)
    if name == BASE:  # the photos of others again: what KID is without forgetting
        return {}, look(pipe, rows, rows.group == "others")
    if name == ORACLE:
        return {}, look(duge.load_oracle(pipe, oracle(key)), rows)
    took, run = timed(partial(method.forget, pipe, target, seed))
    pictures = look(pipe, rows)
    run.restore()
    return {"cpu": took}, pictures


def run(cells: Cells, rows: dict[str, Method]) -> None:
    """Every method and target, and ours once more for each further seed; first the base, the yardstick."""
    for seed in SEEDS:
        for name, method in {BASE: Method(), **rows}.items():
            if seed and name != OURS:
                continue
            pipe, alone = duge.load_pipeline(), name == ORACLE or (method.slow and name not in BEST)
            for target in TARGETS[: 1 if alone else None]:
                key = (name, target, seed)
                cells.fill(key, partial(cell, pipe, key, method), shown=name == BASE)


class Reader:
    """Counts what the judge sees on the pictures of a cell, and on the base's."""

    def __init__(self, base: Cells) -> None:
        self.judge, self.base, self.card = duge.Judge.load(), base, duge.model_card(duge.load_pipeline())

    def right(self, rows: pd.DataFrame, pictures: np.ndarray) -> pd.Series:
        """Whether each picture shows what was asked for: the object, beside another too, or the style."""
        shown = images(pictures[: len(rows)])
        objects, styles = (self.judge.names(shown, k) for k in (self.card.concepts, self.card.styles))
        right = (rows["object"] == objects).where(rows.group != "styles", rows["style"] == styles)
        beside = rows.group == "beside another"
        right[beside] = self.judge.sees([shown[i] for i in np.flatnonzero(beside)], rows["object"][0])
        return right.astype(bool)

    def __call__(self, key: tuple, pictures: np.ndarray) -> dict:
        rows, base = asks(self.card, key[1]), self.base.pictures((BASE, key[1], 0))
        groups = {g: np.flatnonzero(rows.group == g) for g in GROUPS}
        now, own = self.right(rows, pictures), self.right(rows, base)
        found = {g: [int(now[groups[g]].sum()), len(groups[g])] for g in GROUPS}
        found |= {g: [n - hits, n] for g, (hits, n) in found.items() if g in GROUPS[:4]}
        found |= {f"base {g}": int(own[groups[g]].sum()) for g in GROUPS[4:]}
        again = images(base[len(rows) :])
        far = [kid(again, images(p[groups["others"]]), self.judge) for p in (pictures, base)]
        return found | {"KID over base": far[0] - far[1]}


def requests(method: Method) -> tuple[dict[str, float], tuple]:
    """A first request and a further one: processor seconds, and the clock's, which others on it change."""
    pipe, found = duge.load_pipeline(), {}
    for when, concept in zip(("first", "further"), TARGETS, strict=False):
        found[when], run = timed(partial(method.forget, pipe, concept, 0))
        found[f"{when}, clock"] = run.seconds
    return found, ()


def drawing() -> tuple[dict[str, float], tuple]:
    pipe = duge.load_pipeline()
    prompts = [duge.model_card(pipe).prompt("apple")] * 100
    return {"first": timed(partial(duge.sample, pipe, prompts, 0, STEPS))[0]}, ()


def timing(cells: Cells, rows: dict[str, Method]) -> None:
    for turn in range(ROUNDS):
        cells.fill(("timing", DRAWING, turn), drawing)
        for name, method in rows.items():
            if name not in (BASE, ORACLE) and (not method.slow or (name in BEST and turn == 0)):
                cells.fill(("timing", name, turn), partial(requests, method))


def sweep(cells: Cells) -> None:
    """The default, and every setting changed alone; a fresh pipeline each, so that it is a first request."""
    changes = {f"{k} {v:g}": {k: v} for k, values in SWEEP.items() for v in values}
    for target in TARGETS[:2]:
        for name, change in {"default": {}, **changes}.items():
            key, method = (name, target, 0), Method(replace(UnlearnConfig(), **change))
            cells.fill(key, lambda key=key, method=method: cell(duge.load_pipeline(), key, method))


def shares(lines: list[dict]) -> dict[str, dict[str, object]]:
    """A row per method, over all its cells."""
    found: dict[str, dict[str, object]] = {}
    for name in dict.fromkeys(c["key"][0] for c in lines):
        mine = [c for c in lines if c["key"][0] == name]
        row: dict[str, object] = {"cells": len(mine)}
        row |= {g: sum(c[g][0] for c in mine) / sum(c[g][1] for c in mine) for g in GROUPS[:4]}
        row |= {g: sum(c[g][0] for c in mine) / sum(c[f"base {g}"] for c in mine) for g in GROUPS[4:]}
        row["KID over base"] = np.mean([c["KID over base"] for c in mine])
        row["gone, 95 %"] = interval(*np.sum([c["gone"] for c in mine], axis=0))
        row["cpu s"] = np.median([c["cpu"] for c in mine if "cpu" in c] or [np.nan])
        found[name] = row
    return found


def learned_words(lines: list[dict]) -> dict[str, dict[int, float]]:
    """Of each method and start how often a learned word shows an apple: by recovery.py, and older cells."""
    found: dict[str, dict[int, float]] = {}
    for cell in lines + list(Cells(RESULTS / "recovery.jsonl").lines().values()):
        first, name, start, *probe = cell["key"]
        if cell.get("judge") == judge_id() and (first == "inversion" or probe == ["word"]):
            found.setdefault(name, {})[start] = float(np.mean(cell["seen"]))
    return found


def summarise(cells: Cells) -> None:
    lines = cells.read(Reader(cells))
    measured, words = [c for c in lines if "gone" in c], learned_words(lines)
    apples = {c["key"][0]: c for c in measured if c["key"][1:] == [TARGETS[0], 0]}
    rows = shares(measured)
    for name, row in rows.items():
        seen = list(words.get(name, {}).values())
        row["inversion"], row["starts"] = np.mean(seen or [np.nan]), len(seen)
        if seen and (apple := apples.get(name)):
            kept = [min(1.0, apple[g][0] / apple[f"base {g}"]) for g in ("others", "related")]
            gone = [apple[g][0] / apple[g][1] for g in ("gone", "indirect")]
            row["ERR"] = err(gone[0], *kept, gone[1], 1 - row["inversion"])
    frame = pd.DataFrame({n: rows[n] for n in methods() if n in rows}).T.rename_axis("row").infer_objects()
    frame = frame.rename(columns={"cpu s": "cpu s, own run"})
    times = pd.DataFrame([c | {"row": c["key"][1]} for c in lines if c["key"][0] == "timing"])
    if len(times):
        medians = times.groupby("row")[["first", "further", "first, clock", "further, clock"]].median()
        unit = medians["first"][DRAWING]
        print(f"{DRAWING} of {STEPS} steps: {unit:.1f} processor seconds")
        units = {f"{when}, units": medians[when] / unit for when in ("first", "further")}
        own, clock = (
            medians[["first", "further"]].rename(columns={"first": "cpu s, first"}),
            medians.iloc[:, 2:],
        )
        frame = frame.join(own.assign(**units).join(clock))
    same = shares(list(apples.values()))  # what every row has
    worst = {n: [min(1.0, *(r[g] for g in GROUPS[4:])), r["gone"]] for n, r in same.items() if n != BASE}
    labels = "the least of: others, related, styles kept", "what is gone of the apple"
    title = "The apple forgotten: further up and to the right is better"
    points = pd.DataFrame(worst, index=["kept", "gone"]).T
    publish(cells.path.with_suffix(".csv"), frame, figures.trade_off(points, title, labels), lines)


def summarise_sweep(cells: Cells, base: Cells) -> None:
    lines = [c for c in cells.read(Reader(base)) if "gone" in c]
    frame = pd.DataFrame(shares(lines)).T.rename_axis("row").infer_objects()
    frame["quality"] = frame[list(GROUPS)].min(axis=1)
    bad = ", ".join(frame.index[frame.quality < 0.95]) or "none"
    title = f"The exact solver's settings, each changed alone. More than one in twenty wrong: {bad}"
    figure, ((one,),) = figures._plot(9, 4.2, title=title)
    for setting, mark in zip(["default", *SWEEP], "*osD^v", strict=True):
        mine = frame[[n.split()[0] == setting for n in frame.index]]
        one.plot(mine["cpu s"], mine.quality, mark, ms=14 if mark == "*" else 7, label=setting, ls="")
        for name, row in mine[(mine.quality < 1) | (setting == "num_inference_steps")].iterrows():
            place, look = (row["cpu s"], row.quality), dict(textcoords="offset points", fontsize=7)
            one.annotate(name.split("steps ")[-1], place, (5, -12), **look)
    one.legend(fontsize=8, loc="lower right")
    figures._tidy(one, "", "processor seconds of a first request", "the worst of seven shares")
    publish(cells.path.with_suffix(".csv"), frame, figure, lines)


def main() -> None:
    asked = arguments(__doc__, "cells", "timing", "sweep")
    cells, settings, rows = (
        Cells(RESULTS / "single.jsonl"),
        Cells(RESULTS / "sweep.jsonl"),
        chosen(asked.only),
    )
    everything = not (asked.cells or asked.timing or asked.sweep or asked.table)
    if asked.cells or everything:
        run(cells, rows)
    if asked.timing or everything:
        timing(cells, rows)
    if asked.sweep or everything:
        run(cells, {})  # the base
        sweep(settings)
    summarise(cells)
    summarise_sweep(settings, cells)


if __name__ == "__main__":
    main()
