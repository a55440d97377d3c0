"""One concept after another: ten objects and two styles, many ways, two orders, two seeds.

    python benchmarks/continual.py                 # everything; goes on where it stopped
    python benchmarks/continual.py --only DUGE UCE # these settings, in this order; no name: all with it
    python benchmarks/continual.py --requests 6    # shorter sequences
    python benchmarks/continual.py --table         # only the table and the figures, from what is there

Each cell (setting, order, seed) forgets the whole sequence; then the judge reads every model along the way
on the same seeds, and the accuracy matrix becomes UA, IRA, CRA and their harmonic mean; KID and CLIP score
say what accuracy does not see. Every request has half of the default budget (75 iterations, 64 pictures
in the memory), the same for all methods, so that a cell takes a quarter of an hour on one core; the row
"DUGE, full budget" says what the other half is worth. One line of json per cell; half-done sequences are
kept in ``results/continual.work`` until their line is written. "all at once" has the budget of the whole
sequence for one request; the oracle is a denoiser trained without all twelve, where there is one in
``data/``::

    python -m duge_lite.doodles.train --name final --compile --without apple umbrella car sunglasses \\
        broccoli "traffic light" goldfish harp house broom neon mosaic

The pictures that are judged are drawn under bfloat16 autocast, which is quicker on processors that have it.
"""

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

import duge_lite as duge
from duge_lite import baselines
from duge_lite.evaluation import sequence_metrics
from duge_lite.lessons import DUGE, Objective
from duge_lite.plot import Plot
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
SEEDS = (0, 1)
UCE, AT_ONCE, ORACLE = "UCE", "all at once", "oracle"


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
        "DUGE, previous": (replace(c, reference="previous", anchor="previous"), DUGE),
        "DUGE, fisher": (replace(c, regularizer="fisher"), DUGE),
        "DUGE, protected words": (replace(c, protect=0.99), DUGE),
        "DUGE, merged": (replace(c, merge=True), DUGE),
        AT_ONCE: (c, DUGE),
        "ESD-x": (plain, baselines.esd()),
        "concept ablation": (plain, baselines.concept_ablation("star")),
        "gradient ascent": (replace(plain, lr=1e-4), baselines.gradient_ascent()),
        UCE: (c, DUGE),
        ORACLE: (c, DUGE),
    }


def forget(pipe, name: str, requests: tuple[str, ...], seed: int, folder: Path) -> UnlearningSequence:
    """The sequence of models; a single one for what knows no order."""
    config, objective = settings()[name]
    config = replace(config, seed=seed)
    if name == AT_ONCE:
        n = len(requests)
        whole = {"iterations": n * config.iterations, "target_size": n * config.target_size}
        config = replace(config, revisit=(n - 1) / n, lessons=n * config.lessons, **whole)
        *earlier, last = requests
        run = unlearn(pipe, last, config, objective=objective, earlier=earlier, progress=False)
        sequence = UnlearningSequence(pipe, config, run.before)
        sequence.append(run)
        return sequence
    if name != UCE:
        return unlearn_sequence(pipe, requests, config, folder, objective, progress=False)
    card, sequence = duge.model_card(pipe), None
    for k, concept in enumerate(requests):
        kept = [c for c in card.forgettable if c not in requests[: k + 1]]
        run = baselines.uce(pipe, concept, preserve=kept)
        sequence = sequence or UnlearningSequence(pipe, config, run.before)
        sequence.append(run)
    return sequence


def accuracies(pipe, judge: duge.Judge, images: int) -> pd.Series:
    with torch.autocast(pipe.device.type, torch.bfloat16):
        return duge.evaluate(pipe, duge.model_card(pipe).forgettable, images, judge=judge, steps=10).accuracy


def measure(
    name: str, requests: tuple[str, ...], seed: int, folder: Path, judge: duge.Judge, images: int
) -> dict:
    pipe = duge.load_pipeline()
    card = duge.model_card(pipe)
    if name == ORACLE:
        rows = [accuracies(p, judge, images) for p in (pipe, duge.load_oracle(pipe, "final"))]
        costs, quality = {}, pd.DataFrame(columns=["KID", "CLIP"], index=range(2))
    else:
        started = time.process_time()
        sequence = forget(pipe, name, requests, seed, folder)
        costs = {"cpu": time.process_time() - started, "seconds": sequence.costs().seconds.round(1).tolist()}
        rows = [accuracies(sequence.pipeline(at=k), judge, images) for k in range(len(sequence.runs) + 1)]
        stay = [c for c in card.concepts if c not in requests]
        with torch.autocast(pipe.device.type, torch.bfloat16):
            quality = sequence.quality(stay, images, steps=10, judge=judge)
    matrix = pd.DataFrame(rows[:1] * (len(requests) + 1 - len(rows)) + rows)  # one model for all: the last
    metrics = sequence_metrics(matrix, requests, card).tail(len(rows) - 1)
    for column in quality:
        metrics[column] = quality[column].tolist()[1:]
    about = {"KID of the base": quality.KID[0], "CLIP of the base": quality.CLIP[0]} | costs
    table = {c: column.tolist() for c, column in matrix.items()}
    return about | {"matrix": table, "metrics": json.loads(metrics.reset_index().to_json(orient="records"))}


def oracle() -> bool:
    return (duge.data_dir() / "doodle-oracle-final").is_dir()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summarise(path: Path) -> None:
    """Prints the metrics after the last request (mean over orders and seeds); draws them over requests."""
    rows = [{"setting": c["setting"], **row} for c in read(path) for row in c["metrics"]]
    if not rows:
        return
    frame = pd.DataFrame(rows)
    measures = ["UA", "IRA", "CRA", "HM", "revival", "forgetting", "KID", "CLIP"]
    means = frame.groupby(["setting", "after"], sort=False)[measures].mean()
    last = means.groupby(level="setting", sort=False).tail(1).reset_index("after")
    print(last.round(3).to_string())
    last.round(4).to_csv(path.with_suffix(".csv"))
    figure = Plot(figsize=(11, 3.4), dpi=100, layout="constrained")
    for axes, measure in zip(figure.subplots(1, 4, sharey=True), measures, strict=False):
        for i, (name, part) in enumerate(means.groupby(level="setting", sort=False)):
            after = part.index.get_level_values("after")
            ours = name.startswith("DUGE")
            axes.plot(
                after, part[measure], "-" if ours else "--", marker="os^vDP*X<>h"[i % 11], ms=4, label=name
            )
        axes.set(title=measure, xlabel="requests", ylim=(-0.03, 1.03))
        axes.grid(alpha=0.25)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle("One concept after another: what is gone (UA) and what is left (IRA, CRA)", fontsize=11)
    path.with_suffix(".png").write_bytes(figure.png())


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
    args.out.parent.mkdir(parents=True, exist_ok=True)
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
    for name, requests, seed in [] if args.table else cells:
        needless = name == ORACLE and (seed != SEEDS[0] or requests[0] != ORDERS[0][0] or not oracle())
        if (name, requests, seed) in done or needless:
            continue
        started = time.perf_counter()
        folder = args.out.with_suffix(".work") / f"{name} {requests[0]} {len(requests)} {seed}".replace(
            " ", "-"
        )
        cell = {"setting": name, "requests": requests, "seed": seed, "images": args.images}
        cell |= measure(name, requests, seed, folder, judge, args.images)
        with args.out.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{name}, {requests[0]} first, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    summarise(args.out)


if __name__ == "__main__":
    main()
