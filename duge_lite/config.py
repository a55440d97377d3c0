"""Every choice that unlearning leaves open, in one place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import pandas as pd

from .losses import IMPORTANCE_KINDS, TARGET_KINDS

ADAPTER = "duge"  # the name of our LoRA adapter in the UNet

TRAINABLE: dict[str, Callable[[str], bool]] = {
    "cross_attention": lambda name: ".attn2." in name,
    "kv": lambda name: ".attn2.to_k" in name or ".attn2.to_v" in name,
    "qk": lambda name: ".attn2.to_q" in name or ".attn2.to_k" in name,
    "full": lambda name: True,
    "lora": lambda name: ".lora_" in name and f".{ADAPTER}." in name,
}
"""Which weights learn, by the name of the choice: a test of each parameter's name."""


@dataclass(frozen=True)
class UnlearnConfig:
    """How to forget. The paper does not fix these numbers for us: every default is ours.

    Attributes:
        iterations: optimizer steps.
        batch_size, memory_batch_size: pictures of the concept and of the memory in each step, of all
            processes together.
        target_size, memory_size: how many pictures of each the model draws of itself, once, at the start.
        lessons: how many noisy versions of each of the two the reference answers for before learning starts;
            they take turns over the pictures. Few are learned by heart, many take time and memory.
        lr: AdamW's learning rate.
        lambda_attention: weight of the cross-attention loss (lambda_U).
        lambda_prior: weight of the prior-preservation loss (lambda_pr). With 10 the concept's relatives
            suffered, with 1000 a little of it was left (benchmarks/results/single.csv).
        lambda_regularization: weight of the pull back to the weights at the start (lambda_R). We measured no
            effect on pictures, neither in one request nor in twelve (benchmarks/results).
        target: what the concept's attention should become: "uncond", "negative" or "clamped";
            see :func:`duge_lite.losses.attention_target`.
        without: what the reference is asked in place of the concept: "empty", the empty prompt (the paper's
            form, as reviews give it), or "nameless", the prompt with the name left out (ours): "a neon sign"
            for "a neon sign of an apple". The empty prompt lacks the style too, so that it goes as well. An
            objective's ``anchors`` are asked instead of either.
        scale: eta, how far past the unconditional attention a "negative" target lies.
        match: "output" compares what each cross-attention layer writes, "probs" its softmax maps.
        preserve: what the prior loss asks for on memory pictures: "reference", the frozen model's own
            prediction (ours), or "noise", the noise that was added (the paper's form, as reviews give it).
        regularizer: what weighs the pull back: "l2" all weights alike, "fisher" or "mas" by how much each
            matters for the memory; see :func:`duge_lite.losses.estimate_importance`.
        reference: whose answers count in a sequence of requests: "base", the model before the first one, or
            "previous", the model before this one. The same thing for a single request.
        anchor: the same choice for the weights that the regularization pulls to.
        protect: share of the memory's text, by energy, whose keys and values must not change at all: changes
            of to_k and to_v are projected away from it; 0 for off. See
            :func:`duge_lite.losses.free_directions`.
        merge: in a sequence, learn each request from the base model alone and add up the changes (task
            arithmetic, Ilharco et al., arXiv 2212.04089), instead of going on from the last model.
        revisit: share of the concept's pictures that show concepts of earlier requests, so that they do not
            come back (ours). Of what went before the last of twelve requests, the judge still saw a third
            with 0, nothing with a half (revival in benchmarks/results/continual.csv).
        train: "cross_attention", "kv", "qk", "full", or "lora" (low-rank updates of the cross-attention by
            peft; ``run.export_lora(folder)`` writes them for plain diffusers).
        rank: of the LoRA updates.
        grad_clip: largest norm of the gradient.
        low_memory: for a small GPU: recompute activations in the backward pass (about a third slower), and
            keep the text encoder and the autoencoder in main memory while nobody uses them. It changes no
            result, so it does not imply train="lora", which does and saves a little more. Estimated for an
            iteration of Stable Diffusion 1.4 at 512 px with 2 + 2 pictures: 7.4 GiB without, 3.5 GiB with it,
            2.8 GiB with both, and one or two for CUDA (benchmarks/results/gpu-estimate.txt).
        measure_every: measure the gradient norm of each loss at every so-manieth iteration; 0 for never
            (each measurement costs about as much as an iteration).
        seed: of the pictures, the noise and the order; one seed, one result.
    """

    iterations: int = 150
    batch_size: int = 8
    memory_batch_size: int = 8
    target_size: int = 32
    memory_size: int = 128
    lessons: int = 256
    lr: float = 1e-3
    lambda_attention: float = 1.0
    lambda_prior: float = 100.0
    lambda_regularization: float = 10.0
    target: str = "negative"
    without: str = "nameless"
    scale: float = 0.5
    match: str = "output"
    preserve: str = "reference"
    regularizer: str = "l2"
    reference: str = "base"
    anchor: str = "base"
    protect: float = 0.0
    merge: bool = False
    revisit: float = 0.5
    train: str = "cross_attention"
    rank: int = 8
    grad_clip: float = 1.0
    low_memory: bool = False
    measure_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("iterations", "batch_size", "memory_batch_size", "target_size", "memory_size", "lessons")
        for name in (*counts, "rank"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected a whole number, at least 1")
        for name in ("lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: expected a number above 0")
        for name in ("lambda_attention", "lambda_prior", "lambda_regularization", "scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 0 (off) or more")
        if not 0 <= self.revisit < 1:
            raise ValueError(f"revisit = {self.revisit}: expected a share from 0 (never) to below 1")
        if not 0 <= self.protect <= 1:
            raise ValueError(f"protect = {self.protect}: expected a share from 0 (off) to 1")
        if self.train == "lora" and (self.protect or self.merge):
            raise ValueError('train = "lora" goes with neither protect nor merge: its factors do not add up')
        if not isinstance(self.measure_every, int) or self.measure_every < 0:
            raise ValueError(f"measure_every = {self.measure_every!r}: expected 0 (never) or a whole number")
        choices = {
            "target": TARGET_KINDS,
            "without": ("empty", "nameless"),
            "match": ("output", "probs"),
            "preserve": ("reference", "noise"),
            "regularizer": ("l2", *IMPORTANCE_KINDS),
            "reference": ("base", "previous"),
            "anchor": ("base", "previous"),
            "train": tuple(TRAINABLE),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if self.match == "output" and self.target == "clamped":
            raise ValueError('target = "clamped" makes probabilities: it goes with match = "probs" only')

    @property
    def picture_seed(self) -> int:
        """The first seed of the pictures: far from those of evaluation and of other runs."""
        return 1_000_000 * (self.seed + 1)

    def table(self) -> pd.DataFrame:
        """The settings as a table."""
        return pd.DataFrame({"value": pd.Series(asdict(self), dtype=object)}).rename_axis("setting")

    def to_json(self) -> str:
        """The settings as json; :meth:`from_json` reads them back."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> UnlearnConfig:
        """Raises ValueError for a setting that there is not."""
        values = json.loads(text)
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise ValueError(f"no such setting: {', '.join(sorted(unknown))}; written by another version?")
        return cls(**values)
