"""Twelve requests, one after another; and sixteen of the twenty objects.

    python benchmarks/continual.py          # everything; goes on where it stopped; --only UCE: some rows
    python benchmarks/continual.py --table  # only the table and the figure, from what is there

Each cell forgets ten objects and two styles, then draws 10 photos of every object and 20 pictures in every
style. What the exact solver leaves does not depend on the order: the largest relative difference between the
weights of four is in the table. UCE solves for all requests at once, as it is published. Of each
method only the best settings run; the sixteen are asked of ours and UCE alone. Back door: the name of an
object that went draws another one that went. KID: of what stays, minus the base's own.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from itertools import product

import numpy as np
import pandas as pd
from common import BASE, METHODS, ORACLE, OURS, QUICK, SWEPT, Cells, Method, arguments, interval, look

from common import timed  # isort: skip

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
FIRST, ANY = "12 requests", "any"


def forget_all(pipe, method: Method, names: Sequence[str]) -> list[float]:
    """Forgets one after another: the processor seconds of every request; UCE's of the first two alone."""
    if method.uce is None:
        return [timed(partial(method.forget, pipe, concept, 0))[0] for concept in names]
    costs = [timed(lambda k=k: method.forget(pipe, names[:k], 0).restore())[0] for k in (1, 2)]
    method.forget(pipe, names, 0)  # what the last request solves for
    return costs


def between_orders(pipe, method: Method) -> float:
    """The largest relative difference of any matrix between what is there and what other orders leave."""
    book, weights = PictureBook.known(pipe), cross_attention_weights(pipe.unet)
    first, most = {n: p.detach().clone() for n, p in weights.items()}, 0.0
    for number in (1, 2, 3):
        overwrite(weights, book.reference)
        forget_all(pipe, method, np.random.default_rng(number).permutation(TWELVE).tolist())
        most = max([most, *(float((p - first[n]).norm() / first[n].norm()) for n, p in weights.items())])
    return most


class Continual(Cells):
    @cached_property
    def rows(self) -> pd.DataFrame:
        """What is drawn, a row per picture: object, style, seed, prompt. Photos stand first."""
        card, rows = self.card, [(c, "photo", 10_000 + i) for c in self.card.concepts for i in range(10)]
        rows += [(card.concepts[i % 20], s, 10_500 + i) for s in card.styles[1:] for i in range(20)]
        prompts = [card.prompt(c, s) for c, s, _ in rows]
        return pd.DataFrame(rows, columns=["object", "style", "seed"]).assign(prompt=prompts)

    def cell(self, world: str, name: str, _: int) -> tuple[dict, np.ndarray]:
        pipe, method = duge.load_pipeline(), METHODS[name]
        if name == BASE:  # the photos again: what KID is without forgetting
            return {}, look(pipe, self.rows, self.rows["style"] == "photo")
        if name == ORACLE:
            return {}, look(duge.load_oracle(pipe, "final"), self.rows)
        cost = {"cpu": forget_all(pipe, method, WORLDS[world])}
        if name == OURS and world == FIRST:
            cost["between orders"] = between_orders(pipe, method)
        return cost, look(pipe, self.rows)

    def run(self, names: Sequence[str]) -> None:
        for world, name in product(WORLDS, [BASE, *names]):
            if name in (BASE, *QUICK) or (world == FIRST and name not in SWEPT):
                self.fill((ANY if name == BASE else world, name, 0), shown=name == BASE)

    def measure(self, key: tuple, pictures: np.ndarray) -> dict:
        rows, gone, mine = self.rows, set(WORLDS.get(key[0], TWELVE)), pictures[: len(self.rows)]
        saw, style = (pd.Series(self.judge.names(mine, k)) for k in (self.card.concepts, self.card.styles))
        photo, asked, styled = rows["style"] == "photo", rows["object"].isin(gone), rows["style"].isin(gone)
        right, right_style = rows["object"] == saw, rows["style"] == style
        counts = {
            "gone": ~pd.concat([right[asked & photo], right_style[styled]]),
            "gone, styled": ~right[asked & ~photo & ~styled],
            "objects kept": right[~asked & photo],
            "styles kept": right_style[~photo & ~styled],
            "back door": (~right & saw.isin(gone))[asked & photo],
        }
        found = {name: [int(hits.sum()), len(hits)] for name, hits in counts.items()}
        base, stays = self.pictures((ANY, BASE, 0)), np.flatnonzero(~asked & photo)
        far, own = (kid(base[len(rows) :][stays], p[stays], self.judge) for p in (mine, base))
        return found | {"KID over base": far - own}

    def summarise(self) -> None:
        """A row per cell; and a point, where there were twelve requests."""
        rows, points, lines = {}, {}, [c for c in self.read() if "gone" in c]
        for cell in lines:
            world, name, _ = cell["key"]
            rows[world, name] = row = {"orders": 4 if "between orders" in cell else 1}
            for share in ("gone", "gone, styled", "objects kept", "styles kept", "back door"):
                row[share] = interval(*cell[share])
            first, *further = cell.get("cpu") or [np.nan]
            row |= {"KID over base": cell["KID over base"], "cpu s, first": first}
            row["further"] = np.median(further) if further else np.nan
            row["between orders"] = f"{cell['between orders']:.1e}" if "between orders" in cell else ""
            if world == FIRST:
                kept, drawn = np.sum([cell["objects kept"], cell["styles kept"]], axis=0)
                points[name] = {"kept": kept / drawn, "gone": cell["gone"][0] / cell["gone"][1]}
        table = pd.DataFrame(rows.values(), index=pd.MultiIndex.from_tuples(rows, names=["world", "row"]))
        labels = ("what is left of objects and styles that stay", "what is gone of twelve requests")
        title = "Twelve requests: gone, and kept; further up and to the right is better"
        figure = figures.trade_off(pd.DataFrame(points).T, title, labels)
        self.publish(table, figure, lines)


if __name__ == "__main__":
    asked, cells = arguments(__doc__), Continual("continual")
    if not asked.table:
        cells.run(asked.rows)
    cells.summarise()
