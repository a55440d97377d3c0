"""What does the model still draw? Pictures on fixed seeds, read by a judge that never saw the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import AutoImageProcessor, ResNetForImageClassification

from .errors import ModelNotFoundError, UnknownConceptError
from .models import data_dir, model_card, sample


@dataclass(frozen=True)
class Judge:
    """An image classifier that names what is in a picture.

    The doodle judge is multi-label (objects, styles, backgrounds); it stands in for the ResNet-50
    of the paper's evaluation.
    """

    model: ResNetForImageClassification
    processor: object

    @classmethod
    def load(cls, source: str | Path = "doodle") -> Judge:
        """The shipped doodle judge, or any image classifier in a local folder or on the hub.

        Raises ModelNotFoundError when it is missing.
        """
        folder = data_dir() / "doodle-judge" if str(source) == "doodle" else source
        try:
            model = ResNetForImageClassification.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32
            )
            processor = AutoImageProcessor.from_pretrained(folder)
        except Exception as error:  # transformers, the hub and safetensors each raise their own kinds
            raise ModelNotFoundError(
                f"no judge at {folder}: expected an image classifier saved by `save_pretrained`, "
                "as safetensors"
            ) from error
        return cls(model.eval(), processor)

    @property
    def labels(self) -> list[str]:
        return [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image], labels: Sequence[str] | None = None) -> pd.DataFrame:
        """Logits, one row per image and one column per label (all of them by default).

        Raises UnknownConceptError for a label that this judge was not taught.
        """
        for label in labels or ():
            if label not in self.labels:
                raise UnknownConceptError(label, self.labels, what="label of this judge")
        rows = []
        for start in range(0, len(images), 128):
            pixels = self.processor(list(images[start : start + 128]), return_tensors="pt").pixel_values
            rows.append(self.model(pixels.to(self.model.device)).logits.float().cpu())
        frame = pd.DataFrame(torch.cat(rows).numpy(), columns=self.labels)
        return frame if labels is None else frame[list(labels)]

    def names(self, images: Sequence[Image.Image], among: Sequence[str]) -> list[str]:
        """The likeliest of the labels ``among`` for each image."""
        return self.scores(images, among).idxmax(axis=1).tolist()

    def sees(self, images: Sequence[Image.Image], label: str) -> np.ndarray:
        """Whether each picture shows ``label``, whatever else it shows (probability above one half)."""
        return (self.scores(images, [label])[label] > 0).to_numpy()


def wilson_interval(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share (95 % by default): honest at 0 and at 1, unlike +- 2 sigma."""
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"{hits} hits of {count}: expected 0 <= hits <= count and count >= 1")
    p, n = hits / count, count
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(
    pipe: StableDiffusionPipeline,
    concepts: Sequence[str] | None = None,
    images: int = 10,
    style: str | None = None,
    judge: Judge | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Draws ``images`` pictures of each concept and lets the judge name them.

    Picture i of every concept starts from the same noise in every call, so that two models are compared
    on the same seeds.

    Returns a DataFrame indexed by concept: ``accuracy`` (share of pictures named right, out of the card's
    concepts), ``low`` and ``high`` (95 % Wilson interval), ``images``, ``mostly`` (what the judge says
    most often). Raises UnknownConceptError for a concept that the model's card does not list.
    """
    card = model_card(pipe)
    concepts = list(card.concepts if concepts is None else concepts)
    for concept in concepts:
        card.check(concept)
    judge = judge or Judge.load(card.judge)
    prompts = [card.prompt(c, style) for c in concepts for _ in range(images)]
    seeds = [seed + i for _ in concepts for i in range(images)]
    pictures = sample(pipe, prompts, seed=seeds, steps=steps, guidance_scale=guidance_scale)
    named = np.asarray(judge.names(pictures, card.concepts)).reshape(len(concepts), images)
    rows = []
    for concept, row in zip(concepts, named, strict=True):
        hits = int((row == concept).sum())
        low, high = wilson_interval(hits, images)
        mostly = pd.Series(row).mode()[0]
        rows.append({"accuracy": hits / images, "low": low, "high": high, "images": images, "mostly": mostly})
    return pd.DataFrame(rows, index=pd.Index(concepts, name="concept"))
