"""One concept forgotten: five targets, every method, ours with three seeds; what it takes.

    python benchmarks/single.py          # every row; goes on where it stopped; --only UCE: some rows
    python benchmarks/single.py --sweep  # the exact solver's settings, each changed alone (after the rows)
    python benchmarks/single.py --table  # only the table and the figure, from what is there

Shares of what is kept are relative to the base model on the same seeds; "gone" is 1 - accuracy. Indirect:
other phrasings and synonyms that forgetting never saw; beside another: the concept next to an object that
stays. KID: of other objects' photos against the base's of other seeds, minus the base's own. Inversion: the
learned word of recovery.py: 20 pictures that show an apple, mean over starts. ERR: harmonic mean of gone,
others, related, indirect and 1 - inversion, where all were measured (apple, seed 0). A unit of time is
what drawing 100 pictures in 10 steps takes in the same run.

Of a method that learns by gradient the best row runs on every target; other rows run on the apple alone. So
everything, beside ``continual.py``, takes two cores an hour.
"""

from collections.abc import Sequence
from functools import partial
from itertools import cycle, product

import numpy as np
import pandas as pd
from common import BASE, JUDGE, METHODS, ORACLE, OURS, QUICK, STEPS, SWEPT, Cells, Method, arguments

from common import interval, look, timed  # isort: skip
from continual import OBJECTS

import duge_lite as duge
from duge_lite import figures
from duge_lite.evaluation import err, kid

TARGETS = OBJECTS[:5]
GROUPS = ("gone", "gone, styled", "indirect", "beside another", "others", "related", "styles")
DRAWING = "drawing 100 pictures"
SETTINGS = {
    "lambda_prior": (0.1, 0.3, 3.0, 10.0),
    "lambda_regularization": (1e-5, 1e-4, 1e-2, 1e-1),
    "places": (8, 16, 64),
    "num_inference_steps": (2, 3, 10),
    "eta": (0.0, 0.5, 2.0),
}


class Single(Cells):
    methods = METHODS

    def asks(self, target: str) -> pd.DataFrame:
        """What is drawn, a row per picture: the group, the prompt, the seed, the object, the style."""
        card, (photo, *styles) = self.card, self.card.styles
        others, near = [c for c in card.concepts if c != target], card.related.get(target, ())
        texts = [t for group in card.paraphrases(target).values() for t in group]
        groups = {  # seed, prompt, object, style
            "gone": [(i, card.prompt(target), target, photo) for i in range(10)],
            "gone, styled": [(i, card.prompt(target, s), target, s) for s in styles for i in range(2)],
            "indirect": [(i, texts[i * len(texts) // 10], target, photo) for i in range(10)],
            "beside another": [(i, card.prompt((target, others[2 * i])), target, photo) for i in range(8)],
            "others": [(i, card.prompt(c), c, photo) for c in others for i in range(2)],
            "related": [(i, card.prompt(c), c, photo) for c in near for i in range(8 // len(near))],
            "styles": [(i, card.prompt(c, s), c, s) for i, (c, s) in enumerate(zip(others, cycle(styles)))],
        }
        parts = enumerate(groups.items(), 10)
        rows = [(g, p, 1000 * k + i, o, s) for k, (g, asked) in parts for i, p, o, s in asked]
        return pd.DataFrame(rows, columns=["group", "prompt", "seed", "object", "style"])

    def cell(self, name: str, target: str, seed: int) -> tuple[dict, np.ndarray]:
        if name == "timing":
            return self.requests(target), ()
        rows = self.asks(target)
        if name == BASE:  # the photos of others again: what KID is without forgetting
            return {}, look(self.pipe, rows, rows.group == "others")
        if name == ORACLE:
            return {}, look(duge.load_oracle(self.pipe, target), rows)
        took, run = timed(partial(self.methods[name].forget, self.pipe, target, seed))
        pictures = look(self.pipe, rows)
        run.restore()
        return {"cpu": took}, pictures

    def run(self, names: Sequence[str]) -> None:
        """First the base, the yardstick; then every method and target, ours with three seeds; and times."""
        for name, seed in [*product((BASE, *names), (0,)), *product({OURS} & {*names}, (1, 2))]:
            alone = name == ORACLE or (METHODS[name].slow and name in SWEPT)
            self.pipe = duge.load_pipeline()
            for target in TARGETS[: 1 if alone else None]:
                self.fill((name, target, seed), shown=name == BASE)
        # in turns; what a method costs that trains, its own runs say
        for turn, name in product(range(3), [DRAWING, *(n for n in QUICK if n in names)]):
            self.fill(("timing", name, turn))

    def requests(self, name: str) -> dict[str, float]:
        """Of a fresh pipeline a first and a further request: processor seconds, and those of the clock."""
        pipe, found = duge.load_pipeline(), {}
        if name == DRAWING:
            return {"first": timed(partial(duge.sample, pipe, ["a photo of an apple"] * 100, 0, STEPS))[0]}
        for when, concept in zip(("first", "further"), TARGETS, strict=False):
            found[when], run = timed(partial(METHODS[name].forget, pipe, concept, 0))
            found[f"{when}, clock"] = run.seconds
        return found

    def right(self, rows: pd.DataFrame, pictures: np.ndarray) -> pd.Series:
        """Whether each picture shows what was asked for: the object, beside another too, or the style."""
        shown = pictures[: len(rows)]
        objects, styles = (self.judge.names(shown, k) for k in (self.card.concepts, self.card.styles))
        right = (rows["object"] == objects).where(rows.group != "styles", rows["style"] == styles)
        beside = rows.group == "beside another"
        right[beside] = self.judge.sees(shown[beside], rows["object"][0])
        return right.astype(bool)

    def measure(self, key: tuple, pictures: np.ndarray) -> dict:
        """Counts on the pictures, and on the base's."""
        rows, base = self.asks(key[1]), self.base.pictures((BASE, key[1], 0))
        groups = {g: np.flatnonzero(rows.group == g) for g in GROUPS}
        now, own = self.right(rows, pictures), self.right(rows, base)
        found = {g: [int(now[places].sum()), len(places)] for g, places in groups.items()}
        found |= {g: [n - hits, n] for g, (hits, n) in found.items() if g in GROUPS[:4]}
        found |= {f"base {g}": int(own[groups[g]].sum()) for g in GROUPS[4:]}
        far = [kid(base[len(rows) :], p[groups["others"]], self.judge) for p in (pictures, base)]
        return found | {"KID over base": far[0] - far[1]}

    def summarise(self) -> None:
        self.base = Cells("single")
        lines = self.read()
        measured, words = [c for c in lines if "gone" in c], {}  # row -> start -> share
        for cell in [*lines, *Cells("recovery").lines().values()]:  # and cells from before recovery.py
            first, name, start, *probe = cell["key"]
            if cell.get("judge") == JUDGE and (first == "inversion" or probe == ["word"]):
                words.setdefault(name, {})[start] = float(np.mean(cell["seen"]))
        apples = {c["key"][0]: c for c in measured if c["key"][1:] == [TARGETS[0], 0]}
        rows = shares(measured)
        for name, row in rows.items():
            seen = list(words.get(name, {}).values())
            row["inversion"], row["starts"] = np.mean(seen or [np.nan]), len(seen)
            if seen and (apple := apples.get(name)):
                kept = [min(1.0, apple[g][0] / apple[f"base {g}"]) for g in ("others", "related")]
                gone = [apple[g][0] / apple[g][1] for g in ("gone", "indirect")]
                row["ERR"] = err(gone[0], *kept, gone[1], 1 - row["inversion"])
        table = pd.DataFrame({n: rows[n] for n in METHODS if n in rows}).T.rename_axis("row").infer_objects()
        table = table.rename(columns={"cpu s": "cpu s, own run"})
        if times := [c | {"row": c["key"][1]} for c in lines if c["key"][0] == "timing"]:
            columns = ["first", "further", "first, clock", "further, clock"]
            medians = pd.DataFrame(times).groupby("row")[columns].median()
            unit = medians["first"][DRAWING]
            print(f"{DRAWING} of {STEPS} steps: {unit:.1f} processor seconds")
            for k, when in enumerate(columns[:2]):
                medians.insert(2 + k, f"{when}, units", medians[when] / unit)
            table = table.join(medians.rename(columns={"first": "cpu s, first"}))
        same = shares(list(apples.values()))  # what every row has
        worst = {n: [min(1.0, *(r[g] for g in GROUPS[4:])), r["gone"]] for n, r in same.items() if n != BASE}
        labels = "the least of: others, related, styles kept", "what is gone of the apple"
        title = "The apple forgotten: further up and to the right is better"
        points = pd.DataFrame(worst, index=["kept", "gone"]).T
        self.publish(table, figures.trade_off(points, title, labels), lines)


def shares(lines: list[dict]) -> dict[str, dict[str, object]]:
    """A row per method, over all its cells."""
    found: dict[str, dict[str, object]] = {}
    for name in dict.fromkeys(c["key"][0] for c in lines):
        mine = [c for c in lines if c["key"][0] == name]
        found[name] = row = {"cells": len(mine)}
        row |= {g: sum(c[g][0] for c in mine) / sum(c[g][1] for c in mine) for g in GROUPS[:4]}
        row |= {g: sum(c[g][0] for c in mine) / sum(c[f"base {g}"] for c in mine) for g in GROUPS[4:]}
        row["KID over base"] = np.mean([c["KID over base"] for c in mine])
        row["gone, 95 %"] = interval(*np.sum([c["gone"] for c in mine], axis=0))
        row["cpu s"] = np.median([c["cpu"] for c in mine if "cpu" in c] or [np.nan])
    return found


class Sweep(Single):
    """The exact solver's default, and every setting changed alone; a fresh pipeline each."""

    changes = {"default": {}} | {f"{k} {v:g}": {k: v} for k, values in SETTINGS.items() for v in values}
    methods = {name: Method(config=duge.UnlearnConfig(**change)) for name, change in changes.items()}

    def run(self, _: Sequence[str]) -> None:
        for target, name in product(TARGETS[:2], self.methods):
            self.pipe = duge.load_pipeline()
            self.fill((name, target, 0))

    def summarise(self) -> None:
        self.base = Cells("single")
        lines = [c for c in self.read() if "gone" in c]
        table = pd.DataFrame(shares(lines)).T.rename_axis("row").infer_objects()
        table["quality"] = table[list(GROUPS)].min(axis=1)
        bad = ", ".join(table.index[table.quality < 0.95]) or "none"
        title = f"The exact solver's settings, each changed alone. More than one in twenty wrong: {bad}"
        figure, ((one,),) = figures.canvas(9, 4.2, title=title)
        for setting, mark in zip(["default", *SETTINGS], "*osD^v", strict=True):
            mine = table[[n.split()[0] == setting for n in table.index]]
            one.plot(mine["cpu s"], mine.quality, mark, ms=14 if mark == "*" else 7, label=setting, ls="")
            for name, row in mine[(mine.quality < 1) | (setting == "num_inference_steps")].iterrows():
                place, look = (row["cpu s"], row.quality), dict(textcoords="offset points", fontsize=7)
                one.annotate(name.split("steps ")[-1], place, (5, -12), **look)
        one.legend(fontsize=8, loc="lower right")
        figures.tidy(one, "", "processor seconds of a first request", "the worst of seven shares")
        self.publish(table, figure, lines)


if __name__ == "__main__":
    asked = arguments(__doc__, "sweep")
    cells = Sweep("sweep") if asked.sweep else Single("single")
    if not asked.table:
        cells.run(asked.rows)
    cells.summarise()
