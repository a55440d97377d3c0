"""What is in ``data/``: measures it, and draws the pictures of README and data card.

python tools/report.py            # the numbers of the data card (--judge: the judge's alone)
python tools/report.py --figures  # the pictures (--judge: the judge's alone)
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from duge_lite import (
    Judge,
    UnlearnConfig,
    data_dir,
    evaluate,
    load_oracle,
    load_pipeline,
    sample,
    trace,
    unlearn,
)
from duge_lite.baselines import uce
from duge_lite.doodles.captions import prompt
from duge_lite.doodles.draw import BACKGROUNDS, OBJECTS, STYLES, draw, draw_scene, sample_scene
from duge_lite.doodles.unseen import UNSEEN, unseen
from duge_lite.evaluation import OTHER, wilson_interval
from duge_lite.figures import KEPT, LOST, Plot, image_grid, word_overlay
from duge_lite.widgets import before_and_after


def fresh(count: int, seed: int = 987_654_321) -> tuple[list[Image.Image], list]:
    """Drawings that no training run has seen."""
    scenes, images = [], []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        scenes.append(sample_scene(rng))
        images.append(draw_scene(scenes[-1], rng))
    return images, scenes


def judge_accuracy(judge: Judge, images: list[Image.Image], scenes: list) -> dict[str, float]:
    """Objects (what it sees is what there is, no more and no less), styles, backgrounds."""
    seen = judge.scores(images, OBJECTS) > (judge.threshold or 0.0)
    right = [set(seen.columns[row]) == set(s.objects) for row, s in zip(seen.to_numpy(), scenes, strict=True)]
    grounds = [f"{b} background" for b in BACKGROUNDS]
    return {
        "objects": float(np.mean(right)),
        "styles": float(np.mean(np.asarray(judge.names(images, STYLES)) == [s.style for s in scenes])),
        "backgrounds": float(
            np.mean(
                np.asarray(judge.names(images, grounds)) == [f"{s.background} background" for s in scenes]
            )
        ),
    }


@torch.no_grad()
def round_trip(vae: AutoencoderKL, images: list[Image.Image]) -> tuple[list[Image.Image], float]:
    """Pictures after encoding and decoding, and the mean absolute error in [-1, 1] units."""
    out, errors = [], []
    for start in range(0, len(images), 100):
        pixels = np.stack([np.asarray(i) for i in images[start : start + 100]])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, 64, 64)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        errors.append(float((x - y).abs().mean()))
        back = ((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        out += [Image.fromarray(b) for b in back]
    return out, float(np.mean(errors))


@torch.no_grad()
def zero_shot(folder: Path, images: list[Image.Image], scenes: list) -> float:
    """CLIP's accuracy in naming the object of single-object drawings by its photo prompt in that style."""
    clip, tokenizer = CLIPModel.from_pretrained(folder).float().eval(), CLIPTokenizer.from_pretrained(folder)
    single = [(i, s) for i, s in zip(images, scenes, strict=True) if len(s.objects) == 1]
    pixels = torch.from_numpy(np.stack([np.asarray(i) for i, _ in single])).permute(0, 3, 1, 2) / 127.5 - 1
    hits = 0
    for style in STYLES:
        mine = [k for k, (_, s) in enumerate(single) if s.style == style]
        texts = [prompt(o, style) for o in OBJECTS]
        ids = tokenizer(texts, padding="max_length", max_length=24, return_tensors="pt").input_ids
        best = clip(input_ids=ids, pixel_values=pixels[mine].float()).logits_per_image.argmax(dim=1)
        hits += sum(OBJECTS[b] == single[k][1].objects[0] for b, k in zip(best.tolist(), mine, strict=True))
    return hits / len(single)


def judge_rows(judge: Judge, count: int = 200) -> list[tuple[str, float, str]]:
    """How often the judge takes nothing for something, kind by kind, and how sure it is when it is right."""
    rows, all_named = [], []
    for kind in UNSEEN:
        named = judge.names(unseen(kind, count), OBJECTS)
        all_named += named
        rows.append((f"{count} {kind}: called an object", np.mean([n != OTHER for n in named]), ""))
        if kind.startswith("red"):
            rows.append((f"{count} {kind}: called an apple", named.count("apple") / count, "at most 0.02"))
    nothing = np.mean([n != OTHER for n in all_named])
    rows.append((f"these {len(all_named)} pictures of nothing: called an object", nothing, "at most 0.03"))
    return [*rows, ("expected calibration error (15 bins)", calibration_error(*confidence(judge)), "")]


def confidence(judge: Judge, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Of drawings and pictures of nothing: the likeliest object's probability, and whether it is there."""
    drawings, scenes = fresh(count * len(UNSEEN), seed=271_828)
    scores = judge.scores(drawings + [p for kind in UNSEEN for p in unseen(kind, count)], OBJECTS)
    there = [name in s.objects for name, s in zip(scores.idxmax(axis=1), scenes, strict=False)]
    temperature = getattr(judge.model.config, "calibration", {"temperature": 1.0})["temperature"]
    probability = 1 / (1 + np.exp(-scores.max(axis=1).to_numpy() / temperature))
    return probability, np.array(there + [False] * (len(scores) - len(scenes)))


def calibration_error(probability: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Mean distance of probability and share of right answers, over bins, by how full they are."""
    of = np.minimum((probability * bins).astype(int), bins - 1)
    gaps = [abs((probability[of == b] - right[of == b]).sum()) for b in range(bins)]
    return float(sum(gaps) / len(probability))


def reliability(judge: Judge, bins: int = 15) -> Plot:
    """The judge's probability for what it finds likeliest, against how often it is there."""
    probability, right = confidence(judge)
    of = np.minimum((probability * bins).astype(int), bins - 1)
    figure = Plot(figsize=(5, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    for b in sorted(set(of)):
        hits, n = int(right[of == b].sum()), int((of == b).sum())
        x = probability[of == b].mean()
        axes.vlines(x, *wilson_interval(hits, n), color=KEPT, alpha=0.5)
        axes.plot(x, hits / n, "o", color=KEPT, ms=5)
        axes.annotate(str(n), (x, hits / n), (6, -3), textcoords="offset points", fontsize=7)
    threshold = judge.model.config.calibration["threshold"]
    axes.axvline(threshold, color=LOST, linewidth=1)
    axes.text(threshold, 1.07, "threshold", color=LOST, fontsize=8, ha="center")
    axes.set(xlabel="the judge's probability of the likeliest object", ylabel="how often it is there")
    axes.set(xlim=(-0.04, 1.1), ylim=(-0.04, 1.05))
    axes.spines[["top", "right"]].set_visible(False)
    error = calibration_error(probability, right)
    figure.suptitle(
        f"Expected calibration error {error:.3f}, n = {len(right)}: numbers are pictures", fontsize=10
    )
    figure.alt = f"Reliability of the judge in {bins} bins; expected calibration error {error:.3f}."
    return figure


Judged = list[tuple[Image.Image, str]]  # a picture and what was asked for


def base_pictures(pipe: StableDiffusionPipeline) -> Judged:
    """60 of the base model: every object as a photo, and twice in another style."""
    asked = [(o, "photo") for o in OBJECTS]
    asked += [(o, STYLES[1 + (i + k) % 4]) for k in (0, 1) for i, o in enumerate(OBJECTS)]
    pictures = sample(pipe, [prompt(o, style) for o, style in asked], seed=40_000)
    return list(zip(pictures, [o for o, _ in asked], strict=True))


def forgotten_pictures(pipe: StableDiffusionPipeline) -> dict[str, Judged]:
    """Ten each of six models that forgot: their concept in every style, then five bystanders."""
    out: dict[str, Judged] = {}
    gradient = UnlearnConfig(solver="gradient")
    models = (
        ("UCE", "apple", uce),
        ("UCE", "umbrella", uce),
        ("solved", "apple", lambda p, c: unlearn(p, c, progress=False)),
        ("solved", "goldfish", lambda p, c: unlearn(p, c, progress=False)),
        ("gradient", "apple", lambda p, c: unlearn(p, c, gradient, progress=False)),
        ("gradient", "harp", lambda p, c: unlearn(p, c, gradient, progress=False)),
    )
    for k, (name, concept, forget) in enumerate(models):
        run = forget(pipe, concept)
        asked = [(concept, style) for style in STYLES]
        asked += [(o, "photo") for o in (OBJECTS * 2)[3 * k + 1 :] if o != concept][:5]
        pictures = sample(pipe, [prompt(o, style) for o, style in asked], seed=41_000 + 10 * k)
        run.restore()
        out[f"{name}: {concept}"] = list(zip(pictures, [o for o, _ in asked], strict=True))
    return out


def judged_sheet(judge: Judge, rows: dict[str, Judged], title: str) -> Plot:
    """Pictures in rows of ten: above each what was asked for, below it what the judge says."""
    figure = Plot(figsize=(10.4, 0.5 + 1.36 * len(rows)), dpi=100)
    figure.colors = 256
    panels = figure.subplots(len(rows), 10)
    figure.subplots_adjust(0.02, 0.02, 0.995, 1 - 0.55 / (0.5 + 1.36 * len(rows)), 0.06, 0.55)
    for line, (name, row) in zip(panels, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=8)
        said = judge.names([p for p, _ in row], OBJECTS)
        for axes, (picture, asked), word in zip(line, row, said, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_title(asked, fontsize=7, color="#888888", pad=2)
            axes.set_xlabel(word, fontsize=8, labelpad=2, color=KEPT if word == asked else LOST)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    figure.suptitle(f"{title} (above: asked for; below: the judge's word)", fontsize=11, y=0.995)
    figure.alt = f"{title}, each with what was asked for and what the judge calls it."
    return figure


def judge_figures(out: Path) -> None:
    """The data card's judge: reliability, and 60 pictures each of base and forgetful models."""
    judge, pipe = Judge.load(out / "doodle-judge"), load_pipeline(out / "doodle-sd")
    (out / "judge-reliability.png").write_bytes(reliability(judge).png())
    base = base_pictures(pipe)
    names = ("photos", "photos ", "styles", "styles ", "styles  ", "styles   ")
    rows = {name: base[10 * i : 10 * i + 10] for i, name in enumerate(names)}
    (out / "judge-base.png").write_bytes(judged_sheet(judge, rows, "60 pictures of the base model").png())
    sheet = judged_sheet(judge, forgotten_pictures(pipe), "60 pictures of six models that forgot")
    (out / "judge-forgotten.png").write_bytes(sheet.png())


def contact_sheet(seed: int = 3) -> Plot:
    """Every object of the doodle world in every style, as drawn (not generated)."""
    half = (len(OBJECTS) + 1) // 2
    parts = [(names, style) for names in (OBJECTS[:half], OBJECTS[half:]) for style in STYLES]
    rows = [[draw(name, style, seed=seed + i) for name in names] for i, (names, style) in enumerate(parts)]
    title = f"The doodle world: {len(OBJECTS)} objects, {len(STYLES)} styles"
    return image_grid(rows, [style for _, style in parts], (), title, below=[names for names, _ in parts])


def figures(out: Path) -> None:
    """Draws the contact sheet of the data card, where a word looks, and the README's before and after."""
    (out / "contact-sheet.png").write_bytes(contact_sheet().png())
    pipe = load_pipeline(out / "doodle-sd")
    late = (
        trace(pipe, prompt(("apple", "umbrella")), seed=3, num_inference_steps=12).at(8).step(slice(6, None))
    )
    attention = word_overlay(late, ["apple", "umbrella", "<pad>"])
    (out / "attention.png").write_bytes(attention.png())
    figure, _ = before_and_after(pipe, "apple")
    (out / "overview.png").write_bytes(figure.png())
    judge_figures(out)


def oracle_rows(pipe: StableDiffusionPipeline, judge: Judge, out: Path) -> list[tuple[str, float, str]]:
    """What the oracles know, and what they make of a word that they never saw a picture of."""
    rows = []
    for folder in sorted(out.glob("doodle-oracle-*")):
        name = folder.name.removeprefix("doodle-oracle-").replace("-", " ")
        gone = FINAL if name == "final" else (name,)
        oracle = load_oracle(pipe, name)
        kept = [o for o in OBJECTS if o not in gone]
        rest = evaluate(oracle, kept, 10, judge=judge, seed=10_000)
        what = f"oracle without {name}" if gone == (name,) else "oracle without the ten"
        rows.append((f"{what}: the other objects, 10 photos each", rest.accuracy.mean(), "0.98"))
        asked = sample(oracle, [prompt(gone[i % len(gone)]) for i in range(50)], seed=10_000)
        said = judge.names(asked, OBJECTS)
        seen = np.mean([word == gone[i % len(gone)] for i, word in enumerate(said)])
        rows.append((f"{what}: asked for what it never saw, the judge sees it (50 photos)", seen, "near 0"))
        shares = pd.Series(said).value_counts()
        drawn = ", ".join(f"{word} {n}" for word, n in shares.items())
        rows.append((f"{what}: what the judge says instead: {drawn}", shares.get(OTHER, 0) / 50, ""))
    return rows


FINAL = (
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
)
"""The objects of benchmarks/continual.py that ``doodle-oracle-final`` never saw (nor neon, nor mosaic)."""


def generated_rows(pipe: StableDiffusionPipeline, judge: Judge, images: int) -> list[tuple[str, float, str]]:
    """The base model's pictures: photos of every object, every style, two objects at once."""
    photos = evaluate(pipe, images=images, judge=judge, seed=10_000)
    rows = [(f"generated photos, {images} per object: mean", photos.accuracy.mean(), "0.98")]
    worst = photos.accuracy.idxmin()
    rows.append((f"generated photos: worst object ({worst})", photos.accuracy.min(), "0.90"))
    right = []
    for style in STYLES:
        pictures = sample(pipe, [prompt(o, style) for o in OBJECTS for _ in range(5)], seed=20_000)
        named = np.asarray(judge.names(pictures, OBJECTS)).reshape(len(OBJECTS), 5).T == OBJECTS
        styled = np.mean([n == style for n in judge.names(pictures, STYLES)])
        rows.append((f"generated {style}: style named right (100)", styled, "0.95"))
        rows.append((f"generated {style}: object named right (100)", named.mean(), ""))
        right.append(named.mean())
    rows.append(("generated in the five styles: object named right (500)", float(np.mean(right)), "0.98"))
    rng = np.random.default_rng(5)
    pairs = [tuple(rng.choice(OBJECTS, size=2, replace=False)) for _ in range(200)]
    seen = judge.scores(sample(pipe, [prompt(p) for p in pairs], seed=30_000), OBJECTS)
    seen = seen > (judge.threshold or 0.0)
    both = sum(seen.loc[i, a] and seen.loc[i, b] for i, (a, b) in enumerate(pairs))
    low, high = wilson_interval(both, len(pairs))
    what = f"two-object photos: both found (200; 95 % {low:.2f} to {high:.2f})"
    return [*rows, (what, both / len(pairs), "0.80")]


def report(out: Path, images: int = 25, judge_only: bool = False) -> None:
    """Prints every number of the data card; ``judge_only``: those that need no generated picture."""
    rows: list[tuple[str, float, str]] = []
    judge, (drawings, scenes) = Judge.load(out / "doodle-judge"), fresh(2000)
    for name, value in judge_accuracy(judge, drawings, scenes).items():
        rows.append((f"judge on 2000 fresh drawings: {name}", value, "0.99" if name == "objects" else ""))
    rows += judge_rows(judge)
    pipe = load_pipeline(out / "doodle-sd")
    if not judge_only:
        known = zero_shot(out / "doodle-clip", drawings, scenes)
        rows.append(("CLIP zero-shot, objects of fresh drawings", known, ""))
        back, error = round_trip(pipe.vae.float(), drawings)
        right = judge_accuracy(judge, back, scenes)["objects"]
        rows.append(("autoencoder round trip: judged right (objects)", right, ""))
        rows.append(("autoencoder round trip: mean absolute error", error, ""))
        rows += generated_rows(pipe, judge, images) + oracle_rows(pipe, judge, out)

    table = pd.DataFrame(rows, columns=["what", "measured", "to reach"])
    print("| what | measured | to reach |\n|---|---|---|")
    for what, value, goal in table.itertuples(index=False):
        print(f"| {what} | {value:.3f} | {goal} |")
    print("\n| model | million parameters |\n|---|---|")
    parts = {
        "denoiser": pipe.unet,
        "autoencoder": pipe.vae,
        "text encoder": pipe.text_encoder,
        "judge": judge.model,
    }
    for name, part in parts.items():
        print(f"| {name} | {sum(p.numel() for p in part.parameters()) / 1e6:.2f} |")
    print("\n| file | KB | sha256 |\n|---|---|---|")
    total = 0
    for path in sorted(out.glob("*/**/*.safetensors")):
        if ".training" in path.parts:
            continue
        total += path.stat().st_size
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"| {path.relative_to(out).as_posix()} | {path.stat().st_size / 1000:.0f} | `{digest}` |")
    print(f"\nAll weights together: {total / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=data_dir(), help="where the models are")
    parser.add_argument("--judge", action="store_true", help="only what is the judge's")
    parser.add_argument("--figures", action="store_true", help="draw instead of measuring")
    args = parser.parse_args()
    if args.figures:
        (judge_figures if args.judge else figures)(args.out)
    else:
        report(args.out, judge_only=args.judge)


if __name__ == "__main__":
    main()
