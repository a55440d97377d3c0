"""The loop: make a pipeline forget one concept, as a generator of states.

Per iteration one batch holds pictures of the concept (asked for by name, pushed away from what the
frozen reference does) and pictures of other things from a small memory (held where they are). The
reference is no second model: only the trained tensors are kept twice and swapped for its forward pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import pandas as pd
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from .attention import record_attention
from .errors import DivergedError
from .losses import (
    TARGET_KINDS,
    attention_target,
    cross_attention_loss,
    prior_preservation_loss,
    regularization_loss,
)
from .models import ModelCard, model_card, sample

TRAINABLE: dict[str, Callable[[str], bool]] = {
    "cross_attention": lambda name: ".attn2." in name,
    "kv": lambda name: ".attn2.to_k" in name or ".attn2.to_v" in name,
    "qk": lambda name: ".attn2.to_q" in name or ".attn2.to_k" in name,
    "full": lambda name: True,
}
"""Which weights learn, by the name of the choice: a test of each parameter's name."""


@dataclass(frozen=True)
class UnlearnConfig:
    """How to forget. The paper does not fix these numbers for us: every default is ours.

    Attributes:
        iterations: optimizer steps.
        batch_size, memory_batch_size: pictures of the concept and of the memory in each step.
        target_size, memory_size: how many pictures of each the model draws of itself, once, at the start.
        lr: AdamW's learning rate.
        lambda_attention: weight of the cross-attention loss (lambda_U).
        lambda_prior: weight of the prior-preservation loss (lambda_pr).
        lambda_regularization: weight of the pull back to the weights at the start (lambda_R).
        target: what the concept's attention should become: "uncond", "negative" or "clamped";
            see :func:`duge_lite.losses.attention_target`.
        scale: eta, how far past the unconditional attention a "negative" target lies.
        match: "output" compares what each cross-attention layer writes, "probs" its softmax maps.
        train: "cross_attention", "kv", "qk" or "full".
        grad_clip: largest norm of the gradient.
        seed: of the pictures, the noise and the order; one seed, one result.
    """

    iterations: int = 150
    batch_size: int = 8
    memory_batch_size: int = 8
    target_size: int = 32
    memory_size: int = 128
    lr: float = 1e-3
    lambda_attention: float = 1.0
    lambda_prior: float = 100.0
    lambda_regularization: float = 10.0
    target: str = "negative"
    scale: float = 0.5
    match: str = "output"
    train: str = "cross_attention"
    grad_clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "memory_batch_size", "target_size", "memory_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected a whole number, at least 1")
        for name in ("lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: expected a number above 0")
        for name in ("lambda_attention", "lambda_prior", "lambda_regularization", "scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 0 (off) or more")
        choices = {"target": TARGET_KINDS, "match": ("output", "probs"), "train": tuple(TRAINABLE)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if self.match == "output" and self.target == "clamped":
            raise ValueError('target = "clamped" makes probabilities: it goes with match = "probs" only')

    def table(self) -> pd.DataFrame:
        """The settings as a table."""
        return pd.DataFrame({"value": pd.Series(asdict(self), dtype=object)}).rename_axis("setting")


# ---------------------------------------------------------------------------- pictures to learn from


@dataclass(frozen=True)
class Pictures:
    """Noise-free latents with the text that they were drawn from.

    Attributes:
        latents: (n, 4, h, w), scaled.
        encoder_hidden_states: (n, T, D).
        prompts: one each.
    """

    latents: Tensor
    encoder_hidden_states: Tensor
    prompts: tuple[str, ...]

    def batch(self, size: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(self.prompts), (size,), generator=generator)
        return self.latents[index].to(device), self.encoder_hidden_states[index].to(device)


@torch.no_grad()
def encode_prompts(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """The text encoder's hidden states, (n, T, D), float32 on the CPU; equal prompts are read once."""
    distinct = list(dict.fromkeys(prompts))
    ids = pipe.tokenizer(
        distinct,
        padding="max_length",
        truncation=True,
        max_length=pipe.tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    states = pipe.text_encoder(ids.to(pipe.text_encoder.device))[0].float().cpu()
    return states[[distinct.index(p) for p in prompts]]


def draw_pictures(pipe: StableDiffusionPipeline, prompts: Sequence[str], seed: int) -> Pictures:
    """Lets the pipeline draw ``prompts``: what a model knows, in its own hand."""
    card = model_card(pipe)
    latents = sample(pipe, prompts, seed=seed, steps=card.sampling_steps, latents=True)
    return Pictures(latents.float(), encode_prompts(pipe, prompts), tuple(prompts))


def memory_prompts(card: ModelCard, forget: Sequence[str], size: int, seed: int = 0) -> list[str]:
    """``size`` prompts of what is to stay, spread evenly over concepts and styles; none names ``forget``."""
    kept = [c for c in card.concepts if c not in forget]
    styles = [s for s in card.styles if s not in forget]
    if not kept:
        raise ValueError("every concept is to be forgotten: nothing is left for the memory")
    generator = torch.Generator().manual_seed(seed)
    kept = [kept[i] for i in torch.randperm(len(kept), generator=generator)]
    styles = [styles[i] for i in torch.randperm(len(styles), generator=generator)]
    rounds = [divmod(i, len(kept)) for i in range(size)]  # each round: every concept once, styles in turn
    return [card.prompt(kept[i], styles[(i + turn) % len(styles)]) for turn, i in rounds]


# ---------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class UnlearnState:
    """Where the loop is after iteration ``step`` (counted from 1); losses are unweighted."""

    step: int
    iterations: int
    loss: float
    attention: float
    prior: float
    regularization: float


@contextmanager
def _swapped(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> Iterator[None]:
    """Lets the model be the reference for a moment."""
    own = {name: p.data for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            p.data = values[name]
        yield
    finally:
        for name, p in parameters.items():
            p.data = own[name]


@contextmanager
def _training(unet: torch.nn.Module, trained: dict[str, torch.nn.Parameter]) -> Iterator[None]:
    """Only ``trained`` gets gradients, in 32 bits; afterwards flags and precision are as before."""
    flags = {p: p.requires_grad for p in unet.parameters()}
    dtypes = {p: p.dtype for p in trained.values()}
    unet.requires_grad_(False)
    try:
        for p in trained.values():
            p.requires_grad_(True).data = p.data.float()
        yield
    finally:
        for p, dtype in dtypes.items():
            p.data, p.grad = p.data.to(dtype), None
        for p, flag in flags.items():
            p.requires_grad_(flag)


def unlearn_steps(
    pipe: StableDiffusionPipeline,
    concept: str,
    config: UnlearnConfig = UnlearnConfig(),  # noqa: B008 (frozen)
    memory: Pictures | None = None,
) -> Iterator[UnlearnState]:
    """Forgets ``concept`` in place, yielding a state after each iteration.

    Stopping early (``break``) keeps what was learned so far. ``memory`` defaults to pictures of the
    card's other concepts, drawn by the pipeline itself.

    Raises UnknownConceptError for a concept that the model's card does not list, and DivergedError when
    a loss is no longer finite; the weights are then put back as they were.
    """
    card = model_card(pipe)
    card.check(concept)
    unet, device = pipe.unet, pipe.unet.device
    generator = torch.Generator().manual_seed(config.seed)
    prompts = card.prompts(concept)
    prompts = [prompts[i % len(prompts)] for i in range(config.target_size)]
    noise_seed = 1_000_000 * (config.seed + 1)  # far from the seeds of evaluation and of other runs
    target = draw_pictures(pipe, prompts, seed=noise_seed)
    if memory is None:
        texts = memory_prompts(card, [concept], config.memory_size, config.seed)
        memory = draw_pictures(pipe, texts, seed=noise_seed + 500_000)
    empty = encode_prompts(pipe, [""]).to(device)  # (1, T, D)
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    trained = {n: p for n, p in unet.named_parameters() if TRAINABLE[config.train](n)}
    b, m = config.batch_size, config.memory_batch_size
    # no cache: it would keep the reference's 16-bit weights for the learning model's pass
    precision = unet.dtype
    mixed = torch.autocast(device.type, precision, enabled=precision != torch.float32, cache_enabled=False)

    with _training(unet, trained):
        reference = {name: p.detach().clone() for name, p in trained.items()}
        optimizer = torch.optim.AdamW(trained.values(), lr=config.lr, weight_decay=0.0)
        for step in range(1, config.iterations + 1):
            x_target, c_target = target.batch(b, generator, device)
            x_memory, c_memory = memory.batch(m, generator, device)
            clean = torch.cat([x_target, x_memory])  # (b + m, 4, h, w)
            noise = torch.randn(clean.shape, generator=generator).to(device)
            timesteps = torch.randint(len(noise_scheduler.betas), (b + m,), generator=generator).to(device)
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)
            text = torch.cat([c_target, c_memory])  # (b + m, T, D)
            size = tuple(clean.shape[-2:])

            with (
                mixed,
                record_attention(
                    unet, size, probs=config.match == "probs", outputs=config.match == "output"
                ) as record,
            ):
                seen = record.outputs if config.match == "output" else record.probs
                with torch.no_grad(), _swapped(trained, reference):  # with the concept, memory, without it
                    frozen = unet(
                        torch.cat([noisy, noisy[:b]]),
                        torch.cat([timesteps, timesteps[:b]]),
                        torch.cat([text, empty.expand(b, -1, -1)]),
                    ).sample
                    targets = [
                        attention_target(a[:b], a[b + m :], config.target, config.scale)
                        for a in seen.values()
                    ]
                noise_pred = unet(noisy, timesteps, text).sample
                maps = [a[:b] for a in seen.values()]

            attention = cross_attention_loss(maps, targets)
            prior = prior_preservation_loss(noise_pred[b:], frozen[b : b + m])
            regularization = regularization_loss(trained, reference)
            loss = (
                config.lambda_attention * attention
                + config.lambda_prior * prior
                + config.lambda_regularization * regularization
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), config.grad_clip)
            if not torch.isfinite(loss + norm):
                for name, p in trained.items():
                    p.data = reference[name]
                parts = {"attention": attention, "prior": prior, "regularization": regularization}
                bad = [name for name, value in parts.items() if not torch.isfinite(value)]
                what = f"{' and '.join(bad)} loss became" if bad else "gradient's norm is"
                value = loss.item() if bad else norm.item()
                raise DivergedError(
                    f"the {what} {value} at iteration {step}; the weights are back as they were. "
                    f"Lower lr (now {config.lr}) or the loss's weight."
                )
            optimizer.step()
            values = [float(v.detach()) for v in (loss, attention, prior, regularization)]
            with _swapped(trained, {n: p.data.to(precision) for n, p in trained.items()}):
                yield UnlearnState(step, config.iterations, *values)  # a model that can draw a preview


@dataclass
class UnlearningRun:
    """What :func:`unlearn` did, and the way back.

    Attributes:
        concept, config: what was asked.
        history: a row per iteration: loss, attention, prior, regularization.
        seconds: wall-clock time, the drawing of the memory included.
    """

    pipe: StableDiffusionPipeline
    concept: str
    config: UnlearnConfig
    history: pd.DataFrame
    seconds: float
    before: dict[str, Tensor] = field(repr=False)

    def restore(self) -> None:
        """Puts the weights from before the run back into the pipeline."""
        parameters = dict(self.pipe.unet.named_parameters())
        with torch.no_grad():
            for name, value in self.before.items():
                parameters[name].copy_(value)


def unlearn(
    pipe: StableDiffusionPipeline,
    concept: str,
    config: UnlearnConfig = UnlearnConfig(),  # noqa: B008 (frozen)
    memory: Pictures | None = None,
    on_step: Callable[[UnlearnState], None] | None = None,
    progress: bool = True,
) -> UnlearningRun:
    """Makes ``pipe`` forget ``concept``, in place: ``duge.unlearn(pipe, "apple")``.

    Shows a progress bar; ``on_step(state)`` is called after every iteration. An interruption (the stop
    button) keeps what has been learned so far and returns the run. For errors see :func:`unlearn_steps`.
    """
    started = time.perf_counter()
    chosen = TRAINABLE[config.train]
    before = {n: p.detach().cpu().clone() for n, p in pipe.unet.named_parameters() if chosen(n)}
    rows: list[dict] = []
    steps = unlearn_steps(pipe, concept, config, memory)
    bar = tqdm(steps, total=config.iterations, desc=f"forgetting {concept}", disable=not progress)
    try:
        for state in bar:
            rows.append(asdict(state))
            bar.set_postfix(attention=f"{state.attention:.3f}", prior=f"{state.prior:.4f}")
            if on_step is not None:
                on_step(state)
    except KeyboardInterrupt:
        bar.write(f"stopped after {len(rows)} of {config.iterations} iterations; what was learned is kept")
    finally:
        steps.close()
        bar.close()
    columns = ["step", "loss", "attention", "prior", "regularization"]
    history = pd.DataFrame(rows, columns=columns).set_index("step")
    return UnlearningRun(pipe, concept, config, history, time.perf_counter() - started, before)
