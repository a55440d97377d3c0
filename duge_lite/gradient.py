"""Forgetting, searched: the losses go down their slope, step by step, through the whole denoiser.

The paper's form of DUGE, and the road of the methods that it is compared with (:mod:`duge_lite.baselines`).
First ask, then learn: before anything is trained the frozen reference says what it predicts and hears for
noisy versions of pictures that it drew itself. So it is no second model, and no iteration pays for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor

from .attention import AttentionRecorder, record_attention
from .concepts import ModelCard, UnlearnConfig
from .errors import DivergedError, OutOfMemoryError
from .losses import attention_target, cross_attention_loss, prior_preservation_loss, regularization_loss
from .models import Pictures, copied, draw_pictures, encode_prompts, overwrite, sample, swapped

Answer = tuple[Tensor, ...]
"""What an objective compares, of one pass over a batch: the predicted noise (B, 4, h, w) alone, or, of DUGE,
what every cross-attention layer wrote (B, H*W, C)."""


@dataclass(frozen=True)
class Objective:
    """How a method forgets; pictures, memory and budget are shared by all of them.

    Attributes:
        name: for tables.
        target: what is wanted for a batch of pictures, from two answers (asked for the concept; asked for
            something instead), the true answer (the noise that was added) and the settings.
        loss: a scalar, from the learning model's answer and the target.
        of_layers: the answer is what the layers wrote.
        half_drawn: noisy pictures are caught half-drawn, with this guidance; None: drawn, then noised.
        empty: what is asked instead is always the empty prompt.
        moving: pictures show what is asked instead, and the target is what the learning model itself says of
            them by now, and not the frozen reference.
        trains: the weights that learn have one of these in their names.
    """

    name: str
    target: Callable[[Answer, Answer, Tensor, UnlearnConfig], Answer]
    loss: Callable[[Answer, Answer], Tensor]
    of_layers: bool = False
    half_drawn: float | None = None
    empty: bool = False
    moving: bool = False
    trains: tuple[str, ...] = (".attn2.",)

    def trained(self, unet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        """The weights that learn, by name."""
        return {n: p for n, p in unet.named_parameters() if any(part in n for part in self.trains)}


def _away(concept: Answer, other: Answer, noise: Tensor, config: UnlearnConfig) -> Answer:
    pairs = zip(concept, other, strict=True)
    return tuple(attention_target(c, u, config.eta) for c, u in pairs)


DUGE = Objective("DUGE", _away, cross_attention_loss, of_layers=True)
"""The cross-attention loss: write, when the concept is named, what you would write if asked otherwise
(arXiv 2503.13769; the target is ours)."""


# ---- what is learned from


@dataclass(frozen=True)
class Lessons:
    """Noisy pictures, the text that the denoiser is asked with, and the answer that is wanted.

    Attributes:
        noisy: (n, 4, h, w).
        timesteps: (n,).
        encoder_hidden_states: (n, T, D).
        wanted: tensors (n, ...). At first what a perfect model would answer: the noise, or the velocity in
            models that predict that; zero where it is not known. Where the target moves: the text that the
            learning model is asked for it.
        index: which picture each one was, (n,).
    """

    noisy: Tensor
    timesteps: Tensor
    encoder_hidden_states: Tensor
    wanted: Answer
    index: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the denoiser takes, in its order."""
        return self.noisy, self.timesteps, self.encoder_hidden_states

    @classmethod
    def of(
        cls, pictures: Pictures, count: int, scheduler: DDPMScheduler, generator: torch.Generator
    ) -> Lessons:
        """``count`` noisy versions of ``pictures``, which take turns."""
        index = torch.arange(count) % len(pictures.prompts)
        clean = pictures.latents[index]
        timesteps = torch.randint(len(scheduler.betas), (count,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        velocity = scheduler.config.prediction_type == "v_prediction"
        truth = scheduler.get_velocity(clean, noise, timesteps) if velocity else noise
        noisy = scheduler.add_noise(clean, noise, timesteps)
        return cls(noisy, timesteps, pictures.encoder_hidden_states[index], (truth,), index)

    @classmethod
    def half_drawn(
        cls, pipe: StableDiffusionPipeline, prompts: Sequence[str], count: int, seed: int,
        generator: torch.Generator, card: ModelCard, guidance_scale: float,
    ) -> Lessons:  # fmt: skip
        """``count`` moments of the drawing of ``prompts``, the first one too: as the sampler meets them."""
        met: list[Tensor] = []  # of every batch and moment, (B, 4, h, w)

        def look(unet: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            latents = args[0] if args else kwargs["sample"]  # (2 B, 4, h, w): both halves are the same
            met.append(latents.chunk(2)[0].float().cpu())

        with pipe.unet.register_forward_pre_hook(look, with_kwargs=True):
            sample(pipe, prompts, seed, card.sampling_steps, guidance_scale, output_type="latent", card=card)
        times = pipe.scheduler.timesteps.long().cpu()
        batches = (torch.stack(met[i : i + len(times)], 1) for i in range(0, len(met), len(times)))
        index = torch.arange(count) % len(prompts)
        when = torch.randint(len(times), (count,), generator=generator)
        noisy = torch.cat(list(batches))[index, when]  # (n, 4, h, w)
        unknown = (torch.zeros_like(noisy),)
        return cls(noisy, times[when], encode_prompts(pipe, prompts)[index], unknown, index)

    def batch(self, size: int, generator: torch.Generator, device: torch.device) -> Lessons:
        """``size`` random lessons on ``device``."""
        index = torch.randint(len(self.noisy), (size,), generator=generator)
        parts = [x[index].to(device) for x in (*self.inputs, *self.wanted)]
        return Lessons(*parts[:3], tuple(parts[3:]))


def answered(noise_pred: Tensor, record: AttentionRecorder, part: slice) -> Answer:
    """The answer for a slice of the batch that just went through the UNet; the layers' if it is recorded."""
    return tuple(x[part] for x in record.outputs.values() or (noise_pred,))


@torch.no_grad()
def ask_about_concept(
    unet: torch.nn.Module, asked: Lessons, other: Tensor, objective: Objective, config: UnlearnConfig
) -> Lessons:
    """The reference's answers about the concept; ``other`` (n, T, D) is the text that it is asked instead."""
    if objective.moving:
        return replace(asked, wanted=(other,))
    answers: Answer = ()
    for i in range(0, len(asked.noisy), config.batch_size):  # as many at once as in training
        part = slice(i, i + config.batch_size)
        twice = (torch.cat([x[part]] * 2).to(unet.device) for x in asked.inputs[:2])
        text = torch.cat([asked.encoder_hidden_states[part], other[part]]).to(unet.device)
        with record_attention(unet, probs=False, outputs=objective.of_layers) as record:
            frozen = unet(*twice, text).sample
        half = len(frozen) // 2
        concept, instead = (answered(frozen, record, s) for s in (slice(half), slice(half, None)))
        targets = objective.target(concept, instead, asked.wanted[0][part].to(unet.device), config)
        if not answers:  # filled in place, in the model's precision: together they are large
            count = len(asked.noisy)
            answers = tuple(torch.empty(count, *t.shape[1:], dtype=frozen.dtype) for t in targets)
        for answer, target in zip(answers, targets, strict=True):
            answer[part] = target
    return replace(asked, wanted=answers)


@torch.no_grad()
def ask_about_memory(unet: torch.nn.Module, asked: Lessons, size: int) -> Lessons:
    """What the prior loss wants for memory pictures, ``size`` at once: the reference's own prediction."""
    batches = zip(*(x.split(size) for x in asked.inputs), strict=True)
    answers = [unet(*(x.to(unet.device) for x in batch)).sample.cpu() for batch in batches]
    return replace(asked, wanted=(torch.cat(answers),))


# ---- the weights meanwhile


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


def reads_one_text(unet: torch.nn.Module) -> None:
    """Raises ValueError for Stable Diffusion XL, whose denoiser reads more than noise, moment and text."""
    if unet.config.addition_embed_type is not None:
        raise ValueError(
            "Stable Diffusion XL reads two texts, and the picture's size beside them, which only drawing and "
            'the exact solver know: leave solver="exact", or take a model of 1.x or 2.x'
        )


# ---- the loop


@dataclass(frozen=True)
class UnlearnState:
    """After iteration ``step`` (from 1); ``forget`` is the objective's own loss, ``loss`` the total."""

    step: int
    iterations: int
    loss: float
    forget: float
    prior: float
    regularization: float


def batch_losses(
    unet: torch.nn.Module, forget: Lessons, keep: Lessons | None, objective: Objective,
    record: AttentionRecorder, config: UnlearnConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The objective's loss and the prior-preservation loss (0 without memory), from one pass over both."""
    wanted = forget.wanted
    if objective.moving:
        with torch.no_grad():
            now = (unet(forget.noisy, forget.timesteps, *wanted).sample,)
        wanted = objective.target(now, now, now[0], config)
    both = zip(*(part.inputs for part in (forget, keep) if part), strict=True)
    noise_pred = unet(*map(torch.cat, both)).sample  # (b + m, 4, h, w)
    size = len(forget.noisy)
    loss = objective.loss(answered(noise_pred, record, slice(size)), wanted)
    record.stop()  # or it would hold on to all that the backward pass computes again
    return loss, prior_preservation_loss(noise_pred[size:], keep.wanted[0]) if keep else 0 * loss


def gradient_steps(
    pipe: StableDiffusionPipeline, asks: Sequence[tuple[str, str]], memory: Pictures | None,
    config: UnlearnConfig, card: ModelCard, base: Mapping[str, Tensor], objective: Objective,
) -> Iterator[UnlearnState]:  # fmt: skip
    """What :func:`~duge_lite.unlearning.unlearn_steps` says; others may touch weights only between states.

    Args:
        asks: for every picture of what goes its prompt and what is asked instead.
        memory: pictures of what is to stay; None for a method that looks at none.
        base: the weights of the reference, by name: of the model before anything went.
    """
    generator = torch.Generator().manual_seed(config.seed)
    unet, device, stored = pipe.unet, pipe.unet.device, pipe.unet.dtype
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    trained = objective.trained(unet)
    watching = partial(record_attention, unet, probs=False, outputs=objective.of_layers)
    first, start = {name: base[name] for name in trained}, copied(trained)
    reference = {name: value.to(device, torch.float16) for name, value in first.items()}
    asked = torch.is_autocast_enabled(device.type)  # by the caller
    precision = torch.get_autocast_dtype(device.type) if asked else stored
    # without autocast's cache, which would outlive the weights that are swapped in
    mixed = torch.autocast(device.type, precision, enabled=precision != torch.float32, cache_enabled=False)
    prompts, others = zip(*asks, strict=True)
    others = [""] * len(others) if objective.empty else others
    shown = others if objective.moving else prompts
    seed = 1_000_000 * (config.seed + 1)  # far from those of evaluation and of other runs

    step = 0
    try:
        with swapped(trained, first):  # those whose answers count draw the pictures, too
            if objective.half_drawn is not None:
                how = (config.lessons, seed, generator, card, objective.half_drawn)
                target = Lessons.half_drawn(pipe, shown, *how)
            else:
                drawn = draw_pictures(pipe, shown, seed, card)
                target = Lessons.of(drawn, config.lessons, scheduler, generator)
            texts, instead = (encode_prompts(pipe, part)[target.index] for part in (prompts, others))
            target = replace(target, encoder_hidden_states=texts)
            kept = memory and Lessons.of(memory, config.lessons, scheduler, generator)
            with mixed:
                lessons = ask_about_concept(unet, target, instead, objective, config)
                memories = kept and ask_about_memory(unet, kept, config.memory_batch_size)
        with training(unet, trained):  # in 32 bits
            optimizer = torch.optim.AdamW(trained.values(), lr=config.lr, weight_decay=0.0)
            scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
            for step in range(1, config.iterations + 1):
                forget = lessons.batch(config.batch_size, generator, device)
                keep = memories and memories.batch(config.memory_batch_size, generator, device)
                # watched to the end of the backward pass: gradient checkpointing runs the layers again
                with watching() as record:
                    with mixed:
                        losses = batch_losses(unet, forget, keep, objective, record, config)
                    losses = (*losses, regularization_loss(trained, reference))
                    loss = sum(w * v for w, v in zip(config.weights, losses, strict=True))
                    optimizer.zero_grad(set_to_none=True)
                    scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                if not scaler.is_enabled() or not torch.isfinite(loss):  # a scaler skips steps that overflow
                    _check_finite((*losses, norm), step, config)
                scaler.step(optimizer)
                scaler.update()
                if step == config.iterations:  # no later loss would show what the last step did
                    with torch.no_grad(), watching() as record, mixed:
                        last = batch_losses(unet, forget, keep, objective, record, config)
                    _check_finite(last, step, config)
                with rounded(trained, stored):  # previews can be drawn
                    yield UnlearnState(step, config.iterations, *(float(v.detach()) for v in (loss, *losses)))
    except (DivergedError, torch.OutOfMemoryError) as error:
        overwrite(trained, start)
        if isinstance(error, DivergedError):
            raise
        raise OutOfMemoryError(
            f"{device} ran out of memory at iteration {step}; the weights are back as they were. Lower "
            f"batch_size (now {config.batch_size}) and memory_batch_size (now {config.memory_batch_size}), "
            "or call pipe.unet.enable_gradient_checkpointing()."
        ) from error


_NAMES = ("the objective's loss", "the prior loss", "the regularization loss", "the gradient")


def _check_finite(values: Sequence[Tensor], step: int, config: UnlearnConfig) -> None:
    for name, value in zip(_NAMES, values, strict=False):
        if not torch.isfinite(value):
            raise DivergedError(
                f"{name} is {value.item()} at iteration {step}; the weights are back as they were. "
                f"Lower lr (now {config.lr}) or the loss's weight."
            )
