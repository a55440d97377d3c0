"""Twelve requests, one after another, in four orders; and sixteen of the twenty objects.

    python benchmarks/continual.py                  # everything; goes on where it stopped
    python benchmarks/continual.py --only ours UCE  # these rows, in this order
    python benchmarks/continual.py --table          # only the table and the figure, from what is there

Each cell forgets ten objects and two styles and then draws 10 photos of every object, and 20 pictures in
every style. What the exact solver leaves does not depend on the order: the largest relative difference
between the weights of the four orders is in the table, and one order is judged. UCE solves for all requests
at once, as it is published; "in turn" edits what the request before left. Gradient methods do one order, or
as many as ``--orders`` says. Back door: how often the name of an object that went draws another one that
went. KID: of what stays, minus the base's own.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import numpy as np
import pandas as pd
import torch
from common import BASE, ORACLE, OURS, RESULTS, Cells, Method, chosen, cpu, draw, images, interval, table

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
    """What is drawn, a row per picture: the object, the style, the seed."""
    rows = [(c, card.styles[0], SEED + i) for c in card.concepts for i in range(PHOTOS)]
    rows += [(card.concepts[i % 20], s, SEED + 500 + i) for s in card.styles[1:] for i in range(STYLED)]
    return pd.DataFrame(rows, columns=["object", "style", "seed"])


def look(pipe, again: bool = False) -> np.ndarray:
    """``again``: the photos once more, from other noise, at the end."""
    card = duge.model_card(pipe)
    rows = asks(card)
    if again:
        other = rows[rows["style"] == card.styles[0]]
        rows = pd.concat([rows, other.assign(seed=other.seed + 100_000)])
    prompts = [card.prompt(c, s) for c, s in zip(rows["object"], rows["style"], strict=True)]
    return draw(pipe, prompts, rows.seed)


def forget_all(pipe, name: str, method: Method, world: str, number: int) -> dict:
    """Forgets one after another: what every request took, and for ours what the order changes."""
    names = order(world, number)
    if method.uce is not None and "in turn" not in name:
        costs = [cpu(lambda k=k: method.forget(pipe, list(names[: k + 1]), 0).restore()) for k in range(2)]
        method.forget(pipe, list(names), 0)  # what the last request solves for
        return {"cpu": costs}
    requests = [partial(method.forget, pipe, concept, 0, names[:k]) for k, concept in enumerate(names)]
    cost: dict[str, object] = {"cpu": [cpu(request) for request in requests]}
    if name == OURS and world == "12 requests":
        cost["between orders"] = between_orders(pipe, method, world)
    return cost


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


def run(cells: Cells, only: list[str] | None, orders: int, worlds: list[str]) -> None:
    rows = chosen(only)
    if only is None:
        rows["UCE, styled, in turn"] = rows["UCE, styled"]
    for world in worlds:
        for name, method in rows.items():
            for number in range(1 if method.exact or method.config is None else orders):
                key = (ANY if name == BASE else world, name, number)
                needless = name == ORACLE and world != "12 requests"
                if needless or (key in cells and (name != BASE or cells.file(key).exists())):
                    continue
                started, pipe, cost = time.perf_counter(), duge.load_pipeline(), {}
                if name == ORACLE:
                    pipe = duge.load_oracle(pipe, "final")
                elif name != BASE:
                    cost = forget_all(pipe, name, method, world, number)
                cells.add(key, cost, look(pipe, again=name == BASE))
                print(f"{key}: {time.perf_counter() - started:.0f} s", flush=True)


class Reader:
    """Counts what the judge sees on the pictures of a cell."""

    def __init__(self, cells: Cells) -> None:
        self.pipe, self.judge = duge.load_pipeline(), duge.Judge.load()
        self.card, self.cells = duge.model_card(self.pipe), cells
        self.rows = asks(self.card)

    def __call__(self, key: tuple, pictures: np.ndarray) -> dict:
        world, rows, card = key[0], self.rows.copy(), self.card
        gone, mine = set(WORLDS.get(world, TWELVE)), pictures[: len(rows)]
        rows["saw"] = self.judge.names(images(mine), card.concepts)
        rows["saw style"] = self.judge.names(images(mine), card.styles)
        photo = rows["style"] == card.styles[0]
        asked, styled = rows["object"].isin(gone), rows["style"].isin(gone)
        right, right_style = rows["saw"] == rows["object"], rows["saw style"] == rows["style"]
        counts = {
            "gone": ~pd.concat([right[asked & photo], right_style[styled]]),
            "gone, styled": ~right[asked & ~photo & ~styled],
            "objects kept": right[~asked & photo],
            "styles kept": right_style[~photo & ~styled],
            "back door": (~right & rows["saw"].isin(gone))[asked & photo],
        }
        found = {name: [int(hits.sum()), len(hits)] for name, hits in counts.items()}
        base = np.load(self.cells.file((ANY, BASE, 0)))["pictures"]
        own, others = base[: len(rows)], base[len(rows) :]
        stays = np.flatnonzero(~asked & photo)  # photos stand first
        far = [kid(images(others[stays]), images(p[stays]), self.judge) for p in (mine, own)]
        return found | {"KID over base": far[0] - far[1], "KID base": far[1]}


def summarise(cells: Cells) -> None:
    lines = [c for c in cells.read(Reader(cells)) if "gone" in c]
    if not lines:
        return
    shares, rows = ("gone", "gone, styled", "objects kept", "styles kept", "back door"), {}
    frame = pd.DataFrame([{"world": c["key"][0], "row": c["key"][1], "cell": c} for c in lines])
    for (world, name), group in frame.groupby(["world", "row"], sort=False):
        mine = list(group.cell)
        row = {"orders": 4 if "between orders" in mine[0] else len(mine)}
        for share in shares:
            counts = np.sum([c[share] for c in mine], axis=0)
            row[share] = interval(*counts) if counts[1] else ""
        row["KID over base"] = np.mean([c["KID over base"] for c in mine])
        costs = [c["cpu"] for c in mine if c.get("cpu")]
        row["cpu s, first"] = np.median([c[0] for c in costs]) if costs else np.nan
        row["further"] = np.median([s for c in costs for s in c[1:]]) if costs else np.nan
        row["between orders"] = mine[0].get("between orders", np.nan)
        rows[world, name] = row
    result = pd.DataFrame(rows.values(), index=pd.MultiIndex.from_tuples(rows, names=["world", "row"]))
    result["between orders"] = result["between orders"].map(lambda x: "" if np.isnan(x) else f"{x:.1e}")
    table(result, cells.path.with_suffix(".csv"))
    first = frame[frame.world == "12 requests"].drop_duplicates("row").set_index("row").cell
    if len(first):
        points = pd.DataFrame(
            {n: [sum(c["objects kept"][:1] + c["styles kept"][:1])
                 / (c["objects kept"][1] + c["styles kept"][1]), c["gone"][0] / c["gone"][1]]
             for n, c in first.items() if n != BASE},
            index=["kept", "gone"],
        ).T  # fmt: skip
        labels = ("what is left of objects and styles that stay", "what is gone of twelve requests")
        title = "Twelve requests: gone, and kept; further up and to the right is better"
        cells.path.with_suffix(".png").write_bytes(figures.trade_off(points, title, labels).png())


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", help="rows, or how their names begin")
    parser.add_argument("--orders", type=int, default=1, help="of methods that the order matters to (1 to 4)")
    parser.add_argument("--worlds", nargs="*", default=list(WORLDS))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--no-table", action="store_true")
    args = parser.parse_args(words)
    cells = Cells(RESULTS / "continual.jsonl")
    if not args.table:
        run(cells, args.only, args.orders, args.worlds)
    if not args.no_table:
        summarise(cells)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
