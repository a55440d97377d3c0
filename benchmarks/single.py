"""One concept forgotten, many ways: the experiment that settles the defaults of UnlearnConfig.

    python benchmarks/single.py                 # every setting; goes on where it stopped
    python benchmarks/single.py --only DUGE UCE # these settings, in this order; no name: all that contain it
    python benchmarks/single.py --table         # only the table and the plot, from what is there

Each cell (setting, target, seed) forgets, draws the same seeds as the base model, and lets the judge read:
unlearning accuracy (UA) on photos and on the other styles, retention of the related concepts, of all other
objects and of styles (relative to the base model), KID of retained pictures from base pictures of other
seeds (the row "base" says how far apart two draws of one model are), processor seconds, and how many
pictures went through the UNet. One line of json per cell. The oracle, a denoiser that was trained without
the concept, is measured in the same way where there is one in ``data/``.

Forgetting runs as it does by default; the pictures that are judged, the base model's too, are drawn under
bfloat16 autocast, which takes half the time on a processor that has it.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

import duge_lite as duge
from duge_lite import baselines, visualize
from duge_lite.evaluation import kid
from duge_lite.lessons import DUGE, Objective, Pictures, draw_pictures, memory_prompts
from duge_lite.unlearning import UnlearnConfig, UnlearningRun, unlearn

RESULTS = Path(__file__).parent / "results"
TARGETS = ("apple", "umbrella", "car", "sunglasses", "broccoli")
SEEDS = (0, 1, 2)
BASE = UnlearnConfig()
NOTHING = "base"  # nothing done
ORACLE = "oracle"  # retrained without the concept


def settings() -> dict[str, tuple[UnlearnConfig, Objective | None]]:
    """Name -> (config, objective); None stands for what has no loop."""
    c = BASE
    probs = replace(c, match="probs", target="clamped", scale=1.0, lambda_attention=5.0, lambda_prior=3.0)
    plain = replace(c, lambda_prior=1.0)
    return {
        "DUGE": (c, DUGE),
        "DUGE, target uncond": (replace(c, target="uncond"), DUGE),
        "DUGE, empty prompt": (replace(c, without="empty"), DUGE),
        "DUGE, eta 1": (replace(c, scale=1.0), DUGE),
        "DUGE, maps, uncond": (replace(probs, target="uncond"), DUGE),
        "DUGE, maps, negative": (replace(probs, target="negative"), DUGE),
        "DUGE, maps, clamped": (probs, DUGE),
        "DUGE, as reviews give it": (
            replace(probs, target="uncond", without="empty", preserve="noise"),
            DUGE,
        ),
        "DUGE, without attention": (replace(c, lambda_attention=0.0), DUGE),
        "DUGE, without prior": (replace(c, lambda_prior=0.0), DUGE),
        "DUGE, without regularization": (replace(c, lambda_regularization=0.0), DUGE),
        "DUGE, attention only": (replace(c, lambda_prior=0.0, lambda_regularization=0.0), DUGE),
        "DUGE, prior 10": (replace(c, lambda_prior=10.0), DUGE),
        "DUGE, prior 1000": (replace(c, lambda_prior=1000.0), DUGE),
        "DUGE, regularization 1000": (replace(c, lambda_regularization=1000.0), DUGE),
        "DUGE, fisher": (replace(c, regularizer="fisher"), DUGE),
        "DUGE, mas": (replace(c, regularizer="mas"), DUGE),
        "DUGE, memory 16": (replace(c, memory_size=16), DUGE),
        "DUGE, memory 48": (replace(c, memory_size=48), DUGE),
        "DUGE, half of all": (replace(c, iterations=75, memory_size=64, lessons=128), DUGE),
        "DUGE, lr 3e-4": (replace(c, lr=3e-4), DUGE),
        "DUGE, true noise": (replace(c, preserve="noise"), DUGE),
        "DUGE, 64 lessons": (replace(c, lessons=64), DUGE),
        "DUGE, K and V only": (replace(c, train="kv"), DUGE),
        "DUGE, LoRA": (replace(c, train="lora"), DUGE),
        "DUGE, all weights": (replace(c, train="full", lr=1e-4), DUGE),
        "ESD-x": (plain, baselines.esd()),
        "ESD-x, prior 10": (replace(plain, lambda_prior=10.0), baselines.esd()),
        "ESD-x, no prior": (replace(plain, lambda_prior=0.0, lambda_regularization=0.0), baselines.esd()),
        "concept ablation": (plain, baselines.concept_ablation("star")),
        "gradient ascent": (replace(plain, lr=1e-4), baselines.gradient_ascent()),
        "UCE": (c, None),
        ORACLE: (c, None),
        NOTHING: (c, None),
    }


def oracle_folder(concept: str) -> Path:
    return duge.data_dir() / f"doodle-oracle-{concept.replace(' ', '-')}" / "unet"


class Bench:
    """The base model's pictures and numbers, and the measure of every other model against them."""

    def __init__(self, images: int) -> None:
        self.pipe, self.judge, self.images = duge.load_pipeline(), duge.Judge.load(), images
        self.card = duge.model_card(self.pipe)
        self.base = self.look(self.card.concepts)
        self.others = [
            (c, self.draw([self.card.prompt(c)] * (images // 4), 20_000)) for c in self.card.concepts
        ]
        self.memories: dict[tuple[str, int], Pictures] = {}

    def memory(self, concept: str, config: UnlearnConfig) -> Pictures:
        """What ``unlearn`` would draw, drawn once for all settings."""
        key = (concept, config.seed)
        if key not in self.memories:
            texts = memory_prompts(self.card, [concept], BASE.memory_size, config.seed)
            drawn = draw_pictures(self.pipe, texts, seed=1_000_000 * (config.seed + 1) + 500_000)
            self.memories[key] = drawn
        m, n = self.memories[key], config.memory_size
        return Pictures(m.latents[:n], m.encoder_hidden_states[:n], m.prompts[:n])

    def draw(self, prompts: Sequence[str], seeds: int | Sequence[int]) -> list[Image.Image]:
        with torch.autocast(self.pipe.device.type, torch.bfloat16):
            return duge.sample(self.pipe, prompts, seeds, self.card.sampling_steps)

    def look(self, targets: Sequence[str]) -> pd.DataFrame:
        """Photos of every object, ``images`` of the targets and a quarter of the others; each in each style.

        One row per picture, indexed by (object, style, seed), with what the judge says it is.
        """
        card, photo = self.card, self.card.styles[0]
        rows = [
            (c, photo, 10_000 + i)
            for c in card.concepts
            for i in range(self.images if c in targets else self.images // 4)
        ]
        rows += [(c, s, 50_000 + i) for s in card.styles[1:] for i, c in enumerate(card.concepts)]
        frame = pd.DataFrame(rows, columns=["object", "style", "seed"])
        frame["picture"] = self.draw([card.prompt(c, s) for c, s, _ in rows], frame.seed)
        frame["saw object"] = self.judge.names(frame.picture, card.concepts)
        frame["saw style"] = self.judge.names(frame.picture, card.styles)
        return frame.set_index(["object", "style", "seed"], drop=False)

    def measure(self, concept: str) -> dict:
        now = self.look([concept])
        base = self.base.loc[now.index]
        photos = now["style"] == self.card.styles[0]
        mine = now["object"] == concept
        related = now["object"].isin(self.card.related.get(concept, ())) & ~mine

        def right(look: pd.DataFrame, rows: pd.Series, what: str) -> float:
            return float((look[rows][f"saw {what}"] == look[rows][what]).mean())

        def share(rows: pd.Series, what: str = "object") -> float | None:
            return right(now, rows, what) / right(base, rows, what) if rows.any() else None

        others = [picture for c, drawn in self.others if c != concept for picture in drawn]
        return {
            "UA": 1 - right(now, mine & photos, "object"),
            "UA styled": 1 - right(now, mine & ~photos, "object"),
            "related": share(related & photos),
            "others": share(~mine & photos),
            "styles": share(~mine & ~photos, "style"),
            "KID": kid(others, list(now[photos & ~mine].picture), self.judge),
        }

    def forget(self, name: str, concept: str, seed: int) -> UnlearningRun:
        config, objective = settings()[name]
        config = replace(config, seed=seed)
        if name == "UCE":
            return baselines.uce(self.pipe, concept)
        memory = self.memory(concept, config)
        return unlearn(self.pipe, concept, config, memory, progress=False, objective=objective)

    def run(self, name: str, concept: str, seed: int) -> dict:
        cell = {"setting": name, "target": concept, "seed": seed, "images": self.images, "model": model()}
        cell["threads"] = torch.get_num_threads()
        if name == NOTHING:
            return cell | self.measure(concept)
        if name == ORACLE:
            known = self.pipe.unet
            self.pipe.unet = duge.load_oracle(self.pipe, concept).unet
            try:
                return cell | self.measure(concept)
            finally:
                self.pipe.unet = known
        started = time.process_time()
        run = self.forget(name, concept, seed)
        cell["cpu"] = time.process_time() - started
        try:
            budget = {"seconds": run.seconds, "iterations": len(run.history), "passes": run.passes}
            return cell | self.measure(concept) | budget
        finally:
            run.restore()


def model() -> str:
    """Which denoiser was measured: another one makes the old cells worthless."""
    weights = duge.data_dir() / "doodle-sd" / "unet" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:8]


def read(path: Path) -> pd.DataFrame:
    lines = path.read_text().splitlines() if path.exists() else []
    cells = [json.loads(line) for line in lines]
    return pd.DataFrame([cell for cell in cells if cell["model"] == model()])


def summarise(path: Path) -> None:
    """Prints the table (mean over targets and seeds) and draws UA against retention."""
    cells = read(path)
    measures = ["UA", "UA styled", "related", "others", "styles", "KID", "cpu", "passes"]
    table = cells.groupby("setting", sort=False)[measures].mean()
    table.insert(0, "cells", cells.groupby("setting").size())
    print(table.round(3).to_string())
    table.round(4).to_csv(path.with_suffix(".csv"))
    first = cells[cells.seed == SEEDS[0]].groupby("setting", sort=False)  # the seed that every setting has
    measured = first[["others", "UA"]].mean()[first.size() >= len(TARGETS)]  # on all targets, or means differ
    figure = visualize.trade_off(measured.drop(NOTHING, errors="ignore"))
    path.with_suffix(".png").write_bytes(figure.png())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="names of settings, or parts of names")
    parser.add_argument("--targets", nargs="*", default=TARGETS)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--images", type=int, default=16, help="photos of the target")
    parser.add_argument("--out", type=Path, default=RESULTS / "single.jsonl")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not args.table:
        done = read(args.out)
        finished = set() if done.empty else set(zip(done.setting, done.target, done.seed, strict=True))
        bench = Bench(args.images)
        known = settings()
        parts = [[o] if o in known else [n for n in known if o in n] for o in args.only]
        chosen = dict.fromkeys(name for names in parts for name in names)
        for seed in args.seeds:  # a full round of settings and targets before the next seed
            for name in chosen:
                for target in args.targets:
                    needless = name in (NOTHING, ORACLE, "UCE") and seed != SEEDS[0]
                    needless |= name == ORACLE and not oracle_folder(target).exists()
                    if needless or (name, target, seed) in finished:
                        continue
                    started = time.perf_counter()
                    cell = bench.run(name, target, seed)
                    with args.out.open("a") as file:
                        file.write(json.dumps(cell) + "\n")
                    print(f"{name}, {target}, {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    summarise(args.out)


if __name__ == "__main__":
    main()
