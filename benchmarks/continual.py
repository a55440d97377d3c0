"""Twelve requests, one after another; and sixteen of the twenty objects.

    python benchmarks/continual.py                  # everything; goes on where it stopped
    python benchmarks/continual.py --only ours UCE  # these rows, in this order
    python benchmarks/continual.py --table          # only the table and the figure, from what is there

Each cell forgets ten objects and two styles and then draws 10 photos of every object, and 20 pictures in
every style. What the exact solver leaves does not depend on the order: the largest relative difference
between the weights of four orders is in the table, and one is judged. UCE solves for all requests at once,
as it is published. Of a method that learns by gradient only the best row runs, and only the twelve requests:
so everything, beside ``single.py``, takes two cores less than an hour. Back door: how often the name of an
object that went draws another one that went. KID: of what stays, minus the base's own.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from common import BASE, BEST, ORACLE, OURS, RESULTS, Cells, Method, arguments, chosen

from common import images, interval, look, oracle, publish, timed  # isort: skip

import duge_lite as duge
from duge_lite import figures
from duge_lite.evaluation import kid
from duge_lite.models import overwrite
from duge_lite.solver import PictureBook, cross_attention_weights

OBJECTS = ("apple", "umbrella", "car", "sunglasses", "broccoli")
OBJECTS += ("traffic light", "goldfish", "harp", "house", "broom")
TWELVE = (*OBJECTS, "neon", "mosaic")
SIXTEEN = (*OBJECTS, "orange", "parachute", "backpack", "bow tie", "computer mouse", "gas pump")
WORLDS = {"12 requests": TWELVE, "16 of 20 objects": SIXTEEN}
ORDERS, ANY = 4, "any"
PHOTOS, STYLED, SEED = 10, 20, 10_000


def order(world: str, number: int) -> tuple[str, ...]:
    """Order 0 is that of the list, the others are shuffled."""
    names = WORLDS[world]
    return names if number == 0 else tuple(np.random.default_rng(number).permutation(names).tolist())


def asks(card) -> pd.DataFrame:
    """What is drawn, a row per picture: the object, the style, the seed, the prompt. Photos stand first."""
    rows = [(c, card.styles[0], SEED + i) for c in card.concepts for i in range(PHOTOS)]
    rows += [(card.concepts[i % 20], s, SEED + 500 + i) for s in card.styles[1:] for i in range(STYLED)]
    prompts = [card.prompt(c, s) for c, s, _ in rows]
    return pd.DataFrame(rows, columns=["object", "style", "seed"]).assign(prompt=prompts)


def forget_all(pipe, method: Method, world: str) -> list[float]:
    """Forgets one after another: the processor seconds of every request; UCE's of the first two alone."""
    names = list(WORLDS[world])
    if method.uce is None:
        return [timed(partial(method.forget, pipe, concept, 0))[0] for concept in names]
    costs = [timed(lambda k=k: method.forget(pipe, names[:k], 0).restore())[0] for k in (1, 2)]
    method.forget(pipe, names, 0)  # what the last request solves for
    return costs


def between_orders(pipe, method: Method, world: str) -> float:
    """The largest relative difference of any matrix between what is there and what other orders leave."""
    book, weights = PictureBook.known(pipe), cross_attention_weights(pipe.unet)
    first, most = {n: p.detach().clone() for n, p in weights.items()}, 0.0
    for number in range(1, ORDERS):
        overwrite(weights, book.reference)
        for concept in order(world, number):
            method.forget(pipe, concept, 0)
        most = max([most, *(float((p - first[n]).norm() / first[n].norm()) for n, p in weights.items())])
    return most


def cell(key: tuple, method: Method) -> tuple[dict, np.ndarray]:
    """What forgetting took, and what is drawn after it."""
    pipe, (world, name, _), cost = duge.load_pipeline(), key, {}
    rows = asks(duge.model_card(pipe))
    if name == BASE:  # the photos again: what KID is without forgetting
        return {}, look(pipe, rows, rows["style"] == "photo")
    if name == ORACLE:
        return {}, look(duge.load_oracle(pipe, oracle(key)), rows)
    cost["cpu"] = forget_all(pipe, method, world)
    if name == OURS and world == "12 requests":
        cost["between orders"] = between_orders(pipe, method, world)
    return cost, look(pipe, rows)


def run(cells: Cells, rows: dict[str, Method]) -> None:
    for world in WORLDS:
        for name, method in {BASE: Method(), **rows}.items():
            once = name == ORACLE or name in BEST
            if (method.slow and name not in BEST) or (once and world != "12 requests"):
                continue
            key = (ANY if name == BASE else world, name, 0)
            cells.fill(key, partial(cell, key, method), shown=name == BASE)


class Reader:
    """Counts what the judge sees on the pictures of a cell."""

    def __init__(self, cells: Cells) -> None:
        self.judge, self.card = duge.Judge.load(), duge.model_card(duge.load_pipeline())
        self.cells, self.rows = cells, asks(self.card)

    def __call__(self, key: tuple, pictures: np.ndarray) -> dict:
        rows, gone = self.rows, set(WORLDS.get(key[0], TWELVE))
        mine = pictures[: len(rows)]
        saw, style = (
            self.judge.names(images(mine), among) for among in (self.card.concepts, self.card.styles)
        )
        photo, asked, styled = rows["style"] == "photo", rows["object"].isin(gone), rows["style"].isin(gone)
        right, right_style = rows["object"] == saw, rows["style"] == style
        counts = {
            "gone": ~pd.concat([right[asked & photo], right_style[styled]]),
            "gone, styled": ~right[asked & ~photo & ~styled],
            "objects kept": right[~asked & photo],
            "styles kept": right_style[~photo & ~styled],
            "back door": (~right & pd.Series(saw).isin(gone))[asked & photo],
        }
        found = {name: [int(hits.sum()), len(hits)] for name, hits in counts.items()}
        base, stays = self.cells.pictures((ANY, BASE, 0)), np.flatnonzero(~asked & photo)
        others = images(base[len(rows) :][stays])
        far, own = (kid(others, images(p[stays]), self.judge) for p in (mine, base))
        return found | {"KID over base": far - own, "KID base": own}


def summarise(cells: Cells) -> None:
    """A row per cell; and a point, where there were twelve requests."""
    rows, points = {}, {}
    lines = [c for c in cells.read(Reader(cells)) if "gone" in c]
    for cell in lines:
        world, name, _ = cell["key"]
        row = {"orders": ORDERS if "between orders" in cell else 1}
        for share in ("gone", "gone, styled", "objects kept", "styles kept", "back door"):
            row[share] = interval(*cell[share]) if cell[share][1] else ""
        first, *further = cell.get("cpu") or [np.nan]
        row |= {"KID over base": cell["KID over base"], "cpu s, first": first}
        row["further"] = np.median(further) if further else np.nan
        row["between orders"] = f"{cell['between orders']:.1e}" if "between orders" in cell else ""
        rows[world, name] = row
        if world == "12 requests":
            kept, drawn = np.sum([cell["objects kept"], cell["styles kept"]], axis=0)
            points[name] = {"kept": kept / drawn, "gone": cell["gone"][0] / cell["gone"][1]}
    table = pd.DataFrame(rows.values(), index=pd.MultiIndex.from_tuples(rows, names=["world", "row"]))
    labels = ("what is left of objects and styles that stay", "what is gone of twelve requests")
    title = "Twelve requests: gone, and kept; further up and to the right is better"
    figure = figures.trade_off(pd.DataFrame(points).T, title, labels)
    publish(cells.path.with_suffix(".csv"), table, figure, lines)


def main() -> None:
    asked, cells = arguments(__doc__), Cells(RESULTS / "continual.jsonl")
    if not asked.table:
        run(cells, chosen(asked.only))
    summarise(cells)


if __name__ == "__main__":
    main()
