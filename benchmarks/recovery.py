"""What brings a forgotten concept back, and what else broke.

    python benchmarks/recovery.py          # goes on where it stopped; --only ours oracle: some rows
    python benchmarks/recovery.py --table  # only the tables and the figures, from what is there

A turn forgets with another seed, where the method draws lots, and starts every attack elsewhere. Shares: of
pictures in which the judge sees the concept, with Wilson's interval over all turns; pictures of one learned
word, or of one relearned model, depend on each other, so there it is too narrow. Read each row beside the
oracle, which never saw the concept, and after the twelve of ``continual.py`` none of them (there no method
learns by gradient). Attacks that need pictures bring drawings of the program.

What else broke: of two objects that stay in one picture, both found; of one on a background that the prompt
names, both right; how narrowly words look (0 evenly everywhere, 1 at one place), and how that differs from
the base; correlation of each object's loss of accuracy with its similarity to what went (cosines of the words
in the text encoder, and of the judge's features of the base's pictures, less their mean).
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import cycle, islice, product

import numpy as np
import pandas as pd
import torch
from common import BASE, GRADIENT, METHODS, ORACLE, OURS, SILENCE, STEPS, Cells, arguments, draw, interval

from common import look, timed  # isort: skip
from continual import TWELVE, forget_all

import duge_lite as duge
from duge_lite import attacks, figures
from duge_lite.doodles import BACKGROUNDS, captions
from duge_lite.evaluation import wilson_interval
from duge_lite.models import Pictures

ROWS = [BASE, OURS, SILENCE, GRADIENT, "UCE", "UCE, styled, ridge 0.01", "ESD-x", ORACLE]
ROWS += ["concept ablation, nearest"]
TARGET, TURNS, COUNT, GROUNDS = "apple", 2, 10, list(BACKGROUNDS)  # COUNT: pictures of most probes, a turn
GAIN = "classifier: gain of the name"
DRAWN = ("asked by", "completion, 4", "noised to 0.7", "half", "its noise", "learned", "words", "relearned")
PROBES = ("name", "no words", "gain", "word", "search", "relearn", "elsewhere", "after twelve")
Found = Iterator[tuple[str, np.ndarray, dict]]


class Attacked:
    """A model under attack; ``turn`` moves every start. Every probe yields rows: name, pictures, numbers."""

    def __init__(self, name: str, turn: int, twelve: bool) -> None:
        """It forgot the apple, or ``twelve``."""
        self.base, self.pipe, self.turn = duge.load_pipeline(), duge.load_pipeline(), turn
        self.card, method = duge.model_card(self.base), METHODS[name]
        if name == ORACLE:
            self.pipe = duge.load_oracle(self.base, "final" if twelve else TARGET)
        elif twelve:
            forget_all(self.pipe, method, TWELVE)
        elif name != BASE:
            method.forget(self.pipe, TARGET, turn)

    def drawn(self, names: Sequence[str] = (TARGET,), count: int = 30, seed: int = 10_000) -> Pictures:
        """The program's drawings of ``names`` in turn, in all styles: what an attacker brings along."""
        asked = [(n, i, self.card.styles[i % 5]) for i, n in enumerate(islice(cycle(names), count))]
        made = [duge.doodles.draw(n, style, GROUNDS[i % 6], seed + i) for n, i, style in asked]
        return attacks.encode_pictures(self.base, made, [captions.prompt(n, style) for n, _, style in asked])

    def asked(self, prompts: Sequence[str], seed: int) -> np.ndarray:
        first = seed + 1000 * self.turn
        return draw(self.pipe, list(islice(cycle(prompts), COUNT)), range(first, first + COUNT))

    def name(self, prefix: str = "") -> Found:
        yield f"{prefix}asked by its name", self.asked(self.card.prompts(TARGET), 30_000), {}
        if not prefix:
            texts = [text for group in self.card.paraphrases(TARGET).values() for text in group]
            yield "other phrasings, a synonym", self.asked(texts[::-1], 35_000), {}

    def no_words(self) -> Found:
        """Probes that learn nothing; drawn under autocast, as all pictures that are judged."""
        given, judge = self.drawn(count=COUNT, seed=40_000 + 1000 * self.turn), duge.Judge.load()
        how = {"num_inference_steps": STEPS, "seed": 50_000 + 1000 * self.turn, "judge": judge}
        redraw = partial(attacks.redrawing, self.pipe, TARGET, given, **how)
        with torch.autocast(self.pipe.device.type, torch.bfloat16):
            found = attacks.completion(self.pipe, TARGET, self.base, images=COUNT, **how)
            for group, part in found.groupby("group"):
                yield f"completion, {group}", np.stack(part.picture), {}
            for at in (0.5, 0.7, 0.9):
                yield f"noised to {at:g}, told nothing", np.stack(redraw(at).picture), {}
            yield "half given, told nothing", np.stack(redraw(half=True).picture), {}
            found = attacks.noise_inversion(self.pipe, TARGET, given, judge=judge)
            yield "its noise found (DDIM)", np.stack(found.picture), {"error": found.error.round(4).tolist()}

    def gain(self) -> Found:
        gain = attacks.name_gain(self.pipe, TARGET, self.drawn(seed=20_000), count=48, seed=self.turn)
        nothing = np.empty((0, 64, 64, 3), np.uint8)
        yield GAIN, nothing, {"gain": gain[["gain", "low", "high"]].round(4).tolist()}

    def word(self, prefix: str = "") -> Found:
        *_, state = attacks.invert_steps(self.pipe, TARGET, self.drawn(), seed=self.turn)
        with attacks.new_word(self.pipe, state.vector) as new:
            text = f"{captions.nameless()} of {captions.with_article(new)}"
            yield f"{prefix}learned word", draw(self.pipe, [text] * 20, range(20_000, 20_020)), {}

    def search(self) -> Found:
        *_, state = attacks.search_steps(self.pipe, TARGET, self.drawn(), seed=self.turn)
        asked = [f"{captions.nameless()} of {state.words}"]
        yield "words of the vocabulary, sought", self.asked(asked, 60_000), {"words": state.words}

    def relearn(self, prefix: str = "") -> Found:
        others = [c for c in self.card.concepts if c not in (TWELVE if prefix else (TARGET,))]
        for what, names, at in (("it", [TARGET], (10, 40)), ("others", others, (40,))):
            for state in attacks.relearn_steps(self.pipe, self.drawn(names), 40, seed=self.turn):
                if state.step in at:
                    row = f"{prefix}relearned on {what}, {state.step} steps"
                    yield row, self.asked(self.card.prompts(TARGET), 70_000), {}

    def after_twelve(self) -> Found:
        for probe in (self.name, self.word, self.relearn):
            yield from probe("after twelve: ")

    def elsewhere(self) -> Found:
        kept, narrow = [c for c in self.card.concepts if c != TARGET], {}
        for what, names in (("it", [TARGET] * 4), ("others", kept[::4])):
            maps = [(duge.trace(self.pipe, captions.prompt(c), i, STEPS), c) for i, c in enumerate(names)]
            narrow[what] = [round(float(m.concentration(c).mean()), 4) for m, c in maps]
        yield "bystanders", look(self.pipe, bystanders(self.card)), {"concentration": narrow}


def bystanders(card) -> pd.DataFrame:
    """What is drawn of what stays, a row per picture: the group, two labels, the prompt, the seed."""
    kept, prompt = [c for c in card.concepts if c != TARGET], captions.prompt
    rows = [("two objects", *two, prompt(two), 80_200) for two in zip(kept, kept[7:] + kept[:7], strict=True)]
    for i, (c, ground) in enumerate(zip(kept * 2, cycle(GROUNDS), strict=False)):
        text = prompt(c, background=ground)
        rows.append(("on a background", c, f"{ground} background", text, 80_100 + i // len(kept)))
    rows += [("alone", c, c, prompt(c), 80_000 + k) for c in kept for k in range(5)]
    return pd.DataFrame(rows, columns=["group", "object", "other", "prompt", "seed"])


class Recovery(Cells):
    attacked = staticmethod(lru_cache(1)(Attacked))  # by all probes of one after another

    def cell(self, _: str, name: str, turn: int, probe: str) -> tuple[dict, np.ndarray]:
        attack = getattr(self.attacked(name, turn, probe == "after twelve"), probe.replace(" ", "_"))
        took, found = timed(lambda: list(attack()))
        cell = {"rows": [[row, len(pictures)] for row, pictures, _ in found], "cpu": round(took, 1)}
        cell |= {name: number for _, _, numbers in found for name, number in numbers.items()}
        return cell, np.concatenate([pictures for _, pictures, _ in found])

    def run(self, names: Iterable[str]) -> None:
        for turn, name, probe in product(range(TURNS), names, PROBES):
            twelve = probe == "after twelve"
            if (turn and probe == "elsewhere") or (twelve and (turn or name == BASE or METHODS[name].slow)):
                continue
            self.fill((TARGET, name, turn, probe), shown=name == BASE and probe in ("name", "elsewhere"))

    def measure(self, key: tuple, pictures: np.ndarray) -> dict:
        """Of every picture 1 where the judge sees the target, or what was asked for."""
        rows = bystanders(self.card)
        if key[3] != "elsewhere":
            return {"seen": self.judge.sees(pictures, TARGET).astype(int).tolist()}
        first = rows["object"] == self.judge.names(pictures, self.card.concepts)
        ground = rows.other == self.judge.names(pictures, [f"{g} background" for g in GROUNDS])
        seen = self.judge.scores(pictures) > (self.judge.threshold or 0.0)
        both = [seen[one][i] and seen[two][i] for i, one, two in rows[["object", "other"]].itertuples()]
        right = np.select([rows.group == "two objects", rows.group == "alone"], [both, first], first & ground)
        found, kept = {"right": right.astype(int).tolist()}, rows["object"].unique()
        if key[1] == BASE:  # how near what stays is to what went
            pipe, prompts = duge.load_pipeline(), [captions.prompt(c) for c in (TARGET, *kept)]
            texts = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").to(pipe.device)
            with torch.no_grad():
                words = pipe.text_encoder(texts.input_ids).pooler_output.cpu()
            groups = (pictures[(rows.group == "alone") & (rows["object"] == c)] for c in kept)
            groups = [self.pictures((TARGET, BASE, 0, "name")), *groups]
            seen = torch.stack([self.judge.features(g).mean(0) for g in groups])
            pairs = ("words", words), ("pictures", seen - seen.mean(0))
            found["near"] = {what: torch.cosine_similarity(x[:1], x[1:]).tolist() for what, x in pairs}
        return found

    def brought_back(self, lines: list[dict]) -> None:
        """The table of what brings it back, and its figure."""
        hits: dict[str, dict[str, list[int]]] = {}
        lines = sorted(lines, key=lambda c: PROBES.index(c["key"][3]))
        names = sorted({c["key"][1] for c in lines}, key=[*ROWS, *METHODS].index)
        for cell in lines:
            seen = iter(cell.get("seen", ()))
            for row, count in cell["rows"]:
                hits.setdefault(row, {}).setdefault(cell["key"][1], []).extend(islice(seen, count))
        rows = {r: {n: interval(sum(s), len(s)) for n, s in found.items() if s} for r, found in hits.items()}
        for name in names:
            mine = [c for c in lines if c["key"][1] == name]
            if gains := [c["gain"] for c in mine if "gain" in c]:
                rows[GAIN][name] = "{:+.2f} ({:+.2f} to {:+.2f})".format(*np.mean(gains, axis=0))
            if errors := [e for c in mine for e in c.get("error", ())]:
                row = rows.setdefault("its noise found: error of the picture", {})
                row[name] = f"{np.mean(errors):.3f} (at most {max(errors):.3f}, n={len(errors)})"
        pairs = {(r, n): hits[r][n] for r in hits if r.startswith(DRAWN) for n in names if n in hits[r]}
        shown = {pair: (np.mean(s), *wilson_interval(sum(s), len(s))) for pair, s in pairs.items()}
        title = f"What brings the {TARGET} back: each row beside the oracle"
        figure = figures.attack_summary(pd.DataFrame(shown, index=["seen", "low", "high"]).T, title)
        self.publish(pd.DataFrame(rows).T[names].fillna(""), figure, lines)

    def what_broke(self, lines: list[dict]) -> None:
        """Composition, concentration, and damage over similarity; with its figure."""
        mine = {c["key"][1]: c for c in sorted(lines, key=lambda c: [*ROWS, *METHODS].index(c["key"][1]))}
        if BASE not in mine:
            return
        rows = bystanders(self.card)
        right = pd.DataFrame({name: cell["right"] for name, cell in mine.items()})
        accuracy = right[rows.group == "alone"].groupby(rows["object"], sort=False).mean()  # (object, method)
        near, table = pd.DataFrame(mine[BASE]["near"], index=accuracy.index), {}
        losses = accuracy.rsub(accuracy[BASE], axis=0)
        for name, cell in mine.items():
            groups = right[name].groupby(rows.group, sort=False)
            table[name] = row = {group: interval(part.sum(), len(part)) for group, part in groups}
            for what, narrow in cell["concentration"].items():
                change = np.mean(narrow) - np.mean(mine[BASE]["concentration"][what])
                row[f"concentration, {what}"] = f"{np.mean(narrow):.3f} ({change:+.3f}, n={len(narrow)})"
            for what in near:
                varies = losses[name].std() > 0
                row[f"loss ~ {what}"] = losses[name].corr(near[what]) if varies else np.nan
        title = "What was lost, over its likeness to what went"
        figure, (both,) = figures.canvas(9, 4, 1, 2, title, sharey=True)
        for axes, what in zip(both, near, strict=True):
            for name, mark in zip(losses.columns.drop(BASE), "v^sDP*o", strict=False):
                axes.plot(near[what], losses[name], mark, label=name, alpha=0.6, ls="")
            figures.tidy(axes, "", f"similarity of {what}", "loss of accuracy", "y")
        both[0].legend(fontsize=7)
        self.publish(pd.DataFrame(table).T.rename_axis("row"), figure, lines, "bystanders")


if __name__ == "__main__":
    asked, cells = arguments(__doc__, rows=ROWS), Recovery("recovery")
    if not asked.table:
        cells.run(asked.rows)
    lines = cells.read()
    cells.brought_back([c for c in lines if c["key"][3] != "elsewhere"])
    cells.what_broke([c for c in lines if c["key"][3] == "elsewhere"])
