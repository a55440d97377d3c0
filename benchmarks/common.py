"""What the benchmarks share: the methods, a folder of cells that can be gone on with, what a judge counts.

A cell is drawn once: its pictures lie in ``results/*.work`` (not in git). Numbers are read from them, so that
another judge needs no new drawing. Judged pictures are drawn in ten steps of DPM-Solver++ under bfloat16
autocast (two thirds of the time on a processor that has it); forgetting runs as it does by default. ``cpu``
are the processor seconds of forgetting, or of an attack; ``seconds`` those of the clock, drawing too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

import duge_lite as duge
from duge_lite import baselines
from duge_lite.config import UnlearnConfig
from duge_lite.evaluation import wilson_interval
from duge_lite.figures import Plot
from duge_lite.gradient import DUGE, Objective
from duge_lite.unlearning import UnlearningRun

RESULTS = Path(__file__).parent / "results"
STEPS = 10
BASE, ORACLE = "base", "oracle"
OURS, GRADIENT = "ours (DUGE's losses, solved)", "DUGE's losses, by gradient"
BEST = (GRADIENT, "ESD-x, prior 1", "concept ablation, nearest")
"""Of each method that learns by gradient the row that runs on every target; other rows run on the apple."""


@dataclass(frozen=True)
class Method:
    """How one row of the tables forgets: by the settings of ours or of a baseline's, or UCE."""

    config: UnlearnConfig | None = None
    objective: Objective = DUGE
    uce: Mapping[str, object] | None = None

    @property
    def slow(self) -> bool:
        return self.config is not None and self.config.solver == "gradient"

    def forget(self, pipe, concepts: str | Sequence[str], seed: int) -> UnlearningRun:
        if self.uce is not None:  # one concept or several at once, as it is published; no lots are drawn
            return baselines.uce(pipe, concepts, **self.uce)
        config = replace(self.config, seed=seed)
        return duge.unlearn(pipe, concepts, config, objective=self.objective, progress=False)


def methods() -> dict[str, Method]:
    """Every row: ours, and each baseline as published and in a small sweep of its settings."""

    def of(pair: tuple[Objective, UnlearnConfig], **changes: object) -> Method:
        return Method(replace(pair[1], **changes), pair[0])

    gradient = UnlearnConfig(solver="gradient", instead="nameless", eta=0.5)
    esd, star = baselines.esd(), baselines.concept_ablation("star")
    return {
        OURS: Method(UnlearnConfig()),
        "solved, values": Method(UnlearnConfig(solve="values", eta=0.0)),
        "solved, nameless": Method(UnlearnConfig(instead="nameless", eta=0.5)),
        "solved, star": Method(UnlearnConfig(instead="star")),
        GRADIENT: Method(gradient),
        "  without attention": Method(replace(gradient, lambda_attention=0.0)),
        "  without prior": Method(replace(gradient, lambda_prior=0.0)),
        "  without regularization": Method(replace(gradient, lambda_regularization=0.0)),
        "UCE": Method(uce={}),
        "UCE, ridge 0.1": Method(uce={"ridge": 0.1}),
        "UCE, styled": Method(uce={"styled": True}),
        "UCE, styled, ridge 0.1": Method(uce={"styled": True, "ridge": 0.1}),
        "UCE, styled, ridge 0.01": Method(uce={"styled": True, "ridge": 0.01}),
        "ESD-x": of(esd),
        "ESD-x, lr 3e-4": of(esd, lr=3e-4),
        "ESD-x, prior 1": of(esd, lambda_prior=1.0),
        "concept ablation": of(star),
        "concept ablation, prior 1": of(star, lambda_prior=1.0),
        "concept ablation, nearest": of(star, lambda_prior=1.0, instead="nearest"),
        "gradient ascent": of(baselines.gradient_ascent()),
        ORACLE: Method(),
        BASE: Method(),
    }


def chosen(only: Sequence[str] | None) -> dict[str, Method]:
    """The methods of these names, or with names that begin so; all of them by default."""
    known, asked = methods(), only or [""]
    return {n: known[n] for o in asked for n in known if n == o or (o not in known and n.startswith(o))}


@cache
def digest(*files: str) -> str:
    """Which weights were used: other ones make old cells worthless."""
    return hashlib.sha256(b"".join((duge.data_dir() / f).read_bytes() for f in files)).hexdigest()[:8]


def oracle(key: Sequence) -> str:
    """Which oracle draws a cell: the one that never saw an apple, or the one without any of the twelve."""
    return "final" if {"12 requests", "after twelve"} & set(key) else "apple"


def model(key: Sequence = ()) -> str:
    """The weights that a cell is drawn with; the oracle's cells name its own, too."""
    weights = "unet/diffusion_pytorch_model.safetensors"
    own = digest(f"doodle-sd/{weights}")
    return f"{own}-{digest(f'doodle-oracle-{oracle(key)}/{weights}')}" if ORACLE in key else own


def judge_id() -> str:
    return digest("doodle-judge/model.safetensors", "doodle-judge/config.json")


def draw(pipe, prompts: Sequence[str], seeds: Sequence[int], **how: object) -> np.ndarray:
    """(n, 64, 64, 3)."""
    with torch.autocast(pipe.device.type, torch.bfloat16):
        return np.stack([np.asarray(p) for p in duge.sample(pipe, prompts, list(seeds), STEPS, **how)])


def look(pipe, rows: pd.DataFrame, again: pd.Series | None = None) -> np.ndarray:
    """A picture per row's prompt and seed; those of ``again`` once more, from other noise, at the end."""
    if again is not None:
        rows = pd.concat([rows, rows[again].assign(seed=rows.seed + 100_000)])
    return draw(pipe, list(rows.prompt), rows.seed)


def images(pictures: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(p) for p in pictures]


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, on CUDA those of the clock, and what came out."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    found = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started, found


class Cells:
    """Finished cells: a line of json each in ``path``; their pictures in the folder ``.work`` beside it."""

    def __init__(self, path: Path) -> None:
        self.path, self.work = path, path.with_suffix(".work")
        self.work.mkdir(parents=True, exist_ok=True)

    def lines(self) -> dict[tuple, dict]:
        """The cells of today's weights, by key; what a judge said of one stands in a later line."""
        text, cells = self.path.read_text().splitlines() if self.path.exists() else [], {}
        for line in map(json.loads, text):
            key = tuple(line["key"])
            if line["model"] == model(key):
                cells[key] = cells.get(key, {}) | line
        return cells

    def file(self, key: Sequence) -> Path:
        return self.work / (hashlib.sha256(json.dumps([*key, model(key)]).encode()).hexdigest()[:16] + ".npz")

    def pictures(self, key: Sequence) -> np.ndarray:
        return np.load(self.file(key))["pictures"]

    def add(self, key: Sequence, numbers: Mapping[str, object]) -> None:
        with self.path.open("a") as file:  # a line at once: another process may append, too
            file.write(json.dumps({"key": list(key), "model": model(key), **numbers}) + "\n")

    def fill(self, key: Sequence, work: Callable[[], tuple[dict, np.ndarray]], shown: bool = False) -> None:
        """Works out a cell, its numbers and pictures, that has no line, or (``shown``) no pictures here."""
        if tuple(key) in self.lines() and (self.file(key).exists() or not shown):
            return
        started = time.perf_counter()
        numbers, pictures = work()
        if len(pictures):
            np.savez_compressed(self.file(key), pictures=pictures)
        seconds = round(time.perf_counter() - started, 1)
        self.add(key, {**numbers, "seconds": seconds})
        print(f"{key}: {seconds} s", flush=True)

    def read(self, measure: Callable[[tuple, np.ndarray], dict]) -> list[dict]:
        """All cells with what ``measure`` says of their pictures; read anew when the judge is another one."""
        for key, cell in self.lines().items():
            if cell.get("judge") != judge_id() and self.file(key).exists():
                self.add(key, measure(key, self.pictures(key)) | {"judge": judge_id()})
        return [c for c in self.lines().values() if c.get("judge", judge_id()) == judge_id()]


def interval(hits: float, count: int) -> str:
    low, high = wilson_interval(round(hits), int(count))
    return f"{hits / count:.3f} ({low:.2f}-{high:.2f}, n={int(count)})"


def publish(path: Path, frame: pd.DataFrame, figure: Plot, cells: Sequence[dict]) -> None:
    """Prints a table, writes it and its figure to ``path``, and says how long its cells took."""
    with pd.option_context("display.width", 250, "display.max_columns", 50, "display.max_colwidth", 60):
        print(frame.round(3).to_string())
    frame.round(4).to_csv(path)
    path.with_suffix(".png").write_bytes(figure.png())
    took = [c["seconds"] for c in cells if "seconds" in c]
    print(f"{sum(took) / 60:.0f} minutes in all, of {len(took)} of {len(cells)} cells")


def arguments(about: str, *flags: str) -> argparse.Namespace:
    """What a script was told: which rows, whether only to print its table, and flags of its own."""
    torch.manual_seed(0)
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", help="rows, or how their names begin")
    for flag in ("table", *flags):
        parser.add_argument(f"--{flag}", action="store_true")
    return parser.parse_args()
