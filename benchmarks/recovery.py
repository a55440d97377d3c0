"""What brings a forgotten concept back, and what else broke.

    python benchmarks/recovery.py                     # the apple; goes on where it stopped
    python benchmarks/recovery.py --only ours oracle  # these methods, in this order
    python benchmarks/recovery.py --targets car       # another object (only the apple has an oracle)
    python benchmarks/recovery.py --slow              # twelve requests of gradient methods, too
    python benchmarks/recovery.py --table             # only the tables and the figures, from what is there

A turn forgets with another seed, where the method draws lots, and starts every attack elsewhere. Shares: of
pictures in which the judge sees the concept, with Wilson's interval over the pictures of all turns; pictures
of one learned word, or of one relearned model, depend on each other, so there it is too narrow. Read each row
beside the oracle, which never saw the concept. Attacks that need pictures bring drawings of the program.
"After twelve": the requests of ``continual.py``, in turn; there the oracle never saw any of the twelve.

What else broke: of two objects that stay in one picture, both found; of an object that stays, on a background
that the prompt names, both right; how narrowly words look (0 evenly everywhere, 1 at one place), and how that
differs from the base; correlation of each object's loss of accuracy with its similarity to what went (cosines
of the words in CLIP's text encoder, and of the judge's features of the base's pictures, less their mean).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import BASE, GRADIENT, ORACLE, OURS, RESULTS, STEPS, Cells, chosen, draw, images, interval, table
from continual import TWELVE, forget_all
from diffusers import StableDiffusionPipeline

import duge_lite as duge
from duge_lite import attacks, figures
from duge_lite.doodles import BACKGROUNDS, captions
from duge_lite.evaluation import wilson_interval
from duge_lite.models import Pictures

METHODS = (BASE, OURS, GRADIENT, "UCE", "UCE, styled, ridge 0.01", "ESD-x", ORACLE)
METHODS += ("concept ablation, nearest",)
GROUNDS = list(BACKGROUNDS)
AFTER, GAIN = "after twelve: ", "classifier: gain of the name"
COUNT = 10  # pictures of most probes, a turn
DRAWN = ("asked by", "completion, 4", "noised to 0.7", "half", "its noise", "learned", "words", "relearned")


@dataclass(frozen=True)
class Attacked:
    """A model under attack; ``turn`` moves every start."""

    pipe: StableDiffusionPipeline
    base: StableDiffusionPipeline
    target: str
    turn: int

    @cached_property
    def card(self) -> duge.ModelCard:
        return duge.model_card(self.base)

    def drawn(self, names: Sequence[str], count: int, seed: int) -> Pictures:
        """The program's drawings of ``names`` in turn, in all styles: what an attacker brings along."""
        names = [names[i % len(names)] for i in range(count)]
        made = [
            duge.doodles.draw(n, self.card.styles[i % 5], GROUNDS[i % 6], seed + i)
            for i, n in enumerate(names)
        ]
        return attacks.encode_pictures(
            self.base, made, [self.card.prompts(n)[i % 5] for i, n in enumerate(names)]
        )

    def asked(self, prompts: Sequence[str], seed: int, count: int = COUNT) -> np.ndarray:
        first = seed + 1000 * self.turn
        return draw(self.pipe, [prompts[i % len(prompts)] for i in range(count)], range(first, first + count))


Found = Iterator[tuple[str, dict, np.ndarray | None]]  # rows of the table: name, numbers, pictures


def by_name(a: Attacked) -> Found:
    yield "asked by its name", {}, a.asked(a.card.prompts(a.target), 30_000)
    texts = [text for group in a.card.paraphrases(a.target).values() for text in group]
    yield "other phrasings, a synonym", {}, a.asked(texts[::-1], 35_000)


def unguided(a: Attacked) -> Found:
    """Probes that learn nothing; drawn under autocast, as all pictures that are judged."""
    given = a.drawn([a.target], COUNT, 40_000 + 1000 * a.turn)
    seed, judge = 50_000 + 1000 * a.turn, duge.Judge.load()
    with torch.autocast(a.pipe.device.type, torch.bfloat16):
        how = {"images": COUNT, "num_inference_steps": STEPS, "seed": seed, "judge": judge}
        for group, part in attacks.completion(a.pipe, a.target, a.base, **how).groupby("group"):
            yield f"completion, {group}", {}, stacked(part)
        how = {"num_inference_steps": STEPS, "seed": seed, "judge": judge}
        for at in (0.5, 0.7, 0.9):
            found = attacks.redrawing(a.pipe, a.target, given, at, **how)
            yield f"noised to {at:g}, told nothing", {}, stacked(found)
        yield (
            "half given, told nothing",
            {},
            stacked(attacks.redrawing(a.pipe, a.target, given, half=True, **how)),
        )
        found = attacks.noise_inversion(a.pipe, a.target, given, judge=judge)
        yield "its noise found (DDIM)", {"error": found.error.round(4).tolist()}, stacked(found)


def stacked(frame: pd.DataFrame) -> np.ndarray:
    return np.stack([np.asarray(p) for p in frame.picture])


def told(a: Attacked) -> Found:
    held_out = a.drawn([a.target], 30, 20_000)
    gain = attacks.name_gain(a.pipe, a.target, held_out, count=48, seed=a.turn)
    yield GAIN, {"gain": gain[["gain", "low", "high"]].round(4).tolist()}, None


def word(a: Attacked, row: str = "learned word") -> Found:
    for state in attacks.invert_steps(a.pipe, a.target, a.drawn([a.target], 30, 10_000), seed=a.turn):
        vector = state.vector
    with attacks.new_word(a.pipe, vector) as new:
        text = f"{captions.nameless()} of {captions.with_article(new)}"
        yield row, {}, draw(a.pipe, [text] * 20, range(20_000, 20_020))


def search(a: Attacked) -> Found:
    for state in attacks.search_steps(a.pipe, a.target, a.drawn([a.target], 30, 10_000), seed=a.turn):
        words = state.words
    text = f"{captions.nameless()} of {words}"
    yield "words of the vocabulary, sought", {"words": words}, a.asked([text], 60_000)


def relearned(a: Attacked, prefix: str = "") -> Found:
    others = [c for c in a.card.concepts if c != a.target and (not prefix or c not in TWELVE)]
    for what, names, at in (("it", [a.target], (10, 40)), ("others", others, (40,))):
        pictures = a.drawn(names, 30, 10_000)
        for state in attacks.relearn_steps(a.pipe, pictures, 40, seed=a.turn):
            if state.step in at:
                row = f"{prefix}relearned on {what}, {state.step} steps"
                yield row, {}, a.asked(a.card.prompts(a.target), 70_000)


def after_twelve(a: Attacked) -> Found:
    yield f"{AFTER}asked by its name", {}, a.asked(a.card.prompts(a.target), 30_000)
    yield from word(a, f"{AFTER}learned word")
    yield from relearned(a, AFTER)


# ---------------------------------------------------------------------------- what else broke


def bystanders(card, target: str) -> pd.DataFrame:
    """What is drawn of what stays, a row per picture: the group, the prompt, two labels, the seed."""
    kept = [c for c in card.concepts if c != target]
    rows = [("two objects", c, kept[(i + 7) % len(kept)], 0) for i, c in enumerate(kept)]
    rows += [("on a background", c, f"{GROUNDS[i % 6]} background", i // 19) for i, c in enumerate(kept * 2)]
    rows += [("alone", c, c, k) for c in kept for k in range(5)]
    frame = pd.DataFrame(rows, columns=["group", "object", "other", "seed"])
    two, ground = frame.group == "two objects", frame.group == "on a background"
    frame["prompt"] = [card.prompt(c) for c in frame["object"]]
    frame.loc[two, "prompt"] = [
        card.prompt(p) for p in zip(frame["object"][two], frame.other[two], strict=True)
    ]
    frame.loc[ground, "prompt"] += " on a " + frame.other[ground]
    return frame.assign(seed=frame.seed + 80_000 + 100 * frame.groupby("group").ngroup())


def elsewhere(a: Attacked) -> Found:
    rows = bystanders(a.card, a.target)
    narrow = {}
    for what, names in (
        ("it", [a.target] * 4),
        ("others", [c for c in a.card.concepts if c != a.target][::4]),
    ):
        maps = [duge.trace(a.pipe, a.card.prompt(c), i, STEPS) for i, c in enumerate(names)]
        narrow[what] = [round(float(m.concentration(c).mean()), 4) for m, c in zip(maps, names, strict=True)]
    yield "bystanders", {"concentration": narrow}, draw(a.pipe, list(rows.prompt), rows.seed)


PROBES: dict[str, Callable[[Attacked], Found]] = {
    "name": by_name, "no words": unguided, "gain": told, "word": word, "search": search, "relearn": relearned,
    "elsewhere": elsewhere,
}  # fmt: skip


# ---------------------------------------------------------------------------- running, reading


def model(base, name: str, method, target: str, turn: int):
    """A pipeline that forgot the target; None where there is no such oracle."""
    if name == BASE:
        return base
    if name == ORACLE:
        there = (duge.data_dir() / f"doodle-oracle-{target.replace(' ', '-')}").is_dir()
        return duge.load_oracle(base, target) if there else None
    pipe = duge.load_pipeline()
    method.forget(pipe, target, turn)
    return pipe


def attack(cells: Cells, key: tuple, probe: Callable[[Attacked], Found], attacked: Attacked) -> None:
    began, rows, numbers, pictures = time.process_time(), [], {}, []
    for row, found, drawn in probe(attacked):
        numbers |= {k: found[k] for k in found}
        rows.append([row, 0 if drawn is None else len(drawn)])
        pictures += [] if drawn is None else [drawn]
    took = round(time.process_time() - began, 1)
    shown = np.concatenate(pictures) if pictures else None
    cells.add(key, {"rows": rows, "cpu": took, **numbers}, shown)
    print(f"{key}: {took} processor seconds", flush=True)


def run(cells: Cells, only: Sequence[str] | None, targets: Sequence[str], turns: int, slow: bool) -> None:
    base, methods = duge.load_pipeline(), chosen(only or METHODS)
    for target in targets:
        for turn in range(turns):
            for name, method in methods.items():
                left = [p for p in PROBES if (target, name, turn, p) not in cells]
                left = [p for p in left if p != "elsewhere" or turn == 0]
                if left and (pipe := model(base, name, method, target, turn)):
                    for probe in left:
                        key = (target, name, turn, probe)
                        attack(cells, key, PROBES[probe], Attacked(pipe, base, target, turn))
        for name, method in methods.items():
            key = (target, name, 0, "after twelve")
            if key in cells or target not in TWELVE or name == BASE or (method.slow and not slow):
                continue
            pipe = duge.load_pipeline()
            if name == ORACLE:
                pipe = duge.load_oracle(base, "final")
            else:
                forget_all(pipe, "", method, "12 requests", 0)
            attack(cells, key, after_twelve, Attacked(pipe, base, target, 0))


class Reader:
    """What the judge says of every picture of a cell: 1 where it sees the target, or what was asked for."""

    def __init__(self) -> None:
        self.judge, self.card = duge.Judge.load(), duge.model_card(duge.load_pipeline())

    def __call__(self, key: tuple, pictures: np.ndarray) -> dict:
        shown, target = images(pictures), key[0]
        if key[3] != "elsewhere":
            return {"seen": self.judge.sees(shown, target).astype(int).tolist()}
        rows = bystanders(self.card, target)
        first = np.array(self.judge.names(shown, self.card.concepts)) == rows["object"]
        grounds = np.array(self.judge.names(shown, [f"{g} background" for g in GROUNDS])) == rows.other
        seen = self.judge.scores(shown) > (self.judge.threshold or 0.0)
        both = [
            seen[a][i] and seen[b][i] for i, (a, b) in enumerate(zip(rows["object"], rows.other, strict=True))
        ]
        right = first.where(rows.group != "two objects", both).where(
            rows.group != "on a background", first & grounds
        )
        return {"right": right.astype(int).tolist()}


def brought_back(lines: list[dict], target: str, path: Path) -> None:
    """The table of what brings it back, and its figure."""
    order = [*PROBES, "after twelve"]
    lines = sorted(lines, key=lambda c: order.index(c["key"][3]))
    names = sorted({c["key"][1] for c in lines}, key=lambda n: METHODS.index(n) if n in METHODS else 99)
    hits: dict[tuple[str, str], list[int]] = {}
    for cell in lines:
        seen = iter(cell.get("seen", ()))
        for row, count in cell["rows"]:
            hits.setdefault((row, cell["key"][1]), []).extend(islice(seen, count))
    shares = {pair: (sum(seen), len(seen)) for pair, seen in hits.items() if seen}
    rows = {row: {n: interval(*shares[row, n]) for n in names if (row, n) in shares} for row, _ in hits}
    for name in names:
        mine = [c for c in lines if c["key"][1] == name]
        if gains := [c["gain"] for c in mine if "gain" in c]:
            rows[GAIN][name] = "{:+.2f} ({:+.2f} to {:+.2f})".format(*np.mean(gains, axis=0))
        if errors := [e for c in mine for e in c.get("error", ())]:
            row = rows.setdefault("its noise found: error of the picture", {})
            row[name] = f"{np.mean(errors):.3f} (at most {max(errors):.3f}, n={len(errors)})"
    table(pd.DataFrame(rows).T[names].fillna(""), path)
    shown = {p: (h / n, *wilson_interval(h, n)) for p, (h, n) in shares.items()}
    frame = pd.DataFrame(shown, index=["seen", "low", "high"]).T
    frame = frame.loc[[(r, n) for r in rows for n in names if (r, n) in shown and r.startswith(DRAWN)]]
    title = f"What brings the {target} back: each row beside the oracle"
    path.with_suffix(".png").write_bytes(figures.attack_summary(frame, title).png())


def what_broke(cells: Cells, lines: list[dict], target: str, reader: Reader, path: Path) -> None:
    """Composition, concentration, and damage over similarity; with its figure."""
    mine = {c["key"][1]: c for c in lines if c["key"][3] == "elsewhere"}
    if BASE not in mine:
        return
    rows, base, pipe = bystanders(reader.card, target), mine[BASE], duge.load_pipeline()
    kept = list(dict.fromkeys(rows["object"]))
    near = similarity(cells, rows, pipe, reader, target, kept)
    alone, table_rows, losses = rows.group == "alone", {}, {}
    was = pd.Series(base["right"])[alone].groupby(rows["object"]).mean()
    for name in [n for n in METHODS if n in mine] + [n for n in mine if n not in METHODS]:
        right = pd.Series(mine[name]["right"])
        row = {
            g: interval(right[rows.group == g].sum(), (rows.group == g).sum()) for g in rows.group.unique()
        }
        for what in ("it", "others"):
            now, then = (np.array(c["concentration"][what]) for c in (mine[name], base))
            row[f"concentration, {what}"] = f"{now.mean():.3f} ({(now - then).mean():+.3f}, n={len(now)})"
        loss = (was - right[alone].groupby(rows["object"]).mean())[kept]
        for what in near:
            row[f"loss ~ {what}"] = loss.corr(near[what]) if loss.std() > 0 else np.nan
        table_rows[name], losses[name] = row, loss
    table(pd.DataFrame(table_rows).T.rename_axis("row"), path)
    figure, (both,) = figures._plot(9, 4, 1, 2, "What was lost, over its likeness to what went", sharey=True)
    for axes, what in zip(both, near, strict=True):
        for (name, loss), mark in zip(losses.items(), "ov^sDP*", strict=False):
            if name != BASE:
                axes.plot(near[what], loss, mark, label=name, alpha=0.6, ls="")
        figures._tidy(axes, "", f"similarity of {what}", "loss of accuracy", "y")
    both[0].legend(fontsize=7)
    path.with_suffix(".png").write_bytes(figure.png())


def similarity(cells: Cells, rows: pd.DataFrame, pipe, reader: Reader, target: str, kept: list[str]) -> dict:
    """Of every kept object to what went: {"words": Series, "pictures": Series}, cosines."""
    texts = pipe.tokenizer(
        [reader.card.prompt(c) for c in (target, *kept)], padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        words = pipe.text_encoder(texts.input_ids).pooler_output
    shown = np.load(cells.file((target, BASE, 0, "elsewhere")))["pictures"]
    own = np.load(cells.file((target, BASE, 0, "name")))["pictures"]
    groups = [own, *(shown[(rows.group == "alone") & (rows["object"] == c)] for c in kept)]
    seen = torch.stack([reader.judge.features(images(g)).mean(0) for g in groups])
    seen = seen - seen.mean(0)
    pairs = {"words": words, "pictures": seen}
    return {what: pd.Series(torch.cosine_similarity(x[:1], x[1:]).numpy(), kept) for what, x in pairs.items()}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", help="methods, or how their names begin")
    parser.add_argument("--targets", nargs="*", default=["apple"])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(words)
    cells = Cells(RESULTS / "recovery.jsonl")
    if not args.table:
        run(cells, args.only, args.targets, args.turns, args.slow)
    reader = Reader()
    lines = cells.read(reader)
    for target in args.targets:
        mine, end = [c for c in lines if c["key"][0] == target], "" if target == "apple" else f"-{target}"
        brought_back([c for c in mine if c["key"][3] != "elsewhere"], target, RESULTS / f"recovery{end}.csv")
        what_broke(cells, mine, target, reader, RESULTS / f"bystanders{end}.csv")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
