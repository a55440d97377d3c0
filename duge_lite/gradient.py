"""Forgetting, searched: the losses go down their slope, step by step, through the whole denoiser.

The paper's form of DUGE, and the road of the methods that it is compared with (:mod:`duge_lite.baselines`).
First ask, then learn: before anything is trained the frozen reference says what it predicts and hears for
noisy versions of pictures that it drew itself. So it is no second model, and no iteration pays for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor

from .attention import AttentionRecorder, record_attention
from .concepts import ModelCard
from .config import UnlearnConfig
from .errors import DivergedError, OutOfMemoryError
from .losses import attention_target, cross_attention_loss, prior_preservation_loss, regularization_loss
from .models import Pictures, draw_pictures, encode_prompts, overwrite, sample, swapped

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
        of_instead: the pictures show what is asked instead, not the concept.
        moving: the target is what the learning model itself says by now, and not the frozen reference.
        trains: the weights that learn have one of these in their names.
    """

    name: str
    target: Callable[[Answer, Answer, Tensor, UnlearnConfig], Answer]
    loss: Callable[[Answer, Answer], Tensor]
    of_layers: bool = False
    half_drawn: float | None = None
    empty: bool = False
    of_instead: bool = False
    moving: bool = False
    trains: tuple[str, ...] = (".attn2.",)


def _away(concept: Answer, other: Answer, noise: Tensor, config: UnlearnConfig) -> Answer:
    pairs = zip(concept, other, strict=True)
    return tuple(attention_target(c, u, "negative", config.eta) for c, u in pairs)


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
            models that predict that; zero where it is not known.
        index: which picture each one was, (n,).
        other: what is asked instead, (n, T, D), where the target moves.
    """

    noisy: Tensor
    timesteps: Tensor
    encoder_hidden_states: Tensor
    wanted: Answer
    index: Tensor | None = None
    other: Tensor | None = None

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

        hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
        try:
            how = {"guidance_scale": guidance_scale, "output_type": "latent", "card": card}
            sample(pipe, prompts, seed, card.sampling_steps, **how)
        finally:
            hook.remove()
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
        other = None if self.other is None else self.other[index].to(device)
        return Lessons(*parts[:3], tuple(parts[3:]), other=other)


def watching(
    unet: torch.nn.Module, objective: Objective, noisy: Tensor
) -> AbstractContextManager[AttentionRecorder | None]:
    """Records what the layers write on latents like ``noisy``, if ``objective`` looks at that; else None."""
    if not objective.of_layers:
        return nullcontext()
    return record_attention(unet, probs=False, outputs=True)


def answered(noise_pred: Tensor, record: AttentionRecorder | None, part: slice) -> Answer:
    """The answer for a slice of the batch that just went through the UNet."""
    return tuple(x[part] for x in (record.outputs.values() if record else (noise_pred,)))


@torch.no_grad()
def ask_about_concept(
    unet: torch.nn.Module, asked: Lessons, other: Tensor, objective: Objective, config: UnlearnConfig
) -> Lessons:
    """The reference's answers about the concept; ``other`` (n, T, D) is the text that it is asked instead."""
    if objective.moving:
        return replace(asked, wanted=(), other=other)
    answers: Answer = ()
    for i in range(0, len(asked.noisy), config.batch_size):  # as many at once as in training
        part = slice(i, i + config.batch_size)
        twice = (torch.cat([x[part]] * 2).to(unet.device) for x in asked.inputs[:2])
        text = torch.cat([asked.encoder_hidden_states[part], other[part]]).to(unet.device)
        with watching(unet, objective, asked.noisy) as record:
            frozen = unet(*twice, text).sample
        half = len(frozen) // 2
        concept, instead = (answered(frozen, record, s) for s in (slice(half), slice(half, None)))
        targets = objective.target(concept, instead, asked.wanted[0][part].to(unet.device), config)
        if not answers:  # filled in place, in the model's precision: together they are large
            shapes = [(len(asked.noisy), *target.shape[1:]) for target in targets]
            answers = tuple(torch.empty(shape, dtype=frozen.dtype) for shape in shapes)
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


def trainable_parameters(unet: torch.nn.Module, objective: Objective) -> dict[str, torch.nn.Parameter]:
    """The tensors that ``objective`` lets learn, by name. Raises ValueError for Stable Diffusion XL."""
    reads_one_text(unet)
    trains = objective.trains
    return {n: p for n, p in unet.named_parameters() if any(part in n for part in trains)}


def reads_one_text(unet: torch.nn.Module) -> None:
    """Raises ValueError for Stable Diffusion XL, whose denoiser reads more than noise, moment and text."""
    if unet.config.addition_embed_type is not None:
        raise ValueError(
            "Stable Diffusion XL reads two texts and the picture's size beside them, which only the exact "
            'solver knows: leave solver="exact"'
        )


# ---- the loop


@dataclass(frozen=True)
class UnlearnState:
    """Where the loop is after iteration ``step`` (counted from 1); losses are unweighted.

    ``forget`` is the objective's own loss (DUGE's cross-attention loss).
    """

    step: int
    iterations: int
    loss: float
    forget: float
    prior: float
    regularization: float


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
            now = (unet(forget.noisy, forget.timesteps, forget.other).sample,)
        wanted = objective.target(now, now, now[0], config)
    both = zip(*(part.inputs for part in (forget, keep) if part), strict=True)
    noise_pred = unet(*map(torch.cat, both)).sample  # (b + m, 4, h, w)
    size = len(forget.noisy)
    loss = objective.loss(answered(noise_pred, record, slice(size)), wanted)
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
    trained = trainable_parameters(unet, objective)
    first = {name: base[name] for name in trained}
    prompts, others = zip(*asks, strict=True)
    others = [""] * len(others) if objective.empty else others
    shown = others if objective.of_instead else prompts
    seed = 1_000_000 * (config.seed + 1)  # far from those of evaluation and of other runs
    with swapped(trained, first):  # pictures are drawn by whose answers count
        if objective.half_drawn is not None:
            drawn = (config.lessons, seed, generator, card, objective.half_drawn)
            target = Lessons.half_drawn(pipe, shown, *drawn)
        else:
            pictures = draw_pictures(pipe, shown, seed, card)
            target = Lessons.of(pictures, config.lessons, scheduler, generator)
    texts, instead = (encode_prompts(pipe, part)[target.index] for part in (prompts, others))
    target = replace(target, encoder_hidden_states=texts)
    kept = Lessons.of(memory, config.lessons, scheduler, generator) if memory else None
    stored = unet.dtype  # of the pipeline; what is trained is in 32 bits meanwhile
    asked = torch.is_autocast_enabled(device.type)  # by the caller
    precision = torch.get_autocast_dtype(device.type) if asked else stored
    # without autocast's cache, which would outlive the weights that are swapped in
    mixed = torch.autocast(device.type, precision, enabled=precision != torch.float32, cache_enabled=False)

    step = 0
    with training(unet, trained):
        start = {name: p.detach().cpu().clone() for name, p in trained.items()}
        anchor = {name: value.to(device, torch.float16) for name, value in first.items()}
        try:
            with mixed, swapped(trained, first):
                lessons = ask_about_concept(unet, target, instead, objective, config)
                memories = ask_about_memory(unet, kept, config.memory_batch_size) if kept else None
            optimizer = torch.optim.AdamW(trained.values(), lr=config.lr, weight_decay=0.0)
            scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
            for step in range(1, config.iterations + 1):
                forget = lessons.batch(config.batch_size, generator, device)
                keep = memories and memories.batch(config.memory_batch_size, generator, device)
                # watched to the end of the backward pass: gradient checkpointing runs the layers again
                with watching(unet, objective, target.noisy) as record:
                    with mixed:
                        losses = batch_losses(unet, forget, keep, objective, record, config)
                    losses = (*losses, regularization_loss(trained, anchor))
                    loss = sum(w * v for w, v in zip(config.weights, losses, strict=True))
                    optimizer.zero_grad(set_to_none=True)
                    scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                if not scaler.is_enabled() or not torch.isfinite(loss):  # a scaler skips steps that overflow
                    _check_finite(
                        dict(zip(_NAMES, losses, strict=True)) | {"the gradient": norm}, step, config
                    )
                scaler.step(optimizer)
                scaler.update()
                _check_finite(
                    {"the sum of the weights": sum(p.sum() for p in trained.values())}, step, config
                )
                if step == config.iterations:  # no later loss would show what the last step did
                    with torch.no_grad(), watching(unet, objective, target.noisy) as record, mixed:
                        last = batch_losses(unet, forget, keep, objective, record, config)
                    _check_finite(dict(zip(_NAMES, last, strict=False)), step, config)
                with rounded(trained, stored):
                    values = [float(v.detach()) for v in (loss, *losses)]
                    yield UnlearnState(step, config.iterations, *values)  # previews can be drawn
        except DivergedError:
            overwrite(trained, start)
            raise
        except torch.OutOfMemoryError as error:
            overwrite(trained, start)
            raise OutOfMemoryError(
                f"{device} ran out of memory at iteration {step}; the weights are back as they were. Lower "
                f"batch_size (now {config.batch_size}) and memory_batch_size (now "
                f"{config.memory_batch_size}), or call pipe.unet.enable_gradient_checkpointing()."
            ) from error


_NAMES = ("the objective's loss", "the prior loss", "the regularization loss")


def _check_finite(found: Mapping[str, Tensor], step: int, config: UnlearnConfig) -> None:
    if bad := [f"{what} is {value.item()}" for what, value in found.items() if not torch.isfinite(value)]:
        raise DivergedError(
            f"{bad[0]} at iteration {step}; the weights are back as they were. "
            f"Lower lr (now {config.lr}) or the loss's weight."
        )
