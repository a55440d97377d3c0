"""What does the model still draw? Pictures on fixed seeds, read by a judge that never saw the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
"""What a judge says of a picture that shows none of what was asked for."""


@contextmanager
def _reading(source: str | Path, kind: str, expected: str) -> Iterator[str | Path]:
    """The folder or hub id of a judge; ModelNotFoundError when the block cannot read it."""
    folder = data_dir() / f"doodle-{kind.lower()}" if str(source) == "doodle" else source
    try:
        yield folder
    except Exception as error:  # transformers, the hub and safetensors each raise their own kinds
        wanted = f"expected {expected}, as safetensors"
        raise ModelNotFoundError(f"no {kind} at {folder}: {wanted}{trouble(error, folder)}") from error


@dataclass(frozen=True)
class Judge:
    """An image classifier that names what is in a picture.

    The doodle judge is multi-label (objects, styles, backgrounds); it stands in for the ResNet-50 of the
    paper's evaluation. It was taught what is *none* as well: below its threshold it sees nothing.

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

        Or the shipped doodle judge, or any image classifier in a folder or on the hub, by its own labels.
        ``device`` is by default the one that pipelines go to. Raises ModelNotFoundError when it is missing.
        """
        if isinstance(source, ModelCard):
            told = cls.load(source.judge, device)
            return replace(told, words=source.labels, open_choice=source.open_choice)
        # the doodles' by name: without torchvision, older transformers cannot look it up
        reader = CLIPImageProcessor if str(source) == "doodle" else AutoImageProcessor
        with _reading(source, "judge", "an image classifier saved by `save_pretrained`") as folder:
            how = {"use_safetensors": True, "dtype": torch.float32}
            model = ResNetForImageClassification.from_pretrained(folder, **how).eval()
            # code that comes with a model is never run, nor asked about
            processor = reader.from_pretrained(folder, trust_remote_code=False)
        return cls(model.to(device or default_device()), processor)

    @property
    def labels(self) -> list[str]:
        return [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]

    @property
    def threshold(self) -> float | None:
        """The logit above which it sees what a label says; None where its config holds no calibration.

        There, ``threshold`` is a probability: sigmoid(logit / temperature).
        """
        if (told := getattr(self.model.config, "calibration", None)) is None:
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
    def _looks(self, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        """:meth:`look`'s two answers for any number of pictures, float32 on the CPU."""
        parts = [self.look(self.pixels(images[i : i + 128])) for i in range(0, len(images), 128)]
        return [torch.cat([x.float().cpu() for x in answer]) for answer in zip(*parts, strict=True)]

    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """What it sees before it names, (N, D), float32 on the CPU."""
        return self._looks(images)[0]

    def scores(self, images: Sequence[Image.Image], labels: Sequence[str] | None = None) -> pd.DataFrame:
        """Logits, one row per image and one column per label (all of them by default).

        Raises UnknownConceptError for a label that this judge was not taught.
        """
        known = self.labels
        labels = known if labels is None else list(labels)
        if unknown := [label for label in labels if label not in known]:
            raise UnknownConceptError(unknown[0], known, what="label of this judge")
        return pd.DataFrame(self._looks(images)[1].numpy(), columns=known)[labels]

    @property
    def meaning(self) -> Mapping[str, Sequence[str]]:
        """For each concept that it knows, the labels that mean it."""
        return {label: (label,) for label in self.labels} if self.words is None else self.words

    def knows(self, concept: str) -> bool:
        return concept in self.meaning

    def _labels_of(self, concept: str) -> list[str]:
        if not self.knows(concept):
            raise UnknownConceptError(concept, list(self.meaning), what="label of this judge")
        return list(self.meaning[concept])

    def names(self, images: Sequence[Image.Image], among: Sequence[str]) -> list[str]:
        """The likeliest of the concepts ``among`` for each image.

        "something else" where even the likeliest does not reach the judge's threshold, or where the likeliest
        label belongs to none of them, which only an open choice allows. A judge that was never calibrated has
        no threshold: it has to choose. Raises UnknownConceptError for a concept that it has no label for.
        """
        owner = {label: c for c in among for label in self._labels_of(c)}
        scores = self.scores(images, self.labels if self.open_choice else list(owner))
        best = scores.idxmax(axis=1)
        if self.threshold is not None:
            best = best.where(scores.max(axis=1) > self.threshold, OTHER)
        return [owner.get(label, OTHER) for label in best]

    def sees(self, images: Sequence[Image.Image], concept: str) -> np.ndarray:
        """Whether each picture shows ``concept``, whatever else it shows: above the judge's threshold.

        One that was never calibrated goes by a probability of one half; one of an open choice gives one
        label, and sees what it names.
        """
        if self.open_choice:
            return np.array(self.names(images, [concept])) == concept
        seen = self.scores(images, self._labels_of(concept)) > (self.threshold or 0.0)
        return seen.any(axis=1).to_numpy()


@dataclass(frozen=True)
class ClipJudge(Judge):
    """A judge of any words: CLIP names the text that fits a picture best, of those that it was given.

    Zero-shot (Radford et al., arXiv 2103.00020). It has no threshold and must choose: it says "something
    else" only where one of the ``others`` fits better than all that was asked about. So give it texts for
    what may stand there as well, and look at the pictures.
    """

    texts: torch.Tensor = field(kw_only=True)  # (L, D), a row per text, of length 1
    known: tuple[str, ...] = field(kw_only=True)

    @classmethod
    def of(
        cls, words: Mapping[str, Sequence[str]], source: str | Path = "openai/clip-vit-large-patch14",
        others: Sequence[str] = ("a photo",),
    ) -> ClipJudge:  # fmt: skip
        """``words``: for each concept texts that describe it, ``{"Van Gogh": ["a painting by Van Gogh"]}``.

        ``source`` is "doodle", a folder or a hub id. Raises ModelNotFoundError when it is missing.
        """
        with _reading(source, "CLIP", "a CLIPModel") as folder:
            model = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval()
            read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            processor = CLIPImageProcessor.from_pretrained(folder)
        known = (*(text for texts in words.values() for text in texts), *others)
        with torch.no_grad():
            told = model.text_model(**read(list(known), padding=True, truncation=True, return_tensors="pt"))
            texts = F.normalize(model.text_projection(told.pooler_output), dim=-1)
        return cls(model.to(default_device()), processor, words, True, texts=texts, known=known)

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


def counted(groups: pd.api.typing.SeriesGroupBy, share: str) -> pd.DataFrame:
    """How often each group's truths hold: ``images``, their ``share``, ``low`` and ``high`` (95 % Wilson)."""
    table = groups.agg(["size", "mean"]).set_axis(["images", share], axis=1)
    table[["low", "high"]] = [wilson_interval(int(truths.sum()), len(truths)) for _, truths in groups]
    return table


def judge_of(
    pipe: StableDiffusionPipeline, card: ModelCard, concepts: Iterable[str], judge: Judge | None = None
) -> Judge:
    """``judge``, or the card's, if it can count all ``concepts``.

    Raises UnknownConceptError for a word that the model never read, ValueError for one without a label.
    """
    for concept in concepts:
        if not card.open_words:
            card.check(concept)
        if concept not in card.labels if judge is None else not judge.knows(concept):
            bring = 'judge=duge.ClipJudge.of({"name": ["a text that describes it"], ...})'
            told = card.judge if judge is None else "that was given"
            raise ValueError(
                f"the judge {told} has no label for {concept!r}: it cannot be counted. Bring one: {bring}"
            )
    return judge or Judge.load(card, pipe.device)


def choices(card: ModelCard, concepts: Iterable[str], judge: Judge) -> list[str]:
    """What ``judge`` chooses among for ``concepts`` of one kind: the card's styles or objects, and them."""
    concepts = list(concepts)
    style = concepts[0] in card.styles
    every = dict.fromkeys([*card.judged, *card.styles, *concepts])
    return [c for c in every if (c in card.styles) == style and judge.knows(c)]


def draw_groups(
    pipe: StableDiffusionPipeline, prompts: Mapping[str, Sequence[str]], images: int, seed: int = 0,
    **options: object,
) -> pd.DataFrame:  # fmt: skip
    """Draws ``images`` pictures for each group of ``prompts``, which take turns.

    Picture i of every group starts from the noise of ``seed + i``; ``options`` are those of
    :func:`duge_lite.sample`. Returns the columns ``group``, ``prompt`` and ``picture`` (PIL).
    """
    turns = range(images)
    rows = [(group, texts[i % len(texts)]) for group, texts in prompts.items() for i in turns]
    frame = pd.DataFrame(rows, columns=["group", "prompt"])
    pictures = sample(pipe, list(frame.prompt), [seed + i for _ in prompts for i in turns], **options)
    return frame.assign(picture=pd.Series(pictures, dtype=object))


def evaluate(
    pipe: StableDiffusionPipeline, concepts: Sequence[str] | None = None, images: int = 10,
    judge: Judge | None = None, seed: int = 0, card: ModelCard | None = None, **options: object,
) -> pd.DataFrame:  # fmt: skip
    """Draws ``images`` pictures of each concept and lets the judge name them.

    A concept is an object, asked for plainly, or a style, drawn with the objects in turn and named among the
    styles. Picture i of every concept starts from the same noise in every call, so that two models are
    compared on the same seeds. ``concepts`` defaults to all objects that the judge knows, ``judge`` to the
    card's; ``options`` are those of :func:`duge_lite.sample`.

    Returns a DataFrame indexed by concept: ``accuracy`` (share of pictures named right, among the card's
    concepts or styles, or among all that the judge knows if the card says so), ``low`` and ``high`` (95 %
    Wilson interval), ``images``, ``mostly`` (what the judge says most often). Raises what :func:`judge_of`
    raises: on a model of open words bring a :class:`ClipJudge`.
    """
    card = card or model_card(pipe)
    if isinstance(concepts, str) or not isinstance(concepts, Iterable | None):
        raise TypeError(f'concepts = {concepts!r}: expected a list of names, such as ["apple", "orange"]')
    concepts = list(card.judged if concepts is None else concepts)
    if not isinstance(images, Integral):
        raise TypeError(f"images = {images!r}: expected a whole number of pictures of each concept")
    if not concepts or images < 1:
        raise ValueError(f"{len(concepts)} concepts, {images} images: expected at least one of each")
    judge = judge_of(pipe, card, concepts, judge)
    prompts = {c: card.prompts(c) if c in card.styles else [card.prompt(c)] for c in concepts}
    frame = draw_groups(pipe, prompts, images, seed, card=card, **options)
    frame["named"] = OTHER
    for _, kind in frame.groupby(frame.group.isin(card.styles)):  # objects, and styles
        frame.loc[kind.index, "named"] = judge.names(list(kind.picture), choices(card, kind.group, judge))
    groups = frame.assign(right=frame.named == frame.group).groupby("group", sort=False)
    table = counted(groups.right, "accuracy").assign(mostly=groups.named.agg(lambda said: said.mode()[0]))
    return table[["accuracy", "low", "high", "images", "mostly"]].rename_axis("concept")


def sequence_metrics(matrix: pd.DataFrame, requests: Sequence[str], card: ModelCard) -> pd.DataFrame:
    """What a sequence of requests did, from the accuracy matrix R[k, j].

    ``matrix`` holds the accuracy on concept j (columns: objects, and styles but the plain one) after request
    k (rows; 0 is the base model): row k has forgotten the first k ``requests``. ``card`` tells objects from
    styles. Returns a row per request, each number in [0, 1] unless said otherwise:

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
    for k, request in enumerate(requests, 1):
        now, gone = values.loc[k], list(requests[:k])
        kept = [c for c in columns if c not in gone]
        mine = [c for c in kept if (c in styles) == (request in styles)]
        row = {"request": request, "UA": 1 - now[gone].mean()}
        row["objects kept"] = now[[c for c in kept if c not in styles]].mean()
        row["styles kept"] = now[[c for c in kept if c in styles]].mean()
        row |= {"IRA": now[mine].mean(), "CRA": now[[c for c in kept if c not in mine]].mean()}
        row["HM"] = _harmonic_mean([row[part] for part in ("UA", "IRA", "CRA") if not np.isnan(row[part])])
        row["revival"] = now[gone[:-1]].mean()
        row["forgetting"] = (values.loc[:k, kept].max() - now[kept]).mean()
        row["transfer"] = (now[kept] - values.loc[0, kept]).mean()
        row["gain"] = (values.loc[0, gone] - now[gone]).mean()
        rows.append(row)
    return pd.DataFrame(rows, index=pd.RangeIndex(1, len(values), name="after"))


def _harmonic_mean(parts: Sequence[float]) -> float:
    return len(parts) / sum(1 / p for p in parts) if min(parts) > 0 else 0.0


def err(forgetting: float, retention: float, adjacent: float, indirect: float, adversarial: float) -> float:
    """ERR: the harmonic mean of five shares, as the Genmu challenge of DUGE's authors' lab defines it.

    ``forgetting``: of the prompts that name the concept, how many do not draw it; ``indirect``: the same of
    prompts that mean it without its name; ``adversarial``: the same under attack; ``retention``: of other
    concepts, how many are still drawn; ``adjacent``: the same of those that resemble it. 0 when one is 0.
    """
    parts = (forgetting, retention, adjacent, indirect, adversarial)
    if not all(0 <= p <= 1 for p in parts):
        raise ValueError(f"{parts}: expected five shares from 0 to 1")
    return _harmonic_mean(parts)


def kid(before: Sequence[Image.Image], after: Sequence[Image.Image], judge: Judge) -> float:
    """Kernel inception distance of two sets of pictures, in the judge's own features (offline).

    0 for the same distribution (it can be a little below, the estimate is unbiased): the squared maximum mean
    discrepancy under the kernel (x.y / D + 1)^3 (Binkowski et al., arXiv 1801.01401), over all pictures at
    once. Comparable only with other distances that the same judge measured on as many pictures. Raises
    ValueError for fewer than two.
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
