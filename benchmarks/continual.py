"""One concept after another: ten objects and two styles, many ways, two orders, two seeds.

    python benchmarks/continual.py                 # everything; goes on where it stopped
    python benchmarks/continual.py --only DUGE     # settings whose name contains a text
    python benchmarks/continual.py --requests 6    # shorter sequences
    python benchmarks/continual.py --table         # only the table and the figures, from what is there

Each cell (setting, order, seed) forgets the whole sequence; then the judge reads every model along the way
on the same seeds, and the accuracy matrix becomes UA, IRA, CRA and their harmonic mean. One line of json per
cell. Half-done sequences are kept in ``results/continual.work`` until their line is written.
"""

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

import duge_lite as duge
from duge_lite import baselines
from duge_lite.lessons import DUGE, Objective
from duge_lite.plot import Plot
from duge_lite.sequence import UnlearningSequence, unlearn_sequence
from duge_lite.unlearning import UnlearnConfig

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
UCE = "UCE"


def settings() -> dict[str, tuple[UnlearnConfig, Objective]]:
    """Name -> (config, objective); UCE has no loop, and ignores both."""
    c = UnlearnConfig()
    plain = replace(c, lambda_prior=1.0, revisit=0.0)
    return {
        "DUGE": (c, DUGE),
        "DUGE, without attention": (replace(c, lambda_attention=0.0), DUGE),
        "DUGE, without prior": (replace(c, lambda_prior=0.0), DUGE),
        "DUGE, without regularization": (replace(c, lambda_regularization=0.0), DUGE),
        "DUGE, without revisits": (replace(c, revisit=0.0), DUGE),
        "DUGE, previous": (replace(c, reference="previous", anchor="previous"), DUGE),
        "DUGE, fisher": (replace(c, regularizer="fisher"), DUGE),
        "ESD-x": (plain, baselines.esd()),
        "concept ablation": (plain, baselines.concept_ablation("star")),
        "gradient ascent": (replace(plain, lr=1e-4), baselines.gradient_ascent()),
        UCE: (c, DUGE),
    }


def forget(pipe, name: str, requests: tuple[str, ...], seed: int, folder: Path) -> UnlearningSequence:
    config, objective = settings()[name]
    if name != UCE:
        config = replace(config, seed=seed)
        return unlearn_sequence(pipe, requests, config, folder, objective, progress=False)
    card, sequence = duge.model_card(pipe), None
    for k, concept in enumerate(requests):
        kept = [c for c in card.forgettable if c not in requests[: k + 1]]
        run = baselines.uce(pipe, concept, preserve=kept)
        sequence = sequence or UnlearningSequence(pipe, config, run.before)
        sequence.append(run)
    return sequence


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summarise(path: Path) -> None:
    """Prints the metrics after the last request (mean over orders and seeds); draws them over requests."""
    rows = [{"setting": c["setting"], **row} for c in read(path) for row in c["metrics"]]
    if not rows:
        return
    frame = pd.DataFrame(rows)
    measures = ["UA", "IRA", "CRA", "HM", "revival", "forgetting"]
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
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--requests", type=int, default=len(ORDERS[0]) + len(STYLES))
    parser.add_argument("--images", type=int, default=5, help="pictures per concept and model")
    parser.add_argument("--out", type=Path, default=RESULTS / "continual.jsonl")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = {(c["setting"], tuple(c["requests"]), c["seed"]) for c in read(args.out)}
    cells = [
        (name, (*order, *STYLES)[: args.requests], seed)
        for seed in SEEDS
        for order in ORDERS
        for name in settings()
        if args.only in name
    ]
    judge = duge.Judge.load()
    for name, requests, seed in [] if args.table else cells:
        if (name, requests, seed) in done:
            continue
        started = time.perf_counter()
        folder = args.out.with_suffix(".work") / f"{name} {requests[0]} {len(requests)} {seed}".replace(
            " ", "-"
        )
        sequence = forget(duge.load_pipeline(), name, requests, seed, folder)
        matrix = sequence.matrix(images=args.images, steps=10, judge=judge)
        cell = {"setting": name, "requests": requests, "seed": seed, "images": args.images}
        cell["seconds"] = sequence.costs().seconds.round(1).tolist()
        cell["matrix"] = {c: column.tolist() for c, column in matrix.items()}
        cell["metrics"] = json.loads(sequence.metrics(matrix).reset_index().to_json(orient="records"))
        with args.out.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{name}, {requests[0]} first, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    summarise(args.out)


if __name__ == "__main__":
    main()
