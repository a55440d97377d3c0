"""Forgetting, searched: the losses go down their slope, step by step, through the whole denoiser.

The paper's form of DUGE, and the road of the methods that it is compared with (:mod:`duge_lite.baselines`).
First ask, then learn: before anything is trained the frozen reference says what it predicts and hears for
noisy versions of pictures that it drew itself. So it is no second model, and no iteration pays for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor

from .attention import AttentionRecorder, record_attention
from .concepts import ModelCard
from .config import TRAINABLE, UnlearnConfig
from .errors import DivergedError, OutOfMemoryError
from .losses import attention_target, cross_attention_loss, prior_preservation_loss, regularization_loss
from .models import Pictures, draw_pictures, encode_prompts, swapped

# ---------------------------------------------------------------------------- what is learned from


@dataclass(frozen=True)
class Noised:
    """Pictures with noise and the text that belongs to them, before anybody was asked; all on the CPU.

    Attributes:
        noisy: (n, 4, h, w).
        timesteps: (n,).
        encoder_hidden_states: (n, T, D).
        truth: what a perfect model would answer, (n, 4, h, w): the noise, or the velocity in models that
            predict that; zero where it is not known.
        index: which picture each one was, (n,).
    """

    noisy: Tensor
    timesteps: Tensor
    encoder_hidden_states: Tensor
    truth: Tensor
    index: Tensor

    @classmethod
    def of(
        cls, pictures: Pictures, count: int, scheduler: DDPMScheduler, generator: torch.Generator
    ) -> Noised:
        """``count`` noisy versions of ``pictures``, which take turns."""
        index = torch.arange(count) % len(pictures.prompts)
        clean = pictures.latents[index]
        timesteps = torch.randint(len(scheduler.betas), (count,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        velocity = scheduler.config.prediction_type == "v_prediction"
        truth = scheduler.get_velocity(clean, noise, timesteps) if velocity else noise
        noisy = scheduler.add_noise(clean, noise, timesteps)
        return cls(noisy, timesteps, pictures.encoder_hidden_states[index], truth, index)

    @classmethod
    def half_drawn(
        cls,
        pipe: StableDiffusionPipeline,
        prompts: Sequence[str],
        count: int,
        seed: int,
        generator: torch.Generator,
        card: ModelCard,
        guidance_scale: float,
    ) -> Noised:
        """``count`` moments of the drawing of ``prompts``, the first one too: as the sampler meets them."""
        seen: list[Tensor] = []  # of every prompt and moment, (4, h, w)

        def look(unet: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            latents = args[0] if args else kwargs["sample"]  # (2 B, 4, h, w): both halves are the same
            moments.append(latents[: len(part)].float().cpu())

        hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
        try:
            for start in range(0, len(prompts), card.batch_size):
                part, moments = list(prompts[start : start + card.batch_size]), []
                seeds = range(seed + start, seed + start + len(part))
                pipe(
                    part,
                    num_inference_steps=card.sampling_steps,
                    guidance_scale=guidance_scale,
                    generator=[torch.Generator().manual_seed(own) for own in seeds],
                    output_type="latent",
                )
                seen += torch.stack(moments, 1)  # (B, steps, 4, h, w)
        finally:
            hook.remove()
        times = pipe.scheduler.timesteps.long().cpu()
        index = torch.arange(count) % len(prompts)
        when = torch.randint(len(times), (count,), generator=generator)
        noisy = torch.stack(seen)[index, when]  # (n, 4, h, w)
        text = encode_prompts(pipe, prompts)[index]
        return cls(noisy, times[when], text, torch.zeros_like(noisy), index)


# ---------------------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Pass:
    """One forward pass over pictures of the concept.

    Attributes:
        noise_pred: (B, 4, h, w).
        layers: per cross-attention layer its maps (B, heads, H*W, T) or, with ``match="output"``, what it
            wrote (B, H*W, C); empty when the objective does not look at attention.
    """

    noise_pred: Tensor
    layers: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Objective:
    """How a method forgets; pictures, memory and budget are shared by all of them.

    Attributes:
        name: for tables.
        target: what is wanted for a batch of pictures, a tuple of tensors (B, ...), from two passes (asked
            for the concept; asked for something instead), the true answer (the noise that was added) and the
            settings.
        loss: a scalar, from the learning model's pass and the target.
        source: where it comes from.
        looks_at_attention: whether the layers have to be recorded.
        half_drawn: noisy pictures are caught half-drawn, with this guidance; None: drawn, then noised.
        empty: what is asked instead is always the empty prompt.
        of_instead: the pictures show what is asked instead, not the concept.
        moving: the target is what the learning model itself says by now, and not the frozen reference.
    """

    name: str
    target: Callable[[Pass, Pass, Tensor, UnlearnConfig], tuple[Tensor, ...]]
    loss: Callable[[Pass, tuple[Tensor, ...]], Tensor]
    source: str
    looks_at_attention: bool = False
    half_drawn: float | None = None
    empty: bool = False
    of_instead: bool = False
    moving: bool = False


def _attention_targets(
    concept: Pass, other: Pass, noise: Tensor, config: UnlearnConfig
) -> tuple[Tensor, ...]:
    pairs = zip(concept.layers, other.layers, strict=True)
    return tuple(attention_target(c, u, config.target, config.eta) for c, u in pairs)


DUGE = Objective(
    "DUGE",
    _attention_targets,
    lambda learner, wanted: cross_attention_loss(learner.layers, wanted),
    "arXiv 2503.13769; the target is ours",
    looks_at_attention=True,
)
"""The cross-attention loss: hear, when the concept is named, what you would hear if asked otherwise."""


# ---------------------------------------------------------------------------- the reference's answers


@dataclass(frozen=True)
class Lessons:
    """Noisy pictures, what the model is asked about them, and the answer that is wanted; all on the CPU.

    Attributes:
        noisy: (n, 4, h, w).
        timesteps: (n,).
        encoder_hidden_states: (n, T, D).
        wanted: tensors (n, ...).
        other: what is asked instead, (n, T, D), where the target moves.
    """

    noisy: Tensor
    timesteps: Tensor
    encoder_hidden_states: Tensor
    wanted: tuple[Tensor, ...]
    other: Tensor | None = None

    def batch(self, size: int, generator: torch.Generator, device: torch.device) -> Lessons:
        """``size`` random lessons on ``device``."""
        index = torch.randint(len(self.noisy), (size,), generator=generator)
        parts = (self.noisy, self.timesteps, self.encoder_hidden_states)
        wanted = tuple(w[index].to(device) for w in self.wanted)
        other = None if self.other is None else self.other[index].to(device)
        return Lessons(*(x[index].to(device) for x in parts), wanted, other)


def watching(
    unet: torch.nn.Module, objective: Objective, config: UnlearnConfig, size: tuple[int, int]
) -> AbstractContextManager[AttentionRecorder | None]:
    """Records what ``objective`` looks at, on latents of ``size``; None when that is nothing."""
    if not objective.looks_at_attention:
        return nullcontext()
    outputs = config.match == "output"
    return record_attention(unet, size, probs=not outputs, outputs=outputs)


def passed(noise_pred: Tensor, record: AttentionRecorder | None, part: slice) -> Pass:
    """A slice of the batch that just went through the UNet."""
    layers = () if record is None else (record.outputs or record.probs).values()
    return Pass(noise_pred[part], tuple(layer[part] for layer in layers))


@torch.no_grad()
def ask_about_concept(
    unet: torch.nn.Module, asked: Noised, other: Tensor, objective: Objective, config: UnlearnConfig
) -> Lessons:
    """The reference's answers about the concept; ``other`` (n, T, D) is the text that it is asked instead."""
    lessons = Lessons(asked.noisy, asked.timesteps, asked.encoder_hidden_states, ())
    if objective.moving:
        return replace(lessons, other=other)
    answers: tuple[Tensor, ...] = ()
    size = config.batch_size  # as many at once as in training
    for i in range(0, len(asked.noisy), size):
        part = slice(i, i + size)
        twice = (torch.cat([x[part]] * 2).to(unet.device) for x in (asked.noisy, asked.timesteps))
        text = torch.cat([asked.encoder_hidden_states[part], other[part]]).to(unet.device)
        with watching(unet, objective, config, asked.noisy.shape[-2:]) as record:
            frozen = unet(*twice, text).sample
        half = len(frozen) // 2
        concept, instead = (passed(frozen, record, s) for s in (slice(half), slice(half, None)))
        targets = objective.target(concept, instead, asked.truth[part].to(unet.device), config)
        if not answers:  # filled in place, in the model's precision: together they are large
            shapes = [(len(asked.noisy), *target.shape[1:]) for target in targets]
            answers = tuple(torch.empty(shape, dtype=frozen.dtype) for shape in shapes)
        for answer, target in zip(answers, targets, strict=True):
            answer[part] = target
    return replace(lessons, wanted=answers)


@torch.no_grad()
def ask_about_memory(unet: torch.nn.Module, asked: Noised, config: UnlearnConfig) -> Lessons:
    """What the prior loss wants for memory pictures: the reference's own prediction."""
    inputs = (asked.noisy, asked.timesteps, asked.encoder_hidden_states)
    size = config.memory_batch_size
    answers = [
        unet(*(x[i : i + size].to(unet.device) for x in inputs)).sample.cpu()
        for i in range(0, len(asked.noisy), size)
    ]
    return Lessons(*inputs, (torch.cat(answers),))


# ---------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class UnlearnState:
    """Where the loop is after iteration ``step`` (counted from 1); losses are unweighted.

    ``forget`` is the objective's own loss (DUGE's cross-attention loss). The ``grad_`` fields are the norms
    of the three losses' gradients, unweighted, nan where they were not measured.
    """

    step: int
    iterations: int
    loss: float
    forget: float
    prior: float
    regularization: float
    grad_forget: float = math.nan
    grad_prior: float = math.nan
    grad_regularization: float = math.nan


@contextmanager
def rounded(trained: Mapping[str, torch.nn.Parameter], dtype: torch.dtype) -> Iterator[None]:
    """The weights as the pipeline stores them, for a moment; what somebody changes meanwhile counts."""
    masters = {name: p.data for name, p in trained.items()}
    torch.clear_autocast_cache()
    try:
        for p in trained.values():
            p.data = p.data.to(dtype)
        yield
    finally:
        for name, p in trained.items():
            p.data = masters[name] if torch.equal(p.data, masters[name].to(dtype)) else p.data.float()
        torch.clear_autocast_cache()


@contextmanager
def training(unet: torch.nn.Module, trained: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
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


def trainable_parameters(
    unet: torch.nn.Module, train: str = "cross_attention"
) -> dict[str, torch.nn.Parameter]:
    """The tensors that ``config.train`` lets learn, by name. Raises ValueError for Stable Diffusion XL."""
    if unet.config.addition_embed_type is not None:
        raise ValueError(
            "Stable Diffusion XL reads two texts and the picture's size beside them, which the gradient "
            'solver does not know: leave solver="exact"'
        )
    return {name: p for name, p in unet.named_parameters() if TRAINABLE[train](name)}


def batch_losses(
    unet: torch.nn.Module,
    forget: Lessons,
    keep: Lessons | None,
    objective: Objective,
    record: AttentionRecorder | None,
    config: UnlearnConfig,
) -> tuple[Tensor, Tensor]:
    """The objective's loss and the prior-preservation loss (0 without memory), from one pass over both."""
    wanted = forget.wanted
    if objective.moving:
        with torch.no_grad():
            answer = Pass(unet(forget.noisy, forget.timesteps, forget.other).sample)
        wanted = objective.target(answer, answer, answer.noise_pred, config)
    names = ("noisy", "timesteps", "encoder_hidden_states")
    inputs = (torch.cat([getattr(part, name) for part in (forget, keep) if part]) for name in names)
    noise_pred = unet(*inputs).sample  # (b + m, 4, h, w)
    size = len(forget.noisy)
    loss = objective.loss(passed(noise_pred, record, slice(size)), wanted)
    if record is not None:
        record.stop()  # or it would hold on to all that the backward pass computes again
    return loss, prior_preservation_loss(noise_pred[size:], keep.wanted[0]) if keep else 0 * loss


def gradient_steps(
    pipe: StableDiffusionPipeline,
    asks: Sequence[tuple[str, str]],
    memory: Pictures | None,
    config: UnlearnConfig,
    card: ModelCard,
    base: Mapping[str, Tensor],
    objective: Objective = DUGE,
) -> Iterator[UnlearnState]:
    """Forgets in place, yielding a state after each iteration. Stopping early keeps what was learned so far.

    Args:
        asks: for every picture of what goes its prompt and what is asked instead.
        memory: pictures of what is to stay; None for a method that looks at none.
        base: the weights of the reference, by name: of the model before anything went.

    Between two states the pipeline can be used, and only then may somebody else change its weights. Raises
    DivergedError when a loss is no longer finite, OutOfMemoryError when the device's memory is too small;
    after both the weights are as they were.
    """
    generator = torch.Generator().manual_seed(config.seed)
    unet, device = pipe.unet, pipe.unet.device
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    trained = trainable_parameters(unet, config.train)
    first = {name: base.get(name, p.data) for name, p in trained.items()}
    prompts, others = zip(*asks, strict=True)
    others = [""] * len(others) if objective.empty else others
    seed = 1_000_000 * (config.seed + 1)  # far from those of evaluation and of other runs
    with swapped(trained, first):  # pictures are drawn by whose answers count
        shown = others if objective.of_instead else prompts
        if objective.half_drawn is not None:
            drawn = (config.lessons, seed, generator, card, objective.half_drawn)
            target = Noised.half_drawn(pipe, shown, *drawn)
        else:
            pictures = draw_pictures(pipe, shown, seed, card)
            target = Noised.of(pictures, config.lessons, scheduler, generator)
    texts, instead = encode_prompts(pipe, prompts)[target.index], encode_prompts(pipe, others)[target.index]
    target = replace(target, encoder_hidden_states=texts)
    kept = Noised.of(memory, config.lessons, scheduler, generator) if memory else None
    stored = unet.dtype  # of the pipeline; what is trained is in 32 bits meanwhile
    asked = torch.is_autocast_enabled(device.type)  # by the caller
    precision = torch.get_autocast_dtype(device.type) if asked else stored
    # without autocast's cache, which would outlive the weights that are swapped in
    mixed = torch.autocast(device.type, precision, enabled=precision != torch.float32, cache_enabled=False)

    step = 0
    with training(unet, trained):
        start = {name: p.detach().cpu().clone() for name, p in trained.items()}
        anchor = {name: value.to(device, torch.float16) for name, value in first.items()}

        def put_back() -> None:
            for name, p in trained.items():
                p.data = start[name].to(device)

        try:
            with mixed, swapped(trained, first):
                lessons = ask_about_concept(unet, target, instead, objective, config)
                memory_lessons = ask_about_memory(unet, kept, config) if kept else None
            optimizer = torch.optim.AdamW(trained.values(), lr=config.lr, weight_decay=0.0)
            scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
            for step in range(1, config.iterations + 1):
                forget = lessons.batch(config.batch_size, generator, device)
                keep = memory_lessons and memory_lessons.batch(config.memory_batch_size, generator, device)
                # watched to the end of the backward pass: gradient checkpointing runs the layers again
                with watching(unet, objective, config, target.noisy.shape[-2:]) as record:
                    with mixed:
                        forget_loss, prior = batch_losses(unet, forget, keep, objective, record, config)
                    losses = {
                        "attention" if objective is DUGE else objective.name: forget_loss,
                        "prior": prior,
                        "regularization": regularization_loss(trained, anchor),
                    }
                    loss = sum(w * v for w, v in zip(config.weights, losses.values(), strict=True))
                    norms = []
                    if config.measure_every and (step - 1) % config.measure_every == 0:
                        scaled = [_gradient_norm(scaler.scale(v), trained) for v in losses.values()]
                        norms = [norm / scaler.get_scale() for norm in scaled]  # 16 bits would lose them
                    optimizer.zero_grad(set_to_none=True)
                    scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(trained.values(), config.grad_clip)
                if not scaler.is_enabled() or not torch.isfinite(loss):  # a scaler skips steps that overflow
                    _check_finite(losses, norm, step, config)
                scaler.step(optimizer)
                scaler.update()
                if step == config.iterations:  # no later loss would show what the last step did
                    size = target.noisy.shape[-2:]
                    with torch.no_grad(), watching(unet, objective, config, size) as record:
                        with mixed:
                            last = batch_losses(unet, forget, keep, objective, record, config)
                    _check_finite(dict(zip(losses, last, strict=False)), torch.zeros(()), step, config)
                if not all(torch.isfinite(p).all() for p in trained.values()):
                    raise DivergedError(_advice("a weight is no number any more", step, config))
                values = [float(v.detach()) for v in (loss, *losses.values())]
                with rounded(trained, stored):
                    yield UnlearnState(step, config.iterations, *values, *norms)  # previews can be drawn
        except DivergedError:
            put_back()
            raise
        except torch.OutOfMemoryError as error:
            put_back()
            raise OutOfMemoryError(
                f"{device} ran out of memory at iteration {step}; the weights are back as they were. Lower "
                f"batch_size (now {config.batch_size}) and memory_batch_size (now "
                f"{config.memory_batch_size}), call pipe.unet.enable_gradient_checkpointing(), or train less "
                f'with train="kv" (now "{config.train}").'
            ) from error


def _check_finite(losses: Mapping[str, Tensor], norm: Tensor, step: int, config: UnlearnConfig) -> None:
    if torch.isfinite(sum(losses.values()) + norm):
        return
    bad = [name for name, value in losses.items() if not torch.isfinite(value)]
    what = (
        f"the {' and '.join(bad)} loss became {losses[bad[0]].item()}"
        if bad
        else f"the gradient is {norm.item()}"
    )
    raise DivergedError(_advice(what, step, config))


def _advice(what: str, step: int, config: UnlearnConfig) -> str:
    return (
        f"{what} at iteration {step}; the weights are back as they were. "
        f"Lower lr (now {config.lr}) or the loss's weight."
    )


def _gradient_norm(loss: Tensor, trained: Mapping[str, torch.nn.Parameter]) -> float:
    gradients = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)
    return float(torch.stack([g.float().norm() for g in gradients if g is not None]).norm())
