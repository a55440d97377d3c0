"""What does the model still draw? Pictures on fixed seeds, read by a judge that never saw the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    ResNetForImageClassification,
)

from .errors import ModelNotFoundError, UnknownConceptError
from .models import ModelCard, data_dir, default_device, model_card, sample, trouble

OTHER = "something else"
"""What a judge says of a picture that shows none of what was asked for: one with an open choice, or one that
was calibrated and reaches its threshold for none of it."""


@dataclass(frozen=True)
class Judge:
    """An image classifier that names what is in a picture.

    The doodle judge is multi-label (objects, styles, backgrounds); it stands in for the ResNet-50
    of the paper's evaluation. It was taught what is *none* as well: below the threshold that its config.json
    holds (``calibration``) it sees nothing, and says "something else".

    Attributes:
        words: for each concept the labels that mean it; None where every label is a concept.
        open_choice: whether it answers with one label out of all that it knows, as a ResNet-50 does.
    """

    model: ResNetForImageClassification
    processor: object
    words: Mapping[str, Sequence[str]] | None = None
    open_choice: bool = False

    @classmethod
    def load(
        cls, source: str | Path | ModelCard = "doodle", device: str | torch.device | None = None
    ) -> Judge:
        """The judge of a model's card, which knows its concepts by their names: ``Judge.load(card)``.

        Or the shipped doodle judge, or any image classifier in a local folder or on the hub, by its own
        labels. ``device`` is by default the one that pipelines go to. Raises ModelNotFoundError when it is
        missing.
        """
        if isinstance(source, ModelCard):
            told = cls.load(source.judge, device)
            return replace(told, words=source.labels, open_choice=source.open_choice)
        folder = data_dir() / "doodle-judge" if str(source) == "doodle" else source
        try:
            model = ResNetForImageClassification.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32
            )
            if str(source) == "doodle":  # by name: without torchvision, older transformers cannot look it up
                processor = CLIPImageProcessor.from_pretrained(folder)
            else:  # code that comes with a model is never run, nor asked about
                processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # transformers, the hub and safetensors each raise their own kinds
            raise ModelNotFoundError(
                f"no judge at {folder}: expected an image classifier saved by `save_pretrained`, "
                f"as safetensors{trouble(error, folder)}"
            ) from error
        return cls(model.eval().to(device or default_device()), processor)

    @property
    def labels(self) -> list[str]:
        return [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]

    @property
    def threshold(self) -> float | None:
        """The logit above which it sees what a label says, from its config's calibration; None without one.

        There, ``threshold`` is a probability: sigmoid(logit / temperature).
        """
        told = getattr(self.model.config, "calibration", None)
        if told is None:
            return None
        p = told["threshold"]
        return float(told["temperature"] * np.log(p / (1 - p)))

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """The pictures as the judge wants them, (N, 3, H, W), on its device."""
        return self.processor(list(images), return_tensors="pt").pixel_values.to(self.model.device)

    def look(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What it sees before it names, the pooled last layer (N, D), and the logits of its labels (N, L)."""
        pooled = self.model.resnet(pixels).pooler_output
        return pooled.flatten(1), self.model.classifier(pooled)

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image], labels: Sequence[str] | None = None) -> pd.DataFrame:
        """Logits, one row per image and one column per label (all of them by default).

        Raises UnknownConceptError for a label that this judge was not taught.
        """
        known, rows = self.labels, []
        for label in labels or ():
            if label not in known:
                raise UnknownConceptError(label, known, what="label of this judge")
        for start in range(0, len(images), 128):
            rows.append(self.look(self.pixels(images[start : start + 128]))[1].float().cpu())
        frame = pd.DataFrame(torch.cat(rows).numpy(), columns=known)
        return frame if labels is None else frame[list(labels)]

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """:meth:`look`'s first answer for pictures, (N, D), float32 on the CPU."""
        parts = [self.pixels(images[i : i + 128]) for i in range(0, len(images), 128)]
        return torch.cat([self.look(p)[0].float().cpu() for p in parts])

    def knows(self, concept: str) -> bool:
        """Whether it has a label for ``concept``."""
        return concept in (self.labels if self.words is None else self.words)

    def _labels_of(self, concept: str) -> list[str]:
        if not self.knows(concept):
            known = self.labels if self.words is None else list(self.words)
            raise UnknownConceptError(concept, known, what="label of this judge")
        return [concept] if self.words is None else list(self.words[concept])

    def names(self, images: Sequence[Image.Image], among: Sequence[str]) -> list[str]:
        """The likeliest of the concepts ``among`` for each image.

        "something else" where even the likeliest does not reach the judge's threshold, or where the likeliest
        label belongs to none of them, which only an open choice allows. A judge that was never calibrated has
        no threshold: it has to choose.
        Raises UnknownConceptError for a concept that it has no label for.
        """
        owner = {label: c for c in among for label in self._labels_of(c)}
        scores = self.scores(images, self.labels if self.open_choice else list(owner))
        best = scores.idxmax(axis=1)
        if self.threshold is not None:
            best = best.where(scores.max(axis=1) > self.threshold, OTHER)
        return [owner.get(label, OTHER) for label in best]

    def sees(self, images: Sequence[Image.Image], concept: str) -> np.ndarray:
        """Whether each picture shows ``concept``, whatever else it shows: above the judge's threshold.

        One that was never calibrated goes by a probability of one half.

        A judge of an open choice gives one label: it sees what it names.
        """
        if self.open_choice:
            return np.array(self.names(images, [concept])) == concept
        threshold = 0.0 if self.threshold is None else self.threshold
        return (self.scores(images, self._labels_of(concept)) > threshold).any(axis=1).to_numpy()


@dataclass(frozen=True)
class ClipJudge(Judge):
    """A judge of any words: CLIP names the text that fits a picture best, of those that it was given.

    Zero-shot (Radford et al., arXiv 2103.00020). Its weakness: it has no threshold and must choose. It says
    "something else" only where one of the ``others`` fits better than all that was asked about. So give it
    texts for what may stand there as well, and look at the pictures.
    """

    texts: torch.Tensor = field(kw_only=True)  # (L, D), a row per text, of length 1
    known: tuple[str, ...] = field(kw_only=True)

    @classmethod
    def of(
        cls,
        words: Mapping[str, Sequence[str]],
        source: str | Path = "openai/clip-vit-large-patch14",
        others: Sequence[str] = ("a photo",),
        device: str | torch.device | None = None,
    ) -> ClipJudge:
        """``words``: for each concept texts that describe it, ``{"Van Gogh": ["a painting by Van Gogh"]}``.

        ``source`` is "doodle", a folder or a hub id. Raises ModelNotFoundError when it is missing.
        """
        folder = data_dir() / "doodle-clip" if str(source) == "doodle" else source
        try:
            model = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval()
            read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            processor = CLIPImageProcessor.from_pretrained(folder)
        except Exception as error:  # transformers, the hub and safetensors each raise their own kinds
            raise ModelNotFoundError(
                f"no CLIP at {folder}: expected a CLIPModel, as safetensors{trouble(error, folder)}"
            ) from error
        known = (*(text for texts in words.values() for text in texts), *others)
        with torch.no_grad():
            told = model.text_model(**read(list(known), padding=True, truncation=True, return_tensors="pt"))
            texts = F.normalize(model.text_projection(told.pooler_output), dim=-1)
        return cls(model.to(device or default_device()), processor, words, True, texts=texts, known=known)

    @property
    def labels(self) -> list[str]:
        return list(self.known)

    def look(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self.model.visual_projection(self.model.vision_model(pixels).pooler_output)
        return seen, self.model.logit_scale.exp() * F.normalize(seen, dim=-1) @ self.texts.to(seen).T


def wilson_interval(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share (95 % by default): honest at 0 and at 1, unlike +- 2 sigma."""
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"{hits} hits of {count}: expected 0 <= hits <= count and count >= 1")
    p, n = hits / count, count
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def check_countable(card: ModelCard, concept: str, judge: Judge | None = None) -> None:
    """ValueError for a concept that ``judge``, by default the card's, has no label for.

    UnknownConceptError where the model does not even read the word.
    """
    if not card.open_words:
        card.check(concept)
    if concept not in card.labels if judge is None else not judge.knows(concept):
        bring = 'judge=duge.ClipJudge.of({"name": ["a text that describes it"], ...})'
        told = card.judge if judge is None else "that was given"
        raise ValueError(
            f"the judge {told} has no label for {concept!r}: it cannot be counted. Bring one: {bring}"
        )


def choices(card: ModelCard, concepts: Iterable[str], judge: Judge) -> list[str]:
    """What ``judge`` chooses among for ``concepts`` of one kind: the card's styles or objects, and them."""
    all_of_them = dict.fromkeys([*card.judged, *card.styles, *(concepts := list(concepts))])
    style = concepts[0] in card.styles
    return [c for c in all_of_them if (c in card.styles) == style and judge.knows(c)]


def evaluate(
    pipe: StableDiffusionPipeline,
    concepts: Sequence[str] | None = None,
    images: int = 10,
    style: str | None = None,
    judge: Judge | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    card: ModelCard | None = None,
) -> pd.DataFrame:
    """Draws ``images`` pictures of each concept and lets the judge name them.

    A concept is an object, drawn in ``style`` (the plain one by default), or itself a style, drawn with the
    objects in turn and named among the styles.

    Picture i of every concept starts from the same noise in every call, so that two models are compared
    on the same seeds. ``concepts`` defaults to all objects that the judge knows, ``judge`` to the card's.

    Returns a DataFrame indexed by concept: ``accuracy`` (share of pictures named right, among the card's
    concepts or styles, or among all that the judge knows if the card says so), ``low`` and ``high`` (95 %
    Wilson interval), ``images``, ``mostly`` (what the judge says most often). Raises UnknownConceptError for
    a word that the model never read, ValueError for one that the judge does not know: on a model of open
    words bring a :class:`ClipJudge`.
    """
    card = card or model_card(pipe)
    if isinstance(concepts, str) or not isinstance(concepts, Iterable | None):
        raise TypeError(f'concepts = {concepts!r}: expected a list of names, such as ["apple", "orange"]')
    concepts = list(card.judged if concepts is None else concepts)
    if not isinstance(images, Integral):
        raise TypeError(f"images = {images!r}: expected a whole number of pictures of each concept")
    if not concepts or images < 1:
        raise ValueError(f"{len(concepts)} concepts, {images} images: expected at least one of each")
    for concept in concepts:
        check_countable(card, concept, judge)
    judge = judge or Judge.load(card, pipe.device)

    def asked(concept: str) -> list[str]:
        texts = card.prompts(concept) if concept in card.styles else [card.prompt(concept, style)]
        return [texts[i % len(texts)] for i in range(images)]

    prompts = [text for c in concepts for text in asked(c)]
    seeds = [seed + i for _ in concepts for i in range(images)]
    pictures = sample(pipe, prompts, seeds, num_inference_steps, guidance_scale, card=card)
    named = np.empty(len(pictures), dtype=object)
    for styles in (False, True):
        mine = [i for i in range(len(pictures)) if (concepts[i // images] in card.styles) == styles]
        if mine:
            among = choices(card, (concepts[i // images] for i in mine), judge)
            named[mine] = judge.names([pictures[i] for i in mine], among)
    rows = []
    for concept, row in zip(concepts, named.reshape(len(concepts), images), strict=True):
        hits = int((row == concept).sum())
        low, high = wilson_interval(hits, images)
        mostly = pd.Series(row).mode()[0]
        rows.append({"accuracy": hits / images, "low": low, "high": high, "images": images, "mostly": mostly})
    return pd.DataFrame(rows, index=pd.Index(concepts, name="concept"))


def sequence_metrics(matrix: pd.DataFrame, requests: Sequence[str], card: ModelCard) -> pd.DataFrame:
    """What a sequence of requests did, from the accuracy matrix R[k, j].

    Args:
        matrix: accuracy of concept j (columns: objects, and styles but the plain one) after request k (rows;
            0 is the base model).
        requests: what was asked to go, in order: row k has forgotten the first k of them.
        card: tells objects from styles.

    Returns a row per request, each number in [0, 1] unless said otherwise:

    - ``UA``: unlearning accuracy, 1 - accuracy, mean over everything that was asked to go so far;
    - ``objects kept`` and ``styles kept``: mean accuracy on the objects, and on the styles, that are to stay;
    - ``IRA``: in-domain retaining accuracy: mean over what is to stay of the last request's kind (objects for
      an object, styles for a style); ``CRA``: cross-domain, the other kind;
    - ``HM``: harmonic mean of the three, the headline: it is small when any of them is;
    - ``revival``: mean accuracy on earlier requests' concepts, which ought to be 0; nan for the first;
    - ``forgetting``: how much the concepts that are to stay lost, from their best so far; ``transfer``: how
      they changed since the base model (negative: lost). For what is to go, the sign is turned around: losing
      it counts as gain, in ``gain``.

    UA, IRA and CRA are UnlearnCanvas' (Zhang et al., arXiv 2402.11846); the others are continual learning's
    (Lopez-Paz and Ranzato, arXiv 1706.08840), read for forgetting on purpose (ours). Raises ValueError when
    the matrix lacks a row or a concept.
    """
    columns, styles = list(matrix.columns), [s for s in card.styles if s in matrix.columns]
    if missing := [c for c in requests if c not in columns]:
        raise ValueError(f"the matrix has no column for {', '.join(missing)}")
    if len(matrix) != len(requests) + 1:
        raise ValueError(f"{len(matrix)} rows for {len(requests)} requests: expected one more, the base's")
    values, rows = matrix.reset_index(drop=True), []

    def mean(accuracies: pd.Series) -> float:
        return float(accuracies.mean()) if len(accuracies) else float("nan")

    for k in range(1, len(values)):
        now, gone = values.loc[k], list(requests[:k])
        kept = [c for c in columns if c not in gone]
        mine = [c for c in kept if (c in styles) == (requests[k - 1] in styles)]
        other = [c for c in kept if c not in mine]
        row = {"UA": 1 - mean(now[gone])}
        row["objects kept"] = mean(now[[c for c in kept if c not in styles]])
        row["styles kept"] = mean(now[[c for c in kept if c in styles]])
        row |= {"IRA": mean(now[mine]), "CRA": mean(now[other])}
        parts = [v for v in (row["UA"], row["IRA"], row["CRA"]) if not np.isnan(v)]
        row["HM"] = len(parts) / sum(1 / v for v in parts) if min(parts) > 0 else 0.0
        row["revival"] = mean(now[gone[:-1]])
        row["forgetting"] = mean(values.loc[:k, kept].max() - now[kept])
        row["transfer"] = mean(now[kept] - values.loc[0, kept])
        row["gain"] = mean(values.loc[0, gone] - now[gone])
        rows.append({"request": requests[k - 1], **row})
    return pd.DataFrame(rows, index=pd.RangeIndex(1, len(values), name="after"))


def err(forgetting: float, retention: float, adjacent: float, indirect: float, adversarial: float) -> float:
    """ERR: the harmonic mean of five shares, as the Genmu challenge of DUGE's authors' lab defines it.

    ``forgetting``: of the prompts that name the concept, how many do not draw it; ``indirect``: the same of
    prompts that mean it without its name; ``adversarial``: the same under attack; ``retention``: of other
    concepts, how many are still drawn; ``adjacent``: the same of those that resemble it. 0 when one is 0.
    """
    parts = (forgetting, retention, adjacent, indirect, adversarial)
    if not all(0 <= p <= 1 for p in parts):
        raise ValueError(f"{parts}: expected five shares from 0 to 1")
    return len(parts) / sum(1 / p for p in parts) if min(parts) > 0 else 0.0


def kid(before: Sequence[Image.Image], after: Sequence[Image.Image], judge: Judge) -> float:
    """Kernel inception distance of two sets of pictures, in the judge's own features (offline).

    0 for the same distribution (it can be a little below, the estimate is unbiased): the squared maximum mean
    discrepancy under the kernel (x.y / D + 1)^3 (Binkowski et al., arXiv 1801.01401), over all pictures at
    once. Comparable only with other distances that the same judge measured on as many pictures.

    Raises ValueError for fewer than two pictures.
    """
    if min(len(before), len(after)) < 2:
        raise ValueError(f"{len(before)} and {len(after)} pictures: expected at least two of each")
    x, y = (judge.features(pictures).double() for pictures in (before, after))  # (m, D), (n, D)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: torch.Tensor) -> torch.Tensor:
        same = kernel(a, a)
        return (same.sum() - same.trace()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())
