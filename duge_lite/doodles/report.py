"""What is in ``data/``: ``python -m duge_lite.doodles.train --report`` measures, ``--figures`` draws."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from ..attention import trace
from ..evaluation import Judge, evaluate, wilson_interval
from ..figures import contact_sheet, word_overlay
from ..models import load_oracle, load_pipeline, sample
from ..widgets import before_and_after
from .captions import prompt
from .draw import BACKGROUNDS, OBJECTS, STYLES, draw_scene, sample_scene


def fresh(count: int, seed: int = 987_654_321) -> tuple[list[Image.Image], list]:
    """Drawings that no training run has seen."""
    scenes, images = [], []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        scenes.append(sample_scene(rng))
        images.append(draw_scene(scenes[-1], rng))
    return images, scenes


def judge_accuracy(judge: Judge, images: list[Image.Image], scenes: list) -> dict[str, float]:
    """Objects (all of a scene's among the top ones), styles, backgrounds."""
    scores = judge.scores(images, OBJECTS).to_numpy()
    top = [
        set(np.asarray(OBJECTS)[np.argsort(-row)[: len(s.objects)]])
        for row, s in zip(scores, scenes, strict=True)
    ]
    grounds = [f"{b} background" for b in BACKGROUNDS]
    return {
        "objects": float(np.mean([t == set(s.objects) for t, s in zip(top, scenes, strict=True)])),
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


def oracle_rows(pipe: StableDiffusionPipeline, judge: Judge, out: Path) -> list[tuple[str, float, str]]:
    """What the oracles of single objects know, and what they make of the word they never saw a picture of."""
    rows = []
    for concept in OBJECTS:
        if not (out / f"doodle-oracle-{concept.replace(' ', '-')}").is_dir():
            continue
        oracle = load_oracle(pipe, concept)
        rest = evaluate(oracle, [o for o in OBJECTS if o != concept], 10, judge=judge, seed=10_000)
        what = f"oracle without {concept}"
        rows.append((f"{what}: the other objects, 10 photos each", rest.accuracy.mean(), "0.97"))
        asked = sample(oracle, [prompt(concept)] * 50, seed=10_000)
        seen = judge.sees(asked, concept).mean()
        rows.append((f"{what}: asked for one, the judge sees one (50 photos)", seen, ""))
    return rows


def report(out: Path, images: int = 25) -> None:
    """Prints every number of the data card."""
    rows: list[tuple[str, float, str]] = []
    judge, (drawings, scenes) = Judge.load(out / "doodle-judge"), fresh(2000)
    for name, value in judge_accuracy(judge, drawings, scenes).items():
        rows.append((f"judge on 2000 fresh drawings: {name}", value, "0.99" if name == "objects" else ""))
    rows.append(
        ("CLIP zero-shot, objects of fresh drawings", zero_shot(out / "doodle-clip", drawings, scenes), "")
    )

    pipe = load_pipeline(out / "doodle-sd")
    back, error = round_trip(pipe.vae.float(), drawings)
    rows.append(
        (
            "autoencoder round trip: judged right (objects)",
            judge_accuracy(judge, back, scenes)["objects"],
            "0.98",
        )
    )
    rows.append(("autoencoder round trip: mean absolute error", error, ""))

    photos = evaluate(pipe, images=images, judge=judge, seed=10_000)
    rows.append((f"generated photos, {images} per object: mean", photos.accuracy.mean(), "0.97"))
    worst = photos.accuracy.idxmin()
    rows.append((f"generated photos: worst object ({worst})", photos.accuracy.min(), "0.90"))
    for style in STYLES:
        prompts = [prompt(o, style) for o in OBJECTS for _ in range(5)]
        pictures = sample(pipe, prompts, seed=20_000)
        named = np.asarray(judge.names(pictures, OBJECTS)).reshape(len(OBJECTS), 5)
        rows.append(
            (
                f"generated {style}: style named right (100)",
                np.mean([n == style for n in judge.names(pictures, STYLES)]),
                "0.95",
            )
        )
        rows.append((f"generated {style}: object named right (100)", float((named.T == OBJECTS).mean()), ""))
    rows += oracle_rows(pipe, judge, out)
    rng = np.random.default_rng(5)
    pairs = [tuple(rng.choice(OBJECTS, size=2, replace=False)) for _ in range(200)]
    pictures = sample(pipe, [prompt(p) for p in pairs], seed=30_000)
    scores = judge.scores(pictures, OBJECTS)
    both = sum(scores.loc[i, a] > 0 and scores.loc[i, b] > 0 for i, (a, b) in enumerate(pairs))
    low, high = wilson_interval(both, len(pairs))
    rows.append(
        (f"two-object photos: both found (200; 95 % {low:.2f} to {high:.2f})", both / len(pairs), "0.80")
    )

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
