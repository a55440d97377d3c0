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
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from common import BASE, BEST, ORACLE, RESULTS, STEPS, Cells, Method, judge_id

from common import chosen, cpu, draw, images, interval, methods, table  # isort: skip

import duge_lite as duge
from duge_lite import figures
from duge_lite.concepts import UnlearnConfig
from duge_lite.evaluation import err, kid
from duge_lite.unlearning import UnlearningRun

TARGETS = ("apple", "umbrella", "car", "sunglasses", "broccoli")
SEEDS = (0, 1, 2)
GROUPS = ("gone", "gone, styled", "indirect", "beside another", "others", "related", "styles")


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


def look(pipe, target: str, again: bool = False) -> np.ndarray:
    """``again``: the photos of others once more, from other noise, at the end."""
    rows = asks(duge.model_card(pipe), target)
    if again:
        other = rows[rows.group == "others"]
        rows = pd.concat([rows, other.assign(seed=other.seed + 100_000)])
    return draw(pipe, list(rows.prompt), rows.seed)


def run(cells: Cells, rows: dict[str, Method], targets: list[str], seeds: list[int]) -> None:
    for target in targets:  # the yardstick of all others
        if not cells.file((BASE, target, 0)).exists():
            cells.add((BASE, target, 0), {}, look(duge.load_pipeline(), target, again=True))
    for seed in seeds:  # a full round of methods and targets before the next seed
        for name, method in rows.items():
            pipe = duge.load_pipeline()
            for target in targets:
                once = method.slow or method.config is None  # too slow for other seeds, or draws no lots
                elsewhere = method.slow and name not in BEST and target != TARGETS[0]
                if name == BASE or (name, target, seed) in cells or (seed and once) or elsewhere:
                    continue
                started, cost = time.perf_counter(), {}
                if name == ORACLE:
                    if not (duge.data_dir() / f"doodle-oracle-{target.replace(' ', '-')}").is_dir():
                        continue
                    pictures = look(duge.load_oracle(pipe, target), target)
                else:
                    began = time.process_time()
                    run = method.forget(pipe, target, seed)
                    cost["cpu"] = time.process_time() - began  # a busy machine: see timing()
                    pictures = look(pipe, target)
                    run.restore()
                cells.add((name, target, seed), cost, pictures)
                print(f"{name}, {target}, {seed}: {time.perf_counter() - started:.0f} s", flush=True)


class Reader:
    """Counts what the judge sees on the pictures of a cell, and on the base's."""

    def __init__(self, cells: Cells) -> None:
        self.judge, self.cells = duge.Judge.load(), cells
        self.card, self.known = duge.model_card(duge.load_pipeline()), {}

    def right(self, rows: pd.DataFrame, pictures: np.ndarray) -> pd.Series:
        """Whether each picture shows what was asked for: the object, beside another too, or the style."""
        shown = images(pictures[: len(rows)])
        objects, styles = (self.judge.names(shown, k) for k in (self.card.concepts, self.card.styles))
        right = (rows["object"] == objects).where(rows.group != "styles", rows["style"] == styles)
        beside = rows.group == "beside another"
        seen = self.judge.sees([shown[i] for i in np.flatnonzero(beside)], rows["object"][0])
        right[beside] = seen
        return right.astype(bool)

    def base(self, target: str) -> tuple[pd.DataFrame, np.ndarray, pd.Series]:
        if target not in self.known:
            pictures, rows = np.load(self.cells.file((BASE, target, 0)))["pictures"], asks(self.card, target)
            self.known[target] = (rows, pictures, self.right(rows, pictures))
        return self.known[target]

    def __call__(self, key: tuple, pictures: np.ndarray) -> dict:
        name, target = key[:2]
        if name == "inversion":
            return {"seen": float(self.judge.sees(images(pictures), "apple").mean())}
        rows, base, own = self.base(target)
        now = self.right(rows, pictures)
        counts = {g: [int(now[rows.group == g].sum()), int((rows.group == g).sum())] for g in GROUPS}
        counts |= {g: [n - hits, n] for g, (hits, n) in counts.items() if g in GROUPS[:4]}
        shares = {f"base {g}": int(own[rows.group == g].sum()) for g in GROUPS[4:]}
        other, again = (rows.group == "others").to_numpy(), base[len(rows) :]
        far = [kid(images(again), images(p[: len(rows)][other]), self.judge) for p in (pictures, base)]
        return counts | shares | {"KID over base": far[0] - far[1]}


# ---------------------------------------------------------------------------- time


def request(method: Method, pipe, target: str, when: str) -> dict[str, float]:
    """Processor seconds, and those of the clock, which depend on what else the machine does."""
    runs: list[UnlearningRun] = []
    took = cpu(lambda: runs.append(method.forget(pipe, target, 0)))
    return {when: took, f"{when}, clock": runs[0].seconds}


def timing(cells: Cells, rows: dict[str, Method], rounds: int) -> None:
    """A fresh pipeline, a first request and a further one; all methods in turns, and 100 pictures.

    What takes minutes is timed once, and only the row of each method that is best.
    """
    for turn in range(rounds):
        for name, method in {"drawing 100 pictures": None, **rows}.items():
            key, slow = ("timing", name, turn), method is not None and method.slow
            if key in cells or name in (BASE, ORACLE) or (slow and (turn or name not in BEST)):
                continue
            pipe = duge.load_pipeline()
            if method is None:
                prompts = [duge.model_card(pipe).prompt("apple")] * 100
                cells.add(key, {"first": cpu(partial(duge.sample, pipe, prompts, 0, STEPS))})
                continue
            pair = {}
            for when, concept in zip(("first", "further"), TARGETS, strict=False):
                pair |= request(method, pipe, concept, when)
            cells.add(key, pair)
            print(f"{key}: {pair}", flush=True)


SWEEP = {
    "lambda_prior": (0.1, 0.3, 3.0, 10.0),
    "lambda_regularization": (1e-5, 1e-4, 1e-2, 1e-1),
    "places": (8, 16, 64),
    "num_inference_steps": (2, 3, 10),
    "eta": (0.0, 0.5, 2.0),
}


def swept() -> dict[str, Method]:
    """The default, and every setting changed alone."""
    rows = {"default": Method(UnlearnConfig())}
    changes = [(k, v) for k, values in SWEEP.items() for v in values]
    return rows | {f"{k} {v:g}": Method(replace(UnlearnConfig(), **{k: v})) for k, v in changes}


def sweep(cells: Cells) -> None:
    for target in TARGETS[:2]:
        for name, method in swept().items():
            pipe, key = duge.load_pipeline(), (name, target, 0)
            if key in cells:
                continue
            took = cpu(partial(method.forget, pipe, target, 0))
            cells.add(key, {"cpu": took}, look(pipe, target))
            print(f"sweep, {key}: {took:.1f} s", flush=True)


def rows_of(lines: list[dict]) -> dict[str, dict[str, object]]:
    """A row per method: shares over all its cells."""
    found: dict[str, dict[str, object]] = {}
    for name in dict.fromkeys(c["key"][0] for c in lines):
        mine = [c for c in lines if c["key"][0] == name]
        row: dict[str, object] = {"cells": len(mine)}
        row |= {g: sum(c[g][0] for c in mine) / sum(c[g][1] for c in mine) for g in GROUPS[:4]}
        row |= {g: sum(c[g][0] for c in mine) / sum(c[f"base {g}"] for c in mine) for g in GROUPS[4:]}
        row["KID over base"] = np.mean([c["KID over base"] for c in mine])
        row["gone, 95 %"] = interval(*np.sum([c["gone"] for c in mine], axis=0))
        found[name] = row
    return found


def learned_words(lines: list[dict]) -> dict[str, dict[int, float]]:
    """Of each method and start how often a learned word shows an apple: by recovery.py, and older cells."""
    found: dict[str, dict[int, float]] = {}
    for cell in lines + list(Cells(RESULTS / "recovery.jsonl").lines().values()):
        key = cell["key"]
        if "seen" in cell and cell["judge"] == judge_id():
            if key[0] == "inversion":
                found.setdefault(key[1], {})[key[2]] = cell["seen"]
            elif key[0] == "apple" and key[3] == "word":
                found.setdefault(key[1], {})[key[2]] = float(np.mean(cell["seen"]))
    return found


def summarise(cells: Cells) -> None:
    lines = cells.read(Reader(cells))
    measured, words = [c for c in lines if "gone" in c], learned_words(lines)
    rows = rows_of(measured)
    for name, row in rows.items():
        took = [c["cpu"] for c in measured if c["key"][0] == name and "cpu" in c]
        row["cpu s, own run"] = np.median(took or [np.nan])
        seen = list(words.get(name, {}).values())
        row["inversion"], row["starts"] = (np.mean(seen), len(seen)) if seen else (np.nan, 0)
        apple = next((c for c in measured if c["key"] == [name, "apple", 0]), None)
        if seen and apple:
            kept = [min(1.0, apple[g][0] / apple[f"base {g}"]) for g in ("others", "related")]
            gone = [apple[g][0] / apple[g][1] for g in ("gone", "indirect")]
            row["ERR"] = err(gone[0], *kept, gone[1], 1 - row["inversion"])
    times = pd.DataFrame([c | {"row": c["key"][1]} for c in lines if c["key"][0] == "timing"])
    if len(times):
        clock = [c for c in ("first, clock", "further, clock") if c in times]
        medians = times.groupby("row")[["first", "further", *clock]].median()
        unit = medians["first"]["drawing 100 pictures"]
        for name, row in rows.items():
            if name in medians.index:
                a, b, *seconds = medians.loc[name]
                row |= {"cpu s, first": a, "further": b, "first, units": a / unit, "further, units": b / unit}
                row |= dict(zip(clock, seconds, strict=True))
        print(f"drawing 100 pictures of {STEPS} steps: {unit:.1f} processor seconds")
    if not rows:
        return
    order = [n for n in methods() if n in rows]
    frame = pd.DataFrame({n: rows[n] for n in order}).T.rename_axis("row").infer_objects()
    table(frame, cells.path.with_suffix(".csv"))
    same = rows_of([c for c in measured if c["key"][1:] == [TARGETS[0], 0]])  # what every row has
    worst = {n: [min(1.0, r["others"], r["related"], r["styles"]), r["gone"]] for n, r in same.items()}
    points = pd.DataFrame(worst, index=["kept", "gone"]).T.drop(BASE, errors="ignore")
    labels = "the least of: others, related, styles kept", "what is gone of the apple"
    figure = figures.trade_off(points, "The apple forgotten: further up and to the right is better", labels)
    cells.path.with_suffix(".png").write_bytes(figure.png())


def summarise_sweep(cells: Cells, base: Cells) -> None:
    lines = [c for c in cells.read(Reader(base)) if "gone" in c]
    if not lines:
        return
    rows = rows_of(lines)
    for name, row in rows.items():
        row["cpu s"] = np.median([c["cpu"] for c in lines if c["key"][0] == name])
        row["quality"] = min(row[g] for g in GROUPS)
    frame = pd.DataFrame(rows).T.rename_axis("row").infer_objects()
    table(frame, cells.path.with_suffix(".csv"))
    points = frame[["cpu s", "quality"]].astype(float)
    bad = ", ".join(points.index[points.quality < 0.95]) or "none"
    title = f"The exact solver's settings, each changed alone. More than one in twenty wrong: {bad}"
    figure, ((one,),) = figures._plot(9, 4.2, title=title)
    marks = dict(zip(["default", *SWEEP], "*osD^v", strict=True))
    for setting, mark in marks.items():
        mine = points[[n.split()[0] == setting for n in points.index]]
        one.plot(mine["cpu s"], mine.quality, mark, ms=14 if mark == "*" else 7, label=setting, ls="")
        for name, (x, y) in mine[(mine.quality < 1) | (mine.index.str.contains("steps"))].iterrows():
            one.annotate(name.split("steps ")[-1], (x, y), (5, -12), textcoords="offset points", fontsize=7)
    one.legend(fontsize=8, loc="lower right")
    labels = "processor seconds of a first request", "the worst of seven shares"
    figures._tidy(one, "", *labels)
    cells.path.with_suffix(".png").write_bytes(figure.png())


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", help="rows, or how their names begin")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--rounds", type=int, default=3, help="of the timing")
    for part in ("cells", "timing", "sweep", "table", "no-table"):
        parser.add_argument(f"--{part}", action="store_true")
    args = parser.parse_args(words)
    cells, settings, rows = Cells(RESULTS / "single.jsonl"), Cells(RESULTS / "sweep.jsonl"), chosen(args.only)
    everything = not (args.cells or args.timing or args.sweep or args.table)
    if args.cells or everything:
        run(cells, rows, args.targets, args.seeds)
    if args.timing or everything:
        timing(cells, rows, args.rounds)
    if args.sweep or everything:
        run(cells, {}, list(TARGETS[:2]), [0])
        sweep(settings)
    if not args.no_table:
        summarise(cells)
        summarise_sweep(settings, cells)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
