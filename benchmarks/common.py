"""What the benchmarks share: the methods, a folder of cells that can be gone on with, what a judge counts.

A cell is drawn once: its pictures lie in ``results/*.work`` (not in git). Numbers are read from them, so that
another judge needs no new drawing. Judged pictures are drawn in ten steps of DPM-Solver++ under bfloat16
autocast (two thirds of the time on a processor that has it); forgetting runs as it does by default.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

import duge_lite as duge
from duge_lite import baselines
from duge_lite.concepts import UnlearnConfig
from duge_lite.evaluation import wilson_interval
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
    def exact(self) -> bool:
        return self.uce is None and self.config is not None and self.config.solver == "exact"

    @property
    def slow(self) -> bool:
        return self.config is not None and self.config.solver == "gradient"

    def forget(
        self, pipe, concepts: str | Sequence[str], seed: int, gone: Sequence[str] = ()
    ) -> UnlearningRun:
        """``gone``: what went before. UCE solves for one concept or several at once, as it is published."""
        if self.uce is None:
            config = replace(self.config, seed=seed)
            return duge.unlearn(pipe, concepts, config, objective=self.objective, progress=False)
        names = [concepts] if isinstance(concepts, str) else list(concepts)
        kept = [c for c in duge.model_card(pipe).forgettable if c not in (*gone, *names)]
        return baselines.uce(pipe, concepts, preserve=kept, **self.uce)


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
    known = methods()
    names = [[o] if o in known else [n for n in known if n.startswith(o)] for o in only or [""]]
    return {name: known[name] for group in names for name in group}


def digest(*folders: str) -> str:
    """Which weights were used: other ones make old cells worthless."""
    files = (duge.data_dir() / f for f in folders)
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:8]


def model() -> str:
    return digest("doodle-sd/unet/diffusion_pytorch_model.safetensors")


def judge_id() -> str:
    return digest("doodle-judge/model.safetensors", "doodle-judge/config.json")


def draw(pipe, prompts: Sequence[str], seeds: Sequence[int], **how: object) -> np.ndarray:
    """(n, 64, 64, 3)."""
    with torch.autocast(pipe.device.type, torch.bfloat16):
        return np.stack([np.asarray(p) for p in duge.sample(pipe, prompts, list(seeds), STEPS, **how)])


def images(pictures: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(p) for p in pictures]


class Cells:
    """Finished cells: a line of json each in ``path``; their pictures in the folder ``.work`` beside it."""

    def __init__(self, path: Path) -> None:
        self.path, self.work = path, path.with_suffix(".work")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)

    def lines(self) -> dict[tuple, dict]:
        """The cells of today's model, by key; what a judge said of one stands in a later line."""
        text, cells = self.path.read_text().splitlines() if self.path.exists() else [], {}
        for line in map(json.loads, text):
            if line["model"] == model():
                cells[tuple(line["key"])] = cells.get(tuple(line["key"]), {}) | line
        return cells

    def __contains__(self, key: Sequence) -> bool:
        return tuple(key) in self.lines()

    def file(self, key: Sequence) -> Path:
        return self.work / (hashlib.sha256(json.dumps([*key, model()]).encode()).hexdigest()[:16] + ".npz")

    def add(self, key: Sequence, cost: Mapping[str, object], pictures: np.ndarray | None = None) -> None:
        """A finished cell; what is measured on its pictures comes later."""
        if pictures is not None:
            np.savez_compressed(self.file(key), pictures=pictures)
        with self.path.open("a") as file:  # a line at once: another process may append, too
            file.write(json.dumps({"key": list(key), "model": model(), **cost}) + "\n")

    def read(self, measure: Callable[[tuple, np.ndarray], dict]) -> list[dict]:
        """All cells with what ``measure`` says of their pictures; read anew when the judge is another one."""
        for key, cell in self.lines().items():
            if cell.get("judge") != judge_id() and self.file(key).exists():
                pictures = np.load(self.file(key))["pictures"]
                self.add(key, measure(key, pictures) | {"judge": judge_id()})
        return [c for c in self.lines().values() if c.get("judge", judge_id()) == judge_id()]


def interval(hits: float, count: int) -> str:
    low, high = wilson_interval(round(hits), int(count))
    return f"{hits / count:.3f} ({low:.2f}-{high:.2f}, n={int(count)})"


def cpu(action: Callable[[], object]) -> float:
    """Processor seconds; on CUDA those of the clock."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


def table(frame: pd.DataFrame, path: Path) -> None:
    """Prints a table and writes it beside the cells."""
    with pd.option_context("display.width", 250, "display.max_columns", 50, "display.max_colwidth", 60):
        print(frame.round(3).to_string())
    frame.round(4).to_csv(path)
