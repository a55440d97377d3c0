"""What the benchmarks share: the methods, a folder of cells that can be gone on with, what a judge counts.

Judged pictures are drawn in ten steps of DPM-Solver++ under bfloat16 autocast (two thirds of the time on a
processor that has it); forgetting runs as it does by default.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import duge_lite as duge
from duge_lite import baselines, figures
from duge_lite.evaluation import wilson_interval
from duge_lite.gradient import DUGE, Objective

RESULTS = Path(__file__).parent / "results"
STEPS, BASE, ORACLE = 10, "base", "oracle"
OURS, GRADIENT = "ours (DUGE's losses, solved)", "DUGE's losses, by gradient"
SILENCE = "ours (DUGE's losses, silence too)"
QUICK = (OURS, "UCE", "UCE, styled")  # that take seconds: timed in turns, and asked for most of the objects


@dataclass(frozen=True)
class Method:
    """How one row of the tables forgets: by the settings of ours or of a baseline's, or UCE."""

    objective: Objective = DUGE
    config: duge.UnlearnConfig | None = None
    uce: Mapping[str, object] | None = None

    @property
    def slow(self) -> bool:
        return self.config is not None and self.config.solver == "gradient"

    def forget(self, pipe, concepts: str | Sequence[str], seed: int) -> duge.UnlearningRun:
        if self.uce is not None:  # one concept or several at once, as it is published; no lots are drawn
            return baselines.uce(pipe, concepts, **self.uce)
        config = replace(self.config, seed=seed)
        return duge.unlearn(pipe, concepts, config, objective=self.objective, progress=False)


LEARNED = duge.UnlearnConfig(solver="gradient", instead="nameless", eta=0.5)
ESD, PLAIN_ESD = baselines.esd()
METHODS = {  # ours, and each baseline as published and in a small sweep of its settings
    OURS: Method(DUGE, duge.UnlearnConfig()),
    SILENCE: Method(DUGE, duge.UnlearnConfig(lambda_silence=1.0)),
    "solved, values": Method(DUGE, duge.UnlearnConfig(solve="values", eta=0.0)),
    "solved, nameless": Method(DUGE, duge.UnlearnConfig(instead="nameless", eta=0.5)),
    "solved, star": Method(DUGE, duge.UnlearnConfig(instead="star")),
    GRADIENT: Method(DUGE, LEARNED),
    "  without attention": Method(DUGE, replace(LEARNED, lambda_attention=0.0)),
    "  without prior": Method(DUGE, replace(LEARNED, lambda_prior=0.0)),
    "  without regularization": Method(DUGE, replace(LEARNED, lambda_regularization=0.0)),
    "UCE": Method(uce={}),
    "UCE, ridge 0.1": Method(uce={"ridge": 0.1}),
    "UCE, styled": Method(uce={"styled": True}),
    "UCE, styled, ridge 0.1": Method(uce={"styled": True, "ridge": 0.1}),
    "UCE, styled, ridge 0.01": Method(uce={"styled": True, "ridge": 0.01}),
    "ESD-x": Method(ESD, PLAIN_ESD),
    "ESD-x, lr 3e-4": Method(ESD, replace(PLAIN_ESD, lr=3e-4)),
    "ESD-x, prior 1": Method(ESD, replace(PLAIN_ESD, lambda_prior=1.0)),
    "concept ablation": Method(*baselines.concept_ablation("star")),
    "concept ablation, prior 1": Method(*baselines.concept_ablation("star", 1.0)),
    "concept ablation, nearest": Method(*baselines.concept_ablation("nearest", 1.0)),
    "gradient ascent": Method(*baselines.gradient_ascent()),
    ORACLE: Method(),
    BASE: Method(),
}
SWEPT = {"ESD-x", "ESD-x, lr 3e-4", "concept ablation", "concept ablation, prior 1", "gradient ascent"}
SWEPT |= {"solved, values", "UCE, ridge 0.1", "UCE, styled, ridge 0.1"}
SWEPT |= {name for name in METHODS if name.startswith("  ")}
"""Settings that are not their method's best: those that learn run on the apple alone, none in sequences."""


@cache
def digest(*files: str) -> str:
    return hashlib.sha256(b"".join((duge.data_dir() / f).read_bytes() for f in files)).hexdigest()[:8]


def model(key: Sequence = ()) -> str:
    """The weights that a cell is drawn with: the denoiser's; in an oracle's cells both oracles', too."""
    models = ["sd", "oracle-apple", "oracle-final"] if ORACLE in key else ["sd"]
    return digest(*(f"doodle-{m}/unet/diffusion_pytorch_model.safetensors" for m in models))


JUDGE = digest("doodle-judge/model.safetensors", "doodle-judge/config.json")


def draw(pipe, prompts: Sequence[str], seeds: Sequence[int], **how: object) -> np.ndarray:
    """(n, 64, 64, 3)."""
    with torch.autocast(pipe.device.type, torch.bfloat16):
        return np.stack(duge.sample(pipe, prompts, list(seeds), STEPS, **how))


def look(pipe, rows: pd.DataFrame, again: pd.Series | None = None) -> np.ndarray:
    """A picture per row's prompt and seed; those of ``again`` once more, from other noise, at the end."""
    if again is not None:
        rows = pd.concat([rows, rows[again].assign(seed=rows.seed + 100_000)])
    return draw(pipe, list(rows.prompt), rows.seed)


def timed(action: Callable) -> tuple:
    """Processor seconds, on CUDA those of the clock, and what came out."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started, found = clock(), action()
    return clock() - started, found


class Cells:
    """Finished cells: a line of json each in ``results``; their pictures in the folder ``.work`` beside it.

    A script says what a cell holds, ``cell(*key)``: numbers (``cpu``: processor seconds of forgetting) and
    pictures; and what the judge says of them, ``measure(key, pictures)``: another one needs no new drawing.
    """

    def __init__(self, name: str) -> None:
        self.path, self.work = RESULTS / f"{name}.jsonl", RESULTS / f"{name}.work"
        self.work.mkdir(exist_ok=True)
        self.judge, self.card = duge.Judge.load(), duge.model_card(duge.load_pipeline())

    def lines(self) -> dict[tuple, dict]:
        """The cells of today's weights, by key; what a judge said of one stands in a later line."""
        text, cells = self.path.read_text().splitlines() if self.path.exists() else [], {}
        for line in map(json.loads, text):
            key = tuple(line["key"])
            if line["model"] == model(key):
                cells[key] = cells.get(key, {}) | line
        return cells

    def file(self, key: tuple) -> Path:
        return self.work / (hashlib.sha256(json.dumps([*key, model(key)]).encode()).hexdigest()[:16] + ".npz")

    def pictures(self, key: tuple) -> np.ndarray:
        return np.load(self.file(key))["pictures"]

    def add(self, key: tuple, numbers: dict) -> None:
        with self.path.open("a") as file:  # a line at once: another process may append, too
            file.write(json.dumps({"key": key, "model": model(key), **numbers}) + "\n")

    def fill(self, key: tuple, shown: bool = False) -> None:
        """Works out a cell that has no line, or (``shown``) no pictures here; and the ``seconds`` it took."""
        if key in self.lines() and (self.file(key).exists() or not shown):
            return
        started = time.perf_counter()
        numbers, pictures = self.cell(*key)
        if len(pictures):
            np.savez_compressed(self.file(key), pictures=pictures)
        self.add(key, numbers | {"seconds": (seconds := round(time.perf_counter() - started, 1))})
        print(f"{key}: {seconds} s", flush=True)

    def read(self) -> list[dict]:
        """All cells with what was measured of their pictures; anew when the judge is another one."""
        for key, cell in self.lines().items():
            if cell.get("judge") != JUDGE and self.file(key).exists():
                self.add(key, self.measure(key, self.pictures(key)) | {"judge": JUDGE})
        return [c for c in self.lines().values() if c.get("judge", JUDGE) == JUDGE]

    def publish(self, table: pd.DataFrame, figure: figures.Plot, cells: list[dict], name: str = "") -> None:
        """Prints a table, writes it and its figure, and says how long its cells took."""
        path = RESULTS / f"{name or self.path.stem}.csv"
        with pd.option_context("display.width", 250, "display.max_columns", 50, "display.max_colwidth", 60):
            print(table.round(3).to_string())
        table.round(4).to_csv(path)
        path.with_suffix(".png").write_bytes(figure.png())
        took = [c["seconds"] for c in cells if "seconds" in c]
        print(f"{sum(took) / 60:.0f} minutes in all, of {len(took)} of {len(cells)} cells")


def interval(hits: float, count: int) -> str:
    low, high = wilson_interval(round(hits), int(count))
    return f"{hits / count:.3f} ({low:.2f}-{high:.2f}, n={int(count)})"


def arguments(about: str, *flags: str, rows: Iterable[str] = METHODS) -> argparse.Namespace:
    """What a script was told; ``rows`` are those that it runs if it is not told which."""
    torch.manual_seed(0)
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", help="rows, by how their names begin")
    for flag in ("table", *flags):
        parser.add_argument(f"--{flag}", action="store_true")
    asked = parser.parse_args()
    asked.rows = [n for n in METHODS if n.startswith(tuple(asked.only))] if asked.only else [*rows]
    return asked
