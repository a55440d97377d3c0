"""One concept after another: ten objects and two styles, many ways, two orders, two seeds.

    python benchmarks/continual.py                 # everything; goes on where it stopped
    python benchmarks/continual.py --only DUGE UCE # these settings, in this order; no name: all with it
    python benchmarks/continual.py --requests 6    # shorter sequences
    python benchmarks/continual.py --table         # only the table and the figures, from what is there

Each cell (setting, order, seed) forgets the whole sequence; then the judge reads every model along the way
on the same seeds, and the accuracy matrix becomes UA, IRA, CRA and their harmonic mean; KID and CLIP score
say what accuracy does not see, and "back door" how often the name of an object that went draws another one
that went. Every request has half of the default budget (75 iterations, 64 pictures
in the memory), the same for all methods, so that a cell takes a quarter of an hour on one core; the row
"DUGE, full budget" says what the other half is worth. One line of json per cell; half-done sequences are
kept in ``results/continual.work`` until their line is written. "all at once" has the budget of the whole
sequence for one request; the oracle is a denoiser trained without all twelve, where there is one in
``data/``::

    python -m duge_lite.doodles.train --name final --compile --without apple umbrella car sunglasses \\
        broccoli "traffic light" goldfish harp house broom neon mosaic

Everything is learned and drawn under bfloat16 autocast, as on a GPU (the weights stay in 32 bits): two thirds
of the time on a processor that has it.
"""

import argparse
import json
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

import duge_lite as duge
from duge_lite import baselines, visualize_sequence
from duge_lite.evaluation import clip_score, kid, sequence_metrics
from duge_lite.lessons import DUGE, Objective
from duge_lite.models import default_device
from duge_lite.sequence import UnlearningSequence, unlearn_sequence
from duge_lite.unlearning import UnlearnConfig, unlearn

RESULTS = Path(__file__).parent / "results"
ORDERS = (
    (
        "apple",
        "umbrella",
        "car",
        "sunglasses",
        "broccoli",
        "traffic light",
        "goldfish",
        "harp",
        "house",
        "broom",
    ),
    (
        "broom",
        "goldfish",
        "sunglasses",
        "house",
        "apple",
        "harp",
        "traffic light",
        "car",
        "broccoli",
        "umbrella",
    ),
)
STYLES = ("neon", "mosaic")
ANCHORS = ("star", "photo")  # what methods that need an anchor draw instead: of an object, of a style
SEEDS = (0, 1)
STEPS = 10  # of DDIM, for the pictures that are judged
SHOWN = ("orange", "parachute", "airplane", "bow tie", "tree", "backpack", "star", "apple", "car", "broccoli")
UCE, AT_ONCE, ORACLE = "UCE", "all at once", "oracle"
DRAWN = ("DUGE", "DUGE, to an anchor", "ESD-x", "concept ablation", UCE, ORACLE)  # in the figure


def settings() -> dict[str, tuple[UnlearnConfig, Objective]]:
    """Name -> (config, objective); UCE and the oracle have no loop, and ignore both."""
    c = UnlearnConfig(iterations=75, memory_size=64, lessons=128)
    plain = replace(c, lambda_prior=1.0, revisit=0.0)
    return {
        "DUGE": (c, DUGE),
        "DUGE, full budget": (UnlearnConfig(), DUGE),
        "DUGE, without attention": (replace(c, lambda_attention=0.0), DUGE),
        "DUGE, without prior": (replace(c, lambda_prior=0.0), DUGE),
        "DUGE, without regularization": (replace(c, lambda_regularization=0.0), DUGE),
        "DUGE, without revisits": (replace(c, revisit=0.0), DUGE),
        "DUGE, fewer revisits": (replace(c, revisit=0.25), DUGE),
        "DUGE, past an anchor": (c, replace(DUGE, anchors=ANCHORS)),
        "DUGE, to an anchor": (replace(c, target="uncond"), replace(DUGE, anchors=ANCHORS)),
        "DUGE, previous": (replace(c, reference="previous", anchor="previous"), DUGE),
        "DUGE, fisher": (replace(c, regularizer="fisher"), DUGE),
        "DUGE, protected words": (replace(c, protect=0.99), DUGE),
        "DUGE, merged": (replace(c, merge=True), DUGE),
        AT_ONCE: (c, DUGE),
        "ESD-x": (plain, baselines.esd()),
        "ESD-x, with revisits": (replace(plain, revisit=c.revisit), baselines.esd()),
        "concept ablation": (plain, baselines.concept_ablation(*ANCHORS)),
        "concept ablation, with revisits": (
            replace(plain, revisit=c.revisit),
            baselines.concept_ablation(*ANCHORS),
        ),
        "gradient ascent": (replace(plain, lr=1e-4), baselines.gradient_ascent()),
        UCE: (c, DUGE),
        ORACLE: (c, DUGE),
    }


def forget(pipe, name: str, requests: tuple[str, ...], seed: int, folder: Path) -> UnlearningSequence:
    """The sequence of models; a single one for what knows no order."""
    config, objective = settings()[name]
    config = replace(config, seed=seed)
    if name == UCE:
        return closed_form(pipe, requests, config)
    if name == AT_ONCE:
        n = len(requests)
        whole = {"iterations": n * config.iterations, "target_size": n * config.target_size}
        config = replace(config, revisit=(n - 1) / n, lessons=n * config.lessons, **whole)
        *earlier, last = requests
        run = unlearn(pipe, last, config, objective=objective, earlier=earlier, progress=False)
        sequence = UnlearningSequence(pipe, config, run.before)
        sequence.append(run)
        return sequence
    return unlearn_sequence(pipe, requests, config, folder, objective, progress=False)


def closed_form(pipe, requests: tuple[str, ...], config: UnlearnConfig) -> UnlearningSequence:
    card, sequence = duge.model_card(pipe), None
    for k, concept in enumerate(requests):
        kept = [c for c in card.forgettable if c not in requests[: k + 1]]
        run = baselines.uce(pipe, concept, preserve=kept)
        sequence = sequence or UnlearningSequence(pipe, config, run.before)
        sequence.append(run)
    return sequence


def accuracies(pipe, judge: duge.Judge, images: int) -> pd.Series:
    return duge.evaluate(pipe, duge.model_card(pipe).forgettable, images, judge=judge, steps=STEPS).accuracy


def watched(requests: int) -> list[int]:
    """After which requests the judge looks: the first two, and then every other one."""
    return sorted({0, 1, *range(2, requests, 2), requests})


def show(pipe, path: Path) -> None:
    """A strip of pictures, one per concept of SHOWN, on the same seed for every model."""
    prompts = [duge.model_card(pipe).prompt(c) for c in SHOWN]
    strip = np.hstack(duge.sample(pipe, prompts, seed=7, steps=2 * STEPS))
    Image.fromarray(strip).save(path, optimize=True)


def back_door(pipe, gone: list[str], judge: duge.Judge, images: int) -> float:
    """How often the name of one object that went draws another one that went."""
    asked, card = [c for c in gone for _ in range(images)], duge.model_card(pipe)
    drawn = duge.sample(pipe, [card.prompt(c) for c in asked], seed=500, steps=STEPS)
    found = judge.names(drawn, card.concepts)
    return sum(f in gone and f != a for f, a in zip(found, asked, strict=True)) / len(asked)


def measure(
    name: str,
    requests: tuple[str, ...],
    seed: int,
    folder: Path,
    judge: duge.Judge,
    images: int,
    strip: Path | None,
) -> dict:
    pipe = duge.load_pipeline()
    card = duge.model_card(pipe)
    started = time.process_time()
    if name == ORACLE:
        models, costs = {0: lambda: pipe, len(requests): lambda: duge.load_oracle(pipe, "final")}, {}
    else:
        resumed = folder.exists()
        sequence = forget(pipe, name, requests, seed, folder)
        costs = {"seconds": sequence.costs().seconds.round(1).tolist()}
        costs["cpu"] = None if resumed else time.process_time() - started
        if len(sequence.runs) == 1:
            models = {0: lambda: sequence.pipeline(at=0), len(requests): lambda: sequence.pipeline(at=1)}
        else:
            models = {k: partial(sequence.pipeline, at=k) for k in watched(len(requests))}
    prompts = [card.prompt(c) for c in card.concepts if c not in requests for _ in range(images)]
    rows = {k: accuracies(model(), judge, images) for k, model in models.items()}
    matrix = pd.DataFrame(rows).T.reindex(range(len(requests) + 1)).ffill()
    metrics = sequence_metrics(matrix, requests, card).loc[list(rows)[1:]]
    about = costs | {"after": list(rows)}
    others = duge.sample(models[0](), prompts, seed=len(prompts), steps=STEPS)
    for which, model in (("base", models[0]), ("last", models[len(requests)])):
        drawn = duge.sample(model(), prompts, seed=0, steps=STEPS)
        about[f"KID {which}"] = kid(others, drawn, judge)
        about[f"CLIP {which}"] = float(clip_score(drawn, prompts).mean())
    about["back door"] = back_door(model(), [c for c in requests if c in card.concepts], judge, 2 * images)
    if strip:
        show(model(), strip)
    table = {c: column.tolist() for c, column in matrix.loc[list(rows)].items()}
    return about | {
        "matrix": table,
        "metrics": json.loads(metrics.reset_index().to_json(orient="records")),
    }


def oracle() -> bool:
    return (duge.data_dir() / "doodle-oracle-final").is_dir()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summarise(path: Path) -> None:
    """Prints the metrics after the last request, by order (mean over seeds); draws them over requests."""
    keys, once = ["setting", "order"], ["back door", "KID last", "KID base", "CLIP last", "CLIP base", "cpu"]
    cells = pd.DataFrame(read(path), columns=["setting", "requests", "metrics", *once])
    if cells.empty:
        return
    cells["order"] = cells.requests.str[0]  # named by the request that comes first
    rows = [{"setting": c.setting, "order": c.order, **row} for c in cells.itertuples() for row in c.metrics]
    means = pd.DataFrame(rows).drop(columns="request").groupby([*keys, "after"], sort=False).mean()
    last = means.groupby(level=keys, sort=False).tail(1).reset_index("after")
    extra = cells.astype(dict.fromkeys(once, float)).groupby(keys, sort=False)
    last = last.join(extra[once].mean())
    last.insert(0, "cells", extra.size())
    print(last.round(3).to_string())
    last.round(4).to_csv(path.with_suffix(".csv"))
    first = cells.order[0]
    shown = means.xs(first, level="order")
    tables = {name: shown.loc[name] for name in DRAWN if (name, first) in last.index}
    title = f"One concept after another, {first} first: what is gone (UA), and what is left"
    path.with_suffix(".png").write_bytes(visualize_sequence.metrics_over_requests(tables, title=title).png())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of settings, or parts of names")
    parser.add_argument("--requests", type=int, default=len(ORDERS[0]) + len(STYLES))
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--orders", nargs="*", type=int, default=range(len(ORDERS)), help="0, 1 or both")
    parser.add_argument("--images", type=int, default=5, help="pictures per concept and model")
    parser.add_argument("--out", type=Path, default=RESULTS / "continual.jsonl")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    args.out.with_suffix("").mkdir(parents=True, exist_ok=True)
    known, only = settings(), args.only or [""]
    parts = [[o] if o in known else [n for n in known if o in n] for o in only]
    chosen = dict.fromkeys(name for names in parts for name in names)
    done = {(c["setting"], tuple(c["requests"]), c["seed"]) for c in read(args.out)}
    cells = [
        (name, (*order, *STYLES)[: args.requests], seed)
        for seed in args.seeds
        for order in (ORDERS[i] for i in args.orders)
        for name in chosen
    ]
    judge = duge.Judge.load()
    if not args.table:
        show(duge.load_pipeline(), args.out.with_suffix("") / "base.png")
    for name, requests, seed in [] if args.table else cells:
        needless = seed != SEEDS[0] and name in (UCE, ORACLE)  # they draw no lots
        needless |= name == ORACLE and (requests[0] != ORDERS[0][0] or not oracle())
        if (name, requests, seed) in done or needless:
            continue
        started = time.perf_counter()
        folder = args.out.with_suffix(".work") / f"{name} {requests[0]} {len(requests)} {seed}".replace(
            " ", "-"
        )
        cell = {"setting": name, "requests": requests, "seed": seed, "images": args.images}
        kept = seed == SEEDS[0] and requests[0] == ORDERS[0][0]  # one order's pictures are enough to look at
        strip = args.out.with_suffix("") / f"{name}.png" if kept else None
        with torch.autocast(default_device().type, torch.bfloat16):
            cell |= measure(name, requests, seed, folder, judge, args.images, strip)
        with args.out.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{name}, {requests[0]} first, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    summarise(args.out)


if __name__ == "__main__":
    main()
